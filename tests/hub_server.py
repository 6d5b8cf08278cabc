"""A small local server that speaks the Hub's protocol for downloads.

Repositories are folders, ROOT/ORGANISATION/NAME/FILE, of one revision. `.safetensors` files are answered as large files
are: by a redirect to another port. Use as `with hub(root) as endpoint`, and set HF_ENDPOINT and HF_HUB_DISABLE_XET=1
before huggingface_hub is imported.
"""

import hashlib
import json
import threading
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from functools import partial
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import unquote, urlsplit

COMMIT = "0123456789abcdef0123456789abcdef01234567"


@contextmanager
def hub(root: Path, requests: list[str] | None = None) -> Iterator[str]:
    """Serve the repositories below `root`; gives the endpoint. Lines such as 'GET /org/name/...' go to `requests`."""
    log = [] if requests is None else requests
    with ExitStack() as stack:
        storage = stack.enter_context(_serving(partial(_Storage, root, log)))
        yield stack.enter_context(_serving(partial(_Hub, root, log, storage)))


@contextmanager
def _serving(handler: "partial[_Handler]") -> Iterator[str]:
    server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.05}, daemon=True)
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_port}"
    finally:
        server.shutdown()
        server.server_close()
        thread.join()


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def __init__(self, root: Path, requests: list[str], *args: object) -> None:
        self.root, self.requests = root, requests
        super().__init__(*args)  # type: ignore[arg-type]

    def do_HEAD(self) -> None:
        self._answer()

    def do_GET(self) -> None:
        self._answer()

    def log_message(self, *args: object) -> None:
        self.requests.append(f"{self.command} {self.path}")

    def _answer(self) -> None:
        raise NotImplementedError

    def _send(self, status: int, headers: dict[str, str] | None = None, body: bytes = b"") -> None:
        self.send_response(status)
        for name, value in {"Content-Length": str(len(body)), **(headers or {})}.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(body)


class _Storage(_Handler):
    """Where large files lie: plain bytes, from the middle too."""

    def _answer(self) -> None:
        body = (self.root / unquote(urlsplit(self.path).path).lstrip("/")).read_bytes()
        wanted = self.headers.get("Range", "")
        if not wanted.startswith("bytes="):
            return self._send(200, {"Accept-Ranges": "bytes"}, body)
        first, last = wanted.removeprefix("bytes=").split("-")
        start, stop = int(first), min(int(last or len(body) - 1), len(body) - 1) + 1
        self._send(206, {"Content-Range": f"bytes {start}-{stop - 1}/{len(body)}"}, body[start:stop])


class _Hub(_Handler):
    """Answers about repositories, and their small files."""

    def __init__(self, root: Path, requests: list[str], storage: str, *args: object) -> None:
        self.storage = storage
        super().__init__(root, requests, *args)

    def _answer(self) -> None:
        path = unquote(urlsplit(self.path).path).strip("/")
        parts = path.removeprefix("api/models/").split("/")
        name, rest = "/".join(parts[:2]), parts[2:]
        if len(parts) < 2 or not (self.root / name).is_dir():
            return self._missing("RepoNotFound")
        if path.startswith("api/models/"):
            return self._describe(name, rest)
        if rest[:1] != ["resolve"] or len(rest) < 3:
            return self._missing("EntryNotFound")
        if rest[1] not in ("main", COMMIT):
            return self._missing("RevisionNotFound")
        file = self.root / name / "/".join(rest[2:])
        if not file.is_file():
            return self._missing("EntryNotFound")
        self._resolve(file)

    def _resolve(self, file: Path) -> None:
        body = file.read_bytes()
        if file.suffix != ".safetensors":
            return self._send(200, {"X-Repo-Commit": COMMIT, "ETag": f'"{hashlib.sha1(body).hexdigest()}"'}, body)
        large = {"X-Linked-Etag": f'"{hashlib.sha256(body).hexdigest()}"', "X-Linked-Size": str(len(body))}
        location = f"{self.storage}/{file.relative_to(self.root).as_posix()}"
        self._send(302, {"X-Repo-Commit": COMMIT, "Location": location, **large})

    def _describe(self, name: str, rest: list[str]) -> None:
        folder = self.root / name
        files = sorted(path for path in folder.rglob("*") if path.is_file())
        names = [path.relative_to(folder).as_posix() for path in files]
        if rest[:1] == ["tree"]:
            sizes = [path.stat().st_size for path in files]
            tree = [{"type": "file", "path": n, "size": s, "oid": n} for n, s in zip(names, sizes, strict=True)]
            return self._json(tree)
        self._json({"id": name, "sha": COMMIT, "siblings": [{"rfilename": file} for file in names]})

    def _json(self, value: object) -> None:
        self._send(200, {"Content-Type": "application/json"}, json.dumps(value).encode())

    def _missing(self, code: str) -> None:
        commit = {"X-Repo-Commit": COMMIT} if code == "EntryNotFound" else {}
        self._send(404, {"X-Error-Code": code, **commit})
