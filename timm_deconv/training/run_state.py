"""Everything that a run goes on from, gathered from and given back to all processes."""

import random
from typing import Any

import numpy as np
import torch
from accelerate import Accelerator
from timm.scheduler.scheduler import Scheduler
from torch import Tensor, nn

from .processes import Processes

__all__ = ["RunState", "random_states", "set_random_states"]


class RunState:
    """Network, average, optimiser, schedule, scaler, and what every process has of its own.

    Args:
        accelerator: with the scaler of float16, and the optimiser prepared.
        processes: all of the run.
        network: not wrapped.
        averaged: the average of its weights where there is one.
        optimizer: prepared or not.
        scheduler: timm's.
    """

    def __init__(
        self,
        accelerator: Accelerator,
        processes: Processes,
        network: nn.Module,
        averaged: nn.Module | None,
        optimizer: Any,
        scheduler: Scheduler,
    ) -> None:
        self.processes, self.device = processes, accelerator.device
        self.networks = {"network": network} if averaged is None else {"network": network, "average": averaged}
        self.others = {"optimizer": optimizer, "scheduler": scheduler}
        if accelerator.scaler is not None:
            self.others["scaler"] = accelerator.scaler

    def size(self) -> int:
        """Return the bytes of the networks, which a state takes at least."""
        values = (value for network in self.networks.values() for value in network.state_dict().values())
        return sum(value.nbytes for value in values)

    def gather(self, own: dict[str, Any]) -> dict[str, Any] | None:
        """Return the state in the main process, None in the others; all call it.

        Args:
            own: what else this process has of its own: tensors and numbers.
        """
        own = {"random": random_states(self.device), **own}
        if self.processes.index:  # the running values of each process differ where statistics are not shared
            own["buffers"] = {name: _buffers(network) for name, network in self.networks.items()}
        all_own = self.processes.gather_to_main(own)
        if all_own is None:
            return None
        return {
            **{name: network.state_dict() for name, network in self.networks.items()},
            **{name: other.state_dict() for name, other in self.others.items()},
            "processes": all_own,
        }

    def restore(self, state: dict[str, Any]) -> list[dict[str, Any]]:
        """Give everything back.

        Args:
            state: from `gather`, read back.

        Returns:
            The `own` of each process that saved. Where there were as many of them as now, the random states are
            restored too.
        """
        self.restore_weights(state)
        self.others["scheduler"].load_state_dict(state["scheduler"])
        saved = state["processes"]
        if len(saved) == self.processes.number:
            set_random_states(saved[self.processes.index]["random"], self.device)
        return saved

    def restore_weights(self, state: dict[str, Any]) -> None:
        """Give back what updates change: networks, optimiser and scaler."""
        saved = state["processes"]
        own = saved[self.processes.index % len(saved)]
        for name, network in self.networks.items():
            network.load_state_dict({**state[name], **own.get("buffers", {}).get(name, {})})
        for name in self.others.keys() - {"scheduler"}:
            self.others[name].load_state_dict(state[name])


def random_states(device: torch.device) -> dict[str, Any]:
    """Return the states of Python's, numpy's and torch's generators, and of the device's."""
    states = {"python": random.getstate(), "numpy": np.random.get_state(), "torch": torch.get_rng_state()}
    return {**states, "cuda": torch.cuda.get_rng_state(device)} if device.type == "cuda" else states


def set_random_states(states: dict[str, Any], device: torch.device) -> None:
    """Set what `random_states` returned; the device's where it is of the same type."""
    random.setstate(states["python"])
    np.random.set_state(states["numpy"])
    torch.set_rng_state(states["torch"])
    if device.type == "cuda" and "cuda" in states:
        torch.cuda.set_rng_state(states["cuda"], device)


def _buffers(network: nn.Module) -> dict[str, Tensor]:
    parameters = {name for name, _ in network.named_parameters(remove_duplicate=False)}
    return {name: value.cpu() for name, value in network.state_dict().items() if name not in parameters}
