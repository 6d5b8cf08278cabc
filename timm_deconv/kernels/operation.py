"""Operation: a `torch.library.custom_op` that takes settings too, and costs eager code no more than a function."""

import inspect
import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

__all__ = ["Operation", "plain_form", "wants_plain_form"]

Function = Callable[..., Any]

_plain_forms_wanted = int(os.environ.get("TIMM_DECONV_PLAIN", "") not in ("", "0"))

PLAIN_TENSORS = (Tensor, torch.nn.Parameter)
"""Types of tensors that compute; others, such as fake ones, are there to be traced."""


@contextmanager
def plain_form() -> Iterator[None]:
    """Let whitening run as plain torch operations, not by kernels for the device, until the context is left.

    It holds for the whole process, backward passes and compiled code too. The environment variable
    TIMM_DECONV_PLAIN=1 does the same from the start. For comparisons, and to find out whether a kernel is at fault.
    """
    global _plain_forms_wanted
    _plain_forms_wanted += 1
    try:
        yield
    finally:
        _plain_forms_wanted -= 1


def wants_plain_form() -> bool:
    """Tell whether `plain_form` or the environment variable asks for plain torch operations."""
    return _plain_forms_wanted > 0


class Operation:
    """A function of tensors, of numbers and of settings, as an operator of torch.

    Compilers, exporters and autograd see the operator `op`. Where none of them looks, the function is called at once:
    in eager mode the dispatcher's way to an operator in Python takes longer than a small kernel.

    Args:
        function: a plain form. Its annotations say where it takes settings: a class, such as `Blocks`, whose `numbers`
            the operator takes in its place, and which is made of them again by `of_numbers`.
        schema: the operator's, as torch writes it.
        mutates_args: names of the arguments that are written to.

    Attributes:
        op: the operator, with lists of numbers for settings.
        overload: what dispatch modes see of it.
        of_numbers: the function that it runs, so that these can look into it.
    """

    def __init__(self, function: Function, schema: str, mutates_args: Sequence[str] = ()) -> None:
        self.function = function
        self.__doc__, self.__name__ = function.__doc__, function.__name__.removeprefix("_")
        parameters = inspect.signature(function).parameters
        self._settings = [getattr(parameter.annotation, "of_numbers", None) for parameter in parameters.values()]
        self._mutated = [list(parameters).index(name) for name in mutates_args]
        name = f"timm_deconv::{self.__name__}"
        self.of_numbers = self._of_numbers(function)
        self.op = torch.library.custom_op(name, self.of_numbers, mutates_args=mutates_args, schema=schema)
        self.overload = getattr(torch.ops.timm_deconv, self.__name__).default
        self._kernels: dict[str, Function] = {}

    def __call__(self, *args: Any) -> Any:
        looked_at = torch.is_grad_enabled() or torch.compiler.is_compiling() or type(args[0]) not in PLAIN_TENSORS
        if looked_at:
            return self.op(*self.encoded(args))
        kernel = self._kernels.get(args[0].device.type)
        if kernel is None:
            return self.function(*args)
        result = kernel(*args)
        for index in self._mutated:  # by a kernel of which torch knows nothing
            torch.autograd.graph.increment_version(args[index])
        return result

    def encoded(self, args: Sequence[Any]) -> list[Any]:
        """Return arguments as the operator takes them: the numbers of settings in place of these."""
        return [arg if of is None else arg.numbers for arg, of in zip(args, self._settings, strict=True)]

    def register_kernel(self, device: str, kernel: Function) -> None:
        """Let another function do the work on a kind of device, such as 'cuda', unless the plain form is asked for.

        It takes the same arguments.
        """

        def run(*args: Any) -> Any:
            return (self.function if wants_plain_form() else kernel)(*args)

        self._kernels[device] = run
        self.op.register_kernel(device)(self._of_numbers(run))

    def register_fake(self, function: Function) -> None:
        """Say by a function of the same arguments what shapes, dtypes and strides come out."""
        self.op.register_fake(self._of_numbers(function))

    def register_autograd(self, backward: Function, plain: Function, keep: Function) -> None:
        """Give the gradient of the operation's tensors, and the plain form from which gradients of gradients come.

        Args:
            backward: takes the gradients of the outputs, what is kept, and the arguments; it returns a gradient for
                each tensor among these.
            plain: takes the arguments, uses what autograd can derive twice, and returns the first of the outputs: those
                that have a gradient.
            keep: takes the outputs, and returns the tensors among them that `backward` wants.
        """

        def remember(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
            ctx.args = [None if isinstance(arg, Tensor) else arg for arg in self._decoded(inputs)]
            ctx.places = [index for index, arg in enumerate(inputs) if isinstance(arg, Tensor)]
            kept = keep(*output) if isinstance(output, tuple) else keep(output)
            ctx.save_for_backward(*(inputs[index] for index in ctx.places), *kept)

        def derive(ctx: Any, *grads: Any) -> tuple[Tensor | None, ...]:
            args, kept = list(ctx.args), list(ctx.saved_tensors)
            for index in ctx.places:
                args[index] = kept.pop(0)
            if torch.is_grad_enabled() and not torch.compiler.is_compiling():  # by create_graph=True
                return _plain_gradients(plain, args, ctx.needs_input_grad, grads)
            found: list[Tensor | None] = [None] * len(args)
            for index, grad in zip(ctx.places, backward(grads, kept, *args), strict=True):
                found[index] = grad
            return tuple(found)

        self.op.register_autograd(derive, setup_context=remember)

    def _of_numbers(self, function: Function) -> Function:
        return lambda *args: function(*self._decoded(args))

    def _decoded(self, args: Sequence[Any]) -> list[Any]:
        return [arg if of is None else of(arg) for arg, of in zip(args, self._settings, strict=True)]


def _plain_gradients(
    plain: Function, args: Sequence[Any], wanted: Sequence[bool], grads: Sequence[Any]
) -> tuple[Tensor | None, ...]:
    """Compute the gradients of the arguments that are wanted through a plain form, with a graph of their own."""
    # aliases, as hooks of the tensors themselves are called by whoever asked for these gradients
    args = [arg.view_as(arg) if isinstance(arg, Tensor) else arg for arg in args]
    outputs = plain(*args)
    pairs = zip((outputs,) if isinstance(outputs, Tensor) else outputs, grads, strict=False)
    derived, of_outputs = zip(*((output, grad) for output, grad in pairs if output.requires_grad), strict=True)
    inputs = [arg for arg, need in zip(args, wanted, strict=True) if need]
    found = iter(torch.autograd.grad(derived, inputs, of_outputs, create_graph=True, allow_unused=True))
    return tuple(next(found) if need else None for need in wanted)
