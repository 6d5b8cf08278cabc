#!/usr/bin/env python
"""Accuracy of whitening options and their peers over seeds, against the time of a training step or against the rate.

    study.py cifar10_e1 vgg11_cifar --data-dir DIR --seeds 0 1 --variants twin fast 'fast deconv.block=16'
    study.py cifar10_e1 vgg11_cifar --data-dir DIR --picture pareto.png --variants twin fast
    study.py finetune mobilenetv2_100 --data-dir DIR --variants 'twin lr=0.01' 'fast lr=0.01'
    study.py finetune mobilenetv2_100 --rates rates.png --output finetune.csv

A variant is `twin` (batch norm), `iterative` (iterative normalisation) or a preset, and settings as of train.py, those
of the whitening as deconv.key=value, live_every=N for statistics in every N-th step alone. Rows go to --output, and
with --record to hub_configs/results too: finetune.csv for runs from weights, else study.csv. A run that has rows there
is not done again. With --picture or --rates rows are drawn, against steps that are timed now or against the rate.
"""

import argparse
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # benchmarks is part of a checkout, and not installed

from timm_deconv.errors import needs_extra, one_line_errors

with one_line_errors(), needs_extra("benchmark"):
    from benchmarks import plots, study


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("recipe", help="a name of hub_configs/recipes, or a YAML file; its model is replaced")
    parser.add_argument("network", help="a registered pair, without _deconv")
    parser.add_argument("settings", nargs="*", metavar="key=value", help="settings of the recipe for all variants")
    parser.add_argument("--variants", nargs="+", default=["twin", "iterative", "paper", "fast"])
    parser.add_argument("--seeds", nargs="+", type=int, default=[0])
    parser.add_argument("--width", type=float, help="multiplies the channels, in networks that have the argument")
    parser.add_argument("--data-dir", help="of the images, as for train.py")
    parser.add_argument("--output", type=Path, help="CSV file; default output/study.csv or finetune.csv")
    parser.add_argument("--record", action="store_true", help="to the checkout's results too")
    parser.add_argument("--picture", type=Path, help="accuracy against step time of the rows recorded, or in --output")
    parser.add_argument("--rates", type=Path, help="picture of final accuracies against the rate, of the same rows")
    parser.add_argument("--rounds", type=int, default=7, help="measurements of each step")
    return parser.parse_intermixed_args()


def main() -> None:
    args = parse()
    with one_line_errors():
        recipe = study.study_recipe(args.recipe, args.settings, data_dir=args.data_dir, width=args.width)
        variants = [study.variant(text, args.network, recipe) for text in args.variants]
        files = study.study_files(recipe, args.output, args.record)
        if args.rates:
            plots.rates_picture(study.rate_rows(files[-1]), args.rates)
        elif args.picture:
            study.compare_with_steps(files, variants, args.picture, batch=recipe.batch_size, rounds=args.rounds)
        else:
            study.train_variants(variants, args.seeds, files[0].parent / "runs", files)


if __name__ == "__main__":
    main()
