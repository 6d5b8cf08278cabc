"""The files that go up of a network: weights to train on and folded ones, their configurations, card, run, checksums.

README.md  config.json  model.safetensors     timm.create_model('local-dir:TREE', pretrained=True)
folded/config.json  folded/model.safetensors  timm.create_model('local-dir:TREE/folded', pretrained=True): plain layers
recipe.yaml  results.csv  curve.csv  curve.png
.eval_results/DATASET.yaml                    where the Hub has the data set
SHA256SUMS                                    of all the others
"""

import csv
import hashlib
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from timm.models._hub import save_config_for_hf
from torch import nn

from timm_deconv.atomic_io import write_whole
from timm_deconv.convert import fuse
from timm_deconv.errors import InputError
from timm_deconv.models.checksums import CHECKSUMS
from timm_deconv.models.weights import write_weights
from timm_deconv.resources import code_version
from timm_deconv.training.checkpoint import run_metadata

from .card import eval_results, model_card
from .curve import draw_curve
from .measure import Measured, check_outputs
from .origins import PAPER
from .source import Source

__all__ = ["Tree", "checked_forms", "checksums", "write_tree"]


@dataclass(frozen=True)
class Tree:
    """Files to go up.

    Attributes:
        folder: that holds them.
        repository: ORGANISATION/NAME.
        architecture: the network's, by which a repository is known.
        measured: what an evaluation found; None without one.
    """

    folder: Path
    repository: str
    architecture: str
    measured: Measured | None

    def files(self) -> list[str]:
        """List the files, as paths below the folder, sorted."""
        found = (path for path in self.folder.rglob("*") if path.is_file())
        return sorted(path.relative_to(self.folder).as_posix() for path in found)

    def sizes(self) -> dict[str, int]:
        """Return the files with their bytes."""
        return {name: (self.folder / name).stat().st_size for name in self.files()}


def checked_forms(source: Source) -> dict[str, nn.Module]:
    """Return the network by the folder that it goes into: as it is in the top one, with plain layers in folded/.

    Raises:
        InputError: outputs are not finite, or other ones where it is folded.
    """
    folded = {"folded": fuse(source.model)} if source.whitened else {}
    check_outputs(source.model, folded.get("folded"))
    return {"": source.model, **folded}


def write_tree(
    source: Source, forms: Mapping[str, nn.Module], repository: str, folder: Path, measured: Measured | None
) -> Tree:
    """Write the files into a new folder, all of them or none.

    Args:
        source: the network.
        forms: from `checked_forms`.
        repository: ORGANISATION/NAME, which the card names.
        folder: is made; an empty one may be there.
        measured: what an evaluation found.

    Raises:
        InputError: the folder has no room, or cannot be made.
    """
    tree = Tree(folder, repository, source.architecture, measured)
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        write_whole(folder, lambda partial: _fill(partial, source, forms, tree))
    except (OSError, SafetensorError) as error:
        cause = " ".join(str(error).split())
        way_out = "make room, or name another place (--output, TMPDIR)"
        raise InputError(f"{folder} could not be written ({cause}): {way_out}") from None
    return tree


def _check_room(source: Source, folder: Path) -> None:
    needed = 2 * (source.folder / "model.safetensors").stat().st_size + 2**20
    if (free := shutil.disk_usage(folder).free) < needed:
        raise OSError(f"{free / 1e6:.0f} MB are free, and {needed / 1e6:.0f} are needed")


def _fill(folder: Path, source: Source, forms: Mapping[str, nn.Module], tree: Tree) -> None:
    folder.mkdir()
    _check_room(source, folder)
    run = {"commit": code_version()} if source.recipe is None else run_metadata(source.recipe)
    metadata = {**run, **source.metadata}
    config = _configuration(source, tree)
    for name, model in forms.items():
        place = folder / name
        place.mkdir(exist_ok=True)
        write_weights(model, place / "model.safetensors", metadata)
        save_config_for_hf(model, str(place / "config.json"), model_config=config)
    if source.recipe is not None:
        _write_run(folder, source)
    for name, text in eval_results(source, tree.measured).items():
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_text(text)
    (folder / "README.md").write_text(str(model_card(source, tree.repository, tree.measured)), encoding="utf-8")
    (folder / CHECKSUMS).write_text(checksums(folder))


def _configuration(source: Source, tree: Tree) -> dict[str, Any]:
    """Return what timm's config.json says beyond what the network itself knows."""
    cfg: Any = source.model.pretrained_cfg
    own = cfg.get("paper_ids") or ()
    papers = [own] if isinstance(own, str) else [*own]
    described = {
        "tag": source.tag,
        "license": cfg.get("license") or "unknown",
        "origin_url": cfg.get("origin_url") or source.carried_from or f"https://huggingface.co/{tree.repository}",
        "paper_ids": [*papers, *([PAPER] if source.whitened and PAPER not in papers else [])],
    }
    names = tree.measured.class_names if tree.measured and source.recipe else ()
    if not cfg.get("label_names") and len(names) == source.model.num_classes:  # as older runs did not name them
        described["label_names"] = list(names)
    return {"pretrained_cfg": described}


def _write_run(folder: Path, source: Source) -> None:
    assert source.recipe is not None
    (folder / "recipe.yaml").write_text(source.recipe.yaml())
    for name, rows in (("results.csv", [source.result]), ("curve.csv", source.curve)):
        with open(folder / name, "w", newline="") as file:
            writer = csv.DictWriter(file, rows[0], lineterminator="\n")
            writer.writeheader()
            writer.writerows(rows)
    draw_curve(source.curve, folder / "curve.png")


def checksums(folder: Path) -> str:
    """Return the SHA-256 of every file below the folder, as sha256sum writes them."""
    files = sorted(path for path in folder.rglob("*") if path.is_file() and path.name != CHECKSUMS)
    digests = ((hashlib.sha256(path.read_bytes()).hexdigest(), path.relative_to(folder)) for path in files)
    return "".join(f"{digest}  {path.as_posix()}\n" for digest, path in digests)
