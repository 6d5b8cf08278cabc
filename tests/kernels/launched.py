"""A kernel for `test_launch`: Triton reads it from a file."""

import triton
import triton.language as tl


@triton.jit
def some_kernel(source, target, more, number, factor, WIDTH: tl.constexpr, TWICE: tl.constexpr):
    at = tl.arange(0, WIDTH)
    value = tl.load(source + at).to(tl.float32) * factor + number
    if TWICE:
        value += value
    if more is not None:
        value += tl.load(more + at)
    tl.store(target + at, value)
