"""A state is read back as it was, without running code, or what is damaged of it is named."""

import errno
import json
import os

import pytest
import torch
from timm.optim import create_optimizer_v2, list_optimizers
from torch import nn

from timm_deconv.training.state_files import damage, read_state, write_state

GPU, SECOND_ORDER, COMPILED = ("bnb", "fused"), "adahessian", "kron"
OPTIMIZERS = [
    pytest.param(name, marks=pytest.mark.slow) if name == COMPILED else name
    for name in list_optimizers()
    if not name.startswith(GPU) and name != SECOND_ORDER
]


def _network():
    return nn.Sequential(nn.Conv2d(3, 4, 3), nn.Flatten(), nn.Linear(144, 5)).to(memory_format=torch.channels_last)


def _step(network, optimizer, images):
    optimizer.zero_grad()
    network(images).square().mean().backward()
    optimizer.step()


@pytest.mark.parametrize("name", OPTIMIZERS)
@pytest.mark.filterwarnings("ignore")  # what optimisers of timm say of themselves
def test_every_optimiser_of_timm_goes_on_bit_for_bit_from_a_file(name, tmp_path):
    images = torch.randn(2, 3, 8, 8)
    network, resumed = _network(), _network()
    optimizer, other = (create_optimizer_v2(net, opt=name, lr=1e-3, momentum=0.9) for net in (network, resumed))
    for _ in range(3):
        _step(network, optimizer, images)
    write_state(tmp_path / "state", {"network": network.state_dict(), "optimizer": optimizer.state_dict()})
    assert damage(tmp_path / "state") is None
    state = read_state(tmp_path / "state")
    resumed.load_state_dict(state["network"])
    other.load_state_dict(state["optimizer"])
    for net, opt in ((network, optimizer), (resumed, other)):
        torch.manual_seed(1)  # some draw
        for _ in range(3):
            _step(net, opt, images)
    assert all(torch.equal(*pair) for pair in zip(network.parameters(), resumed.parameters(), strict=True))


def test_values_come_back_as_they_were(tmp_path):
    state = {
        "a": {"scalars": [1, 2.5, True, None, "text", float("inf")], 3: (1, (2, 3)), "nested": {"empty": {}}},
        "b": [torch.arange(4), torch.tensor(1.5, dtype=torch.bfloat16), torch.ones(2, 3, 4, 5)[:, :, ::2]],
    }
    write_state(tmp_path / "state", state)
    read = read_state(tmp_path / "state")
    assert read["a"] == state["a"] and isinstance(read["a"][3], tuple)
    assert all(
        torch.equal(*pair) and pair[0].dtype == pair[1].dtype for pair in zip(read["b"], state["b"], strict=True)
    )
    assert {file.suffix for file in (tmp_path / "state").iterdir()} == {".json", ".safetensors"}


def test_the_memory_format_is_kept(tmp_path):
    images = torch.randn(2, 3, 4, 5).to(memory_format=torch.channels_last)
    write_state(tmp_path / "state", {"images": [images, images[:1].expand(2, 3, 4, 5)]})
    read = read_state(tmp_path / "state")["images"]
    assert read[0].stride() == images.stride() and torch.equal(read[0], images) and torch.equal(read[1][0], images[0])


def test_what_only_pickle_could_hold_is_refused_and_leaves_nothing(tmp_path):
    with pytest.raises(TypeError, match=r"a\.0\.hook is a function, which cannot be saved"):
        write_state(tmp_path / "state", {"a": [{"hook": lambda: None}]})
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("name", ["a.safetensors", "state.json", "manifest.json"])
@pytest.mark.parametrize("how", ["truncated", "flipped", "missing", "empty"])
def test_a_damaged_file_is_recognised_and_named(tmp_path, name, how):
    write_state(tmp_path / "state", {"a": torch.randn(100), "b": 1})
    file = tmp_path / "state" / name
    content = bytearray(file.read_bytes())
    if how == "missing":
        file.unlink()
    elif how == "flipped":
        content[len(content) // 2] ^= 16
        file.write_bytes(content)
    else:
        file.write_bytes(content[: len(content) // 2 if how == "truncated" else 0])
    assert damage(tmp_path / "state") is not None
    assert name in damage(tmp_path / "state") or name == "manifest.json"


def test_every_single_bit_of_the_tensors_counts(tmp_path):
    write_state(tmp_path / "state", {"a": torch.zeros(4)})
    file = tmp_path / "state" / "a.safetensors"
    content = file.read_bytes()
    for bit in range(0, 8 * len(content), 37):
        flipped = bytearray(content)
        flipped[bit // 8] ^= 1 << bit % 8
        file.write_bytes(flipped)
        assert damage(tmp_path / "state") == "a.safetensors has another checksum than it was written with"
    file.write_bytes(content)
    assert damage(tmp_path / "state") is None


def test_a_state_that_did_not_fit_on_the_disk_leaves_nothing(tmp_path, monkeypatch):
    def full(descriptor):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match="No space left on device"):
        write_state(tmp_path / "state", {"a": torch.zeros(4)})
    assert list(tmp_path.iterdir()) == []


def test_a_state_has_its_name_only_after_all_of_it_is_on_the_disk(tmp_path, monkeypatch):
    synced = []
    replace = os.replace
    monkeypatch.setattr(os, "fsync", lambda file: synced.append(os.readlink(f"/proc/self/fd/{file}")))
    monkeypatch.setattr(os, "replace", lambda *paths: synced.append("renamed") or replace(*paths))
    write_state(tmp_path / "state", {"a": torch.zeros(4)})
    *files, folder, renamed, parent = [name.rpartition("/")[2] for name in synced]
    assert set(files) == {"a.safetensors", "state.json", "manifest.json"}
    assert (folder, renamed, parent) == (".partial", "renamed", tmp_path.name)
    assert json.loads((tmp_path / "state" / "manifest.json").read_text()).keys() == set(files) - {"manifest.json"}
