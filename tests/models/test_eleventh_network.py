"""One more network takes one module under 40 lines: the example of the documentation, run as it stands."""

import importlib.util
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import timm
import torch
from timm.models import _registry as registry

from tests.models.timm_contract import Subject, check_features_only, check_head, check_round_trip
from timm_deconv.models import registration

ROOT = Path(__file__).parents[2]
PAGE = next(page for page in (ROOT / "docs" / "add-a-network.md", ROOT / "README.md") if page.is_file())
EXAMPLE = PAGE.read_text().partition("<!-- eleventh network -->\n```python\n")[2].partition("```")[0]


@pytest.fixture
def plain7(tmp_path: Path) -> Iterator[None]:
    """The example imported as a module of its own; afterwards timm has forgotten its names."""
    tables = [table for table in vars(registry).values() if isinstance(table, dict | set)]
    before = [table.copy() for table in tables]
    names = list(registration._deconv_names)
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
    registration._deconv_names[:] = names
    for table, content in zip(tables, before, strict=True):
        table.clear()
        table.update(content)


def test_the_example_is_under_40_lines() -> None:
    assert 10 < len(EXAMPLE.splitlines()) < 40
    assert max(map(len, EXAMPLE.splitlines())) <= 120


@pytest.mark.usefixtures("plain7")
def test_the_example_is_two_networks_that_timm_can_use() -> None:
    twin, model = timm.create_model("plain7"), timm.create_model("plain7_deconv", deconv="paper")
    assert sum(type(module).__name__ == "BatchNorm2d" for module in twin.modules()) == 7
    assert not [module for module in model.modules() if type(module).__name__ == "BatchNorm2d"]
    assert model.stem.conv.cfg.freeze
    assert model.head.fc.blocks.features == 128
    x = torch.randn(4, 3, 32, 32)
    model(x).mean().backward()
    assert not [name for name, parameter in model.named_parameters() if parameter.grad is None]
    for name in ("plain7", "plain7_deconv"):
        for check in (check_head, check_features_only, check_round_trip):
            check(Subject(name, {"width": 0.25}))
