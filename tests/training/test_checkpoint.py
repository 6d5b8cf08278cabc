"""The output folder: what timm loads from it, what a crash or a full disk leaves in it."""

import resource
import types

import pytest
import timm
import torch
from safetensors import safe_open

from timm_deconv.errors import InputError
from timm_deconv.models.loading import load_network
from timm_deconv.models.weights import save_network
from timm_deconv.training import checkpoint, load_recipe
from timm_deconv.training.checkpoint import RunFolder
from timm_deconv.training.evaluation import evaluation_recipe, validate
from timm_deconv.training.loop import create_accelerator, train
from timm_deconv.training.tasks import create_task


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A finished run of one epoch: its recipe, folder and row."""
    folder = tmp_path_factory.mktemp("run")
    recipe = load_recipe("digits", ["model=test_resnet", "model_kwargs={}", "epochs=1", "batch_size=128"])
    return recipe, folder, train(recipe, folder)


def test_timm_loads_what_was_saved_and_it_reads_as_well(run):
    recipe, folder, row = run
    model = load_network(str(folder))
    assert tuple(model.pretrained_cfg["mean"]) == recipe.mean and model.num_classes == 10
    assert model.pretrained_cfg["label_names"] == list("0123456789")
    accelerator = create_accelerator(recipe)
    task = create_task(evaluation_recipe(str(folder), model, None), accelerator.device)
    figures = validate(model, task, accelerator)
    assert round(figures["top1"], 3) == row["top1"] and figures["images"] == 364


def test_the_weights_say_that_they_are_torchs(run, tmp_path):
    _, folder, _ = run
    save_network(load_network(str(folder)), tmp_path / "again")
    for file in (folder / "model.safetensors", tmp_path / "again" / "model.safetensors"):
        with safe_open(file, framework="pt") as weights:
            assert weights.metadata()["format"] == "pt"
    assert load_network(str(tmp_path / "again")).num_classes == 10


def test_a_run_that_ended_before_its_first_epoch_may_be_begun_with_other_settings(short_recipe, tmp_path):
    RunFolder(tmp_path, short_recipe.merged({"lr": 0.5})).open(size=0)
    assert train(short_recipe, tmp_path, cpu=True)["lr"] == short_recipe.lr


def test_the_recipe_beside_the_weights_is_the_one_that_ran(run):
    recipe, folder, _ = run
    assert load_recipe(str(folder / "recipe.yaml")) == recipe


def test_a_folder_with_a_run_is_not_overwritten(run):
    recipe, folder, _ = run
    with pytest.raises(InputError, match=r"holds this run already; add --resume"):
        train(recipe, folder)
    with pytest.raises(InputError, match=r"other settings \(lr: 0.1 there, 0.5 here\); choose another --output-dir"):
        train(recipe.merged({"lr": 0.5}), folder, resume=True)


def test_a_folder_with_foreign_weights_is_not_overwritten(run, tmp_path):
    recipe, _, _ = run
    (tmp_path / "model.safetensors").write_bytes(b"mine")
    with pytest.raises(InputError, match=r"holds a model.safetensors that no run of ours wrote"):
        train(recipe, tmp_path)
    assert (tmp_path / "model.safetensors").read_bytes() == b"mine"


def test_a_finished_run_resumed_trains_no_further_and_has_one_row(run):
    recipe, folder, row = run
    before = (folder / "model.safetensors").read_bytes()
    assert train(recipe, folder, resume=True)["top1"] == row["top1"]
    assert (folder / "model.safetensors").read_bytes() == before
    assert len((folder / "results.csv").read_text().splitlines()) == 2


def test_a_full_disk_leaves_the_last_checkpoint_whole_and_says_so(short_recipe, tmp_path, monkeypatch):
    recipe = short_recipe.merged({"epochs": 2})
    export, (soft, hard) = RunFolder.export, resource.getrlimit(resource.RLIMIT_FSIZE)

    def export_on_a_full_disk(self, model, progress, is_best):
        if progress.epoch == 2:
            resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, hard))
        export(self, model, progress)

    with monkeypatch.context() as patch, pytest.raises(OSError, match=r"epoch-0002-.* could not be saved") as full:
        patch.setattr(RunFolder, "export", export_on_a_full_disk)
        try:
            train(recipe, tmp_path, cpu=True)
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    said = str(full.value)
    assert "epoch-0001-image-00000000 is whole: make room and add --resume" in said and "\n" not in said
    left = timm.create_model(f"local-dir:{tmp_path}", pretrained=True)
    assert all(torch.isfinite(value).all() for value in left.state_dict().values())
    row = train(recipe, tmp_path, resume=True)
    assert row["epochs"] == 2 and len((tmp_path / "curve.csv").read_text().splitlines()) == 3


def test_a_disk_without_room_for_a_state_is_said_before_training(short_recipe, tmp_path, monkeypatch):
    monkeypatch.setattr(checkpoint.shutil, "disk_usage", lambda path: types.SimpleNamespace(free=1_000_000))
    with pytest.raises(InputError, match="1 MB are free, and a state of the run takes 2; make room, or choose another"):
        train(short_recipe, tmp_path / "run", cpu=True)
    assert list((tmp_path / "run").iterdir()) == []


def test_a_state_that_was_never_finished_is_ignored(run, tmp_path):
    recipe, _, _ = run
    folder = RunFolder(tmp_path, recipe)
    (tmp_path / "state" / ".partial").mkdir(parents=True)
    (tmp_path / "state" / ".partial" / "optimizer.bin").write_bytes(b"half")
    assert folder.states() == []
    assert train(recipe, tmp_path, resume=True)["epochs"] == 1


def test_a_network_that_cannot_be_loaded_is_answered_with_advice(tmp_path):
    with pytest.raises(InputError, match=r"holds no config.json"):
        load_network(str(tmp_path))
    with pytest.raises(InputError, match=r"no model or folder 'test_resnt'; nearest: .*test_resnet"):
        load_network("test_resnt")
    with pytest.raises(InputError, match=r"no weights of vgg16_cifar; .* train it: timm-deconv train cifar10_e20"):
        load_network("vgg16_cifar")
