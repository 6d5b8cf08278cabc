"""A state on disk: tensors as safetensors, everything else as JSON, and a checksum of every file. No code is ever run.

KEY.safetensors   the tensors of each key of the state
state.json        the state with names in place of tensors
manifest.json     size and sha256 of the other files
"""

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import safetensors.torch
import torch
from torch import Tensor

from timm_deconv.atomic_io import write_whole

__all__ = ["damage", "read_state", "write_state"]

MANIFEST = "manifest.json"
PARTIAL = ".partial"
"""Where any state is written, beside those that are whole: what is left of one goes with the next."""


def write_state(folder: Path, state: Mapping[str, Any]) -> None:
    """Write a state into a folder that is whole or not there: it gets its name when everything is on the disk.

    Args:
        folder: there is none of that name yet.
        state: by names that are fit for files: tensors, numbers, texts, None, and mappings, lists and tuples of them.

    Raises:
        OSError: it could not be written; what lies beside it is as it was.
        TypeError: something else is in it.
    """
    folder.parent.mkdir(parents=True, exist_ok=True)
    write_whole(folder, lambda partial: _write_files(partial, state), folder.with_name(PARTIAL))


def read_state(folder: Path) -> dict[str, Any]:
    """Read what `write_state` wrote; tensors are on the processor."""
    described = json.loads((folder / "state.json").read_text())
    # read, not mapped into memory: the file will be removed
    tensors = {file.stem: safetensors.torch.load(file.read_bytes()) for file in folder.glob("*.safetensors")}
    return {key: _unpack(value, tensors.get(key, {})) for key, value in described.items()}


def damage(folder: Path) -> str | None:
    """Say what of a state is not as it was written: a file that is missing, truncated or changed; None if it is whole.

    Raises:
        OSError: a file that is there cannot be read, which says nothing of what it holds.
    """
    try:
        manifest = json.loads((folder / MANIFEST).read_text())
        expected = {str(name): {"size": int(of["size"]), "sha256": str(of["sha256"])} for name, of in manifest.items()}
    except (FileNotFoundError, NotADirectoryError):
        return f"no {MANIFEST}"
    except (ValueError, TypeError, KeyError, AttributeError):
        return f"{MANIFEST} is damaged"
    for name, fingerprint in expected.items():
        if not (folder / name).is_file():
            return f"no {name}"
        found = _fingerprint(folder / name)
        if found["size"] != fingerprint["size"]:
            return f"{name} has {found['size']} bytes of {fingerprint['size']}"
        if found != fingerprint:
            return f"{name} has another checksum than it was written with"
    return None if "state.json" in expected else f"{MANIFEST} is damaged"


def _write_files(folder: Path, state: Mapping[str, Any]) -> None:
    folder.mkdir()
    described = {}
    for key, value in state.items():
        tensors: dict[str, Tensor] = {}
        described[key] = _pack(value, key, tensors)
        if tensors:
            safetensors.torch.save_file(tensors, folder / f"{key}.safetensors", metadata={"format": "pt"})
    (folder / "state.json").write_text(json.dumps(described))
    manifest = {file.name: _fingerprint(file) for file in sorted(folder.iterdir())}
    (folder / MANIFEST).write_text(json.dumps(manifest, indent=1))


def _fingerprint(file: Path) -> dict[str, int | str]:
    with file.open("rb") as opened:
        digest = hashlib.file_digest(opened, "sha256").hexdigest()
    return {"size": file.stat().st_size, "sha256": digest}


# JSON has neither tensors nor tuples, and maps texts alone: these are objects whose key says what they are.


def _pack(value: Any, name: str, tensors: dict[str, Tensor]) -> Any:
    """Return what JSON takes of a value; move its tensors, by names that begin with `name`, into `tensors`."""
    match value:
        case None | bool() | int() | float() | str():
            return value
        case np.generic():
            return value.item()
        case np.ndarray():
            return value.tolist()
        case torch.dtype():
            return {"dtype": str(value).removeprefix("torch.")}
        case Tensor():
            return _pack_tensor(value.detach(), name, tensors)
        case Mapping():
            return {"mapping": [[_pack(k, name, tensors), _pack(v, f"{name}.{k}", tensors)] for k, v in value.items()]}
        case list() | tuple():
            packed = [_pack(item, f"{name}.{i}", tensors) for i, item in enumerate(value)]
            return {"tuple": packed} if isinstance(value, tuple) else packed
    raise TypeError(f"{name} is a {type(value).__name__}, which cannot be saved without running code to read it")


def _pack_tensor(value: Tensor, name: str, tensors: dict[str, Tensor]) -> dict[str, Any]:
    """Keep the memory format too: sums of channels_last tensors differ from others in the last bit."""
    tensors[name] = value.cpu().clone(memory_format=torch.contiguous_format)
    strides = torch.empty_like(value, device="meta").stride()  # without gaps and overlaps
    return {"tensor": name} if tensors[name].stride() == strides else {"tensor": name, "strides": strides}


def _unpack(packed: Any, tensors: Mapping[str, Tensor]) -> Any:
    match packed:
        case {"tensor": name, "strides": strides}:
            return torch.empty_strided(tensors[name].shape, strides, dtype=tensors[name].dtype).copy_(tensors[name])
        case {"tensor": name}:
            return tensors[name]
        case {"dtype": name}:
            return getattr(torch, name)
        case {"mapping": pairs}:
            return {_unpack(key, tensors): _unpack(value, tensors) for key, value in pairs}
        case {"tuple": items}:
            return tuple(_unpack(item, tensors) for item in items)
        case list():
            return [_unpack(item, tensors) for item in packed]
    return packed
