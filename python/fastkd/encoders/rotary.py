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
        rope_type = types if self.kind is None else types.get(self.kind, "none")
        depends = "dynamic" in rope_type or rope_type in ("longrope", "none")
        knows_positions: Any = self.module.max_seq_len_cached
        return not depends and knows_positions > 0 and is_untouched(self.module)

    @property
    def tables(self) -> tuple[Tensor, Tensor]:
        """Cosines and sines [positions, head_size / 2] float32 for all that the encoder knows; kept with the module."""
        of_module = _tables.setdefault(self.module, {})
        found, frequencies = of_module.get(self.kind), self.frequencies
        if found is None or not found.are_of(frequencies):
            positions: Any = self.module.max_seq_len_cached
            found = of_module[self.kind] = _Tables.of(frequencies, self._named("attention_scaling"), positions)
        return found.cosines, found.sines

    def _named(self, name: str) -> Any:
        return getattr(self.module, name if self.kind is None else f"{self.kind}_{name}")


class _Tables(NamedTuple):
    frequencies: Tensor
    version: int
    cosines: Tensor
    sines: Tensor

    @classmethod
    def of(cls, frequencies: Tensor, scaling: float, positions: int) -> _Tables:
        angles = torch.arange(positions, device=frequencies.device).float()[:, None] * frequencies.float()
        return cls(frequencies, frequencies._version, angles.cos() * scaling, angles.sin() * scaling)

    def are_of(self, frequencies: Tensor) -> bool:
        return self.frequencies is frequencies and self.version == frequencies._version


# values that do not hold the module, which would never go
_tables: weakref.WeakKeyDictionary[nn.Module, dict[str | None, _Tables]] = weakref.WeakKeyDictionary()
