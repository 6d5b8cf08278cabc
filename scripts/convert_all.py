#!/usr/bin/env python
"""Converts every batch-norm network of timm and checks what comes of it: a row each in a CSV file.

    python scripts/convert_all.py --output output/convert.csv
    python scripts/convert_all.py --output output/convert.csv --networks 'regnet*' --time-limit 300

Networks that the file has a row of are passed over, so that a run goes on where it was stopped. Each network has a
process of its own.
"""

import argparse
from fnmatch import fnmatchcase
from pathlib import Path

import torch

from timm_deconv.benchmark.conversion import (
    append_row,
    batch_norm_networks,
    check_in_process,
    networks_done,
)
from timm_deconv.errors import one_line_errors


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", default="output/convert.csv", type=Path, help="CSV file that the rows are added to")
    parser.add_argument("--networks", nargs="+", default=["*"], help="shell patterns of names; default all")
    parser.add_argument("--names", type=Path, help="file of the names, one a line, in the order to go; default timm's")
    parser.add_argument("--time-limit", default=600, type=int, help="seconds of processor time; default 600")
    parser.add_argument("--threads", default=1, type=int)
    return parser.parse_args()


def main() -> None:
    args = parse()
    torch.set_num_threads(args.threads)
    names = args.names.read_text().split() if args.names else batch_norm_networks()
    with one_line_errors():
        done = networks_done(args.output)
        for name in names:
            if name not in done and any(fnmatchcase(name, pattern) for pattern in args.networks):
                row = check_in_process(name, args.time_limit)
                append_row(args.output, row)
                print(f"{name}: {row.outcome} ({row.seconds} s)", flush=True)


if __name__ == "__main__":
    main()
