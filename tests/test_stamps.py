"""ParameterStamp: what it recognises as a change."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import nn

import fastkd_kernels as fk


def _step(optimizer_class: type[torch.optim.Optimizer], **options: object) -> Callable[[nn.Linear], None]:
    def change(layer: nn.Linear) -> None:
        optimizer = optimizer_class(layer.parameters(), lr=0.1, **options)
        layer(torch.ones(1, 3)).sum().backward()
        optimizer.step()

    return change


def _in_place(layer: nn.Linear) -> None:
    with torch.no_grad():
        layer.weight.mul_(2)


def _other_tensor(layer: nn.Linear) -> None:
    layer.weight = nn.Parameter(layer.weight.detach().clone())


CHANGES = {
    "a fused optimizer": _step(torch.optim.AdamW, fused=True),
    "a looping optimizer": _step(torch.optim.AdamW, foreach=False),
    "SGD": _step(torch.optim.SGD),
    "in place": _in_place,
    "another tensor": _other_tensor,
    "another dtype": lambda layer: layer.double(),
    "loaded weights": lambda layer: layer.load_state_dict(nn.Linear(3, 2).state_dict()),
    "the last parameter": lambda layer: nn.init.ones_(layer.bias),
}


@pytest.mark.parametrize("change", CHANGES.values(), ids=CHANGES)
def test_notices(change: Callable[[nn.Linear], None]) -> None:
    layer = nn.Linear(3, 2)
    stamp = fk.ParameterStamp([*layer.parameters()])
    assert stamp.is_current([*layer.parameters()])
    change(layer)
    assert not stamp.is_current([*layer.parameters()])
    assert fk.ParameterStamp([*layer.parameters()]).is_current([*layer.parameters()])


def test_other_memory_at_the_same_address_is_a_change() -> None:
    parameter = nn.Parameter(torch.ones(4))
    stamp = fk.ParameterStamp([parameter])
    parameter.data = torch.ones(4)
    assert not stamp.is_current([parameter])


def test_fewer_or_more_parameters_are_a_change() -> None:
    one, two = torch.ones(1), torch.ones(1)
    stamp = fk.ParameterStamp([one])
    assert not stamp.is_current([one, two])
    assert not stamp.is_current([])


def test_reading_is_no_change() -> None:
    layer = nn.Linear(3, 2)
    stamp = fk.ParameterStamp([*layer.parameters()])
    layer(torch.ones(1, 3)).sum().backward()
    layer.weight.clone()
    assert stamp.is_current([*layer.parameters()])


def test_inference_tensors_have_a_stamp() -> None:
    with torch.inference_mode():
        parameter = torch.ones(2)
        stamp = fk.ParameterStamp([parameter])
        assert stamp.is_current([parameter])
