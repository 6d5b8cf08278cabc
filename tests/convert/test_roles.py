import pytest
import timm
import torchvision
from torch import nn

import timm_deconv  # noqa: F401
from timm_deconv.convert.roles import block_ends, find_roles


def ends(model: nn.Module) -> list[str]:
    return [name for name, role in find_roles(model).items() if role == "block_end"]


@pytest.mark.parametrize(
    ("network", "last"),
    [
        ("resnet18", "conv2"),
        ("seresnet50", "conv3"),
        ("regnety_002", "conv3.conv"),
        ("preact_resnet18_cifar", "conv2"),
        ("mobilenetv2_cifar", "project.conv"),
        ("efficientnet_b0_cifar", "project.conv"),
        ("dpn92_cifar", "conv3.conv"),
        ("densenet121", "conv2"),
        ("densenet121_cifar", "conv2"),
        ("dpn68", "c1x1_c.conv"),
    ],
)
def test_every_residual_block_ends_with_its_last_convolution(network: str, last: str) -> None:
    model = timm.create_model(network)
    names = [name for name in find_roles(model) if name.endswith(f".{last}")]
    assert names and ends(model) == names


def test_depthwise_separable_and_inverted_residual_blocks_of_timm_end_with_their_projection() -> None:
    found = ends(timm.create_model("mobilenetv2_100"))
    assert found[0] == "blocks.0.0.conv_pw"
    assert len(found) == 17 and all(name.endswith("conv_pwl") for name in found[1:])


def test_those_of_torchvision_are_found_too() -> None:
    assert ends(torchvision.models.resnet18()) == [f"layer{i}.{j}.conv2" for i in (1, 2, 3, 4) for j in (0, 1)]


@pytest.mark.parametrize("network", ["vgg11_bn", "inception_v4", "repvgg_a0", "mobileone_s0"])
def test_networks_of_plain_or_parallel_convolutions_have_no_blocks(network: str) -> None:
    assert not block_ends(timm.create_model(network))


class Residual(nn.Module):
    def __init__(self, *layers: nn.Module) -> None:
        super().__init__()
        self.branch = nn.Sequential(*layers)
        self.shortcut = nn.Conv2d(8, 8, 1)


def test_a_stage_is_no_block() -> None:
    stage = Residual(nn.Conv2d(8, 8, 3), nn.Conv2d(8, 8, 3))
    stage.blocks = stage.branch
    assert not block_ends(stage)


def test_a_block_of_blocks_is_none_and_a_network_may_be_a_block() -> None:
    inner = Residual(nn.Conv2d(8, 8, 3), nn.Conv2d(8, 8, 3))
    assert block_ends(inner) == {"branch.1"}
    assert block_ends(Residual(inner, nn.Conv2d(8, 8, 3))) == {"branch.0.branch.1"}


def test_one_convolution_is_no_branch_and_a_depthwise_one_at_the_end_stays_depthwise() -> None:
    assert not block_ends(Residual(nn.Conv2d(8, 8, 3)))
    block = nn.Sequential(nn.Conv2d(3, 8, 3), Residual(nn.Conv2d(8, 8, 1), nn.Conv2d(8, 8, 3, groups=8)))
    assert find_roles(block)["1.branch.1"] == "depthwise"
