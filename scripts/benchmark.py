#!/usr/bin/env python
"""Times a deconvolution network beside its batch-norm twin, the network without norms and the published sequence.

    python scripts/benchmark.py step --network resnet18_cifar --batch 128
    python scripts/benchmark.py inference --quick

Prints a table; the rows go to --output, and with --record to hub_configs/results/benchmark.csv of the checkout too.
"""

import argparse
from pathlib import Path

import torch

from timm_deconv.benchmark.rows import append_rows, result_files, step_rows, table
from timm_deconv.benchmark.step import StepSettings, time_evaluation, time_training
from timm_deconv.errors import one_line_errors

TASKS = {"step": time_training, "inference": time_evaluation}
QUICK = {"batch": 32, "rounds": 3, "warmup": 1, "memory_formats": ("channels_last",)}


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, argument_default=argparse.SUPPRESS
    )
    parser.add_argument("task", choices=TASKS)
    parser.add_argument("--network", help="a registered pair, without _deconv; default resnet18_cifar")
    parser.add_argument("--preset", help="of the form deconv; default paper")
    parser.add_argument("--forms", nargs="+", help="of none, twin, deconv, published; default all")
    parser.add_argument("--memory-formats", nargs="+", help="of contiguous, channels_last; default both")
    for name in ("batch", "image-size", "rounds", "warmup", "threads"):
        parser.add_argument(f"--{name}", type=int)
    parser.add_argument("--device", help="cpu (default) or cuda")
    parser.add_argument("--amp", choices=("bfloat16", "float16"))
    parser.add_argument("--compile", action="store_true", help="time torch.compile of each network")
    parser.add_argument("--quick", action="store_true", help="a small batch, few rounds, channels_last only")
    parser.add_argument(
        "--output", default="output/benchmark.csv", type=Path, help="CSV file that the rows are added to"
    )
    parser.add_argument("--record", default=False, action="store_true", help="add them to the checkout's results too")
    return parser.parse_args()


def main() -> None:
    options = vars(parse())
    task, output, record = (options.pop(name) for name in ("task", "output", "record"))
    if threads := options.pop("threads", None):
        torch.set_num_threads(threads)
    with one_line_errors():
        settings = StepSettings(**((QUICK if options.pop("quick", False) else {}) | options))
        files = result_files(output, record)  # first, so that nothing is measured in vain
        rows = step_rows(task, TASKS[task](settings), settings)
        append_rows(files, rows)
        print(table(rows))


if __name__ == "__main__":
    main()
