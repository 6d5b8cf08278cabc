#!/usr/bin/env python
"""Evaluates weights: python scripts/validate.py runs/digits/..., or a Hub id, or a model's name.

A folder of our own is evaluated on the data set it was trained for; otherwise --recipe or --data-dir says which.
Preprocessing is always that of the weights; key=value changes it.
"""

import argparse

from timm_deconv.errors import needs_extra, one_line_errors

with one_line_errors(), needs_extra("train"):
    from timm_deconv.models.loading import load_network
    from timm_deconv.training.evaluation import evaluation_recipe, validate
    from timm_deconv.training.loop import create_accelerator
    from timm_deconv.training.recipe import parse_settings
    from timm_deconv.training.tasks import create_task


def parse() -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", help="output folder of a run, Hub id (org/name), or a name of timm.list_models()")
    parser.add_argument("settings", nargs="*", metavar="key=value", help="settings that replace the recipe's")
    parser.add_argument("--recipe", help="whose data set to evaluate on; a name of hub_configs/recipes, or a YAML file")
    parser.add_argument("--data-dir", help="folder of val (or test) folders or tars, or torchvision's own layout")
    parser.add_argument("--draw", metavar="DIR", help="draw predictions over the first 100 images")
    parser.add_argument("--cpu", action="store_true", help="stay on the processor where there is a GPU")
    return parser.parse_intermixed_args()


def main() -> None:
    """Evaluate what the command line names, and print one line."""
    args = parse()
    with one_line_errors():
        model = load_network(args.model)
        chosen = {} if args.data_dir is None else {"data_dir": args.data_dir}
        recipe = evaluation_recipe(args.model, model, args.recipe, {**chosen, **parse_settings(args.settings)})
        accelerator = create_accelerator(recipe, cpu=args.cpu)
        task = create_task(recipe, accelerator.device)
        figures = validate(model, task, accelerator, args.draw)
        speed = f"{figures['images']} images, {figures['images_per_second']:.0f} images/s"
        accelerator.print(f"{task.said(figures)}, {speed}")
        accelerator.end_training()


if __name__ == "__main__":
    main()
