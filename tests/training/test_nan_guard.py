"""The first layer that saw NaN or infinity is named, before anything is saved."""

import pytest
import timm
import torch
from torch import nn

from timm_deconv.errors import NonFiniteError
from timm_deconv.training.checkpoint import read_curve
from timm_deconv.training.loop import train
from timm_deconv.training.nan_guard import NanGuard, first_nonfinite, first_nonfinite_value
from timm_deconv.training.processes import Processes


def _two_layers() -> nn.Sequential:
    return nn.Sequential(nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 4))


def test_the_first_whitening_layer_with_nonfinite_statistics_is_named():
    model = timm.create_model("vgg11_cifar_deconv", width=0.125)
    layers = [name for name, layer in model.named_modules() if hasattr(layer, "saw_nonfinite")]
    with torch.no_grad():
        model.get_submodule(layers[2]).weight[0, 0, 0, 0] = torch.nan
    loss = model(torch.randn(8, 3, 32, 32)).sum()
    with pytest.raises(NonFiniteError, match=rf"at epoch 3, update 7, first seen by {layers[3]} \(Deconv2d"):
        NanGuard(model, Processes()).step(loss, lambda: None, "epoch 3, update 7")


def test_without_whitening_layers_the_batch_is_repeated():
    model = _two_layers()
    with torch.no_grad():
        model[2].bias[1] = torch.inf
    images = torch.randn(2, 4)
    with pytest.raises(NonFiniteError, match=r"first seen by 2 \(Linear, its output\)"):
        NanGuard(model, Processes()).step(model(images).sum(), lambda: model(images), "epoch 1, update 1")
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())


@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # of torch's own modules, raised while it compiles
def test_a_layer_in_a_compiled_block_is_named_without_compiling_anew():
    model = nn.Sequential(_two_layers(), _two_layers())
    model[1].compile(backend="eager")
    images = torch.randn(2, 4)
    model(images)
    with torch.no_grad():
        model[1][2].bias[1] = torch.inf
    compiled = torch._dynamo.utils.counters["stats"]["unique_graphs"]
    assert first_nonfinite(model, lambda: model(images)) == "1.2 (Linear, its output)"
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == compiled > 0


def test_a_nonfinite_image_is_seen_at_the_first_layers_input():
    model = _two_layers()
    assert first_nonfinite(model, lambda: model(torch.full((1, 4), torch.nan))) == "0 (Linear, its input)"


def test_a_weight_spoilt_by_the_last_update_is_named():
    model = _two_layers()
    NanGuard(model, Processes()).finish()
    with torch.no_grad():
        model[0].weight[0] = torch.nan
    with pytest.raises(NonFiniteError, match=r"^0.weight is non-finite"):
        NanGuard(model, Processes()).finish()


def test_a_run_that_diverges_stops_and_keeps_its_last_good_checkpoint(recipe, tmp_path, monkeypatch):
    recipe = recipe.merged({"epochs": 2})
    monkeypatch.setattr("timm_deconv.training.loop.average_buffers", _spoil_the_next_epoch)
    with pytest.raises(
        NonFiniteError, match=r"non-finite loss at epoch 2, update 12, first seen by conv1\.0 \(Conv2d, its output"
    ):
        train(recipe, tmp_path)
    assert len(read_curve(tmp_path)) == 1
    assert first_nonfinite_value(timm.create_model(f"local-dir:{tmp_path}", pretrained=True).state_dict()) is None
    assert not (tmp_path / "results.csv").exists()


def _spoil_the_next_epoch(accelerator, model):
    weight = next(model.parameters())

    def spoil(module, inputs):
        if module.training:
            weight.data.fill_(torch.inf)

    model.register_forward_pre_hook(spoil)
