#!/usr/bin/env python
"""Kills runs at random moments and resumes them: does each end bit for bit where it would have without?

    kill_loop.py --output kills.csv
    kill_loop.py --kills 6 --seed 1

Runs are the digits, in one process and in two; see benchmarks/killing.py. Rows go to --output, and with --record to
hub_configs/results of the checkout too; what has a row there is not done again. The exit code is 1 where a run has
ended otherwise, or repeated too much.
"""

import argparse
import sys
import tempfile
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # benchmarks is part of a checkout, and not installed

from timm_deconv.errors import needs_extra, one_line_errors

with one_line_errors(), needs_extra("benchmark"):
    from benchmarks import killing, rows


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=20)
    parser.add_argument("--seed", type=int, default=0, help="of the moments; default 0")
    parser.add_argument("--output", type=Path, default=Path("output", "killing.csv"), help="CSV file")
    parser.add_argument("--record", action="store_true", help="to the checkout's results too")
    return parser.parse_args()


def main() -> None:
    args = parse()
    measured = []
    with one_line_errors(), tempfile.TemporaryDirectory() as folder:
        files = rows.result_files(args.output, args.record, "killing.csv")
        done = rows.rows_done(files, killing.COLUMNS)
        planned = {i: plan for i, plan in killing.kills(args.kills, args.seed).items() if str(i) not in done}
        for row in killing.kill_loop(planned, Path(folder)):
            rows.add_rows(files, killing.COLUMNS, [row])
            measured.append(row)
    rows.print_table(measured, killing.RESULT)
    sys.exit(not all(row["identical"] and row["repeated"] <= row["allowed"] for row in measured))


if __name__ == "__main__":
    main()
