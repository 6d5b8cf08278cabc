#!/usr/bin/env python
"""Trains a small network on the embedded digits, with deconvolution and with batch norm, and lets the first read some.

Takes a few minutes on two processor cores and no network. Run again, it shows what it trained.
"""

import argparse
from pathlib import Path

import timm
import torch

from timm_deconv.data import Digits
from timm_deconv.errors import needs_extra, one_line_errors

with one_line_errors(), needs_extra("train"):
    from timm_deconv.training import load_recipe
    from timm_deconv.training.checkpoint import read_curve
    from timm_deconv.training.loop import train


def train_both(output_dir: Path, settings: list[str]) -> Path:
    """Train both networks, show how well each reads after every epoch, and return the folder of the first."""
    recipe = load_recipe("digits", settings)
    recipes = {"deconvolution": recipe, "batch norm": recipe.merged({"model": recipe.model.removesuffix("_deconv")})}
    folders = [output_dir / recipe.model for recipe in recipes.values()]
    for folder, (name, recipe) in zip(folders, recipes.items(), strict=True):
        print(f"\n{recipe.model}, with {name}", flush=True)
        train(recipe, folder, resume=True, cpu=True)
    print("\ntest digits read correctly, in %\n\nepoch", *(f"{name:>14}" for name in recipes))
    for rows in zip(*map(read_curve, folders), strict=True):
        print(f"{rows[0]['epoch']:>5}", *(f"{float(row['top1']):14.1f}" for row in rows))
    return folders[0]


@torch.no_grad()
def predict(folder: Path) -> None:
    """Load the network that was saved, and print what it reads in the first test image of each digit."""
    model = timm.create_model(f"local-dir:{folder.resolve()}", pretrained=True).eval()
    test = Digits(train=False, transform=timm.data.create_transform(**timm.data.resolve_data_config(model=model)))
    images = [test[list(test.targets).index(digit)][0] for digit in range(10)]
    read = model(torch.stack(images)).argmax(1).tolist()
    print(f"\nsaved in {folder}; loaded again by timm.create_model('local-dir:{folder}', pretrained=True):\n")
    print("digits     ", *range(10))
    print("read as    ", *read)


def main() -> None:
    """Run the quickstart."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("settings", nargs="*", metavar="key=value", help="settings that replace the recipe's")
    parser.add_argument("--output-dir", type=Path, default=Path("runs", "quickstart"))
    args = parser.parse_intermixed_args()
    with one_line_errors():
        predict(train_both(args.output_dir, args.settings))


if __name__ == "__main__":
    main()
