"""`timm-deconv validate`."""

from pathlib import Path

from timm_deconv.errors import needs_extra

from .output import print_json

__all__ = ["validate"]


def validate(
    model: str,
    /,
    *settings: str,
    recipe: str | None = None,
    data_dir: str | None = None,
    draw: Path | None = None,
    cpu: bool = False,
    json: bool = False,
) -> None:
    """Evaluate weights on a data set.

    The folder of a run is evaluated on the data set it was trained for;
    otherwise --recipe or --data-dir says which. Preprocessing is that of the
    weights, and key=value changes it.

        timm-deconv validate runs/digits/resnet18_cifar_deconv-seed0
        timm-deconv validate resnet18_deconv.bn_a1_in1k --data-dir DIR
        timm-deconv validate hf-hub:ORG/NAME --recipe cifar10_e20 --data-dir DIR

    Args:
        model: folder of a run, repository of the Hub (hf-hub:ORG/NAME), or a name of timm.list_models().
        settings: key=value, that replace the recipe's.
        recipe: whose data set to evaluate on; a name of hub_configs/recipes, or a YAML file.
        data_dir: folder of val (or test) folders or tars, or torchvision's own layout.
        draw: folder for the first 100 images with what the network says of them.
        cpu: stay on the processor where there is a GPU.
        json: print JSON.
    """
    with needs_extra("train"):
        from timm_deconv.training import evaluation
        from timm_deconv.training.loop import create_accelerator
        from timm_deconv.training.recipe import parse_settings
        from timm_deconv.training.tasks import create_task
    from timm_deconv.models.loading import load_network

    network = load_network(model)
    chosen = {} if data_dir is None else {"data_dir": data_dir}
    evaluated = evaluation.evaluation_recipe(model, network, recipe, {**chosen, **parse_settings(settings)})
    accelerator = create_accelerator(evaluated, cpu=cpu)
    task = create_task(evaluated, accelerator.device)
    figures = evaluation.validate(network, task, accelerator, draw)
    if accelerator.is_main_process and json:
        print_json(figures)
    elif accelerator.is_main_process:
        print(f"{task.said(figures)}, {figures['images']} images, {figures['images_per_second']:.0f} images/s")
    accelerator.end_training()
