"""ChannelDeconv: a layer that whitens activations themselves (published beside the deconvolution layers, for use in
front of the global pooling)."""

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from timm_deconv.errors import InputError
from timm_deconv.kernels import PIXEL, Blocks, Sampling, Share, sampled_moments
from timm_deconv.linalg import full_precision, promote, widest

from .config import DeconvCfg
from .functional import Moments, check_rows, estimate, root_of
from .joint import JointBatch
from .module import MANY_BATCHES, be_leaf, in_recomputation
from .notices import Notices
from .presets import resolve_cfg

__all__ = ["ChannelDeconv"]


class ChannelDeconv(nn.Module):
    """Whiten the first floor(C / B) * B channels in B rows, and normalise the remaining ones together by one mean
    and variance.

    Row i of the whitened part holds channels i q ... (i + 1) q - 1 with q = floor(C / B), so that q channels share
    an axis. The remaining channels of an image form one list. There is no weight. Running averages take the first
    training batch outright.

    Args:
        num_features: C; None takes it from each input, as the published layer does, but such a layer cannot be fused.
        cfg: how to whiten: a preset's name, a dictionary of options over a preset, or a `DeconvCfg`; `block` is B.
            Default: the published block 64, eps 1e-2. The second moment is not centred, as published. Layout, freezing
            after some batches and the correction of the gain do not apply.

    Shape:
        (N, C) or (N, C, H, W) -> the same. Images are sampled at every sampling_stride^2-th position if they are at
        least sampling_stride high and wide.
    """

    running_mean1: Tensor
    running_deconv: Tensor
    running_mean2: Tensor
    running_var: Tensor
    num_batches_tracked: Tensor
    statistics_frozen: bool
    cumulative: bool

    if TYPE_CHECKING:
        joint: JointBatch | None

    def __init__(
        self,
        num_features: int | None = None,
        device: Any = None,
        dtype: Any = None,
        *,
        cfg: str | Mapping[str, Any] | DeconvCfg | None = None,
    ) -> None:
        super().__init__()
        known = isinstance(num_features, int) and not isinstance(num_features, bool) and num_features > 0
        if num_features is not None and not known:
            raise InputError(f"num_features={num_features!r}: must be a positive whole number, or None")
        self.num_features = num_features
        self.cfg = resolve_cfg(cfg, "channel")
        self.eps = self.cfg.eps
        be_leaf(self)
        self.statistics_frozen = False
        self.cumulative = False
        self.joint = None
        self.notices = Notices()
        self.label = ""
        self.saw_nonfinite = torch.zeros((), dtype=torch.bool, device="cpu")
        factory: dict[str, Any] = {"device": device, "dtype": dtype}
        block = self.cfg.block
        self.register_buffer("running_mean1", torch.empty(block, 1, **factory))
        self.register_buffer("running_deconv", torch.empty(block, block, **factory))
        self.register_buffer("running_mean2", torch.empty(1, 1, **factory))
        self.register_buffer("running_var", torch.empty(1, 1, **factory))
        self.register_buffer("num_batches_tracked", torch.empty((), dtype=torch.int64, device=device))
        self.reset_running_stats()

    def reset_running_stats(self) -> None:
        """Forget all batches: means zero, whitener identity, variance one, no batch counted."""
        self.running_mean1.zero_()
        self.running_deconv.copy_(torch.eye(self.cfg.block, device=self.running_deconv.device))
        self.running_mean2.zero_()
        self.running_var.fill_(1)
        self.num_batches_tracked.zero_()

    def reset_parameters(self) -> None:
        """Forget all batches; there are no parameters."""
        self.reset_running_stats()

    def forward(self, input: Tensor) -> Tensor:
        if torch.jit.is_scripting():
            if self.training:
                raise RuntimeError("a scripted whitening layer only evaluates: call eval() before torch.jit.script")
        elif self.training and self._is_trainable(input) and not self.statistics_frozen:
            return self._normalise_live(input)
        mean1, whitener, mean2, var = self.running_mean1, self.running_deconv, self.running_mean2, self.running_var
        if self.training:  # the backward pass may come after the statistics went on
            mean1, whitener, mean2, var = mean1.clone(), whitener.clone(), mean2.clone(), var.clone()
        return normalise(input, mean1, whitener, mean2, var, self.eps)

    def extra_repr(self) -> str:
        frozen = "statistics frozen" if self.statistics_frozen else ""
        parts = (str(self.num_features or ""), f"block={self.cfg.block}", str(self.cfg), frozen)
        return ", ".join(part for part in parts if part)

    @torch.jit.unused
    def fuse(self, spatial: bool = True) -> nn.Module:
        """Return the fixed 1x1 convolution, or linear layer if not `spatial`, that evaluates as this layer does.

        Raises:
            ValueError: the number of channels is not known.
        """
        if self.num_features is None:
            raise ValueError(
                "ChannelDeconv() without num_features cannot be fused: construct it with the number of channels"
            )
        channels, dtype = self.num_features, self.running_deconv.dtype
        wide = widest(self.running_deconv.device)
        basis = torch.eye(channels, device=self.running_deconv.device, dtype=wide)
        buffers = (self.running_mean1, self.running_deconv, self.running_mean2, self.running_var)
        with torch.no_grad():
            mean1, whitener, mean2, var = (buffer.to(wide) for buffer in buffers)
            inputs = torch.cat([torch.zeros_like(basis[:1]), basis])
            offset, images = normalise(inputs, mean1, whitener, mean2, var, self.eps).split([1, channels])
            weight, bias = (images - offset).mT.to(dtype), offset[0].to(dtype)
        factory: dict[str, Any] = {"device": weight.device, "dtype": weight.dtype}
        plain: nn.Module
        if spatial:
            plain = nn.utils.skip_init(nn.Conv2d, channels, channels, 1, **factory)
            weight = weight[:, :, None, None]
        else:
            plain = nn.utils.skip_init(nn.Linear, channels, channels, **factory)
        plain.load_state_dict({"weight": weight, "bias": bias})
        return plain.train(self.training)

    @torch.jit.unused
    def _normalise_live(self, input: Tensor) -> Tensor:
        with full_precision(input):
            x = promote(input)
            live = self._statistics(x)
            self._track(*(value.detach() for value in live))
            return normalise(x, *live, self.eps).to(input.dtype)

    @torch.jit.unused
    def _statistics(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        block, split = self.cfg.block, x.shape[1] // self.cfg.block * self.cfg.block
        name = f"{type(self).__name__} {self.label or x.shape[1]}"
        share = Share(0, len(x)) if self.joint is None else self.joint.share(len(x), name)
        pixels, step = x[0, 0].numel(), self._spacing(x)
        mean1, matrix, mean2, var = self.running_mean1, self.running_deconv, self.running_mean2, self.running_var
        if split:
            lists = x[:, :split].transpose(0, 1).reshape(block, split // block, -1)
            whole = share.whole * pixels  # of each of the channels that share an axis, which are one list
            firsts = [-(index * whole + share.first * pixels) % step for index in range(split // block)]
            samples = torch.cat([lists[:, index, first::step] for index, first in enumerate(firsts)], 1)
            rows = split // block * whole
            check_rows(rows, name, x)
            vectors = samples.mT[:, :, None, None]
            mean, cov = self._joined(vectors, Blocks(1, block), -(-rows // step))
            uncentred = cov + mean.unsqueeze(-1) * mean.unsqueeze(-2)
            root = root_of(self.cfg, zeroes_constant=False)
            matrix = estimate(Moments(mean, uncentred, -(-rows // step)), root).whitener.squeeze(0)
            mean1 = mean.mT
        if split < x.shape[1]:
            samples = x[:, split:].flatten(1)[:, ::step].reshape(-1, 1, 1, 1)
            rows = len(samples) // len(x) * share.whole
            check_rows(rows, name, x)
            mean2, cov = self._joined(samples, Blocks(1, 1), rows)
            var = cov.squeeze(0) * (rows / (rows - 1))
        return mean1, matrix, mean2, var

    def _joined(self, rows: Tensor, blocks: Blocks, row_count: int) -> tuple[Tensor, Tensor]:
        """Compute mean (1, F) and covariance (1, F, F) of rows (R, F, 1, 1) here and, if synchronised, of all."""
        mean, cov = sampled_moments(rows, Sampling(PIXEL), blocks)
        if self.joint is None:
            return mean, cov
        moments = self.joint.join(Moments(mean, cov, row_count), len(rows))
        return moments.mean, moments.cov

    def _spacing(self, x: Tensor) -> int:
        """Return the spacing of the samples in a list of pixels."""
        stride = self.cfg.sampling_stride
        return stride**2 if x.ndim == 4 and min(x.shape[-2:]) >= stride else 1

    @torch.no_grad()
    def _track(self, *live: Tensor) -> None:
        finite = torch.stack([value.isfinite().all() for value in live]).all()
        self.saw_nonfinite = ~finite
        finite = finite & (not in_recomputation())  # with the same operations, as selective checkpointing counts them
        alike = 1 / (self.num_batches_tracked + 1)
        momentum = alike if self.cumulative else torch.where(self.num_batches_tracked == 0, 1.0, self.cfg.momentum)
        for running, value in zip(
            (self.running_mean1, self.running_deconv, self.running_mean2, self.running_var), live, strict=True
        ):
            value = value.to(running.dtype)
            running.copy_(torch.where(finite, running + momentum * (value - running), running))
        self.num_batches_tracked.add_(finite)

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any, **kwargs: Any) -> None:
        if prefix + "running_deconv" in state_dict and prefix + "num_batches_tracked" not in state_dict:
            state_dict[prefix + "num_batches_tracked"] = torch.tensor(MANY_BATCHES)
        super()._load_from_state_dict(state_dict, prefix, *args, **kwargs)

    @torch.jit.unused
    def _is_trainable(self, input: Tensor) -> bool:
        """Tell whether there is anything to whiten; InputError for what the layer cannot take."""
        wanted = self.num_features or (input.shape[1] if input.ndim > 1 else 0)
        if input.ndim not in (2, 4) or input.shape[1] != wanted:
            channels = self.num_features or "C"
            raise InputError(f"input of shape {tuple(input.shape)}: expected (N, {channels}) or (N, {channels}, H, W)")
        if not input.is_floating_point():
            raise InputError(f"input of {input.dtype}: channels are whitened as floating-point numbers; convert it")
        return input.numel() > 0


def normalise(x: Tensor, mean1: Tensor, whitener: Tensor, mean2: Tensor, var: Tensor, eps: float) -> Tensor:
    """Whiten the first channels and divide the remaining ones by one deviation.

    Args:
        x: (N, C) or (N, C, H, W).
        mean1: (B, 1). whitener: (B, B). mean2, var: one number each.

    Returns:
        the shape and dtype of x.
    """
    values = x.to(torch.promote_types(x.dtype, whitener.dtype))
    split = x.shape[1] // whitener.shape[0] * whitener.shape[0]
    first = values[:, :split].transpose(0, 1)
    rest = (values[:, split:] - mean2.reshape(())) * (var.reshape(()) + eps).rsqrt()
    if split == 0:
        return rest.to(x.dtype)
    rows = first.reshape(whitener.shape[0], -1)
    whitened = (whitener @ (rows - mean1)).reshape(first.shape).transpose(0, 1)
    return torch.cat([whitened, rest], 1).to(x.dtype)
