"""ParameterStamp and ModuleStamp: what they recognise as a change."""

from __future__ import annotations

import gc
import weakref
from collections.abc import Callable

import pytest
import torch
from torch import nn

import fastkd_kernels as fk
from fastkd_kernels import _extension


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


class _Settings:
    def __init__(self) -> None:
        self.numbers = [1, 2]
        self.names = {0: "a"}


def _nested() -> nn.Sequential:
    return nn.Sequential(nn.Linear(3, 2), nn.Sequential(nn.LayerNorm(2), nn.BatchNorm1d(2)))


def _with(module: nn.Module, name: str, value: object) -> None:
    setattr(module, name, value)


MODULE_CHANGES: dict[str, Callable[[nn.Sequential, _Settings], object]] = {
    "a hook": lambda module, _: module[0].register_forward_hook(lambda *_: None),
    "a hook with names": lambda module, _: module[1][0].register_forward_pre_hook(lambda *_: None, with_kwargs=True),
    "a backward hook": lambda module, _: module[0].register_full_backward_hook(lambda *_: None),
    "a patched forward": lambda module, _: _with(module[1][0], "forward", lambda rows: rows),
    "another number": lambda module, _: _with(module[1][0], "eps", 0.25),
    "an attribute less": lambda module, _: delattr(module[1][0], "eps"),
    "an attribute more": lambda module, _: _with(module[1], "colour", "red"),
    "another mode": lambda module, _: module[1][1].eval(),
    "another module": lambda module, _: _with(module[1], "0", nn.LayerNorm(2)),
    "one module more": lambda module, _: module[1].append(nn.ReLU()),
    "one module less": lambda module, _: delattr(module[1], "1"),
    "another parameter": lambda module, _: _with(module[0], "weight", nn.Parameter(torch.ones(2, 3))),
    "no bias": lambda module, _: _with(module[0], "bias", None),
    "another dictionary": lambda module, _: _with(module[0], "_forward_hooks", {0: print}),
    "a buffer in place": lambda module, _: module[1][1].running_mean.add_(1),
    "a weight in place": lambda module, _: _in_place(module[0]),
    "another dtype": lambda module, _: module.double(),
    "a fused optimizer": lambda module, _: _step(torch.optim.AdamW, fused=True)(module[0]),
    "another class": lambda module, _: setattr(module[0], "__class__", type("Other", (nn.Linear,), {})),
    "a setting": lambda _, settings: setattr(settings, "colour", "red"),
    "one of several numbers": lambda _, settings: settings.numbers.__setitem__(1, 7),
    "a number more": lambda _, settings: settings.numbers.append(3),
    "a name": lambda _, settings: settings.names.update({0: "b"}),
}


@pytest.fixture(params=["compiled", "plain"])
def contents(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    if request.param == "plain":
        monkeypatch.setattr(_extension, "extension", None)
    elif _extension.extension is None:
        pytest.skip("fastkd_kernels._C was not compiled")


@pytest.mark.usefixtures("contents")
@pytest.mark.parametrize("change", MODULE_CHANGES.values(), ids=MODULE_CHANGES)
def test_a_module_stamp_notices(change: Callable[[nn.Sequential, _Settings], object]) -> None:
    module, settings = _nested(), _Settings()
    stamp = fk.ModuleStamp([module], [settings])
    assert stamp.is_current()
    change(module, settings)
    assert not stamp.is_current()
    assert fk.ModuleStamp([module], [settings]).is_current()


@pytest.mark.usefixtures("contents")
def test_a_module_stamp_does_not_mind_what_changes_nothing() -> None:
    module = _nested()
    stamp = fk.ModuleStamp([module])
    module.eval().train()
    module[0].eps = 1
    del module[0].eps
    handle = module[0].register_forward_hook(lambda *_: None)
    handle.remove()
    module[0]._register_state_dict_hook(lambda *_: None)
    module.requires_grad_(False)
    assert stamp.is_current()


@pytest.mark.usefixtures("contents")
def test_a_module_stamp_of_what_is_gone_is_not_current() -> None:
    module = _nested()
    stamp = fk.ModuleStamp([module])
    weight = weakref.ref(module[0].weight)
    del module
    gc.collect()
    assert weight() is None
    assert not stamp.is_current()


class _Careless(torch.Tensor):
    """Whoever asks it for its address loses another tensor."""

    loses: list[nn.Module]

    def data_ptr(self) -> int:
        for module in self.__dict__.pop("loses", []):
            module.weight = None
            gc.collect()
        return super().data_ptr()


@pytest.mark.usefixtures("contents")
def test_a_module_stamp_whose_tensors_go_while_it_is_asked() -> None:
    module = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2))
    careless = torch.ones(2).as_subclass(_Careless)
    module[0].register_buffer("careless", careless)
    # memory of a tensor that went is not asked
    stamp = fk.ModuleStamp([module])
    careless.loses = [module[1]]
    assert not stamp.is_current()


@pytest.mark.usefixtures("contents")
def test_a_module_stamp_of_weights_made_in_inference_mode() -> None:
    with torch.inference_mode():
        module = _nested()
    stamp = fk.ModuleStamp([module])
    assert stamp.is_current()
    module[1][0].eps = 0.5
    assert not stamp.is_current()
