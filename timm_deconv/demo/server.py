"""The server of the page: on this computer only, a fixed set of files, one picture a request.

    GET /, /style.css, /app.js, /cat.jpg, ...   the files of `page`
    GET /about                                  what the page shows before there is a picture, as JSON
    POST /compare                               a file's bytes -> what both networks make of it, as JSON

What is wrong with a request is answered as {"error": one line}.
"""

import errno
import json
import sys
import threading
from http import HTTPStatus
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from importlib.resources import files
from typing import Any

from timm_deconv.data.pictures import MOST_BYTES, read_picture
from timm_deconv.errors import InputError

from .answers import about, answer
from .pair import Pair

__all__ = ["DemoServer"]

ADDRESS = "127.0.0.1"
PATIENCE = 30
"""Seconds without a byte after which a connection is given up."""
MOST_DIGITS = 20
"""Of a body's length; Python refuses to read numbers of thousands of digits."""

TYPES = {
    "html": "text/html; charset=utf-8",
    "css": "text/css; charset=utf-8",
    "js": "text/javascript; charset=utf-8",
    "svg": "image/svg+xml",
    "jpg": "image/jpeg",
}
HEADERS = {
    "Content-Security-Policy": "default-src 'self'; img-src 'self' data:; base-uri 'none'; frame-ancestors 'none'",
    "X-Content-Type-Options": "nosniff",
    "Cross-Origin-Resource-Policy": "same-origin",
    "Referrer-Policy": "no-referrer",
    "Cache-Control": "no-store",
}


class DemoServer(ThreadingHTTPServer):
    """Serves the page once `pair` is set; the port is taken before, so that its error comes first.

    Args:
        port: 0 for any that is free.

    Raises:
        InputError: the port is taken or there is none of the number.

    Attributes:
        pair: what looks at the pictures.
        url: of the page.
    """

    daemon_threads = True
    pair: Pair

    def __init__(self, port: int = 0) -> None:
        if not 0 <= port < 2**16:
            raise InputError(f"port={port}: ports are numbered from 1 to 65535; 0 takes any free one")
        try:
            super().__init__((ADDRESS, port), Handler)
        except OSError as error:
            if error.errno == errno.EADDRINUSE:
                raise InputError(f"port {port} is taken; give another by --port, or 0 for any free one") from None
            if error.errno == errno.EACCES:
                raise InputError(f"port {port} is not for everybody's use; give one above 1023 by --port") from None
            raise
        self.url = f"http://{ADDRESS}:{self.server_port}/"
        self.hosts = {f"{name}:{self.server_port}" for name in (ADDRESS, "localhost")}
        if self.server_port == 80:
            self.hosts |= {ADDRESS, "localhost"}
        self.files = _page_files()
        self.looking = threading.Lock()  # one picture at a time: a network takes all cores

    def handle_error(self, request: Any, client_address: Any) -> None:
        """Print what went wrong, unless it is that the page did not wait for its answer."""
        if not isinstance(sys.exception(), ConnectionError):
            super().handle_error(request, client_address)


class Handler(BaseHTTPRequestHandler):
    """Answers one request."""

    server: DemoServer
    server_version, sys_version = "timm-deconv", ""
    timeout = PATIENCE

    def do_GET(self) -> None:
        """Answer with a file of the page, or what it shows at first."""
        if not self._is_own():
            return
        path = self.path.partition("?")[0]
        if path == "/about":
            self._send_json(HTTPStatus.OK, about(self.server.pair))
        elif path in self.server.files:
            self._send(HTTPStatus.OK, *self.server.files[path])
        else:
            self._send_json(HTTPStatus.NOT_FOUND, {"error": "there is no such page here"})

    def do_POST(self) -> None:
        """Answer with what the networks make of a picture."""
        length = self._body_length()
        if length is None:
            return
        content = self.rfile.read(length)
        if len(content) < length:
            return  # whoever sent it is gone
        pair = self.server.pair
        try:
            with self.server.looking:
                found = answer(pair, read_picture(content, pair.channels))
        except InputError as error:
            self._send_json(HTTPStatus.BAD_REQUEST, {"error": str(error)})
        except Exception:
            self._send_json(HTTPStatus.INTERNAL_SERVER_ERROR, {"error": "that went wrong; the terminal says more"})
            raise
        else:
            self._send_json(HTTPStatus.OK, found)

    def log_message(self, format: str, *args: Any) -> None:
        """Say nothing of requests: the terminal is for errors."""

    def _body_length(self) -> int | None:
        """Return how many bytes to read; None where the request is answered already."""
        length = self.headers.get("Content-Length", "")
        if not self._is_own():
            return None
        if self.path != "/compare":
            self._send_json(HTTPStatus.NOT_FOUND, {"error": "there is no such page here"})
        elif not (length.isascii() and length.isdecimal()):
            self._send_json(HTTPStatus.LENGTH_REQUIRED, {"error": "the request does not say how long it is"})
        elif len(length) > MOST_DIGITS or int(length) > MOST_BYTES:
            too_large = f"the file has more than {MOST_BYTES >> 20} MB; make it smaller"
            self._send_json(HTTPStatus.REQUEST_ENTITY_TOO_LARGE, {"error": too_large})
        else:
            return int(length)
        return None

    def _is_own(self) -> bool:
        """Refuse what does not come from the page itself: a foreign name may lead a browser to this address."""
        host, origin = self.headers.get("Host", ""), self.headers.get("Origin")
        if host in self.server.hosts and origin in (None, f"http://{host}"):
            return True
        self._send_json(HTTPStatus.FORBIDDEN, {"error": f"this page is at {self.server.url} only"})
        return False

    def _send_json(self, status: HTTPStatus, value: Any) -> None:
        self._send(status, "application/json", json.dumps(value, allow_nan=False).encode())

    def _send(self, status: HTTPStatus, content_type: str, content: bytes) -> None:
        self.send_response(status)
        for name, value in {"Content-Type": content_type, "Content-Length": str(len(content)), **HEADERS}.items():
            self.send_header(name, value)
        self.end_headers()
        self.wfile.write(content)


def _page_files() -> dict[str, tuple[str, bytes]]:
    """Read the files of the page: type and content by path. No path of a request reaches the disk."""
    page = [file for file in (files(__package__) / "page").iterdir() if file.name.rpartition(".")[2] in TYPES]
    found = {f"/{file.name}": (TYPES[file.name.rpartition(".")[2]], file.read_bytes()) for file in page}
    return {"/": found["/index.html"], **found}
