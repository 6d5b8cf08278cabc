"""A small local server that speaks the Hub's protocol: what the client asks in uploading and downloading models.

`with hub(root) as endpoint` serves the folders ROOT/ORGANISATION/NAME for reading; `with hub(Store(...)) as endpoint`
takes uploads too, from tokens that the store knows. Large files lie on another host, and are answered by a redirect.
Set HF_ENDPOINT and HF_HUB_DISABLE_XET=1 before huggingface_hub is imported.
"""

import base64
import json
import socket
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from functools import partial
from http.server import BaseHTTPRequestHandler
from pathlib import Path
from typing import Any
from urllib.parse import unquote, urlsplit

from tests.hub_store import COMMIT, Files, Repository, Store, git_hash, is_large, sha256
from tests.served import serving

__all__ = ["COMMIT", "hub"]


@contextmanager
def hub(held: Path | Store, requests: list[str] | None = None) -> Iterator[str]:
    """Serve the repositories below a folder, or those of a store; gives the endpoint.

    Lines such as 'GET /org/name/...' go to `requests`, or to the store's own list.
    """
    store = held if isinstance(held, Store) else Store(held, requests=requests)
    with ExitStack() as stack:
        # clients of version 1 follow a redirect to the same host, whatever its port: another name it must be
        storage = stack.enter_context(serving(partial(_Storage, store))).replace("127.0.0.1", "localhost")
        yield stack.enter_context(serving(partial(_Hub, store, storage)))


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def __init__(self, store: Store, *args: object) -> None:
        self.store = store
        self.cut = False
        super().__init__(*args)  # type: ignore[arg-type]

    def do_GET(self) -> None:
        self._begin()

    do_HEAD = do_POST = do_PUT = do_GET

    def log_message(self, *args: object) -> None:
        self.store.requests.append(f"{self.command} {self.path}")

    def _begin(self) -> None:
        self.body = self._read_body()
        self.path_parts = [unquote(part) for part in urlsplit(self.path).path.strip("/").split("/")]
        fault = self.store.fault(f"{self.command} {self.path}")
        self.cut = fault is not None and fault.status is None
        if self.cut and self.command == "PUT":
            return self._hang_up()
        if fault is not None and fault.status is not None:
            return self._send(fault.status, fault.headers)
        with suppress(BrokenPipeError, ConnectionResetError):
            self._answer()

    def _read_body(self) -> bytes:
        if self.headers.get("Transfer-Encoding", "") != "chunked":
            return self.rfile.read(int(self.headers.get("Content-Length", 0)))
        body = b""
        while size := int(self.rfile.readline(), 16):
            body += self.rfile.read(size)
            self.rfile.readline()
        self.rfile.readline()
        return body

    def _answer(self) -> None:
        raise NotImplementedError

    def _send(self, status: int, headers: dict[str, str] | None = None, body: bytes = b"") -> None:
        if self.cut and self.command != "GET":
            return self._hang_up()
        self.send_response(status)
        for name, value in {"Content-Length": str(len(body)), **(headers or {})}.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body[: len(body) // 2] if self.cut else body)
        if self.cut:
            self._hang_up()

    def _hang_up(self) -> None:
        self.close_connection = True
        self.wfile.flush()
        self.connection.shutdown(socket.SHUT_RDWR)

    def _json(self, value: object, status: int = 200, headers: dict[str, str] | None = None) -> None:
        self._send(status, {"Content-Type": "application/json", **(headers or {})}, json.dumps(value).encode())


class _Storage(_Handler):
    """Where large files lie: plain bytes, from the middle too, and parts of files that are on their way."""

    def _answer(self) -> None:
        kind, name, *part = self.path_parts
        if self.command == "PUT":
            return self._keep(kind, name, part)
        body = self.store.large[name]
        wanted = self.headers.get("Range", "")
        if not wanted.startswith("bytes="):
            return self._send(200, {"Accept-Ranges": "bytes"}, body)
        self.store.ranges.append(wanted.removeprefix("bytes=").partition("-")[0])
        first, last = wanted.removeprefix("bytes=").split("-")
        start, stop = int(first), min(int(last or len(body) - 1), len(body) - 1) + 1
        self._send(206, {"Content-Range": f"bytes {start}-{stop - 1}/{len(body)}"}, body[start:stop])

    def _keep(self, kind: str, name: str, part: list[str]) -> None:
        if kind == "part":
            self.store.parts.setdefault(name, {})[int(part[0])] = self.body
        else:
            self.store.large[name] = self.body
        self._send(200, {"ETag": f'"{sha256(self.body)}"'})


class _Hub(_Handler):
    """Answers about repositories, their small files, and what changes them."""

    def __init__(self, store: Store, storage: str, *args: object) -> None:
        self.storage = storage
        super().__init__(store, *args)

    @property
    def token(self) -> str | None:
        return self.headers.get("Authorization", "").removeprefix("Bearer ") or None

    @property
    def here(self) -> str:
        return f"http://{self.headers['Host']}"

    def _answer(self) -> None:
        parts = self.path_parts
        if parts[0] == "api" and parts[1] != "models":
            return self._of_the_user("/".join(parts[1:]))
        if parts[0] == "multipart":
            return self._join(parts[1])
        parts = parts[2:] if parts[0] == "api" else parts
        name, rest = "/".join(parts[:2]).removesuffix(".git"), parts[2:]
        repository = self.store.repository(name)
        if repository is None or (repository.private and not self.store.may_write(self.token, name)):
            return self._missing("RepoNotFound", 404 if self.token in self.store.users or not repository else 401)
        if self.command == "POST":
            return self._change(name, repository, rest)
        self._read(name, repository, rest)

    # Who asks, and new repositories

    def _of_the_user(self, path: str) -> None:
        if path == "validate-yaml":
            return self._json({"errors": [], "warnings": []})
        if self.token not in self.store.users:
            said = {"X-Error-Message": "Invalid credentials in Authorization header"}
            return self._json({"error": "Invalid username or password."}, 401, said)
        own = self.store.users[self.token or ""]
        if path == "whoami-v2":
            return self._json({"type": "user", "name": own[0], "orgs": [{"name": org} for org in own[1:]]})
        asked = json.loads(self.body)
        name = f"{asked['organization']}/{asked['name']}"
        if not self.store.may_write(self.token, name):
            return self._forbidden()
        private = asked.get("visibility") == "private" or bool(asked.get("private"))
        made = self.store.create(name, private)
        self._json({"url": f"{self.here}/{name}", "id": name}, 200 if made else 409)

    # Reading

    def _read(self, name: str, repository: Repository, rest: list[str]) -> None:
        kind = rest[0] if rest else "revision"
        if kind == "refs":
            return self._json({"branches": _refs(repository.branches), "tags": _refs(repository.tags), "converts": []})
        revision = rest[1] if len(rest) > 1 else "main"
        commit = repository.resolve(revision)
        if commit is None:
            return self._missing("RevisionNotFound")
        files = repository.commits[commit]
        if kind == "resolve":
            return self._resolve(repository, commit, files, "/".join(rest[2:]))
        if kind == "revision":
            siblings = [{"rfilename": file} for file in files]
            return self._json({"id": name, "sha": commit, "private": repository.private, "siblings": siblings})
        self._json([_described(file, content) for file, content in files.items()])

    def _resolve(self, repository: Repository, commit: str, files: Files, path: str) -> None:
        if repository.gated and self.token not in self.store.users:
            return self._missing("GatedRepo", 401 if self.token is None else 403)
        known = {"X-Repo-Commit": commit}
        if path not in files:
            return self._missing("EntryNotFound", headers=known)
        body = files[path]
        if not is_large(path):
            return self._send(200, {**known, "ETag": f'"{git_hash(body)}"'}, body)
        name = sha256(body)
        self.store.large.setdefault(name, body)
        large = {"X-Linked-Etag": f'"{name}"', "X-Linked-Size": str(len(body))}
        self._send(302, {**known, **large, "Location": f"{self.storage}/large/{name}"})

    # Changing

    def _change(self, name: str, repository: Repository, rest: list[str]) -> None:
        if not self.store.may_write(self.token, name):
            return self._forbidden() if self.token in self.store.users else self._missing("RepoNotFound", 401)
        kind = rest[0]
        if kind == "info":
            return self._large(name, rest[2:])
        if kind in ("branch", "tag"):
            return self._name(repository, kind, rest[1])
        branch = rest[1]
        if branch not in repository.branches:
            return self._missing("RevisionNotFound")
        if kind == "preupload":
            return self._preupload(repository.commits[repository.branches[branch]])
        self._commit(name, repository, branch)

    def _large(self, name: str, rest: list[str]) -> None:
        asked = json.loads(self.body)
        if rest == ["verify"]:
            right = sha256(self.store.large.get(asked["oid"], b"")) == asked["oid"]
            if not right:
                self.store.large.pop(asked["oid"], None)
            return self._json({}, 200) if right else self._json({"error": "checksum"}, 422)
        objects = [self._upload(name, asked_for["oid"], asked_for["size"]) for asked_for in asked["objects"]]
        self._json({"transfer": "basic", "objects": objects})

    def _upload(self, name: str, oid: str, size: int) -> dict[str, Any]:
        described: dict[str, Any] = {"oid": oid, "size": size}
        if oid in self.store.large:
            return described
        upload: dict[str, Any] = {"href": f"{self.storage}/large/{oid}"}
        if (step := self.store.part_size) is not None and size > step:
            numbers = range(1, -(-size // step) + 1)
            parts = {str(number): f"{self.storage}/part/{oid}/{number}" for number in numbers}
            upload = {"href": f"{self.here}/multipart/{oid}", "header": {"chunk_size": str(step), **parts}}
        verify = {"href": f"{self.here}/{name}.git/info/lfs/verify"}
        return {**described, "actions": {"upload": upload, "verify": verify}}

    def _join(self, oid: str) -> None:
        parts = self.store.parts.pop(oid, {})
        named = {part["partNumber"]: part["etag"].strip('"') for part in json.loads(self.body)["parts"]}
        if named != {number: sha256(part) for number, part in parts.items()}:
            return self._json({"error": "parts"}, 400)
        self.store.large[oid] = b"".join(parts[number] for number in sorted(parts))
        self._json({})

    def _name(self, repository: Repository, kind: str, name: str) -> None:
        asked = json.loads(self.body)
        names = repository.branches if kind == "branch" else repository.tags
        if name in names:
            return self._json({"error": f"{kind} is there"}, 409)
        commit = repository.resolve(asked.get("startingPoint", "main"))
        if commit is None:
            return self._missing("RevisionNotFound")
        names[name] = commit
        self._json({})

    def _preupload(self, held: Files) -> None:
        modes = []
        for file in json.loads(self.body)["files"]:
            path = file["path"]
            known = _oid(path, held[path]) if path in held else None
            mode = "lfs" if is_large(path) else "regular"
            modes.append({"path": path, "uploadMode": mode, "shouldIgnore": False, "oid": known})
        self._json({"files": modes})

    def _commit(self, name: str, repository: Repository, branch: str) -> None:
        lines = [json.loads(line) for line in self.body.splitlines()]
        with self.store.lock:
            parent = lines[0]["value"].get("parentCommit")
            if parent is not None and parent != repository.branches[branch]:
                said = {"X-Error-Message": "A commit has happened since. Please refresh and try again."}
                return self._json({"error": "conflict"}, 412, said)
            files = dict(repository.commits[repository.branches[branch]])
            for line in lines[1:]:
                value = line["value"]
                if line["key"] == "deletedFile":
                    if files.pop(value["path"], None) is None:
                        return self._json({"error": f"no file {value['path']}"}, 404)
                elif line["key"] == "file":
                    files[value["path"]] = base64.b64decode(value["content"])
                elif (content := self.store.large.get(value["oid"])) is not None:
                    files[value["path"]] = content
                else:
                    return self._json({"error": f"no file {value['oid']}"}, 422)
            oid = repository.commit(branch, files)
        answer = {"commitOid": oid, "commitUrl": f"{self.here}/{name}/commit/{oid}", "hookOutput": ""}
        self._json({"success": True, **answer})

    # Refusals

    def _missing(self, code: str, status: int = 404, headers: dict[str, str] | None = None) -> None:
        self._send(status, {"X-Error-Code": code, **(headers or {})})

    def _forbidden(self) -> None:
        said = "You don't have the rights to create or change a model under this namespace"
        self._json({"error": said}, 403, {"X-Error-Message": said})


def _refs(names: dict[str, str]) -> list[dict[str, str]]:
    return [{"name": name, "ref": f"refs/{name}", "targetCommit": commit} for name, commit in names.items()]


def _described(path: str, content: bytes) -> dict[str, Any]:
    large = {"lfs": {"oid": sha256(content), "size": len(content), "pointerSize": 134}} if is_large(path) else {}
    return {"type": "file", "path": path, "size": len(content), "oid": git_hash(content), **large}


def _oid(path: str, content: bytes) -> str:
    return sha256(content) if is_large(path) else git_hash(content)
