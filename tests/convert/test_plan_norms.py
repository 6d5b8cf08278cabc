"""A batch norm goes only where whitening takes its place in what follows."""

from typing import Any

import pytest
import timm
import torch
import torchvision
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from timm_deconv import convert_deconv_model, transfer


def chain(conv: Any, norm: Any, pool: nn.Module, depth: int = 6) -> nn.Sequential:
    layers: list[nn.Module] = []
    for i in range(depth):
        layers += [conv(3 if i == 0 else 8, 8, 3, padding=1), norm(8), nn.ReLU()]
    return nn.Sequential(*layers, pool, nn.Flatten(), nn.Linear(8, 4))


def left(model: nn.Module) -> list[str]:
    return [name for name, module in model.named_modules() if isinstance(module, _BatchNorm)]


CHAINS = {
    "Conv1d": lambda: chain(nn.Conv1d, nn.BatchNorm1d, nn.AdaptiveAvgPool1d(1)),
    "Conv3d": lambda: chain(nn.Conv3d, nn.BatchNorm3d, nn.AdaptiveAvgPool3d(1)),
    "ConvTranspose2d": lambda: chain(nn.ConvTranspose2d, nn.BatchNorm2d, nn.AdaptiveAvgPool2d(1)),
    "weight norm": lambda: chain(
        lambda *a, **k: nn.utils.parametrizations.weight_norm(nn.Conv2d(*a, **k)),
        nn.BatchNorm2d,
        nn.AdaptiveAvgPool2d(1),
    ),
}


@pytest.mark.parametrize("kind", CHAINS)
def test_norms_of_layers_without_a_whitening_form_stay_but_for_the_one_before_the_whitened_classifier(
    kind: str,
) -> None:
    model = CHAINS[kind]()
    report = convert_deconv_model(model)
    assert left(model) == [name for name, _ in report.norms_kept] == ["1", "4", "7", "10", "13"]
    assert report.norms == ["16"] and report.unseen is None
    assert report.norms_kept[0] == ("1", "3 reads it and stays plain")
    assert "5 batch norms stay:\n  1: 3 reads it and stays plain" in str(report)


def test_a_network_of_one_dimensional_convolutions_learns_after_conversion() -> None:
    torch.manual_seed(0)
    model = chain(nn.Conv1d, nn.BatchNorm1d, nn.AdaptiveAvgPool1d(1), depth=12)
    convert_deconv_model(model)
    y = torch.arange(64) % 4
    x = torch.randn(64, 3, 32) + torch.sin(torch.arange(32) * (y[:, None] + 1) * 0.5)[:, None]
    optimizer = torch.optim.SGD(model.parameters(), 0.1, momentum=0.9)
    for _ in range(60):
        loss = nn.functional.cross_entropy(model(x), y)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert loss < 0.5  # 1.38 where norms went: chance


@pytest.mark.parametrize("classifier", ["linear", "plain"])
def test_norms_that_layers_left_plain_by_a_pattern_read_stay(classifier: str) -> None:
    model = torchvision.models.resnet18()
    report = convert_deconv_model(model, {"patterns": {"layer4.*": None}, "classifier": classifier})
    layer4 = {"layer4.0.bn1", "layer4.0.bn2", "layer4.0.downsample.1", "layer4.1.bn1"}
    # What layer3 adds up is read by layer4; what it normalises within its branches is not.
    layer3 = {"layer3.0.bn2", "layer3.0.downsample.1", "layer3.1.bn2"}
    assert set(left(model)) == layer3 | layer4 | ({"layer4.1.bn2"} if classifier == "plain" else set())
    assert dict(report.norms_kept)["layer4.0.bn1"] == "layer4.0.conv2 reads it and stays plain"
    if classifier == "plain":
        reason = dict(report.norms_kept)["layer4.1.bn2"]
        assert reason == "layer4.1.conv2 before it stays plain, and no whitened layer follows"


@pytest.mark.parametrize("classifier", ["linear", "plain"])
@pytest.mark.parametrize("name", ["resnet18", "seresnet50", "mobilenetv3_small_050", "densenet121", "vgg11_bn"])
def test_no_norm_stays_where_all_but_squeeze_excites_and_classifier_is_whitened(name: str, classifier: str) -> None:
    with torch.device("meta"):
        model = timm.create_model(name)
    report = convert_deconv_model(model, {"classifier": classifier})
    assert not left(model) and not report.norms_kept


def test_norms_of_a_backbone_go_though_nothing_reads_its_output() -> None:
    with torch.device("meta"):
        model = timm.create_model("resnet18", num_classes=0)
    convert_deconv_model(model)
    assert not left(model)


def test_a_norm_that_stays_outlives_a_new_classifier() -> None:
    with torch.device("meta"):
        model = timm.create_model("resnet18")
    convert_deconv_model(model, {"patterns": {"layer2.*": None}})
    before = left(model)
    model.reset_classifier(3)
    assert before and left(model) == before


class Functional(nn.Module):
    """A convolution by filters of its own, which no layer holds."""

    def __init__(self, learned: bool) -> None:
        super().__init__()
        filters = torch.randn(8, 8, 3, 3)
        if learned:
            self.filters = nn.Parameter(filters)
        else:
            self.register_buffer("filters", filters)

    def forward(self, x: Tensor) -> Tensor:
        return nn.functional.conv2d(x, self.filters, padding=1)


@pytest.mark.parametrize("learned", [True, False])
def test_products_with_parameters_outside_of_layers_count_as_plain_layers_and_fixed_filters_do_not(
    learned: bool,
) -> None:
    model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), Functional(learned), nn.Conv2d(8, 8, 1))
    convert_deconv_model(model)
    assert left(model) == (["1"] if learned else [])


def test_another_norm_takes_the_place_of_a_batch_norm_too() -> None:
    plain = nn.Conv1d(8, 8, 1)
    model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.GroupNorm(2, 8), nn.Flatten(2), plain)
    report = convert_deconv_model(model)
    assert report.norms == ["1"]


def test_looking_for_the_size_that_a_network_takes_says_nothing(capfd: pytest.CaptureFixture[str]) -> None:
    layers = nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.Flatten(), nn.Linear(8 * 26 * 26, 4))
    assert convert_deconv_model(layers).unseen is None  # 28 x 28
    fixed = nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.Flatten(), nn.Linear(7, 4))
    assert "does not run" in str(convert_deconv_model(fixed).unseen)
    assert capfd.readouterr() == ("", "")


class NeedsTwo(nn.Module):
    """Two inputs: no run on an image shows what it computes."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1, self.bn1 = nn.Conv2d(3, 8, 3, padding=1), nn.BatchNorm2d(8)
        self.conv2, self.bn2 = nn.Conv1d(8, 8, 3, padding=1), nn.BatchNorm1d(8)
        self.conv3, self.bn3 = nn.Conv1d(8, 8, 3, padding=1), nn.BatchNorm1d(8)
        self.fc = nn.Linear(8, 2)

    def forward(self, x: Tensor, scale: Tensor) -> Tensor:
        x = self.bn1(self.conv1(x)).relu().flatten(2) * scale
        return self.fc(self.bn3(self.conv3(self.bn2(self.conv2(x)).relu())).mean(-1))


def test_a_network_that_does_not_run_is_converted_by_the_layers_beside_each_norm_and_the_report_says_it() -> None:
    model = NeedsTwo()
    report = convert_deconv_model(model)
    assert report.norms == ["bn3"] and left(model) == ["bn1", "bn2"]
    assert report.unseen is not None and "NeedsTwo does not run on an input of" in report.unseen
    assert "are by shape alone, norms by the layers beside them: NeedsTwo does not run" in str(report)


def test_of_a_network_that_fails_at_its_end_the_part_that_ran_is_known() -> None:
    with torch.device("meta"):
        make = torchvision.models.detection.fasterrcnn_mobilenet_v3_large_320_fpn
        model = make(weights=None, weights_backbone=None)
    report = convert_deconv_model(model)
    assert report.unseen is not None and "FasterRCNN does not run" in report.unseen and not left(model)
    roles = {layer.name: layer.role for layer in report.converted}
    assert roles["backbone.body.2.block.2.0"] == "block_end"
    assert [name for name, _ in report.skipped if "backbone.body.4.block.2." in name] == [
        "backbone.body.4.block.2.fc1",
        "backbone.body.4.block.2.fc2",
    ]


@pytest.mark.parametrize(
    "inputs", [(torch.zeros(2, 3, 8, 8), torch.ones(1)), {"x": torch.zeros(2, 3, 8, 8), "scale": torch.ones(1)}]
)
def test_example_inputs_show_what_it_computes(inputs: Any) -> None:
    model = NeedsTwo()
    report = convert_deconv_model(model, example_inputs=inputs)
    assert report.unseen is None and dict(report.norms_kept)["bn1"] == "conv2 reads it and stays plain"
    assert {c.role for c in report.converted if c.name == "fc"} == {"classifier"}


def test_transfer_and_conversion_leave_the_same_norms() -> None:
    policy = {"patterns": {"layer2.*": None}}
    with torch.device("meta"):
        models = [timm.create_model("resnet18") for _ in range(2)]
    reports = convert_deconv_model(models[0], policy), transfer(models[1], policy)
    assert left(models[0]) == left(models[1]) != []
    assert reports[0].norms_kept == reports[1].norms_kept
