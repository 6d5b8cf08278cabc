"""convert_sync: statistics over the batches of all processes, for whitening layers what SyncBatchNorm is for batch
norm."""

from functools import partial
from typing import Any

import torch
import torch.distributed as dist
from timm.layers import convert_sync_batchnorm
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from timm_deconv.errors import InputError
from timm_deconv.layers.joint import JointBatch

from .module_types import WHITENING_TYPES

__all__ = ["convert_sync"]


def convert_sync(
    module: nn.Module,
    process_group: "dist.ProcessGroup | None" = None,
    *,
    host_group: "dist.ProcessGroup | None" = None,
) -> nn.Module:
    """Let a network's whitening layers estimate their statistics from the batches of all processes.

    N processes with a batch of B / N images then learn what one process learns with B. Batch norms that are left in the
    network become synchronised ones, as by `timm.layers.convert_sync_batchnorm`, where they are on a device for which
    these exist (not on a processor).

    Every process converts its network, on its device, before DistributedDataParallel or `fully_shard` take it, and
    trains through it: each training forward of the network begins with an exchange of the sizes of the batches.
    Evaluation involves no other process. Where the last batch is uneven, each process multiplies its mean loss by its
    part of the images times the number of processes: gradients are averaged over processes.

    Args:
        module: a network, or a part that sees whole batches; changed in place.
        process_group: the processes; all of them by default.
        host_group: a gloo group of the same processes, where there is one already.

    Returns:
        the network; another module where it is a batch norm itself.

    Raises:
        InputError: torch.distributed has not been initialised.
    """
    if not (dist.is_available() and dist.is_initialized()):
        raise InputError("convert_sync: there are no processes yet; call torch.distributed.init_process_group before")
    group = dist.distributed_c10d._get_default_group() if process_group is None else process_group
    layers = [each for each in module.modules() if isinstance(each, WHITENING_TYPES) and each.joint is None]
    if dist.get_world_size(group) > 1 and layers:
        joint = JointBatch(group, host_group or _gloo_group(group))
        for layer in layers:
            layer.joint = joint
        module.register_forward_pre_hook(partial(_meet, joint), with_kwargs=True)
    return _synchronised_norms(module, process_group)


def _gloo_group(group: "dist.ProcessGroup") -> "dist.ProcessGroup":
    """Return a group of the same processes that speak through the host."""
    if dist.get_backend(group) == "gloo":
        return group
    made = dist.new_group(dist.get_process_group_ranks(group), backend="gloo", use_local_synchronization=True)
    assert isinstance(made, dist.ProcessGroup)  # which this process is in
    return made


def _synchronised_norms(module: nn.Module, group: "dist.ProcessGroup | None") -> nn.Module:
    norms = [each for each in module.modules() if isinstance(each, _BatchNorm)]
    on_host = any(value.device.type == "cpu" for norm in norms for value in norm.state_dict().values())
    return module if on_host else convert_sync_batchnorm(module, group)


@torch.compiler.disable  # type: ignore[untyped-decorator]  # it is torch's
def _meet(joint: JointBatch | None, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    """Tell all processes the shape of the batch that the network is about to train on."""
    batch = next((value for value in (*args, *kwargs.values()) if isinstance(value, Tensor)), None)
    if joint is not None and batch is not None and module.training:
        joint.meet(batch.shape)
