"""Run on two processes: trains a small whitened network eagerly, compiled whole, and by regions; tells the graphs."""

import json
import sys

import torch
from accelerate import Accelerator

from timm_deconv.training import load_recipe, loop
from timm_deconv.training.tasks import create_task

FORMS = {
    "eager": [],
    "whole": ["torchcompile=eager"],
    "regions": ["torchcompile=eager", "torchcompile_regions=true"],
}
SMALL = "model=vgg11_cifar_deconv model_kwargs.width=0.125 epochs=1 train_images=192 val_images=64 lr=0.001".split()


def run(folder: str, settings: list[str]) -> Accelerator:
    # `train` without its end, which takes the process group down
    recipe = load_recipe("digits", [*SMALL, *settings])
    accelerator = loop.create_accelerator(recipe, cpu=True)
    loop.random_seed(recipe.seed)
    task = create_task(recipe, accelerator.device)
    loop.Trainer(recipe, task, loop.RunFolder(folder, recipe), accelerator).run(False)
    return accelerator


def main(folder: str) -> None:
    graphs = {}
    for form, settings in FORMS.items():
        torch._dynamo.utils.counters.clear()
        accelerator = run(f"{folder}/{form}", settings)
        graphs[form] = torch._dynamo.utils.counters["stats"]["unique_graphs"]
    if accelerator.is_main_process:
        print(json.dumps({"graphs": graphs}))
    accelerator.end_training()


if __name__ == "__main__":
    main(*sys.argv[1:])
