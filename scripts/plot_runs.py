#!/usr/bin/env python
"""Draws the curves of training runs as one picture: accuracy and loss against epochs and against seconds.

python scripts/plot_runs.py runs/cifar10_e1/* --output runs.png
"""

import argparse
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # benchmarks is part of a checkout, and not installed

from timm_deconv.errors import needs_extra, one_line_errors

with one_line_errors(), needs_extra("benchmark"):
    from benchmarks.run_pictures import curves_picture


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("runs", nargs="+", type=Path, help="output folders")
    parser.add_argument("--output", type=Path, default=Path("runs.png"), help="picture; its ending says the format")
    return parser.parse_args()


def main() -> None:
    args = parse()
    with one_line_errors():
        curves_picture(args.runs, args.output)
        print(f"picture: {args.output}")


if __name__ == "__main__":
    main()
