"""Shared fixtures: where data lies, one thread a worker, the same random numbers in every test."""

import os
import random
from pathlib import Path

import numpy as np
import pytest
import torch

from tests.golden_files import golden_folder

# Small work is quicker on one thread than on threads that wait for one another. The variable is for what tests start.
os.environ["OMP_NUM_THREADS"] = "1"
torch.set_num_threads(1)


@pytest.fixture(autouse=True)
def _same_random_numbers() -> None:
    random.seed(0)
    np.random.seed(0)
    torch.manual_seed(0)


@pytest.fixture(scope="session")
def golden_dir() -> Path:
    """The folder of golden values: the whole set where it lies beside the checkout, else what the tests keep."""
    return golden_folder()


@pytest.fixture(scope="session")
def data_dir() -> Path:
    """The folder of real data sets, `TIMM_DECONV_DATA` or ../shared/data; skips the test where there is none."""
    folder = Path(os.environ.get("TIMM_DECONV_DATA", Path(__file__).parents[2] / "shared" / "data"))
    if not folder.is_dir():
        pytest.skip(f"no data sets in {folder}; set TIMM_DECONV_DATA")
    return folder


@pytest.fixture(scope="session")
def finished_run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The output folder of a run; not to be written to."""
    from timm_deconv.training import load_recipe  # here, as hub/with_client.py says first which Hub is asked
    from timm_deconv.training.loop import train

    folder = tmp_path_factory.mktemp("run") / "digits"
    small = ["train_images=256", "val_images=64", "batch_size=64", "epochs=2", "health_interval=0"]
    recipe = load_recipe("digits", ["model=test_resnet", "model_kwargs={}", *small])
    model = {"model": "resnet18_cifar_deconv", "model_kwargs": {"width": 0.0625}}
    train(recipe.merged(model), folder, cpu=True)
    return folder
