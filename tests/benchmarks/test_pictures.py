"""Pictures of the docs: whitening decorrelates a photograph's windows, and every picture is drawn from the rows."""

from pathlib import Path

import pytest
import torch

from benchmarks.pictures import PICTURES, photograph, whitened

RESULTS = Path(__file__).parents[2] / "hub_configs" / "results"


def off_diagonal(matrix: torch.Tensor) -> torch.Tensor:
    return matrix[~torch.eye(len(matrix), dtype=torch.bool)]


def test_windows_of_a_photograph_are_correlated_before_whitening_and_not_after() -> None:
    image, before, after = whitened(photograph(), n_iter=15)
    assert image.shape == photograph().shape
    assert off_diagonal(before).min() > 0.8
    assert off_diagonal(after).abs().max() < 0.05


def test_fewer_steps_whiten_less() -> None:
    left = [off_diagonal(whitened(photograph(), n_iter=n_iter)[2]).abs().mean() for n_iter in (1, 5, 15)]
    assert left == sorted(left, reverse=True)


@pytest.mark.parametrize("name", PICTURES)
def test_a_picture_is_drawn_from_the_rows(tmp_path: Path, name: str) -> None:
    PICTURES[name](RESULTS, tmp_path / "new" / name)
    assert (tmp_path / "new" / name).read_bytes().startswith(b"\x89PNG")
