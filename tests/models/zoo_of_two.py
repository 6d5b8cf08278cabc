"""A zoo of a made-up network and its twin, `zoo18_deconv` and `zoo18`, in a folder of its own."""

import hashlib
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import timm
import yaml
from timm.models import _registry as registry
from timm.models.resnet import BasicBlock
from torch import nn

import timm_deconv
from timm_deconv import resources
from timm_deconv.convert.module_types import is_whitened
from timm_deconv.models import registration, zoo
from timm_deconv.models.resnet import CifarResNet
from timm_deconv.models.weights import write_weights

SHAPE: dict[str, Any] = {"block": BasicBlock, "layers": (1, 1, 1, 1), "width": 0.125}
OTHERS: dict[str, Any] = {
    "license": "apache-2.0",
    "origin": "made up",
    "dataset": "cifar10",
    "dataset_license": "research only",
    "label_names": [f"class {index}" for index in range(10)],
}


def network(form: str = "_deconv", **options: Any) -> nn.Module:
    """A network of the made-up one's shape by a name that timm knows, whatever the zoo."""
    shape = {key: value for key, value in SHAPE.items() if key != "block"}
    return timm.create_model(f"resnet18_025_cifar{form}", **shape, **options)


def add(configs: Path, name: str, model: nn.Module | None, folder: str = "packaged", **differing: Any) -> Path:
    """Write the entry NAME and, unless there is no model, its weights; return where these are, or would be."""
    file = configs / folder / f"{name}.safetensors"
    files = {}
    if model is not None:
        file.parent.mkdir(parents=True, exist_ok=True)
        write_weights(timm_deconv.fuse(model) if is_whitened(model) else model, file, half=True)
        digest = hashlib.sha256(file.read_bytes()).hexdigest()
        files = {folder: {"sha256": digest, "size": file.stat().st_size}}
    architecture, _, tag = name.partition(".")
    entry = {"architecture": architecture, "tag": tag, **OTHERS, "files": files, **differing}
    configs.mkdir(exist_ok=True)
    (configs / f"{name}.yaml").write_text(yaml.safe_dump(entry))
    return file


@contextmanager
def registered(configs: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Register the made-up networks by the entries in `configs`; afterwards timm has forgotten them."""
    tables = [table for table in vars(registry).values() if isinstance(table, dict | set)]
    before = [table.copy() for table in tables]
    names = list(registration._deconv_names)
    monkeypatch.setattr(resources, "checkout_configs", lambda: configs)
    zoo.entries.cache_clear()
    sys.modules["zoo_of_two"] = ModuleType("zoo_of_two")
    try:
        registration.register_family(
            "zoo_of_two",
            CifarResNet,
            {"zoo18": SHAPE},
            registration.CIFAR_POLICY,
            cfg=registration.cifar_cfg(first_conv="conv1", classifier="fc", paper_ids="arXiv:1512.03385"),
            feature_cfg={},
            in_place=True,
        )
        yield
    finally:
        del sys.modules["zoo_of_two"]
        registration._deconv_names[:] = names
        for table, content in zip(tables, before, strict=True):
            table.clear()
            table.update(content)
        zoo.entries.cache_clear()
