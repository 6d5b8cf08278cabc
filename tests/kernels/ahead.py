"""Compile kernels ahead of time, for GPUs that are not here, with what a call would launch on one."""

import re
import subprocess
import tempfile
from collections.abc import Callable, Collection
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
import triton
from torch import Tensor
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from timm_deconv.kernels.gpu.launch import Launch

CAPABILITIES = (80, 90, 100)
SHARED_MEMORY = {80: 163 * 1024, 90: 227 * 1024, 100: 227 * 1024}
"""Bytes that a program can have (CUDA C++ programming guide, table of compute capabilities)."""

CLOSEST = 80
"""Where the most registers are taken and the least shared memory is."""

TYPES = {
    torch.float32: "*fp32",
    torch.float16: "*fp16",
    torch.bfloat16: "*bf16",
    torch.int64: "*i64",
    torch.bool: "*i1",
}


class Launched(NamedTuple):
    """A kernel that was launched, its grid, arguments, constants and options."""

    kernel: Any
    grid: tuple[int, ...]
    args: tuple[Any, ...]
    constants: dict[str, Any]
    options: dict[str, int]


class Resources(NamedTuple):
    """What a compiled kernel takes: bytes of shared memory a program, registers and bytes of stack a thread."""

    shared: int
    registers: int
    stack: int


def on_gpus(cases: Collection[Any], everywhere: Collection[Any]) -> pytest.MarkDecorator:
    """Parametrise a test by case and capability: the cases that take most on each GPU, the others on the closest one.

    Args:
        cases: names, or tuples of them.
        everywhere: those that take most, of every kernel one.
    """
    assert set(everywhere) <= set(cases)
    where = [(case, capability) for case in cases for capability in CAPABILITIES]
    chosen = [pair for pair in where if pair[0] in everywhere or pair[1] == CLOSEST]
    return pytest.mark.parametrize(("case", "capability"), chosen, ids=lambda value: str(value))


def launches_of(call: Callable[[], Any]) -> list[Launched]:
    """Return what a call of a function of kernels would launch; its outputs stay as they were allocated."""
    found: list[Launched] = []

    def record(launch: Launch, *tensors: Tensor | None) -> None:
        args = (*tensors, *launch.numbers)
        found.append(Launched(launch.kernel, launch.grid, args, launch.constants, launch.options))

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Launch, "__call__", record)
        call()
    return found


def compile_launch(one: Launched, capability: int) -> Resources:
    """Compile a launch for a GPU of a compute capability (90 is 9.0)."""
    names = one.kernel.arg_names
    values = dict(zip(names, one.args, strict=False)) | one.constants
    signature, constants, attributes = {}, {}, {}
    for index, name in enumerate(names):
        value = values[name]
        if name in one.constants or value is None or (isinstance(value, int) and value == 1):
            signature[name], constants[name] = "constexpr", value
            continue
        signature[name] = _type(value)
        number = value.data_ptr() if isinstance(value, Tensor) else value
        if not isinstance(value, float) and number % 16 == 0:
            attributes[(index,)] = [["tt.divisibility", 16]]
    source = ASTSource(fn=one.kernel, signature=signature, constexprs=constants, attrs=attributes)
    compiled = triton.compile(source, target=GPUTarget("cuda", capability, 32), options=one.options)
    return _resources(compiled)


def check_resources(one: Launched, capability: int, *, most_registers: int = 255, most_stack: int = 0) -> None:
    """Fail if a kernel does not compile for a GPU, spills, or asks for more than there is."""
    taken = compile_launch(one, capability)
    label = f"{one.kernel.fn.__name__} {one.constants} for {capability}: {taken}"
    assert taken.shared <= SHARED_MEMORY[capability], label
    assert taken.registers <= most_registers, label
    assert taken.stack <= most_stack, label


def _type(value: Any) -> str:
    if isinstance(value, Tensor):
        return TYPES[value.dtype]
    if isinstance(value, float):
        return "fp32"
    return "i32" if -(2**31) <= value < 2**31 else "i64"


def _resources(compiled: Any) -> Resources:
    dump = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(compiled.asm["cubin"])
        file.flush()
        said = subprocess.run([dump, "-res-usage", file.name], capture_output=True, text=True, check=True).stdout
    registers, stack = (int(re.search(rf"{name}:(\d+)", said)[1]) for name in ("REG", "STACK"))
    return Resources(compiled.metadata.shared, registers, stack)
