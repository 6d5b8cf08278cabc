#!/usr/bin/env python
"""Trains a small deconvolution network and its batch-norm twin on the embedded digits, and lets the first read some.

Takes a few minutes on two processor cores and no network. Run again, it shows what it trained.
"""

import argparse
from pathlib import Path

import timm
import timm.data
import torch

from timm_deconv.data import Digits
from timm_deconv.errors import needs_extra, one_line_errors

with one_line_errors(), needs_extra("train"):
    from timm_deconv.training import load_recipe
    from timm_deconv.training.checkpoint import read_curve
    from timm_deconv.training.loop import train


def train_twins(output_dir: Path, settings: list[str]) -> Path:
    deconv = load_recipe("digits", settings)
    twin = deconv.merged({"model": deconv.model.removesuffix("_deconv")})
    folders = [output_dir / recipe.model for recipe in (deconv, twin)]
    for recipe, folder in zip((deconv, twin), folders, strict=True):
        print(f"\n{recipe.model} in {folder}", flush=True)
        train(recipe, folder, resume=True, cpu=True)
    print(f"\nright of {len(Digits(train=False))} test digits, in %, after each epoch\n")
    print(f"epoch  {deconv.model:>24}  {twin.model:>24}")
    for ours, theirs in zip(*map(read_curve, folders), strict=True):
        print(f"{ours['epoch']:>5}  {ours['top1']:>24}  {theirs['top1']:>24}")
    return folders[0]


def predict(folder: Path, count: int = 12) -> None:
    model = timm.create_model(f"local-dir:{folder.resolve()}", pretrained=True).eval()
    transform = timm.data.create_transform(**timm.data.resolve_data_config(model=model))
    digits = Digits(train=False)
    images, truth = zip(*(digits[index * 29] for index in range(count)), strict=True)
    with torch.no_grad():
        read = model(torch.stack([transform(image) for image in images])).argmax(1).tolist()
    print(f"\nread back from {folder}:\n  predicted {read}\n  truth     {list(truth)}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("settings", nargs="*", metavar="key=value", help="settings that replace the recipe's")
    parser.add_argument("--output-dir", type=Path, default=Path("runs", "quickstart"))
    args = parser.parse_intermixed_args()
    with one_line_errors():
        predict(train_twins(args.output_dir, args.settings))


if __name__ == "__main__":
    main()
