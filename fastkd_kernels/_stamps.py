"""Whether parameters, or modules, changed since something was derived from them: folded heads, rearranged weights."""

from __future__ import annotations

import itertools
import weakref
from collections.abc import Callable, Iterable, Sequence
from functools import partial
from typing import Any

from torch import Tensor, nn
from torch.optim.optimizer import register_optimizer_step_post_hook

from fastkd_kernels import _extension


class _OptimizerSteps:
    """Steps of every optimizer since the first stamp: a fused one changes parameters without raising their version."""

    def __init__(self) -> None:
        self.count = 0
        self._counter = itertools.count(1)
        self._watches = False

    def watch(self) -> None:
        if not self._watches:
            self._watches = True
            register_optimizer_step_post_hook(self._count_step)

    def _count_step(self, *_: Any) -> None:
        self.count = next(self._counter)


_optimizer_steps = _OptimizerSteps()


class ParameterStamp:
    """What a copy of parameters keeps, to know later whether it still says what they say.

    Recognises other tensors, changes in place, moved memory and the steps of any `torch.optim` optimizer. Changes
    through `parameter.data` leave no trace in PyTorch, and tensors made in inference mode count no changes. Keeps
    neither the parameters nor their memory alive.

    Args:
        parameters: taken note of before they are copied.
    """

    def __init__(self, parameters: Sequence[Tensor]) -> None:
        if any(parameter.requires_grad for parameter in parameters):
            _optimizer_steps.watch()
        self._steps = _optimizer_steps.count
        self._marks = tuple((weakref.ref(p), _version(p), p.data_ptr()) for p in parameters)
        # told when memory is freed, because a later tensor may have its address
        self._freed: list[Any] = []
        self._memory = tuple(weakref.ref(parameter.untyped_storage(), self._freed.append) for parameter in parameters)

    @property
    def memory_was_freed(self) -> bool:
        """Whether any of the parameters has moved or gone since then, and its memory with it; costs next to nothing."""
        return bool(self._freed)

    def has_no_hint(self) -> bool:
        """Whether no memory was freed and no optimizer has stepped; what the tensors themselves say is not asked."""
        return not self._freed and self._steps == _optimizer_steps.count

    def is_current(self, parameters: Sequence[Tensor] | None = None) -> bool:
        """Whether the parameters are the same as then, and unchanged.

        Args:
            parameters: what they are now; default those of then, as far as they are alive.
        """
        if not self.has_no_hint():
            return False
        if parameters is not None and len(parameters) != len(self._marks):
            return False
        # a plain loop without a call of its own, because every call of a head asks for its 14 parameters
        for number, (reference, version, address) in enumerate(self._marks):
            parameter = reference()
            if parameter is None or (parameters is not None and parameter is not parameters[number]):
                return False
            if address != parameter.data_ptr() or (version != _NO_VERSION and version != parameter._version):
                return False
        return True


_NO_VERSION = -1  # of tensors made in inference mode, which stay that


def _version(parameter: Tensor) -> int:
    return _NO_VERSION if parameter.is_inference() else parameter._version


class ModuleStamp:
    """What modules hold, to know later whether anything was put into them, taken out or changed.

    Recognises what `ParameterStamp` does for their parameters and buffers, and every attribute that was set or deleted
    since: hooks, a `forward` of their own, other parameters and submodules, another mode, a number; in dictionaries and
    lists that they hold too, but not deeper, and not what is about `state_dict` alone. A patched class leaves no trace
    in a module. Keeps neither modules nor tensors alive, but other attributes, which must not hold the owner of
    the stamp.

    Args:
        modules: those that are looked at.
        settings: other objects, whose attributes are looked at as well, such as configurations.
        inside: whether all modules inside those are looked at too.
    """

    def __init__(self, modules: Iterable[nn.Module], settings: Iterable[object] = (), *, inside: bool = True) -> None:
        seen = list(dict.fromkeys(inner for module in modules for inner in (module.modules() if inside else [module])))
        held = [(*module._parameters.values(), *module._buffers.values()) for module in seen]
        tensors = list({id(t): t for values in held for t in values if t is not None}.values())
        self._tensors = ParameterStamp(tensors)
        given = [*seen, *settings], tensors, (nn.Module, Tensor)
        extension = _extension.extension
        self._contents: Callable[[], bool]
        if extension is None:
            self._contents = _Contents(*given).is_current
        else:
            self._contents = partial(extension.module_stamp_is_current, extension.module_stamp(*given))

    def is_current(self) -> bool:
        """Whether all is as it was."""
        return self._tensors.has_no_hint() and self._contents()


class _Contents:
    """csrc/module_stamp.cpp in plain Python: the oracle of its tests, and where it was not built."""

    def __init__(self, modules: list[Any], tensors: list[Tensor], not_kept: tuple[type, ...]) -> None:
        self._not_kept = not_kept
        self._gone: list[Any] = []
        self._modules = [(self._marked(module), type(module), self._contents(module)) for module in modules]
        self._tensors = [(self._marked(tensor), _version(tensor), tensor.data_ptr()) for tensor in tensors]

    def is_current(self) -> bool:
        if self._gone:
            return False
        for reference, kind, contents in self._modules:
            module = reference()
            if type(module) is not kind or self._contents(module) != contents:
                return False
        for reference, version, address in self._tensors:
            tensor = reference()
            if tensor is None or address != tensor.data_ptr():
                return False
            if version != _NO_VERSION and version != tensor._version:
                return False
        return True

    def _marked(self, value: Any) -> Any:
        return weakref.ref(value, self._gone.append)

    def _contents(self, module: Any) -> list[Any]:
        return [
            (name, self._value(value, goes_deeper=True))
            for name, value in module.__dict__.items()
            if not name.startswith(("_state_dict", "_load_state_dict"))
        ]

    def _value(self, value: Any, goes_deeper: bool = False) -> Any:
        if goes_deeper and isinstance(value, dict):
            return [(name, self._value(held)) for name, held in value.items()]
        if goes_deeper and isinstance(value, list):
            return [self._value(held) for held in value]
        return _Same(value, self._gone if isinstance(value, self._not_kept) else None)


class _Same:
    """Equal to a mark of the very same object."""

    def __init__(self, value: Any, gone: list[Any] | None) -> None:
        self._value = value if gone is None else weakref.ref(value, gone.append)
        self._is_weak = gone is not None

    @property
    def _object(self) -> Any:
        return self._value() if self._is_weak else self._value

    def __eq__(self, other: object) -> bool:
        return isinstance(other, _Same) and self._object is other._object

    __hash__ = None  # type: ignore[assignment]
