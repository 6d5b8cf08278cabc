#!/usr/bin/env python
"""Checks whitening on a GPU against its goals, in five minutes: tests, steps, kernels, memory, waiting, CUDA graphs.

    python scripts/gpu_check.py            all parts that have no rows yet, of this card, these versions, this commit
    python scripts/gpu_check.py --tiny     a trial in a minute, on a processor too

Prints what the card is, and what was found beside the goals. A run that was stopped goes on where it was.
"""

import argparse
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # benchmarks is part of a checkout, and not installed

from timm_deconv.errors import needs_extra, one_line_errors

with one_line_errors(), needs_extra("benchmark"):
    from benchmarks.gpu_check import PARTS, check

RESULTS = Path(__file__).resolve().parent.parent / "hub_configs" / "results"


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tiny", action="store_true", help="small networks, few steps; to output/gpu_check.csv")
    parser.add_argument("--parts", nargs="+", default=[], help=f"some of: {'; '.join(PARTS)}")
    parser.add_argument("--seconds", type=float, default=290, help="stop after so many; the next run goes on")
    parser.add_argument("--output", type=Path, help="CSV file to add rows to; hub_configs/results/gpu_check.csv")
    return parser.parse_args()


def main() -> None:
    arguments = parse()
    with one_line_errors():
        check(
            arguments.output or (Path("output") if arguments.tiny else RESULTS) / "gpu_check.csv",
            tiny=arguments.tiny,
            names=arguments.parts,
            seconds=arguments.seconds,
        )


if __name__ == "__main__":
    main()
