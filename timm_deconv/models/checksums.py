"""Checksums beside published weights: SHA256SUMS, as sha256sum writes it, in a repository or a folder."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from huggingface_hub import _CACHED_NO_EXIST, constants, hf_hub_download, try_to_load_from_cache
from huggingface_hub.errors import EntryNotFoundError, LocalEntryNotFoundError
from timm.models._hub import hf_split

from timm_deconv.errors import InputError

from .weights import check_sha256

__all__ = ["CHECKSUMS", "check_recorded"]

CHECKSUMS = "SHA256SUMS"
WEIGHTS = "model.safetensors"


def check_recorded(cfg: Mapping[str, Any], cache_dir: str | Path | None = None) -> None:
    """Verify the weights of a saved or published network, or of a file, where their checksum is recorded.

    Args:
        cfg: timm's configuration, which says where they are.
        cache_dir: as in `timm.create_model`.

    Raises:
        InputError: they are other weights, or are not there; or the Hub does not answer whether there are checksums.
    """
    if cfg.get("source") == "hf-hub":
        found = _cached(cfg, cache_dir)
    else:
        found = _local(Path(cfg["file"]).absolute()) if cfg.get("file") else None
    if found is None:
        return
    sums, file = found
    name = file.relative_to(sums.parent).as_posix()
    known = next((line[:64] for line in sums.read_text().splitlines() if line[64:].lstrip(" *") == name), None)
    if known is None:
        return
    way_out = f"get it again, or remove {sums} if you changed the weights yourself"
    if not file.is_file():
        raise InputError(f"{sums} lists {name}, which is missing: {way_out}")
    check_sha256(file, known, way_out)


def _local(place: Path) -> tuple[Path, Path] | None:
    """Find checksums and weights of a folder or a file; a repository's folded/ is listed one level above."""
    file = place / WEIGHTS if place.is_dir() else place
    sums = (folder / CHECKSUMS for folder in (file.parent, file.parent.parent))
    return next(((path, file) for path in sums if path.is_file()), None)


def _cached(cfg: Mapping[str, Any], cache_dir: str | Path | None) -> tuple[Path, Path] | None:
    """Get a repository's checksums, and find its weights, which timm has downloaded."""
    repository, revision = hf_split(cfg["hf_hub_id"])
    try:
        sums = Path(hf_hub_download(repository, CHECKSUMS, revision=revision, cache_dir=cache_dir))
    except LocalEntryNotFoundError as error:
        missing = try_to_load_from_cache(repository, CHECKSUMS, cache_dir=cache_dir, revision=revision)
        if constants.HF_HUB_OFFLINE or missing is _CACHED_NO_EXIST:
            return None
        raise InputError(
            f"the checksums of {repository} cannot be had, as the Hub does not answer: try again, or set"
            " HF_HUB_OFFLINE=1 to take what was downloaded"
        ) from error
    except EntryNotFoundError:
        return None
    return sums, sums.parent / WEIGHTS
