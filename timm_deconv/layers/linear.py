"""DeconvLinear: a linear layer that whitens its input features (Ye et al., Network Deconvolution, ICLR 2020)."""

from collections.abc import Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from timm_deconv.errors import InputError

from .config import DeconvCfg
from .convolution import as_images
from .functional import Moments, fold
from .geometry import linear_blocks, linear_geometry
from .module import WhiteningMixin, check_dtype
from .operation import Setting
from .presets import resolve_cfg

__all__ = ["DeconvLinear"]


class DeconvLinear(WhiteningMixin, nn.Linear):  # type: ignore[misc]  # torch declares that there always is a bias
    """`nn.Linear` of whitened input features, in runs of `cfg.block` that share one mean and covariance.

    Every feature vector of the batch is a sample. Freezing, running averages, regularisation and `wide_block` as in
    `Deconv2d`; the layout and sampling options do not apply.

    Args:
        cfg: how to whiten: a preset's name, a dictionary of options over a preset, or a `DeconvCfg`; by default the
            published settings with blocks of 512 features.

    Shape:
        (..., in_features) -> (..., out_features). An empty input gives an empty output and leaves the statistics alone.
    """

    __jit_unused_properties__ = ("_name",)

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
        self._init_statistics(cfg, linear_blocks(in_features, cfg), device)

    @classmethod
    def from_linear(cls, linear: nn.Linear, cfg: DeconvCfg) -> "DeconvLinear":
        """Return the whitening layer with a linear layer's own parameters, whitener at the identity."""
        layer = cls(linear.in_features, linear.out_features, device="meta", cfg=cfg)
        layer._adopt(linear)
        return layer

    @property
    def _name(self) -> str:
        return f"{type(self).__name__} {self.label or (self.in_features, self.out_features)}"

    def forward(self, input: Tensor) -> Tensor:
        if torch.jit.is_scripting():
            if self.training:
                raise RuntimeError("a scripted whitening layer only evaluates: call eval() before torch.jit.script")
            weight, bias = fold(self.weight, self.bias, self.running_mean, self.running_deconv, self.blocks)
            return F.linear(input, weight, bias)
        else:
            if self.training and self._is_trainable(input):
                vectors = input.reshape(-1, self.in_features)
                return self._train_forward(vectors).reshape(*input.shape[:-1], self.out_features)
            weight, bias = self.folded()
            return F.linear(input, weight, bias)

    @torch.jit.unused
    def _train_forward(self, vectors: Tensor) -> Tensor:
        """Multiply vectors (R, in_features), whitened by their own statistics unless these are frozen."""
        step = self._begin_step()
        if step.frozen:
            return F.linear(vectors, *self._frozen_fold(step))
        geometry = linear_geometry(len(vectors), self.blocks, self._share(len(vectors)))
        setting = Setting(geometry, self.cfg, self._name, self.joint)
        return self._convolve_live(as_images(vectors), as_images(self.weight), setting, step)

    @torch.jit.unused
    def moments(self, input: Tensor) -> Moments:
        """Compute mean (S, F) and covariance (S, F, F) of the layer's samples of an input (..., in_features)."""
        vectors = input.reshape(-1, self.in_features)
        return self._moments(as_images(vectors), linear_geometry(len(vectors), self.blocks))

    @torch.jit.unused
    def fuse(self) -> nn.Linear:
        """Return the plain linear layer that does in evaluation what this layer does; the layer is left as it is."""
        weight, bias = self.folded()
        plain = nn.utils.skip_init(
            nn.Linear, self.in_features, self.out_features, device=weight.device, dtype=weight.dtype
        )
        plain.weight.data, plain.bias.data = weight.detach().contiguous(), bias.detach()
        return plain.train(self.training)

    @torch.jit.unused
    def _is_trainable(self, input: Tensor) -> bool:
        """Tell whether there is anything to whiten; InputError for what the layer cannot take."""
        if input.shape[-1:] != (self.in_features,):
            raise InputError(f"input of shape {tuple(input.shape)}: expected (..., {self.in_features})")
        check_dtype(input, self.weight)
        return input.numel() > 0
