#!/usr/bin/env python
"""Trains a batch-norm network, carries its weights over, and goes on both with batch norm and with deconvolution.

    python scripts/finetune.py cifar10_e1 --model resnet18_cifar --data-dir DIR --further lr=0.01 epochs=2 -- epochs=3

Adds the accuracy after each further epoch to --output (results.csv of --output-dir by default). What an earlier run of
the same settings has done is not done again, so that the two forms may run beside each other.
"""

import argparse
from pathlib import Path

from timm_deconv.errors import one_line_errors
from timm_deconv.training import load_recipe
from timm_deconv.training.finetune import FORMS, finetune
from timm_deconv.training.recipe import parse_settings
from timm_deconv.training.results import append_row


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("recipe", help="a name of hub_configs/recipes, or a YAML file")
    parser.add_argument("settings", nargs="*", metavar="key=value", help="settings that replace the recipe's")
    parser.add_argument("--model", required=True, help="a batch-norm network that has a _deconv form")
    parser.add_argument("--further", nargs="+", default=[], metavar="key=value", help="settings of what follows alone")
    parser.add_argument("--forms", nargs="+", default=FORMS, help="how to go on: twin, deconv; default both")
    parser.add_argument("--preset", default="fast", help="of the deconvolution network; default fast")
    parser.add_argument("--data-dir", help="as of scripts/train.py")
    parser.add_argument("--output-dir", required=True, type=Path, help="of all these runs")
    parser.add_argument("--output", type=Path, help="CSV file that the rows are added to")
    return parser.parse_args()


def main() -> None:
    args = parse()
    with one_line_errors():
        chosen = {"model": args.model, "model_kwargs": {}}
        chosen |= {} if args.data_dir is None else {"data_dir": args.data_dir}
        recipe = load_recipe(args.recipe).merged(chosen)
        recipe = recipe.merged(parse_settings(args.settings, recipe.model_dump()))
        further = recipe.merged(parse_settings(args.further, recipe.model_dump()))
        for form in args.forms:
            for row in finetune(recipe, further, form, args.output_dir, preset=args.preset):
                append_row(args.output or args.output_dir / "results.csv", row)
                print(f"{row['model']}: {row['top1']:.2f} % after {row['epochs']} further epochs", flush=True)


if __name__ == "__main__":
    main()
