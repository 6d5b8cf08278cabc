"""A non-finite loss stops the run, is left out, or takes it back: counted, limited, and nothing of it stays."""

import pytest
import safetensors.torch
import timm
import torch

from timm_deconv.errors import NonFiniteError
from timm_deconv.training.checkpoint import read_curve
from timm_deconv.training.loop import train
from timm_deconv.training.tasks import Classification


@pytest.fixture
def recipe(short_recipe):
    """One epoch of eight updates of a network with batch norm."""
    return short_recipe.merged({"batch_size": 64, "workers": 0})


def _spoilt(*passes, how="images", watch=lambda count, model: None):
    """Make a task whose images, or gradient alone, are non-finite in some passes; `watch` is called before each."""

    class Spoilt(Classification):
        count = 0

        def loss(self, model, batch):
            if torch.is_grad_enabled():  # not where a pass is repeated to find the layer
                Spoilt.count += 1
                watch(Spoilt.count, model)
            bad = Spoilt.count in passes
            loss, figures = super().loss(_Infinite(model) if bad and how == "images" else model, batch)
            return loss + _PoisonGradient.apply(loss) if bad and how == "gradient" else loss, figures

    return Spoilt


class _Infinite(torch.nn.Module):
    def __init__(self, model):
        super().__init__()
        self.model = model
        self.train(model.training)

    def forward(self, images):
        return self.model(images * torch.inf)


class _PoisonGradient(torch.autograd.Function):
    @staticmethod
    def forward(ctx, loss):
        return torch.zeros_like(loss)

    @staticmethod
    def backward(ctx, gradient):
        return gradient * torch.nan


def _weights(folder):
    return safetensors.torch.load_file(folder / "model.safetensors")


def test_by_default_the_run_stops_and_names_the_layer(recipe, tmp_path):
    with pytest.raises(NonFiniteError, match=r"non-finite loss at epoch 1, update 3, first seen by conv1\.0 \(Conv2d"):
        train(recipe, tmp_path, task=_spoilt(3))


@pytest.mark.parametrize("how", ["images", "gradient"])
@pytest.mark.parametrize("network", ["test_resnet", "vgg11_cifar_deconv"])
def test_an_update_left_out_leaves_no_trace(recipe, tmp_path, capsys, how, network):
    recipe = recipe.merged({"nonfinite": "skip", "model": network})
    if network != "test_resnet":
        recipe = recipe.merged({"model_kwargs": {"width": 0.125}})
    train(recipe, tmp_path / "skipped", task=_spoilt(8, how=how))
    seen = {}
    train(recipe, tmp_path / "whole", task=_spoilt(watch=lambda count, model: seen.update({count: _copy(model)})))
    skipped = _weights(tmp_path / "skipped")
    assert all(torch.equal(skipped[name], value) for name, value in seen[8].items())
    said = capsys.readouterr().err
    kind = "loss at" if how == "images" else "gradient of"
    assert f"non-finite {kind}" in said and "update 8 is left out (1 of 10)" in said
    assert float(read_curve(tmp_path / "skipped")[0]["train_loss"]) > 0


def test_a_spoilt_pass_leaves_out_the_whole_accumulated_update(recipe, tmp_path, capsys):
    recipe = recipe.merged({"nonfinite": "skip", "grad_accum_steps": 4})
    for passes in ((5,), (8,)):
        train(recipe, tmp_path / str(passes), task=_spoilt(*passes))
        assert "update 2 is left out (1 of 10)" in capsys.readouterr().err
    first, second = (_weights(tmp_path / name) for name in ("(5,)", "(8,)"))
    assert all(torch.equal(first[name], second[name]) for name in first)


def test_so_many_may_be_left_out_and_one_more_stops_the_run(recipe, tmp_path):
    recipe = recipe.merged({"nonfinite": "skip", "nonfinite_limit": 2})
    train(recipe, tmp_path / "two", task=_spoilt(2, 4))
    with pytest.raises(NonFiniteError, match=r"update 6.*; 2 updates were left out before, which is nonfinite_limit=2"):
        train(recipe, tmp_path / "three", task=_spoilt(2, 4, 6))


def test_a_rewound_run_has_the_weights_of_its_last_state_and_goes_on_with_the_images_that_follow(
    recipe, tmp_path, capsys
):
    recipe = recipe.merged({"nonfinite": "rewind", "checkpoint_every": 3})
    seen = {}
    train(recipe, tmp_path, task=_spoilt(5, watch=lambda count, model: seen.update({count: _copy(model)})))
    said = capsys.readouterr().err
    assert "update 5 is left out; weights and optimiser are again those of epoch-0000-image-00000192 (1 of 10)" in said
    assert all(torch.equal(seen[6][name], value) for name, value in seen[4].items())
    assert not all(torch.equal(seen[5][name], value) for name, value in seen[4].items())
    assert len(seen) == 8


def _copy(model):
    return {name: value.clone() for name, value in model.state_dict().items()}


def test_a_run_may_be_rewound_to_its_beginning(recipe, tmp_path, capsys):
    train(recipe.merged({"nonfinite": "rewind"}), tmp_path, task=_spoilt(2))
    assert "again those of epoch-0000-image-00000000 (1 of 10)" in capsys.readouterr().err
    assert timm.create_model(f"local-dir:{tmp_path}", pretrained=True)


def test_a_run_resumed_after_an_update_was_left_out_ends_as_the_other(recipe, tmp_path):
    recipe = recipe.merged({"nonfinite": "rewind", "checkpoint_every": 2})
    train(recipe, tmp_path / "whole", task=_spoilt(4))

    def crash(count, model):
        if count == 7:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        train(recipe, tmp_path / "run", task=_spoilt(4, watch=crash))
    train(recipe, tmp_path / "run", resume=True)
    first, second = _weights(tmp_path / "run"), _weights(tmp_path / "whole")
    assert all(torch.equal(first[name], second[name]) for name in first)
