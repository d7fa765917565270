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
    through `parameter.data` leave no trace in PyTorch, and tensors made in inference mode count no changes.

    Args:
        parameters: taken note of before they are copied.
    """

    def __init__(self, parameters: Sequence[Tensor]) -> None:
        if any(parameter.requires_grad for parameter in parameters):
            _optimizer_steps.watch()
        self._steps = _optimizer_steps.count
        self._marks = tuple((weakref.ref(p), _version(p), p.data_ptr()) for p in parameters)
        # keeps the memory, so that no later one can have its address
        self._storage = tuple(parameter.untyped_storage() for parameter in parameters)

    def is_current(self, parameters: Sequence[Tensor]) -> bool:
        """Whether `parameters` are the same as then, and unchanged."""
        if self._steps != _optimizer_steps.count or len(parameters) != len(self._marks):
            return False
        # a plain loop without a call of its own, because every call of a head asks for its 14 parameters
        for parameter, (reference, version, address) in zip(parameters, self._marks, strict=True):
            if reference() is not parameter or address != parameter.data_ptr():
                return False
            if version != _NO_VERSION and version != parameter._version:
                return False
        return True


_NO_VERSION = -1  # of tensors made in inference mode, which stay that


def _version(parameter: Tensor) -> int:
    return _NO_VERSION if parameter.is_inference() else parameter._version
