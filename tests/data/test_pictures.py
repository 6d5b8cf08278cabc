"""Pictures that somebody names: which are meant, and what is said of those that cannot be had."""

import io
import socket
import time
from contextlib import suppress
from http.server import BaseHTTPRequestHandler
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from tests.served import served, serving
from timm_deconv.data import pictures
from timm_deconv.data.pictures import fetch, file_stem, find_pictures, read_picture
from timm_deconv.errors import InputError


def encoded(image: Image.Image, form: str = "png", **options: object) -> bytes:
    file = io.BytesIO()
    image.save(file, form, **options)
    return file.getvalue()


RED = Image.new("RGB", (30, 20), (200, 10, 10))


def test_files_folders_patterns_and_addresses_are_found_in_order(tmp_path: Path) -> None:
    for name in ("b.png", "a.JPG", "deep/c.webp", "notes.txt", "deep/d.tiff"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).touch()
    below = [str(tmp_path / name) for name in ("a.JPG", "b.png", "deep/c.webp", "deep/d.tiff")]
    address, notes = "https://example.org/cat", str(tmp_path / "notes.txt")
    assert find_pictures([str(tmp_path)]) == below
    assert find_pictures([address, notes, f"{tmp_path}/*.png"]) == [address, notes, below[1]]
    assert find_pictures([f"{tmp_path}/**/*.[tw]*"]) == [*below[2:], notes]


@pytest.mark.parametrize(
    ("place", "message"),
    [
        ("nowhere.png", "no file or folder nowhere.png; an address begins with https://"),
        ("empty", "no pictures in the folder empty; JPEG, PNG"),
        ("*.gif", r"no file matches \*.gif"),
    ],
)
def test_places_without_a_picture_are_named(
    place: str, message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "empty").mkdir()
    (tmp_path / "empty" / "notes.txt").touch()
    with pytest.raises(InputError, match=message):
        find_pictures([place])


def test_an_address_gives_the_bytes_of_the_file(tmp_path: Path) -> None:
    (tmp_path / "red.png").write_bytes(encoded(RED))
    with served(tmp_path) as address:
        assert fetch(f"{address}/red.png") == fetch(str(tmp_path / "red.png")) == encoded(RED)


class _Odd(BaseHTTPRequestHandler):
    """Answers /bare with a picture that has no type, /page with one that is called a page, /slow a byte at a time."""

    def do_GET(self) -> None:
        self.send_response(302 if self.path == "/ftp" else 200)
        if self.path == "/ftp":
            self.send_header("Location", "ftp://127.0.0.1:1/cat.png")
        if self.path == "/page":
            self.send_header("Content-Type", "text/html")
        self.end_headers()
        if self.path != "/slow":
            self.wfile.write(encoded(RED))
            return
        with suppress(ConnectionError):
            for _ in range(200):
                self.wfile.write(b"x")
                time.sleep(0.02)

    def log_message(self, *args: object) -> None:
        pass


def test_what_a_picture_is_says_the_file_and_not_the_server() -> None:
    with serving(_Odd) as address:
        assert fetch(f"{address}/bare") == fetch(f"{address}/page") == encoded(RED)


def test_a_download_ends_in_time_and_leads_to_no_ftp(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pictures, "DEADLINE", 0.1)
    with serving(_Odd) as address:
        with pytest.raises(InputError, match="takes more than 0 seconds; try again later, or give a file"):
            fetch(f"{address}/slow")
        with pytest.raises(InputError, match=r"302 Found, to ftp://127\.0\.0\.1:1/cat\.png, which is not followed"):
            fetch(f"{address}/ftp")


def test_a_name_for_a_file_is_of_letters_that_any_file_system_takes() -> None:
    assert file_stem("https://example.org/a%2Fb%3Cc.d.jpg?signature=1/2#top") == "b_c.d"
    assert file_stem("scans/cat.jpg") == "cat" and file_stem("https://example.org") == ""
    assert file_stem(f"{'a' * 199}é.png") == 199 * "a"


def test_addresses_that_give_no_picture_are_said_to(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "index.html").write_text("<html>Cats</html>")
    (tmp_path / "large.png").write_bytes(bytes(2000))
    monkeypatch.setattr(pictures, "MOST_BYTES", 1000)
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))  # nobody listens
        unreachable = f"http://127.0.0.1:{taken.getsockname()[1]}/cat.png"
        with served(tmp_path) as address:
            for place, message in {
                f"{address}/": r"the address answers with a page \(text/html\); give that of the picture itself",
                f"{address}/cat.png": "the server answers 404 File not found; check the address",
                f"{address}/large.png": "more than 0 MB; give a smaller picture",
                unreachable: r"cannot be had \(.*refused\); check the address and the network, or give a file",
                "http://nobody.invalid/cat.png": r"cannot be had \(.*\); check the address and the network",
                "http://[::1/cat.png": "cannot be had",
                "https://": "cannot be had",
            }.items():
                with pytest.raises(InputError, match=message) as caught:
                    fetch(place)
                assert "\n" not in str(caught.value)


@pytest.mark.parametrize("form", ["jpeg", "png", "webp", "gif", "bmp", "tiff", "ppm"])
def test_the_usual_formats_are_read_in_the_networks_channels(form: str) -> None:
    for channels, mode in ((3, "RGB"), (1, "L")):
        picture = read_picture(encoded(RED, form), channels)
        assert (picture.mode, picture.size) == (mode, (30, 20))
        assert abs(np.asarray(picture, float).mean((0, 1)) - np.asarray(RED.convert(mode), float)[0, 0]).max() < 3


def test_a_photograph_that_was_taken_sideways_stands_upright() -> None:
    exif = Image.Exif()
    exif[0x0112] = 6
    assert read_picture(encoded(RED, "jpeg", exif=exif)).size == (20, 30)


def test_files_that_are_no_whole_picture_are_said_to(monkeypatch: pytest.MonkeyPatch) -> None:
    noise = Image.fromarray(np.random.default_rng(0).integers(0, 255, (64, 64, 3), dtype=np.uint8))
    for content, message in {
        b"": "the file is empty",
        b"%!PS-Adobe-3.0 EPSF-3.0\n": "the file is no picture; JPEG, PNG",
        b"<html>": "the file is no picture",
        encoded(noise)[:5000]: "the picture is damaged or cut off",
        encoded(noise, "jpeg")[:900]: "the picture is damaged or cut off",
    }.items():
        with pytest.raises(InputError, match=message) as caught:
            read_picture(content)
        assert "\n" not in str(caught.value)
    monkeypatch.setattr(pictures, "MOST_PIXELS", 1000)
    with pytest.raises(InputError, match="the picture has 64 x 64 pixels; at most 0 million"):
        read_picture(encoded(noise))
