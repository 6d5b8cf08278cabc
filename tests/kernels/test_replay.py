"""What cannot be replayed here runs as it is, and asks for nothing that is not there."""

import sys

import pytest
import torch
from torch import Tensor

from timm_deconv.kernels import replay, replayed


class OnGpu:
    """What a tensor on the current GPU says of itself."""

    is_cuda = True

    def get_device(self) -> int:
        return 0


@pytest.mark.parametrize("reason", ["", "the kernels were never tried on GPUs of AMD"])
def test_without_kernels_triton_is_not_asked_for(reason: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    monkeypatch.setattr(replay, "why_not", lambda index: None)
    assert replay._has_kernels(OnGpu())
    monkeypatch.setattr(replay, "why_not", lambda index: reason)
    assert not replay._has_kernels(OnGpu())


def test_on_a_cpu_functions_run_as_they_are(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "timm_deconv.kernels.gpu.tape", None)
    calls: list[Tensor] = []
    x = torch.ones(2)
    for _ in range(2):
        (result,) = replayed(lambda: calls.append(x) or [x.clone()], [x])
        assert torch.equal(result, x)
    assert len(calls) == 2 and not replay._tapes
