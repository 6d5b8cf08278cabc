"""The zoo: entries agree with registry, rows and files; what timm says of tags; what bad entries and names are told."""

import csv
import gzip
import hashlib
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
import yaml
from timm.models import get_pretrained_cfg, save_for_hf
from torch import nn

from tests.models import zoo_of_two
from timm_deconv.errors import InputError
from timm_deconv.models import list_models
from timm_deconv.models.loading import load_network
from timm_deconv.models.pretrained import create_transferred
from timm_deconv.models.weights import save_network
from timm_deconv.models.zoo import ZooEntry, entries, parse_entry
from timm_deconv.training.evaluation import validate
from timm_deconv.training.processes import create_accelerator
from timm_deconv.training.recipe import load_recipe
from timm_deconv.training.tasks import create_task

CONFIGS = Path(__file__).parents[2] / "hub_configs"
LIMITS = {"packaged": 3e6, "weights": 10e6}
HEADLINES = {"top1", "best_top1", "miou", "best_miou"}

VALUES: dict[str, Any] = {"architecture": "zoo18_deconv", "tag": "nd_a", **zoo_of_two.OTHERS}
RUN: dict[str, Any] = {"recipe": "cifar10_e20", "seed": 0, "recipe_hash": "0" * 8}


@pytest.mark.parametrize("entry", [pytest.param(entry, id=name) for name, entry in entries().items()])
def test_an_entry_agrees_with_its_row_its_files_and_timm(entry: ZooEntry) -> None:
    cfg = get_pretrained_cfg(entry.name)
    assert cfg.tag == entry.tag and cfg.license == entry.license
    if entry.dataset != "imagenet":  # whose names timm has
        assert cfg.num_classes == len(entry.label_names)
    assert bool(cfg.has_weights) == timm.is_model_pretrained(entry.name) == bool(entry.local_file() or entry.hf_hub_id)
    assert entry.dataset_license and entry.origin
    if entry.architecture in (*list_models(), "segmenter") and entry.recipe:
        assert entry.tag.startswith("nd_") or entry.architecture == "segmenter"
    for folder in LIMITS.keys() & entry.files.keys():
        file = CONFIGS / folder / f"{entry.name}.safetensors"
        assert file.stat().st_size == entry.files[folder].size <= LIMITS[folder]
        assert hashlib.sha256(file.read_bytes()).hexdigest() == entry.files[folder].sha256
    if entry.recipe is None:
        assert entry.results is None, "no number without a run"
        return
    recipe = load_recipe(entry.recipe).merged({**entry.settings, "seed": entry.seed})
    assert recipe.hash() == entry.recipe_hash, "recipe and settings are the run's"
    assert entry.results is not None
    with (CONFIGS / "results" / entry.results.file).open(newline="") as lines:
        rows = [row for row in csv.DictReader(lines) if entry.results.row.items() <= row.items()]
    assert len(rows) == 1
    assert entry.results.figures == {key: float(rows[0][key]) for key in entry.results.figures}
    assert len(HEADLINES & entry.results.figures.keys()) == 1 and "parameters" in entry.results.figures
    assert rows[0]["seed"] == str(entry.seed)


def test_every_file_of_weights_and_every_tag_of_ours_has_an_entry() -> None:
    files = {file.name.removesuffix(".safetensors") for folder in LIMITS for file in (CONFIGS / folder).glob("*")}
    assert files <= entries().keys()
    trained = {name for name, entry in entries().items() if is_deconvolution(entry)}
    assert set(timm.list_models("*.nd_*", include_tags=True)) == trained
    assert sum(file.stat().st_size for folder in LIMITS for file in (CONFIGS / folder).glob("*")) <= 30e6


# A zoo of its own


@pytest.fixture(scope="module")
def trained() -> nn.Module:
    torch.manual_seed(1)
    model = zoo_of_two.network()
    for _ in range(3):
        model.train()(torch.randn(32, 3, 32, 32))
    return model.eval()


@pytest.fixture
def configs(tmp_path: Path, trained: nn.Module) -> Path:
    """Entries of one network with weights and one without, and of its twin's."""
    folder = tmp_path / "hub_configs"
    zoo_of_two.add(folder, "zoo18_deconv.nd_a", trained)
    zoo_of_two.add(folder, "zoo18_deconv.nd_b", None, **RUN)
    zoo_of_two.add(folder, "zoo18.c", zoo_of_two.network("").eval(), "weights")
    return folder


@pytest.fixture
def zoo(configs: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    with zoo_of_two.registered(configs, monkeypatch):
        yield configs


@pytest.mark.usefixtures("zoo")
def test_timm_knows_which_tags_have_weights_and_the_trained_one_comes_first() -> None:
    with_weights = ["zoo18.c", "zoo18_deconv.bn_c", "zoo18_deconv.nd_a"]
    assert timm.list_pretrained("zoo18*") == with_weights
    assert timm.list_models("zoo18*", include_tags=True) == sorted([*with_weights, "zoo18_deconv.nd_b"])
    assert get_pretrained_cfg("zoo18_deconv").tag == "nd_a" and get_pretrained_cfg("zoo18").tag == "c"
    for name in ("zoo18", "zoo18_deconv", *with_weights):
        assert timm.is_model_pretrained(name)
    assert not timm.is_model_pretrained("zoo18_deconv.nd_b")
    cfg = get_pretrained_cfg("zoo18_deconv.nd_a")
    assert (cfg.license, cfg.label_names[3], cfg.num_classes) == ("apache-2.0", "class 3", 10)


@pytest.mark.usefixtures("zoo")
@torch.no_grad()
def test_pretrained_gives_the_trained_networks_function_and_its_twins(trained: nn.Module) -> None:
    x = torch.randn(4, 3, 32, 32)
    for name in ("zoo18_deconv", "zoo18_deconv.nd_a"):
        found = timm.create_model(name, pretrained=True).eval()(x)
        assert (found - trained(x)).abs().max() < 0.01 * trained(x).abs().max(), "but for the rounding of float16"
    twin = timm.create_model("zoo18", pretrained=True).eval()
    for carried_over in (timm.create_model("zoo18_deconv.bn_c", pretrained=True), create_transferred("zoo18")):
        torch.testing.assert_close(carried_over.eval()(x), twin(x), rtol=1e-4, atol=1e-5)


@pytest.mark.usefixtures("zoo")
def test_what_is_said_of_weights_is_not_said_of_a_network_without_them(tmp_path: Path) -> None:
    for name, tag in (("zoo18_deconv", "nd_a"), ("zoo18_deconv.bn_c", "bn_c"), ("zoo18", "c")):
        cfg = timm.create_model(name, pretrained=True).pretrained_cfg
        assert cfg["tag"] == tag and cfg["label_names"][0] == "class 0" and "made up" in cfg["notes"][0]
        model = timm.create_model(name)
        assert not {"tag", "label_names", "notes", "file"} & model.pretrained_cfg.keys()
        save_for_hf(model, str(tmp_path / name), safe_serialization=True)
        assert "class 0" not in (tmp_path / name / "config.json").read_text()
        own = timm.create_model(name, pretrained_cfg_overlay={"label_names": ("mine",)})
        assert own.pretrained_cfg["label_names"] == ("mine",)


def test_arguments_that_an_entry_names_make_the_network_unless_others_are_given(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    wide = timm.create_model("resnet18_025_cifar_deconv", layers=(1, 1, 1, 1), width=0.25).eval()
    folder = tmp_path / "hub_configs"
    arguments = {"width": 0.25, "deconv": {"version": 2, "preset": "paper"}}
    zoo_of_two.add(folder, "zoo18_deconv.nd_wide", wide, model_args=arguments)
    with zoo_of_two.registered(folder, monkeypatch):
        model = timm.create_model("zoo18_deconv.nd_wide", pretrained=True)
        assert model.conv1.out_channels == 16 and model.deconv_policy.preset == "paper"
        assert timm.create_model("zoo18_deconv", pretrained=True, deconv="fast").deconv_policy.preset == "fast"
        assert timm.create_model("zoo18_deconv").conv1.out_channels == 8
        with pytest.raises(InputError, match="do not fit zoo18_deconv"):
            timm.create_model("zoo18_deconv", pretrained=True, width=0.125)
        for unloaded in (timm.create_model("zoo18_deconv.nd_wide"), load_network("zoo18_deconv", weights=False)):
            assert unloaded.conv1.out_channels == 16 and unloaded.deconv_policy.preset == "paper"
            assert not {"tag", "label_names", "notes", "file"} & unloaded.pretrained_cfg.keys()


@pytest.mark.parametrize("weights", [True, False])
def test_arguments_that_an_entry_names_are_saved(
    weights: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder, arguments = tmp_path / "hub_configs", {"width": 0.25, "output_stride": 4}
    for form, tag in (("", "wide"), ("_deconv", "nd_wide")):
        model = timm.create_model(f"resnet18_025_cifar{form}", layers=(1, 1, 1, 1), width=0.25).eval()
        zoo_of_two.add(folder, f"zoo18{form}.{tag}", model, model_args=arguments)
    with zoo_of_two.registered(folder, monkeypatch):
        for name in ("zoo18.wide", "zoo18_deconv.nd_wide", "zoo18_deconv.bn_wide"):
            model = timm.create_model(name, pretrained=weights, output_stride=2 if "bn_" in name else None)
            save_network(model, tmp_path / name)
            again = timm.create_model(f"local-dir:{tmp_path / name}", pretrained=True)
            assert {**arguments, **({"output_stride": 2} if "bn_" in name else {})}.items() <= again._model_args.items()
            assert all(torch.equal(value, again.state_dict()[key]) for key, value in model.state_dict().items())


@pytest.mark.parametrize("name", [name for name, entry in entries().items() if entry.local_file()])
@torch.no_grad()
def test_every_entrys_network_is_loaded_as_it_was_saved(name: str, tmp_path: Path) -> None:
    model = timm.create_model(name, pretrained=True).eval()
    assert entries()[name].model_args.keys() <= model._model_args.keys()
    save_network(model, tmp_path)
    again = load_network(str(tmp_path)).eval()
    assert model._model_args.items() <= again._model_args.items()
    x = torch.randn(1, *model.pretrained_cfg["input_size"])
    assert torch.equal(again(x), model(x))


@pytest.mark.usefixtures("zoo")
@pytest.mark.parametrize(
    ("name", "message"),
    [
        (
            "zoo18_deconv.nd_b",
            r"there are no weights of zoo18_deconv\.nd_b; tags that have some: zoo18_deconv\.nd_a, zoo18_deconv\.bn_c; "
            r"or train it: timm-deconv train cifar10_e20 --model zoo18_deconv --data-dir DIR",
        ),
        ("zoo18_deconv.nd_x", r"zoo18_deconv has no tag 'nd_x'; tags that have some: zoo18_deconv\.nd_a"),
        (
            "vgg11_cifar_deconv",
            r"no weights of vgg11_cifar_deconv; networks of the zoo that have some: .*zoo18_deconv\.nd_a.*; or"
            r" train it: timm-deconv train cifar10_e20 --model vgg11_cifar_deconv",
        ),
        ("densenet121_deconv", r"no weights of densenet121_deconv; .* timm-deconv train imagenet_e90 --model densenet"),
        ("fcn_resnet50", r"no weights of fcn_resnet50; .* timm-deconv train cityscapes_e30 --model fcn_resnet50"),
        ("deconv", r"no weights of deconv; .* timm-deconv convert NETWORK OUTPUT"),
    ],
)
def test_a_name_without_weights_says_which_have_some_and_how_to_train_one(name: str, message: str) -> None:
    if "zoo18" not in name and timm.is_model_pretrained(name):
        pytest.skip("has weights by now")
    with pytest.raises(InputError, match=message) as error:
        timm.create_model(name, pretrained=True)
    assert "\n" not in str(error.value)


def test_weights_that_are_carried_over_are_made_by_converting() -> None:
    name = "tf_efficientnet_lite0_deconv.bn_calibrated_in1k"
    assert entries()[name].recipe is None
    with pytest.raises(InputError, match=r"lite0_deconv\.bn_in1k; .*: timm-deconv convert tf_efficientnet_lite0"):
        timm.create_model(name, pretrained=True)


def test_a_file_that_is_not_here_is_said_to_lie_in_a_checkout(configs: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (configs / "packaged" / "zoo18_deconv.nd_a.safetensors").unlink()
    with zoo_of_two.registered(configs, monkeypatch):
        assert timm.list_pretrained("zoo18_deconv*") == ["zoo18_deconv.bn_c"]
        assert get_pretrained_cfg("zoo18_deconv").tag == "bn_c"
        with pytest.raises(InputError, match=r"zoo18_deconv\.nd_a are not here: they lie in hub_configs/weights"):
            timm.create_model("zoo18_deconv.nd_a", pretrained=True)


@pytest.mark.parametrize("name", ["zoo18_deconv.nd_a", "zoo18_deconv.bn_c", "zoo18"])
def test_a_file_that_was_tampered_with_is_refused_before_it_is_read(zoo: Path, name: str) -> None:
    for file in zoo.glob("*/*.safetensors"):
        content = bytearray(file.read_bytes())
        content[-1] ^= 1
        file.write_bytes(content)
    with pytest.raises(InputError, match=r"another file than the known one \(sha256 .* get it again") as error:
        timm.create_model(name, pretrained=True)
    assert "\n" not in str(error.value)


# Files of entries


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"licence": "x"}, "no key of the file 'licence'; nearest: .*license"),
        ({"tag": 3}, "tag=3: must be a str"),
        ({"tag": "Nd 1"}, "tag='Nd 1': letters, digits and _"),
        ({"seed": True, "recipe": "a", "recipe_hash": "b"}, "seed=True: must be a int"),
        ({"recipe": "cifar10_e20"}, "recipe, seed and recipe_hash are those of one run"),
        ({"results": {"file": "a.csv", "row": {}, "figures": {}}}, "results are of a run"),
        ({**RUN, "results": {"file": "a.csv"}}, "results has no row; add it"),
        ({"files": {"packed": {"sha256": "0" * 64, "size": 1}}}, "no kind of file 'packed'; nearest: packaged"),
        ({"files": {"packaged": {"sha256": "0", "size": 1}}}, "sha256='0': must be 64 hexadecimal digits"),
        ({"files": {"packaged": {"sha256": "0" * 64, "size": 0}}}, "size=0"),
        ({"files": {"packaged": 3}}, "files.packaged is no mapping"),
        ({"label_names": "cat"}, "label_names='cat': must be a list of texts"),
        ({"model_args": []}, "must be a mapping"),
    ],
)
def test_an_entry_that_makes_no_sense_is_refused_in_one_line(change: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=message) as error:
        parse_entry({**VALUES, **change})
    assert "\n" not in str(error.value)


def test_a_missing_key_a_file_that_is_no_yaml_and_a_wrong_name_are_named(
    configs: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(InputError, match="the file has no license; add it"):
        parse_entry({key: value for key, value in VALUES.items() if key != "license"})
    file = configs / "zoo18_deconv.nd_a.yaml"
    for text, message in (
        ("a: [", r"zoo18_deconv\.nd_a\.yaml: not YAML"),
        ("3", r"zoo18_deconv\.nd_a\.yaml: the file is no mapping"),
        (yaml.safe_dump({**VALUES, "tag": "nd_z"}), r"nd_a\.yaml: holds zoo18_deconv\.nd_z; name the file by it"),
    ):
        file.write_text(text)
        with pytest.raises(InputError, match=message), zoo_of_two.registered(configs, monkeypatch):
            pass


def test_an_entry_is_written_as_it_is_read() -> None:
    values = {**VALUES, **RUN, "files": {"packaged": {"sha256": "0" * 64, "size": 1}}, "model_args": {"width": 0.5}}
    entry = parse_entry(values)
    assert entry.to_dict() == values and parse_entry(yaml.safe_load(yaml.safe_dump(entry.to_dict()))) == entry


EVALUATED = {"cifar10": Path("cifar10", "jpeg75", "test.tar"), "camvid": Path("camvid", "val.tar")}
"""Images of the evaluation by data set, in the folder of data, packed there."""
LEAST = {"top1": 80, "miou": 35}


@pytest.mark.slow
@pytest.mark.parametrize("name", [name for name, entry in entries().items() if "packaged" in entry.files])
def test_the_packages_own_weights_are_right_as_often_as_their_row_says(
    name: str, data_dir: Path, tmp_path: Path
) -> None:
    entry = entries()[name]
    assert entry.recipe is not None and entry.results is not None
    images = EVALUATED[entry.dataset]
    with gzip.open(data_dir / f"{images}.gz") as packed, (tmp_path / images.name).open("wb") as tar:
        shutil.copyfileobj(packed, tar)
    recipe = load_recipe(entry.recipe).merged({**entry.settings, "data_dir": str(tmp_path), "workers": 0})
    accelerator = create_accelerator(recipe, cpu=True)
    model = timm.create_model(name, pretrained=True, **({"fused": True} if is_deconvolution(entry) else {}))
    figures = validate(model, create_task(recipe, accelerator.device), accelerator)
    (figure,) = HEADLINES & entry.results.figures.keys()
    assert abs(figures[figure] - entry.results.figures[figure]) <= 0.1 and figures[figure] >= LEAST[figure]


def is_deconvolution(entry: ZooEntry) -> bool:
    return entry.tag.startswith("nd_")
