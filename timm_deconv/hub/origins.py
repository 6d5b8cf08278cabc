"""Where weights come from: the paper, data sets and what their licences allow, prefixes of tags."""

from timm_deconv.errors import needs_extra
from timm_deconv.resources import recipe_files

with needs_extra("train"):
    from timm_deconv.training.recipe import Recipe, load_recipe
    from timm_deconv.training.results import dataset_name

__all__ = ["LICENSES", "PAPER", "TRAINED", "dataset_word"]

TRAINED = "nd_"
"""Starts the tags of weights that were trained with deconvolution."""

PAPER = "arXiv:1905.11926"

LICENSES = {
    "cifar10": "CIFAR-10 (Krizhevsky, 2009) states no licence: for research only",
    "cifar100": "CIFAR-100 (Krizhevsky, 2009) states no licence: for research only",
    "camvid": "CamVid (Brostow et al., 2009) is for research only",
    "cityscapes": "Cityscapes is for non-commercial research, by its terms of use",
    "imagenet": "ImageNet is for non-commercial research, by its terms of access",
    "fashion_mnist": "Fashion-MNIST: MIT licence",
    "mnist": "MNIST: CC BY-SA 3.0",
    "digits": "Optical recognition of handwritten digits (UCI): CC BY 4.0",
}
"""What may be done with the images, and so with weights made of them, by the word of a run's row."""


def dataset_word(recipe: Recipe) -> str:
    """Name the data set in one word; where the run read folders, as the recipe of its name does."""
    if not recipe.dataset and recipe.name in recipe_files():
        recipe = recipe.merged({"dataset": load_recipe(recipe.name).dataset})
    return dataset_name(recipe)
