"""Triton's interpreter works here."""

import torch

from timm_deconv.kernels.gpu.probe import add_one


def test_the_interpreter_runs_a_kernel() -> None:
    number = torch.zeros(())
    add_one(number)
    assert number == 1
