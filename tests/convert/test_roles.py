import pytest
import timm
import torch
import torchvision
from torch import Tensor, nn

from timm_deconv import convert_deconv_model
from timm_deconv.convert.roles import block_ends, classifier_names, find_roles


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
    """layers(x) + shortcut(x); owns attributes that say nothing of what it computes."""

    skip = downsample = blocks = reparameterize = None

    def __init__(self, *layers: nn.Module, shortcut: nn.Module | None = None) -> None:
        super().__init__()
        self.branch = nn.Sequential(*layers)
        self.shortcut = shortcut or nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        return self.branch(x) + self.shortcut(x)


def conv(kernel: int = 3, inputs: int = 8, **options: int) -> nn.Conv2d:
    return nn.Conv2d(inputs, 8, kernel, padding=kernel // 2, **options)


def test_the_order_of_computation_decides_not_the_order_in_which_modules_are_made() -> None:
    class Backwards(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.last, self.first = conv(), conv()

        def forward(self, x: Tensor) -> Tensor:
            return x + self.last(self.first(x).relu())

    assert block_ends(nn.Sequential(conv(inputs=3), Backwards())) == {"1.last"}


def test_attributes_and_module_names_decide_nothing() -> None:
    class Chain(nn.Module):
        skip = downsample = drop_path = None

        def __init__(self) -> None:
            super().__init__()
            self.conv1, self.conv2 = conv(), conv()

        def forward(self, x: Tensor) -> Tensor:
            return self.conv2(self.conv1(x).relu()).relu()

    assert not block_ends(nn.Sequential(conv(inputs=3), Chain()))
    assert block_ends(nn.Sequential(conv(inputs=3), Residual(conv(), nn.ReLU(), conv()))) == {"1.branch.2"}


def test_the_projection_of_an_input_is_no_branch_and_three_operands_may_be_added() -> None:
    class Two(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = nn.Sequential(conv(), conv()), nn.Sequential(conv(), conv())

        def forward(self, x: Tensor) -> Tensor:
            return x + self.a(x) + self.b(x)

    projected = Residual(conv(), nn.BatchNorm2d(8), conv(), shortcut=nn.Sequential(conv(1), nn.BatchNorm2d(8)))
    assert block_ends(nn.Sequential(conv(inputs=3), projected)) == {"1.branch.2"}
    assert block_ends(nn.Sequential(conv(inputs=3), Two())) == {"1.a.1", "1.b.1"}


def test_a_block_of_blocks_is_none_and_a_network_may_be_a_block() -> None:
    inner = Residual(conv(), conv())
    assert block_ends(inner) == {"branch.1"}
    assert block_ends(Residual(inner, conv())) == {"branch.0.branch.1"}


def test_one_convolution_is_no_branch_and_a_depthwise_one_at_the_end_stays_depthwise() -> None:
    assert not block_ends(Residual(conv()))
    block = nn.Sequential(conv(inputs=3), Residual(conv(1), conv(groups=8)))
    assert find_roles(block)["1.branch.1"] == "depthwise"


class UNet(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.stem, self.inner, self.head = conv(inputs=3), nn.Sequential(conv(), conv()), conv(inputs=16)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        low = self.inner(nn.functional.max_pool2d(x, 2))
        return self.head(torch.cat([x, nn.functional.interpolate(low, scale_factor=2)], 1))


class Split(nn.Module):
    """Res2Net: convolutions of split channels, each with the one before added."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.convs = conv(inputs=3), nn.ModuleList(nn.Conv2d(4, 4, 3, padding=1) for _ in range(2))
        self.conv3 = conv()

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        a, b = x.split(4, 1)
        y = self.convs[1](self.convs[0](a).relu())
        return x + self.conv3(torch.cat([y + b, b], 1))


def test_a_network_that_goes_down_and_up_again_is_no_dense_layer_and_split_channels_are_no_block() -> None:
    assert not block_ends(UNet())
    assert block_ends(Split()) == {"conv3"}


@pytest.mark.parametrize("network", ["mobilenet_v2", "mnasnet0_5", "mobilenet_v3_large"])
def test_inverted_residuals_of_torchvision_end_with_their_projections_as_those_of_timm_do(network: str) -> None:
    named = {
        "mobilenet_v2": "mobilenetv2_100",
        "mnasnet0_5": "mnasnet_050",
        "mobilenet_v3_large": "mobilenetv3_large_100",
    }
    with torch.device("meta"):
        model = getattr(torchvision.models, network)()
        twin = timm.create_model(named[network])
    assert len(ends(model)) == len(ends(twin)) > 10


def test_the_projections_of_torchvisions_mobilenet_v2_are_all_17() -> None:
    found = ends(torchvision.models.mobilenet_v2())
    assert found == ["features.1.conv.1", *(f"features.{i}.conv.2" for i in range(2, 18))]


@pytest.mark.parametrize("network", ["efficientnet_b0", "mobilenet_v3_small"])
def test_squeeze_excites_are_what_multiplies_a_map_by_something_computed_from_pooled_values(network: str) -> None:
    with torch.device("meta"):
        model = getattr(torchvision.models, network)()
    found = {name for name, role in find_roles(model).items() if role == "squeeze_excite"}
    assert found and found == {name for name in find_roles(model) if name.rsplit(".", 1)[-1] in ("fc1", "fc2")}


class Gate(nn.Module):
    """A squeeze-excite by what it does, named like nothing."""

    def __init__(self, norm: bool = False) -> None:
        super().__init__()
        self.layers = nn.Sequential(conv(1), nn.BatchNorm2d(8) if norm else nn.ReLU(), conv(1), nn.Sigmoid())

    def forward(self, x: Tensor) -> Tensor:
        return x * self.layers(x.mean((2, 3), keepdim=True))


class SqueezeExcite(nn.Sequential):
    """No squeeze-excite, for all its name."""


def test_a_squeeze_excite_is_known_by_what_it_does_not_by_its_name() -> None:
    model = nn.Sequential(conv(inputs=3), Gate(), SqueezeExcite(conv(1), nn.ReLU()), Gate(norm=True))
    roles = find_roles(model)
    assert roles["1.layers.0"] == roles["1.layers.2"] == "squeeze_excite"
    assert roles["2.0"] == roles["3.layers.0"] == roles["3.layers.2"] == "pointwise"


@pytest.mark.parametrize(
    ("network", "classifier"),
    [
        ("resnet18", ["fc"]),
        ("mobilenet_v2", ["classifier.1"]),
        ("vgg11_bn", ["classifier.6"]),
        ("squeezenet1_1", ["classifier.1"]),
        ("densenet121", ["classifier"]),
        ("googlenet", ["aux1.fc2", "aux2.fc2", "fc"]),
    ],
)
def test_classifiers_of_torchvision_are_what_ends_in_the_output(network: str, classifier: list[str]) -> None:
    with torch.device("meta"):
        options = {"init_weights": False} if network == "googlenet" else {}
        model = getattr(torchvision.models, network)(**options)
    roles = find_roles(model)
    assert sorted(name for name, role in roles.items() if role == "classifier") == classifier
    report = convert_deconv_model(model, {"classifier": "plain"})
    assert {name for name, reason in report.skipped if reason == "classifier='plain'"} == set(classifier)


def test_what_ends_in_a_map_or_behind_a_norm_is_no_classifier() -> None:
    backbone = nn.Sequential(conv(inputs=3), nn.BatchNorm2d(8), nn.ReLU(), conv(1))
    assert not classifier_names(backbone)
    embedding = nn.Sequential(conv(inputs=3), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 4), nn.BatchNorm1d(4))
    assert not classifier_names(embedding)
    assert classifier_names(nn.Sequential(*embedding[:4], nn.LogSoftmax(1))) == ("3",)


def test_the_stem_is_the_convolution_that_is_computed_first() -> None:
    class HeadFirst(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.head, self.stem = conv(), conv(inputs=3)

        def forward(self, x: Tensor) -> Tensor:
            return self.head(self.stem(x))

    assert find_roles(HeadFirst()) == {"head": "spatial", "stem": "stem"}
