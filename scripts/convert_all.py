#!/usr/bin/env python
"""Converts every batch-norm network of timm and checks what comes of it: a row each in a CSV file.

    python scripts/convert_all.py --output output/convert.csv
    python scripts/convert_all.py --output output/convert.csv --networks 'regnet*' --time-limit 300

Networks that the file has a row of are passed over, so that a run goes on where it was stopped. Each network has a
process of its own.
"""

import argparse
import multiprocessing
import resource
import signal
from fnmatch import fnmatchcase
from multiprocessing.connection import Connection
from pathlib import Path

import torch

from timm_deconv.benchmark.conversion import (
    ConversionRow,
    append_row,
    batch_norm_networks,
    check_network,
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


def check(name: str, time_limit: int) -> ConversionRow:
    """The row of one network, made in a process of its own, which may end badly."""
    receive, send = multiprocessing.Pipe(duplex=False)
    process = multiprocessing.get_context("fork").Process(target=send_row, args=(name, time_limit, send))
    process.start()
    send.close()
    try:
        return receive.recv()
    except EOFError:
        process.join()
        reason = f"more than {time_limit} s" if process.exitcode == -signal.SIGXCPU else f"status {process.exitcode}"
        return ConversionRow(name, outcome=f"ended before it was done: {reason}")


def send_row(name: str, time_limit: int, send: Connection) -> None:
    """Check a network within so many seconds of processor time."""
    resource.setrlimit(resource.RLIMIT_CPU, (time_limit, time_limit + 1))
    send.send(check_network(name))


def main() -> None:
    args = parse()
    torch.set_num_threads(args.threads)
    names = args.names.read_text().split() if args.names else batch_norm_networks()
    with one_line_errors():
        done = networks_done(args.output)
        for name in names:
            if name not in done and any(fnmatchcase(name, pattern) for pattern in args.networks):
                row = check(name, args.time_limit)
                append_row(args.output, row)
                print(f"{name}: {row.outcome} ({row.seconds} s)", flush=True)


if __name__ == "__main__":
    main()
