"""What a benchmark measured: one row for each speed, form of the rows and dtype, and the machine it was measured on."""

from __future__ import annotations

import csv
import os
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from typing import Any

from fastkd.data.files import atomic_path, write_json
from fastkd.exits.flops import CONVENTIONS

STREAM = "stream"
"""What tables call rows that run as a stream, and the full model that does."""


@dataclass(frozen=True)
class BenchmarkRow:
    """One speed in one dtype, as a stream or at one batch size."""

    device: str
    dtype: str
    batch_size: int | None
    """None for the stream, which is what `predict` runs; files for tables say "stream" there."""
    speed: float
    rows: int
    accuracy: float | None
    full_accuracy: float | None
    """Both None without labels and for regression."""
    average_layers: float
    flops_speedup: float
    """Full model / early exit, fastbert convention."""
    flops_speedups: dict[str, float]
    """The same in every convention."""
    seconds: float
    """Median of a pass over all rows, early exit."""
    seconds_p20: float
    seconds_p80: float
    full_seconds: float
    """Median of a pass over all rows, full model at its best."""
    full_engine: str
    """Which full model was the fastest one: "fastkd", "transformers", or for the stream perhaps "stream"."""
    speedup: float
    """`full_seconds / seconds`."""
    pearson: float | None = None
    full_pearson: float | None = None
    """Correlation of answers and labels, for regression."""
    full_batch_size: int | None = None
    """Batches of the fastest full model; None for the stream."""

    @property
    def form(self) -> str:
        """How the rows ran, as pictures and their legends name it."""
        return STREAM if self.batch_size is None else f"batch {self.batch_size}"

    @property
    def full_form(self) -> str:
        """The fastest full model; with its batch size where that is not the row's own."""
        if self.full_batch_size in (None, self.batch_size):
            return self.full_engine
        return f"{self.full_engine}, {self.full_batch_size}"

    @property
    def realised(self) -> float:
        """Measured speed-up as a share of the FLOPs speed-up."""
        return self.speedup / self.flops_speedup

    @property
    def rows_per_second(self) -> float:
        return self.rows / self.seconds

    def to_dict(self) -> dict[str, Any]:
        """Flat, ready for CSV and JSON."""
        flat = asdict(self)
        conventions = flat.pop("flops_speedups")
        return {
            **flat,
            **{f"flops_speedup_{name}": value for name, value in conventions.items()},
            "realised": self.realised,
            "rows_per_second": self.rows_per_second,
        }


@dataclass(frozen=True)
class Benchmark:
    """A table of measurements and what they were made on."""

    rows: list[BenchmarkRow]
    machine: dict[str, Any]
    criterion: str = "entropy"

    def to_dict(self) -> dict[str, Any]:
        rows = [row.to_dict() for row in self.rows]
        return {"machine": self.machine, "criterion": self.criterion, "rows": rows}

    @classmethod
    def from_dict(cls, value: Mapping[str, Any]) -> Benchmark:
        """What `to_dict` gave, or an older version's.

        Those that did not write the criterion measured with entropy; those without the full model's batch size ran it
        in the row's own batches.
        """
        known = {field.name for field in fields(BenchmarkRow)}
        rows = [
            BenchmarkRow(
                **{"full_batch_size": row["batch_size"]} | {name: item for name, item in row.items() if name in known},
                flops_speedups={name: row[f"flops_speedup_{name}"] for name in CONVENTIONS},
            )
            for row in value["rows"]
        ]
        return cls(rows, dict(value["machine"]), value.get("criterion", "entropy"))

    def to_json(self, path: str | os.PathLike[str]) -> None:
        write_json(path, self.to_dict())

    def to_csv(self, path: str | os.PathLike[str]) -> None:
        """Write the table; the file is either whole or absent."""
        named = ("batch_size", "full_batch_size")
        rows = [
            {name: STREAM if name in named and value is None else value for name, value in row.to_dict().items()}
            for row in self.rows
        ]
        with atomic_path(path) as temporary, temporary.open("w", newline="", encoding="utf-8") as stream:
            writer = csv.DictWriter(stream, fieldnames=list(rows[0]))
            writer.writeheader()
            writer.writerows(rows)
