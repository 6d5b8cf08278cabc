"""The seam between whitening and hardware: a few operations, and nothing above knows which kernel runs them.

Each is an `Operation`, a `torch.library.custom_op` with a fake form, an autograd formula and a backward pass that is an
operation too:

- `sampled_moments`: mean and covariance of sampled rows; `add_moments_gradient_` is the way back, in place;
- `inverse_root`: mean and D from the moments, as a `Root` says; `inverse_root_backward`;
- `fold_whitening`: D and the mean in weight and bias of the plain layer that does the work; `fold_whitening_backward`;
- `apply_whitener`: D times an activation, where that is less work; `apply_whitener_backward`;
- `average_in_`: a batch's statistics into the running ones, in place; nothing is derived through it.

What is computed is written in plain torch; where a CPU is faster by other means, `onednn` knows it, and GPUs have the
Triton kernels of `gpu`. Another device gets its own by `sampled_moments.register_kernel` and the like. `plain_form` is
the way back to plain torch.

`replayed` does again what a layer does with several of them, by their launches alone.
"""

from .application import apply_whitener, apply_whitener_backward
from .blocks import Blocks
from .folding import fold_whitening, fold_whitening_backward
from .gpu.dispatch import GpuForm
from .moments import add_moments_gradient_, sampled_moments
from .operation import Operation, plain_form
from .replay import replayed
from .roots import Root, inverse_root, inverse_root_backward
from .tracking import Averaging, average_in_
from .windows import PIXEL, Sampling, Share, Window

__all__ = [
    "PIXEL",
    "Averaging",
    "Blocks",
    "Operation",
    "Root",
    "Sampling",
    "Share",
    "Window",
    "add_moments_gradient_",
    "apply_whitener",
    "apply_whitener_backward",
    "average_in_",
    "fold_whitening",
    "fold_whitening_backward",
    "inverse_root",
    "inverse_root_backward",
    "plain_form",
    "replayed",
    "sampled_moments",
]

GPU_MODULES: dict[Operation, str] = {
    sampled_moments: "moments",
    add_moments_gradient_: "moments",
    inverse_root: "roots",
    inverse_root_backward: "roots",
    fold_whitening: "folding",
    fold_whitening_backward: "folding",
    average_in_: "tracking",
}
"""Operations with Triton kernels, and their modules in `timm_deconv.kernels.gpu`."""

for _operation, _module in GPU_MODULES.items():
    _operation.register_kernel("cuda", GpuForm(_operation, _module))
