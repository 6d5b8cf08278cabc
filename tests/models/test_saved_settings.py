"""Networks saved before configurations had a version keep their layers' settings; what a user types has today's order.

`saved_without_version.json` was written by the code of that time: what timm's config.json held, and the settings of
each layer that differed from the default ones.
"""

import copy
import json
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from safetensors.torch import save_file
from timm.models import save_for_hf
from torch import nn

from timm_deconv import ChannelDeconv, DeconvPolicy
from timm_deconv.convert import resolve_policy
from timm_deconv.errors import InputError
from timm_deconv.layers import DeconvCfg, WhiteningMixin
from timm_deconv.layers.config import layered
from timm_deconv.layers.presets import PRESET_VERSION

SAVED = json.loads(Path(__file__).with_name("saved_without_version.json").read_text())
ROWS = [pytest.param(row, id=row["case"]) for row in SAVED]
Settings = dict[str, DeconvCfg]


def settings(model: nn.Module) -> Settings:
    kinds = WhiteningMixin | ChannelDeconv
    return {name: layer.cfg for name, layer in model.named_modules() if isinstance(layer, kinds)}


def settings_of_that_time(row: dict[str, Any]) -> Settings:
    return {name: layered(asdict(DeconvCfg()), group["cfg"]) for group in row["layers"] for name in group["names"]}


def load(row: dict[str, Any], folder: Path, **kwargs: Any) -> Any:
    (folder / "config.json").write_text(json.dumps(row["config"]))
    return timm.create_model(f"local-dir:{folder}", **kwargs)


@pytest.mark.parametrize("row", ROWS)
def test_a_configuration_without_a_version_keeps_its_settings(row: dict[str, Any], tmp_path: Path) -> None:
    fused = load(row, tmp_path)
    assert bool(settings(fused)) is not row["config"]["model_args"].get("fused", False)
    row = copy.deepcopy(row)
    row["config"]["model_args"].pop("fused", None)
    model = load(row, tmp_path)
    assert settings(model) == settings_of_that_time(row)
    for each in (model, fused):  # what a new classifier is made by
        assert each.deconv_policy == model.deconv_policy
    save_for_hf(model, str(tmp_path / "again"), safe_serialization=True)
    again = timm.create_model(f"local-dir:{tmp_path / 'again'}", pretrained=True)
    assert settings(again) == settings(model) and again.deconv_policy == model.deconv_policy
    assert again._model_args["deconv"] == model._model_args["deconv"]


@pytest.mark.parametrize("fused", [False, True])
def test_its_weights_load_and_give_what_they_gave(fused: bool, tmp_path: Path) -> None:
    row = copy.deepcopy(next(row for row in SAVED if row["case"] == "fast_block_and_roles"))
    row["config"]["model_args"]["fused"] = fused
    model = load(row, tmp_path).eval()
    save_file(model.state_dict(), tmp_path / "model.safetensors", {"format": "pt"})
    x = torch.randn(2, 3, 32, 32)
    with torch.no_grad():
        assert torch.equal(load(row, tmp_path, pretrained=True).eval()(x), model(x))


def test_a_dictionary_typed_for_a_saved_network_has_todays_order(tmp_path: Path) -> None:
    row = next(row for row in SAVED if row["case"] == "fast_options")
    typed = load(row, tmp_path, deconv={"n_iter": 5})
    assert {cfg.n_iter for cfg in settings(typed).values()} == {5}
    kept = load(row, tmp_path)
    assert {cfg.n_iter for cfg in settings(kept).values()} == {1, 5}


def test_a_dictionary_with_the_first_version_means_what_it_meant() -> None:
    row = next(row for row in SAVED if row["case"] == "fast_options")
    arguments = {**row["config"]["model_args"], "deconv": {"version": 1, "n_iter": 5}}
    assert settings(timm.create_model("resnet18_cifar_deconv", **arguments)) == settings_of_that_time(row)


def test_a_preset_alone_stays_short_in_the_configuration(tmp_path: Path) -> None:
    rows = {row["case"]: row for row in SAVED}
    assert load(rows["paper_alone"], tmp_path)._model_args["deconv"] == {"version": PRESET_VERSION, "preset": "paper"}
    fast = load(rows["preset_alone"], tmp_path)._model_args["deconv"]
    assert fast == {"version": PRESET_VERSION, "preset": "fast", "gain_corrected": False}


@pytest.mark.parametrize("version", [0, PRESET_VERSION + 1, "2", True, 1.0])
def test_a_version_that_is_not_known_is_refused(version: Any) -> None:
    with pytest.raises(InputError, match=f"version={version!r}: must be 1 to {PRESET_VERSION}; a later"):
        resolve_policy({"version": version})
    with pytest.raises(InputError, match="version"):
        DeconvPolicy(version=version)
