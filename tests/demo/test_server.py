"""The server of the page: whatever is sent to it, it answers in one line and goes on; nobody else is answered."""

import base64
import http.client
import io
import json
import re
import socket
import struct
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from tests.demo.pairs import CLASSES, served, small_pair
from tests.pictures import read_cifar
from timm_deconv.data.pictures import MOST_BYTES
from timm_deconv.demo import DemoServer

NO_SUCH_PAGE = (404, {"error": "there is no such page here"})


@pytest.fixture(scope="module")
def server() -> Iterator[DemoServer]:
    with served(small_pair()) as server:
        yield server


def ask(server: DemoServer, method: str, path: str, body: bytes | None = None, **headers: str) -> tuple[int, Any, Any]:
    """Send a request, and return status, what came (JSON read), and headers."""
    connection = http.client.HTTPConnection("127.0.0.1", server.server_port, timeout=20)
    try:
        connection.request(method, path, body, {name.replace("_", "-"): value for name, value in headers.items()})
        answer = connection.getresponse()
        content = answer.read()
        is_json = answer.headers["Content-Type"] == "application/json"
        return answer.status, json.loads(content) if is_json else content, answer.headers
    finally:
        connection.close()


def encoded(image: Image.Image, kind: str = "png", **options: Any) -> bytes:
    file = io.BytesIO()
    image.save(file, kind, **options)
    return file.getvalue()


def decoded(address: str) -> Image.Image:
    return Image.open(io.BytesIO(base64.b64decode(address.removeprefix("data:image/png;base64,"))))


def pixels(image: Image.Image) -> np.ndarray:
    return np.asarray(image.convert("RGB")).astype(int)


@pytest.fixture(scope="module")
def ramp() -> Image.Image:
    """A picture whose colours change smoothly."""
    rows, cols = np.mgrid[0:48, 0:64]
    return Image.fromarray(np.stack([rows * 5, cols * 3, (rows + cols) * 2], -1).astype(np.uint8))


def test_a_picture_of_cifar_10_is_answered_with_what_the_networks_compute(server: DemoServer, data_dir: Path) -> None:
    content = read_cifar(data_dir, 1)[3][1]
    status, found, _ = ask(server, "POST", "/compare", content)
    assert status == 200
    comparison = server.pair.compare(Image.open(io.BytesIO(content)).convert("RGB"))
    for row in found["classes"]:
        index = CLASSES.index(row["name"])
        assert row["deconv"] == pytest.approx(float(comparison.deconv[index]))
        assert row["twin"] == pytest.approx(float(comparison.twin[index]))
    names = {row["name"] for row in found["classes"]}
    firsts = {CLASSES[int(each.argmax())] for each in (comparison.deconv, comparison.twin)}
    assert len(names) == 5
    assert firsts <= names
    assert np.abs(pixels(decoded(found["seen"])) - pixels(Image.open(io.BytesIO(content)))).max() <= 1
    assert np.shape(found["before"]) == np.shape(found["after"]) == (27, 27)
    assert decoded(found["whitened"]).size == (32, 32)


@pytest.mark.parametrize("kind", ["grey", "deep", "rgba", "palette", "cmyk", "turned", "gif"])
def test_pictures_of_every_kind_are_taken(server: DemoServer, ramp: Image.Image, kind: str) -> None:
    exif = Image.Exif()
    exif[0x0112] = 6  # to be turned clockwise
    make: dict[str, Callable[[], bytes]] = {
        "grey": lambda: encoded(ramp.convert("L")),
        "deep": lambda: encoded(Image.fromarray(np.asarray(ramp.convert("L")).astype(np.uint16) * 257)),
        "rgba": lambda: encoded(ramp.convert("RGBA")),
        "palette": lambda: encoded(ramp.quantize(64)),
        "cmyk": lambda: encoded(ramp.convert("CMYK"), "jpeg"),
        "turned": lambda: encoded(ramp.transpose(Image.Transpose.ROTATE_90), "jpeg", exif=exif),
        "gif": lambda: encoded(ramp, "gif"),
    }
    status, found, _ = ask(server, "POST", "/compare", make[kind]())
    assert status == 200, found
    expected = pixels(ramp.convert("L") if kind in ("grey", "deep") else ramp)
    assert np.abs(pixels(decoded(found["picture"])) - expected).mean() < 8


def vast_png() -> bytes:
    """The beginning of a PNG of 400 million pixels."""
    header = b"IHDR" + struct.pack(">IIBBBBB", 20_000, 20_000, 8, 2, 0, 0, 0)
    checked = struct.pack(">I", len(header) - 4) + header + struct.pack(">I", zlib.crc32(header))
    return b"\x89PNG\r\n\x1a\n" + checked + struct.pack(">I", 9) + b"IDAT"


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "the file is empty"),
        (b"no picture", "the file is no picture"),
        (b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n", "the file is no picture"),
        (b"<svg xmlns='http://www.w3.org/2000/svg'/>", "the file is no picture"),
        (encoded(Image.effect_noise((64, 64), 50))[:300], "the picture is damaged or cut off"),
        (vast_png(), "too many pixels; at most 50 million"),
    ],
    ids=["empty", "text", "eps", "svg", "cut off", "vast"],
)
def test_what_is_no_picture_is_answered_in_one_line_and_the_server_goes_on(
    server: DemoServer, ramp: Image.Image, content: bytes, message: str
) -> None:
    status, found, _ = ask(server, "POST", "/compare", content)
    assert status == 400
    assert message in found["error"]
    assert "\n" not in found["error"]
    assert ask(server, "POST", "/compare", encoded(ramp))[0] == 200


def raw(server: DemoServer, length: str, body: bytes = b"") -> bytes:
    """Send a picture's request with any length and body, and return the beginning of the answer."""
    head = f"POST /compare HTTP/1.1\r\nHost: 127.0.0.1:{server.server_port}\r\nContent-Length: {length}\r\n\r\n"
    with socket.create_connection(("127.0.0.1", server.server_port), timeout=20) as connection:
        connection.sendall(head.encode() + body)
        return b"" if body else connection.recv(100)


def test_bodies_that_are_too_long_or_of_no_length_are_not_read(server: DemoServer) -> None:
    for length in (str(MOST_BYTES + 1), 5000 * "9"):
        assert raw(server, length).startswith(b"HTTP/1.0 413 ")
    for length in ("-1", "many", "1e3", "", "²"):
        assert raw(server, length).startswith(b"HTTP/1.0 411 ")


def test_whoever_hangs_up_halfway_does_not_stop_the_server(
    server: DemoServer, ramp: Image.Image, capfd: pytest.CaptureFixture[str]
) -> None:
    raw(server, "900", b"half")
    assert ask(server, "POST", "/compare", encoded(ramp))[0] == 200
    assert capfd.readouterr().err == ""


@pytest.mark.parametrize("host", ["evil.example", "evil.example:{port}", "127.0.0.1:1", "127.0.0.1", ""])
def test_other_names_for_this_address_are_refused(server: DemoServer, host: str) -> None:
    for method, path in (("GET", "/"), ("GET", "/about"), ("POST", "/compare")):
        status, found, _ = ask(server, method, path, b"", Host=host.format(port=server.server_port))
        assert (status, found) == (403, {"error": f"this page is at {server.url} only"})


def test_pages_from_elsewhere_are_refused(server: DemoServer, ramp: Image.Image) -> None:
    for origin in ("https://evil.example", "null", f"https://127.0.0.1:{server.server_port}"):
        assert ask(server, "POST", "/compare", encoded(ramp), Origin=origin)[0] == 403
    for name in ("127.0.0.1", "localhost"):
        own = f"{name}:{server.server_port}"
        assert ask(server, "POST", "/compare", encoded(ramp), Host=own, Origin=f"http://{own}")[0] == 200


@pytest.mark.parametrize(
    "path", ["/../pair.py", "/%2e%2e/pair.py", "//etc/passwd", "/page/", "/.", "/index.html/..", "/about/", "/compare"]
)
def test_only_the_files_of_the_page_are_served(server: DemoServer, path: str) -> None:
    assert ask(server, "GET", path)[:2] == NO_SUCH_PAGE
    assert ask(server, "POST", "/", b"")[:2] == NO_SUCH_PAGE


def test_the_page_names_no_other_place_and_forbids_them(server: DemoServer) -> None:
    for path, (kind, content) in server.files.items():
        status, found, headers = ask(server, "GET", path)
        assert (status, found, headers["Content-Type"]) == (200, content, kind)
        assert headers["Content-Security-Policy"].startswith("default-src 'self'; ")
        if kind != "image/jpeg":
            assert not re.search(r"https?:|//\w", content.decode().replace("http://www.w3.org/2000/svg", "")), path


def test_it_listens_on_this_computer_only(server: DemoServer) -> None:
    assert server.socket.getsockname()[0] == "127.0.0.1"


def test_what_the_page_says_at_first_is_what_the_networks_are(server: DemoServer) -> None:
    status, found, _ = ask(server, "GET", "/about?again")
    assert status == 200
    assert (found["deconv"], found["twin"]) == ("resnet18_025_cifar_deconv", "resnet18_025_cifar")
    assert (found["classes"], found["window"], found["steps"]) == (CLASSES, [3, 3], 3)
    assert (found["statistics"], found["carried_over"]) == ("network", False)


def test_networks_for_grey_pictures_are_shown_grey(ramp: Image.Image) -> None:
    with served(small_pair(channels=1)) as server:
        status, found, _ = ask(server, "POST", "/compare", encoded(ramp))
    assert status == 200
    assert {decoded(found[name]).mode for name in ("picture", "seen", "whitened")} == {"L"}


def test_a_fault_of_the_server_is_told_and_printed(
    ramp: Image.Image, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    with served(small_pair()) as server:
        monkeypatch.setattr(server.pair, "compare", lambda _: 1 / 0)
        found = ask(server, "POST", "/compare", encoded(ramp))[:2]
    assert found == (500, {"error": "that went wrong; the terminal says more"})
    assert "ZeroDivisionError" in capfd.readouterr().err
