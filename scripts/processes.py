#!/usr/bin/env python
"""Several processes with synchronised statistics: do they learn what one learns, and what does that cost?

    processes.py equivalence --output equivalence.csv
    processes.py cost resnet18_cifar --batch 128 --size 32

On gloo and a CPU; see benchmarks/equivalence.py and benchmarks/sharing.py. Rows go to --output, and with --record to
hub_configs/results of the checkout too.
"""

import argparse
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # benchmarks is part of a checkout, and not installed

from timm_deconv.errors import needs_extra, one_line_errors

with one_line_errors(), needs_extra("benchmark"):
    from benchmarks import equivalence, rows, sharing


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=("equivalence", "cost"))
    parser.add_argument("networks", nargs="*", help="of cost: names with a deconvolution twin")
    parser.add_argument("--batch", type=int, default=128, help="of cost, over all processes; default 128")
    parser.add_argument("--size", type=int, default=32, help="of cost: height and width; default 32")
    parser.add_argument("--output", type=Path, help="CSV file; default output/equivalence.csv or output/sharing.csv")
    parser.add_argument("--record", action="store_true", help="to the checkout's results too")
    return parser.parse_args()


def main() -> None:
    args = parse()
    module, name = (equivalence, "equivalence.csv") if args.what == "equivalence" else (sharing, "sharing.csv")
    measured = []
    with one_line_errors():
        files = rows.result_files(args.output or Path("output", name), args.record, name)
        if args.what == "equivalence":
            found = (
                row
                for processes in (2, 4)
                for row in equivalence.compared(equivalence.CASES, processes, ("float64", "float32"))
            )
        else:
            found = (row for network in args.networks for row in sharing.shared(network, args.batch, args.size))
        for row in found:
            rows.add_rows(files, module.COLUMNS, [row])
            measured.append(row)
    rows.print_table(measured, module.RESULT)


if __name__ == "__main__":
    main()
