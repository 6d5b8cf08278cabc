"""The zoo: what is known of every network whose weights were made by this project, from `hub_configs/`.

An entry is a file ARCHITECTURE.TAG.yaml. Its weights are a file of the package or the checkout, or on the Hub.
"""

import re
from collections.abc import Mapping
from dataclasses import MISSING, asdict, dataclass, field, fields
from functools import cache
from importlib.resources.abc import Traversable
from pathlib import Path
from types import UnionType
from typing import Any, get_origin

import yaml

from timm_deconv.errors import InputError, unknown_name
from timm_deconv.resources import entry_files, weights_file

__all__ = ["LOCAL", "PUBLISHED", "RunResult", "WeightsFile", "ZooEntry", "entries", "parse_entry"]

LOCAL = ("packaged", "weights")
"""Folders of `hub_configs/` that may hold an entry's file; the first comes with the wheel."""
PUBLISHED = {"training": "model.safetensors", "folded": "folded/model.safetensors"}
"""Files of a published repository: with whitening, to go on training, and without, for inference."""

NAME = re.compile(r"[a-z0-9]\w*")


@dataclass(frozen=True, kw_only=True)
class WeightsFile:
    """What identifies a file of weights.

    Attributes:
        sha256: of its bytes.
        size: in bytes.
    """

    sha256: str
    size: int

    def __post_init__(self) -> None:
        if not re.fullmatch(r"[0-9a-f]{64}", self.sha256):
            raise InputError(f"sha256={self.sha256!r}: must be 64 hexadecimal digits")
        if self.size < 1:
            raise InputError(f"size={self.size}: a file of weights has bytes")


@dataclass(frozen=True, kw_only=True)
class RunResult:
    """The row of the run that made the weights, and what it says.

    Attributes:
        file: its CSV file in `hub_configs/results`.
        row: columns and texts that are this row's alone.
        figures: columns and numbers of the same row.
    """

    file: str
    row: Mapping[str, str]
    figures: Mapping[str, float]


@dataclass(frozen=True, kw_only=True)
class ZooEntry:
    """A network with weights of this project.

    Attributes:
        architecture: its name in timm's registry.
        tag: its weights' name. `nd_*` were trained with deconvolution, `bn_*` transferred from batch norm; those of a
            batch-norm network have no prefix.
        license: of the weights.
        origin: how they came about, in one line.
        dataset: what they were trained on.
        dataset_license: what its licence allows, in one line.
        recipe: name of the recipe they were trained by; None where this project did not train them.
        settings: of the recipe, where the run's differ.
        seed, recipe_hash: of the run.
        results: of the run; None where there is none, and then no number.
        model_args: arguments of `timm.create_model` that make the network.
        pretrained_cfg: fields of timm's configuration that the run decides, such as `input_size` and `num_classes`.
        label_names: of the classes, in their order.
        paper_ids: as timm writes them, 'arXiv:1905.11946'.
        hf_hub_id: its repository, with a revision where it is pinned ('org/name@revision'); None if not published.
        files: by LOCAL folder or PUBLISHED form.
    """

    architecture: str
    tag: str
    license: str
    origin: str
    dataset: str
    dataset_license: str
    recipe: str | None = None
    settings: Mapping[str, Any] = field(default_factory=dict)
    seed: int | None = None
    recipe_hash: str | None = None
    results: RunResult | None = None
    model_args: Mapping[str, Any] = field(default_factory=dict)
    pretrained_cfg: Mapping[str, Any] = field(default_factory=dict)
    label_names: tuple[str, ...] = ()
    paper_ids: tuple[str, ...] = ()
    hf_hub_id: str | None = None
    files: Mapping[str, WeightsFile] = field(default_factory=dict)

    def __post_init__(self) -> None:
        for what in ("architecture", "tag"):
            if not NAME.fullmatch(getattr(self, what)):
                raise InputError(f"{what}={getattr(self, what)!r}: letters, digits and _ make a name")
        if (self.recipe is None) != (self.recipe_hash is None) or (self.recipe is None) != (self.seed is None):
            raise InputError("recipe, seed and recipe_hash are those of one run: give all of them, or none")
        if self.results is not None and self.recipe is None:
            raise InputError("results are of a run: name its recipe, seed and recipe_hash")
        for kind in self.files:
            if kind not in (*LOCAL, *PUBLISHED):
                raise unknown_name("kind of file", kind, (*LOCAL, *PUBLISHED))

    @property
    def name(self) -> str:
        """The name by which timm creates the network with these weights."""
        return f"{self.architecture}.{self.tag}"

    def local_file(self) -> tuple[Path, WeightsFile] | None:
        """Find the file of the package or the checkout, and what identifies it; None where there is none."""
        for folder in LOCAL:
            path = weights_file(folder, f"{self.name}.safetensors") if folder in self.files else None
            if path is not None:
                return path, self.files[folder]
        return None

    def timm_cfg(self) -> dict[str, Any]:
        """Return the fields of timm's `PretrainedCfg` that these weights decide."""
        local = self.local_file()
        described = {
            "file": str(local[0]) if local else None,
            "hf_hub_id": self.hf_hub_id,
            "license": self.license,
            "paper_ids": self.paper_ids or None,
            "label_names": self.label_names or None,
            "notes": (f"{self.name}: {self.origin}", self.dataset_license),  # true of what is made of them, too
        }
        return {**self.pretrained_cfg, **{key: value for key, value in described.items() if value is not None}}

    def to_dict(self) -> dict[str, Any]:
        """Return what `parse_entry` reads, without what is default."""
        return {key: _plain(value) for key, value in asdict(self).items() if value not in (None, {}, ())}


@cache
def entries() -> Mapping[str, ZooEntry]:
    """Read the zoo: entries by ARCHITECTURE.TAG.

    Raises:
        InputError: an entry that cannot be used; names its file.
    """
    return {name: read_entry(name, file) for name, file in entry_files().items()}


def read_entry(name: str, file: Traversable) -> ZooEntry:
    """Read an entry's file; see `entries`."""
    try:
        entry = parse_entry(yaml.load(file.read_text(encoding="utf-8"), Loader=_LOADER))
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise InputError(f"{file.name}: not YAML: {' '.join(str(error).split())}") from None
    except InputError as error:
        raise InputError(f"{file.name}: {error}") from None
    if entry.name != name:
        raise InputError(f"{file.name}: holds {entry.name}; name the file by it")
    return entry


_LOADER = getattr(yaml, "CSafeLoader", yaml.SafeLoader)


def parse_entry(values: Any) -> ZooEntry:
    """Return the entry of what a YAML file holds.

    Raises:
        InputError: an unknown key (with the nearest known one), a missing one, or a value that makes no sense.
    """
    return _parsed(ZooEntry, values, "the file")


def _parsed(cls: type, values: Any, where: str) -> Any:
    if not isinstance(values, Mapping):
        raise InputError(f"{where} is no mapping of keys to values")
    known = {each.name: each for each in fields(cls)}
    for key in values:
        if key not in known:
            raise unknown_name(f"key of {where}", str(key), known)
    for key, each in known.items():
        if key not in values and each.default is MISSING and each.default_factory is MISSING:
            raise InputError(f"{where} has no {key}; add it")
    return cls(**{key: _value(key, value, known[key].type) for key, value in values.items()})


def _value(key: str, value: Any, annotation: Any) -> Any:
    """Check a value against a field's annotation, and turn what YAML made of it into that."""
    if key == "results":
        return _parsed(RunResult, value, key)
    if isinstance(annotation, UnionType):  # with None, which is said by leaving the key out
        annotation = annotation.__args__[0]
    wanted = get_origin(annotation) or annotation
    if wanted is tuple:
        if not isinstance(value, list) or not all(isinstance(part, str) for part in value):
            raise InputError(f"{key}={value!r}: must be a list of texts")
        return tuple(value)
    if not isinstance(value, wanted) or isinstance(value, bool):
        raise InputError(f"{key}={value!r}: must be a {'mapping' if wanted is Mapping else wanted.__name__}")
    if key == "files":
        return {kind: _parsed(WeightsFile, each, f"files.{kind}") for kind, each in value.items()}
    return value


def _plain(value: Any) -> Any:
    """Return a value as YAML holds it."""
    if isinstance(value, Mapping):
        return {key: _plain(part) for key, part in value.items()}
    return [_plain(part) for part in value] if isinstance(value, tuple | list) else value
