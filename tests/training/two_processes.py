"""Run on two processes: trains, and reports as JSON what the test asks about."""

import json
import sys

import torch
from accelerate import Accelerator

from timm_deconv.training import Recipe, load_recipe, loop
from timm_deconv.training.evaluation import evaluate
from timm_deconv.training.tasks import create_task


def largest_difference(accelerator: Accelerator, model: torch.nn.Module) -> float:
    values = torch.cat([value.double().flatten() for value in model.state_dict().values()])
    both = accelerator.gather(values[None])
    return (both[0] - both[1]).abs().max().item()


def run(recipe: Recipe, folder: str) -> None:
    # `train` without its end, which takes the process group down
    accelerator = loop.create_accelerator(recipe, cpu=True)
    loop.random_seed(recipe.seed)
    loop.Trainer(
        recipe, create_task(recipe, accelerator.device), loop.RunFolder(folder, recipe), accelerator
    ).run(False)


def main(folder: str, normed: str, plain: str) -> None:
    report = {}
    differences = []
    evaluate_epoch = loop.evaluate

    def compare_and_evaluate(task, model, loader, accelerator):
        differences.append(largest_difference(accelerator, model))
        return evaluate_epoch(task, model, loader, accelerator)

    loop.evaluate = compare_and_evaluate
    run(load_recipe(normed), f"{folder}/normed")
    run(load_recipe(plain), f"{folder}/plain")
    report["differences"] = differences

    recipe = load_recipe(plain)
    accelerator = loop.create_accelerator(recipe, cpu=True)
    task = create_task(recipe.merged({"batch_size": 50}), accelerator.device)
    loader = accelerator.prepare(task.evaluation_loader())
    report["images"] = evaluate(task, task.create_model(), loader, accelerator)["images"]
    report["processes"] = accelerator.num_processes
    if accelerator.is_main_process:
        print(json.dumps(report))
    accelerator.end_training()


if __name__ == "__main__":
    main(*sys.argv[1:])
