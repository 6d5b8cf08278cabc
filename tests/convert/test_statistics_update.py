"""update_statistics estimates running values anew, as torch's update_bn does for batch norms alone."""

import copy

import pytest
import timm
import torch
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel, update_bn

from timm_deconv import Deconv2d, freeze, kept_buffers, update_statistics
from timm_deconv.errors import InputError
from timm_deconv.layers import ChannelDeconv, DeconvLinear


def network(cfg: str = "fast") -> nn.Sequential:
    return nn.Sequential(
        Deconv2d(3, 8, 3, cfg=cfg), nn.ReLU(), nn.BatchNorm2d(8), ChannelDeconv(8, cfg={"block": 4}), nn.Flatten(),
        DeconvLinear(288, 4, cfg=cfg),
    )  # fmt: skip


def batches(count: int = 4) -> list[Tensor]:
    generator = torch.Generator().manual_seed(count)
    return [torch.randn(16, 3, 8, 8, generator=generator) + step for step in range(count)]


def state(model: nn.Module) -> dict[str, Tensor]:
    return {name: value.clone() for name, value in model.state_dict().items()}


@pytest.mark.parametrize("cfg", ["fast", "paper"])
def test_running_values_are_the_means_of_those_of_all_batches(cfg: str) -> None:
    layer = Deconv2d(3, 8, 3, cfg={"preset": cfg, "gain_corrected": False} if cfg == "fast" else cfg)
    for _ in range(3):
        layer(torch.randn(4, 3, 8, 8) + 9)
    before = state(layer)
    update_statistics(layer, batches())
    singles = []
    for images in batches():
        single = Deconv2d(3, 8, 3, cfg=layer.cfg.override({"momentum": 1.0}))
        single(images)
        singles.append(single)
    for name in ("running_mean", "running_deconv"):
        expected = torch.stack([single.get_buffer(name) for single in singles]).mean(0)
        torch.testing.assert_close(layer.get_buffer(name), expected)
    assert torch.equal(layer.weight, before["weight"]) and layer.num_batches_tracked == 4


def test_batch_norms_get_what_torch_gives_them() -> None:
    ours, theirs = (nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8)) for _ in range(2))
    theirs.load_state_dict(ours.state_dict())
    update_statistics(ours, batches())
    update_bn(batches(), theirs)
    for name, value in theirs.state_dict().items():
        torch.testing.assert_close(ours.state_dict()[name], value)
    assert ours[1].momentum == theirs[1].momentum == 0.1


def test_an_averaged_network_evaluates_as_it_trains_after_the_update() -> None:
    torch.manual_seed(0)
    model = timm.create_model("resnet18_cifar_deconv", width=0.25).train()
    average = AveragedModel(model)
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    data = [torch.randn(32, 3, 32, 32).cumsum(-1) / 4 for _ in range(4)]
    for images in data:
        optimizer.zero_grad()
        model(images).square().mean().backward()
        optimizer.step()
        average.update_parameters(model)
    update_statistics(average, data)
    trained = copy.deepcopy(average).train()(data[0]).std()
    assert 0.5 * trained < average.eval()(data[0]).std() < 1.5 * trained


def test_modes_are_as_before_and_the_layers_go_on_by_their_momentum() -> None:
    model = network().eval()
    model[3].train()
    update_statistics(model, [(images, None) for images in batches()], batches=2)
    assert [module.training for module in model] == [False, False, False, True, False, False]
    assert not any(module.cumulative for module in (model[0], model[3], model[5]))


def test_frozen_and_unused_layers_keep_their_statistics() -> None:
    model = network()
    model(batches()[0])
    freeze(model, "0")
    model.unused = Deconv2d(3, 3, 1)
    model.unused(batches()[0])
    model[5] = nn.Identity()
    model.forward = lambda x: model[4](model[3](model[2](model[1](model[0](x)))))
    kept = {name: value for name, value in state(model).items() if name.startswith(("0.", "unused."))}
    update_statistics(model, batches())
    for name, value in kept.items():
        assert torch.equal(model.state_dict()[name], value), name


def test_layers_that_freeze_go_on_where_they_were() -> None:
    layer = Deconv2d(3, 8, 3, cfg={"freeze": True, "freeze_iter": 5})
    for _ in range(8):
        layer(batches()[0])
    before = layer.running_mean.clone()
    update_statistics(layer, batches())
    assert layer.num_batches_tracked == 8 and not torch.equal(layer.running_mean, before)


@pytest.mark.parametrize(
    ("loader", "message"),
    [
        ([], "no batches to estimate from"),
        ([*batches(2), "label"], "a batch of str"),
        (torch.zeros(3, 8, 8), "a tensor of shape"),
    ],
)
def test_bad_batches_leave_the_statistics_as_they_were(loader, message: str) -> None:
    model = network()
    for images in batches():
        model(images)
    before = state(model)
    with pytest.raises(InputError, match=message):
        update_statistics(model, loader)
    for name, value in before.items():
        assert torch.equal(model.state_dict()[name], value), name


def test_a_network_without_live_statistics_is_refused() -> None:
    with pytest.raises(InputError, match="no live statistics in Sequential"):
        update_statistics(nn.Sequential(nn.Conv2d(3, 8, 3)), batches())


@pytest.mark.parametrize("cfg", ["fast", "paper"])
def test_what_is_trained_while_buffers_are_kept_does_not_count(cfg: str) -> None:
    model, first, *others = network(cfg), *batches()
    model(first)
    expected, kept = copy.deepcopy(model), list(model.buffers())
    with kept_buffers(model):
        for images in others:
            model(images).sum().backward()
        assert not torch.equal(model[0].running_deconv, expected[0].running_deconv)
    assert all(buffer is before for buffer, before in zip(model.buffers(), kept, strict=True))
    for images in (first, *others):
        torch.testing.assert_close(model(images), expected(images), rtol=0, atol=0)
    for name, value in expected.state_dict().items():
        assert torch.equal(model.state_dict()[name], value), name


def test_buffers_are_put_back_after_an_error_too() -> None:
    model = network()
    with pytest.raises(KeyboardInterrupt), kept_buffers(model):
        model(batches()[0])
        raise KeyboardInterrupt
    assert model[0].num_batches_tracked == model[2].num_batches_tracked == 0
