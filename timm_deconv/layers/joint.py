"""Statistics of a batch that several processes hold together, as one process would estimate them of the whole batch.

Moments of its own rows go out from each process and those of all rows come back, in one sum over processes a layer;
their gradient comes back in another.
"""

from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor
from torch.autograd.function import once_differentiable

from timm_deconv.errors import InputError
from timm_deconv.kernels import PIXEL, Blocks, Share, Window
from timm_deconv.kernels.joining import add_up_, pack_symmetric, probed_share, register_group, unpack_symmetric
from timm_deconv.linalg import symmetric_part

from .functional import Moments

__all__ = ["JointBatch", "Seen"]

DIMENSIONS = 8
"""Most dimensions of a batch whose shape is told."""


class Seen(NamedTuple):
    """What a layer whitens: windows of x (N, C, H, W), whose features are divided into blocks."""

    x: Tensor
    window: Window
    blocks: Blocks


class JointBatch:
    """The processes that hold a batch together, and what each has of it. All layers of a network share one.

    Copies of a network share it too; a pickled network is that of one process.

    Args:
        group: the processes, over which statistics are added up.
        host_group: the same processes over gloo, which tell one another the sizes of their batches there, so that
            none waits for its GPU.

    Attributes:
        sizes: the images of each process in the latest batch; empty before the first.
    """

    def __init__(self, group: "dist.ProcessGroup", host_group: "dist.ProcessGroup") -> None:
        self.group, self.host_group = register_group(group), host_group
        self.rank, self.number = dist.get_rank(group), dist.get_world_size(group)
        self.sizes: tuple[int, ...] = ()

    def __deepcopy__(self, memo: dict[int, Any]) -> "JointBatch":
        return self

    def __reduce__(self) -> tuple[Any, ...]:
        return type(None), ()

    def meet(self, shape: torch.Size) -> None:
        """Learn what all processes have of the next batch; each calls it with the shape (N, ...) of its own share.

        Raises:
            InputError: in all processes, where one has no images, or images of another size.
        """
        own = torch.tensor([*shape, *[0] * (DIMENSIONS - len(shape))])
        told = [torch.empty_like(own) for _ in range(self.number)]
        dist.all_gather(told, own, group=self.host_group)
        shapes = torch.stack(told).tolist()
        self.sizes = tuple(size for size, *_ in shapes)
        for process, (size, *others) in enumerate(shapes):
            if not size:
                raise InputError(f"process {process} has no images: give every process at least one, or drop the batch")
            if others != shapes[0][1:]:
                its, first = (tuple(filter(None, each)) for each in (others, shapes[0][1:]))
                raise InputError(
                    f"images of {its} in process {process} and of {first} in process 0: statistics are synchronised"
                    " over images of one size"
                )

    def share(self, images: int, name: str) -> Share:
        """Return which images of the joined batch this process has.

        Args:
            images: what a layer sees of it here, the same multiple of the network's in all processes.
            name: the layer's, for errors.
        """
        own = self.sizes[self.rank] if self.sizes else 0
        if not own or images % own:
            raise InputError(
                f"{name} sees {images} images where the network was given {own or 'none'}: synchronised statistics need"
                " the batch to go in through the network that convert_sync was given"
            )
        times = images // own
        return Share(sum(self.sizes[: self.rank]) * times, sum(self.sizes) * times)

    def join(self, own: Moments, own_rows: int) -> Moments:
        """Return the moments of the rows of all processes; differentiable.

        Args:
            own: those of this process, zero where it has no rows; `row_count` is that of all.
            own_rows: how many it has.
        """
        mean, cov, _ = _Joined.apply(own.mean, own.cov, None, self, own_rows / own.row_count)
        return own._replace(mean=mean, cov=cov)

    def join_seen(self, own: Moments, own_rows: int, seen: Seen, share: Share) -> tuple[Moments, Seen]:
        """Return the moments as `join` does, and in the same message the rows that measure what whiteners pass on.

        Args:
            own, own_rows: see `join`.
            seen: what the layer whitens of its own images.
            share: which images these are.
        """
        probed = probed_share(*seen, share)
        mean, cov, probed = _Joined.apply(own.mean, own.cov, probed, self, own_rows / own.row_count)
        sets, rows, features = probed.shape
        images = probed.transpose(0, 1).reshape(rows, sets * features, 1, 1)
        return own._replace(mean=mean, cov=cov), Seen(images, PIXEL, Blocks(sets, features, groups=sets))

    def join_gradients(self, grad_mean: Tensor, grad_cov: Tensor, part: float) -> tuple[Tensor, Tensor]:
        """Return what reaches a process' own rows of the gradients of the joined moments, (S, F) and (S, F, F).

        Args:
            grad_mean, grad_cov: those of this process' loss, the latter symmetric.
            part: its rows' share of all.
        """
        grad_mean, triangles = self._add_up(grad_mean, pack_symmetric(grad_cov))
        return part * grad_mean, unpack_symmetric(part * triangles, grad_mean.shape[-1])

    def _add_up(self, *parts: Tensor) -> list[Tensor]:
        """Add up tensors over processes, in one message."""
        message = torch.cat([part.flatten() for part in parts])
        add_up_(message, self.group)
        pieces = message.split([part.numel() for part in parts])
        return [piece.view(part.shape) for piece, part in zip(pieces, parts, strict=True)]

    def _exchange(self, mean: Tensor, cov: Tensor, probed: Tensor | None, part: float) -> list[Tensor]:
        """Return mean, covariance and probed rows of all processes, and how far this one's mean is from that mean.

        All means come in one piece each: added up to squares about any other point they could cancel out.
        """
        sets, features = mean.shape
        told = mean.new_zeros(self.number, sets * features + 1)
        told[self.rank, :-1], told[self.rank, -1] = mean.flatten(), part
        probed = mean.new_empty(0) if probed is None else probed
        triangles, told, probed = self._add_up(part * pack_symmetric(cov), told, probed)
        weights, means = told[:, -1, None, None], told[:, :-1].view(-1, sets, features)
        mean = (weights * means).sum(0)
        apart = means - mean
        between = torch.bmm((weights * apart).permute(1, 2, 0), apart.transpose(0, 1))
        return [mean, unpack_symmetric(triangles, features) + between, probed, apart[self.rank]]


class _Joined(torch.autograd.Function):
    """Moments of the rows of all processes, and their probed rows, from those of each."""

    @staticmethod
    def forward(
        ctx: Any, mean: Tensor, cov: Tensor, probed: Tensor | None, joint: JointBatch, part: float
    ) -> tuple[Tensor, Tensor, Tensor]:
        mean, cov, probed, apart = joint._exchange(mean, cov, probed, part)
        ctx.save_for_backward(apart)
        ctx.joint, ctx.part = joint, part
        ctx.mark_non_differentiable(probed)
        return mean, cov, probed

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_mean: Tensor, grad_cov: Tensor, _: Any) -> tuple[Tensor | None, ...]:
        (apart,) = ctx.saved_tensors
        grad_mean, grad_cov = ctx.joint.join_gradients(grad_mean, symmetric_part(grad_cov), ctx.part)
        grad_mean = grad_mean + 2 * torch.bmm(apart.unsqueeze(1), grad_cov).squeeze(1)
        return grad_mean, grad_cov, None, None, None
