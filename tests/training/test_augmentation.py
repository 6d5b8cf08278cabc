"""Keys of modern recipes: mixing of images, RandAugment, sizes that grow; and images that do not count."""

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from timm.data import Mixup
from torch import nn

from timm_deconv.data import Digits, create_transform
from timm_deconv.errors import InputError
from timm_deconv.training import load_recipe
from timm_deconv.training.evaluation import evaluate
from timm_deconv.training.loop import create_accelerator, train
from timm_deconv.training.tasks import create_task

CPU = torch.device("cpu")


class Sees(nn.Module):
    """Keeps what it is given and answers by its mean over each channel and half."""

    def forward(self, images):
        self.images = images.clone()
        half = images[..., : images.shape[3] // 2]
        return torch.cat([images.mean((2, 3)), half.mean((2, 3))], 1) @ torch.ones(6, 10).cumsum(1)


@pytest.fixture
def batch():
    return torch.randint(0, 256, (8, 3, 32, 32), dtype=torch.uint8), torch.arange(8)


@pytest.mark.parametrize("alphas", [(0.4, 0.0), (0.0, 1.0), (0.4, 1.0)])
def test_images_and_classes_are_mixed_as_timm_does_and_never_in_evaluation(batch, alphas):
    images, target = batch
    recipe = load_recipe("digits", [f"mixup={alphas[0]}", f"cutmix={alphas[1]}", "smoothing=0.1"])
    task, model = create_task(recipe, CPU), Sees()
    for seed in range(3):
        np.random.seed(seed)
        loss, figures = task.loss(model, (images, target))
        np.random.seed(seed)
        mixed, shares = Mixup(*alphas, label_smoothing=0.1, num_classes=10)(task.normalise(images), target)
        assert torch.equal(model.images, mixed)
        torch.testing.assert_close(loss, F.cross_entropy(model(mixed), shares))
    assert figures.shape == (8, 3)
    task.evaluate(model, batch)
    assert torch.equal(model.images, task.normalise(images))
    with pytest.raises(InputError, match="3 images a process: mixup and cutmix pair them"):
        task.loss(model, (images[:3], target[:3]))


def test_without_mixing_the_loss_is_what_it_was(batch):
    task, model = create_task(load_recipe("digits", ["smoothing=0.1"]), CPU), Sees()
    loss, _ = task.loss(model, batch)
    torch.testing.assert_close(loss, F.cross_entropy(model(task.normalise(batch[0])), batch[1], label_smoothing=0.1))


def test_training_images_grow_by_equal_parts_of_the_epochs_and_evaluation_is_at_full_size(batch):
    task, model = create_task(load_recipe("digits", ["progressive_sizes=[16,24,32]", "epochs=7"]), CPU), Sees()
    seen = []
    for epoch in range(7):
        task.begin_epoch(epoch)
        task.loss(model, batch)
        seen.append(model.images.shape[2])
    assert seen == [16, 16, 16, 24, 24, 32, 32]
    task.begin_epoch(0)
    task.loss(model, batch)
    expected = F.interpolate(task.normalise(batch[0]), (16, 16), mode="bilinear", antialias=True)
    assert torch.equal(model.images, expected)
    task.evaluate(model, batch)
    assert model.images.shape[2] == 32


def test_a_run_tells_its_task_which_epoch_it_is(short_recipe, tmp_path, monkeypatch):
    told = []
    monkeypatch.setattr("timm_deconv.training.tasks.base.RecipeTask.begin_epoch", lambda _, epoch: told.append(epoch))
    train(short_recipe.merged({"epochs": 2}), tmp_path, cpu=True)
    assert told == [0, 1]


@pytest.mark.parametrize("augmentation", ["pad_crop", "rrc"])
def test_rand_augment_changes_images_and_nothing_else_does(augmentation):
    image, _ = Digits(train=True)[3]
    settings = {"augmentation": augmentation, "crop_padding": 0, "scale": (1.0, 1.0), "hflip": 0.0}
    plain, augmented = (create_transform((3, 32, 32), aa=aa, **settings) for aa in (None, "rand-m9-mstd0.5-inc1"))
    assert len({plain(image).numpy().tobytes() for _ in range(5)}) == 1 or augmentation == "rrc"
    assert len({augmented(image).numpy().tobytes() for _ in range(20)}) > 10
    with pytest.raises(InputError, match=r"aa='rand-q5' is none of timm's RandAugment"):
        create_transform((3, 32, 32), augmentation=augmentation, aa="rand-q5")
    grey = create_transform((1, 32, 32), aa="rand-m9-mstd0.5", **settings)
    assert all(grey(image).shape == (1, 32, 32) for _ in range(20))


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (["aa=original"], r"aa='original': it is RandAugment \('rand-m9-mstd0.5-inc1'\) with pad_crop or rrc"),
        (["aa=rand-m9", "augmentation=none"], r"aa='rand-m9': it is RandAugment"),
        (["mixup=0.2", "batch_size=5"], r"batch_size=5: mixup and cutmix pair the images of a batch; make it even"),
        (["cutmix=-1"], r"cutmix=-1: "),
        (["progressive_sizes=[1,2,3,4]"], r"progressive_sizes=\(1, 2, 3, 4\) are more than epochs=3"),
        (["progressive_sizes=[0]"], r"progressive_sizes=0: .* greater than 0"),
    ],
)
def test_settings_that_make_no_sense_are_named(settings, message):
    with pytest.raises(InputError, match=message):
        load_recipe("digits", settings)


def test_images_that_cannot_be_read_do_not_count_in_evaluation(recipe, tmp_path):
    digits = Digits(train=False)
    for part in ("train", "val"):
        for index in range(40):
            image, label = digits[index]
            file = tmp_path / part / str(label) / f"{index}.png"
            file.parent.mkdir(parents=True, exist_ok=True)
            image.save(file)
    settings = {"dataset": "", "data_dir": str(tmp_path), "batch_size": 16, "max_unreadable": 2, "workers": 0}
    task, accelerator = create_task(recipe.merged(settings), CPU), create_accelerator(recipe, cpu=True)
    model, spoilt = (
        task.create_model(),
        [tmp_path / "val" / str(digits[index][1]) / f"{index}.png" for index in (7, 30)],
    )
    found = []
    for spoil in (lambda file: file, lambda file: file.write_bytes(b""), lambda file: file.unlink()):
        for file in spoilt:
            spoil(file)
        found.append(evaluate(task, model, accelerator.prepare(task.evaluation_loader()), accelerator))
    assert [figures["images"] for figures in found] == [40, 38, 38]
    assert found[1] == pytest.approx(found[2], rel=1e-5) and found[0]["loss"] != found[1]["loss"]


def test_a_run_on_cached_images_learns_as_one_that_loads_them(recipe, tmp_path):
    rows = [train(recipe.merged({"cache": cache}), tmp_path / str(cache), cpu=True) for cache in (None, "device")]
    assert rows[0]["train_loss"] != rows[1]["train_loss"]
    assert rows[0]["train_loss"] == pytest.approx(rows[1]["train_loss"], rel=0.1)
    with pytest.raises(InputError, match=r"cache=device cuts out by pad_crop or not at all \(none\), without aa"):
        load_recipe("digits", ["cache=device", "augmentation=rrc"])
    assert recipe.hash() == recipe.merged({"cache": "device"}).hash()
