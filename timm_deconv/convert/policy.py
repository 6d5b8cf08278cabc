"""DeconvPolicy: which layer of a network is whitened how, by role and by name."""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, fields
from fnmatch import fnmatchcase
from typing import Any, Literal, get_args

from timm_deconv.errors import InputError, unknown_name
from timm_deconv.layers import DeconvCfg, preset

__all__ = ["DEFAULT_PRESET", "GUARDED", "ClassifierKind", "DeconvPolicy", "Role", "resolve_policy"]

Role = Literal[
    "stem", "pointwise", "spatial", "block_end", "depthwise", "grouped", "squeeze_excite", "linear", "classifier"
]
ClassifierKind = Literal["linear", "channel", "plain"]
Options = Mapping[str, Any]
DEFAULT_PRESET = "fast"
PRESET_ROLES: Mapping[str, Mapping[str, Options | None]] = {
    "fast": {
        "stem": {"layout": "window", "sampling_stride": 3},
        "depthwise": {"block": 1, "n_iter": 1},
        "grouped": {"max_rows": 1024, "sampling_stride": 3},
        "block_end": {"n_iter": 1},
        "squeeze_excite": None,
        "classifier": {"block": 512, "wide_block": 0, "min_rows": 0.0},
    }
}
LINEAR_AS_CONV: Options = {"layout": "flat", "sampling_stride": 1}


@dataclass(frozen=True, kw_only=True)
class DeconvPolicy:
    """Whitening options of every layer, from the general to the particular; what comes later wins.

    Attributes:
        preset: name of the configuration to start from.
        options: fields of `DeconvCfg` for all layers.
        roles: role -> fields for the layers of that role, or None to leave them plain. Roles: stem (first convolution),
            classifier (last layer), squeeze_excite, depthwise, grouped, block_end (last convolution of a residual
            branch or dense layer), pointwise (other 1x1), spatial (other convolutions), linear (hidden ones). The
            preset 'fast' leaves squeeze_excite plain; `{'squeeze_excite': {}}` whitens it. Hidden linear layers of
            networks with other norms than batch norm, such as transformer blocks, are whitened only if this role is
            named.
        patterns: shell pattern of layer names ('layer4.*') -> fields, or None to leave the layers plain. Fields whiten
            layers whose role is plain, too. A pattern that matches no layer is an error.
        classifier: 'linear' whitens the classifier's input features; 'channel' keeps it plain and whitens channels in
            front of the global pooling; 'plain' leaves it alone.

    Raises:
        InputError: an unknown name, with the nearest known ones, or a value that makes no sense.
    """

    preset: str = DEFAULT_PRESET
    options: Options = field(default_factory=dict)
    roles: Mapping[str, Options | None] = field(default_factory=dict)
    patterns: Mapping[str, Options | None] = field(default_factory=dict)
    classifier: ClassifierKind = "linear"

    def __post_init__(self) -> None:
        for name in ("options", "roles", "patterns"):
            if not isinstance(getattr(self, name), Mapping):
                raise InputError(f"{name}={getattr(self, name)!r}: must be a dictionary")
        base = self._base()
        for role in self.roles:
            if role not in get_args(Role):
                raise unknown_name("role", str(role), get_args(Role))
        for pattern in self.patterns:
            if not isinstance(pattern, str):
                raise InputError(f"pattern {pattern!r}: must be a string, matched against layer names")
        for name, options in (*self.roles.items(), *self.patterns.items()):
            if not isinstance(options, Mapping | None):
                raise InputError(f"{name!r}: {options!r}: must be a dictionary, or None to leave the layers plain")
            base.override(options or {})
        if self.classifier not in get_args(ClassifierKind):
            raise unknown_name("classifier", str(self.classifier), get_args(ClassifierKind))

    def cfg(self, name: str, role: Role, *, linear_as_conv: bool = False) -> DeconvCfg | None:
        """The configuration of the layer called `name`; None if it stays plain.

        Args:
            linear_as_conv: the layer is a linear layer that the network holds as a convolution: it is whitened as a
                linear layer is, in runs of features and from every sample, unless its role or a pattern says otherwise.
        """
        base = self._base().override(LINEAR_AS_CONV if linear_as_conv else {})
        chosen: DeconvCfg | None = base
        matching = (options for pattern, options in self.patterns.items() if fnmatchcase(name, pattern))
        for options in (self.roles.get(role, {}), *matching):
            chosen = None if options is None else (chosen or base).override(options)
        return chosen

    def channel_cfg(self) -> DeconvCfg:
        """The configuration of channel whitening before the pooling; eps is 1e-2 (published) unless `options` say."""
        base = preset(self.preset)
        return base.override({"eps": 1e-2, "block": base.least_block} | dict(self.options))

    def over(self, family: "DeconvPolicy") -> "DeconvPolicy":
        """This policy on top of a family's own: its options, roles and patterns win where both speak."""
        return DeconvPolicy(
            preset=self.preset,
            options={**family.options, **self.options},
            roles=_merge(family.roles, self.roles),
            patterns=_merge(family.patterns, self.patterns),
            classifier=self.classifier,
        )

    def over_published(self, family: "DeconvPolicy") -> "DeconvPolicy":
        """This policy on top of what is published for a family; of a preset other than 'paper', on top of the preset's
        own roles instead."""
        if self.preset == "paper":
            return self.over(family)
        return self.over(DeconvPolicy(roles=PRESET_ROLES.get(self.preset, {})))

    def check_patterns(self, names: Iterable[str]) -> None:
        """Raise InputError for a pattern that matches none of the layer names."""
        names = list(names)
        for pattern in self.patterns:
            if not any(fnmatchcase(name, pattern) for name in names):
                raise unknown_name("layer that matches", pattern, names)

    def to_dict(self) -> dict[str, Any]:
        """JSON form, which `resolve_policy` takes: options stand beside `preset`; what is empty or default is not."""
        rest = {name: dict(getattr(self, name)) for name in ("roles", "patterns") if getattr(self, name)}
        classifier = {} if self.classifier == "linear" else {"classifier": self.classifier}
        return {"preset": self.preset, **self.options, **rest, **classifier}

    def _base(self) -> DeconvCfg:
        return preset(self.preset).override(self.options)


GUARDED = DeconvPolicy(options={"min_rows": 1.0, "start_corrected": True})
"""What lies under the preset 'paper' in converted networks: layers that see fewer rows than features are kept in
bounds, and evaluation is sound from the first step on."""


def resolve_policy(deconv: "str | Options | DeconvPolicy | None" = None) -> DeconvPolicy:
    """What `deconv=` means: a preset's name, a dictionary over a preset, or a policy; None is the default preset.

    A dictionary holds fields of `DeconvCfg` beside those of `DeconvPolicy`, as in
    `{'preset': 'paper', 'block': 16, 'roles': {'stem': {'n_iter': 15}}}`.
    """
    if deconv is None:
        return DeconvPolicy()
    if isinstance(deconv, DeconvPolicy):
        return deconv
    if isinstance(deconv, str):
        return DeconvPolicy(preset=deconv)
    if not isinstance(deconv, Mapping):
        raise InputError(f"deconv={deconv!r}: give a preset's name, a dictionary of options or a DeconvPolicy")
    own = {f.name for f in fields(DeconvPolicy)} - {"options"}
    known = own | {f.name for f in fields(DeconvCfg)}
    for name in deconv:
        if name not in known:
            raise unknown_name("whitening option", str(name), known)
    named = {name: value for name, value in deconv.items() if name in own}
    return DeconvPolicy(options={name: value for name, value in deconv.items() if name not in own}, **named)


def _merge(family: Mapping[str, Options | None], own: Mapping[str, Options | None]) -> dict[str, Options | None]:
    merged = dict(family)
    for name, options in own.items():
        before = merged.pop(name, None)  # popped so that the particular comes last
        merged[name] = None if options is None else {**(before or {}), **options}
    return merged
