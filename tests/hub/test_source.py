"""Folders that cannot be published are refused in one line that says what to do, and nothing of them is changed."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import timm
import torch
from safetensors.torch import load_file, save_file

import timm_deconv
from timm_deconv.errors import InputError
from timm_deconv.hub.publish import dry_run
from timm_deconv.hub.source import read_source
from timm_deconv.models.weights import save_network


def weights_of(run: Path) -> dict[str, torch.Tensor]:
    """The tensors, no longer those of the file, which may be written anew."""
    return {name: value.clone() for name, value in load_file(run / "model.safetensors").items()}


def spoil_weights(run: Path) -> None:
    data = (run / "model.safetensors").read_bytes()
    (run / "model.safetensors").write_bytes(data[: len(data) // 2])


def pickled(run: Path) -> None:
    weights = weights_of(run)
    (run / "model.safetensors").unlink()
    torch.save(weights, run / "pytorch_model.bin")


def pickled_by_the_name(run: Path) -> None:
    torch.save(weights_of(run), run / "model.safetensors")


def of_another_network(run: Path) -> None:
    other = timm.create_model("vgg11_cifar_deconv", width=0.0625).state_dict()
    save_file({name: value.contiguous() for name, value in other.items()}, run / "model.safetensors")


def of_no_network(run: Path) -> None:
    config = json.loads((run / "config.json").read_text())
    (run / "config.json").write_text(json.dumps({**config, "architecture": "resnet81"}))


def no_configuration(run: Path) -> None:
    (run / "config.json").write_text("<html>")


def unfinished(run: Path) -> None:
    (run / "results.csv").unlink()


def folded(run: Path) -> None:
    model = timm.create_model(f"local-dir:{run}", pretrained=True)
    save_network(timm_deconv.fuse(model), run)


def not_finite(run: Path) -> None:
    weights = weights_of(run)
    weights["fc.weight"][0, 0] = torch.nan
    save_file(weights, run / "model.safetensors", {"format": "pt"})


def tampered(run: Path) -> None:
    weights = weights_of(run)
    weights["fc.weight"] = weights["fc.weight"].flip(0)
    save_file(weights, run / "model.safetensors", {"format": "pt"})


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (spoil_weights, r"is damaged \(.*\), no file of safetensors: resume the run"),
        (pickled, "holds pytorch_model.bin, a pickle, and no model.safetensors, which alone is published"),
        (pickled_by_the_name, "model.safetensors is a pickle, no file of safetensors"),
        (of_another_network, "these weights do not fit resnet18_cifar_deconv"),
        (of_no_network, r"is damaged \(.*resnet81"),
        (no_configuration, "is damaged"),
        (unfinished, "holds no results.csv, as its run is not finished: go on with it by --resume"),
        (folded, "holds folded weights: publish the network that they were folded from"),
        (not_finite, "the network gives outputs that are NaN or infinite"),
        (tampered, r"\d+\.\d\d % on 64 images, where its run recorded .*--no-eval"),
        (shutil.rmtree, "no folder .*; give the output folder of a run"),
    ],
    ids=lambda value: getattr(value, "__name__", ""),
)
def test_a_folder_that_cannot_be_published_is_refused_with_the_way_out(
    spoil: Callable[[Path], object], message: str, finished_run: Path, tmp_path: Path
) -> None:
    run = tmp_path / "run"
    shutil.copytree(finished_run, run, ignore=shutil.ignore_patterns("state", "tensorboard", "best"))
    spoil(run)
    before = {path: path.read_bytes() for path in run.glob("*")}
    with pytest.raises(InputError, match=message) as error:
        dry_run(run, "me", tmp_path / "tree", evaluate=spoil in (tampered, not_finite))
    assert "\n" not in str(error.value)
    assert {path: path.read_bytes() for path in run.glob("*")} == before
    assert not (tmp_path / "tree").exists()


def test_a_folded_segmenter_is_refused_as_such(tmp_path: Path) -> None:
    model = timm.create_model("segmenter", base="test_resnet", num_classes=5, deconv="fast").eval()
    save_network(timm_deconv.fuse(model), tmp_path)
    with pytest.raises(InputError, match="holds folded weights: publish the network that they were folded from"):
        read_source(tmp_path, "nd_x")
    save_network(timm.create_model("segmenter", base="test_resnet", num_classes=5), tmp_path / "batch_norm")
    assert not read_source(tmp_path / "batch_norm", "x").whitened


def test_the_best_epoch_has_its_own_record(finished_run: Path) -> None:
    last, best = read_source(finished_run), read_source(finished_run / "best")
    assert last.recorded == float(last.result["top1"]) and best.recorded == float(last.result["best_top1"])
    assert best.name == last.name == "resnet18_cifar_deconv.nd_e2_digits"


@pytest.mark.parametrize("tag", ["two words", "a.b", "../up"])
def test_a_tag_that_is_none_is_refused(finished_run: Path, tag: str) -> None:
    with pytest.raises(InputError, match="it is of letters, digits, - and _, as in nd_e20_cifar10"):
        read_source(finished_run, tag)


def test_images_that_are_not_there_are_named_with_the_way_out(finished_run: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    shutil.copytree(finished_run, run, ignore=shutil.ignore_patterns("state", "tensorboard", "best"))
    text = (run / "recipe.yaml").read_text().replace("dataset: digits", "dataset: ''")
    (run / "recipe.yaml").write_text(text.replace("data_dir: null", f"data_dir: {tmp_path / 'moved'}"))
    with pytest.raises(InputError, match=r"cannot be measured .*moved.*: give --data-dir, or --no-eval"):
        dry_run(run, "me", tmp_path / "tree")
