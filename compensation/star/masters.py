"""Training numbers that run in FP16: masters in FP32 collect steps too small for FP16, the network holds them rounded.

The gradient at the rounded numbers moves the masters (straight-through), so that what is trained is what will run.
"""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn


class Masters:
    """FP32 masters of the parameters `running` of a network, and AdamW over them without weight decay.

    From construction on `running` hold FP16 values (edits them); so they do after every `step`.
    """

    def __init__(self, running: Mapping[str, nn.Parameter]) -> None:
        self.running = {name: parameter.requires_grad_(True) for name, parameter in running.items()}
        self.masters = {name: parameter.detach().clone() for name, parameter in running.items()}
        self.optimiser = torch.optim.AdamW(self.masters.values(), weight_decay=0.0)
        self._round()

    @torch.no_grad()
    def _round(self) -> None:
        for name, master in self.masters.items():
            self.running[name].copy_(master.half())

    def values(self) -> dict[str, Tensor]:
        """A copy of what the network holds: FP16 values in float32, by name."""
        return {name: parameter.detach().clone() for name, parameter in self.running.items()}

    def step(self, learning_rate: float) -> None:
        """Move the masters along the gradients of the network's parameters, and round anew; no gradient is left."""
        for name, master in self.masters.items():
            master.grad, self.running[name].grad = self.running[name].grad, None
        self.optimiser.param_groups[0]["lr"] = learning_rate
        self.optimiser.step()
        self._round()

    def state(self) -> dict[str, Any]:
        """What a checkpoint keeps."""
        return {"masters": self.masters, "optimiser": self.optimiser.state_dict()}

    @torch.no_grad()
    def restore(self, state: dict[str, Any]) -> None:
        """Go on from what `state` gave."""
        for name, master in self.masters.items():
            master.copy_(state["masters"][name])
        self.optimiser.load_state_dict(state["optimiser"])
        self._round()
