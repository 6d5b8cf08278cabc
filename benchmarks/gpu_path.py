"""The way that whitening takes on a GPU, taken by tensors of a CPU: kernels are listed, or go as far as to the driver.

So launches can be counted, and the host's time for them measured, where there is no GPU. Outputs are whatever memory
holds, and nothing may be learnt from them.
"""

import contextlib
import importlib
from collections.abc import Callable, Iterator
from typing import Any
from unittest import mock

import torch

from timm_deconv import kernels
from timm_deconv.errors import InputError
from timm_deconv.kernels import replay, windows
from timm_deconv.kernels.gpu import dispatch
from timm_deconv.layers import convolution, operation

__all__ = ["MODULES", "driver_without_gpu", "on_gpu_path"]

MODULES = "timm_deconv.kernels.gpu"

CAPABILITY = 90
"""Of the GPU that is played: Hopper."""


NO_DEVICE = 999
"""Its number. Triton keeps what it compiles by device, and a GPU that is there must not be given any of this."""


class _Driver:
    """What Triton asks of a driver, for a GPU that is not there: it loads and launches nothing."""

    def __init__(self) -> None:
        self.utils = self

    def get_current_device(self) -> int:
        return NO_DEVICE

    def get_current_stream(self, device: int) -> int:
        return 0

    def get_current_target(self) -> Any:
        from triton.backends.compiler import GPUTarget

        return GPUTarget("cuda", CAPABILITY, 32)

    def get_device_properties(self, device: int) -> dict[str, int]:
        return {"max_shared_mem": 227 * 1024}

    def load_binary(self, *_: Any) -> tuple[None, None, int, int, int]:
        return None, None, 0, 0, 1024

    def launcher_cls(self, source: Any, metadata: Any) -> Callable[..., None]:
        return lambda *args: None


@contextlib.contextmanager
def on_gpu_path(*, launches: bool = False) -> Iterator[list[str]]:
    """Let operations on CPU tensors run as they do on a GPU, and list the names of the kernels that they launch.

    `plain_form` switches to the plain forms as ever.

    Args:
        launches: let launches go to Triton, as they do on a GPU; see `driver_without_gpu`. Else they end here.

    Raises:
        InputError: Triton is not installed.
    """
    if importlib.util.find_spec("triton") is None:
        raise InputError("Triton is not installed: kernels for GPUs cannot be looked at")
    launched: list[str] = []
    with contextlib.ExitStack() as stack:
        stack.enter_context(mock.patch.object(dispatch, "why_not", lambda index: None))
        for module in (windows, convolution, operation):
            stack.enter_context(mock.patch.object(module, "on_cpu", lambda values: False))
        stack.enter_context(mock.patch.object(replay, "_has_kernels", lambda tensor: launches))
        stack.enter_context(mock.patch.object(torch.cuda, "device", contextlib.nullcontext))
        stack.enter_context(mock.patch.object(torch.cuda, "current_device", lambda: None))
        library = stack.enter_context(torch.library._scoped_library("timm_deconv", "IMPL"))
        for each, name in kernels.GPU_MODULES.items():
            importlib.import_module(f"{MODULES}.{name}")
            form = each._kernels["cuda"]
            library.impl(each.__name__, each._of_numbers(form), "CPU")
            stack.enter_context(mock.patch.dict(each._kernels, {"cpu": form}))
        stack.enter_context(_listing(launched, launches))
        yield launched


@contextlib.contextmanager
def driver_without_gpu() -> Iterator[None]:
    """Let Triton compile kernels for a GPU that is not there, and take every step of a launch but the driver's own."""
    from triton.runtime import driver

    with mock.patch.object(driver, "_active", _Driver()):
        yield


@contextlib.contextmanager
def _listing(launched: list[str], launches: bool) -> Iterator[None]:
    """Patch launches: their kernels' names are listed, and they go on to Triton or end here."""
    from timm_deconv.kernels.gpu.launch import Launch
    from timm_deconv.kernels.gpu.tape import Tape

    original, original_play = Launch.__call__, Tape.play

    def launch(self: Launch, *tensors: torch.Tensor | None) -> None:
        launched.append(self.kernel.fn.__name__)
        if launches:
            original(self, *tensors)

    def play(self: Tape, tensors: Any) -> Any:
        launched.extend(each.launch.kernel.fn.__name__ for each in self.launches)
        return original_play(self, tensors)

    with mock.patch.object(Launch, "__call__", launch), mock.patch.object(Tape, "play", play):
        yield
