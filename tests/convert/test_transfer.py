"""transfer: the same function after conversion, or a refusal that changes nothing."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
import torchvision
from timm.layers import FrozenBatchNormAct2d
from timm.models import save_for_hf
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torchvision.ops import FrozenBatchNorm2d

import timm_deconv
from timm_deconv import Deconv2d, DeconvLinear, transfer
from timm_deconv.convert.bn_folding import ChannelAffine
from timm_deconv.errors import InputError

POST_NORM: list[tuple[str, dict[str, Any], int]] = [
    ("resnet18", {}, 64),
    ("legacy_seresnet18", {}, 64),
    ("mobilenetv2_050", {}, 64),
    ("tf_efficientnet_b0", {}, 65),  # 'SAME' padding
    ("vgg11_cifar", {"width": 0.25}, 32),
    ("resnext29_32x4d_cifar", {"width": 0.25}, 32),
    ("pnasnet_a_cifar", {"width": 0.5}, 32),
    ("dpn92_cifar", {"width": 0.25}, 32),  # post-norm, unlike timm's DPN
    ("deeplabv3_resnet50", {"layers": (1, 1, 1, 1)}, 33),
    ("mixnet_s", {}, 64),  # concatenated depthwise convolutions
]
SLOW: list[tuple[str, dict[str, Any], int]] = [
    ("vgg11_bn", {"mlp_ratio": 1 / 16}, 64),
    ("seresnet50", {}, 64),
    ("resnext50_32x4d", {}, 64),
    ("legacy_senet154", {"layers": (1, 2, 2, 1)}, 64),
    ("efficientnetv2_rw_s", {}, 64),
    ("pnasnet5large", {}, 96),
    ("fcn_resnet50", {}, 33),
    ("regnety_008", {}, 64),
]
PRE_NORM: list[tuple[str, dict[str, Any], int]] = [
    ("densenet121", {"growth_rate": 8, "block_config": (2, 2, 2, 2)}, 64),
    ("preact_resnet18_cifar", {"width": 0.25}, 32),
    ("dpn68", {}, 64),
    ("resnetv2_50", {"layers": (1, 1, 1, 1)}, 64),
]


def randomised(model: nn.Module) -> nn.Module:
    """In evaluation, with running statistics and affine weights as training might leave them."""
    for norm in model.modules():
        if isinstance(norm, _BatchNorm) and norm.running_mean is not None:
            norm.running_mean.normal_(0, 0.3)
            norm.running_var.uniform_(0.5, 2)
            if norm.affine:
                nn.init.uniform_(norm.weight, 0.5, 1.5)
                nn.init.normal_(norm.bias, 0, 0.3)
    return model.eval()


@torch.no_grad()
def outputs_before_and_after(model: nn.Module, x: Tensor, **options: Any) -> tuple[Tensor, Tensor]:
    before = model(x)
    transfer(model, **options)
    return model(x), before


def difference(a: Tensor, b: Tensor) -> float:
    """Largest difference in units of the largest value."""
    return float((a - b).abs().max() / b.abs().max())


def snapshot(model: nn.Module) -> tuple[list[type[nn.Module]], dict[str, Tensor]]:
    return [type(m) for m in model.modules()], {k: v.clone() for k, v in model.state_dict().items()}


def assert_unchanged(model: nn.Module, before: tuple[list[type[nn.Module]], dict[str, Tensor]]) -> None:
    kinds, values = snapshot(model)
    assert kinds == before[0] and values.keys() == before[1].keys()
    assert all(torch.equal(value, before[1][key]) for key, value in values.items())


@pytest.mark.parametrize(
    ("name", "options", "size"), [*POST_NORM, *(pytest.param(*case, marks=pytest.mark.slow) for case in SLOW)]
)
def test_post_norm_network_computes_the_same_without_its_norms(name: str, options: dict[str, Any], size: int) -> None:
    deep = (name, options, size) in SLOW
    dtype, tolerance = (torch.float64, 1e-7) if deep else (torch.float32, 1e-4)  # random depth amplifies rounding
    model = randomised(timm.create_model(name, **options)).to(dtype)
    after, before = outputs_before_and_after(model, torch.randn(2, 3, size, size, dtype=dtype))
    assert difference(after, before) < tolerance
    assert not [m for m in model.modules() if isinstance(m, _BatchNorm | ChannelAffine)]
    assert [m for m in model.modules() if isinstance(m, Deconv2d)]


@pytest.mark.parametrize(("name", "options", "size"), PRE_NORM)
def test_pre_norm_network_is_refused_unchanged_and_keeps_its_function_with_keep_affine(
    name: str, options: dict[str, Any], size: int
) -> None:
    model = randomised(timm.create_model(name, **options))
    before = snapshot(model)
    with pytest.raises(InputError, match=r"cannot be folded .* pre-norm .*keep_affine=True") as error:
        transfer(model)
    assert "\n" not in str(error.value)
    assert_unchanged(model, before)
    norms = sum(isinstance(m, _BatchNorm) for m in model.modules())
    x = torch.randn(2, 3, size, size)
    with torch.no_grad():
        expected = model(x)
        report = transfer(model, keep_affine=True)
        assert difference(model(x), expected) < 1e-4
    assert 0 < len(report.affine) < norms == len(report.norms)
    assert len([m for m in model.modules() if isinstance(m, ChannelAffine)]) == len(report.affine)
    assert f"{len(report.affine)} of the batch norms left as scale and shift" in str(report)


def test_transferred_pre_norm_network_saves_and_loads(tmp_path: Path) -> None:
    model = randomised(timm.create_model("densenet121", growth_rate=8, block_config=(2, 2, 2, 2)))
    transfer(model, keep_affine=True)
    save_for_hf(model, str(tmp_path), safe_serialization=True)
    back = timm.create_model(f"local-dir:{tmp_path}", pretrained=True).eval()
    x = torch.randn(1, 3, 64, 64)
    with torch.no_grad():
        assert torch.equal(back(x), model(x))
        assert difference(timm_deconv.fuse(model)(x), model(x)) < 1e-5


class Branches(nn.Module):
    """conv1, conv2 -> concatenation -> norm; `read` takes the outputs of all three."""

    def __init__(self, read: Callable[..., Tensor] = lambda a, b, y: y) -> None:
        super().__init__()
        self.conv1, self.conv2 = nn.Conv2d(3, 4, 3), nn.Conv2d(3, 6, 3, bias=False)
        self.norm, self.head = nn.BatchNorm2d(10), nn.Conv2d(10, 2, 1)
        self.read = read

    def forward(self, x: Tensor) -> Tensor:
        a, b = self.conv1(x), self.conv2(x)
        return self.head(self.read(a, b, self.norm(torch.cat([a, nn.functional.dropout(b, 0.5, False)], 1))))


def test_norm_of_a_concatenation_is_folded_into_its_parts() -> None:
    model = randomised(Branches()).double()
    after, before = outputs_before_and_after(model, torch.randn(2, 3, 8, 8, dtype=torch.float64))
    assert difference(after, before) < 1e-12
    assert isinstance(model.norm, nn.Identity)


def test_convolution_that_something_else_reads_keeps_its_output() -> None:
    model = randomised(Branches(lambda a, b, y: y + a.mean())).double()
    with pytest.raises(InputError, match=r"norm shares the output of conv1 with another layer"):
        transfer(model)
    after, before = outputs_before_and_after(model, torch.randn(2, 3, 8, 8, dtype=torch.float64), keep_affine=True)
    assert difference(after, before) < 1e-12


class SharedConv(nn.Module):
    """One convolution whose two outputs have norms of their own, or, `shared`, the same."""

    def __init__(self, shared: bool) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 3, 3, padding=1)
        self.norm1 = nn.BatchNorm2d(3)
        self.norm2 = self.norm1 if shared else nn.BatchNorm2d(3)

    def forward(self, x: Tensor) -> Tensor:
        return self.norm2(self.conv(self.norm1(self.conv(x)).relu()))


def test_convolution_used_twice_is_folded_once_or_refused_where_its_norms_differ() -> None:
    x = torch.randn(2, 3, 8, 8, dtype=torch.float64)
    after, before = outputs_before_and_after(randomised(SharedConv(shared=True)).double(), x)
    assert difference(after, before) < 1e-12
    model = randomised(SharedConv(shared=False))
    kept = snapshot(model)
    with pytest.raises(InputError, match="norm1 shares the output of conv with norm2"):
        transfer(model)
    assert_unchanged(model, kept)


def test_weight_shared_by_name_is_not_folded_twice() -> None:
    model = nn.Sequential(nn.Conv2d(3, 3, 1), nn.BatchNorm2d(3), nn.ReLU(), nn.Conv2d(3, 3, 1), nn.BatchNorm2d(3))
    model[3].weight = model[0].weight
    with pytest.raises(InputError, match="shares its weight"):
        transfer(randomised(model))
    x = torch.randn(2, 3, 4, 4, dtype=torch.float64)
    after, before = outputs_before_and_after(model.double(), x, keep_affine=True)
    assert difference(after, before) < 1e-12


def test_norms_that_plain_layers_read_stay_and_those_behind_them_are_folded_into_plain_layers() -> None:
    model = randomised(timm.create_model("resnet18_cifar", width=0.25))
    policy = {"patterns": {"layer1.0.*": None}, "classifier": "plain"}
    after, before = outputs_before_and_after(model, torch.randn(2, 3, 32, 32), policy=policy)
    assert difference(after, before) < 1e-4
    block = model.layer1[0]
    assert isinstance(model.bn1, nn.BatchNorm2d) and isinstance(block.bn1, nn.BatchNorm2d)
    assert type(block.conv2) is nn.Conv2d and block.conv2.bias is not None and isinstance(block.bn2, nn.Identity)


class Tokens(nn.Module):
    """A linear layer whose rows are flattened for the norm, as in LeViT."""

    def __init__(self) -> None:
        super().__init__()
        self.linear, self.norm = nn.Linear(4, 5, bias=False), nn.BatchNorm1d(5)

    def forward(self, x: Tensor) -> Tensor:
        y = self.linear(x)
        return self.norm(y.flatten(0, 1)).reshape_as(y)


def test_norm_of_flattened_tokens_is_folded() -> None:
    model = randomised(Tokens()).double()
    after, before = outputs_before_and_after(model, torch.randn(2, 3, 4, dtype=torch.float64), input_size=(3, 4))
    assert difference(after, before) < 1e-12
    assert isinstance(model.norm, nn.Identity) and isinstance(model.linear, DeconvLinear)


def test_norm_without_affine_weights_and_norm_of_a_linear_layer() -> None:
    model = nn.Sequential(
        nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4, affine=False), nn.Flatten(), nn.Linear(16, 5), nn.BatchNorm1d(5)
    )
    after, before = outputs_before_and_after(
        randomised(model).double(), torch.randn(3, 3, 4, 4, dtype=torch.float64), input_size=(3, 4, 4)
    )
    assert difference(after, before) < 1e-12
    assert isinstance(model[3], DeconvLinear)


def test_norm_in_the_auxiliary_head_is_found_and_looking_for_it_changes_nothing() -> None:
    model = randomised(timm.create_model("fcn_resnet50", layers=(1, 1, 1, 1), aux_head=True)).train()
    model.aux_decoder.eval()
    x = torch.randn(2, 1024, 5, 5)
    with torch.no_grad():
        expected = model.aux_decoder(x)
        transfer(model)
        assert difference(model.aux_decoder(x), expected) < 1e-4
    assert model.training and model.backbone.layer1.training and not model.aux_decoder[0].conv.training


def test_transfer_on_the_meta_device_gives_the_converted_structure() -> None:
    with torch.device("meta"):
        model, converted = (timm.create_model("resnet18_cifar") for _ in range(2))
    transfer(model)
    timm_deconv.convert_deconv_model(converted)
    shapes = [{key: value.shape for key, value in m.state_dict().items()} for m in (model, converted)]
    assert shapes[0] == shapes[1]


def test_network_changes_nothing_when_the_policy_is_refused() -> None:
    model = randomised(timm.create_model("resnet18_cifar", width=0.25))
    before = snapshot(model)
    with pytest.raises(InputError, match="layer that matches"):
        transfer(model, {"patterns": {"layer9.*": None}})
    assert_unchanged(model, before)


class Fussy(nn.Module):
    """A network that takes no image that `transfer` would think of."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.norm = nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4)

    def forward(self, x: Tensor) -> Tensor:
        if x.shape[-1] != 7:
            raise RuntimeError("7 pixels, please")
        return self.norm(self.conv(x))


def test_network_that_does_not_run_is_named_and_runs_with_its_own_input_size() -> None:
    with pytest.raises(
        InputError, match=r"Fussy does not run .* 7 pixels, please; give the input_size .* or example_inputs"
    ):
        transfer(Fussy())
    model = randomised(Fussy()).double()
    after, before = outputs_before_and_after(model, torch.randn(1, 3, 7, 7).double(), input_size=(3, 7, 7))
    assert difference(after, before) < 1e-12


def test_nothing_to_fold_and_norms_without_statistics_are_refused() -> None:
    with pytest.raises(InputError, match=r"no batch norm in Sequential.*convert_deconv_model"):
        transfer(nn.Sequential(nn.Conv2d(3, 4, 3)))
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4, track_running_stats=False))
    with pytest.raises(InputError, match="batch norm 1 of Sequential keeps no running statistics"):
        transfer(model, keep_affine=True)
    with pytest.raises(InputError, match="no batch norm"):
        transfer(timm.create_model("resnet18_cifar_deconv", width=0.25))


class Detector(nn.Module):
    """Takes a list of images of different sizes and, if asked, how much to scale them by."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.norm, self.head = nn.Conv2d(3, 4, 3, bias=False), nn.BatchNorm2d(4), nn.Conv2d(4, 2, 1)

    def forward(self, images: list[Tensor], scale: float = 1.0) -> list[dict[str, Tensor]]:
        maps = [self.head(self.norm(self.conv(image[None] * scale)).relu()) for image in images]
        return [{"boxes": m[m > float(m.mean())]} for m in maps]


def test_network_of_unusual_inputs_is_folded_by_example_inputs() -> None:
    images = [torch.randn(3, 8, 9, dtype=torch.float64), torch.randn(3, 11, 7, dtype=torch.float64)]
    for inputs in ((images,), (images, 2.0), {"images": images, "scale": 0.5}):
        model = randomised(Detector()).double()
        with torch.no_grad():
            before, kept = model(images), snapshot(model)
        with pytest.raises(InputError, match=r"Detector does not run on .*; give .* or example_inputs=\(\.\.\.\)"):
            transfer(model)
        assert_unchanged(model, kept)
        report = transfer(model, example_inputs=inputs)
        assert report.norms == ["norm"] and report.unseen is None
        with torch.no_grad():
            after = model(images)
        for a, b in zip(after, before, strict=True):
            assert difference(a["boxes"], b["boxes"]) < 1e-12


def test_example_inputs_that_cannot_be_are_named() -> None:
    with pytest.raises(InputError, match=r"example_inputs of type Tensor: give a tuple .* or a dictionary"):
        transfer(Detector(), example_inputs=torch.zeros(2, 3, 8, 8))  # type: ignore[arg-type]
    with pytest.raises(
        InputError, match=r"Detector does not run on the example_inputs: .*; give what its forward takes"
    ):
        transfer(Detector(), example_inputs=(torch.zeros(2, 3), "x"))


@pytest.mark.slow
def test_torchvisions_faster_rcnn_computes_the_same_features() -> None:
    make = torchvision.models.detection.fasterrcnn_mobilenet_v3_large_320_fpn
    model = randomised(make(weights=None, weights_backbone=None, min_size=64, max_size=96))
    x = torch.randn(2, 3, 64, 64)
    with torch.no_grad():
        before = model.backbone(x)
        report = transfer(model, example_inputs=([torch.rand(3, 64, 64), torch.rand(3, 80, 64)],))
        after = model.backbone(x)
    assert report.norms and not [m for m in model.modules() if isinstance(m, _BatchNorm)]
    assert all(difference(after[key], before[key]) < 1e-4 for key in before)


@pytest.mark.parametrize("name", ["resnet18", "efficientnet_b0", "mobilenetv2_050"])
def test_norms_that_timms_freeze_has_frozen_are_folded_as_others_are(name: str) -> None:
    model = randomised(timm.create_model(name))
    timm.utils.freeze(model)
    assert not [m for m in model.modules() if isinstance(m, _BatchNorm)]
    after, before = outputs_before_and_after(model, torch.randn(2, 3, 64, 64))
    assert difference(after, before) < 1e-4
    assert not [m for m in model.modules() if isinstance(m, FrozenBatchNorm2d | FrozenBatchNormAct2d)]


def test_torchvisions_frozen_norms_are_folded_or_stay_as_scale_and_shift_without_gradients() -> None:
    model = nn.Sequential(FrozenBatchNorm2d(3), nn.Conv2d(3, 4, 3), FrozenBatchNorm2d(4), nn.ReLU(), nn.Conv2d(4, 2, 1))
    for norm in (model[0], model[2]):
        for buffer in (norm.weight, norm.bias, norm.running_mean, norm.running_var):
            buffer.uniform_(0.5, 2)
    model.eval()
    x = torch.randn(2, 3, 8, 8)
    with pytest.raises(InputError, match="keep_affine=True"):
        transfer(model)
    after, before = outputs_before_and_after(model, x, keep_affine=True)
    assert difference(after, before) < 1e-5
    assert isinstance(model[0], ChannelAffine) and isinstance(model[2], nn.Identity)
    assert not model[0].weight.requires_grad and model[1].bias.requires_grad


@pytest.mark.parametrize(
    ("layer", "name"), [(nn.LazyConv2d(4, 3), "0 is a LazyConv2d"), (nn.LazyBatchNorm2d(), "0 is a LazyBatchNorm2d")]
)
@pytest.mark.parametrize("function", [transfer, timm_deconv.convert_deconv_model])
def test_lazy_layers_are_refused_by_name(function: Any, layer: nn.Module, name: str) -> None:
    with pytest.raises(InputError, match=f"{name} without a shape yet: run the network once on a batch first"):
        function(nn.Sequential(layer, nn.Conv2d(3, 3, 1), nn.BatchNorm2d(3)))


def test_lazy_layers_that_have_a_shape_are_converted() -> None:
    model = nn.Sequential(nn.LazyConv2d(4, 3), nn.LazyBatchNorm2d(), nn.ReLU(), nn.Conv2d(4, 2, 1)).eval()
    x = torch.randn(2, 3, 8, 8)
    model(x)
    after, before = outputs_before_and_after(model, x)
    assert difference(after, before) < 1e-5 and isinstance(model[0], Deconv2d) and isinstance(model[1], nn.Identity)
