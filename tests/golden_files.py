"""Numbers of the published method, and the rule by which we agree with them.

`layers/NAME.safetensors`: a layer trained for some steps without parameter updates, loss = sum(output * cotangent),
then evaluated on the last input; all tensors float64. `isqrt/cases.safetensors`: inverse roots and their gradients.
"""

import json
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor

__all__ = ["LayerCase", "golden_folder", "layer_case", "layer_case_names", "relative_error", "tolerance"]


@dataclass(frozen=True)
class LayerCase:
    """A published layer's arguments and numbers; `err32` is the published code's own float32 error of each tensor."""

    name: str
    layer: str
    args: dict[str, Any]
    steps: int
    err32: dict[str, float]
    tensors: dict[str, Tensor]

    def buffers(self, step: int) -> dict[str, Tensor]:
        """The layer's buffers after a training step, by their published names."""
        prefix = f"step{step}."
        tensors = {key.removeprefix(prefix): value for key, value in self.tensors.items() if key.startswith(prefix)}
        return {key: value for key, value in tensors.items() if key.startswith(("running_", "num_"))}


def golden_folder() -> Path:
    """../shared/golden where it lies beside the checkout (it has cases of photographs too), else tests/golden."""
    tests = Path(__file__).parent
    beside = tests.parents[1] / "shared" / "golden"
    return beside if beside.is_dir() else tests / "golden"


def layer_case_names(layer: str | None = None) -> list[str]:
    """Names of the cases, of one published layer (FastDeconv, Delinear, ChannelDeconv) or of all."""
    index = json.loads((golden_folder() / "layers" / "index.json").read_text())
    return [case["name"] for case in index if layer in (None, case["layer"])]


@cache
def layer_case(name: str) -> LayerCase:
    """The case of this name. It is read once: leave its tensors as they are."""
    with safe_open(golden_folder() / "layers" / f"{name}.safetensors", "pt") as file:
        meta = file.metadata()
        tensors = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118 (not a dictionary)
    args, err32 = json.loads(meta["args"]), json.loads(meta["err32"])
    return LayerCase(name, meta["layer"], args, int(meta["steps"]), err32, tensors)


def relative_error(ours: Tensor, golden: Tensor) -> float:
    """max|ours - golden| / max|golden|; infinite where ours is not finite."""
    ours, golden = ours.detach().double(), golden.double()
    error = float((ours - golden).abs().max() / golden.abs().max().clamp_min(torch.finfo(torch.float64).tiny))
    return error if error == error else float("inf")


def tolerance(dtype: torch.dtype, err32: float) -> float:
    """Largest relative error: 1e-7 in float64; in float32 ten times the published code's own error, at least 1e-5."""
    return 1e-7 if dtype == torch.float64 else max(10 * err32, 1e-5)
