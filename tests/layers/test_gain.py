"""Evaluation passes on what training does: in one layer, whatever its batches; networks in tests/convert."""

import copy

import pytest
import torch
from torch import Tensor, nn

from timm_deconv.kernels.gain import first_norm, gain, passed_norm
from timm_deconv.layers import Deconv2d, DeconvLinear

FAST = {"preset": "fast"}
AVERAGED = {"preset": "fast", "gain_corrected": False}


def pixels(batch: int, channels: int, seed: int) -> Tensor:
    """Images of one pixel, channels correlated alike in all of them."""
    mixing = torch.randn(channels, channels, generator=torch.Generator().manual_seed(0)) / channels**0.5
    return (torch.randn(batch, channels, generator=torch.Generator().manual_seed(seed)) @ mixing + 0.5)[..., None, None]


def power(output: Tensor, bias: Tensor) -> float:
    return float((output.detach() - bias.detach().reshape(1, -1, *(1,) * (output.ndim - 2))).square().mean())


def trained(cfg: dict, batch: int, steps: int, growth: float = 1.0) -> tuple[Deconv2d, float, float]:
    """A pointwise layer of 64 features after some batches, and the power of its output in training and evaluation."""
    torch.manual_seed(1)
    layer = Deconv2d(64, 128, 1, cfg=cfg)
    for step in range(steps):
        layer(growth**step * pixels(batch, 64, step))
    x = growth**steps * pixels(batch, 64, 999)
    live = power(copy.deepcopy(layer)(x), layer.bias)
    return layer, live, power(layer.eval()(x), layer.bias)


@pytest.mark.parametrize("batch", [16, 64, 128])
def test_evaluation_has_the_power_of_training_where_rows_are_few(batch: int) -> None:
    _, live, evaluated = trained(FAST, batch, 30)
    assert 0.75 * live < evaluated < 1.15 * live
    _, live, evaluated = trained(AVERAGED, batch, 30)
    assert evaluated > 1.1 * live


@pytest.mark.parametrize(("steps", "least"), [(1, 0.2), (2, 0.35), (4, 0.6), (8, 0.75)])
def test_among_the_first_batches_evaluation_errs_to_the_small_side(steps: int, least: float) -> None:
    _, live, evaluated = trained(FAST, 64, steps)
    assert least * live < evaluated < 1.05 * live


def test_inputs_that_grow_with_the_weights_before_are_followed() -> None:
    for steps in (8, 40):
        _, live, evaluated = trained(FAST, 64, steps, growth=1.2)
        assert evaluated < 1.6 * live
        _, live, evaluated = trained(AVERAGED, 64, steps, growth=1.2)
        assert evaluated > 3 * live


def test_a_channel_that_was_dead_in_most_batches_is_not_blown_up() -> None:
    layer = Deconv2d(8, 8, 3, padding=1, groups=8, cfg=FAST)
    for step in range(12):
        x = torch.randn(4, 8, 8, 8)
        if step % 4:
            x[:, 0] = 0.3
        layer(x)
    layer.eval()
    deviations = layer(torch.randn(64, 8, 8, 8)) - layer.bias[:, None, None]
    weights = layer.weight.flatten(1).square().sum(1)
    ratios = deviations.square().mean((0, 2, 3)) / weights
    assert ratios.max() < 1.6 and ratios.min() > 0.4


def test_each_set_has_its_own_gain() -> None:
    layer = Deconv2d(32, 32, 3, padding=1, groups=2, cfg=FAST)
    for _ in range(10):
        x = torch.randn(2, 32, 6, 6)
        x[:, 16:, 1:] = 0.1 * torch.randn(1)  # few rows vary in the second group
        layer(x)
    assert layer.running_gain.shape == (2,) and layer.running_gain[1] < 0.97 * layer.running_gain[0]


def test_the_gain_is_one_over_the_root_of_what_is_passed_on_too_much() -> None:
    power, many = torch.tensor([[4.0, 1.0], [1.0, 1.0]]), torch.tensor(1e6)
    torch.testing.assert_close(gain(power, power, many), torch.tensor([0.5, 1.0]))
    latest = torch.tensor([[16.0, 4.0], [1.0, 1.0]])  # four times as much as on average
    torch.testing.assert_close(gain(power, latest, many), torch.tensor([0.25, 0.5]), rtol=1e-4, atol=0)
    early = gain(power, latest, torch.tensor(16.0))
    torch.testing.assert_close(early, torch.tensor([0.125, 0.25]) / (1 + 2 / 256) ** 0.5)
    torch.testing.assert_close(gain(power, power / 2, torch.tensor(1.0)), torch.tensor([0.5, 1.0]) / 3**0.5)
    assert gain(torch.tensor([[1e30], [0.0]]), torch.tensor([[1e30], [0.0]]), many).isfinite().all()


def test_power_is_the_mean_square_of_whitened_features() -> None:
    rows, matrix = torch.randn(2, 50, 6), torch.randn(2, 6, 6)
    passed, first = passed_norm(rows, matrix).square() / 300, first_norm(rows, matrix, 50).square() / 300
    torch.testing.assert_close(passed, (rows @ matrix).square().mean((1, 2)))
    expected = matrix.square().sum((1, 2)) / 6 * rows.square().mean((1, 2)).clamp(min=float(rows.square().mean()))
    torch.testing.assert_close(first, expected * 51 / 49)


@pytest.mark.parametrize("layer", [Deconv2d(8, 6, 3, cfg=FAST), DeconvLinear(8, 6, cfg=FAST)], ids=["conv", "linear"])
def test_the_gain_is_saved_and_goes_on_where_it_was(layer: nn.Module) -> None:
    shape = (9, 8) if isinstance(layer, nn.Linear) else (2, 8, 9, 9)
    for _ in range(3):
        layer(torch.randn(shape))
    resumed = copy.deepcopy(layer)
    resumed.reset_parameters()
    resumed.load_state_dict(layer.state_dict())
    for _ in range(3):
        x = torch.randn(shape)
        layer(x), resumed(x)
    for name, value in layer.state_dict().items():
        assert torch.equal(resumed.state_dict()[name], value), name


def test_published_settings_have_neither_gain_nor_its_buffers() -> None:
    assert set(Deconv2d(3, 4, 3).state_dict()) == {
        "weight", "bias", "running_mean", "running_deconv", "num_batches_tracked"
    }  # fmt: skip
