"""`ExitRule`: everything that decides where a row leaves, resolved once for a call or a stream."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from numbers import Real

from fastkd.exits.catalogue import check_criterion


@dataclass(frozen=True)
class ExitRule:
    """After which layers a head is asked, and when its answer is good enough.

    Attributes:
        criterion: a name in `fastkd.exits.catalogue.CRITERIA`.
        top_n: how many classes the criterion "top_n" looks at; None for the others.
        layers: 1-based numbers of the layers whose heads are asked, ascending. The last one answers every row that is
            left.
        thresholds: for each of `layers` but the last, the largest uncertainty with which a row leaves there, above 0.
    """

    criterion: str
    top_n: int | None
    layers: tuple[int, ...]
    thresholds: tuple[float, ...]

    @classmethod
    def resolve(
        cls,
        speed: float | Sequence[float],
        criterion: str,
        top_n: int | None,
        *,
        exit_layers: Sequence[int],
        num_labels: int,
        asked_layers: Sequence[int] | None = None,
    ) -> ExitRule:
        """The rule that these options describe.

        Args:
            speed: one number in [0, 1] for all heads, or one for each head below the last; a head at 0 is not asked.
            criterion, top_n: as above.
            exit_layers: the layers that have a head, ascending.
            num_labels: of the model.
            asked_layers: ask only the heads after these layers, a choice of `exit_layers`; default: all. The last head
                answers in any case.

        Raises:
            ValueError: speeds outside [0, 1] or another number of them than heads below the last; a criterion that is
                unknown, not for this number of labels, or lacks its `top_n`; a layer without a head.
        """
        check_criterion(criterion, top_n, num_labels)
        speeds = head_speeds(speed, exit_layers)
        unknown = [layer for layer in asked_layers or () if layer not in exit_layers]
        if unknown:
            raise ValueError(f"exit_layers: got {unknown[0]}, but this model has heads after {list(exit_layers)}")
        asked = [layer for layer in speeds if asked_layers is None or layer in asked_layers]
        return cls(criterion, top_n, (*asked, exit_layers[-1]), tuple(speeds[layer] for layer in asked))

    @property
    def leaves_early(self) -> bool:
        """Whether any row may leave before the last layer."""
        return len(self.layers) > 1

    @property
    def last_layer(self) -> int:
        return self.layers[-1]

    @property
    def stages(self) -> tuple[range, ...]:
        """The layers up to each head that is asked."""
        return stages_of(self.layers)

    def threshold(self, layer: int) -> float:
        """The threshold after `layer`; 0, at which no row leaves early, where its head is not asked or is the last."""
        return dict(zip(self.layers, self.thresholds, strict=False)).get(layer, 0.0)


def stages_of(layers: Sequence[int]) -> tuple[range, ...]:
    """For each of these layers, those behind the one before, itself included: what runs up to its head."""
    return tuple(range(before + 1, layer + 1) for before, layer in pairwise((0, *layers)))


def check_speed(speed: float | Sequence[float]) -> float | list[float]:
    """`speed` as a float, or as a list of floats where it is one number for each head.

    Raises:
        ValueError: not numbers in [0, 1].
    """
    if isinstance(speed, Sequence) and not isinstance(speed, str):
        return [_checked_number(value) for value in speed]
    return _checked_number(speed)


def head_speeds(speed: float | Sequence[float], exit_layers: Sequence[int]) -> dict[int, float]:
    """The speed of each head below the last that is asked, by its layer.

    A head with speed 0 lets no row leave, so it is not asked; where all are 0, the full model runs.

    Args:
        speed: one number for all heads, or one for each head below the last, in layer order.
        exit_layers: the layers that have a head, ascending; the last one answers every row that is left.

    Raises:
        ValueError: not numbers in [0, 1], or another number of them than heads below the last.
    """
    speed = check_speed(speed)
    early = list(exit_layers)[:-1]
    if isinstance(speed, float):
        speed = [speed] * len(early)
    if len(speed) != len(early):
        raise ValueError(
            f"speed: got {len(speed)} numbers, expected one, or {len(early)}: one for each head below the last, after "
            f"the layers {early}"
        )
    return {layer: value for layer, value in zip(early, speed, strict=True) if value > 0}


def _checked_number(speed: float) -> float:
    if isinstance(speed, bool) or not isinstance(speed, Real) or not 0 <= speed <= 1:
        raise ValueError(f"speed: got {speed!r}, expected a number from 0 (never leave early) to 1 (leave at once)")
    return float(speed)
