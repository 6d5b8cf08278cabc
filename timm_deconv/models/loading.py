"""Networks with their weights, by what a user names: a folder of a run, a repository of the Hub, a name of timm."""

import difflib
import json
import re
import textwrap
from pathlib import Path

import timm
from safetensors import SafetensorError
from torch import nn

from timm_deconv.errors import InputError, unknown_name

from .pretrained import create_batch_norm
from .registration import list_models

__all__ = ["load_network"]

HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.@-]*")


def load_network(name: str, *, weights: bool = True) -> nn.Module:
    """Load a network by the output folder of a run, a Hub id (`org/name`) or a name that timm knows.

    Args:
        name: of the network.
        weights: load them; else the network is made as they need it, without them. A name without a tag means the
            default weights.

    Raises:
        InputError: no such folder, name or repository (with the nearest names), or timm knows no weights for the name.
    """
    if Path(name).is_dir():
        if not (Path(name) / "config.json").exists():
            raise InputError(f"{name} holds no config.json: no run of ours, or no epoch is finished yet")
        return _saved_network(Path(name), weights)
    if ":" in name or "/" in name:
        return _load_from(name if ":" in name else f"hf-hub:{_hub_id(name)}", weights)
    if not timm.is_model(name):
        raise unknown_name("model or folder", name, timm.list_models())
    return _load_from(name, weights)


def _saved_network(folder: Path, weights: bool) -> nn.Module:
    try:
        return timm.create_model(f"local-dir:{folder.resolve()}", pretrained=weights)
    except (SafetensorError, json.JSONDecodeError, KeyError, RuntimeError) as error:
        reason = textwrap.shorten(f"{type(error).__name__} {error}", 200, placeholder=" ...")
        raise InputError(f"{folder} is damaged ({reason}); resume the run, or take another of its folders") from error


def _hub_id(name: str) -> str:
    """Return the name if it can be no mistyped folder: it has two parts, the first of which is no folder here."""
    path = Path(name)
    if HUB_ID.fullmatch(name) and not path.parent.is_dir():
        return name
    missing = next((part for part in (*reversed(path.parents), path) if not part.exists()), path)
    beside = sorted(entry.name for entry in missing.parent.iterdir() if entry.is_dir())
    nearest = difflib.get_close_matches(missing.name, beside, n=3, cutoff=0.5)
    hint = f"; nearest: {', '.join(nearest)}" if nearest else ""
    raise InputError(f"no folder {name}{hint} (a repository of the Hub is named hf-hub:ORG/NAME)")


def _load_from(name: str, weights: bool) -> nn.Module:
    try:
        if weights and timm.is_model(name) and name.partition(".")[0] not in list_models():
            return create_batch_norm(name)  # whose weights may be those of an installed package
        cfg = timm.get_pretrained_cfg(name) if timm.is_model(name) else None
        return timm.create_model(name, pretrained=weights, pretrained_cfg=cfg and cfg.tag)
    except InputError:
        raise
    except (OSError, RuntimeError, AssertionError, ValueError) as error:  # which the errors of the Hub's client are too
        reason = textwrap.shorten(f"{type(error).__name__} {error}", 200, placeholder=" ...")
        known = "its weights are on the Hub: look at the network, or give a folder that holds them"
        hint = known if timm.is_model(name) else "is it the folder of a run, or ORG/NAME of the Hub?"
        raise InputError(f"{name} cannot be had ({reason}); {hint}") from error
