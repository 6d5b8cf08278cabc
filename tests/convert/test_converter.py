"""Conversion: what is kept, what goes, and that the network is otherwise the one it was."""

import copy
import pickle
from typing import Any

import pytest
import timm
import torch
from timm.layers import BatchNormAct2d, convert_sync_batchnorm
from torch import Tensor, nn

from tests.convert.networks import Shared, Tiny, converted, images, trained
from timm_deconv import Deconv2d, DeconvLinear, convert_deconv_model, fuse, transfer
from timm_deconv.errors import InputError


def test_weights_are_the_same_objects_and_missing_biases_are_zero() -> None:
    model = Tiny()
    before = dict(model.named_parameters())
    convert_deconv_model(model)
    for name in ("stem", "depthwise", "grouped", "pointwise", "head"):
        assert model.get_submodule(name).weight is before[f"{name}.weight"]
    assert model.grouped.bias is before["grouped.bias"] and model.head.bias is before["head.bias"]
    assert not model.stem.bias.any() and not model.depthwise.bias.any()


def test_norms_leave_their_activation() -> None:
    model = Tiny()
    report = convert_deconv_model(model)
    assert [type(m) for m in (model.bn1, model.bn2, model.bn3)] == [nn.Identity, nn.ReLU, nn.Identity]
    assert report.norms == ["bn1", "bn2", "bn3"]
    assert not model.act1.inplace and not model.bn2.inplace


def test_norms_of_every_kind_go() -> None:
    norms = [nn.BatchNorm2d(3), convert_sync_batchnorm(BatchNormAct2d(3)), nn.SyncBatchNorm(3)]
    model = nn.Sequential(nn.Conv2d(3, 3, 1), *norms, BatchNormAct2d(3, drop_layer=nn.Dropout))
    convert_deconv_model(model)
    kinds = [type(module) for module in model]
    assert kinds == [Deconv2d, nn.Identity, nn.ReLU, nn.Identity, nn.Sequential]
    assert [type(module) for module in model[4]] == [nn.Dropout, nn.ReLU]


def test_norms_that_may_do_more_stay_and_are_named() -> None:
    class Special(nn.BatchNorm2d):
        def forward(self, x: Tensor) -> Tensor:
            return 2 * super().forward(x)

    model = nn.Sequential(nn.Conv2d(3, 3, 1), Special(3), nn.GroupNorm(1, 3))
    report = convert_deconv_model(model)
    assert sorted(report.norms_left) == [("1", "Special"), ("2", "GroupNorm")]
    assert "other norms, left as they are: 1 GroupNorm, 1 Special" in str(report)


def test_in_place_activations_do_not_reach_shared_tensors() -> None:
    model = Shared().double()
    convert_deconv_model(model)
    unshared = copy.deepcopy(model)
    unshared.norm = nn.Sequential(nn.Identity(), Clone())
    x = images().double()
    output, expected = model(x), unshared(x)
    torch.testing.assert_close(output, expected, rtol=0, atol=0)
    output.square().sum().backward()
    expected.square().sum().backward()
    for parameter, other in zip(model.parameters(), unshared.parameters(), strict=True):
        torch.testing.assert_close(parameter.grad, other.grad, rtol=0, atol=0)


class Clone(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x.clone()


def test_a_layer_used_twice_is_converted_and_fused_once_in_both_places() -> None:
    model = Shared()
    report = convert_deconv_model(model)
    assert [layer.name for layer in report.converted] == ["stem", "conv", "tied"]
    assert model.again is model.conv
    trained(model, images())
    assert int(model.conv.num_batches_tracked) == 2
    plain = fuse(model)
    assert plain.again is plain.conv and type(plain.conv) is nn.Conv2d
    x = images()
    torch.testing.assert_close(plain(x), model(x))


def test_tied_weights_stay_tied() -> None:
    model = Shared()
    convert_deconv_model(model)
    assert model.tied.weight is model.conv.weight
    assert model.tied.bias is not model.conv.bias


def test_frozen_parameters_stay_frozen_and_added_biases_follow() -> None:
    model = Tiny()
    model.stem.requires_grad_(False)
    convert_deconv_model(model)
    assert not model.stem.weight.requires_grad and not model.stem.bias.requires_grad
    assert model.depthwise.bias.requires_grad


@pytest.mark.parametrize("training", [True, False])
def test_the_mode_is_kept(training: bool) -> None:
    model = Tiny().train(training)
    convert_deconv_model(model)
    assert all(module.training is training for module in model.modules())


def test_everything_stays_on_its_device_and_in_its_dtype() -> None:
    with torch.device("meta"):
        model = timm.create_model("test_resnet")
    convert_deconv_model(model)
    assert all(tensor.is_meta for tensor in (*model.parameters(), *model.buffers()))
    double = Tiny().double()
    convert_deconv_model(double)
    assert double.stem.running_deconv.dtype == double.stem.bias.dtype == torch.float64


def test_copies_and_pickles_are_converted_networks() -> None:
    model, _ = converted("test_resnet", num_classes=5)
    x = images(size=32)
    trained(model, x)
    for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert type(other) is type(model) and other.deconv_policy == model.deconv_policy
        torch.testing.assert_close(other(x), model(x))
        other.reset_classifier(2)
        assert isinstance(other.get_classifier(), DeconvLinear)


def test_the_report_is_a_table() -> None:
    report = convert_deconv_model(
        Tiny(), {"preset": "paper", "patterns": {"head": None}, "roles": {"stem": {"n_iter": 9}}}
    )
    lines = str(report).splitlines()
    assert lines[0].split("  ")[0] == "layer" and set(lines[1]) <= {"-", " "}
    assert lines[2].split()[:6] == ["stem", "stem", "Deconv2d", "1", "x", "27"]
    assert lines[2].endswith("n_iter=9, start_corrected=True, min_rows=1.0")
    assert any(line.startswith("head") and "left plain by the policy" in line for line in lines)
    # Norms had 2 (8 + 8 + 16) parameters, stem and depthwise get 8 biases each.
    assert report.parameters_after == report.parameters_before - 64 + 16
    assert lines[-1].startswith("4 layers whitened, 1 left plain, 3 batch norms removed, ")
    assert lines[-1].endswith(f"{report.parameters_before:,} -> {report.parameters_after:,} parameters")


def test_roles_are_recognised() -> None:
    report = convert_deconv_model(Tiny())
    roles = {layer.name: layer.role for layer in report.converted}
    kinds = {"stem": "stem", "depthwise": "depthwise", "grouped": "grouped", "pointwise": "pointwise"}
    assert roles == {**kinds, "head": "classifier"}


def test_converted_networks_are_guarded_unless_the_policy_says_otherwise() -> None:
    for policy, rows in ((None, 1.0), ("paper", 1.0), ({"block": 4}, 1.0), ({"min_rows": 0.0}, 0.0)):
        model = Tiny()
        convert_deconv_model(model, policy)
        assert model.stem.cfg.min_rows == rows


def test_layers_with_fewer_rows_than_features_stay_of_ordinary_size() -> None:
    torch.manual_seed(1)
    squeeze = [nn.AdaptiveAvgPool2d(1), nn.Conv2d(64, 64, 1), nn.ReLU(), nn.Conv2d(64, 8, 1)]
    model = nn.Sequential(nn.Conv2d(3, 64, 3), *squeeze)
    convert_deconv_model(model)
    with torch.no_grad():
        output = model(images(batch=2))
    assert output.isfinite().all() and output.abs().max() < 10


@pytest.mark.parametrize(("kind", "layer"), [("linear", DeconvLinear), ("plain", nn.Linear)])
def test_reset_classifier_keeps_the_kind(kind: str, layer: type) -> None:
    model, _ = converted("test_resnet", {"classifier": kind}, num_classes=7)
    for classes in (7, 4):
        if classes != 7:
            model.reset_classifier(classes)
        assert type(model.get_classifier()) is layer
        assert model(images(size=32)).shape == (4, classes)
    model.reset_classifier(0)
    assert model(images(size=32)).shape == (4, model.num_features)


def test_fused_networks_get_plain_classifiers() -> None:
    plain = fuse(converted("test_resnet")[0])
    plain.reset_classifier(4)
    assert type(plain.get_classifier()) is nn.Linear


def test_fusing_leaves_the_network_training() -> None:
    model = Tiny()
    convert_deconv_model(model)
    plain = fuse(model)
    assert type(plain.stem) is nn.Conv2d and not plain.training
    assert type(model.stem) is Deconv2d and model.training


@pytest.mark.parametrize("function", [convert_deconv_model, transfer, fuse])
@pytest.mark.parametrize(
    ("value", "way_out"),
    [("resnet18", r"; timm\.create_model\('resnet18'\) makes a network"), (None, "$"), ([nn.ReLU()], "$")],
)
def test_what_is_no_network_is_named(function: Any, value: Any, way_out: str) -> None:
    with pytest.raises(InputError, match=rf"{function.__name__}\(.*\): it takes a network, an nn\.Module{way_out}"):
        function(value)


def test_fusing_a_network_without_whitening_layers_says_what_makes_them() -> None:
    model = Tiny()
    with pytest.raises(InputError, match=r"no whitening layer in Tiny, so nothing to fuse: .*convert_deconv_model"):
        fuse(model)
    convert_deconv_model(model)
    with pytest.raises(InputError, match="a fused network has none"):
        fuse(fuse(model))


@pytest.mark.parametrize("trained", [False, True])
def test_the_report_says_that_a_trained_network_is_another_function_now(trained: bool) -> None:
    network = nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 4, 3))
    if trained:
        network(torch.randn(4, 3, 8, 8))
    report = convert_deconv_model(network)
    assert report.trained is trained
    assert ("timm_deconv.transfer takes a trained network over" in str(report)) is trained
