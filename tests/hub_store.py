"""What a local Hub holds: repositories with commits, branches and tags, large files, users, and faults to come."""

import hashlib
import threading
from dataclasses import dataclass, field
from pathlib import Path

COMMIT = "0123456789abcdef0123456789abcdef01234567"
"""First commit of a repository that is a folder."""

GITATTRIBUTES = b"*.safetensors filter=lfs diff=lfs merge=lfs -text\n"

Files = dict[str, bytes]


@dataclass
class Fault:
    """Something that goes wrong with requests.

    Attributes:
        request: how their line begins, as in 'POST /api/models/me/net/commit'; a part of it is enough.
        status: of the answer; None ends the connection: halfway through what is read, before what is uploaded is
            kept, and after other changes are made.
        times: how often.
        headers: of the answer.
    """

    request: str
    status: int | None = 500
    times: int = 1
    headers: dict[str, str] = field(default_factory=dict)


@dataclass
class Repository:
    """A repository: commits that stay, and names that point at them."""

    private: bool = False
    gated: bool = False
    commits: dict[str, Files] = field(default_factory=dict)
    branches: dict[str, str] = field(default_factory=dict)
    tags: dict[str, str] = field(default_factory=dict)

    def commit(self, branch: str, files: Files, name: str = "") -> str:
        """Add a commit of all these files to a branch; return its name, which git would give it."""
        parent = self.branches.get(branch, "")
        text = parent + "".join(f"{path} {git_hash(files[path])}\n" for path in sorted(files))
        name = name or hashlib.sha1(text.encode()).hexdigest()
        self.commits[name] = dict(files)
        self.branches[branch] = name
        return name

    def resolve(self, revision: str) -> str | None:
        """Return the commit of a branch, a tag or a commit's own name."""
        found = self.branches.get(revision) or self.tags.get(revision) or revision
        return found if found in self.commits else None

    def files(self, revision: str = "main") -> Files:
        """Return the files at a revision, without what the Hub itself puts there."""
        commit = self.resolve(revision)
        assert commit is not None, f"no revision {revision}"
        return {name: content for name, content in self.commits[commit].items() if name != ".gitattributes"}


class Store:
    """All that a Hub holds.

    Args:
        root: folders ORGANISATION/NAME of files, each a repository of one revision that follows the folder; None has
            none.
        users: token -> organisations that it may write to, the user's own name first. A token 'no' of none may read.
        requests: gets a line for each request, such as 'GET /org/name/...'.
    """

    def __init__(
        self, root: Path | None = None, users: dict[str, list[str]] | None = None, requests: list[str] | None = None
    ) -> None:
        self.root, self.users = root, users or {}
        self.requests = [] if requests is None else requests
        self.repositories: dict[str, Repository] = {}
        self.large: dict[str, bytes] = {}
        self.parts: dict[str, dict[int, bytes]] = {}
        self.faults: list[Fault] = []
        self.part_size: int | None = None
        """Large files of more bytes go up in parts of so many; None sends them whole."""
        self.ranges: list[str] = []
        """First bytes of the parts that downloads asked for."""
        self.lock = threading.RLock()
        self._seen: dict[str, object] = {}

    def repository(self, name: str) -> Repository | None:
        """Find a repository; one of a folder has a new commit where the folder has changed."""
        folder = None if self.root is None else self.root / name
        if folder is not None and folder.is_dir() and name.count("/") == 1:
            paths = sorted(path for path in folder.rglob("*") if path.is_file())
            names = [path.relative_to(folder).as_posix() for path in paths]
            seen = [(path.stat().st_mtime_ns, path.stat().st_size) for path in paths]
            with self.lock:
                if self._seen.get(name) != (names, seen):
                    self._seen[name] = (names, seen)
                    held = self.repositories.setdefault(name, Repository())
                    files = {place: path.read_bytes() for place, path in zip(names, paths, strict=True)}
                    held.commit("main", files, "" if held.commits else COMMIT)
        return self.repositories.get(name)

    def create(self, name: str, private: bool = False) -> bool:
        """Make an empty repository; return whether it was not there."""
        with self.lock:
            if self.repository(name):
                return False
            self.repositories[name] = made = Repository(private)
            made.commit("main", {".gitattributes": GITATTRIBUTES})
            return True

    def may_write(self, token: str | None, name: str) -> bool:
        """Tell whether a token may write to a repository."""
        return name.partition("/")[0] in self.users.get(token or "", [])

    def fault(self, request: str) -> Fault | None:
        """Take the fault that is due with a request."""
        with self.lock:
            for fault in self.faults:
                if fault.request in request and fault.times > 0:
                    fault.times -= 1
                    return fault
        return None


def is_large(path: str) -> bool:
    """Tell whether a file is kept as a large one."""
    return path.endswith(".safetensors")


def git_hash(content: bytes) -> str:
    """Return git's name of a file's content."""
    return hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()


def sha256(content: bytes) -> str:
    """Return the name of a large file."""
    return hashlib.sha256(content).hexdigest()
