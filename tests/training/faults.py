"""Run on several processes: trains, and in one of them something goes wrong in one pass.

    faults.py RECIPE FOLDER RANK PASS FAULT

Beside the folder every process lists the classes of the images that it has trained on.
"""

import os
import signal
import sys
from pathlib import Path

import torch

from timm_deconv.errors import one_line_errors
from timm_deconv.training import load_recipe
from timm_deconv.training.loop import train
from timm_deconv.training.tasks import Classification

RECIPE, FOLDER, RANK, PASS, FAULT = sys.argv[1:]
RUNS_HERE = os.environ.get("RANK", "0")


class Faulty(Classification):
    """Classification with a fault."""

    count = 0

    def loss(self, model, batch):
        if torch.is_grad_enabled():
            Faulty.count += 1
            with Path(f"{FOLDER}.seen-{RUNS_HERE}").open("a") as file:
                file.write(f"{batch[1].tolist()}\n")
        fault = FAULT if (RUNS_HERE, str(Faulty.count)) == (RANK, PASS) else None
        if fault == "unreadable":
            raise OSError("unreadable image cat/7.jpg (index 12): truncated")
        if fault == "SIGSTOP":
            os.kill(os.getpid(), signal.SIGSTOP)
        loss, figures = super().loss(model, batch)
        return loss * torch.nan if fault == "nonfinite" else loss, figures


with one_line_errors():
    train(load_recipe(RECIPE), FOLDER, resume=True, cpu=True, task=Faulty)
