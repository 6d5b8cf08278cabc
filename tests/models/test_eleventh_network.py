"""One more network takes one module under 40 lines: the example that the README shows, run as it stands."""

import importlib.util
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import timm
import torch
from timm.models import _registry as registry

from tests.models.timm_contract import Subject, check_features_only, check_head, check_round_trip
from timm_deconv.models import _registration

EXAMPLE = '''\
"""Plain CNN for 32x32 images: stages of 3x3 convolutions, each after the first at half the size."""

from collections.abc import Sequence
from typing import Any

from timm_deconv.models._blocks import ConvNormAct, scaled
from timm_deconv.models._cifar import StagedNet
from timm_deconv.models._registration import CIFAR_POLICY, frozen_stem, register_deconv
from timm_deconv.models._twins import STAGED_FEATURES, register_twins


class PlainCNN(StagedNet):
    """`depths` convolutions in each stage, of `channels`, behind a stem of one."""

    def __init__(
        self,
        depths: Sequence[int],
        channels: Sequence[int] = (32, 64, 128),
        *,
        width: float = 1.0,
        in_chans: int = 3,
        **head: Any,
    ) -> None:
        levels = [(scaled(channels[0], width), 1)]  # channels and reduction of the stem, then of each stage
        stages = []
        for i, (depth, chs) in enumerate(zip(depths, channels, strict=True)):
            shapes = [levels[-1][0]] + [scaled(chs, width)] * depth
            strides = [2 if i else 1] + [1] * (depth - 1)
            stages.append([ConvNormAct(a, b, stride=s) for a, b, s in zip(shapes, shapes[1:], strides, strict=False)])
            levels.append((shapes[-1], 2**i))
        super().__init__(ConvNormAct(in_chans, levels[0][0]), stages, levels, in_chans=in_chans, **head)


FEATURES = {**STAGED_FEATURES, "out_indices": (0, 1, 2, 3)}
TABLE = {"plain7": {"depths": (2, 2, 2)}}
register_twins(__name__, PlainCNN, TABLE, feature_cfg=FEATURES, first_conv="stem.conv", pool_size=(8, 8))
register_deconv(__name__, {"plain7": frozen_stem(CIFAR_POLICY, 15)}, feature_cfg=FEATURES)
'''


@pytest.fixture
def plain7(tmp_path: Path) -> Iterator[None]:
    """The example imported as a module of its own; afterwards timm has forgotten its names."""
    tables = [table for table in vars(registry).values() if isinstance(table, dict | set)]
    before = [table.copy() for table in tables]
    names = list(_registration._REGISTERED)
    file = tmp_path / "plain_cnn.py"
    file.write_text(EXAMPLE)
    spec = importlib.util.spec_from_file_location("plain_cnn", file)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules["plain_cnn"] = module
    spec.loader.exec_module(module)
    yield
    del sys.modules["plain_cnn"]
    _registration._REGISTERED[:] = names
    for table, content in zip(tables, before, strict=True):
        table.clear()
        table.update(content)


def test_the_example_is_under_40_lines() -> None:
    assert len(EXAMPLE.splitlines()) < 40
    assert max(map(len, EXAMPLE.splitlines())) <= 120


@pytest.mark.usefixtures("plain7")
def test_the_example_is_two_networks_that_timm_can_use() -> None:
    twin, model = timm.create_model("plain7"), timm.create_model("plain7_deconv", deconv="paper")
    assert sum(type(module).__name__ == "BatchNorm2d" for module in twin.modules()) == 7
    assert not [module for module in model.modules() if type(module).__name__ == "BatchNorm2d"]
    assert model.stem.conv.cfg.freeze
    assert model.head.fc.partition.features == 128
    x = torch.randn(4, 3, 32, 32)
    model(x).mean().backward()
    assert not [name for name, parameter in model.named_parameters() if parameter.grad is None]
    for name in ("plain7", "plain7_deconv"):
        for check in (check_head, check_features_only, check_round_trip):
            check(Subject(name, {"width": 0.25}))
