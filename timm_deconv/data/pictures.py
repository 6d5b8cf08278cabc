"""Pictures that somebody names or hands over: files, folders, patterns and addresses, read with limits."""

import glob
import io
import re
import time
import urllib.error
import urllib.request
from collections.abc import Iterable, Iterator
from http.client import HTTPException, HTTPResponse
from pathlib import Path
from typing import Any
from urllib.parse import unquote, urlsplit
from urllib.request import Request

from PIL import Image, ImageOps

from timm_deconv.errors import InputError

from .images import UNREADABLE, as_mode, mode_of

__all__ = ["FORMATS", "MOST_BYTES", "MOST_PIXELS", "fetch", "file_stem", "find_pictures", "read_picture"]

FORMATS = ("JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF", "PPM")
"""What is read of Pillow's formats: some others start programs, as EPS does."""

MOST_BYTES = 32 * 2**20
MOST_PIXELS = 50_000_000

ADDRESSES = ("http://", "https://")
PAGES = ("text/", "application/json", "application/xhtml")
"""How the content types of what is no picture begin."""
LONGEST_STEM = 200
"""Bytes of a name; file systems take 255 with what is put before and after."""
PATIENCE = 20.0
"""Seconds that a server may be silent."""
DEADLINE = 120.0
"""Seconds that a picture may take altogether."""
PIECE = 2**16
"""Bytes after which the clock is looked at."""


def find_pictures(places: Iterable[str]) -> list[str]:
    """List the pictures that are meant: addresses and files as they are, of folders and patterns each file in order.

    Args:
        places: files, folders (with those below), patterns such as `*.png` or `**/*.jpg`, addresses of http and https.

    Raises:
        InputError: no such file, a folder without pictures, or a pattern that nothing matches.
    """
    return [picture for place in places for picture in _pictures_of(place)]


def _pictures_of(place: str) -> Iterator[str]:
    if place.startswith(ADDRESSES) or Path(place).is_file():
        yield place
    elif Path(place).is_dir():
        endings = {ending for ending, name in Image.registered_extensions().items() if name in FORMATS}
        found = sorted(file for file in Path(place).rglob("*") if file.suffix.lower() in endings and file.is_file())
        if not found:
            raise InputError(f"no pictures in the folder {place}; {', '.join(FORMATS)} are read")
        yield from map(str, found)
    elif glob.has_magic(place):
        found = sorted(file for file in glob.glob(place, recursive=True) if Path(file).is_file())
        if not found:
            raise InputError(f"no file matches {place}")
        yield from found
    else:
        raise InputError(f"no file or folder {place}; an address begins with https://")


def file_stem(place: str) -> str:
    """Return a name, without ending, for a file that is made of a picture: of an address its path's, without a query.

    It is cut to LONGEST_STEM bytes; what no file system takes is left out.
    """
    path = unquote(urlsplit(place).path) if place.startswith(ADDRESSES) else place
    stem = re.sub(r'[\x00-\x1f<>:"|?*\\/]', "_", Path(path).stem)
    return stem.encode(errors="ignore")[:LONGEST_STEM].decode(errors="ignore")


def fetch(place: str) -> bytes:
    """Read the bytes of a file or address, MOST_BYTES at most.

    Raises:
        InputError: an address that cannot be reached, is none, or answers with a page; or more bytes.
        OSError: a file that cannot be read.
    """
    if place.startswith(ADDRESSES):
        content = _download(place)
    else:
        with Path(place).open("rb") as file:
            content = file.read(MOST_BYTES + 1)
    if len(content) > MOST_BYTES:
        raise InputError(f"more than {MOST_BYTES // 2**20} MB; give a smaller picture")
    return content


def _download(address: str) -> bytes:
    try:
        request = Request(address, headers={"User-Agent": "timm-deconv", "Accept": "image/*"})
        with urllib.request.build_opener(_Redirects).open(request, timeout=PATIENCE) as answer:
            content, kind = _body(answer), answer.headers.get_content_type()
        if kind.startswith(PAGES) and not _begins_as_picture(content):
            raise InputError(f"the address answers with a page ({kind}); give that of the picture itself")
        return content
    except urllib.error.HTTPError as error:
        raise InputError(f"the server answers {error.code} {error.reason}; check the address") from None
    except (OSError, HTTPException, ValueError) as error:
        if isinstance(error, InputError):
            raise
        reason = getattr(error, "reason", error)
        raise InputError(f"cannot be had ({reason}); check the address and the network, or give a file") from None


class _Redirects(urllib.request.HTTPRedirectHandler):
    """Leads on to other addresses of http and https alone: urllib follows to ftp too."""

    def redirect_request(self, req: Request, fp: Any, code: int, msg: str, headers: Any, newurl: str) -> Request | None:
        if not newurl.lower().startswith(ADDRESSES):
            raise urllib.error.HTTPError(newurl, code, f"{msg}, to {newurl}, which is not followed", headers, fp)
        return super().redirect_request(req, fp, code, msg, headers, newurl)


def _body(answer: HTTPResponse) -> bytes:
    """Read MOST_BYTES and one more at most, until the deadline."""
    content, end = bytearray(), time.monotonic() + DEADLINE
    while len(content) <= MOST_BYTES and (piece := answer.read1(PIECE)):
        content += piece
        if time.monotonic() > end:
            raise InputError(f"takes more than {DEADLINE:.0f} seconds; try again later, or give a file")
    return bytes(content)


def _begins_as_picture(content: bytes) -> bool:
    """Tell what a picture is by itself: some servers send it without a type, others with a wrong one."""
    try:
        with Image.open(io.BytesIO(content), formats=FORMATS):
            return True
    except Image.DecompressionBombError:
        return True
    except UNREADABLE:
        return False


def read_picture(content: bytes, channels: int = 3) -> Image.Image:
    """Read a picture of any of the usual formats, upright, in 1 or 3 channels of 8 bits.

    Raises:
        InputError: the file is empty, no picture, cut off, or of more pixels than MOST_PIXELS.
    """
    if not content:
        raise InputError("the file is empty; choose another")
    try:
        image = Image.open(io.BytesIO(content), formats=FORMATS)
    except Image.DecompressionBombError:
        raise InputError(f"the picture has too many pixels; at most {MOST_PIXELS // 10**6} million") from None
    except UNREADABLE:
        raise InputError(f"the file is no picture; {', '.join(FORMATS)} are read") from None
    if image.width * image.height > MOST_PIXELS:
        size = f"{image.width} x {image.height} pixels"
        raise InputError(f"the picture has {size}; at most {MOST_PIXELS // 10**6} million")
    try:
        image.load()
        return as_mode(ImageOps.exif_transpose(image), mode_of(channels))
    except UNREADABLE as error:
        raise InputError(f"the picture is damaged or cut off ({' '.join(str(error).split())}); get it again") from None
