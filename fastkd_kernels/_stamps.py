"""Whether parameters changed since something was derived from them: folded heads, weights rearranged for oneDNN."""

from __future__ import annotations

import itertools
import weakref
from collections.abc import Sequence
from typing import Any

from torch import Tensor
from torch.optim.optimizer import register_optimizer_step_post_hook


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

    def is_current(self, parameters: Sequence[Tensor] | None = None) -> bool:
        """Whether the parameters are the same as then, and unchanged.

        Args:
            parameters: what they are now; default those of then, as far as they are alive.
        """
        if self._freed or self._steps != _optimizer_steps.count:
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
