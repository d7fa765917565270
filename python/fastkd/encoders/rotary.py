"""`Rotary`: the rotary tables of a layer, as transformers computes them, for every position at once."""

from __future__ import annotations

import weakref
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from fastkd.encoders.untouched import is_untouched


@dataclass(frozen=True)
class Rotary:
    """Where the frequencies of a layer lie: in a module of the encoder, which may have several sets of them."""

    module: nn.Module
    kind: str | None = None
    """Of layer, where they differ by it, as in "sliding_attention"."""

    @property
    def frequencies(self) -> Tensor:
        """[head_size / 2], radians a position."""
        return self._named("inv_freq")

    @property
    def is_fixed(self) -> bool:
        """Whether the tables depend on positions alone: not on the input's length, and nothing is hooked to them."""
        types: Any = self.module.rope_type
        rope_type = types if self.kind is None else types.get(self.kind)
        is_known = rope_type is not None and not _reads_length(rope_type)
        return is_known and self._positions > 0 and is_untouched(self.module)

    @property
    def tables(self) -> tuple[Tensor, Tensor]:
        """Cosines and sines [positions, head_size / 2] float32 for all that the encoder knows; kept with the module."""
        of_module = _tables.setdefault(self.module, {})
        found, made_of = of_module.get(self.kind), (self.frequencies, self._named("attention_scaling"), self._positions)
        if found is None or not found.are_of(*made_of):
            found = of_module[self.kind] = _Tables.of(*made_of)
        return found.cosines, found.sines

    @property
    def _positions(self) -> int:
        positions: Any = self.module.max_seq_len_cached
        return positions

    def _named(self, name: str) -> Any:
        return getattr(self.module, name if self.kind is None else f"{self.kind}_{name}")


def reads_length(encoder: nn.Module) -> bool:
    """Whether frequencies inside the encoder depend on how long its input is, padding included."""
    found = (getattr(module, "rope_type", None) for module in encoder.modules())
    types = [name for named in found for name in (named.values() if isinstance(named, dict) else [named])]
    return any(isinstance(name, str) and _reads_length(name) for name in types)


def _reads_length(rope_type: str) -> bool:
    return "dynamic" in rope_type or rope_type == "longrope"


class _Tables(NamedTuple):
    frequencies: Tensor
    version: int
    scaling: float
    cosines: Tensor
    sines: Tensor

    @classmethod
    def of(cls, frequencies: Tensor, scaling: float, positions: int) -> _Tables:
        angles = torch.arange(positions, device=frequencies.device).float()[:, None] * frequencies.float()
        return cls(frequencies, frequencies._version, scaling, angles.cos() * scaling, angles.sin() * scaling)

    def are_of(self, frequencies: Tensor, scaling: float, positions: int) -> bool:
        is_current = self.frequencies is frequencies and self.version == frequencies._version
        return is_current and self.scaling == scaling and self.cosines.shape[0] == positions


# values that do not hold the module, which would never go
_tables: weakref.WeakKeyDictionary[nn.Module, dict[str | None, _Tables]] = weakref.WeakKeyDictionary()
