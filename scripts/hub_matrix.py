#!/usr/bin/env python
"""Publishes trees on a local Hub with several versions of its client, and loads them by every path.

    python scripts/hub_matrix.py published/* --output hub_matrix.csv
"""

import argparse
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # benchmarks is part of a checkout, and not installed

from timm_deconv.errors import needs_extra, one_line_errors

with one_line_errors(), needs_extra("benchmark"):
    from benchmarks.hub_matrix import COLUMNS, measure_with
    from benchmarks.rows import add_rows, print_table, result_files

CLIENTS = ("0.26.0", "1.33.0", "")
"""The lowest version that we support, the one before last, and the one that is installed."""


def parse() -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("trees", nargs="+", type=Path, help="folders that timm-deconv push --dry-run wrote")
    parser.add_argument("--clients", nargs="*", default=CLIENTS, help="versions of huggingface_hub; '' is installed")
    parser.add_argument("--output", type=Path, default=Path("hub_matrix.csv"), help="rows are added to this file")
    parser.add_argument("--record", action="store_true", help="add them to the checkout's hub_configs/results too")
    return parser.parse_args()


def main() -> None:
    """Measure, and print the rows."""
    args = parse()
    with one_line_errors():
        files = result_files(args.output, args.record, "hub_matrix.csv")
        for client in args.clients:
            rows = measure_with(client, [tree.resolve() for tree in args.trees])
            add_rows(files, COLUMNS, rows)
            print_table(rows, ["model", "client", "path", "difference"])


if __name__ == "__main__":
    main()
