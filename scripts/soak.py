#!/usr/bin/env python
"""Trains for a long time and records memory and images a second, as rows and a picture: do they stay flat?

    python scripts/soak.py cifar10_e20 --data-dir DIR --minutes 60 --record

The run lies in --output-dir and ends with the recipe's epochs or the minutes; train.py can resume it. Rows go to
soak.csv in that folder, and with --record to hub_configs/results of the checkout too.
"""

import argparse
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # benchmarks is part of a checkout, and not installed

from timm_deconv.errors import needs_extra, one_line_errors

with one_line_errors(), needs_extra("benchmark"):
    from benchmarks import plots, rows, run_pictures, soak
    from timm_deconv.training import load_recipe


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("recipe", help="a name of hub_configs/recipes, or a YAML file; of classes")
    parser.add_argument("settings", nargs="*", metavar="key=value", help="settings that replace the recipe's")
    parser.add_argument("--data-dir", help="of the images, as for train.py")
    parser.add_argument("--minutes", type=float, default=60)
    parser.add_argument("--every", type=float, default=15, help="seconds between rows; default 15")
    parser.add_argument("--output-dir", type=Path, default=Path("runs", "soak"))
    parser.add_argument("--record", action="store_true", help="to the checkout's results too")
    parser.add_argument("--cpu", action="store_true", help="stay on the processor where there is a GPU")
    return parser.parse_intermixed_args()


def main() -> None:
    args = parse()
    with one_line_errors():
        plots.need_matplotlib()
        recipe = load_recipe(args.recipe, args.settings)
        if args.data_dir:
            recipe = recipe.merged({"data_dir": args.data_dir})
        files = rows.result_files(args.output_dir / "soak.csv", args.record, "soak.csv")
        measured = soak.soak(recipe, args.output_dir, args.minutes, args.every, files, args.cpu)
        run_pictures.soak_picture(measured, args.output_dir / "soak.png")
        print(f"{soak.soak_summary(measured)}; picture: {args.output_dir / 'soak.png'}")


if __name__ == "__main__":
    main()
