"""DeconvPolicy: the table of which layer of a network is whitened how, by role and by name."""

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import asdict, dataclass, field, fields, replace
from fnmatch import fnmatchcase
from typing import Any, Literal, get_args

from timm_deconv.errors import InputError, unknown_name
from timm_deconv.layers import DeconvCfg
from timm_deconv.layers.config import layered
from timm_deconv.layers.presets import LINEAR_AS_CONV, PRESET_VERSION, PRESETS, find_preset, frozen

__all__ = [
    "DEFAULT_PRESET",
    "SMALL_BATCH_DEFAULTS",
    "ClassifierKind",
    "DeconvPolicy",
    "Role",
    "as_saved",
    "resolve_policy",
]

Role = Literal[
    "stem", "pointwise", "spatial", "block_end", "depthwise", "grouped", "squeeze_excite", "linear", "classifier"
]
ClassifierKind = Literal["linear", "plain"]
Options = Mapping[str, Any]
DEFAULT_PRESET = "fast"


@dataclass(frozen=True, kw_only=True)
class DeconvPolicy:
    """Whitening options of every layer of a network.

    From the weakest to the strongest: the preset; its settings by role (under 'paper', those published of the family);
    then `options`, `roles` and `patterns`. The later wins, and what is not written here never overrules what is.
    Linear layers have no layout and no sampling: `options` change neither in those that a network holds as
    convolutions, roles and patterns do.

    Attributes:
        preset: name of the configuration to start from.
        options: fields of `DeconvCfg` for all layers that are whitened.
        roles: role -> fields for the layers of that role, or None to leave them plain. Roles: stem (first convolution),
            classifier (last layer), squeeze_excite, depthwise, grouped, block_end (last convolution of a residual
            branch or dense layer), pointwise (other 1x1), spatial (other convolutions), linear (hidden ones). The
            preset 'fast' leaves squeeze_excite plain, whatever `options` say; `{'squeeze_excite': {}}` whitens it.
            Hidden linear layers of networks with other norms than batch norm, such as transformer blocks, are whitened
            only if this role is named or a pattern has fields for them.
        patterns: shell pattern of layer names ('layer4.*') -> fields, or None to leave the layers plain. Fields whiten
            layers whose role is plain, too. A pattern that matches no layer is an error.
        classifier: 'linear' whitens the classifier's input features; 'plain' leaves it as it is.
        version: of the saved form that this was read from; None for what is written today. Version 1, of configurations
            without a number, let the preset's roles win over `options`; `updated` says the same in today's order.
        beneath: what holds where this is silent; None until a network is converted (see `over_published`).

    Raises:
        InputError: an unknown name, with the nearest known ones, or a value that makes no sense.
    """

    preset: str = DEFAULT_PRESET
    options: Options = field(default_factory=dict)
    roles: Mapping[str, Options | None] = field(default_factory=dict)
    patterns: Mapping[str, Options | None] = field(default_factory=dict)
    classifier: ClassifierKind = "linear"
    version: int | None = field(default=None, compare=False)
    beneath: "DeconvPolicy | None" = None

    def __post_init__(self) -> None:
        for name in ("options", "roles", "patterns"):
            if not isinstance(getattr(self, name), Mapping):
                raise InputError(f"{name}={getattr(self, name)!r}: must be a dictionary")
            object.__setattr__(self, name, frozen(getattr(self, name)))
        if isinstance(self.beneath, Mapping):
            object.__setattr__(self, "beneath", resolve_policy(self.beneath))
        general = asdict(find_preset(self.preset).cfg)
        layered(general, self.options)
        for role in self.roles:
            if role not in get_args(Role):
                raise unknown_name("role", str(role), get_args(Role))
        for pattern in self.patterns:
            if not isinstance(pattern, str):
                raise InputError(f"pattern {pattern!r}: must be a string, matched against layer names")
        for name, options in (*self.roles.items(), *self.patterns.items()):
            if not isinstance(options, Mapping | None):
                raise InputError(f"{name!r}: {options!r}: must be a dictionary, or None to leave the layers plain")
            layered(general, self.options, options or {})
        if self.classifier not in get_args(ClassifierKind):
            raise unknown_name("classifier", str(self.classifier), get_args(ClassifierKind))
        known = range(1, PRESET_VERSION + 1)
        if self.version is not None and (type(self.version) is not int or self.version not in known):
            raise InputError(
                f"version={self.version!r}: must be 1 to {PRESET_VERSION}; a later timm_deconv may know others"
            )

    def __reduce__(self) -> tuple[Any, ...]:
        return _rebuilt, ({f.name: _thawed(getattr(self, f.name)) for f in fields(self)},)

    def cfg(self, name: str, role: Role, *, linear_as_conv: bool = False) -> DeconvCfg | None:
        """Return the configuration of a layer; None if it stays plain.

        Args:
            name, role: the layer's.
            linear_as_conv: the layer is a linear layer that the network holds as a convolution: it is whitened as a
                linear layer is, in runs of features and from every sample, unless its role or a pattern says otherwise.
        """
        fixed = LINEAR_AS_CONV if linear_as_conv else {}
        start = {**asdict(find_preset(self.preset).cfg), **fixed}
        options = [{k: v for k, v in level.options.items() if k not in fixed} for level in self._levels()]
        general = [start, *options]
        chosen: list[Options] | None = [start]
        for level, of_all in zip(self._levels(), options, strict=True):
            if chosen is not None:
                chosen.append(of_all)
            for particular in level._particular(name, role):
                chosen = None if particular is None else [*(chosen or general), particular]
        return None if chosen is None else layered(*chosen)

    def names(self, name: str, role: Role) -> bool:
        """Tell whether there are fields for a layer's role, or for a pattern that it matches."""
        particular = (options for level in self._levels() for options in level._particular(name, role))
        return any(options is not None for options in particular)

    def over(self, family: "DeconvPolicy") -> "DeconvPolicy":
        """Merge both into one table, in which this policy's options, roles and patterns win over the family's."""
        return replace(
            self,
            options={**family.options, **self.options},
            roles=_merge(family.roles, self.roles),
            patterns=_merge(family.patterns, self.patterns),
        )

    def over_published(self, family: "DeconvPolicy") -> "DeconvPolicy":
        """Return this policy with what lies beneath it, unless something does already.

        That is what is published of a family or, under another preset than 'paper', what the preset says of roles.
        """
        if self.beneath is not None:
            return self
        return replace(self.updated(family), beneath=self._published(family))

    def updated(self, family: "DeconvPolicy") -> "DeconvPolicy":
        """Return a policy that says in today's order and presets what this one said in the version that saved it.

        In version 1 what the preset or the family says of roles and patterns won over `options`; where they meet, it is
        written out among this policy's own.
        """
        if self.version is None or self.version == PRESET_VERSION or self.beneath is not None:
            return self
        below = self._published(family)
        said = {key for table in (below.roles, below.patterns) for part in table.values() for key in part or {}}
        meet = said & self.options.keys() or (below.patterns and (self.roles or self.patterns))
        own = self.over(replace(below, options={})) if self.version == 1 and meet else self
        differing = [part for version, part in find_preset(self.preset).earlier.items() if self.version <= version]
        options = {key: value for part in (*differing, self.options) for key, value in part.items()}
        return replace(own, options=options, version=PRESET_VERSION)

    def check_patterns(self, names: Iterable[str]) -> None:
        """Raise InputError for a pattern that matches none of the layer names."""
        names = list(names)
        for pattern in self.patterns:
            if not any(fnmatchcase(name, pattern) for name in names):
                raise unknown_name("layer that matches", pattern, names)

    def to_dict(self) -> dict[str, Any]:
        """Return the JSON form that `resolve_policy` takes, options beside `preset`, without what is default."""
        rest = {name: _thawed(getattr(self, name)) for name in ("roles", "patterns") if getattr(self, name)}
        classifier = {} if self.classifier == "linear" else {"classifier": self.classifier}
        beneath = {} if self.beneath is None else {"beneath": self.beneath.to_dict()}
        version = self.version or PRESET_VERSION
        return {"version": version, "preset": self.preset, **self.options, **rest, **classifier, **beneath}

    def _levels(self) -> "list[DeconvPolicy]":
        """Return the policy and what lies beneath it, the weakest first."""
        return [*(self.beneath._levels() if self.beneath else []), self]

    def _particular(self, name: str, role: Role) -> Iterator[Options | None]:
        """Yield what is said of a layer by its role and its name, the weakest first."""
        if role in self.roles:
            yield self.roles[role]
        yield from (options for pattern, options in self.patterns.items() if fnmatchcase(name, pattern))

    def _published(self, family: "DeconvPolicy") -> "DeconvPolicy":
        chosen = find_preset(self.preset)
        return (
            replace(family, preset=self.preset)
            if chosen.published
            else DeconvPolicy(preset=self.preset, roles=chosen.roles)
        )


SMALL_BATCH_DEFAULTS = DeconvPolicy(preset="paper", options=PRESETS["paper"].guard)
"""What lies under the preset 'paper' in converted networks."""


def resolve_policy(deconv: "str | Options | DeconvPolicy | None" = None) -> DeconvPolicy:
    """Resolve `deconv=`: a preset's name, a dictionary over a preset, or a policy; None is the default preset.

    A dictionary holds fields of `DeconvCfg` beside those of `DeconvPolicy`, as in
    `{'preset': 'paper', 'block': 16, 'roles': {'stem': {'n_iter': 15}}}`.

    Raises:
        InputError: an unknown name, with the nearest known ones, or a value that makes no sense.
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


def as_saved(deconv: Any, saved: Mapping[str, Any] | None) -> Any:
    """Return `deconv` as an entry point gets it, with the version of the configuration file that it comes from.

    Args:
        deconv: what the network is to be made by.
        saved: arguments of the network in the file that its weights are loaded from; None where there is no file. What
            differs from them was given by the user.
    """
    if saved is None or "deconv" not in saved or deconv != saved["deconv"]:
        return deconv
    policy = resolve_policy(deconv)
    return replace(policy, version=policy.version or 1)


def _merge(family: Mapping[str, Options | None], own: Mapping[str, Options | None]) -> dict[str, Options | None]:
    merged = dict(family)
    for name, options in own.items():
        before = merged.pop(name, None)  # popped so that the particular comes last
        merged[name] = None if options is None else {**(before or {}), **options}
    return merged


def _thawed(value: Any) -> Any:
    """Return a plain copy of a frozen dictionary, and of those in it; other values as they are."""
    return {key: _thawed(part) for key, part in value.items()} if isinstance(value, Mapping) else value


def _rebuilt(values: dict[str, Any]) -> DeconvPolicy:
    return DeconvPolicy(**values)
