"""Segmentation: measures over all images, encoders of both forms, the auxiliary head, and runs from end to end."""

import runpy
import sys
from pathlib import Path

import numpy as np
import pytest
import timm
import torch
import torch.nn.functional as F
from PIL import Image
from safetensors.torch import save_file
from torch import nn
from torchmetrics.classification import MulticlassAccuracy, MulticlassJaccardIndex

from benchmarks.study import variant
from tests.pictures import write_camvid, write_cityscapes
from timm_deconv.convert.module_types import batch_norms
from timm_deconv.data import IGNORED
from timm_deconv.errors import InputError
from timm_deconv.layers import Deconv2d
from timm_deconv.models.segmenter import Segmenter
from timm_deconv.training import load_recipe
from timm_deconv.training.loop import train
from timm_deconv.training.optimisation import create_optimizer, create_scheduler
from timm_deconv.training.tasks import create_task
from timm_deconv.training.tasks.base import NOT_COUNTED

CPU = torch.device("cpu")
SCRIPTS = Path(__file__).parents[2] / "scripts"
CLASSES = 11


@pytest.fixture(scope="module")
def camvid(data_dir, tmp_path_factory):
    return write_camvid(data_dir, tmp_path_factory.mktemp("camvid"), train=12, val=5)


@pytest.fixture
def recipe(camvid):
    """Half a second of training of a tiny encoder."""
    size = ["input_size=[3,64,80]", "crop_pct=0.8", "batch_size=4", "epochs=1", "workers=0"]
    network = ["model=test_resnet", "model_kwargs={}"]
    return load_recipe("camvid", [*network, *size, f"data_dir={camvid}"])


class Fixed(nn.Module):
    """Answers what it is given."""

    def __init__(self, *outputs):
        super().__init__()
        self.outputs = outputs

    def forward(self, images):
        return self.outputs if len(self.outputs) > 1 else self.outputs[0]


def answers(images=6):
    """Logits and masks of the size of tiny images, a fifth of the pixels ignored."""
    logits = torch.randn(images, CLASSES, 6, 7)
    masks = torch.randint(CLASSES, (images, 6, 7), dtype=torch.uint8)
    masks[torch.rand(masks.shape) < 0.2] = IGNORED
    masks[0] = IGNORED
    return torch.zeros(images, 3, 6, 7, dtype=torch.uint8), logits, masks


def test_measures_are_torchmetrics_of_all_images_at_once(recipe):
    images, logits, masks = answers()
    task = create_task(recipe, CPU)
    parts = [slice(0, 2), slice(2, 6)]
    rows = torch.cat([task.evaluate(Fixed(logits[part]), (images[part], masks[part])) for part in parts])
    assert rows[0, 0] == NOT_COUNTED and not rows[0, 1:].any(), "an image without labels does not count"
    summary = task.summarise(rows[1:].sum(0).double(), 5)
    for name, metric in (
        ("miou", MulticlassJaccardIndex(CLASSES, ignore_index=IGNORED)),
        ("accuracy", MulticlassAccuracy(CLASSES, average="micro", ignore_index=IGNORED)),
    ):
        assert summary[name] == pytest.approx(100 * metric(logits.argmax(1), masks.long()).item(), rel=1e-5)
    losses = [F.cross_entropy(logits[i : i + 1], masks[i : i + 1].long(), ignore_index=IGNORED) for i in range(1, 6)]
    assert summary["loss"] == pytest.approx(sum(losses).item() / 5, rel=1e-5)
    assert summary["iou_Road"] > 0 and len(summary) == 3 + CLASSES


def test_the_training_loss_is_that_of_labelled_pixels_with_the_auxiliary_heads(recipe):
    images, logits, masks = answers()
    other = torch.randn_like(logits)
    task = create_task(recipe.merged({"aux_weight": 0.4}), CPU)
    loss, figures = task.loss(Fixed(logits, other), (images, masks))
    terms = [F.cross_entropy(each, masks.long(), ignore_index=IGNORED) for each in (logits, other)]
    torch.testing.assert_close(loss, terms[0] + 0.4 * terms[1])
    assert figures.shape == (6, 1 + CLASSES**2) and figures[:, 1:].sum() == (masks != IGNORED).sum()
    loss, _ = task.loss(Fixed(logits), (images, torch.full_like(masks, IGNORED)))
    assert loss == 0, "a batch without labels"


def test_processes_with_other_numbers_of_labelled_pixels_learn_from_their_joint_mean(recipe, monkeypatch):
    images, logits, masks = answers()
    logits.requires_grad_()
    task, halves = create_task(recipe, CPU), [slice(0, 3), slice(3, 6)]
    (whole,) = torch.autograd.grad(task.loss(Fixed(logits), (images, masks))[0], logits)
    labelled = (masks != IGNORED).sum()
    monkeypatch.setattr("torch.distributed.is_initialized", lambda: True)
    monkeypatch.setattr("torch.distributed.get_world_size", lambda: 2)
    monkeypatch.setattr("torch.distributed.all_reduce", lambda count: count.fill_(labelled))
    losses = [task.loss(Fixed(logits[part]), (images[part], masks[part]))[0] for part in halves]
    torch.testing.assert_close(torch.autograd.grad(sum(losses) / 2, logits)[0], whole)


def test_poly_falls_by_its_power_and_auxiliary_heads_learn_ten_times_as_fast(recipe):
    recipe = recipe.merged({"model": "deeplabv3_resnet50", "model_kwargs": {"aux_head": True}, "lr": 0.1})
    with torch.device("meta"):
        model = create_task(recipe, CPU).create_model()
    optimizer = create_optimizer(model, recipe)
    scheduler = create_scheduler(optimizer, recipe, 10)
    fast = {parameter for group in optimizer.param_groups if group["lr"] == 1.0 for parameter in group["params"]}
    assert fast == {parameter for name, parameter in model.named_parameters() if name.startswith("aux_")}
    scheduler.step_update(4)
    assert optimizer.param_groups[0]["lr"] == pytest.approx(0.1 * 0.6**0.9)
    assert {group["weight_decay"] for group in optimizer.param_groups} == {recipe.weight_decay}


def test_encoders_of_both_forms_start_as_the_same_function(camvid, tmp_path):
    save_file(timm.create_model("mobilenetv2_100", num_classes=0).state_dict(), tmp_path / "start.safetensors")
    start = [f"pretrained_path={tmp_path / 'start.safetensors'}", "pretrained=false", "calibration_images=12"]
    small = ["input_size=[3,64,80]", "batch_size=4", "workers=0", f"data_dir={camvid}"]
    maps = {}
    for text in ("twin", "fast", "fast calibration_images=0"):
        chosen = variant(text, "mobilenetv2_100", load_recipe("finetune_segmentation", [*start, *small]))
        torch.manual_seed(0)
        task = chosen.task(chosen.recipe, CPU)
        model = task.create_model()
        task.calibrate(model)
        images, _ = next(iter(task.create_loaders()[1]))
        model.eval()
        with torch.no_grad():
            maps[text] = model.encoder(task.normalise(images))[-1]
        assert bool(batch_norms(model)) == (text == "twin")
        assert any(isinstance(layer, Deconv2d) for layer in model.modules()) == (text != "twin")
        assert not any(parameter.any() for parameter in model.get_classifier().parameters())
    for text in ("fast", "fast calibration_images=0"):
        assert (maps[text] - maps["twin"]).abs().max() < 1e-3 * maps["twin"].abs().max()


@pytest.mark.parametrize("deconv", [None, {"preset": "fast", "block": 32}])
def test_a_run_learns_and_timm_and_validate_read_what_it_saved(recipe, tmp_path, monkeypatch, capsys, deconv):
    kwargs = {} if deconv is None else {"deconv": deconv}
    row = train(recipe.merged({"model_kwargs": kwargs, "epochs": 2}), tmp_path / "run", cpu=True)
    assert 1 < row["miou"] <= 100 and row["train_loss"] < np.log(CLASSES), "better than equal scores"
    model = timm.create_model(f"local-dir:{tmp_path / 'run'}", pretrained=True)
    assert isinstance(model, Segmenter) and bool(batch_norms(model)) == (deconv is None)
    monkeypatch.setattr(sys, "argv", ["validate.py", str(tmp_path / "run"), "--cpu", "--draw", str(tmp_path / "drawn")])
    runpy.run_path(str(SCRIPTS / "validate.py"), run_name="__main__")
    said = capsys.readouterr().out
    assert f"mean IoU {row['miou']:.3f} %" in said and "5 images," in said
    drawn = sorted((tmp_path / "drawn").iterdir())
    assert [file.name for file in drawn] == [f"{index:04d}.png" for index in range(5)]
    with Image.open(drawn[0]) as picture:
        assert picture.size == (106, 80)


def test_cityscapes_is_trained_and_read_from_end_to_end(camvid, tmp_path):
    root = write_cityscapes(camvid, tmp_path / "cityscapes")
    small = ["input_size=[3,64,64]", "batch_size=4", "epochs=1", "workers=0", "model_kwargs.deconv.block=32"]
    recipe = load_recipe("cityscapes_e30", ["model=test_resnet", "model_kwargs={}", *small, f"data_dir={root}"])
    row = train(recipe, tmp_path / "run", cpu=True)
    assert 0 < row["miou"] <= 100 and row["dataset"] == "cityscapes"
    assert timm.create_model(f"local-dir:{tmp_path / 'run'}", pretrained=True).num_classes == 19


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"augmentation": "pad_crop"}, "augmentation='pad_crop' is for classes; scale_crop and none are for masks"),
        ({"num_classes": 12}, "num_classes=12, but masks of camvid tell 11 classes apart"),
        ({"model_kwargs": {"width": 2}}, r"no argument \(model_kwargs\) of an encoder 'width'; there are: deconv"),
        ({"freeze_backbone": True}, "freeze_backbone would leave the head of a segmenter untrained"),
        ({"model": "test_vit"}, "test_vit is no encoder: it cannot be dilated to an output stride of 16"),
        ({"model": "test_resnot"}, "no model 'test_resnot'; nearest: .*test_resnet"),
    ],
)
def test_what_segmentation_cannot_do_is_refused_before_anything_is_written(recipe, tmp_path, settings, message):
    with pytest.raises(InputError, match=message):
        train(recipe.merged(settings), tmp_path / "run", cpu=True)
    assert not (tmp_path / "run").exists()
    with pytest.raises(InputError, match="augmentation='scale_crop' is for masks"):
        create_task(load_recipe("digits", ["augmentation=scale_crop"]), CPU)
