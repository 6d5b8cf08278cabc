"""Recipes that start from weights: the network, its classifier, calibration and frozen norms, before the first step."""

from contextlib import nullcontext
from pathlib import Path

import pytest
import timm
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from timm_deconv.errors import InputError
from timm_deconv.training import Recipe, load_recipe
from timm_deconv.training.loop import train
from timm_deconv.training.network import create_model
from timm_deconv.training.tasks import Classification


@pytest.fixture
def weights(tmp_path: Path) -> Path:
    """Of a batch-norm network for ten classes that has seen some images."""
    torch.manual_seed(1)
    model = timm.create_model("resnet18_cifar", width=0.25)
    for _ in range(3):
        model(torch.randn(16, 3, 32, 32).cumsum(-1) / 4)
    save_file(model.state_dict(), tmp_path / "start.safetensors")
    return tmp_path / "start.safetensors"


def recipe_from(weights: Path | None, form: str = "_deconv", **settings: object) -> Recipe:
    arguments = {"width": 0.25}
    start = {} if weights is None else {"pretrained_path": str(weights)}
    chosen = {"model": f"resnet18_cifar{form}", "model_kwargs": arguments, "batch_size": 64, "epochs": 1}
    return load_recipe("digits").merged(chosen | start | settings)


def task(recipe: Recipe) -> Classification:
    return Classification(recipe, torch.device("cpu"))


def images() -> Tensor:
    return torch.randn(4, 3, 32, 32)


def test_both_forms_start_as_the_same_function_calibrated_or_not(weights: Path) -> None:
    twin = create_model(recipe_from(weights, "")).eval()
    x = images()
    with torch.no_grad():
        expected = twin(x)
        for count in (0, 300):
            recipe = recipe_from(weights, calibration_images=count)
            model = task(recipe).create_model()
            task(recipe).calibrate(model)
            assert (model.eval()(x) - expected).abs().max() < 1e-3 * expected.abs().max()
            whitener = model.layer1[0].conv1.running_deconv
            assert torch.equal(whitener, torch.eye(len(whitener))) == (count == 0)


def test_a_classifier_of_another_size_starts_anew_and_with_scale_0_says_nothing(weights: Path) -> None:
    recipe = recipe_from(weights, num_classes=7, head_init_scale=0.0)
    model, twin = create_model(recipe).eval(), create_model(recipe_from(weights, "")).eval()
    x = images()
    with torch.no_grad():
        assert torch.equal(model(x), torch.zeros(4, 7))
        assert (model.forward_features(x) - twin.forward_features(x)).abs().max() < 1e-4


@pytest.mark.parametrize("classes", [10, 7])
@pytest.mark.parametrize("name", ["mobilenetv2_050", "mobilenetv2_050_deconv"])
def test_a_file_for_ten_classes_is_read_though_the_network_usually_has_a_thousand(
    tmp_path: Path, name: str, classes: int
) -> None:
    source = timm.create_model("mobilenetv2_050", num_classes=10).eval()
    save_file(source.state_dict(), tmp_path / "ten.safetensors")
    settings = {"model": name, "model_kwargs": {}, "num_classes": classes}
    model = create_model(recipe_from(tmp_path / "ten.safetensors", **settings)).eval()
    x = torch.randn(2, 3, 32, 32)
    with torch.no_grad():
        wanted, found = source.forward_features(x), model.forward_features(x)
        assert (found - wanted).abs().max() < 1e-4 * wanted.abs().max()
        if classes == 10:
            assert (model(x) - source(x)).abs().max() < 1e-4 * source(x).abs().max()


@pytest.mark.parametrize("classes", [1000, 7])
@pytest.mark.parametrize("name", ["mobilenetv2_050", "mobilenetv2_050_deconv"])
def test_both_forms_take_a_file_of_other_names_by_its_order_and_refuse_another_order(
    tmp_path: Path, name: str, classes: int
) -> None:
    source = timm.create_model("mobilenetv2_050").eval()
    foreign = {f"net._{key}": value for key, value in source.state_dict().items()}
    torch.save(foreign, tmp_path / "foreign.pth")
    torch.save(dict(reversed(foreign.items())), tmp_path / "reversed.pth")
    settings = {"model": name, "model_kwargs": {}, "num_classes": classes}
    model = create_model(recipe_from(tmp_path / "foreign.pth", **settings)).eval()
    x = torch.randn(2, 3, 32, 32)
    with torch.no_grad():
        wanted, found = source.forward_features(x), model.forward_features(x)
        assert (found - wanted).abs().max() < 1e-4 * wanted.abs().max()
        if classes == 1000:
            assert (model(x) - source(x)).abs().max() < 1e-4 * source(x).abs().max()
    assert not any(isinstance(value, dict) for value in model.pretrained_cfg.values())
    with pytest.raises(InputError, match=r"not fit mobilenetv2_050: no name is known, and by order") as error:
        create_model(recipe_from(tmp_path / "reversed.pth", **settings))
    assert "\n" not in str(error.value)


def test_a_file_that_lacks_tensors_is_refused(tmp_path: Path) -> None:
    source = timm.create_model("mobilenetv2_050", num_classes=10)
    part = dict(list(source.state_dict().items())[:-40])
    torch.save(part, tmp_path / "part.pth")
    recipe = recipe_from(tmp_path / "part.pth", model="mobilenetv2_050", model_kwargs={}, num_classes=7)
    with pytest.raises(InputError, match=r"part.pth' lacks \d+ tensors of mobilenetv2_050"):
        create_model(recipe)


def test_frozen_batch_norms_do_not_move(weights: Path) -> None:
    model = create_model(recipe_from(weights, "", freeze_bn=True)).train()
    before = {name: value.clone() for name, value in model.named_buffers()}
    model(images()).sum().backward()
    assert all(torch.equal(value, before[name]) for name, value in model.named_buffers())
    assert not any(isinstance(module, nn.BatchNorm2d) for module in model.modules())


@pytest.mark.parametrize("form", ["", "_deconv"])
def test_with_a_frozen_backbone_the_classifier_alone_learns(weights: Path, tmp_path: Path, form: str) -> None:
    settings = {"train_images": 256, "val_images": 64, "freeze_backbone": True}
    recipe = recipe_from(weights, form, **settings)
    warning = "transferred from batch norm, start training from another function"
    uncalibrated = pytest.warns(UserWarning, match=warning) if form else nullcontext()
    with uncalibrated:
        train(recipe, tmp_path / "run", cpu=True)
    before, after = create_model(recipe).state_dict(), load_file(tmp_path / "run" / "model.safetensors")
    changed = {name.rpartition(".")[0] for name, value in after.items() if not torch.equal(value, before[name])}
    assert changed == {"fc"}


def test_a_run_is_calibrated_before_its_first_step_and_resumes_alike(weights: Path, tmp_path: Path) -> None:
    settings = {"calibration_images": 128, "train_images": 128, "val_images": 10, "layer_rates": True, "epochs": 2}
    recipe = recipe_from(weights, **settings, model_ema=True)
    whole = train(recipe, tmp_path / "whole", cpu=True)

    class Stop(Exception):
        pass

    class Stopping(Classification):
        evaluations = 0

        def evaluate(self, model: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
            Stopping.evaluations += 1
            if Stopping.evaluations > 1:
                raise Stop
            return super().evaluate(model, batch)

    with pytest.raises(Stop):
        train(recipe, tmp_path / "halves", cpu=True, task=Stopping)
    resumed = train(recipe, tmp_path / "halves", cpu=True, resume=True)
    assert (resumed["top1"], resumed["train_loss"]) == (whole["top1"], whole["train_loss"])


def test_the_same_images_are_chosen_every_time(weights: Path) -> None:
    recipe = recipe_from(weights, train_images=64, val_images=5)
    loaders = [task(recipe).create_loaders() for _ in range(2)]
    first, second = (next(iter(val))[0] for _, val in loaders)
    assert len(first) == 5 and torch.equal(first, second)
    assert len(loaders[0][0].dataset) == 64
    with pytest.raises(InputError, match="100000 images asked for, but there are only"):
        task(recipe_from(weights, train_images=100000)).create_loaders()


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"pretrained_path": "none.pth"}, "no checkpoint none.pth"),
        ({"layer_rates": True, "opt": "adamw"}, "layer_rates is for momentum and sgd: opt='adamw' sizes"),
        ({"calibration_images": 10}, "calibration_images are for weights to start from"),
    ],
)
def test_starts_that_make_no_sense_are_refused(settings: dict[str, object], message: str) -> None:
    with pytest.raises(InputError, match=message):
        create_model(recipe_from(None, **settings))
