"""What one step found, on disk: shared by the worker that measures and the report that watches it."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, field
from pathlib import Path

from gpu import store
from gpu.records import Ceilings, ModelRow, Row, SweepRow


@dataclass
class Part:
    """What one step found; written whole after every case, so that a step that dies loses one case."""

    path: Path
    ceilings: Ceilings | None = None
    rows: list[Row] = field(default_factory=list)
    sweeps: list[SweepRow] = field(default_factory=list)
    models: list[ModelRow] = field(default_factory=list)
    problems: list[str] = field(default_factory=list)
    done: list[str] = field(default_factory=list)
    """Cases that need not be begun again."""

    def write(self) -> None:
        value = {
            "ceilings": None if self.ceilings is None else asdict(self.ceilings),
            "rows": [row.to_dict() for row in self.rows],
            "sweeps": [asdict(row) for row in self.sweeps],
            "models": [row.to_dict() for row in self.models],
            "problems": self.problems,
            "done": self.done,
        }
        store.write(self.path, json.dumps(value, indent=1))

    @classmethod
    def read(cls, path: Path) -> Part:
        value = json.loads(path.read_text())
        return cls(
            path,
            None if value["ceilings"] is None else Ceilings(**value["ceilings"]),
            [Row.from_dict(row) for row in value["rows"]],
            [SweepRow(**row) for row in value["sweeps"]],
            [ModelRow.from_dict(row) for row in value["models"]],
            value["problems"],
            value["done"],
        )

    @property
    def progress(self) -> Path:
        """One line for everything that was begun, and, by the parent, for what ended a worker."""
        return progress_of(self.path)


def progress_of(part: Path) -> Path:
    return part.with_suffix(".progress.jsonl")
