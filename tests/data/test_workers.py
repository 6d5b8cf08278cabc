"""Workers, which outlive the signals that end a job (see test_sampling.py), end with the training process."""

import os
import subprocess
import sys
import textwrap
from pathlib import Path

ROOT = Path(__file__).parents[2]


def test_a_script_that_ends_within_an_epoch_does_not_wait_for_its_workers():
    script = """
        from timm_deconv.data import Digits, create_loader, create_transform
        transform = create_transform((3, 32, 32))
        batches = iter(create_loader(Digits(train=True), transform, batch_size=10, training=True, workers=2))
        next(batches)
        raise SystemExit(3)
    """
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-c", textwrap.dedent(script) + "\n"]
    assert subprocess.run(command, env=environment, timeout=120, check=False).returncode == 3
