"""Whether an operation runs by Triton kernels on a GPU, or in its plain form, and the word that is said about it."""

import functools
import importlib
import importlib.util
import warnings
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from timm_deconv.errors import InputError

from ..operation import Operation

__all__ = ["GpuForm", "why_not"]

LEAST_CAPABILITY = (8, 0)
"""Ampere: the first GPUs that have TF32, in which the products are composed."""


class GpuForm:
    """An operation by Triton kernels where they can run, else its plain form, with one warning for each reason.

    Args:
        operation: the one that it is registered with.
        module: of `timm_deconv.kernels.gpu`, which has a function of the operation's name.
    """

    def __init__(self, operation: Operation, module: str) -> None:
        self.operation, self.module = operation, module
        self.broken = ""

    def __call__(self, *args: Any) -> Any:
        device = args[0].device
        for arg in args:
            if isinstance(arg, Tensor) and arg.device != device:
                raise _devices_differ(self.operation.__name__, args)
        reason = self.broken or why_not(device.index)
        if reason is None:
            try:
                if device.index == torch.cuda.current_device():
                    return self._function(*args)
                with torch.cuda.device(device):
                    return self._function(*args)
            except Exception as error:
                reason = self._reason(error)
        if reason:
            _say(reason)
        return self.operation.function(*args)

    @functools.cached_property
    def _function(self) -> Callable[..., Any]:
        module = importlib.import_module(f"timm_deconv.kernels.gpu.{self.module}")
        function: Callable[..., Any] = getattr(module, self.operation.__name__)
        return function

    def _reason(self, error: Exception) -> str:
        """Return why arguments are unfit, or why kernels cannot be compiled, once and for all; raise other errors."""
        from triton.errors import TritonError

        from .launch import Unfit

        if isinstance(error, Unfit):
            return str(error)
        if isinstance(error, TritonError):
            self.broken = f"{self.operation.__name__} cannot be compiled: {_first_line(error)}"
            return self.broken
        raise error


@functools.cache
def why_not(index: int) -> str | None:
    """Return why Triton's kernels cannot run on a GPU: '' if Triton is not installed; None if they can."""
    if importlib.util.find_spec("triton") is None:
        return ""
    if torch.version.hip:
        return "the kernels were never tried on GPUs of AMD"
    major, minor = torch.cuda.get_device_capability(index)
    if (major, minor) < LEAST_CAPABILITY:
        return f"{torch.cuda.get_device_name(index)} has compute capability {major}.{minor}; the kernels are for 8.0 on"
    try:
        from .probe import add_one

        with torch.cuda.device(index):
            add_one(torch.zeros((), device="cuda"))
    except Exception as error:  # whatever is missing, a compiler or a driver, it is Triton that cannot work
        return f"Triton cannot compile for {torch.cuda.get_device_name(index)}: {_first_line(error)}"
    return None


def _devices_differ(name: str, args: Sequence[Any]) -> InputError:
    """Return an error for tensors on different devices: a kernel would read what is not there."""
    devices = ", ".join(sorted({str(arg.device) for arg in args if isinstance(arg, Tensor)}))
    return InputError(f"{name}: tensors on {devices}; move the layer and its input to one device")


def _first_line(error: Exception) -> str:
    return next(iter(str(error).strip().splitlines()), type(error).__name__)


@functools.cache
def _say(reason: str) -> None:
    warnings.warn(f"whitening runs in its plain form, slower on a GPU: {reason}", stacklevel=2)
