"""Processes with synchronised statistics learn what one process learns of all their images."""

import json
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from benchmarks.killing import start

ALIKE = 1e-8
"""Largest difference of a weight or running value in float64, which are up to 100."""

@pytest.fixture(scope="module")
def report() -> dict[str, Any]:
    """What four processes tell that train in many ways."""
    processes = start([sys.executable, str(Path(__file__).with_name("synchronised.py"))], 4)
    ended = [process.communicate(timeout=300) for process in processes]
    assert [process.returncode for process in processes] == [0] * 4, ended[0][1][-3000:] + ended[1][1][-3000:]
    return json.loads(ended[0][0].splitlines()[-1])


def test_two_and_four_processes_learn_what_one_learns_of_the_same_images(report: dict[str, Any]) -> None:
    """With layers of every kind, sampled in every way, frozen at times, and of batches that are divided unevenly."""
    assert [row["processes"] for row in report["rows"]] == [4] * 6 + [2] * 6
    for row in report["rows"]:
        assert row["difference"] < ALIKE < 1e-2 < row["moved"], row


@pytest.mark.parametrize(
    "way",
    [
        *("checkpointed activations", "compiled", "accumulated gradients", "fully_shard"),
        *("a pickled network is that of one process", "update_statistics"),
    ],
)
def test_what_is_built_on_it_learns_what_one_process_learns(report: dict[str, Any], way: str) -> None:
    assert report[way] < ALIKE


def test_sharded_networks_in_bfloat16_keep_statistics_in_float32(report: dict[str, Any]) -> None:
    assert report["dtypes of sharded statistics"] == ["torch.float32"] and report["sharded statistics are finite"]


def test_all_processes_see_what_is_not_finite_in_one(report: dict[str, Any]) -> None:
    assert report["all see what is not finite in one"]


def test_what_cannot_be_joined_is_said_in_one_line(report: dict[str, Any]) -> None:
    assert report["unconverted"].startswith("convert_sync: there are no processes yet; call torch.distributed.init")
    assert report["no images"] == "process 1 has no images: give every process at least one, or drop the batch"
    assert report["other sizes"].startswith("images of (1, 12, 16) in process 1 and of (1, 16, 16) in process 0: ")
    assert report["beside the network"].startswith("Deconv2d (1, 8) sees 4 images where the network was given none: ")


LOST = """
import time, torch, torch.distributed as dist, timm_deconv
from datetime import timedelta
dist.init_process_group("gloo", timeout=timedelta(seconds=5))
class Ends(torch.nn.Module):
    def forward(self, x):
        if dist.get_rank() == 1:
            time.sleep(60)
        return x
layer = timm_deconv.Deconv2d
model = timm_deconv.convert_sync(torch.nn.Sequential(layer(1, 2, 3), Ends(), layer(2, 2, 3)))
model(torch.randn(2, 1, 8, 8))
"""


def test_a_process_that_hangs_between_two_layers_ends_the_others_within_the_timeout() -> None:
    begun = time.monotonic()
    first, second = start([sys.executable, "-c", LOST], 2)
    _, errors = first.communicate(timeout=45)
    assert first.returncode == 1 and "RuntimeError" in errors and time.monotonic() - begun < 45
    second.kill()
    second.communicate()
