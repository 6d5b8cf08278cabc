"""`timm-deconv train`."""

from pathlib import Path
from typing import TYPE_CHECKING

from timm_deconv.errors import needs_extra

if TYPE_CHECKING:
    from timm_deconv.training import Recipe

__all__ = ["resolve", "train"]


def train(
    recipe: str,
    /,
    *settings: str,
    model: str | None = None,
    data_dir: str | None = None,
    output_dir: Path | None = None,
    resume: bool = False,
    record: bool = False,
    profile: bool = False,
    cpu: bool = False,
) -> None:
    """Train a network by a recipe.

    On the signals SIGTERM and SIGUSR1 the run saves itself and ends with exit
    status 75; --resume goes on.

        timm-deconv train digits
        timm-deconv train cifar10_e20 --data-dir DIR lr=0.05 seed=1
        timm-deconv train digits --model vgg11_cifar_deconv model_kwargs.width=0.5
        torchrun --no-python --nproc_per_node 2 timm-deconv train digits --resume

    Args:
        recipe: a name of hub_configs/recipes, or a YAML file.
        settings: key=value, that replace the recipe's.
        model: a name of timm.list_models(), in place of the recipe's.
        data_dir: folder of train and val (or test) folders or tars, or torchvision's own layout.
        output_dir: of this run alone; default runs/RECIPE/MODEL-seedN.
        resume: continue the run in --output-dir.
        record: add the result to the checkout's hub_configs/results.
        profile: write which operations updates 7 to 10 consist of.
        cpu: stay on the processor where there is a GPU.
    """
    with needs_extra("train"):
        from timm_deconv.training.loop import train as run

    chosen = resolve(recipe, *settings, model=model, data_dir=data_dir)
    folder = output_dir or Path("runs", chosen.name, f"{chosen.model}-seed{chosen.seed}")
    run(chosen, folder, resume=resume, record=record, cpu=cpu, profile=profile)


def resolve(recipe: str, /, *settings: str, model: str | None = None, data_dir: str | None = None) -> "Recipe":
    """Load a recipe and apply what the command line changes, key=value last; arguments as those of `train`."""
    from timm_deconv.training.recipe import load_recipe, parse_settings

    chosen = load_recipe(recipe)
    if model not in (None, chosen.model):
        # the recipe's arguments are those of its own model
        chosen = chosen.merged({"model": model, "model_kwargs": {}})
    if data_dir is not None:
        chosen = chosen.merged({"data_dir": data_dir})
    return chosen.merged(parse_settings(settings, chosen.model_dump(mode="json")))
