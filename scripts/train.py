#!/usr/bin/env python
"""Trains a recipe: python scripts/train.py digits, or accelerate launch scripts/train.py cifar10_e20 --data-dir DIR.

Settings of the recipe are changed by key=value: epochs=5 lr=0.05 model_kwargs.deconv=fast.
"""

import argparse
from pathlib import Path

from timm_deconv.errors import needs_extra, one_line_errors

with one_line_errors(), needs_extra("train"):
    from timm_deconv.training import Recipe, load_recipe
    from timm_deconv.training.loop import train
    from timm_deconv.training.recipe import parse_settings


def parse() -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("recipe", help="a name of hub_configs/recipes, or a YAML file")
    parser.add_argument("settings", nargs="*", metavar="key=value", help="settings that replace the recipe's")
    parser.add_argument("--model", help="a name of timm.list_models(), in place of the recipe's")
    parser.add_argument("--data-dir", help="folder of train and val (or test) folders or tars, or torchvision's own")
    parser.add_argument("--output-dir", help="of this run alone; default runs/RECIPE/MODEL-seedN")
    parser.add_argument("--resume", action="store_true", help="continue the run in --output-dir")
    parser.add_argument("--record", action="store_true", help="add the result to the checkout's hub_configs/results")
    parser.add_argument("--profile", action="store_true", help="write which operations updates 7 to 10 consist of")
    parser.add_argument("--cpu", action="store_true", help="stay on the processor where there is a GPU")
    return parser.parse_intermixed_args()


def resolve(args: argparse.Namespace) -> Recipe:
    """Load the recipe and apply what the command line changes, key=value last."""
    recipe = load_recipe(args.recipe)
    if args.model not in (None, recipe.model):
        # the recipe's arguments are those of its own model
        recipe = recipe.merged({"model": args.model, "model_kwargs": {}})
    if args.data_dir is not None:
        recipe = recipe.merged({"data_dir": args.data_dir})
    return recipe.merged(parse_settings(args.settings, recipe.model_dump(mode="json")))


def main() -> None:
    """Train what the command line asks for."""
    args = parse()
    with one_line_errors():
        recipe = resolve(args)
        output_dir = args.output_dir or Path("runs", recipe.name, f"{recipe.model}-seed{recipe.seed}")
        train(recipe, output_dir, resume=args.resume, record=args.record, cpu=args.cpu, profile=args.profile)


if __name__ == "__main__":
    main()
