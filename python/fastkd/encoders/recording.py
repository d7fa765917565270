"""What an encoder's own forward passes to its layers, recorded in one run that skips them.

The run is one of a stand-in of the encoder: shallow copies of the modules on the way to the list of layers, with
recorders in that list. Nothing of the encoder itself is touched, so threads may share it, and hooks, adapters and
quantised weights of its layers are met only when these are called.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from itertools import accumulate, count, pairwise
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor, nn
from transformers.utils import ModelOutput


class EncoderInputs(NamedTuple):
    """What an encoder's forward is given."""

    input_ids: Tensor | None = None
    """[B, T] integers; None where there are `inputs_embeds`."""
    attention_mask: Tensor | None = None
    """[B, T] bool, True where a token counts; None where nothing is padded."""
    token_type_ids: Tensor | None = None
    position_ids: Tensor | None = None
    inputs_embeds: Tensor | None = None
    """[B, T, E]."""

    @property
    def shape(self) -> tuple[int, int]:
        """B and T."""
        tokens = self.input_ids if self.inputs_embeds is None else self.inputs_embeds
        assert tokens is not None
        return tokens.shape[0], tokens.shape[1]

    def changed(self, change: Callable[[Tensor], Tensor]) -> EncoderInputs:
        """With `change` applied to every tensor."""
        return EncoderInputs(*(None if value is None else change(value) for value in self))


class LayerCall(NamedTuple):
    """One call of a layer without its hidden states."""

    layer: int
    """Its place in the list of layers."""
    arguments: tuple[Any, ...]
    """Positional ones, after the hidden states where these are positional."""
    options: dict[str, Any]
    """Named ones."""
    by_name: bool
    """Whether the hidden states are the argument `hidden_states`, and not the first positional one."""

    def run(self, layer: nn.Module, hidden_states: Tensor) -> Tensor:
        """What `layer` makes of hidden states of the recorded rows."""
        if self.by_name:
            given = layer(*self.arguments, hidden_states=hidden_states, **self.options)
        else:
            given = layer(hidden_states, *self.arguments, **self.options)
        return same_rows(layer, hidden_states, hidden_states_of(given))


@dataclass(frozen=True, eq=False)
class Recording:
    """What an encoder passed to its layers for one batch.

    Attributes:
        inputs: the batch.
        hidden_states: before the first layer, [B, T, H].
        calls: of its layers, in their order.
    """

    inputs: EncoderInputs
    hidden_states: Tensor
    calls: tuple[LayerCall, ...]

    def run(self, layers: nn.ModuleList, number: int, hidden_states: Tensor) -> Tensor:
        """The output of layer `number`, from 1, in the order of the calls."""
        call = self.calls[number - 1]
        return call.run(layers[call.layer], hidden_states)

    def like(self, other: Recording) -> list[tuple[Any, Any]]:
        """Each value in the arguments of this recording with the one at the same place of `other`.

        Raises:
            LookupError: the two differ in more than values.
        """
        return list(_paired(self._arguments(), other._arguments()))

    def kind(self) -> tuple[Any, ...]:
        """Equal for recordings whose arguments have the same form: which sizes are 1, that of the batch, or others."""
        rows = self.inputs.shape[0]
        return tuple(_kinds(self._arguments(), rows))

    def selected(self, rows: Tensor, dims: Mapping[int, int]) -> Recording:
        """The recording of some of its rows.

        Args:
            rows: [R] int64.
            dims: by the place of a tensor among the values of `kind`: its dimension that is the batch's.
        """
        # layers share masks and tables
        known: dict[int, Tensor] = {}
        places = count()

        def change(value: Any) -> Any:
            dim = dims.get(next(places))
            if dim is None:
                return value
            if id(value) not in known:
                known[id(value)] = value.index_select(dim, rows)
            return known[id(value)]

        calls = tuple(
            call._replace(arguments=_mapped(call.arguments, change), options=_mapped(call.options, change))
            for call in self.calls
        )
        return replace(self, inputs=self.inputs.changed(lambda value: value.index_select(0, rows)), calls=calls)

    def _arguments(self) -> list[Any]:
        return [[call.arguments, call.options] for call in self.calls]


def hidden_states_of(output: Any) -> Any:
    """The hidden states in what a layer, or an encoder, returned; `output` itself where there are none."""
    if isinstance(output, ModelOutput):
        return output.to_tuple()[0]
    return output[0] if isinstance(output, tuple) else output


def same_rows(layer: nn.Module, taken: Tensor, given: Any) -> Tensor:
    """`given`, the hidden states that `layer` made of `taken`; ValueError where it changed the batch or its tokens."""
    if not isinstance(given, Tensor) or given.shape[:2] != taken.shape[:2]:
        shape = tuple(given.shape) if isinstance(given, Tensor) else type(given).__name__
        raise ValueError(
            f"backbone: a layer {type(layer).__name__} took hidden states {tuple(taken.shape)} and gave {shape}; rows "
            "leave between layers, so every layer must keep the batch and its tokens: put the original layer back"
        )
    return given


def _mapped(value: Any, change: Callable[[Any], Any]) -> Any:
    if isinstance(value, tuple | list):
        parts = [_mapped(part, change) for part in value]
        return type(value)(*parts) if hasattr(value, "_fields") else type(value)(parts)
    if isinstance(value, dict):
        return {name: _mapped(part, change) for name, part in value.items()}
    return change(value)


def _values(value: Any) -> Iterator[Any]:
    if isinstance(value, tuple | list):
        for part in value:
            yield from _values(part)
    elif isinstance(value, dict):
        for part in value.values():
            yield from _values(part)
    else:
        yield value


def _paired(first: Any, second: Any) -> Iterator[tuple[Any, Any]]:
    ours, theirs = list(_values(first)), list(_values(second))
    if [type(value) for value in ours] != [type(value) for value in theirs]:
        raise LookupError
    yield from zip(ours, theirs, strict=True)


def _kinds(value: Any, rows: int) -> Iterator[Any]:
    for leaf in _values(value):
        if isinstance(leaf, Tensor):
            yield tuple(1 if size == 1 else "rows" if size == rows else "other" for size in leaf.shape)
        else:
            yield type(leaf)


class _StandIn(nn.Module):
    """Stands for `module`, whose attributes it has."""

    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        self.real = module
        self.training = module.training

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            return getattr(super().__getattr__("real"), name)


class _Recorder(_StandIn):
    """Stands for a layer: notes what it is called with and gives the hidden states back as they came."""

    def __init__(self, module: nn.Module, place: int, calls: list[_Call], outputs: Mapping[int, int] | None) -> None:
        super().__init__(module)
        self.place = place
        self.calls = calls
        self.outputs = outputs

    def forward(self, *arguments: Any, **options: Any) -> Any:
        by_name = "hidden_states" in options
        if by_name:
            hidden_states = options.pop("hidden_states")
        elif arguments:
            hidden_states, *rest = arguments
            arguments = tuple(rest)
        else:
            hidden_states = None
        call = LayerCall(self.place, arguments, options, by_name)
        if self.outputs is None:
            output = self.real(*arguments, hidden_states=hidden_states, **options) if by_name else None
            output = self.real(hidden_states, *arguments, **options) if not by_name else output
            size = len(output) if isinstance(output, tuple) else 0
            self.calls.append(_Call(call, hidden_states, hidden_states_of(output), size))
            return output
        size = self.outputs.get(self.place, 0)
        self.calls.append(_Call(call, hidden_states, hidden_states, size))
        return (hidden_states, *[None] * (size - 1)) if size else hidden_states


class _Listener(_StandIn):
    """Stands for a module beside the layers: runs it, and notes what it took and gave."""

    def __init__(self, module: nn.Module, path: str, heard: list[Heard]) -> None:
        super().__init__(module)
        self.path = path
        self.heard = heard

    def forward(self, *arguments: Any, **options: Any) -> Any:
        output = self.real(*arguments, **options)
        if len(arguments) == 1 and not options:
            self.heard.append(Heard(self.path, arguments[0], output))
        return output


class _Call(NamedTuple):
    call: LayerCall
    taken: Any
    given: Any
    size: int


class Heard(NamedTuple):
    """A module that was called with one argument, and what it gave."""

    path: str
    taken: Any
    given: Any


class Observation(NamedTuple):
    """One run of an encoder with its layers.

    Attributes:
        calls: of its layers.
        taken, given: the hidden states of each call before and after.
        sizes: by the place of a layer: how long a tuple it returns, 0 for a tensor.
        heard: what ran beside the layers.
        output: the encoder's, [B, T, H].
    """

    calls: tuple[LayerCall, ...]
    taken: list[Any]
    given: list[Any]
    sizes: dict[int, int]
    heard: list[Heard]
    output: Any


def observe(encoder: nn.Module, path: str, arguments: Mapping[str, Any]) -> Observation:
    """Run `encoder` on `arguments` and note what its layers, in the list called `path`, take and give."""
    calls: list[_Call] = []
    heard: list[Heard] = []
    shadow = _shadow(encoder, path, lambda layer, place: _Recorder(layer, place, calls, None), heard)
    output = hidden_states_of(shadow(**arguments))
    _keep_changes(encoder, shadow, path)
    return Observation(
        calls=tuple(call.call for call in calls),
        taken=[call.taken for call in calls],
        given=[call.given for call in calls],
        sizes={call.call.layer: call.size for call in calls},
        heard=heard,
        output=output,
    )


def record(
    encoder: nn.Module, path: str, sizes: Mapping[int, int], inputs: EncoderInputs, arguments: Mapping[str, Any]
) -> Recording:
    """Run `encoder` on `arguments` without its layers.

    Args:
        encoder: in any mode; gradients reach what runs before its layers.
        path: of its list of layers.
        sizes: what `observe` said of them.
        inputs: what the arguments were made of.
        arguments: of the encoder's forward.

    Raises:
        RuntimeError: it did something to the hidden states between its layers.
    """
    calls: list[_Call] = []
    shadow = _shadow(encoder, path, lambda layer, place: _Recorder(layer, place, calls, sizes), None)
    shadow(**arguments)
    _keep_changes(encoder, shadow, path)
    for number, (before, after) in enumerate(pairwise(calls), start=1):
        if not _is_same(before.given, after.taken):
            raise RuntimeError(
                f"{type(encoder).__name__} changes the hidden states between its layers {number} and {number + 1}, "
                "which fastkd runs one by one; use an encoder that does not"
            )
    return Recording(inputs, calls[0].taken, tuple(call.call for call in calls))


def _is_same(first: Tensor, second: Tensor) -> bool:
    return first is second or (first.shape == second.shape and first.data_ptr() == second.data_ptr())


def _shadow(
    encoder: nn.Module,
    path: str,
    stand_in: Callable[[nn.Module, int], nn.Module],
    heard: list[Heard] | None,
) -> nn.Module:
    """A copy of `encoder` that shares all but the modules on the way to its layers, for which others stand."""
    *way, last = path.split(".")
    root = shadow = _copied(encoder)
    for depth, name in enumerate(way):
        if heard is not None:
            _listen(shadow, way[:depth], name, heard)
        inner = shadow._modules[name] = _copied(shadow.get_submodule(name))
        shadow = inner
    if heard is not None:
        _listen(shadow, way, last, heard)
    layers = cast(nn.ModuleList, shadow._modules[last])
    shadow._modules[last] = nn.ModuleList(stand_in(layer, place) for place, layer in enumerate(layers))
    return root


_HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")
_OWN = ("_modules", *_HOOKS)  # of a copy


def _copied(module: nn.Module) -> nn.Module:
    """A shallow copy with submodules of its own and without what was put around it."""
    copied = copy.copy(module)
    copied.__dict__["_modules"] = dict(module._modules)
    for name in _HOOKS:
        copied.__dict__[name] = type(getattr(module, name))()
    # such as offloading puts there, which would call the original
    copied.__dict__.pop("forward", None)
    return copied


def _keep_changes(encoder: nn.Module, shadow: nn.Module, path: str) -> None:
    """Give `encoder` what its forward changed in itself: BigBird leaves sparse attention at the first short batch."""
    for name in ["", *accumulate(path.split(".")[:-1], "{}.{}".format)]:
        module = encoder.get_submodule(name)
        changed = shadow.get_submodule(name).__dict__
        for attribute, value in changed.items():
            if attribute not in _OWN and module.__dict__.get(attribute) is not value:
                module.__dict__[attribute] = value


def _listen(shadow: nn.Module, way: list[str], on_the_way: str, heard: list[Heard]) -> None:
    for name, child in shadow._modules.items():
        if child is not None and name != on_the_way and not isinstance(child, nn.ModuleList | nn.ModuleDict):
            shadow._modules[name] = _Listener(child, ".".join([*way, name]), heard)


def copied_row(inputs: EncoderInputs) -> EncoderInputs:
    """`inputs` with their first row once more."""
    return inputs.changed(lambda value: torch.cat([value, value[:1]]))
