"""What a configuration says about weights, and whether the weights are still those.

`exits_trained`, `certificate`, `label_scale` and `training_data` describe the weights of a moment. A model keeps a
`WeightsSketch` of that moment beside them, and `save_pretrained` writes its fingerprint into the configuration.
"""

from __future__ import annotations

import warnings
import weakref
from collections.abc import Mapping
from typing import Any, Protocol

import torch
from torch import Tensor

import fastkd_kernels as fk
from fastkd.encoders.configuration import EarlyExitConfig
from fastkd.encoders.heads import ExitHead
from fastkd.exits.fingerprints import HasWeights, WeightsSketch
from fastkd.exits.merged_state import merged_state


class DescribedModel(HasWeights, Protocol):
    """An early-exit model."""

    config: EarlyExitConfig

    @property
    def last_head(self) -> ExitHead: ...


class ChangedWeightsWarning(UserWarning):
    """The configuration describes other weights than the model has."""


OTHER_FILE = "the weights in the file are not those that its config.json describes"


class WeightsClaims:
    """Which weights, adapters merged, the configuration of one model describes; of a new model nothing is known."""

    def __init__(self) -> None:
        self._sketch: WeightsSketch | None = None
        self._problem: str | None = None
        self.version = 0
        """Another number after each change of what is claimed."""

    def confirm(self, model: DescribedModel) -> None:
        """The configuration describes the weights as they are now."""
        self._sketch, self._problem = WeightsSketch.of(merged_state(model)), None
        self.version += 1
        _stamps.pop(model, None)

    def loaded(self, model: DescribedModel, fingerprint: str | None) -> None:
        """Hold what was just loaded from a file with this fingerprint (None: unknown) against the configuration."""
        self.confirm(model)
        described = model.config.weights_fingerprint
        if described is None:
            # of an older version: whoever changes the weights from now on is noticed
            model.config.weights_fingerprint = fingerprint
        elif fingerprint is not None and fingerprint != described:
            self._problem = OTHER_FILE
            self.version += 1

    def carry_over(self, model: DescribedModel, problem: str | None) -> None:
        """The weights were written in another form; `problem` is how they differed before."""
        if self._knows_nothing(model):
            return
        self.confirm(model)
        self._problem = problem

    @property
    def is_open(self) -> bool:
        """Whether nothing is known yet."""
        return self._sketch is None

    def _knows_nothing(self, model: DescribedModel) -> bool:
        """Whether there is nothing to hold weights against: a model that is new, from a configuration that is new."""
        return self.is_open and model.config.weights_fingerprint is None

    def problem(self, model: DescribedModel, state: Mapping[str, Tensor] | None = None) -> str | None:
        """How the weights, or those in `state`, differ from what is described; None where they do not."""
        if self._problem is not None or self._knows_nothing(model):
            return self._problem
        now = WeightsSketch.of(merged_state(model) if state is None else state)
        if self._sketch is None:
            return _problem_of_built(model.config, now)
        changed = self._sketch.changed(now)
        if not changed:
            return None
        return f"{len(changed)} tensors changed since, among them {changed[0]}"

    def warn_if_changed(self, model: DescribedModel) -> None:
        """Tell, once for each change of the last head, that early heads were trained for other weights."""
        # a replica of DataParallel has no parameters, and the model that it was made of was asked
        if getattr(model, "_is_replica", False):
            return
        if self._problem is None and self._knows_nothing(model):
            return
        watched = list(model.last_head.parameters())
        stamp = _stamps.get(model)
        if stamp is not None and stamp.is_current(watched):
            return
        _stamps[model] = fk.ParameterStamp(watched)
        problem = self.problem(model)
        if problem is not None:
            warnings.warn(
                f"config.exits_trained: the heads below the last were distilled for other weights ({problem}), so "
                "early answers may be wrong; distil them again (fastkd.distill), or call model.confirm_weights() if "
                "they were trained along",
                ChangedWeightsWarning,
                stacklevel=4,
            )


def _problem_of_built(config: EarlyExitConfig, now: WeightsSketch) -> str | None:
    """As `WeightsClaims.problem` for a model that was built from a saved configuration, not loaded from its file."""
    saved_as = str(config.dtype or torch.float32).removeprefix("torch.")
    has_other_dtype = any(f"{value.dtype}" != f"torch.{saved_as}" for value in now.samples.values())
    # the same weights have another fingerprint in another dtype
    if has_other_dtype or now.fingerprint == config.weights_fingerprint:
        return None
    return "they are not those that its configuration was saved with"


# beside the models and not in them, so that these can be copied and pickled
_stamps: weakref.WeakKeyDictionary[Any, fk.ParameterStamp] = weakref.WeakKeyDictionary()


def asks_about_weights() -> bool:
    """Whether weights can be looked at: a graph that is being traced has none."""
    return not torch.compiler.is_compiling()
