"""Publishing and loading by whichever version of huggingface_hub is imported, against a local Hub.

`test_client.py` runs this file by pytest in a process for each version, as the client reads its settings when it is
imported.
"""

import os
import tempfile
import threading
import time
import traceback
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path

from tests.hub_server import hub
from tests.hub_store import Fault, Store, sha256

SECRET, FOREIGN, WRONG = "hf_ThisMayNotBeSeen", "hf_NorMayThis", "hf_OrThat"
USERS = {SECRET: ["me", "lab"], FOREIGN: ["someone"]}

store = Store(users=USERS)
served = ExitStack()
home = Path(served.enter_context(tempfile.TemporaryDirectory()))
endpoint = served.enter_context(hub(store))
os.environ |= {"HF_ENDPOINT": endpoint, "HF_HOME": str(home), "HF_HUB_VERBOSITY": "debug", "HF_DEBUG": "1"}
os.environ |= {f"HF_HUB_DISABLE_{what}": "1" for what in ("XET", "TELEMETRY", "PROGRESS_BARS")}

import huggingface_hub  # noqa: E402
import pytest  # noqa: E402
import timm  # noqa: E402
import torch  # noqa: E402
from huggingface_hub.utils import _http  # noqa: E402

from timm_deconv.errors import InputError  # noqa: E402
from timm_deconv.hub.publish import Remote, dry_run, push  # noqa: E402
from timm_deconv.hub.tree import Tree, checksums  # noqa: E402
from timm_deconv.models.checksums import CHECKSUMS  # noqa: E402

RUN = Path(os.environ["TIMM_DECONV_RUN"])
NAME = "resnet18_cifar_deconv.nd_e2_digits"
API = "/api/models/me/net"


@pytest.fixture(scope="session", autouse=True)
def _served() -> Iterator[None]:
    assert huggingface_hub.__version__.startswith(os.environ["TIMM_DECONV_CLIENT"])
    with served:
        yield


@pytest.fixture(autouse=True)
def _fresh(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, capfd: pytest.CaptureFixture, tmp_path: Path
) -> Iterator:
    """An empty Hub, a token that may write, no waiting; afterwards no token in what was logged, printed or written."""
    store.__init__(users=USERS)  # type: ignore[misc]
    monkeypatch.setenv("HF_TOKEN", SECRET)
    monkeypatch.setattr(time, "sleep", lambda seconds: None)  # of the client's own patience too
    new_session()
    caplog.set_level("DEBUG")
    yield
    printed = "".join(capfd.readouterr()) + caplog.text
    written = [path.read_bytes() for place in (home, RUN, tmp_path) for path in place.rglob("*") if path.is_file()]
    for secret in (SECRET, FOREIGN, WRONG):
        assert secret not in printed
        assert not any(secret.encode() in content for content in written)


@pytest.fixture
def tree(tmp_path: Path) -> Tree:
    """A small tree of no network, which the Hub cannot tell from one."""
    folder = tmp_path / "tree"
    (folder / "folded").mkdir(parents=True)
    (folder / "config.json").write_text('{"architecture": "net"}')
    (folder / "README.md").write_text("---\nlicense: mit\n---\n# net\n")
    (folder / "model.safetensors").write_bytes(os.urandom(300_000))
    (folder / "folded" / "model.safetensors").write_bytes(os.urandom(200_000))
    write_checksums(folder)
    return Tree(folder, "me/net", "net", None)


def write_checksums(folder: Path) -> None:
    (folder / CHECKSUMS).write_text(checksums(folder))


def send(tree: Tree, revision: str | None = None, private: bool = False) -> str:
    remote = Remote("me/net", revision)
    remote.check("net", private)
    return remote.upload(tree, private)[0]


def held(tree: Tree, revision: str = "main") -> bool:
    """Whether the repository holds the tree, the whole of it and nothing else."""
    wanted = {name: (tree.folder / name).read_bytes() for name in tree.files()}
    return store.repositories["me/net"].files(revision) == wanted


def commits() -> int:
    return len(store.repositories["me/net"].commits) - 1  # the first is the Hub's


def refused(action: Callable[[], object], *words: str) -> None:
    """Check that an action is refused in one line of these words, and that its trace, with all values, has no token."""
    with pytest.raises(InputError) as caught:
        action()
    assert "\n" not in str(caught.value)
    assert all(word in str(caught.value) for word in words), caught.value
    trace = "".join(traceback.TracebackException.from_exception(caught.value, capture_locals=True).format())
    assert not any(secret in trace for secret in USERS.keys() | {WRONG})


def new_session() -> None:
    """Let the client read its settings again."""
    (_http.reset_sessions if hasattr(_http, "reset_sessions") else _http.close_session)()


def outputs(name: str) -> torch.Tensor:
    with torch.no_grad():
        return timm.create_model(name, pretrained=True).eval()(torch.ones(1, 3, 32, 32).cumsum(3) / 32)


def test_a_published_run_loads_by_every_path(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    prepared = dry_run(RUN, "me", tmp_path / "tree", evaluate=False)
    published = push(RUN, "me", evaluate=False)
    repository = store.repositories[f"me/{NAME}"]
    wanted = {name: (prepared.folder / name).read_bytes() for name in prepared.files()}
    assert repository.files() == wanted
    expected = outputs(f"local-dir:{RUN}")
    repository.commit("main", {"config.json": b"{}"})  # somebody else's, later
    pinned = f"hf-hub:me/{NAME}@{published.commit}"
    folder = huggingface_hub.snapshot_download(f"me/{NAME}", revision=published.commit, allow_patterns="folded/*")
    for name in (pinned, f"local-dir:{prepared.folder}"):
        assert torch.equal(outputs(name), expected)
    for place in (f"{folder}/folded", prepared.folder / "folded"):
        assert (outputs(f"local-dir:{place}") - expected).abs().max() < 1e-4 * expected.abs().max()
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    new_session()
    assert torch.equal(outputs(pinned), expected)
    refused(lambda: push(RUN, "me"), "HF_HUB_OFFLINE is set", "unset it")


def test_large_files_go_up_whole_and_in_parts(tree: Tree) -> None:
    commit = send(tree)
    assert held(tree) and commits() == 1
    assert sum(line.startswith("PUT /large/") for line in store.requests) == 2
    assert send(tree) == commit and commits() == 1, "the same once more changes nothing"
    store.__init__(users=USERS)  # type: ignore[misc]
    store.part_size = 80_000
    send(tree)
    assert held(tree) and commits() == 1
    assert sum(line.startswith("PUT /part/") for line in store.requests) == 4 + 3


def test_an_upload_that_was_interrupted_is_absent_and_repeating_it_completes_it(tree: Tree) -> None:
    store.faults = [Fault("PUT /large/" + sha256((tree.folder / "model.safetensors").read_bytes()), None, times=99)]
    refused(lambda: send(tree), "no connection", "push again")
    assert store.repositories["me/net"].files() == {}
    store.faults.clear()
    store.requests.clear()
    send(tree)
    assert held(tree) and commits() == 1


def test_a_commit_whose_answer_is_lost_is_there_once(tree: Tree) -> None:
    store.faults = [Fault(f"POST {API}/commit", None)]
    commit = send(tree)
    assert held(tree, commit) and commits() == 1


def test_a_commit_that_deletes_and_whose_answer_is_lost_is_there_once(tree: Tree) -> None:
    send(tree)
    (tree.folder / "folded" / "model.safetensors").unlink()
    write_checksums(tree.folder)
    store.faults = [Fault(f"POST {API}/commit", None)]
    commit = send(tree)
    assert held(tree, commit) and commits() == 2


@pytest.mark.parametrize("status", [429, 500])
def test_a_busy_hub_is_asked_again(tree: Tree, status: int) -> None:
    asked = ("GET /api/whoami", "POST /api/repos", f"GET {API}", f"POST {API}/preupload", f"POST {API}/commit")
    asked += ("/info/lfs/objects/batch", "PUT /large/")
    store.faults = [Fault(request, status, headers={"Retry-After": "0"}) for request in asked]
    send(tree)
    assert held(tree) and commits() == 1
    assert all(fault.times == 0 for fault in store.faults)
    store.faults = [Fault("GET /api/whoami", status, times=99, headers={"Retry-After": "0"})]
    refused(lambda: send(tree), "me/net: the Hub", "push again")


def test_of_two_pushes_at_once_one_wins_and_the_other_says_so(tree: Tree) -> None:
    for there in (False, True):
        remotes = [Remote("me/net"), Remote("me/net")]
        for remote in remotes:
            remote.check("net", False)
        (tree.folder / "README.md").write_text(f"---\nlicense: mit\n---\n# net, {there}\n")
        write_checksums(tree.folder)
        before, barrier, outcomes = commits() if there else 0, threading.Barrier(2), []

        def race(remote: Remote, barrier: threading.Barrier = barrier, outcomes: list = outcomes) -> None:
            barrier.wait()
            try:
                outcomes.append(remote.upload(tree, False)[0])
            except InputError as error:
                outcomes.append(error)

        threads = [threading.Thread(target=race, args=(remote,)) for remote in remotes]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        won = {outcome for outcome in outcomes if isinstance(outcome, str)}
        lost = [str(outcome) for outcome in outcomes if not isinstance(outcome, str)]
        assert held(tree) and commits() == before + 1 and len(won) == 1
        assert all("somebody else has just changed it" in reason for reason in lost)
    (tree.folder / "README.md").write_text("---\nlicense: mit\n---\n# of the one\n")
    write_checksums(tree.folder)
    late, first = Remote("me/net"), Remote("me/net")
    late.check("net", False)
    first.check("net", False)
    first.upload(tree, False)
    (tree.folder / "README.md").write_text("---\nlicense: mit\n---\n# of the other\n")
    write_checksums(tree.folder)
    refused(lambda: late.upload(tree, False), "me/net: somebody else has just changed it", "push again")
    assert b"of the one" in store.repositories["me/net"].files()["README.md"]


def test_a_branch_is_made_and_main_stays(tree: Tree) -> None:
    first = send(tree)
    (tree.folder / "README.md").write_text("---\nlicense: mit\n---\n# another\n")
    second = send(tree, "next")
    assert held(tree, "next") and store.repositories["me/net"].branches == {"main": first, "next": second}
    assert send(tree, "next") == second


def test_files_of_the_earlier_tree_go_and_those_of_others_stay(tree: Tree) -> None:
    send(tree)
    repository = store.repositories["me/net"]
    repository.commit("main", {**repository.commits[repository.branches["main"]], "NOTES": b"mine"})
    (tree.folder / "folded" / "model.safetensors").unlink()
    send(tree)
    assert set(repository.files()) == {*tree.files(), "NOTES"}


def test_a_file_that_its_owner_has_removed_does_not_hinder(tree: Tree) -> None:
    (tree.folder / "curve.png").write_bytes(b"a picture")
    write_checksums(tree.folder)
    send(tree)
    repository = store.repositories["me/net"]
    kept = {name: content for name, content in repository.files().items() if name != "curve.png"}
    repository.commit("main", kept)
    (tree.folder / "curve.png").unlink()
    write_checksums(tree.folder)
    send(tree)
    assert held(tree)


def test_a_public_repository_made_meanwhile_takes_nothing_private(tree: Tree) -> None:
    remote = Remote("me/net")
    remote.check("net", True)
    store.create("me/net")
    refused(lambda: remote.upload(tree, True), "me/net: somebody else has just changed it")
    assert store.repositories["me/net"].files() == {} and not store.large


def test_a_private_repository_shows_itself_to_tokens_alone(tree: Tree, monkeypatch: pytest.MonkeyPatch) -> None:
    commit = send(tree, private=True)
    assert store.repositories["me/net"].private

    def read(folder: str) -> str:
        return huggingface_hub.hf_hub_download("me/net", "model.safetensors", revision=commit, local_dir=folder)

    assert Path(read(str(tree.folder.parent / "a"))).read_bytes() == (tree.folder / "model.safetensors").read_bytes()
    for token in (FOREIGN, None):
        monkeypatch.setenv("HF_TOKEN", token or "")
        with pytest.raises(huggingface_hub.errors.RepositoryNotFoundError):
            read(str(tree.folder.parent / "b"))
    monkeypatch.setenv("HF_TOKEN", SECRET)
    store.repositories["me/net"].private = False
    refused(lambda: send(tree, private=True), "me/net is there, and public")


def test_a_gated_repository_asks_for_a_token(tree: Tree, monkeypatch: pytest.MonkeyPatch) -> None:
    send(tree)
    store.repositories["me/net"].gated = True
    monkeypatch.setenv("HF_TOKEN", WRONG)
    with pytest.raises(huggingface_hub.errors.GatedRepoError):
        huggingface_hub.hf_hub_download("me/net", "model.safetensors", local_dir=str(tree.folder.parent / "got"))


def test_a_missing_file_is_named(tree: Tree) -> None:
    send(tree)
    with pytest.raises(huggingface_hub.utils.EntryNotFoundError):
        huggingface_hub.hf_hub_download("me/net", "pytorch_model.bin")


def test_tokens_that_will_not_do_are_refused_before_anything_else(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_TOKEN", WRONG)
    refused(lambda: push(RUN, "me"), NAME, "does not know the token", "hf auth login")
    monkeypatch.setenv("HF_TOKEN", "")
    refused(lambda: push(RUN, "me"), "no token", "hf auth login", "HF_TOKEN")
    assert store.repositories == {}


def test_a_place_of_others_is_refused(tree: Tree, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_TOKEN", FOREIGN)
    refused(lambda: send(tree), "me/net: the token may not write there", "--org")
    assert store.repositories == {}
    store.create("me/net", private=True)  # which this token does not see
    refused(lambda: send(tree), "me/net: the token may not write there")
    store.repositories["me/net"].private = False
    refused(lambda: send(tree), "me/net: the token may not write there")
    assert store.repositories["me/net"].files() == {}


def test_a_repository_with_other_content_stays_as_it_is(tree: Tree) -> None:
    contents = (
        ({"README.md": b"# mine"}, "other files (README.md)"),
        ({"config.json": b'{"architecture": "other"}', "SHA256SUMS": b""}, "a network other"),
        ({"config.json": b'{"architecture": "net"}', "pytorch_model.bin": b""}, "other files (config.json"),
        ({"config.json": b"<html>", "SHA256SUMS": b""}, "other files (SHA256SUMS, config.json)"),
    )
    store.create("me/net")
    for files, words in contents:
        before = store.repositories["me/net"].commit("main", files)
        refused(lambda: send(tree), f"me/net holds {words}", "choose another --tag or --org for net")
        assert store.repositories["me/net"].branches["main"] == before


def test_a_file_that_arrives_otherwise_is_not_committed(tree: Tree) -> None:
    store.faults = [Fault("/info/lfs/verify", 422, times=9)]
    refused(lambda: send(tree), "me/net: ", "422")
    assert store.repositories["me/net"].files() == {}


def test_without_a_network_one_line_says_so(tree: Tree) -> None:
    remote = Remote("me/net")
    remote.api.endpoint = "http://127.0.0.1:9"
    refused(lambda: remote.check("net", False), "me/net: no connection", "push again")


def test_a_name_that_is_none_is_refused(tree: Tree) -> None:
    remote = Remote("me/no/net")
    refused(lambda: remote.check("net", False), "me/no/net: ")


def test_a_download_that_breaks_off_goes_on_where_it_was(tree: Tree, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(huggingface_hub.constants, "DOWNLOAD_CHUNK_SIZE", 10_000)
    send(tree)
    store.faults = [Fault("GET /large/", None)]
    file = tried_twice(lambda: huggingface_hub.hf_hub_download("me/net", "model.safetensors"))
    assert Path(file).read_bytes() == (tree.folder / "model.safetensors").read_bytes()
    assert store.ranges and all(int(first) > 0 for first in store.ranges)


@pytest.mark.parametrize("status", [429, 500])
def test_a_download_from_a_busy_hub_ends_well(tree: Tree, status: int) -> None:
    send(tree)
    for method in ("HEAD", "GET"):
        store.faults = [Fault(f"{method} /me/net/resolve", status, headers={"Retry-After": "0"})]
        place = str(tree.folder.parent / method)
        file = tried_twice(lambda place=place: huggingface_hub.hf_hub_download("me/net", "README.md", local_dir=place))
        assert Path(file).read_bytes() == (tree.folder / "README.md").read_bytes()
        assert store.faults[0].times == 0


def tried_twice(action: Callable[[], str]) -> str:
    """Act, and once more where it fails: some versions are patient by themselves, others when they are called again."""
    try:
        return action()
    except Exception:
        return action()
