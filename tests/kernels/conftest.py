"""What tests of kernels share."""

from typing import Any

import pytest
from torch import Tensor


@pytest.fixture
def launches(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """The kernels that are launched."""
    from timm_deconv.kernels.gpu.launch import Launch

    found: list[Any] = []
    original = Launch.__call__

    def record(launch: Launch, *tensors: Tensor | None) -> None:
        found.append(launch.kernel)
        original(launch, *tensors)

    monkeypatch.setattr(Launch, "__call__", record)
    return found
