"""FSDP2: weights, gradients and what the optimizer keeps are spread over the processes of one training.

An objective is one unit of it: its weights are gathered when it is called and stay whole while it computes, so that
heads and engines find whole weights, which they read without calling a module. Between two steps every process has its
share. Checkpoints hold whole weights, as those of one process do.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import Any, cast

import torch
from accelerate.utils import convert_to_fp32
from torch import Tensor, nn
from torch.distributed import get_world_size
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule, fully_shard
from torch.distributed.tensor import DTensor, distribute_tensor


class ShardedObjective(nn.Module):
    """What a Trainer calls in the place of an objective, which is spread over all processes from here on.

    accelerate would shard modules of its own choice, whose weights are no longer whole for who reads them.

    Args:
        objective: on the device that trains; its parameters are empty until `make_whole`.
        autocast: in which it computes.
    """

    def __init__(self, objective: nn.Module, autocast: Callable[[], AbstractContextManager[Any]]) -> None:
        super().__init__()
        self.autocast = autocast
        self._places = [
            (module, name, parameter)
            for module in objective.modules()
            for name, parameter in module.named_parameters(recurse=False)
        ]
        self._hooks = {module: set(module._load_state_dict_post_hooks) for module in objective.modules()}
        device = self._places[0][2].device.type
        fully_shard(objective, mesh=init_device_mesh(device, (get_world_size(),)))
        for _, _, parameter in self._places:
            parameter.data = parameter.data.new_empty(0)
        self.objective = objective

    def forward(self, **batch: Any) -> Any:
        with self.autocast():
            output = self.objective(**batch)
        return convert_to_fp32(output)

    def weights(self) -> dict[str, Tensor]:
        """Whole weights by their names in the objective, on the CPU; all processes call it together."""
        cast(FSDPModule, self.objective).reshard()
        return {name: whole(value).cpu() for name, value in self.objective.state_dict().items()}

    @torch.no_grad()
    def make_whole(self) -> None:
        """Give the objective back the parameters that it had, with what they learnt; all processes call it together."""
        cast(FSDPModule, self.objective).reshard()
        for module, name, parameter in self._places:
            learnt = whole(cast(Tensor, getattr(module, name)))
            if parameter.numel() != learnt.numel():
                parameter.data = torch.empty_like(learnt)
            # in place, which weights that were derived from it notice
            parameter.copy_(learnt)
        for module, name, parameter in self._places:
            setattr(module, name, parameter)
        for module, hooks in self._hooks.items():
            # those of FSDP look for its shares whenever weights are loaded
            for added in set(module._load_state_dict_post_hooks) - hooks:
                del module._load_state_dict_post_hooks[added]
        self._places, self._hooks = [], {}


def whole(value: Any) -> Any:
    """What all processes have of a tensor together; anything else as it is."""
    return cast(DTensor, value.detach()).full_tensor() if isinstance(value, DTensor) else value


def whole_state(optimizer: torch.optim.Optimizer) -> dict[str, Any]:
    """The state of an optimizer as one process would have it; all processes call it together."""
    found = optimizer.state_dict()
    state = {
        number: {name: whole(value) for name, value in values.items()} for number, values in found["state"].items()
    }
    return {**found, "state": state}


def load_whole_state(optimizer: torch.optim.Optimizer, found: dict[str, Any]) -> None:
    """Give each process its share of a state that one process would have."""
    parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    state = {}
    for number, values in found["state"].items():
        parameter = parameters[number]
        state[number] = {
            name: distribute_tensor(value.to(parameter.device), parameter.device_mesh, parameter.placements)
            if isinstance(value, Tensor) and value.shape == parameter.shape
            else value
            for name, value in values.items()
        }
    optimizer.load_state_dict({**found, "state": state})
