"""Recipes that train in about a second: timm's smallest ResNet on the digits."""

import pytest

from timm_deconv.training import Recipe, load_recipe


@pytest.fixture
def recipe() -> Recipe:
    return load_recipe("digits", ["model=test_resnet", "model_kwargs={}", "epochs=1", "batch_size=128"])


@pytest.fixture
def short_recipe(recipe: Recipe) -> Recipe:
    """The same with four updates an epoch, where what is learned does not matter."""
    return recipe.merged({"train_images": 512, "val_images": 128})
