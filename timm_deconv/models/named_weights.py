"""Weights by a registered name: which there are, where they are, and what else the network is made with."""

import difflib
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

from huggingface_hub import hf_hub_download
from timm.models import PretrainedCfg, get_arch_pretrained_cfgs, get_pretrained_cfg
from timm.models._hub import hf_split

from timm_deconv.errors import InputError

from .weights import SOURCES, TAG_PREFIX, check_sha256
from .zoo import PUBLISHED, ZooEntry, entries

__all__ = ["entry_cfgs", "named_weights", "without_weights"]

OF_AN_ENTRY = ("file", "hf_hub_id", "label_names", "notes", "tag")
"""Fields of timm's configuration that say nothing of a network with other weights."""
ANY_NETWORK = ("deconv", "segmenter")
"""Names that say nothing of the network."""
RECIPES = {10: "cifar10_e20", 100: "cifar100_e20", 1000: "imagenet_e90", 21: "cityscapes_e30"}
"""By number of classes: the recipe that trains such a network."""


def entry_cfgs(architecture: str, shared: Mapping[str, Any]) -> Iterator[tuple[str, dict[str, Any]]]:
    """Yield ARCHITECTURE.TAG and timm's configuration of the zoo's entries of a network, 'nd_' tags first.

    Args:
        architecture: the network.
        shared: its default_cfg.
    """
    own = [entry for entry in entries().values() if entry.architecture == architecture]
    for entry in sorted(own, key=lambda entry: (entry.tag.startswith(TAG_PREFIX), entry.tag)):
        yield entry.name, {**shared, **entry.timm_cfg()}


def named_weights(
    architecture: str, arguments: Mapping[str, Any], source: str | None = None, *, pretrained: bool
) -> dict[str, Any]:
    """Complete `timm.create_model`'s arguments, where they name weights, by what an entry of the zoo says.

    Args:
        architecture: the network.
        arguments: `pretrained_cfg` (the weights' tag) and `pretrained_cfg_overlay` among them. Where these name weights
            by themselves, as for a saved or published network, nothing changes.
        source: the batch-norm network, whose entries the 'bn_' tags are of.
        pretrained: the weights are asked for, by default those of the network's first tag; else a tag alone counts, and
            says how the network is made.

    Returns:
        The arguments, with what the network of these weights is made with where they do not say it; if the weights are
        asked for with their tag and their file, whose checksum was verified.

    Raises:
        InputError: no such tag, or it has no weights here: the message says which have some, and how to train one. Or
            the file is another one.
    """
    tag, overlay = arguments.get("pretrained_cfg"), arguments.get("pretrained_cfg_overlay") or {}
    if (tag and not isinstance(tag, str)) or any(overlay.get(key) for key in SOURCES):
        return dict(arguments)
    cfg = _registered(architecture, tag) if tag or pretrained else None
    if pretrained and (cfg is None or not cfg.has_weights):
        raise InputError(_no_weights(architecture, tag, cfg))
    entry = _entry(architecture, cfg.tag, source) if cfg else None
    if cfg is None or entry is None:
        return dict(arguments)
    given = {key: value for key, value in arguments.items() if value is not None}
    saved = dict(entry.model_args)
    completed = {**saved, **given, "pretrained_model_args": saved, "pretrained_cfg": cfg.tag}
    file = _checked_file(entry, arguments.get("cache_dir")) if pretrained else None
    return completed if file is None else {**completed, "pretrained_cfg_overlay": {**overlay, "file": str(file)}}


def without_weights(cfg: Mapping[str, Any], source: str | None = None) -> dict[str, Any]:
    """Return the configuration of a network that was made without weights, without what an entry says of its own.

    Args:
        cfg: timm's configuration, of the weights that the network would have had.
        source: the batch-norm network.
    """
    if _entry(cfg.get("architecture"), cfg.get("tag"), source) is None:
        return dict(cfg)
    return {key: value for key, value in cfg.items() if key not in OF_AN_ENTRY}


def _entry(architecture: str | None, tag: str | None, source: str | None) -> ZooEntry | None:
    """Find the entry of a tag; that of a 'bn_' tag may be the batch-norm network's."""
    own = entries().get(f"{architecture}.{tag}")
    if own is None and source and tag:
        return entries().get(f"{source}.{tag.removeprefix(TAG_PREFIX)}")
    return own


def _registered(architecture: str, tag: str | None) -> PretrainedCfg | None:
    try:
        return get_pretrained_cfg(f"{architecture}.{tag}" if tag else architecture)
    except RuntimeError:  # an unknown tag
        return None


def _checked_file(entry: ZooEntry, cache_dir: str | Path | None) -> Path | None:
    """Find an entry's file here, or download the one that is published, and verify it; None where nothing is known."""
    if local := entry.local_file():
        path, known = local
        check_sha256(path, known.sha256, "get it again, by git checkout or pip install --force-reinstall timm-deconv")
        return path
    if entry.hf_hub_id is None or "training" not in entry.files:
        return None
    repository, revision = hf_split(entry.hf_hub_id)
    path = Path(hf_hub_download(repository, PUBLISHED["training"], revision=revision, cache_dir=cache_dir))
    check_sha256(path, entry.files["training"].sha256, f"remove {path} and download it again")
    return path


# What to do where there are none


def _no_weights(architecture: str, tag: str | None, cfg: PretrainedCfg | None) -> str:
    what = f"{architecture}.{tag}" if tag else architecture
    entry = entries().get(what)
    if entry is not None and entry.files:
        reason = f"the weights of {what} are not here: they lie in hub_configs/weights of a checkout"
    elif cfg is None:
        reason = f"{architecture} has no tag {tag!r}"
    else:
        reason = f"there are no weights of {what}"
    return f"{reason}; {_with_weights(architecture)}; {_training(architecture, entry)}"


def _with_weights(architecture: str) -> str:
    """Name what has weights: other tags of the network, else networks of similar names."""
    own = [name for name, cfg in get_arch_pretrained_cfgs(architecture).items() if cfg.has_weights]
    if own:
        return f"tags that have some: {', '.join(own)}"
    names = [name for name, entry in entries().items() if entry.local_file() or entry.hf_hub_id]
    return f"networks of the zoo that have some: {', '.join(_nearest(architecture, names)) or 'none yet'}"


def _nearest(architecture: str, names: Iterable[str]) -> list[str]:
    return difflib.get_close_matches(architecture, list(names), n=3, cutoff=0.0)


def _training(architecture: str, entry: ZooEntry | None) -> str:
    if architecture in ANY_NETWORK:
        return "or take a batch-norm network's: timm-deconv convert NETWORK OUTPUT"
    if entry is not None and entry.recipe is None:
        source = architecture.removesuffix("_deconv")
        return f"or carry batch norm's over: timm-deconv convert {source} OUTPUT --calibrate PHOTOGRAPHS"
    cfg = get_pretrained_cfg(architecture)
    recipe = entry.recipe if entry and entry.recipe else RECIPES.get(cfg.num_classes if cfg else 0, "imagenet_e90")
    return f"or train it: timm-deconv train {recipe} --model {architecture} --data-dir DIR"
