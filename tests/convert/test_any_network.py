"""Any timm network: kinds of layers, timm's own re-parameterisation, saving and loading."""

import json
import tempfile
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from timm.layers import Conv2dSame, ScaledStdConv2d, StdConv2d, freeze_batch_norm_2d
from timm.models import save_for_hf
from timm.models.fastvit import MobileOneBlock, RepConditionalPosEnc
from timm.models.levit import ConvNorm, LinearNorm, NormLinear
from timm.utils import reparameterize_model
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

import timm_deconv  # noqa: F401 (registers the networks)
from tests.convert.networks import converted, images, trained
from timm_deconv import Deconv2d, DeconvLinear, convert_deconv_model, fuse
from timm_deconv.convert import ConversionReport
from timm_deconv.errors import InputError
from timm_deconv.layers import Deconv2dSame

META = [
    "dpn68",
    "eca_resnet33ts",
    "efficientformerv2_s0",
    "efficientnet_cc_b0_4e",
    "fastvit_t8",
    "gcresnet33ts",
    "ghostnetv3_050",
    "hrnet_w18_small",
    "inception_next_atto",
    "levit_128s",
    "maxvit_pico_rw_256",
    "mobileone_s0",
    "mobilevitv2_050",
    "nextvit_small",
    "regnety_002",
    "repvit_m0_9",
    "tf_efficientnet_b0",
    "tresnet_m",
    "vgg11_bn",
    "xcit_nano_12_p16_224",
]


def on_meta(name: str, policy: Any = None) -> tuple[nn.Module, ConversionReport]:
    with torch.device("meta"):
        return converted(name, policy)


def same(output: Tensor, expected: Tensor) -> None:
    size = float(expected.detach().abs().max())
    assert size > 0
    torch.testing.assert_close(output, expected, rtol=0, atol=1e-5 * size)


@pytest.mark.parametrize("name", META)
def test_no_batch_norm_and_nothing_plain_is_left_without_a_reason(name: str) -> None:
    model, report = on_meta(name)
    left = [name for name, module in model.named_modules() if isinstance(module, _BatchNorm)]
    assert left == [name for name, _ in report.norms_kept]
    # Convolutions whose weights are mixtures have no whitening form, and a class token is read without a norm.
    assert bool(left) == (name in ("efficientnet_cc_b0_4e", "xcit_nano_12_p16_224"))
    assert report.norms and report.converted and all(reason for _, reason in report.skipped)
    plain = {n for n, m in model.named_modules() if type(m) in (nn.Conv2d, nn.Linear, Conv2dSame)}
    assert plain <= {layer for layer, _ in report.skipped}
    fused = fuse(model)
    assert not [module for module in fused.modules() if isinstance(module, Deconv2d | DeconvLinear)]


# Kinds of layers


@pytest.mark.filterwarnings("ignore:`torch.nn.utils.weight_norm` is deprecated:FutureWarning")
def test_layers_without_a_whitening_form_are_named() -> None:
    class Other(nn.Conv2d):
        pass

    layers = [StdConv2d(8, 8, 1), ScaledStdConv2d(8, 8, 1), Other(8, 8, 1), nn.ConvTranspose2d(8, 8, 1)]
    layers += [nn.Conv1d(8, 8, 1), nn.Conv3d(8, 8, 1), nn.utils.weight_norm(nn.Conv2d(8, 8, 1)), nn.Bilinear(8, 8, 8)]
    report = convert_deconv_model(nn.Sequential(nn.Conv2d(3, 8, 1), *layers))
    names = "StdConv2d ScaledStdConv2d Other ConvTranspose2d Conv1d Conv3d".split()
    reasons = [f"{name} has no whitening form" for name in names]
    reasons += ["the weight of this Conv2d is computed by a hook", "Bilinear has no whitening form"]
    assert [reason for _, reason in report.skipped] == reasons


@pytest.mark.parametrize(
    ("size", "kernel", "stride", "dilation"), [(13, 3, 2, 1), (12, 5, 2, 1), (11, 2, 1, 1), (9, 3, 3, 2)]
)
def test_same_padding_is_seen_by_convolution_and_statistics(size: int, kernel: int, stride: int, dilation: int) -> None:
    conv = Conv2dSame(3, 4, kernel, stride, dilation=dilation, bias=False).double()
    model = nn.Sequential(conv)
    x = images(size=size).double()
    expected = conv(x).detach()
    convert_deconv_model(model, {"preset": "paper", "sampling_stride": 1})
    assert type(model[0]) is Deconv2dSame
    same(model.eval()(x), expected)
    assert model[0].moments(x).row_count == 4 * expected.shape[2] * expected.shape[3]
    trained(model, x)
    same(fuse(model)(x), model(x))
    same(fuse(model)(x[..., :-1, :-2]), model(x[..., :-1, :-2]))


def test_frozen_batch_norms_stay_and_are_said() -> None:
    model = freeze_batch_norm_2d(timm.create_model("test_efficientnet"))
    report = convert_deconv_model(model)
    assert not report.norms and {kind for _, kind in report.norms_left} == {"FrozenBatchNormAct2d"}


def test_attention_weights_and_the_linear_layers_of_transformer_blocks_stay_plain() -> None:
    block = nn.TransformerEncoderLayer(8, 2, 16)
    model = nn.Sequential(nn.Conv2d(3, 8, 1), nn.BatchNorm2d(8), nn.Flatten(2), block)
    report = convert_deconv_model(model)
    assert [layer.name for layer in report.converted] == ["0"]
    reasons = dict(report.skipped)
    assert reasons["3.linear1"].startswith("hidden linear layer without batch norm")
    assert set(reasons) == {"3.self_attn.out_proj", "3.linear1", "3.linear2"}


def test_the_role_linear_whitens_hidden_linear_layers() -> None:
    block = nn.TransformerEncoderLayer(8, 2, 16)
    report = convert_deconv_model(nn.Sequential(nn.Conv2d(3, 8, 1), block), {"roles": {"linear": {}}})
    assert [layer.name for layer in report.converted] == ["0", "1.linear1", "1.linear2"]
    assert report.skipped == [("1.self_attn.out_proj", "NonDynamicallyQuantizableLinear has no whitening form")]


def test_hidden_linear_layers_beside_batch_norm_are_whitened_with_other_norms_about() -> None:
    model = nn.Sequential(LinearNorm(8, 8), nn.LayerNorm(8), nn.Linear(8, 8), NormLinear(8, 4))
    report = convert_deconv_model(model)
    assert [layer.name for layer in report.converted] == ["0.linear", "3.linear"]


def test_convolutional_classifiers_are_whitened_as_linear_layers() -> None:
    model, _ = on_meta("dpn68")
    assert type(model.classifier) is Deconv2d
    assert (model.classifier.cfg.layout, model.classifier.cfg.sampling_stride) == ("flat", 1)
    model.reset_classifier(4)
    assert type(model.classifier) is Deconv2d and model.classifier.cfg.layout == "flat"
    spoken, _ = on_meta("dpn68", {"roles": {"classifier": {"sampling_stride": 2}}})
    assert spoken.classifier.cfg.sampling_stride == 2


def test_linear_layers_that_vgg_holds_as_convolutions_are_whitened_as_linear_layers() -> None:
    _, report = on_meta("vgg11_bn")
    roles = {layer.name: (layer.role, layer.features) for layer in report.converted}
    assert roles["pre_logits.fc1"] == roles["pre_logits.fc2"] == ("linear", 64)


def test_squeeze_excite_layers_have_a_role_of_their_own() -> None:
    _, report = on_meta("regnety_002", {"roles": {"squeeze_excite": {}}})
    roles = {layer.name: layer.role for layer in report.converted}
    assert {role for name, role in roles.items() if ".se." in name} == {"squeeze_excite"}
    model, report = on_meta("regnety_002")
    assert {name for name in roles if ".se." in name} == set(roles) - {layer.name for layer in report.converted}
    assert type(model.s1.b1.se.fc1) is nn.Conv2d
    model, _ = on_meta("regnety_002", {"patterns": {"s1.*": {"n_iter": 2}}})
    assert model.s1.b1.se.fc1.cfg.n_iter == 2 and type(model.s2.b1.se.fc1) is nn.Conv2d


def test_squeeze_excite_layers_with_a_batch_norm_are_whitened_in_its_place() -> None:
    assert isinstance(timm.create_model("rexnet_100").features[3].se.bn, _BatchNorm)
    model, report = on_meta("rexnet_100")
    roles = {layer.name: layer.role for layer in report.converted}
    assert {roles[f"features.3.se.fc{i}"] for i in (1, 2)} == {"pointwise"}
    assert isinstance(model.features[3].se.bn, nn.Identity)


def test_classifiers_behind_a_norm_are_classifiers_before_and_after_reset() -> None:
    model, report = on_meta("levit_128s")
    assert {n for n, role in ((c.name, c.role) for c in report.converted) if role == "classifier"} == {
        "head.linear",
        "head_dist.linear",
    }
    model.reset_classifier(4)
    assert type(model.head.linear) is type(model.head_dist.linear) is DeconvLinear
    assert not any(isinstance(m, _BatchNorm) for m in model.modules())


# timm's own re-parameterisation


class Blocks(nn.Module):
    """Blocks that timm folds: LeViT's by `fuse`, MobileOne's and FastViT's by `reparameterize`, these without norm."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = ConvNorm(3, 8, 3, padding=1)
        self.block = MobileOneBlock(8, 8, 3)
        self.position = RepConditionalPosEnc(8, 8)
        self.linear = NormLinear(8, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.linear(self.position(self.block(self.stem(x))).mean((2, 3)))


def test_timms_reparameterisation_folds_the_whitening() -> None:
    model = Blocks()
    convert_deconv_model(model)
    x = images()
    trained(model, x)
    plain = reparameterize_model(model)
    assert not [module for module in plain.modules() if isinstance(module, Deconv2d | DeconvLinear)]
    same(plain(x), model(x))
    same(reparameterize_model(fuse(model))(x), model(x))


def test_a_blocks_own_methods_fold_it_in_place() -> None:
    model = Blocks()
    convert_deconv_model(model)
    x = images()
    expected = trained(model, x)(x)
    assert model.stem.fuse() is model.stem and type(model.stem.linear) is nn.Conv2d
    model.block.reparameterize()
    model.position.reparameterize()
    same(model(x), expected)


# Saving and loading


def saved(model: nn.Module, folder: str) -> dict[str, Any]:
    save_for_hf(model, folder, safe_serialization=True)
    return json.loads((Path(folder) / "config.json").read_text())


@pytest.mark.parametrize("fused", [False, True])
@pytest.mark.parametrize(
    ("name", "kwargs", "policy"),
    [
        ("test_resnet", {"num_classes": 5, "in_chans": 1}, {"block": 16}),
        ("test_efficientnet", {"num_classes": 5}, {"classifier": "plain"}),
        ("test_byobnet", {}, {"roles": {"classifier": None}}),
    ],
)
def test_a_converted_network_is_saved_and_loaded(name: str, kwargs: dict[str, Any], policy: Any, fused: bool) -> None:
    model, _ = converted(name, policy, **kwargs)
    x = torch.randn(4, kwargs.get("in_chans", 3), 32, 32)
    trained(model, x)
    model = fuse(model) if fused else model
    with tempfile.TemporaryDirectory() as folder:
        config = saved(model, folder)
        again = timm.create_model(f"local-dir:{folder}", pretrained=True).eval()
    assert config["architecture"] == "deconv" and config["model_args"]["base"] == name
    assert config["model_args"]["deconv"] == {"version": 2, "preset": "fast", **policy}
    torch.testing.assert_close(again(x), model(x), rtol=0, atol=0)
    source = timm.get_pretrained_cfg(name).to_dict()
    for key in ("crop_pct", "classifier", "first_conv", "interpolation"):
        assert again.pretrained_cfg[key] == source[key]
    for key in ("mean", "std"):  # timm saves one figure for one input channel
        assert tuple(again.pretrained_cfg[key]) == source[key][: x.shape[1]]
    assert again.deconv_policy == model.deconv_policy


def test_a_new_classifier_is_saved_with_the_network() -> None:
    model, _ = converted("test_resnet")
    model.reset_classifier(3)
    x = images(size=32)
    trained(model, x)
    with tempfile.TemporaryDirectory() as folder:
        saved(model, folder)
        again = timm.create_model(f"local-dir:{folder}", pretrained=True).eval()
        other = timm.create_model(f"local-dir:{folder}", pretrained=True, num_classes=2).eval()
    torch.testing.assert_close(again(x), model(x), rtol=0, atol=0)
    assert other(x).shape == (4, 2)


def test_a_registered_name_keeps_it_when_fused() -> None:
    model = timm.create_model("resnet18_cifar_deconv", width=0.125)
    x = images(size=32)
    plain = fuse(trained(model, x))
    with tempfile.TemporaryDirectory() as folder:
        config = saved(plain, folder)
        again = timm.create_model(f"local-dir:{folder}", pretrained=True).eval()
        whitened = timm.create_model(f"local-dir:{folder}", pretrained=True, fused=False).eval()
    assert config["architecture"] == "resnet18_cifar_deconv" and config["model_args"]["fused"] is True
    assert type(again.conv1) is nn.Conv2d and type(whitened.conv1) is Deconv2d
    for each in (again, whitened):
        torch.testing.assert_close(each(x), plain(x), rtol=0, atol=0)
    with tempfile.TemporaryDirectory() as folder:
        saved(model, folder)
        folded = timm.create_model(f"local-dir:{folder}", pretrained=True, fused=True).eval()
    assert type(folded.conv1) is nn.Conv2d
    torch.testing.assert_close(folded(x), plain(x), rtol=0, atol=0)


def test_the_generic_name_makes_what_conversion_makes() -> None:
    torch.manual_seed(0)
    ours = timm.create_model("deconv", base="test_resnet", deconv={"block": 8}, num_classes=4)
    torch.manual_seed(0)
    model, _ = converted("test_resnet", {"block": 8}, num_classes=4)
    x = images(size=32)
    torch.testing.assert_close(trained(ours, x)(x), trained(model, x)(x), rtol=0, atol=0)
    features = timm.create_model("deconv", base="test_resnet", features_only=True, out_indices=(1, 2))
    assert [f.shape[1] for f in features(x)] == features.feature_info.channels()


@pytest.mark.parametrize(
    ("base", "message"),
    [
        (None, "base= is missing; name one of timm.list_models"),
        ("regnety_08", "no network to be the base, 'regnety_08'; nearest: .*regnety_008"),
        ("resnet18_cifar_deconv", "base='resnet18_cifar_deconv' is a deconvolution network already"),
        ("deconv", "is a deconvolution network already"),
    ],
)
def test_a_base_that_cannot_be_is_named(base: str | None, message: str) -> None:
    with pytest.raises(InputError, match=message):
        timm.create_model("deconv", base=base)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["repvgg_a0", "tf_mobilenetv3_small_minimal_100", "ghostnet_050"])
def test_networks_pass_every_check_of_the_table(name: str) -> None:
    from benchmarks.conversion import check_network

    assert check_network(name).outcome == "pass"
