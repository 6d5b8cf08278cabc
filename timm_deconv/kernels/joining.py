"""What processes that hold a batch together tell one another: sums, symmetric matrices as triangles, probed rows."""

import torch
import torch.distributed as dist
from torch import Tensor

from timm_deconv.linalg import promote

from .blocks import Blocks, split_rows
from .gain import PROBED_ROWS
from .operation import Operation
from .windows import Share, Window, spread_places, spread_windows

__all__ = ["add_up_", "pack_symmetric", "probed_share", "register_group", "unpack_symmetric"]

_groups: dict[str, "dist.ProcessGroup"] = {}


def register_group(group: "dist.ProcessGroup") -> str:
    """Return the name by which `add_up_` knows a process group."""
    _groups[group.group_name] = group
    return group.group_name


def _add_up_(message: Tensor, group: str) -> None:
    """Replace a tensor (...), in place, by its sum over the processes of a registered group."""
    dist.all_reduce(message, group=_groups[group])


def pack_symmetric(matrices: Tensor) -> Tensor:
    """Return the upper triangles (S, F (F + 1) / 2) of symmetric matrices (S, F, F)."""
    row, column = torch.triu_indices(*matrices.shape[-2:], device=matrices.device)
    return matrices[:, row, column]


def unpack_symmetric(triangles: Tensor, features: int) -> Tensor:
    """Return the symmetric matrices (S, F, F) of upper triangles (S, F (F + 1) / 2)."""
    row, column = torch.triu_indices(features, features, device=triangles.device)
    matrices = triangles.new_empty(len(triangles), features, features)
    matrices[:, row, column] = triangles
    matrices[:, column, row] = triangles
    return matrices


def probed_share(x: Tensor, seen: Window, blocks: Blocks, share: Share) -> Tensor:
    """Return the rows (S, R, F) that `average_in_` probes of a batch, those in a share of it, x, with zeros between.

    Args:
        x: (N, C, H, W).
        seen, blocks: the windows of the batch that are whitened, and their division.
        share: which images of the batch x is.
    """
    of_set, places = blocks.number // blocks.sets, spread_places(x.shape, seen, PROBED_ROWS, share)
    number = min(PROBED_ROWS, share.whole * seen.positions((x.shape[2], x.shape[3]))) * of_set
    step = -(-number // PROBED_ROWS)
    first = -(-places.start * of_set // step)
    rows = split_rows(spread_windows(x, seen, PROBED_ROWS, share), blocks)
    rows = rows[:, first * step - places.start * of_set :: step]
    probed = promote(x.new_zeros(blocks.sets, -(-number // step), blocks.features))
    probed[:, first : first + rows.shape[1]] = rows
    return probed


add_up_ = Operation(_add_up_, "(Tensor(a!) message, str group) -> ()", mutates_args=("message",))
