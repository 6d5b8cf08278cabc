#!/usr/bin/env python
"""Measures what whitening costs, beside batch norm, no norm at all and the published operation sequence.

    python scripts/benchmark.py step --network resnet18_cifar --batch 128     training steps, in seconds
    python scripts/benchmark.py inference --quick                             evaluation steps
    python scripts/benchmark.py layer --rows 1 5 16                           layers of the paper's table 3, forward
    python scripts/benchmark.py kernels                                       launches of a layer, eager and compiled
    python scripts/benchmark.py host                                          host's time for a layer, by GPUs' kernels
    python scripts/benchmark.py memory --batch 32                             peak memory of a training step
    python scripts/benchmark.py profile --network resnet18_cifar              operations of a training step
    python scripts/benchmark.py scaling --axis batch --values 16 32 64        share of whitening, with a picture
    python scripts/benchmark.py loop --data-dir IMAGES                        train.py beside a bare loop
    python scripts/benchmark.py transfer --data-dir PHOTOGRAPHS               a pretrained network whitened, its answers
    python scripts/benchmark.py exports --data-dir IMAGES --run RUN           files of a network and of its twin
    python scripts/benchmark.py export-ranges --data-dir IMAGES --run RUN     ranges of the channels of their layers
    python scripts/benchmark.py convert --networks 'regnet*'                  every batch-norm network of timm, checked

Prints a table; the rows go to --output, and with --record to hub_configs/results of the checkout too. `convert` passes
over networks that the file has a row of, so that it goes on where it was stopped.
"""

import argparse
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # benchmarks is part of a checkout, and not installed

from timm_deconv.errors import needs_extra, one_line_errors

with one_line_errors(), needs_extra("benchmark"):
    from benchmarks.tasks import OPTIONS, TASKS, run


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    tasks = parser.add_subparsers(dest="task", required=True)
    for name, task in TASKS.items():
        options = tasks.add_parser(name, argument_default=argparse.SUPPRESS)
        for option in task.options.split():
            options.add_argument(f"--{option}", **OPTIONS[option])
        options.add_argument("--quick", action="store_true", default=False, help="something small")
        options.add_argument("--output", default=None, type=Path, help=f"CSV file to add rows to; output/{task.file}")
        options.add_argument("--record", action="store_true", default=False, help="to the checkout's results too")
    return parser.parse_args()


def main() -> None:
    options = vars(parse())
    name, quick, output, record = (options.pop(key) for key in ("task", "quick", "output", "record"))
    with one_line_errors():
        run(name, options, quick=quick, output=output, record=record)


if __name__ == "__main__":
    main()
