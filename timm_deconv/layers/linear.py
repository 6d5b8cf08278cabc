"""DeconvLinear: a linear layer that whitens its input features (Ye et al., Network Deconvolution, ICLR 2020)."""

from collections.abc import Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from timm_deconv.errors import InputError
from timm_deconv.linalg import full_precision

from .base import WhiteningMixin, check_dtype
from .config import DeconvCfg
from .partition import partition_linear, split_rows
from .presets import resolve_cfg
from .statistics import Statistics, check_rows, vector_statistics
from .whitening import fold, whiten_vectors

__all__ = ["DeconvLinear"]


class DeconvLinear(WhiteningMixin, nn.Linear):  # type: ignore[misc]  # torch declares that there always is a bias
    """`nn.Linear` of whitened input features, in runs of `cfg.block` contiguous ones that share one mean and
    covariance.

    Every feature vector of the batch is a sample. Freezing, running averages, regularisation and `wide_block` as in
    `Deconv2d`; the layout and sampling options do not apply. For the backward pass whitener
    and root are kept, and three times the input if it is whitened.

    Args:
        cfg: how to whiten: a preset's name, a dictionary of options over a preset, or a `DeconvCfg`; by default the
            published settings with blocks of 512 features.

    Shape:
        (..., in_features) -> (..., out_features). An empty input gives an empty output and leaves the statistics alone.
    """

    def __init__(
        self,
        in_features: int,
        out_features: int,
        bias: bool = True,
        device: Any = None,
        dtype: Any = None,
        *,
        cfg: str | Mapping[str, Any] | DeconvCfg | None = None,
    ) -> None:
        for name, value in {"in_features": in_features, "out_features": out_features}.items():
            if not isinstance(value, int) or isinstance(value, bool) or value < 1:
                raise InputError(f"{name}={value!r}: must be a positive whole number")
        super().__init__(in_features, out_features, bias, device, dtype)
        cfg = resolve_cfg(cfg, "linear")
        self._init_statistics(cfg, partition_linear(in_features, cfg), device)

    @classmethod
    def from_linear(cls, linear: nn.Linear, cfg: DeconvCfg) -> "DeconvLinear":
        """The whitening layer with a linear layer's own parameters, whitener at the identity."""
        layer = cls(linear.in_features, linear.out_features, device="meta", cfg=cfg)
        layer._adopt(linear)
        return layer

    def forward(self, input: Tensor) -> Tensor:
        if torch.jit.is_scripting():
            if self.training:
                raise RuntimeError("a scripted whitening layer only evaluates: call eval() before torch.jit.script")
            weight, bias = fold(self.weight, self.bias, self.running_mean, self.running_deconv, self.partition)
            return F.linear(input, weight, bias)
        else:
            if self.training and self._is_trainable(input):
                vectors = input.reshape(-1, self.in_features)
                return self._train_forward(vectors).reshape(*input.shape[:-1], self.out_features)
            weight, bias = self.folded()
            return F.linear(input, weight, bias)

    @torch.jit.unused
    def rows(self, input: Tensor) -> Tensor:
        return split_rows(input, self.partition)

    @torch.jit.unused
    def padding_share(self, input: Tensor) -> float:
        return 0.0

    @torch.jit.unused
    def _plain(self, input: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        return F.linear(input, weight, bias)

    @torch.jit.unused
    def _statistics(self, input: Tensor) -> Statistics:
        rows = self.rows(input)
        check_rows(rows.shape[-2], f"{type(self).__name__} {self.label}", input)
        return vector_statistics(rows, self.cfg)

    @torch.jit.unused
    def _whitened(self, input: Tensor, statistics: Statistics, frozen: Tensor | None) -> Tensor:
        """By whitening the vectors or, if they are not fewer than the outputs, the weight: the same function."""
        mean, whitener = statistics.mean, statistics.whitener
        with full_precision(input):
            if input.shape[0] < self.out_features:
                input = whiten_vectors(input, mean, whitener, self.partition).to(input.dtype)
                weight, bias = self.weight, self.bias
            else:
                weight, bias = fold(self.weight, self.bias, mean, whitener, self.partition)
        return F.linear(input, weight, bias)

    @torch.jit.unused
    def fuse(self) -> nn.Linear:
        """The plain linear layer that does in evaluation what this layer does; the layer itself is left as it is."""
        weight, bias = self.folded()
        plain = nn.utils.skip_init(
            nn.Linear, self.in_features, self.out_features, device=weight.device, dtype=weight.dtype
        )
        plain.weight.data, plain.bias.data = weight.detach().contiguous(), bias.detach()
        return plain.train(self.training)

    @torch.jit.unused
    def _is_trainable(self, input: Tensor) -> bool:
        """Whether there is anything to whiten; InputError for what the layer cannot take."""
        if input.shape[-1:] != (self.in_features,):
            raise InputError(f"input of shape {tuple(input.shape)}: expected (..., {self.in_features})")
        check_dtype(input, self.weight)
        return input.numel() > 0
