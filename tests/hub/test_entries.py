"""Runs that become entries of the zoo: what is written, that it loads, and what is refused with nothing written."""

import csv
import json
import shutil
from pathlib import Path

import pytest
import timm
import torch
from safetensors.torch import load_file, save_file

from timm_deconv.errors import InputError
from timm_deconv.hub import entries
from timm_deconv.hub.entries import add_entry
from timm_deconv.models.zoo import read_entry
from timm_deconv.training.recipe import load_recipe

ARCHITECTURE = "resnet18_cifar_deconv"
TAG = "nd_e2_digits"
NAME = f"{ARCHITECTURE}.{TAG}"


@pytest.fixture
def run(finished_run: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(finished_run, tmp_path / "run"))


@pytest.fixture
def configs(tmp_path: Path) -> Path:
    (tmp_path / "hub_configs" / "results").mkdir(parents=True)
    return tmp_path / "hub_configs"


def written(configs: Path) -> list[str]:
    return sorted(str(path.relative_to(configs)) for path in configs.rglob("*") if path.is_file())


@torch.no_grad()
def test_a_run_becomes_an_entry_whose_file_computes_what_the_run_does(run: Path, configs: Path) -> None:
    entry = add_entry(run, TAG, packaged=True, configs=configs)
    assert set(written(configs)) == {f"{NAME}.yaml", f"packaged/{NAME}.safetensors", "results/digits.csv"}
    assert read_entry(NAME, configs / f"{NAME}.yaml") == entry
    file = configs / "packaged" / f"{NAME}.safetensors"
    weights = load_file(file)
    assert {value.dtype for value in weights.values() if value.ndim > 1} == {torch.float16}
    assert not any(key.endswith("running_deconv") for key in weights)
    assert file.stat().st_size == entry.files["packaged"].size and file.stat().st_mode & 0o044 == 0o044
    overlay = {**entry.timm_cfg(), "file": str(file)}
    loaded = timm.create_model(ARCHITECTURE, pretrained=True, pretrained_cfg_overlay=overlay, **entry.model_args).eval()
    trained = timm.create_model(f"local-dir:{run}", pretrained=True).eval()
    x = torch.randn(4, 3, 32, 32)
    assert (loaded(x) - trained(x)).abs().max() < 0.01 * trained(x).abs().max()


def test_the_numbers_are_the_rows_and_the_settings_the_runs(run: Path, configs: Path) -> None:
    entry = add_entry(run, TAG, configs=configs)
    with (configs / "results" / "digits.csv").open(newline="") as lines:
        rows = list(csv.DictReader(lines))
    assert len(rows) == 1 and entry.results is not None and entry.results.row.items() <= rows[0].items()
    assert entry.results.figures == {key: float(rows[0][key]) for key in ("top1", "parameters")}
    recipe = load_recipe("digits").merged(dict(entry.settings))
    assert recipe.hash() == entry.recipe_hash == rows[0]["recipe_hash"]
    assert entry.label_names == tuple("0123456789") and "CC BY 4.0" in entry.dataset_license
    best = add_entry(run / "best", "nd_best_digits", configs=configs)
    assert best.results is not None and best.results.figures["best_top1"] == float(rows[0]["best_top1"])
    with (configs / "results" / "digits.csv").open() as lines:
        assert len(lines.readlines()) == 2, "the row was there already"


def test_what_is_refused_leaves_nothing(run: Path, configs: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refused(message: str, tag: str = TAG) -> None:
        before = written(configs)
        with pytest.raises(InputError, match=message) as error:
            add_entry(run, tag, packaged=True, configs=configs)
        assert "\n" not in str(error.value) and written(configs) == before

    refused("tag 'e2_digits': weights trained with deconvolution have one that starts with nd_", "e2_digits")
    with monkeypatch.context() as smaller:
        smaller.setitem(entries.LIMITS, "packaged", 1000)
        refused(r"have 0\.\d MB in float16, and packaged/ takes 0: leave out --packaged")
    with monkeypatch.context() as unknown:
        unknown.delitem(entries.LICENSES, "digits")
        refused("the licence of 'digits' is not known")

    file = run / "model.safetensors"
    weights, other = load_file(file), {"format": "pt"}
    key = next(key for key, value in weights.items() if value.ndim == 4)
    save_file({**weights, key: weights[key] * torch.nan}, file, other)
    refused("outputs that are NaN or infinite")
    save_file({**weights, key: weights[key] * 1e6}, file, other)  # beyond float16
    refused("NaN or infinite|in float16 the outputs differ by")
    save_file({k: v for k, v in weights.items() if k != key}, file, other)
    refused("do not fit")
    save_file(weights, file, other)

    recipe = (run / "recipe.yaml").read_text()
    (run / "recipe.yaml").write_text(recipe.replace("name: digits", "name: mine"))
    refused("of no recipe of the package")
    (run / "recipe.yaml").write_text(recipe)
    config = json.loads((run / "config.json").read_text())
    config["label_names"] = ["0"]
    (run / "config.json").write_text(json.dumps(config))
    refused("nothing names the 10 classes: add label_names")
    (run / "results.csv").rename(run / "elsewhere.csv")
    refused(r"no results\.csv")


def relicensed(run: Path, licence: str | None) -> None:
    config = json.loads((run / "config.json").read_text())
    config["pretrained_cfg"]["license"] = licence
    (run / "config.json").write_text(json.dumps(config))


def test_the_licence_is_that_of_the_weights_and_must_be_known(run: Path, configs: Path) -> None:
    relicensed(run, "cc-by-nc-4.0")
    assert add_entry(run, TAG, configs=configs).license == "cc-by-nc-4.0"
    relicensed(run, None)
    with pytest.raises(InputError, match=r"the licence of the weights is not known: add license to .*config\.json"):
        add_entry(run, "nd_other", configs=configs)
    assert f"weights/{NAME.replace(TAG, 'nd_other')}.safetensors" not in written(configs)


def test_what_cannot_be_written_leaves_neither_weights_nor_entry_nor_row(
    run: Path, configs: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    for step in ("write_text", "append_rows"):
        with monkeypatch.context() as patch:
            patch.setattr(entries, step, full)
            with pytest.raises(OSError, match="No space left"):
                add_entry(run, TAG, configs=configs)
        assert written(configs) == []


def test_weights_that_lie_there_without_an_entry_stay(run: Path, configs: Path) -> None:
    file = configs / "packaged" / f"{NAME}.safetensors"
    file.parent.mkdir()
    file.write_bytes(b"somebody's")
    with pytest.raises(InputError, match=r"safetensors is there already: take another tag, or remove the file first"):
        add_entry(run, TAG, packaged=True, configs=configs)
    assert file.read_bytes() == b"somebody's" and written(configs) == [f"packaged/{NAME}.safetensors"]


def test_an_entry_is_not_written_over(run: Path, configs: Path) -> None:
    add_entry(run, TAG, configs=configs)
    with pytest.raises(InputError, match=r"yaml is there already: take another tag, or remove the file first"):
        add_entry(run, TAG, configs=configs)
    assert f"weights/{NAME}.safetensors" in written(configs)
