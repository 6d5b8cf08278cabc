"""The whitened windows that the page shows are those that the network's first layer multiplies with its weight."""

import pytest
import torch

from benchmarks.pictures import photograph
from timm_deconv.demo.whitening import correlations, has_statistics, middles, whiten_windows
from timm_deconv.layers import Deconv2d, Deconv2dSame

LAYERS = [
    Deconv2d(3, 8, 3, padding=1, cfg="fast"),
    Deconv2d(3, 8, 3, padding=1, cfg={"block": 1}),
    Deconv2d(3, 8, (5, 3), padding=(2, 1), cfg={"n_iter": 15, "freeze": True}),
    Deconv2d(1, 4, 3, padding=1, cfg={"layout": "channels"}),
    Deconv2dSame(3, 8, 3, cfg="fast"),
]
THOROUGH = [
    Deconv2d(3, 8, 3, stride=2, cfg={"n_iter": 15, "block": 3}),
    Deconv2d(1, 8, 3, cfg={"n_iter": 15}),
]


def picture(channels: int) -> torch.Tensor:
    """A smooth picture, whose neighbouring pixels and channels are alike."""
    noise = torch.nn.functional.avg_pool2d(torch.randn(1, 1, 52, 48), 9, 1)[0]
    return noise * 5 + torch.randn(channels, 44, 40) * 0.1


def off_diagonal(matrix: torch.Tensor) -> torch.Tensor:
    return matrix[~torch.eye(len(matrix), dtype=torch.bool)]


@pytest.mark.parametrize("layer", LAYERS, ids=str)
def test_with_running_statistics_they_are_what_the_layer_multiplies_with_its_weight(layer: Deconv2d) -> None:
    layer.train()
    for _ in range(2):
        layer(torch.stack([picture(layer.in_channels) for _ in range(4)]))
    image = picture(layer.in_channels)
    found = whiten_windows(image, layer.eval())
    assert has_statistics(layer)
    with torch.no_grad():
        expected = layer(image[None])[0]
        made = torch.einsum("of,fhw->ohw", layer.weight.flatten(1), found.whitened) + layer.bias[:, None, None]
    assert (made - expected).abs().max() < 1e-5 * expected.abs().max()


@pytest.mark.parametrize("layer", THOROUGH, ids=str)
def test_without_statistics_the_pictures_own_windows_are_white(layer: Deconv2d) -> None:
    image = picture(layer.in_channels)
    found = whiten_windows(image, layer)
    assert not has_statistics(layer)
    before, after = map(correlations, found)
    assert off_diagonal(before).mean() > 0.5
    assert off_diagonal(after).abs().mean() < 0.05
    assert torch.equal(middles(found.plain, layer), image)
    assert layer.num_batches_tracked == 0


def test_windows_of_a_photograph_are_correlated_before_whitening_and_the_less_after_the_more_steps() -> None:
    left = []
    for n_iter in (1, 5, 15):
        before, after = map(correlations, whiten_windows(photograph(), Deconv2d(3, 1, 3, cfg={"n_iter": n_iter})))
        assert off_diagonal(before).min() > 0.8
        left.append(float(off_diagonal(after).abs().mean()))
    assert left == sorted(left, reverse=True)
    assert off_diagonal(after).abs().max() < 0.05


def test_of_a_picture_of_one_colour_nothing_correlates() -> None:
    layer = Deconv2d(3, 8, 1)
    found = whiten_windows(torch.full((3, 8, 8), 0.7), layer)
    assert torch.equal(found.whitened, torch.zeros_like(found.whitened))
    assert torch.equal(correlations(found.plain), torch.zeros(3, 3, dtype=torch.double))
