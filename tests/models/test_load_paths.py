"""Every form of weights into every form of network, from every place: the function stays; what cannot be is said."""

import hashlib
import json
import os
import pickle
import subprocess
import sys
import time
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from huggingface_hub import constants
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

import timm_deconv
from tests.hub_server import COMMIT, hub
from tests.models import zoo_of_two
from timm_deconv.convert.module_types import is_whitened
from timm_deconv.errors import InputError
from timm_deconv.layers.notices import OTHER_SETTINGS, UNCALIBRATED
from timm_deconv.models.checksums import CHECKSUMS, check_recorded
from timm_deconv.models.weights import save_network, write_weights

NETWORKS: dict[str, dict[str, Any]] = {
    "resnet18_025_cifar_deconv": {"layers": (1, 1, 1, 1), "width": 0.25},
    "deconv": {"base": "test_efficientnet", "deconv": {"block": 16, "classifier": "plain"}},  # squeeze-excite is plain
}
SIZE = 32
INTERLEAVED = {"preset": "paper", "block": 8}
WINDOW = {**INTERLEAVED, "layout": "window"}
"""Another layout, of equal shapes."""

Source = tuple[nn.Module, Path]


def trained(name: str, **others: Any) -> nn.Module:
    """A network after some forwards of training."""
    torch.manual_seed(0)
    model = timm.create_model(name, **NETWORKS[name], **others)
    for _ in range(2):
        model.train()(torch.randn(16, 3, SIZE, SIZE))
    return model.eval()


@pytest.fixture(scope="module", params=NETWORKS)
def source(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Source:
    """A trained network, and folders of it with whitening and folded."""
    model, folder = trained(request.param), tmp_path_factory.mktemp("forms")
    save_network(model, folder / "training")
    save_network(timm_deconv.fuse(model), folder / "folded")
    return model, folder


def features(model: nn.Module, x: Tensor) -> Tensor:
    with torch.no_grad():
        return model.forward_intermediates(x, indices=[3], intermediates_only=True)[0]


def close(found: Tensor, expected: Tensor) -> bool:
    return bool((found - expected).abs().max() < 1e-4 * expected.abs().max())


@pytest.mark.parametrize("form", ["training", "folded"])
def test_every_form_of_weights_goes_into_every_form_of_network(source: Source, form: str) -> None:
    model, folder = source
    place, x = f"local-dir:{folder / form}", torch.randn(2, 3, SIZE, SIZE)
    grey = x[:, :1]
    cases: list[tuple[dict[str, Any], Tensor, Tensor]] = [
        ({"fused": False}, x, x),
        ({"fused": True}, x, x),
        ({"fused": False, "num_classes": 5}, x, x),
        ({"fused": True, "num_classes": 5}, x, x),
        ({"fused": False, "num_classes": 0}, x, x),
        ({"fused": False, "in_chans": 1}, grey, grey.expand(-1, 3, -1, -1)),
        ({"fused": True, "in_chans": 1}, grey, grey.expand(-1, 3, -1, -1)),
    ]
    for options, images, like in cases:
        found = timm.create_model(place, pretrained=True, **options).eval()
        assert is_whitened(found) is not options["fused"], options
        assert close(features(found, images), features(model, like)), options
        if options.keys() == {"fused"}:
            with torch.no_grad():
                assert close(found(x), model(x))
    maps = timm.create_model(place, pretrained=True, features_only=True, out_indices=(3,)).eval()
    with torch.no_grad():
        assert close(maps(x)[0], features(model, x))


@torch.no_grad()
def test_an_auxiliary_head_stays_or_goes_as_the_network_has_one(tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = timm.create_model("fcn_resnet50_deconv", layers=(1, 1, 1, 1), aux_head=True)
    x = torch.randn(1, 3, SIZE, SIZE)
    save_network(model.eval(), tmp_path)
    for aux_head in (False, True):
        found = timm.create_model(f"local-dir:{tmp_path}", pretrained=True, fused=True, aux_head=aux_head).eval()
        assert close(found(x), model(x)) and (found.aux_decoder is not None) is aux_head


def test_weights_of_other_whitening_settings_are_folded_and_it_is_said(tmp_path: Path) -> None:
    name = "resnet18_025_cifar_deconv"
    model, x = trained(name), torch.randn(2, 3, SIZE, SIZE)
    save_network(model, tmp_path)
    file = {"file": str(tmp_path / "model.safetensors")}
    others = {**NETWORKS[name], "deconv": "paper"}
    with torch.no_grad():
        for found, settings in (
            (f"local-dir:{tmp_path}", {"deconv": "paper"}),
            (name, {"pretrained_cfg_overlay": file, **others}),  # config.json is beside it
        ):
            with pytest.warns(UserWarning, match="under other whitening settings than the network's") as said:
                other = timm.create_model(found, pretrained=True, **settings).eval()
            assert [str(warning.message) for warning in said] == [OTHER_SETTINGS]
            assert close(other(x), model(x))
        other.train()
        with pytest.warns(UserWarning, match="call timm_deconv.calibrate"):
            other(torch.randn(4, 3, SIZE, SIZE))
        plain = timm.create_model(f"local-dir:{tmp_path}", pretrained=True, deconv="paper", fused=True).eval()
        assert close(plain(x), model(x))
    with pytest.raises(InputError, match=r"under other whitening settings .* give deconv= as in training"):
        weights = {"state_dict": load_file(tmp_path / "model.safetensors")}
        timm.create_model(name, pretrained=True, pretrained_cfg_overlay=weights, **others)


def test_other_options_that_whiten_the_same_features_together_leave_the_whiteners(tmp_path: Path) -> None:
    model = trained("resnet18_025_cifar_deconv")
    save_network(model, tmp_path)
    other = timm.create_model(f"local-dir:{tmp_path}", pretrained=True, deconv={"preset": "fast", "n_iter": 5})
    assert torch.equal(other.layer1[0].conv1.running_deconv, model.layer1[0].conv1.running_deconv)
    assert other.layer1[0].conv1.cfg.n_iter == 5


def test_a_layout_of_equal_shapes_is_not_taken_for_the_trained_one(tmp_path: Path) -> None:
    name, x = "resnet18_025_cifar_deconv", torch.randn(2, 3, SIZE, SIZE)
    model = trained(name, deconv=INTERLEAVED)
    save_network(model, tmp_path)
    other = timm.create_model(name, **NETWORKS[name], deconv=WINDOW).state_dict()
    assert all(value.shape == other[key].shape for key, value in model.state_dict().items())
    with pytest.warns(UserWarning, match="were folded"):
        other = timm.create_model(f"local-dir:{tmp_path}", pretrained=True, deconv=WINDOW).eval()
    with torch.no_grad():
        assert close(other(x), model(x))


def test_a_configuration_of_other_weights_is_not_believed(tmp_path: Path) -> None:
    name, x = "resnet18_025_cifar_deconv", torch.randn(2, 3, SIZE, SIZE)
    arguments = {**NETWORKS[name], "deconv": INTERLEAVED}
    model = trained(name, deconv=INTERLEAVED)
    save_network(model, tmp_path)
    for called, architecture in (("epoch3.safetensors", name), ("model.safetensors", "vgg11_cifar_deconv")):
        config = {"architecture": architecture, "model_args": {**arguments, "deconv": WINDOW}}
        (tmp_path / "config.json").write_text(json.dumps(config))
        (tmp_path / called).write_bytes((tmp_path / "model.safetensors").read_bytes())
        overlay = {"file": str(tmp_path / called)}
        found = timm.create_model(name, pretrained=True, pretrained_cfg_overlay=overlay, **arguments).eval()
        with torch.no_grad():
            assert torch.equal(found(x), model(x))


def test_folded_weights_warn_in_training_until_they_are_calibrated_and_then_train_whitened(tmp_path: Path) -> None:
    model, images = trained("resnet18_025_cifar_deconv"), torch.randn(128, 3, SIZE, SIZE)
    save_network(timm_deconv.fuse(model), tmp_path)

    def load() -> nn.Module:
        return timm.create_model(f"local-dir:{tmp_path}", pretrained=True, fused=False)

    with pytest.warns(UserWarning) as said:
        load().train()(images)
    assert [str(warning.message) for warning in said] == [UNCALIBRATED]
    calibrated = load()
    timm_deconv.calibrate(calibrated, images)
    with torch.no_grad(), warnings.catch_warnings():
        warnings.simplefilter("error")
        assert close(calibrated.eval()(images), model(images))
        start = calibrated.train()(images)
    assert (start.argmax(1) == model(images).argmax(1)).float().mean() > 0.8


def test_weights_of_a_part_leave_the_statistics_alone() -> None:
    model = trained("resnet18_025_cifar_deconv")
    before = model.conv1.running_deconv.clone()
    model.load_state_dict({"fc.bias": torch.zeros(10)}, strict=False)
    assert torch.equal(model.conv1.running_deconv, before)


# What cannot be


def test_what_is_no_file_of_weights_is_refused_in_one_line(tmp_path: Path) -> None:
    name = "resnet18_025_cifar_deconv"
    save_network(timm.create_model(name, **NETWORKS[name]), tmp_path)
    file = tmp_path / "model.safetensors"
    whole = file.read_bytes()

    def contents() -> Iterator[tuple[bytes, str, str]]:
        yield pickle.dumps({"a": os.system}), "model.safetensors", "cannot be read as weights"
        yield whole[: len(whole) // 2], "model.safetensors", "cannot be read as weights"
        yield b"", "model.safetensors", "cannot be read as weights"
        torch.save({"state_dict": {"a": zoo_of_two.registered}}, tmp_path / "code")
        yield (tmp_path / "code").read_bytes(), "pytorch_model.bin", "needs pickled code to be run, which is refused"

    for content, called, message in contents():
        file.unlink(missing_ok=True)
        (tmp_path / called).write_bytes(content)
        for source in (f"local-dir:{tmp_path}", name):
            overlay = {} if ":" in source else {"pretrained_cfg_overlay": {"file": str(tmp_path / called)}}
            with pytest.raises(InputError, match=message) as error:
                timm.create_model(source, pretrained=True, **overlay)
            assert "\n" not in str(error.value)


def test_a_saved_network_whose_weights_are_not_those_of_its_checksums_is_refused(tmp_path: Path) -> None:
    model = trained("resnet18_025_cifar_deconv")
    tree = published(tmp_path / "tree", model)
    for place in (tree, tree / "folded"):
        assert timm.create_model(f"local-dir:{place}", pretrained=True)
        weights = load_file(place / "model.safetensors")
        save_file({key: value + 1 for key, value in weights.items()}, place / "model.safetensors", {"format": "pt"})
        name, options = "resnet18_025_cifar_deconv", NETWORKS["resnet18_025_cifar_deconv"]
        overlay = {"pretrained_cfg_overlay": {"file": str(place / "model.safetensors")}, **options}
        for source, arguments in ((f"local-dir:{place}", {}), (name, overlay)):
            with pytest.raises(InputError, match=r"another file than the known one .* or remove .*SHA256SUMS") as error:
                timm.create_model(source, pretrained=True, **arguments)
            assert "\n" not in str(error.value)
        (place / "model.safetensors").unlink()
        torch.save(weights, place / "pytorch_model.bin")
        with pytest.raises(InputError, match=r"SHA256SUMS lists .*model\.safetensors, which is missing: get it again"):
            timm.create_model(f"local-dir:{place}", pretrained=True)


def test_checksums_that_cannot_be_asked_for_are_not_taken_for_none(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    url = "http://127.0.0.1:1/{repo_id}/resolve/{revision}/{filename}"  # where nobody answers
    monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", url)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(time, "sleep", lambda _: None)  # the client tries five times
    cfg = {"source": "hf-hub", "hf_hub_id": "someone/net"}
    with pytest.raises(InputError, match=r"checksums of someone/net cannot be had, .* HF_HUB_OFFLINE=1") as error:
        check_recorded(cfg, tmp_path)
    assert "\n" not in str(error.value)
    place = tmp_path / "models--someone--net"
    for file, text in (("refs/main", COMMIT), (f".no_exist/{COMMIT}/{CHECKSUMS}", "")):
        (place / file).parent.mkdir(parents=True)
        (place / file).write_text(text)
    check_recorded(cfg, tmp_path)  # which once was told that there are none


# Published ones


def published(folder: Path, model: nn.Module) -> Path:
    """Write what a repository holds: weights to train on, folded ones, checksums."""
    save_network(model, folder)
    save_network(timm_deconv.fuse(model), folder / "folded")
    files = sorted(str(file.relative_to(folder)) for file in folder.rglob("*.*"))
    done = subprocess.run(["sha256sum", *files], cwd=folder, capture_output=True, text=True, check=True)
    (folder / CHECKSUMS).write_text(done.stdout)
    return folder


LOAD = """
import json, sys
from pathlib import Path
import pytest, timm, torch
from huggingface_hub import snapshot_download
from safetensors.torch import load_file
import timm_deconv
from tests.models import zoo_of_two
from timm_deconv.layers.notices import share_notices

known, commit = load_file(sys.argv[1]), sys.argv[2]
places = {
    "newest": ("hf-hub:someone/net", {}),
    "pinned": (f"hf-hub:someone/net@{commit}", {}),
    "other classes": ("hf-hub:someone/net", {"num_classes": 3}),
    "tampered": ("hf-hub:someone/tampered", {}),
    "missing": ("hf-hub:someone/none", {}),
    "other revision": ("hf-hub:someone/net@v2", {}),
    "registered": ("zoo18_deconv.nd_a", {}),
    "registered, tampered": ("zoo18_deconv.nd_b", {}),
}
found = {}
with zoo_of_two.registered(Path(sys.argv[3]), pytest.MonkeyPatch()):
    for case, (place, options) in places.items():
        try:
            model = timm.create_model(place, pretrained=True, **options).eval()
            out = model(known["x"])
            found[case] = out.shape[1] if options else float((out - known["y"]).abs().max() / known["y"].abs().max())
        except Exception as error:
            found[case] = f"{type(error).__name__}: {error}"
folder = snapshot_download("someone/net", allow_patterns=["folded/*", "SHA256SUMS"])
model = timm.create_model(f"local-dir:{folder}/folded", pretrained=True, fused=False).eval()
found["folded"] = float((model(known["x"]) - known["y"]).abs().max() / known["y"].abs().max())
found["calibrate"] = share_notices(model).uncalibrated
print(json.dumps(found))
"""


def test_published_networks_load_by_newest_and_pinned_revision_and_offline(tmp_path: Path) -> None:
    model, x = zoo_of_two.network(), torch.randn(2, 3, SIZE, SIZE)
    model.train()(torch.randn(16, 3, SIZE, SIZE))
    tree = published(tmp_path / "hub" / "someone" / "net", model.eval())
    file = tree / "model.safetensors"
    digest = hashlib.sha256(file.read_bytes()).hexdigest()
    for tag, sha256 in (("nd_a", digest), ("nd_b", digest[::-1])):
        files = {"training": {"sha256": sha256, "size": file.stat().st_size}}
        place = {"hf_hub_id": f"someone/net@{COMMIT}", "files": files}
        zoo_of_two.add(tmp_path / "hub_configs", f"zoo18_deconv.{tag}", None, **place)
    tampered = published(tmp_path / "hub" / "someone" / "tampered", model)
    write_weights(model, tampered / "model.safetensors", half=True)
    with torch.no_grad():
        save_file({"x": x, "y": model(x)}, tmp_path / "known.safetensors")
    environment = {
        **os.environ,
        "HF_HUB_DISABLE_XET": "1",
        "HF_HUB_DISABLE_TELEMETRY": "1",
        "HF_HOME": str(tmp_path / "cache"),
        "PYTHONPATH": str(Path(__file__).parents[2]),
    }
    paths = (tmp_path / "known.safetensors", tmp_path / "hub_configs")
    command = [sys.executable, "-c", LOAD, str(paths[0]), COMMIT, str(paths[1])]

    def run(**variables: str) -> dict[str, Any]:
        done = subprocess.run(command, env={**environment, **variables}, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        return json.loads(done.stdout.splitlines()[-1])

    with hub(tmp_path / "hub") as endpoint:
        online = run(HF_ENDPOINT=endpoint)
    for found in (online, run(HF_ENDPOINT=endpoint, HF_HUB_OFFLINE="1")):
        for case in ("newest", "pinned", "folded", "registered"):
            assert found[case] < 1e-4, found
        assert found["other classes"] == 3 and found["calibrate"] is True
        for case in ("tampered", "registered, tampered"):
            assert found[case].startswith("InputError: ") and "another file than the known one" in found[case]
        assert "Error: " in found["missing"] and "Error: " in found["other revision"]
