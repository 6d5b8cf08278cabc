#!/usr/bin/env python
"""Measures what whitening costs, beside batch norm, no norm at all and the published operation sequence.

    python scripts/benchmark.py step --network resnet18_cifar --batch 128     training steps, in seconds
    python scripts/benchmark.py inference --quick                             evaluation steps
    python scripts/benchmark.py layer --rows 1 5 16                           layers of the paper's table 3, forward
    python scripts/benchmark.py kernels                                       launches of a layer, eager and compiled
    python scripts/benchmark.py memory --batch 32                             peak memory of a training step
    python scripts/benchmark.py profile --network resnet18_cifar              operations of a training step
    python scripts/benchmark.py scaling --axis batch --values 16 32 64        share of whitening, with a picture

Prints a table; the rows go to --output, and with --record to hub_configs/results of the checkout too.
"""

import argparse
from pathlib import Path

import torch

from timm_deconv.benchmark import plots, rows
from timm_deconv.benchmark.tasks import OPTIONS, TASKS
from timm_deconv.errors import one_line_errors


def parse() -> argparse.Namespace:
    kind = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=kind)
    tasks = parser.add_subparsers(dest="task", required=True)
    for name, task in TASKS.items():
        options = tasks.add_parser(name, argument_default=argparse.SUPPRESS)
        for option in task.options.split():
            options.add_argument(f"--{option}", **OPTIONS[option])
        options.add_argument("--quick", action="store_true", help="something small")
        options.add_argument("--output", default=Path("output") / task.file, type=Path, help="CSV file to add rows to")
        options.add_argument("--record", default=False, action="store_true", help="to the checkout's results too")
    return parser.parse_args()


def main() -> None:
    options = vars(parse())
    name, output, record = (options.pop(key) for key in ("task", "output", "record"))
    task = TASKS[name]
    if threads := options.pop("threads", None):
        torch.set_num_threads(threads)
    with one_line_errors():
        settings = task.settings(**((task.quick if options.pop("quick", False) else {}) | options))
        files = rows.result_files(output, record, task.file)  # first, so that nothing is measured in vain
        if name == "scaling":
            plots.need_matplotlib()
        measured = task.measure(settings)
        rows.add_rows(files, task.columns, measured)
        print(rows.table(measured, task.shown), task.summary(measured), sep="\n")
        if name == "scaling":
            picture = output.with_name(f"{output.stem}_{settings.axis}.png")
            plots.share_picture(measured, picture)
            print(f"picture: {picture}")


if __name__ == "__main__":
    main()
