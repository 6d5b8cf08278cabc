"""ChannelDeconv: whitens activations themselves (published beside the deconvolution layers, for use in front of the
global pooling)."""

from typing import Any

import torch
from torch import Tensor, nn

from timm_deconv.linalg import covariance, full_precision

from .base import in_recomputation
from .config import DeconvCfg
from .whitening import whitener

__all__ = ["ChannelDeconv"]

PUBLISHED = DeconvCfg(eps=1e-2)


class ChannelDeconv(nn.Module):
    """Whiten the first floor(C / B) * B channels in B rows, and normalise the remaining ones together by one mean
    and variance.

    Row i of the whitened part holds channels i q ... (i + 1) q - 1 with q = floor(C / B), so that q channels share
    an axis. The remaining channels of an image form one list. There is no weight. Running averages take the first
    training batch outright.

    Args:
        num_features: C; None takes it from each input, as the published layer does, but such a layer cannot be fused.
        cfg: how to whiten; `block` is B. Default: the published block 64, eps 1e-2. The second moment is centred
            only with `cfg.centred`. Layout, freezing, grid and min_rows do not apply.

    Shape:
        (N, C) or (N, C, H, W) -> the same. Images are sampled at every sampling_stride^2-th position if they are at
        least sampling_stride high and wide.
    """

    running_mean1: Tensor
    running_deconv: Tensor
    running_mean2: Tensor
    running_var: Tensor
    num_batches_tracked: Tensor
    saw_nonfinite: Tensor

    def __init__(
        self, num_features: int | None = None, device: Any = None, dtype: Any = None, *, cfg: DeconvCfg | None = None
    ) -> None:
        super().__init__()
        self.num_features = num_features
        self.cfg = cfg or PUBLISHED
        self.eps = self.cfg.eps
        factory: dict[str, Any] = {"device": device, "dtype": dtype}
        block = self.cfg.block
        self.register_buffer("running_mean1", torch.zeros(block, 1, **factory))
        self.register_buffer("running_deconv", torch.eye(block, **factory))
        self.register_buffer("running_mean2", torch.zeros(1, 1, **factory))
        self.register_buffer("running_var", torch.ones(1, 1, **factory))
        self.register_buffer("num_batches_tracked", torch.zeros((), dtype=torch.int64, device=device))
        self.register_buffer("saw_nonfinite", torch.zeros((), dtype=torch.bool, device=device), persistent=False)

    def forward(self, input: Tensor) -> Tensor:
        if not torch.jit.is_scripting():
            self._check_input(input)
        elif self.training:
            raise RuntimeError("a scripted whitening layer only evaluates: call eval() before torch.jit.script")
        if self.training and input.numel() > 0:
            return self._normalise_live(input)
        dtype = torch.promote_types(input.dtype, self.running_deconv.dtype)
        return self._normalise(
            input.to(dtype), self.running_mean1, self.running_deconv, self.running_mean2, self.running_var
        ).to(input.dtype)

    def extra_repr(self) -> str:
        return f"{self.num_features or ''}, block={self.cfg.block}, {self.cfg}".lstrip(", ")

    @torch.jit.unused
    def fuse(self, spatial: bool = True) -> nn.Module:
        """The fixed 1x1 convolution, or linear layer if not `spatial`, that does in evaluation what this layer does.

        Raises:
            ValueError: the number of channels is not known.
        """
        if self.num_features is None:
            raise ValueError(
                "ChannelDeconv() without num_features cannot be fused: construct it with the number of channels"
            )
        channels = self.num_features
        with torch.no_grad():
            basis = torch.eye(channels, device=self.running_deconv.device, dtype=self.running_deconv.dtype)
            was_training = self.training
            offset, images = self.eval()(torch.cat([torch.zeros_like(basis[:1]), basis])).split([1, channels])
            self.train(was_training)
            weight, bias = (images - offset).mT, offset[0]
        factory: dict[str, Any] = {"device": weight.device, "dtype": weight.dtype}
        plain: nn.Module
        if spatial:
            plain = nn.utils.skip_init(nn.Conv2d, channels, channels, 1, **factory)
            weight = weight[:, :, None, None]
        else:
            plain = nn.utils.skip_init(nn.Linear, channels, channels, **factory)
        plain.load_state_dict({"weight": weight, "bias": bias})
        return plain.train(self.training)

    def _whitened_channels(self, channels: int) -> int:
        return channels // self.running_deconv.shape[0] * self.running_deconv.shape[0]

    def _normalise(self, x: Tensor, mean1: Tensor, whitener: Tensor, mean2: Tensor, var: Tensor) -> Tensor:
        split = self._whitened_channels(x.shape[1])
        first = x[:, :split].transpose(0, 1)
        rest = (x[:, split:] - mean2.reshape(())) * (var.reshape(()) + self.eps).rsqrt()
        if split == 0:
            return rest
        rows = first.reshape(whitener.shape[0], -1)
        whitened = (whitener @ (rows - mean1)).reshape(first.shape).transpose(0, 1)
        return torch.cat([whitened, rest], 1)

    @torch.jit.unused
    def _normalise_live(self, input: Tensor) -> Tensor:
        with full_precision(input):
            x = input.to(torch.promote_types(input.dtype, torch.float32))
            live = self._statistics(x)
            if not in_recomputation():
                self._track(*(value.detach() for value in live))
            return self._normalise(x, *live).to(input.dtype)

    @torch.jit.unused
    def _statistics(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        split = self._whitened_channels(x.shape[1])
        mean1, matrix, mean2, var = self.running_mean1, self.running_deconv, self.running_mean2, self.running_var
        if split:
            samples = self._sample(x, x[:, :split].transpose(0, 1).reshape(self.cfg.block, -1))
            mean, cov = covariance(samples.mT, centred=self.cfg.centred)
            mean1, matrix = mean.unsqueeze(1), whitener(cov, samples.shape[1], self.cfg)
        if split < x.shape[1]:
            samples = self._sample(x, x[:, split:].flatten(1)).reshape(1, -1)
            mean2, var = samples.mean(1, keepdim=True), samples.var(1, keepdim=True)
        return mean1, matrix, mean2, var

    def _sample(self, x: Tensor, columns: Tensor) -> Tensor:
        stride = self.cfg.sampling_stride
        sampled = x.ndim == 4 and stride > 1 and min(x.shape[-2:]) >= stride
        return columns[:, :: stride**2] if sampled else columns

    @torch.no_grad()
    def _track(self, *live: Tensor) -> None:
        finite = torch.stack([value.isfinite().all() for value in live]).all()
        momentum = torch.where(self.num_batches_tracked == 0, 1.0, self.cfg.momentum)
        for running, value in zip(
            (self.running_mean1, self.running_deconv, self.running_mean2, self.running_var), live, strict=True
        ):
            value = value.to(running.dtype)
            running.copy_(torch.where(finite, running + momentum * (value - running), running))
        self.num_batches_tracked.add_(finite)
        self.saw_nonfinite.logical_or_(~finite)

    @torch.jit.unused
    def _check_input(self, input: Tensor) -> None:
        wanted = self.num_features or (input.shape[1] if input.ndim > 1 else 0)
        if input.ndim not in (2, 4) or input.shape[1] != wanted:
            channels = self.num_features or "C"
            raise ValueError(f"input of shape {tuple(input.shape)}: expected (N, {channels}) or (N, {channels}, H, W)")
