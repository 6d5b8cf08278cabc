"""DeconvCfg refuses what makes no sense, names the nearest options, and says what differs from the default."""

import json
from dataclasses import FrozenInstanceError, asdict

import pytest

from timm_deconv.layers import DeconvCfg, preset


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
