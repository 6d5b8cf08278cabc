"""Published networks by every path of loading, with several versions of the Hub's client, on a local Hub.

A row is a network, a path and a client: the largest difference of an output to that of the tree's own folder, relative
to the largest output.
"""

import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import huggingface_hub
import timm
import torch
from torch import Tensor, nn

from timm_deconv.errors import InputError
from timm_deconv.hub.publish import Remote
from timm_deconv.hub.tree import Tree

from .rows import CONDITIONS, Row, conditions, rounded

__all__ = ["COLUMNS", "measure_here", "measure_with"]

COLUMNS = ["case", "model", "client", "path", "difference", *CONDITIONS]
ORGANISATION, TOKEN = "lab", "hf_local"


def measure_with(version: str, trees: Sequence[Path]) -> list[Row]:
    """Publish trees and load them in a process of its own, by a version of huggingface_hub that pip installs for it.

    Args:
        version: of the package; '' takes the one that is installed.
        trees: folders that `timm-deconv push --dry-run` wrote.

    Raises:
        InputError: the version cannot be had, or a path fails.
    """
    from tests.hub_server import hub
    from tests.hub_store import Store

    with tempfile.TemporaryDirectory() as place, hub(Store(users={TOKEN: [ORGANISATION]})) as endpoint:
        settings = {"HF_ENDPOINT": endpoint, "HF_TOKEN": TOKEN, "HF_HOME": str(Path(place, "home"))}
        settings |= {f"HF_HUB_DISABLE_{what}": "1" for what in ("XET", "TELEMETRY", "PROGRESS_BARS")}
        paths = [*([_installed(version, Path(place, "client"))] if version else []), *sys.path]
        command = [sys.executable, "-m", "benchmarks.hub_matrix", *map(str, trees)]
        environment = os.environ | settings | {"PYTHONPATH": os.pathsep.join(paths)}
        done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    if done.returncode:
        raise InputError(f"huggingface_hub {version}: {done.stderr.strip().splitlines()[-1]}")
    return json.loads(done.stdout.splitlines()[-1])


def measure_here(trees: Sequence[Path]) -> list[Row]:
    """Publish trees on the Hub that the environment names, and load them by every path."""
    return [row for tree in trees for row in _rows(tree)]


def _installed(version: str, folder: Path) -> str:
    pip = [sys.executable, "-m", "pip", "install", "--quiet"]
    command = [*pip, "--target", str(folder), f"huggingface_hub=={version}"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise InputError(f"no huggingface_hub {version} to be had: {done.stderr.strip().splitlines()[-1]}")
    return str(folder)


def _rows(folder: Path) -> list[Row]:
    name = json.loads((folder / "config.json").read_text())["architecture"]
    repository = f"{ORGANISATION}/{folder.name}"
    remote = Remote(repository)
    remote.check(name, private=False)
    commit, _ = remote.upload(Tree(folder, repository, name, None), private=False)
    reference = timm.create_model(f"local-dir:{folder}", pretrained=True).eval()
    images = _images(reference)
    with torch.no_grad():
        expected = reference(images)
    rows = []
    for path, load in _paths(repository, commit, folder).items():
        model = load().eval()
        with torch.no_grad():
            difference = float((model(images) - expected).abs().max() / expected.abs().max())
        client = huggingface_hub.__version__
        about = {"case": f"{folder.name}, {path}, {client}", "model": folder.name, "client": client, "path": path}
        rows.append({**about, "difference": rounded(difference), **conditions("cpu")})
    return rows


def _images(model: nn.Module) -> Tensor:
    size: Any = model.pretrained_cfg["input_size"]  # type: ignore[index, union-attr]
    return torch.randn(2, *size, generator=torch.Generator().manual_seed(0))


def _paths(repository: str, commit: str, folder: Path) -> dict[str, Callable[[], nn.Module]]:
    """Return the ways to load a tree, in this order: what is offline was downloaded before."""

    def snapshot() -> nn.Module:
        place = huggingface_hub.snapshot_download(repository, allow_patterns="folded/*")
        return timm.create_model(f"local-dir:{place}/folded", pretrained=True)

    def offline() -> nn.Module:
        huggingface_hub.constants.HF_HUB_OFFLINE = True
        try:
            return timm.create_model(f"hf-hub:{repository}@{commit}", pretrained=True)
        finally:
            huggingface_hub.constants.HF_HUB_OFFLINE = False

    names = {"hf-hub": f"hf-hub:{repository}", "hf-hub, pinned": f"hf-hub:{repository}@{commit}"}
    paths = {path: (lambda name=name: timm.create_model(name, pretrained=True)) for path, name in names.items()}
    if (folder / "folded").is_dir():
        folded = f"local-dir:{folder / 'folded'}"
        paths |= {"folded, local-dir": lambda: timm.create_model(folded, pretrained=True), "folded, hf-hub": snapshot}
    return {**paths, "offline": offline}


if __name__ == "__main__":
    print(json.dumps(measure_here([Path(argument) for argument in sys.argv[1:]])))
