"""A sweep: what each of several speeds costs, and how good its answers are."""

from __future__ import annotations

import csv
import os
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from fastkd.data.files import atomic_path


@dataclass(frozen=True)
class SweepRow:
    """The cost and the quality of one speed."""

    speed: float
    """On a threshold path, the place on it."""
    accuracy: float | None
    """Share of right answers in [0, 1]; None without labels and for regression."""
    average_layers: float
    exits_per_layer: list[int]
    """How many rows left after each of the layers, 0 where a layer has no head."""
    flops: dict[str, float]
    """Mean operations a row, by convention (`fastkd.flops`)."""
    speedup: dict[str, float]
    """Operations of the full model (all layers, one head) divided by `flops`."""
    pearson: float | None = None
    """Correlation of answers and labels, for regression."""
    interval: tuple[float, float] | None = None
    """Of `quality`, for rows to come, with 95 % confidence (`fastkd.exits.intervals`)."""

    @property
    def quality(self) -> float | None:
        """Accuracy, or for regression the correlation; None without labels."""
        return self.accuracy if self.pearson is None else self.pearson


@dataclass(frozen=True)
class Sweep:
    """A table of speeds."""

    rows: list[SweepRow]
    criterion: str
    top_n: int | None
    seq_len: int
    """The length for which operations were counted."""
    about: str = ""
    """Data, rows and model in words, for pictures (`ExitTrace.about`)."""

    def __iter__(self) -> Iterator[SweepRow]:
        return iter(self.rows)

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> SweepRow:
        return self.rows[index]

    def slower_than_full(self, convention: str = "fastbert") -> list[float]:
        """The speeds above 0 at which the heads that were asked cost more operations than leaving early saves."""
        return [row.speed for row in self.rows if row.speed > 0 and row.speedup[convention] < 1]

    def to_dicts(self) -> list[dict[str, Any]]:
        """One flat dictionary a row, ready for CSV or JSON."""
        return [
            {
                "speed": row.speed,
                "criterion": self.criterion,
                "top_n": self.top_n,
                "seq_len": self.seq_len,
                "accuracy": row.accuracy,
                **({} if row.pearson is None else {"pearson": row.pearson}),
                **(
                    {}
                    if row.interval is None
                    else dict(zip(("quality_low", "quality_high"), row.interval, strict=True))
                ),
                "average_layers": row.average_layers,
                **{f"exits_layer_{layer}": count for layer, count in enumerate(row.exits_per_layer, start=1)},
                **{f"flops_{name}": value for name, value in row.flops.items()},
                **{f"speedup_{name}": value for name, value in row.speedup.items()},
            }
            for row in self.rows
        ]

    def to_csv(self, path: str | os.PathLike[str]) -> None:
        """Write the table; the file is either whole or absent."""
        rows = self.to_dicts()
        with atomic_path(path) as temporary, temporary.open("w", newline="", encoding="utf-8") as stream:
            writer = csv.DictWriter(stream, fieldnames=list(rows[0]))
            writer.writeheader()
            writer.writerows(rows)
