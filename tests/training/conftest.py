"""A recipe that trains in about a second: timm's smallest ResNet on the digits."""

import pytest

from timm_deconv.training import Recipe, load_recipe


@pytest.fixture
def recipe() -> Recipe:
    return load_recipe("digits", ["model=test_resnet", "model_kwargs={}", "epochs=1", "batch_size=128"])
