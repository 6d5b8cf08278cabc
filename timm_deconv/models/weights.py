"""Files of weights, read without running what is pickled in them."""

import textwrap
from pathlib import Path

from timm.models import load_state_dict
from torch import Tensor

from timm_deconv.errors import InputError

__all__ = ["read_weights"]


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
