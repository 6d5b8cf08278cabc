"""Deconv2d: a convolution that whitens its input windows (Ye et al., Network Deconvolution, ICLR 2020)."""

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from timm_deconv.errors import InputError
from timm_deconv.kernels import Window
from timm_deconv.kernels.windows import as_pair

from .config import DeconvCfg, conv_kind
from .convolution import convolve
from .functional import Moments, fold
from .geometry import ConvGeometry, conv_blocks, conv_geometry
from .module import WhiteningMixin, check_dtype
from .operation import Setting
from .presets import resolve_cfg

__all__ = ["Deconv2d"]


class Deconv2d(WhiteningMixin, nn.Conv2d):
    """`nn.Conv2d` of whitened input windows: conv(D (x - mu)), computed as one plain convolution with folded weight
    and bias.

    In training mu and D come from windows sampled from the batch, and gradients flow through both; running averages
    are kept for evaluation. All arguments of `nn.Conv2d` mean what they mean there. Whitening is not a transposed
    convolution.

    Args:
        cfg: how to whiten: a preset's name, a dictionary of options over a preset, or a `DeconvCfg`. Default, and what
            a dictionary without `preset` stands over: 'paper', the published settings.

    Shape:
        (N, Cin, H, W) or (Cin, H, W) -> (N, Cout, H', W') or (Cout, H', W'), as in `nn.Conv2d`. An empty batch gives
        an empty output and leaves the statistics alone. Under autocast the statistics stay in float32 and the output
        has the autocast dtype.

    Raises:
        ValueError: an argument or input that makes no sense; the message says which.
    """

    plain = nn.Conv2d
    __jit_unused_properties__ = ("window", "_name")

    if TYPE_CHECKING:
        _known: tuple[tuple[Any, ...], Setting | None] | None

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: int | tuple[int, int],
        stride: int | tuple[int, int] = 1,
        padding: int | tuple[int, int] | str = 0,
        dilation: int | tuple[int, int] = 1,
        groups: int = 1,
        bias: bool = True,
        padding_mode: Literal["zeros", "reflect", "replicate", "circular"] = "zeros",
        device: Any = None,
        dtype: Any = None,
        *,
        cfg: str | Mapping[str, Any] | DeconvCfg | None = None,
    ) -> None:
        _check_positive(in_channels=in_channels, out_channels=out_channels)
        _check_positive(kernel_size=kernel_size, stride=stride, dilation=dilation)
        _check_padding(padding)
        super().__init__(
            in_channels, out_channels, kernel_size, stride, padding, dilation, groups, bias, padding_mode, device, dtype
        )
        cfg = resolve_cfg(cfg, conv_kind(in_channels, self.kernel_size, groups))  # type: ignore[arg-type]
        positions = self.kernel_size[0] * self.kernel_size[1]
        self._known = None
        self._init_statistics(cfg, conv_blocks(in_channels, positions, groups, cfg), device)

    @classmethod
    def from_conv(cls, conv: nn.Conv2d, cfg: DeconvCfg) -> "Deconv2d":
        """Return the whitening layer with a convolution's own parameters, whitener at the identity."""
        layer = cls(
            conv.in_channels,
            conv.out_channels,
            conv.kernel_size,  # type: ignore[arg-type]
            conv.stride,  # type: ignore[arg-type]
            conv.padding,  # type: ignore[arg-type]
            conv.dilation,  # type: ignore[arg-type]
            conv.groups,
            padding_mode=conv.padding_mode,
            device="meta",
            cfg=cfg,
        )
        layer._adopt(conv)
        return layer

    @property
    def _name(self) -> str:
        return f"{type(self).__name__} {self.label or (self.in_channels, self.out_channels)}"

    def forward(self, input: Tensor) -> Tensor:
        return self._whitened_conv(input)

    def _whitened_conv(self, input: Tensor) -> Tensor:
        if torch.jit.is_scripting():
            if self.training:
                raise RuntimeError("a scripted whitening layer only evaluates: call eval() before torch.jit.script")
            weight, bias = fold(self.weight, self.bias, self.running_mean, self.running_deconv, self.blocks)
            return self._conv_forward(input, weight, bias)
        else:
            setting = self._checked_setting(input) if self.training else None
            if setting is not None:
                output = self._train_forward(self._padded_batch(input), setting)
                return output if input.ndim == 4 else output.squeeze(0)
            weight, bias = self.folded()
            return self._conv_forward(input, weight, bias)

    @torch.jit.unused
    def _train_forward(self, x: Tensor, setting: Setting) -> Tensor:
        """Convolve x (N, C, H, W), padded, whitened by its own statistics unless they are frozen."""
        geometry, step = setting.geometry, self._begin_step()
        if step.frozen:
            return convolve(x, *self._frozen_fold(step), geometry)
        return self._convolve_live(x, self.weight, setting, step)

    @torch.jit.unused
    def moments(self, input: Tensor) -> Moments:
        """Compute mean (S, F) and covariance (S, F, F) of the layer's samples of an input (N, Cin, H, W)."""
        x = self._padded_batch(input)
        return self._moments(x, self._geometry(x))

    @torch.jit.unused
    def _geometry(self, x: Tensor) -> ConvGeometry:
        return conv_geometry(x.shape, self.window, self.groups, self.blocks, self.cfg)

    @property
    def window(self) -> Window:
        """The convolution's windows as its attributes are now; encoders are dilated by setting these.

        With `_pads` the input is padded before, and the windows have no padding of their own.
        """
        padding = (0, 0) if self._pads() or isinstance(self.padding, str) else as_pair(self.padding)
        if self.padding == "same" and not self._pads():
            rows, cols = self._extents()
            padding = (rows // 2, cols // 2)
        return Window(as_pair(self.kernel_size), as_pair(self.stride), as_pair(self.dilation), padding)

    @torch.jit.unused
    def _pads(self) -> list[int]:
        """Return left, right, top and bottom of the padding that is applied before the convolution, as it is unequal or
        not with zeros; empty if there is none."""
        if self.padding_mode != "zeros":
            return list(self._reversed_padding_repeated_twice)
        extents = self._extents() if self.padding == "same" else (0, 0)
        if not any(extent % 2 for extent in extents):
            return []
        return [side for extent in reversed(extents) for side in (extent // 2, extent - extent // 2)]

    @torch.jit.unused
    def _extents(self) -> tuple[int, int]:
        """Return height and width of a window, minus one."""
        (rows, cols), (row_step, col_step) = as_pair(self.kernel_size), as_pair(self.dilation)
        return row_step * (rows - 1), col_step * (cols - 1)

    @torch.jit.unused
    def _padded_batch(self, input: Tensor) -> Tensor:
        """Return (N, C, H, W), padded where the convolution itself cannot: unequally, or not with zeros."""
        batch = input if input.ndim == 4 else input.unsqueeze(0)
        pads = self._pads()
        if not pads:
            return batch
        return F.pad(batch, pads, mode="constant" if self.padding_mode == "zeros" else self.padding_mode)

    @torch.jit.unused
    def fuse(self) -> nn.Conv2d:
        """Return the plain convolution that does in evaluation what this layer does; the layer is left as it is."""
        weight, bias = self.folded()
        plain = nn.utils.skip_init(
            self.plain,
            self.in_channels,
            self.out_channels,
            self.kernel_size,
            stride=self.stride,
            padding=self.padding,
            dilation=self.dilation,
            groups=self.groups,
            padding_mode=self.padding_mode,
            device=weight.device,
            dtype=weight.dtype,
        )
        plain.weight.data, plain.bias.data = weight.detach().contiguous(), bias.detach()
        return plain.train(self.training)

    @torch.jit.unused
    def _checked_setting(self, input: Tensor) -> Setting | None:
        """Return what the layer does with an input in training; None if there is nothing to whiten.

        In eager mode it is found once for all inputs of a shape, until an attribute changes: it takes as long as ten
        operators.

        Raises:
            InputError: the layer cannot take the input.
        """
        check_dtype(input, self.weight)
        if torch.compiler.is_compiling() or type(input) is not Tensor:  # a size may be a symbol
            return self._found_setting(input)
        joint, label = self.joint, self.label
        joined = None if joint is None or self.statistics_frozen else joint.sizes
        window = (self.kernel_size, _fixed(self.stride), _fixed(self.padding), _fixed(self.dilation), self.padding_mode)
        key = (input.shape, self.in_channels, *window, self.groups, self.blocks, self.cfg, joint, joined, label)
        if self._known is None or self._known[0] != key:
            self._known = (key, self._found_setting(input))
        return self._known[1]

    @torch.jit.unused
    def _found_setting(self, input: Tensor) -> Setting | None:
        _check_positive(stride=self.stride, dilation=self.dilation)
        _check_padding(self.padding)
        if self.padding == "same" and as_pair(self.stride) != (1, 1):
            raise InputError(f"padding='same' with stride={self.stride!r}: a strided convolution is padded by numbers")
        positions = self.kernel_size[0] * self.kernel_size[1]
        if self.blocks.number * self.blocks.features not in (self.in_channels, self.in_channels * positions):
            raise InputError(
                f"in_channels={self.in_channels} was set after construction, and the statistics are of another number:"
                " make the layer, or the network by in_chans=, with it"
            )
        if input.ndim not in (3, 4) or input.shape[-3] != self.in_channels:
            raise InputError(
                f"input of shape {tuple(input.shape)}: expected (N, {self.in_channels}, H, W)"
                f" or ({self.in_channels}, H, W)"
            )
        if not input.numel():
            return None
        images, (height, width) = 1 if input.ndim == 3 else input.shape[0], input.shape[-2:]
        left, right, top, bottom = self._pads() or (0, 0, 0, 0)
        padded = (images, self.in_channels, height + top + bottom, width + left + right)
        if not self.window.positions(padded[2:]):
            raise InputError(
                f"input of {height}x{width} pixels: smaller than the kernel {self.kernel_size} with dilation"
                f" {self.dilation} and padding {self.padding!r}; use larger images or more padding"
            )
        share = None if self.statistics_frozen else self._share(images)
        geometry = conv_geometry(padded, self.window, self.groups, self.blocks, self.cfg, share)
        return Setting(geometry, self.cfg, self._name, self.joint)


def _fixed(value: Any) -> Any:
    """Return an attribute as what it is now: a list can change."""
    return tuple(value) if isinstance(value, list) else value


def _check_positive(**arguments: Any) -> None:
    for name, value in arguments.items():
        numbers = tuple(value) if isinstance(value, tuple | list) else (value, value)
        if name.endswith("channels") and isinstance(value, tuple | list):
            numbers = ()
        whole = all(isinstance(number, int) and not isinstance(number, bool) for number in numbers)
        if len(numbers) != 2 or not whole or min(numbers) < 1:
            wanted = "one" if name.endswith("channels") else "one or two"
            raise InputError(f"{name}={value!r}: must be {wanted} positive whole numbers")


def _check_padding(padding: Any) -> None:
    if isinstance(padding, str):
        return  # which `nn.Conv2d` checks
    numbers = tuple(padding) if isinstance(padding, tuple | list) else (padding, padding)
    if len(numbers) != 2 or not all(isinstance(number, int) and number >= 0 for number in numbers):
        raise InputError(f"padding={padding!r}: must be one or two whole numbers, 'same' or 'valid'")
