"""Methods called `fuse`, `reparameterize` and `switch_to_deploy`: those that fold batch norms away fold whitening."""

import copy
import pickle
from typing import Any

import pytest
import timm
import torch
from timm.models.fastvit import MobileOneBlock
from timm.utils import reparameterize_model
from torch import Tensor, nn

from tests.convert.networks import images, trained
from timm_deconv import Deconv2d, convert_deconv_model


class Adds(nn.Module):
    """Its `fuse` is what it does with two branches."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.bn = nn.Conv2d(8, 8, 3, padding=1), nn.BatchNorm2d(8)

    def fuse(self, p: Tensor, q: Tensor) -> Tensor:
        return p + q

    def forward(self, x: Tensor) -> Tensor:
        return self.fuse(x, self.bn(self.conv(x)))


class Gathers(Adds):
    """Its `fuse` needs no arguments and has nothing to do with norms; `switch_to_deploy` has."""

    def fuse(self, *features: Tensor) -> Tensor:  # type: ignore[override]
        return sum(features, torch.zeros(()))

    def switch_to_deploy(self) -> None:
        fold(self.conv, self.bn)
        self.bn = nn.Identity()


def fold(conv: nn.Conv2d, norm: nn.BatchNorm2d) -> None:
    scale = norm.weight / (norm.running_var + norm.eps).sqrt()
    conv.weight.data *= scale.reshape(-1, 1, 1, 1)


class Yolo(nn.Module):
    """A model whose `fuse(verbose)` folds the norm of each block that has a `bn`."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.block, self.head = nn.Conv2d(3, 8, 3), Adds(), nn.Conv2d(8, 4, 1)

    def fuse(self, verbose: bool = True) -> nn.Module:
        for m in self.modules():
            if hasattr(m, "bn"):
                fold(m.conv, m.bn)
                delattr(m, "bn")
        return self

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.block(self.stem(x)))


@pytest.mark.parametrize("block", [Adds, Gathers])
def test_a_users_fuse_that_folds_no_norms_stays_his(block: type[nn.Module]) -> None:
    model = nn.Sequential(nn.Conv2d(3, 8, 3), block(), nn.Conv2d(8, 4, 1))
    convert_deconv_model(model)
    x = images()
    expected = trained(model, x)(x)
    for other in (model, copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        p = torch.ones(2)
        assert torch.equal(other[1].fuse(p, 2 * p), 3 * p)
        torch.testing.assert_close(other(x), expected)


def test_another_method_of_the_same_block_is_taken_over() -> None:
    model = nn.Sequential(nn.Conv2d(3, 8, 3), Gathers(), nn.Conv2d(8, 4, 1))
    convert_deconv_model(model)
    x = images()
    expected = trained(model, x)(x)
    model[1].switch_to_deploy()
    assert type(model[1].conv) is nn.Conv2d
    torch.testing.assert_close(model(x), expected)


@pytest.mark.parametrize(("args", "kwargs"), [((), {}), ((False,), {}), ((), {"verbose": False})])
def test_a_fuse_that_folds_norms_is_taken_over_with_any_arguments(args: Any, kwargs: Any) -> None:
    model = Yolo()
    convert_deconv_model(model)
    x = images()
    expected = trained(model, x)(x)
    assert model.fuse(*args, **kwargs) is model
    assert not [m for m in model.modules() if isinstance(m, Deconv2d)]
    torch.testing.assert_close(model(x), expected)


def test_a_block_that_is_left_plain_with_its_norms_reparameterises_itself() -> None:
    model = nn.Sequential(nn.Conv2d(3, 8, 3), MobileOneBlock(8, 8, 3), nn.Conv2d(8, 4, 1))
    report = convert_deconv_model(model, {"patterns": {"1.*": None, "2": None}})
    assert report.norms_kept and not report.norms
    x = images()
    expected = trained(model, x)(x)
    plain = reparameterize_model(model)
    assert plain[1].reparam_conv is not None
    torch.testing.assert_close(plain(x), expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", ["repvgg_a0", "levit_128s", "repvit_m0_9"])
def test_methods_of_timms_are_known_by_being_timms(name: str) -> None:
    with torch.device("meta"):
        model = timm.create_model(name)
    convert_deconv_model(model)
    assert not [m for m in reparameterize_model(model).modules() if isinstance(m, Deconv2d)]
