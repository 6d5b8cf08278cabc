"""What the presets 'paper' and 'fast' mean, in networks by role and for layers that stand alone: the one place.

What is published of single families beside 'paper' stands with the families, in `timm_deconv.models`.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Any

from timm_deconv.errors import InputError, unknown_name

from .config import DeconvCfg, Kind

__all__ = [
    "LINEAR_AS_CONV",
    "PRESETS",
    "PRESET_VERSION",
    "Preset",
    "find_preset",
    "frozen",
    "preset",
    "preset_cfg",
    "resolve_cfg",
]

Options = Mapping[str, Any]

PRESET_VERSION = 2
"""Saved with a network; goes up when a preset, or the order in which options win, changes."""

LINEAR_AS_CONV: Options = MappingProxyType({"layout": "flat", "sampling_stride": 1})
"""Fields of a linear layer that a network holds as a convolution: whitened in runs of features, from every sample.
They do nothing in linear layers, so options for all layers leave them alone here too."""


@dataclass(frozen=True, kw_only=True)
class Preset:
    """A named configuration.

    Attributes:
        cfg: of every layer that is not covered below.
        roles: role in a network -> fields of `DeconvCfg`, or None for layers that stay plain.
        alone: kind of a layer -> fields where it stands alone. Kinds that are roles too (depthwise, grouped) have those
            of the role before. Channel whitening in a network takes its fields from here.
        published: what is published of a family holds under this preset.
        guard: fields for networks of which nothing is published: they keep layers that see fewer rows than features in
            bounds, and evaluation sound from the first step on.
        earlier: version -> fields in which networks saved by that version, or one before, differ.
    """

    cfg: DeconvCfg
    roles: Mapping[str, Options | None] = field(default_factory=dict)
    alone: Mapping[Kind, Options] = field(default_factory=dict)
    published: bool = False
    guard: Options = field(default_factory=dict)
    earlier: Mapping[int, Options] = field(default_factory=dict)

    def __post_init__(self) -> None:
        for name in ("roles", "alone", "guard", "earlier"):
            object.__setattr__(self, name, frozen(getattr(self, name)))


def frozen(options: Mapping[Any, Any]) -> Mapping[Any, Any]:
    """Return a copy of a dictionary, and of those in it, that cannot be changed."""
    return MappingProxyType({k: frozen(v) if isinstance(v, Mapping) else v for k, v in options.items()})


PRESETS: Mapping[str, Preset] = MappingProxyType(
    {
        "paper": Preset(
            cfg=DeconvCfg(),
            alone={"linear": {"block": 512}, "channel": {"eps": 1e-2}},
            published=True,
            guard={"min_rows": 1.0, "start_corrected": True},
        ),
        "fast": Preset(
            cfg=DeconvCfg(
                block=256,
                wide_block=64,
                layout="channels",
                n_iter=3,
                quartic=True,
                sampling_stride=2,
                max_rows=4096,
                min_rows=1.0,
                start_corrected=True,
                gain_corrected=True,
            ),
            roles={
                "stem": {"layout": "window", "sampling_stride": 3},
                "depthwise": {"block": 1, "n_iter": 1},
                "grouped": {"max_rows": 1024, "sampling_stride": 3},
                "block_end": {"n_iter": 1},
                "squeeze_excite": None,
                "classifier": {"block": 512, "wide_block": 0, "min_rows": 0.0},
            },
            alone={"channel": {"eps": 1e-2, "block": 64}},
            earlier={1: {"gain_corrected": False}},
        ),
    }
)


def find_preset(name: Any) -> Preset:
    """Return the preset called `name`; InputError lists the known ones for an unknown name."""
    if not isinstance(name, str) or name not in PRESETS:
        raise unknown_name("preset", str(name), PRESETS)
    return PRESETS[name]


def preset(name: str) -> DeconvCfg:
    """Return the configuration of a preset's layers in general; InputError for an unknown name."""
    return find_preset(name).cfg


def preset_cfg(name: str, kind: Kind) -> DeconvCfg:
    """Return what a preset gives a layer of a kind that stands alone."""
    chosen = find_preset(name)
    return chosen.cfg.override({**(chosen.roles.get(kind) or {}), **chosen.alone.get(kind, {})})


def resolve_cfg(cfg: "str | Options | DeconvCfg | None", kind: Kind = "spatial") -> DeconvCfg:
    """Resolve a layer's `cfg=`: a preset's name, a dictionary over a preset, or a `DeconvCfg` as it is.

    None is the preset 'paper', and so is what a dictionary without `preset` stands over.

    Args:
        cfg: what was given.
        kind: of the layer; a preset may say something of it.

    Raises:
        InputError: an unknown name, a value that makes no sense, or an option of the dictionary that does nothing in
            a layer of this kind.
    """
    if isinstance(cfg, DeconvCfg):
        return cfg
    if cfg is None or isinstance(cfg, str):
        return preset_cfg("paper" if cfg is None else cfg, kind)
    if not isinstance(cfg, Mapping):
        raise InputError(f"cfg={cfg!r}: give a preset's name, a dictionary of options or a DeconvCfg")
    base = preset_cfg(cfg.get("preset", "paper"), kind)
    made = base.override({name: value for name, value in cfg.items() if name != "preset"})
    for name, reason in made.idle(kind).items():
        if getattr(made, name) != getattr(base, name):
            raise InputError(f"{name}={getattr(made, name)!r}: does nothing here: {reason}")
    return made
