"""Publishing a network on the Hub: everything is checked first, then all of it goes up in one commit, or nothing."""

import json
import tempfile
from dataclasses import dataclass
from pathlib import Path

import huggingface_hub
from huggingface_hub import CommitInfo, CommitOperationAdd, CommitOperationDelete, HfApi, ModelInfo
from huggingface_hub.errors import RepositoryNotFoundError, RevisionNotFoundError

import timm_deconv
from timm_deconv.errors import InputError
from timm_deconv.models.checksums import CHECKSUMS
from timm_deconv.models.weights import check_new_folder

from .client import CHANGED, answered, patiently, status_of
from .measure import measure
from .source import Source, read_source
from .tree import Tree, checked_forms, write_tree

__all__ = ["Published", "dry_run", "push"]

OF_THE_HUB = ".gitattributes"
"""What a new repository holds."""


@dataclass(frozen=True)
class Published:
    """What is on the Hub now.

    Attributes:
        repository: ORGANISATION/NAME.
        commit: its revision, by which `hf-hub:REPOSITORY@COMMIT` pins it.
        url: of the commit.
        sizes: files and their bytes.
    """

    repository: str
    commit: str
    url: str
    sizes: dict[str, int]


def dry_run(
    folder: str | Path,
    org: str,
    output: str | Path | None = None,
    *,
    tag: str | None = None,
    evaluate: bool = True,
    data_dir: str | Path | None = None,
) -> Tree:
    """Write exactly what `push` would send, and send nothing.

    Args:
        folder: see `read_source`.
        org: the organisation or user whose repository it would be.
        output: a new folder; `published/NAME` where it is not given.
        tag: see `read_source`.
        evaluate: measure the accuracy again; see `measure`.
        data_dir: of the images of the evaluation.

    Raises:
        InputError: see `read_source`, `checked_forms`, `measure` and `write_tree`.
    """
    source = read_source(folder, tag)
    place = Path("published", source.name) if output is None else Path(output)
    check_new_folder(place)
    return _checked_tree(source, org, place, evaluate, data_dir)


def push(
    folder: str | Path,
    org: str,
    *,
    tag: str | None = None,
    private: bool = False,
    revision: str | None = None,
    evaluate: bool = True,
    data_dir: str | Path | None = None,
) -> Published:
    """Publish a network as ORG/ARCHITECTURE.TAG, in one commit; where all of it is there already, nothing changes.

    The client's own token is used. An upload that was interrupted is completed by another call.

    Args:
        folder, org, tag, evaluate, data_dir: as in `dry_run`.
        private: make the repository a private one.
        revision: the branch to commit to, made where it is missing; the main one by default.

    Raises:
        InputError: what `dry_run` refuses, or no token, no permission, no connection, a repository of other content, or
            one that was changed meanwhile.
    """
    source = read_source(folder, tag)
    remote = Remote(f"{org}/{source.name}", revision)
    remote.check(source.architecture, private)
    with tempfile.TemporaryDirectory(prefix="timm_deconv_") as place:
        tree = _checked_tree(source, org, Path(place, "tree"), evaluate, data_dir)
        commit, url = remote.upload(tree, private)
        return Published(remote.repository, commit, url, tree.sizes())


def _checked_tree(source: Source, org: str, place: Path, evaluate: bool, data_dir: str | Path | None) -> Tree:
    forms = checked_forms(source)
    measured = measure(source, data_dir) if evaluate else None
    return write_tree(source, forms, f"{org}/{source.name}", place, measured)


class Remote:
    """A repository of the Hub, there or not yet.

    Args:
        repository: ORGANISATION/NAME.
        revision: a branch; None is the main one.
    """

    def __init__(self, repository: str, revision: str | None = None) -> None:
        self.repository, self.revision = repository, revision
        self.api = HfApi(library_name="timm_deconv", library_version=timm_deconv.__version__)
        self.head: str | None = None
        """The commit that `check` saw; None of a repository or branch that was not there."""
        self.ours: list[str] = []
        """Files of an earlier publication."""

    @answered
    def check(self, architecture: str, private: bool) -> None:
        """Check that there is a token, and that the repository is free or holds an earlier tree of the architecture.

        Raises:
            InputError: it is not so, or the Hub cannot be asked.
        """
        if huggingface_hub.get_token() is None:
            raise InputError("no token of the Hub: `hf auth login` with one that may write, or set HF_TOKEN to it")
        patiently(self.api.whoami)
        info = self._info()
        if info is None:
            return
        if private and not info.private:
            raise InputError(f"{self.repository} is there, and public: make it private in its settings first")
        info = (self._info(self.revision) if self.revision else None) or info
        self._check_content(info, architecture)
        self.head = info.sha

    def _info(self, revision: str | None = None) -> ModelInfo | None:
        """Return what the Hub knows of the repository at a revision, files included; None where there is none."""
        try:
            return patiently(lambda: self.api.model_info(self.repository, revision=revision))
        except (RepositoryNotFoundError, RevisionNotFoundError) as error:
            if status_of(error) != 404:
                raise
            return None

    def _check_content(self, info: ModelInfo, architecture: str) -> None:
        files = _files(info)
        if not files:
            return
        found = None
        if {"config.json", CHECKSUMS} <= files:
            with tempfile.TemporaryDirectory(prefix="timm_deconv_") as place:
                found = _architecture(self._read(info.sha, "config.json", place))
                ours = {line.partition("  ")[2] for line in self._read(info.sha, CHECKSUMS, place).splitlines()}
                self.ours = sorted(ours & files)  # the owner may have removed some
        if found != architecture:
            what = f"a network {found}" if found else f"other files ({', '.join(sorted(files)[:3])})"
            raise InputError(
                f"{self.repository} holds {what}, which stay; choose another --tag or --org for {architecture}"
            )

    def _read(self, commit: str | None, file: str, place: str) -> str:
        download = self.api.hf_hub_download
        return Path(patiently(lambda: download(self.repository, file, revision=commit, local_dir=place))).read_text()

    @answered
    def upload(self, tree: Tree, private: bool) -> tuple[str, str]:
        """Send a tree in one commit on top of what `check` saw; return the commit and its address.

        Files of the earlier tree that this one lacks go; what others added stays.

        Raises:
            InputError: it did not go up; nothing of it is there then.
        """
        visibility = {"private": True} if private else {}  # else as the organisation has it
        patiently(lambda: self.api.create_repo(self.repository, **visibility, exist_ok=True))
        parent = self.head or self._head_of_new(private)
        if self.revision is not None:
            start = {"branch": self.revision, "revision": parent}
            patiently(lambda: self.api.create_branch(self.repository, **start, exist_ok=True))
        try:
            commit = patiently(lambda: self._commit(tree, parent))
        except Exception as error:
            if status_of(error) == 412 and (done := self._committed(tree)):
                return done
            raise
        return commit.oid, commit.commit_url

    def _head_of_new(self, private: bool) -> str:
        """Return the commit that the Hub begins a repository with; somebody else may have made it meanwhile."""
        info = patiently(lambda: self.api.model_info(self.repository))
        if _files(info) or (private and not info.private):
            raise InputError(f"{self.repository}: {CHANGED}")
        return info.sha

    def _committed(self, tree: Tree) -> tuple[str, str] | None:
        """Return the head and its address where it holds the tree: the answer to a commit had been lost."""
        info = self._info(self.revision)
        if info is None or CHECKSUMS not in _files(info):
            return None
        with tempfile.TemporaryDirectory(prefix="timm_deconv_") as place:
            if self._read(info.sha, CHECKSUMS, place) != (tree.folder / CHECKSUMS).read_text():
                return None
        return info.sha, f"{self.api.endpoint}/{self.repository}/commit/{info.sha}"

    def _commit(self, tree: Tree, parent: str) -> CommitInfo:
        files = tree.files()
        gone = [name for name in self.ours if name not in files]
        return self.api.create_commit(
            self.repository,
            [
                *(CommitOperationAdd(name, tree.folder / name) for name in files),
                *(CommitOperationDelete(name) for name in gone),
            ],
            commit_message=f"{tree.repository.partition('/')[2]}: weights, folded weights, card",
            revision=self.revision,
            parent_commit=parent,
        )


def _files(info: ModelInfo) -> set[str]:
    return {file.rfilename for file in info.siblings or ()} - {OF_THE_HUB}


def _architecture(text: str) -> str | None:
    """Return the network's name in timm's config.json; None where it is another file."""
    try:
        config = json.loads(text)
    except json.JSONDecodeError:
        return None
    return config.get("architecture") if isinstance(config, dict) else None
