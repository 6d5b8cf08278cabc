"""Operation: a `torch.library.custom_op` that takes geometry too, and costs eager code no more than a function."""

import inspect
from collections.abc import Callable, Sequence
from typing import Any

import torch

from .blocks import Blocks
from .windows import Sampling

__all__ = ["Operation"]

Function = Callable[..., Any]

PLAIN_TENSORS = (torch.Tensor, torch.nn.Parameter)
"""Types of tensors that compute; others, such as fake ones, are there to be traced."""


class Operation:
    """A function of tensors, of numbers and of geometry, as an operator of torch.

    Compilers, exporters and autograd see the operator `op`. Where none of them looks, the function is called at once:
    in eager mode the dispatcher's way to an operator in Python takes longer than a small kernel.

    Args:
        function: a plain form. Its annotations say where it takes a `Sampling` or `Blocks`, which the operator takes as
            lists of whole numbers.
        schema: the operator's, as torch writes it.
        mutates_args: names of the arguments that are written to.

    Attributes:
        op: the operator, with lists of whole numbers for geometry.
        overload: what dispatch modes see of it.
        of_ints: the function that it runs, so that these can look into it.
    """

    def __init__(self, function: Function, schema: str, mutates_args: Sequence[str] = ()) -> None:
        self.function = function
        self.__doc__, self.__name__ = function.__doc__, function.__name__.removeprefix("_")
        self._kinds = [parameter.annotation for parameter in inspect.signature(function).parameters.values()]
        name = f"timm_deconv::{self.__name__}"
        self.of_ints = self._of_ints(function)
        self.op = torch.library.custom_op(name, self.of_ints, mutates_args=mutates_args, schema=schema)
        self.overload = getattr(torch.ops.timm_deconv, self.__name__).default
        self._kernels: dict[str, Function] = {}

    def __call__(self, *args: Any) -> Any:
        looked_at = torch.is_grad_enabled() or torch.compiler.is_compiling() or type(args[0]) not in PLAIN_TENSORS
        if looked_at:
            return self.op(*(arg.ints if isinstance(arg, Sampling | Blocks) else arg for arg in args))
        return self._kernels.get(args[0].device.type, self.function)(*args)

    def register_kernel(self, device: str, kernel: Function) -> None:
        """Let another function do the work on a kind of device, such as 'cuda'; it takes the same arguments."""
        self._kernels[device] = kernel
        self.op.register_kernel(device)(self._of_ints(kernel))

    def register_fake(self, function: Function) -> None:
        """Say by a function of the same arguments what shapes, dtypes and strides come out."""
        self.op.register_fake(self._of_ints(function))

    def register_autograd(self, backward: Function, setup_context: Function) -> None:
        """Give the autograd formula, as `torch.library.custom_op` takes it; contexts get geometry as it is."""

        def remember(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
            setup_context(ctx, self._decoded(inputs), output)

        self.op.register_autograd(backward, setup_context=remember)

    def _of_ints(self, function: Function) -> Function:
        return lambda *args: function(*self._decoded(args))

    def _decoded(self, args: Sequence[Any]) -> list[Any]:
        pairs = zip(args, self._kinds, strict=True)
        return [kind.of_ints(arg) if kind in (Sampling, Blocks) else arg for arg, kind in pairs]
