"""Any timm network as the encoder of a network for dense prediction."""

import pytest
import timm
import torch

import timm_deconv
from timm_deconv.convert.module_types import batch_norms, is_whitened
from timm_deconv.errors import InputError
from timm_deconv.layers import Deconv2d
from timm_deconv.models.weights import save_network

IMAGES = torch.randn(2, 3, 64, 80)


@pytest.mark.parametrize("base", ["test_resnet", "test_efficientnet", "mobilenetv2_100", "resnet18"])
@pytest.mark.parametrize("deconv", [None, "paper"])
def test_it_names_a_class_for_every_pixel_and_is_loaded_as_it_was_saved(base, deconv, tmp_path):
    model = timm.create_model("segmenter", base=base, num_classes=5, deconv=deconv)
    assert bool(batch_norms(model)) == (deconv is None)
    assert any(isinstance(layer, Deconv2d) for layer in model.modules()) == (deconv is not None)
    with torch.no_grad():
        model.train()(IMAGES)
        expected = model.eval()(IMAGES)
        assert expected.shape == (2, 5, 64, 80)
        save_network(model, tmp_path)
        again = timm.create_model(f"local-dir:{tmp_path}", pretrained=True)
        assert torch.equal(again.eval()(IMAGES), expected)
    saved = again._model_args.get("deconv")
    assert saved is None if deconv is None else saved["preset"] == "paper" and "version" in saved


def test_roles_are_those_of_the_whole_network_and_none_is_missed():
    deconv = {"preset": "fast", "block": 16, "roles": {"depthwise": {"block": 8}, "classifier": {"block": 128}}}
    model = timm.create_model("segmenter", base="mobilenetv2_100", num_classes=5, deconv=deconv)
    assert model.get_classifier().cfg.block == 128
    blocks = {layer.cfg.block for name, layer in model.encoder.named_modules() if name.endswith("conv_dw")}
    assert blocks == {8} and model._model_args["deconv"]["roles"].keys() == {"depthwise", "classifier"}


def test_what_cannot_be_a_segmenter_is_named():
    with pytest.raises(InputError, match="no base of segmenter 'resnet19'; nearest: resnet1"):
        timm.create_model("segmenter", base="resnet19")
    with pytest.raises(InputError, match="test_vit is no encoder: it cannot be dilated to an output stride of 16"):
        timm.create_model("segmenter", base="test_vit")
    with pytest.raises(InputError, match="no maps of features: create its base with features_only=True"):
        timm.create_model("segmenter", base="test_resnet", features_only=True)


def test_its_name_alone_means_its_default_weights() -> None:
    model, tagged = (timm.create_model(name, pretrained=True) for name in ("segmenter", "segmenter.nd_camvid"))
    assert model.pretrained_cfg == tagged.pretrained_cfg and model.pretrained_cfg["tag"] == "nd_camvid"
    assert all(torch.equal(value, tagged.state_dict()[key]) for key, value in model.state_dict().items())


@torch.no_grad()
def test_either_form_of_weights_goes_into_either_form_and_into_other_classes_and_channels(tmp_path):
    model = timm.create_model("segmenter", base="test_efficientnet", deconv={"block": 16}, num_classes=5)
    x = torch.randn(2, 3, 64, 64)
    model.train()(x)
    save_network(model.eval(), tmp_path / "own")
    save_network(timm_deconv.fuse(model), tmp_path / "folded")
    deep = model.encoder(x)[-1]
    for form in ("own", "folded"):
        place = f"local-dir:{tmp_path / form}"
        for fused in (False, True):
            found = timm.create_model(place, pretrained=True, fused=fused).eval()
            assert is_whitened(found) is not fused
            torch.testing.assert_close(found(x), model(x), rtol=1e-3, atol=1e-4)
        other = timm.create_model(place, pretrained=True, num_classes=3).eval()
        torch.testing.assert_close(other.encoder(x)[-1], deep, rtol=1e-3, atol=1e-4)
        assert other(x).shape == (2, 3, 64, 64)
        grey = timm.create_model(place, pretrained=True, in_chans=1).eval()
        expected = model(x[:, :1].expand(-1, 3, -1, -1))
        torch.testing.assert_close(grey(x[:, :1]), expected, rtol=1e-3, atol=1e-4)
