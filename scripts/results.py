#!/usr/bin/env python
"""Writes the tables of README and docs from the rows in hub_configs/results, and draws the pictures.

    python scripts/results.py              tables
    python scripts/results.py --check      fails, naming the pages, where a table is not what the rows say
    python scripts/results.py --pictures   tables, and docs/images
"""

import argparse
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # benchmarks is part of a checkout, and not installed

from timm_deconv.errors import InputError, needs_extra, one_line_errors

with one_line_errors(), needs_extra("benchmark"):
    from benchmarks import pages, pictures

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "hub_configs" / "results"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    what = parser.add_mutually_exclusive_group()
    what.add_argument("--check", action="store_true", help="write nothing; fail where a page is stale")
    what.add_argument("--pictures", action="store_true", help="draw the pictures too")
    args = parser.parse_args()
    with one_line_errors():
        stale = pages.stale_pages([ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))], RESULTS)
        names = ", ".join(str(page.relative_to(ROOT)) for page in stale)
        if args.check and stale:
            raise InputError(f"{names}: tables are not those of the rows; run python scripts/results.py")
        for page, text in stale.items():
            page.write_text(text)
        print(f"written: {names}" if stale else "the tables are those of the rows")
        if args.pictures:
            pictures.draw_all(RESULTS, ROOT / "docs" / "images")


if __name__ == "__main__":
    main()
