"""Files of weights: read without running what is pickled in them, written as other loaders want them, and the
configuration that is saved beside them."""

import json
import textwrap
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from timm.models import load_state_dict
from timm.models._hub import save_config_for_hf
from torch import Tensor, nn

from timm_deconv.errors import InputError

__all__ = [
    "arguments_of_weights",
    "follow_saved",
    "read_weights",
    "save_network",
    "saved_arguments",
    "write_weights",
]


def read_weights(path: str | Path) -> dict[str, Tensor]:
    """The state dict in a .safetensors, .pth or .pt file, also where it is nested as timm's training script saves it.

    Raises:
        InputError: no such file, a truncated one, one of pickled code, or no state dict in it.
    """
    if not Path(path).is_file():
        raise InputError(f"no checkpoint {path}")
    try:
        weights = load_state_dict(str(path))
    except Exception as error:  # whatever the readers make of bytes that are no weights
        if "Unsupported globals" in str(error):
            raise InputError(
                f"{path} needs pickled code to be run, which is refused; save the network's state_dict() alone"
            ) from error
        reason = textwrap.shorten(f"{type(error).__name__} {error}", 160, placeholder=" ...").strip()
        raise InputError(f"{path} cannot be read as weights ({reason}); get the file again") from error
    if not weights or not all(isinstance(value, Tensor) for value in weights.values()):
        raise InputError(f"{path} holds no weights by name; save the network's state_dict()")
    return weights


def write_weights(model: nn.Module, file: str | Path) -> None:
    """Write a network's state dict as .safetensors, which says that it is torch's: some loaders refuse it otherwise.

    Tensors are copied: the format takes neither channels_last strides nor tensors that share memory.
    """
    state = model.state_dict().items()
    copies = {name: value.detach().cpu().clone(memory_format=torch.contiguous_format) for name, value in state}
    safetensors.torch.save_file(copies, file, metadata={"format": "pt"})


def save_network(model: nn.Module, folder: str | Path) -> None:
    """Write a timm network into a folder that `timm.create_model('local-dir:FOLDER', pretrained=True)` loads."""
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    write_weights(model, folder / "model.safetensors")
    save_config_for_hf(model, str(folder / "config.json"))


def arguments_of_weights(model: nn.Module) -> Mapping[str, Any] | None:
    """The arguments of the network that a timm model's weights were saved with; None where no configuration says them.

    Args:
        model: with `pretrained_cfg`, which says where the weights are, and `pretrained_model_args`.
    """
    cfg: Any = model.pretrained_cfg
    if cfg.get("source") in ("local-dir", "hf-hub"):
        return model.pretrained_model_args  # type: ignore[return-value]
    return saved_arguments(Path(cfg["file"]).parent) if cfg.get("file") else None


def saved_arguments(folder: Path) -> Mapping[str, Any] | None:
    """The arguments of the network that timm's config.json in a folder describes; None where there is no such file."""
    try:
        config = json.loads((folder / "config.json").read_text())
    except (OSError, ValueError):
        return None
    return config.get("model_args", {}) if isinstance(config, dict) and "architecture" in config else None


def follow_saved(model: Any, arguments: Mapping[str, Any] | None) -> None:
    """Let a network be as the saved one was where weights do not say it themselves; `arguments` are the saved one's."""
    if arguments is not None and hasattr(model, "follow_saved"):
        model.follow_saved(arguments)
