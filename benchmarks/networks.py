"""The forms of one network that are compared.

none: no norm at all, the same biases (what is left in deployment); twin: batch norm; deconv: whitened by a preset;
published: whitened by the published operation sequence, with the settings of the preset 'paper'.
"""

from collections.abc import Callable
from typing import Any

import timm
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import timm_deconv.models  # noqa: F401 (registers the networks)
from timm_deconv.convert.policy import DEFAULT_PRESET
from timm_deconv.errors import unknown_name
from timm_deconv.layers import ChannelDeconv, Deconv2d, DeconvLinear

from .baselines import IterativeNorm2d, PublishedChannel, PublishedConv2d, PublishedLinear

__all__ = ["FORMS", "build", "published_conv", "with_iterative_norm", "with_published_layers"]

FORMS = ("none", "twin", "deconv", "published")


def build(form: str, network: str, deconv: str | dict[str, Any] = DEFAULT_PRESET, **arguments: Any) -> nn.Module:
    """Build a form of a registered pair, in training mode, from the same random numbers each time.

    Args:
        form: one of FORMS.
        network: the name without '_deconv', such as 'resnet18_cifar'.
        deconv: of the form 'deconv', a preset's name or a dictionary of options over one.
        arguments: the network's own, such as `width`.

    Raises:
        InputError: no such form, or no such pair.
    """
    base = network.removesuffix("_deconv").removesuffix("_bn")
    twin = f"{base}_bn" if timm.is_model(f"{base}_bn") else base
    if form not in FORMS:
        raise unknown_name("form", form, FORMS)
    if not timm.is_model(twin) or not timm.is_model(f"{base}_deconv"):
        pairs = [name.removesuffix("_deconv") for name in timm.list_models("*_deconv")]
        raise unknown_name("pair of networks", base, pairs)
    torch.manual_seed(0)
    if form == "twin":
        return timm.create_model(twin, **arguments).train()
    if form == "none":
        return timm.create_model(f"{base}_deconv", fused=True, **arguments).train()
    deconv = "paper" if form == "published" else deconv
    model = timm.create_model(f"{base}_deconv", deconv=deconv, **arguments)
    return (with_published_layers(model) if form == "published" else model).train()


def with_published_layers(model: nn.Module) -> nn.Module:
    """Replace every whitening layer by the published sequence, in place, with its settings, weights and statistics.

    Raises:
        ValueError: a layer has an option that the published one lacks.
    """
    return _exchange(model, _published_layer).train(model.training)


def with_iterative_norm(model: nn.Module) -> nn.Module:
    """Replace every `nn.BatchNorm2d`, in place, by a fresh iterative normalisation of the same channels."""
    return _exchange(model, lambda module: _iterative(module) if type(module) is nn.BatchNorm2d else None)


def _iterative(norm: nn.BatchNorm2d) -> IterativeNorm2d:
    return IterativeNorm2d(norm.num_features, eps=norm.eps).train(norm.training)


class PublishedWindows(nn.Module):
    """A published linear layer on every window (kernel x kernel pixels, stride 1) of an image.

    (N, C, H, W) -> (N, Cout, H - kernel + 1, W - kernel + 1). Hidden linear layers that timm holds as convolutions.
    """

    def __init__(self, linear: PublishedLinear, kernel_size: tuple[int, int]) -> None:
        super().__init__()
        self.linear = linear
        self.kernel_size = kernel_size

    def forward(self, x: Tensor) -> Tensor:
        size = [pixels - kernel + 1 for pixels, kernel in zip(x.shape[2:], self.kernel_size, strict=True)]
        windows = F.unfold(x, self.kernel_size).transpose(1, 2)
        return self.linear(windows).transpose(1, 2).unflatten(2, size)


def _exchange(model: nn.Module, replacement: Callable[[nn.Module], nn.Module | None]) -> nn.Module:
    exchanged: dict[nn.Module, nn.Module | None] = {}
    for parent in list(model.modules()):
        for name, child in list(parent.named_children()):
            if child not in exchanged:
                exchanged[child] = replacement(child)
            if (new := exchanged[child]) is not None:
                setattr(parent, name, new)
    return model


def _published_layer(module: nn.Module) -> nn.Module | None:
    if isinstance(module, Deconv2d) and module.cfg.layout == "flat":
        return _published_windows(module)
    if isinstance(module, Deconv2d):
        return _with_state(published_conv(module), module.state_dict())
    if isinstance(module, DeconvLinear):
        linear = _published_linear(module.in_features, module.out_features, module)
        return _with_state(linear, module.state_dict())
    if isinstance(module, ChannelDeconv):
        cfg = module.cfg
        channel = PublishedChannel(
            cfg.block, eps=cfg.eps, n_iter=cfg.n_iter, momentum=cfg.momentum, sampling_stride=cfg.sampling_stride
        )
        return _with_state(channel, module.state_dict())
    return None


def published_conv(layer: Deconv2d) -> PublishedConv2d:
    """Make a fresh published layer of a whitened convolution's geometry and settings.

    Raises:
        ValueError: the layer has an option that the published one lacks.
    """
    square = all(len(set(pair)) == 1 for pair in (layer.kernel_size, layer.stride, layer.dilation))
    padding = layer.padding[0] if isinstance(layer.padding, tuple) else None
    plain = layer.padding_mode == "zeros" and layer.bias is not None and layer.cfg.layout == "interleaved"
    if not square or padding is None or layer.padding[1] != padding or not plain:
        raise ValueError(f"the published layer has no form of {layer}")
    cfg = layer.cfg
    return PublishedConv2d(
        layer.in_channels,
        layer.out_channels,
        layer.kernel_size[0],
        layer.stride[0],
        padding,
        layer.dilation[0],
        layer.groups,
        eps=cfg.eps,
        n_iter=cfg.n_iter,
        momentum=cfg.momentum,
        block=cfg.block,
        sampling_stride=cfg.sampling_stride,
        freeze=cfg.freeze,
        freeze_iter=cfg.freeze_iter,
    )


def _published_windows(layer: Deconv2d) -> PublishedWindows:
    geometry = (layer.stride, layer.padding, layer.dilation, layer.groups, layer.cfg.sampling_stride)
    if geometry != ((1, 1), (0, 0), (1, 1), 1, 1):
        raise ValueError(f"the published layer has no form of {layer}")
    linear = _published_linear(layer.weight[0].numel(), layer.out_channels, layer)
    state = layer.state_dict()
    _with_state(linear, {**state, "weight": state["weight"].flatten(1)})
    return PublishedWindows(linear, layer.kernel_size)


def _published_linear(in_features: int, out_features: int, layer: Deconv2d | DeconvLinear) -> PublishedLinear:
    cfg, has_bias = layer.cfg, layer.bias is not None
    options = {"eps": cfg.eps, "n_iter": cfg.n_iter, "momentum": cfg.momentum}
    return PublishedLinear(in_features, out_features, has_bias, block=cfg.block, **options)


def _with_state(new: nn.Module, state: dict[str, Tensor]) -> nn.Module:
    """Give a layer weights, statistics and freeze counter of the whitening layer whose state is given."""
    new = new.to(state["running_deconv"])  # first, as loading would round
    new.load_state_dict({name: state[name] for name in new.state_dict()})
    if isinstance(new, PublishedConv2d):
        new.counter = int(state["num_batches_tracked"]) % (10 * new.freeze_iter)
    return new
