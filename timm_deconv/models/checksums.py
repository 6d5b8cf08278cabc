"""Checksums beside published weights: SHA256SUMS, as sha256sum writes it, in a repository or a folder."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from huggingface_hub import hf_hub_download
from huggingface_hub.errors import EntryNotFoundError
from timm.models._hub import hf_split

from .weights import check_sha256

__all__ = ["CHECKSUMS", "check_recorded"]

CHECKSUMS = "SHA256SUMS"
WEIGHTS = "model.safetensors"


def check_recorded(cfg: Mapping[str, Any], cache_dir: str | Path | None = None) -> None:
    """Verify the weights of a saved or published network where their checksum is recorded.

    Args:
        cfg: timm's configuration, which says where they are.
        cache_dir: as in `timm.create_model`.

    Raises:
        InputError: they are other weights.
    """
    folders = {"local-dir": _local, "hf-hub": _cached}
    found = folders[cfg["source"]](cfg, cache_dir) if cfg.get("source") in folders else None
    if found is None:
        return
    sums, file = found
    name = file.relative_to(sums.parent).as_posix()
    known = next((line[:64] for line in sums.read_text().splitlines() if line[64:].lstrip(" *") == name), None)
    if known and file.is_file():
        check_sha256(file, known, f"get it again, or remove {sums} if you changed the weights yourself")


def _local(cfg: Mapping[str, Any], _: object) -> tuple[Path, Path] | None:
    """Find checksums and weights of a folder; a repository's folded/ is listed one level above."""
    folder = Path(cfg["file"]).absolute()
    sums = (place / CHECKSUMS for place in (folder, folder.parent))
    return next(((path, folder / WEIGHTS) for path in sums if path.is_file()), None)


def _cached(cfg: Mapping[str, Any], cache_dir: str | Path | None) -> tuple[Path, Path] | None:
    """Get a repository's checksums, and find its weights, which timm has downloaded."""
    repository, revision = hf_split(cfg["hf_hub_id"])
    try:
        sums = Path(hf_hub_download(repository, CHECKSUMS, revision=revision, cache_dir=cache_dir))
    except EntryNotFoundError:  # there are none, or none in the cache while there is no connection
        return None
    return sums, sums.parent / WEIGHTS
