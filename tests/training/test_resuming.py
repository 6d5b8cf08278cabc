"""A run that ended at any moment goes on from its latest whole state, and ends bit for bit where it would have."""

import errno
import os
import signal

import pytest
import safetensors.torch
import torch

from timm_deconv.errors import EXIT_STOPPED, InputError, Stopped, one_line_errors
from timm_deconv.training import checkpoint, loop, saving
from timm_deconv.training.checkpoint import RunFolder, read_curve
from timm_deconv.training.loop import train
from timm_deconv.training.tasks import Classification


@pytest.fixture
def recipe(short_recipe):
    """Two epochs of eight updates of a network that draws random numbers, and its average."""
    settings = {"model": "test_vit2", "model_kwargs": {"drop_rate": 0.1}, "batch_size": 64, "epochs": 2, "hflip": 0.5}
    return short_recipe.merged({**settings, "model_ema": True, "model_ema_decay": 0.9, "checkpoint_every": "3"})


@pytest.fixture
def whole(recipe, tmp_path):
    train(recipe, tmp_path / "whole")
    return tmp_path / "whole"


def _is_same(first, second):
    weights = [safetensors.torch.load_file(folder / "model.safetensors") for folder in (first, second)]
    curves = [[{**row, "seconds": 0} for row in read_curve(folder)] for folder in (first, second)]
    return curves[0] == curves[1] and all(torch.equal(weights[0][name], weights[1][name]) for name in weights[0])


def _acting(passes, action):
    """Make a task that acts before one of its passes."""

    class Acting(Classification):
        count = 0

        def loss(self, model, batch):
            Acting.count += 1
            if Acting.count == passes:
                action()
            return super().loss(model, batch)

    return Acting


def _crash():
    raise KeyboardInterrupt


def _states(folder):
    return [state.name for state in RunFolder(folder, None).states()]


@pytest.mark.parametrize("passes", [2, 8, 13])
def test_a_run_that_crashed_in_the_middle_of_an_epoch_repeats_at_most_checkpoint_every(recipe, whole, tmp_path, passes):
    with pytest.raises(KeyboardInterrupt):
        train(recipe, tmp_path / "run", task=_acting(passes, _crash))
    counting = _acting(0, None)
    train(recipe, tmp_path / "run", resume=True, task=counting)
    assert counting.count + passes - 1 - 16 <= 3
    assert _is_same(tmp_path / "run", whole)


def test_a_run_goes_on_with_another_number_of_workers(recipe, whole, tmp_path):
    with pytest.raises(KeyboardInterrupt):
        train(recipe.merged({"workers": 2}), tmp_path / "run", task=_acting(12, _crash))
    train(recipe.merged({"workers": 1}), tmp_path / "run", resume=True)
    assert _is_same(tmp_path / "run", whole)


def test_accumulated_passes_are_saved_between_updates_alone(recipe, tmp_path):
    recipe = recipe.merged({"grad_accum_steps": 3, "checkpoint_every": 1})
    train(recipe, tmp_path / "whole")
    with pytest.raises(KeyboardInterrupt):
        train(recipe, tmp_path / "run", task=_acting(6, _crash))
    assert _states(tmp_path / "run") == ["epoch-0000-image-00000192"]
    train(recipe, tmp_path / "run", resume=True)
    assert _is_same(tmp_path / "run", tmp_path / "whole")


@pytest.mark.parametrize("name", ["SIGTERM", "SIGUSR1"])
def test_a_signal_saves_at_the_next_update_and_ends_with_a_code_of_its_own(recipe, whole, tmp_path, name, capsys):
    before = signal.getsignal(getattr(signal, name))
    told = _acting(5, lambda: os.kill(os.getpid(), getattr(signal, name)))
    with pytest.raises(SystemExit) as ended, one_line_errors():
        train(recipe.merged({"checkpoint_every": None}), tmp_path / "run", task=told)
    assert ended.value.code == EXIT_STOPPED == 75 and told.count == 5
    assert f"{name}: epoch-0000-image-00000320 is saved; --resume goes on from it" in capsys.readouterr().err
    assert signal.getsignal(getattr(signal, name)) is before
    train(recipe, tmp_path / "run", resume=True)
    assert "resumed from epoch-0000-image-00000320: 0 of 2 epochs and 320 of 512 images" in capsys.readouterr().err
    assert _is_same(tmp_path / "run", whole)


def test_a_signal_in_evaluation_saves_before_it_and_the_epoch_is_not_trained_again(
    recipe, whole, tmp_path, monkeypatch
):
    evaluate = loop.evaluate

    def told(*args):
        os.kill(os.getpid(), signal.SIGTERM)
        return evaluate(*args)

    with monkeypatch.context() as patch, pytest.raises(Stopped):
        patch.setattr(loop, "evaluate", told)
        train(recipe, tmp_path / "run")
    assert _states(tmp_path / "run")[-1] == "epoch-0000-image-00000512" and not (tmp_path / "run/curve.csv").exists()
    counting = _acting(0, None)
    train(recipe, tmp_path / "run", resume=True, task=counting)
    assert counting.count == 8 and _is_same(tmp_path / "run", whole)


def test_states_are_saved_every_so_many_minutes(recipe, tmp_path, monkeypatch):
    saved = []
    monkeypatch.setattr(saving.Saver, "try_to_save", lambda self, progress, own: saved.append(progress.consumed))
    clock = iter(range(1000))
    monkeypatch.setattr(saving.time, "monotonic", lambda: 20.0 * next(clock))
    train(recipe.merged({"checkpoint_every": "1 min", "epochs": 1}), tmp_path)
    assert saved and saved[0] == 3 * 64


def test_two_states_stay_and_a_damaged_one_makes_way_for_the_one_before(recipe, whole, tmp_path, capsys):
    with pytest.raises(KeyboardInterrupt):
        train(recipe, tmp_path / "run", task=_acting(16, _crash))
    assert _states(tmp_path / "run") == ["epoch-0001-image-00000256", "epoch-0001-image-00000448"]
    file = tmp_path / "run" / "state" / "epoch-0001-image-00000448" / "network.safetensors"
    content = bytearray(file.read_bytes())
    content[-5] ^= 1
    file.write_bytes(content)
    train(recipe, tmp_path / "run", resume=True)
    said = capsys.readouterr().err
    assert "epoch-0001-image-00000448 is damaged (network.safetensors has another checksum than" in said
    assert "resumed from epoch-0001-image-00000256" in said
    assert _is_same(tmp_path / "run", whole)
    assert (tmp_path / "run" / "state" / "epoch-0001-image-00000448.damaged").exists()


def test_where_all_states_are_damaged_nothing_is_begun_anew(recipe, tmp_path):
    with pytest.raises(KeyboardInterrupt):
        train(recipe, tmp_path / "run", task=_acting(10, _crash))
    for name in _states(tmp_path / "run"):
        (tmp_path / "run" / "state" / name / "state.json").unlink()
    with pytest.raises(InputError, match=r"no state in .* is whole; choose another --output-dir"):
        train(recipe, tmp_path / "run", resume=True)
    assert len(_states(tmp_path / "run")) == 2


def test_a_full_disk_in_the_middle_of_an_epoch_is_said_and_training_goes_on(
    recipe, whole, tmp_path, monkeypatch, capsys
):
    write, calls = checkpoint.write_state, []

    def full_at_first(path, state):
        calls.append(path.name)
        if len(calls) == 2:
            monkeypatch.setattr(os, "fsync", _no_space)
        try:
            write(path, state)
        finally:
            monkeypatch.undo() if len(calls) == 2 else None

    monkeypatch.setattr(checkpoint, "write_state", full_at_first)
    train(recipe, tmp_path / "run")
    said = capsys.readouterr().err
    assert "epoch-0000-image-00000384 could not be saved in " in said and "No space left on device" in said
    assert "epoch-0000-image-00000192 is whole: make room and add --resume; training goes on" in said
    assert _is_same(tmp_path / "run", whole)


def _no_space(descriptor):
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def test_a_run_of_another_recipe_or_model_is_refused_in_the_middle_of_its_first_epoch_too(recipe, tmp_path):
    with pytest.raises(KeyboardInterrupt):
        train(recipe, tmp_path, task=_acting(5, _crash))
    for changed, message in (({"lr": 0.5}, "lr: 0.1 there, 0.5 here"), ({"model": "test_vit"}, "model: test_vit2")):
        with pytest.raises(InputError, match=message):
            train(recipe.merged(changed), tmp_path, resume=True)
    with pytest.raises(InputError, match="holds this run already; add --resume"):
        train(recipe, tmp_path)
    assert _states(tmp_path) == ["epoch-0000-image-00000192"]


def test_states_of_earlier_versions_are_refused_and_stay(recipe, tmp_path):
    RunFolder(tmp_path, recipe).open(size=0)
    (tmp_path / "state" / "epoch-0003").mkdir(parents=True)
    with pytest.raises(InputError, match="no state of this version to resume from"):
        train(recipe, tmp_path, resume=True)
    assert (tmp_path / "state" / "epoch-0003").exists()


def test_a_folder_that_cannot_be_written_is_named(recipe, tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(OSError, match=r"file/run|file"):
        train(recipe, tmp_path / "file" / "run")
