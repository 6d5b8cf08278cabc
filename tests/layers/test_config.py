"""DeconvCfg refuses what makes no sense, names the nearest options, and says what differs from the default."""

import json
from dataclasses import FrozenInstanceError, asdict
from typing import Any, get_args

import pytest
import torch

from timm_deconv.errors import InputError
from timm_deconv.kernels import inverse_root
from timm_deconv.layers import PRESETS, DeconvCfg, preset, resolve_cfg
from timm_deconv.layers.config import QUARTIC_STEPS, Kind, conv_kind, layered
from timm_deconv.layers.functional import root_of
from timm_deconv.layers.presets import preset_cfg
from timm_deconv.linalg import QUARTICS, isqrt_newton_schulz


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("block", 0),
        ("block", -4),
        ("block", 2.5),
        ("block", True),
        ("eps", 0.0),
        ("eps", float("nan")),
        ("n_iter", 0),
        ("momentum", 0.0),
        ("momentum", 1.5),
        ("sampling_stride", 0),
        ("freeze_iter", 0),
        ("freeze", 1),
        ("gain_corrected", 1),
        ("layout", "diagonal"),
        ("min_rows", -1),
    ],
)
def test_values_that_make_no_sense_are_refused(field: str, value: object) -> None:
    with pytest.raises(ValueError, match=f"{field}={value!r}: must be "):
        DeconvCfg(**{field: value})


def test_unknown_names_come_with_the_nearest_known_ones() -> None:
    with pytest.raises(ValueError, match="no whitening option 'sampling'; nearest: sampling_stride"):
        DeconvCfg().override({"sampling": 2})
    with pytest.raises(ValueError, match="no preset 'papers'; nearest: paper"):
        preset("papers")


def test_a_configuration_is_frozen_and_survives_json() -> None:
    cfg = DeconvCfg(block=16, layout="window", min_rows=2.0)
    with pytest.raises(FrozenInstanceError):
        cfg.block = 3
    assert DeconvCfg(**json.loads(json.dumps(asdict(cfg)))) == cfg
    assert str(cfg) == "block=16, layout='window', min_rows=2.0"
    assert DeconvCfg().override(cfg.changes()) == cfg


def test_the_gain_of_evaluation_is_corrected_in_fast_and_not_in_paper() -> None:
    assert preset("fast").gain_corrected and not preset("paper").gain_corrected


def test_quartic_is_refused_of_other_steps_than_it_is_for() -> None:
    assert set(QUARTICS) == set(QUARTIC_STEPS)
    for n_iter in QUARTIC_STEPS:
        assert DeconvCfg(quartic=True, n_iter=n_iter).quartic
    with pytest.raises(InputError, match="quartic=True: does nothing with n_iter=5; it is for 2 or 3 steps"):
        DeconvCfg(quartic=True)
    with pytest.raises(InputError, match="quartic=True: does nothing with n_iter=5"):
        preset("paper").override({"quartic": True})


def test_five_steps_asked_for_over_fast_are_five_newton_schulz_steps() -> None:
    cfg = preset("fast").override({"n_iter": 5})
    assert (cfg.n_iter, cfg.quartic) == (5, False)
    cov = torch.diag(torch.tensor([1.0, 0.01])).double()[None]
    _, root, *_ = inverse_root(cov[:, 0], cov, 100, 0.0, root_of(cfg))
    torch.testing.assert_close(root, isqrt_newton_schulz(cov + cfg.eps * torch.eye(2), 5))


def test_options_from_several_places_win_over_those_before() -> None:
    assert layered({"n_iter": 3, "quartic": True}, {"n_iter": 5}, {"n_iter": 2}) == DeconvCfg(n_iter=2, quartic=True)
    with pytest.raises(InputError, match="no whitening option 'blok'; nearest: block"):
        layered({}, {"blok": 1})
    with pytest.raises(InputError, match="no whitening option '5'"):
        layered({5: 1})  # type: ignore[dict-item]


@pytest.mark.parametrize("kind", get_args(Kind))
def test_a_layers_cfg_is_a_presets_name_a_dictionary_or_a_configuration(kind: Kind) -> None:
    assert resolve_cfg(None, kind) == resolve_cfg("paper", kind) == resolve_cfg({}, kind)
    assert resolve_cfg({"preset": "fast", "eps": 0.1}, kind) == resolve_cfg("fast", kind).override({"eps": 0.1})
    assert resolve_cfg({"eps": 0.1}, kind) == resolve_cfg("paper", kind).override({"eps": 0.1})
    cfg = DeconvCfg(block=16)
    assert resolve_cfg(cfg, kind) is cfg


def test_a_preset_says_what_a_layer_of_a_kind_gets() -> None:
    assert resolve_cfg(None) == preset_cfg("paper", "spatial") == DeconvCfg()
    assert resolve_cfg(None, "linear") == DeconvCfg(block=512)
    assert resolve_cfg(None, "channel") == DeconvCfg(eps=1e-2)
    assert resolve_cfg("fast", "depthwise") == preset("fast").override({"block": 1, "n_iter": 1})
    assert resolve_cfg("fast", "channel") == preset("fast").override({"block": 64, "eps": 1e-2})
    assert conv_kind(8, (3, 3), 8) == "depthwise" and conv_kind(8, (1, 1), 2) == "grouped"
    assert conv_kind(8, (1, 1), 1) == "pointwise" and conv_kind(8, (1, 3), 1) == "spatial"


@pytest.mark.parametrize(
    ("cfg", "kind", "message"),
    [
        ("fats", "spatial", "no preset 'fats'; nearest: fast"),
        ("", "spatial", "no preset ''; there are: fast, paper"),
        ({"preset": 5}, "spatial", "no preset '5'"),
        (5, "spatial", "cfg=5: give a preset's name, a dictionary of options or a DeconvCfg"),
        (["fast"], "linear", "give a preset's name"),
        ({"blok": 1}, "linear", "no whitening option 'blok'; nearest: block"),
        ({"block": 0}, "channel", "block=0: must be a positive whole number"),
        ({"n_iter": "5"}, "spatial", "n_iter='5': must be a positive whole number"),
        ({"quartic": True}, "spatial", "quartic=True: does nothing with n_iter=5"),
        ({"preset": "fast", "quartic": True, "n_iter": 4}, "linear", "quartic=True: does nothing with n_iter=4"),
        ({"wide_block": 8}, "spatial", "wide_block=8: does nothing here: layout is 'interleaved'; it is of 'channels'"),
        ({"wide_block": 1024}, "linear", "wide_block=1024: does nothing here: it is not smaller than block=512"),
        ({"layout": "window"}, "linear", "layout='window': does nothing here: linear layers whiten runs"),
        ({"layout": "window"}, "channel", "layout='window': does nothing here: ChannelDeconv has no such thing"),
        ({"freeze_iter": 9}, "spatial", "freeze_iter=9: does nothing here: freeze is False"),
        ({"block": 8}, "depthwise", "block=8: does nothing here: grouped convolutions"),
    ],
)
def test_what_cannot_be_a_layers_cfg_or_does_nothing_in_it_is_one_line(cfg: Any, kind: Kind, message: str) -> None:
    with pytest.raises(InputError, match=message) as caught:
        resolve_cfg(cfg, kind)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("cfg", "kind"),
    [
        ({"wide_block": 8, "layout": "flat"}, "spatial"),
        ({"wide_block": 8}, "linear"),
        ({"freeze_iter": 9, "freeze": True}, "spatial"),
        ({"preset": "fast", "block": 16}, "spatial"),
        ({"preset": "fast", "n_iter": 5}, "spatial"),
        ({"wide_block": 0, "quartic": False}, "spatial"),
        (asdict(DeconvCfg()), "grouped"),
    ],
)
def test_what_does_something_or_is_so_anyway_is_taken(cfg: Any, kind: Kind) -> None:
    resolve_cfg(cfg, kind)


def test_presets_cannot_be_changed() -> None:
    fast: Any = PRESETS["fast"]
    with pytest.raises(FrozenInstanceError):
        fast.cfg = DeconvCfg()
    for mapping in (PRESETS, fast.roles, fast.roles["stem"], fast.alone["channel"], PRESETS["paper"].guard):
        with pytest.raises(TypeError):
            mapping["n_iter"] = 1
