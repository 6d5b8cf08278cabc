"""A file of weights is read as timm reads it, by name or by order, or refused in one line."""

import copy
import pickle
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from safetensors.torch import save_file
from timm.models import save_for_hf
from torch import nn

import timm_deconv
from tests.models.batch_norm_networks import NARROW, difference, randomised
from timm_deconv.errors import InputError
from timm_deconv.models.pretrained import create_batch_norm, create_transferred


@pytest.mark.parametrize("name", ["dla46_c", "mobilenetv2_050"])
def test_a_network_that_timm_loads_loosely_takes_all_of_a_file_or_refuses_it(tmp_path: Path, name: str) -> None:
    source = randomised(name)
    weights = {f"net._{key}": value for key, value in source.state_dict().items()}
    x = torch.randn(2, 3, 64, 64)
    torch.save(weights, tmp_path / "foreign.pth")
    torch.save(dict(reversed(weights.items())), tmp_path / "reversed.pth")
    torch.save(dict(list(source.state_dict().items())[:-40]), tmp_path / "part.pth")
    with torch.no_grad():
        for load in (create_batch_norm, create_transferred):
            found = load(name, tmp_path / "foreign.pth").eval()(x)
            assert (found - source(x)).abs().max() < 1e-4 * source(x).abs().max()
            for file in ("reversed.pth", "part.pth"):
                with pytest.raises(InputError, match="do not fit"):
                    load(name, tmp_path / file)


def test_a_file_of_other_classes_or_without_counters_is_read_as_timm_reads_it(tmp_path: Path) -> None:
    source = randomised("test_resnet", num_classes=10)
    weights = {key: value for key, value in source.state_dict().items() if "num_batches" not in key}
    torch.save(weights, tmp_path / "older.pth")
    x = torch.randn(2, 3, 64, 64)
    with torch.no_grad():
        model = create_batch_norm("test_resnet", tmp_path / "older.pth", num_classes=10).eval()
        found = model(x)
    save_for_hf(model, str(tmp_path / "saved"), safe_serialization=True)
    assert (found - source(x)).abs().max() < 1e-4 * source(x).abs().max()
    with pytest.raises(InputError, match="do not fit test_resnet") as error:
        create_batch_norm("test_resnet", tmp_path / "older.pth")
    assert "\n" not in str(error.value)


@torch.no_grad()
def test_a_twin_reads_by_order_what_its_deconvolution_form_reads_and_refuses_the_same(tmp_path: Path) -> None:
    source = randomised("resnet18_cifar", width=0.25)
    foreign = {f"net._{key}": value for key, value in source.state_dict().items()}
    files = {"good": foreign, "reversed": dict(reversed(foreign.items())), "part": dict(list(foreign.items())[:-3])}
    files["own"] = source.state_dict()
    for name, weights in files.items():
        torch.save(weights, tmp_path / f"{name}.pth")
    x = torch.randn(2, 3, 32, 32)
    for form in ("resnet18_cifar", "resnet18_cifar_deconv"):

        def create(file: str, form: str = form, **options: Any) -> nn.Module:
            overlay = {"file": str(tmp_path / f"{file}.pth")}
            return timm.create_model(
                form, pretrained=True, pretrained_cfg_overlay=overlay, width=0.25, **options
            ).eval()

        assert difference(create("good")(x), source(x)) < 1e-4
        assert difference(create("good", num_classes=7).forward_features(x), source.forward_features(x)) < 1e-4
        assert difference(create("good", num_classes=0, global_pool="")(x), source.forward_features(x)) < 1e-4
        assert create("good", in_chans=1)(x[:, :1]).isfinite().all()
        for file in ("reversed", "part"):
            with pytest.raises(InputError, match="do not fit resnet18_cifar: no name is known, and by order") as error:
                create(file)
            assert "\n" not in str(error.value)
        with pytest.raises(InputError, match=r"do not fit resnet\w+: \d+ missing") as error:
            timm.create_model(
                form.replace("18", "50"),
                pretrained=True,
                pretrained_cfg_overlay=dict(file=str(tmp_path / "own.pth")),
                width=0.25,
            )
        assert "\n" not in str(error.value)


def test_checkpoint_path_refuses_other_forms_in_one_line_and_takes_its_own(tmp_path: Path) -> None:
    batch_norm = randomised("resnet18", **NARROW)
    own = timm.create_model("resnet18_deconv", **NARROW)
    files = {"norms": batch_norm, "own": own, "fused": timm_deconv.fuse(own)}
    for name, model in files.items():
        save_file(model.state_dict(), tmp_path / f"{name}.safetensors")
    for file, options, message in (
        ("norms", {}, r"weights of a batch-norm network: .*pretrained_cfg_overlay=\{'file': FILE\}"),
        ("norms", {"fused": True}, "weights of a batch-norm network"),
        ("own", {"fused": True}, r"not fused, as the network is: .*pretrained_cfg_overlay=\{'file': FILE\}\) folds"),
        ("own", {"deconv": {"preset": "paper", "block": 16}}, "trained under other whitening settings"),
    ):
        with pytest.raises(InputError, match=message) as error:
            timm.create_model("resnet18_deconv", checkpoint_path=tmp_path / f"{file}.safetensors", **options, **NARROW)
        assert "\n" not in str(error.value)
    for file, options in (("own", {}), ("fused", {"fused": True}), ("fused", {})):
        model = timm.create_model(
            "resnet18_deconv", checkpoint_path=tmp_path / f"{file}.safetensors", **options, **NARROW
        )
        copied = pickle.loads(pickle.dumps(copy.deepcopy(model)))
        copied.load_state_dict(files[file].state_dict())
        with pytest.raises(InputError, match="batch-norm network"):
            copied.load_state_dict(batch_norm.state_dict())
