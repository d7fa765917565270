"""The files that a sweep, a comparison, a benchmark and single calls leave: numbers and pictures in one folder."""

from __future__ import annotations

import csv
import re
from collections.abc import Iterable, Mapping
from pathlib import Path

from fastkd.data.files import atomic_path
from fastkd.exits.sweep import Sweep
from fastkd.inference.latency import Latency
from fastkd.inference.measurements import Benchmark
from fastkd.report import figures


def file_suffixes(names: Iterable[str]) -> dict[str, str]:
    """What tells the files of curves apart, by the curves' names: nothing for a single one, else a hyphen and the name.

    No two are the same, and none has a slash, so that all files lie in one folder.
    """
    suffixes: dict[str, str] = {}
    for name in names:
        suffix = plain = "-" + re.sub(r"[^\w.]+", "-", name).strip("-.")
        number = 1
        while suffix in suffixes.values():
            number += 1
            suffix = f"{plain}-{number}"
        suffixes[name] = suffix
    return suffixes if len(suffixes) > 1 else dict.fromkeys(suffixes, "")


def write_sweeps(sweeps: Mapping[str, Sweep], folder: Path) -> list[Path]:
    """CSV and pictures of the sweeps, by the name that their curves get; the paths written.

    Raises:
        ValueError: some with a correlation and others with an accuracy.
    """
    labelled = {name: table for name, table in sweeps.items() if all(row.quality is not None for row in table)}
    figures.check_one_measure({name: table[0].pearson is not None for name, table in labelled.items()})
    files = []
    for name, suffix in file_suffixes(sweeps).items():
        files.append(folder / f"sweep{suffix}.csv")
        sweeps[name].to_csv(files[-1])
        files.append(folder / f"exits_per_layer{suffix}.png")
        figures.exits_per_layer(sweeps[name], files[-1])
    files.append(folder / "speed_speedup.png")
    figures.speed_speedup(sweeps, files[-1])
    if len(labelled) == len(sweeps):
        for draw in (figures.speed_accuracy, figures.speedup_accuracy, figures.figure3):
            files.append(folder / f"{draw.__name__}.png")
            draw(sweeps, files[-1])
    return files


def write_comparison(sweeps: Mapping[str, Sweep], folder: Path) -> list[Path]:
    """CSV and picture of one sweep for each criterion, by its name; the paths written."""
    files = [folder / "compare.csv", folder / "compare.png"]
    # "performance" is a way to use entropy, and would be called so
    rows = [row | {"criterion": name} for name, sweep in sweeps.items() for row in sweep.to_dicts()]
    with atomic_path(files[0]) as temporary, temporary.open("w", newline="", encoding="utf-8") as stream:
        writer = csv.DictWriter(stream, fieldnames=list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)
    figures.comparison(sweeps, files[1])
    return files


def write_benchmark(measured: Benchmark, folder: Path, about: str = "") -> list[Path]:
    """JSON, CSV and picture of the measurements, of these rows and this model in words; the paths written."""
    files = [folder / "bench.json", folder / "bench.csv", folder / "wall_clock.png"]
    measured.to_json(files[0])
    measured.to_csv(files[1])
    figures.wall_clock(measured.rows, files[2], about)
    return files


def write_latency(measured: Latency, folder: Path) -> list[Path]:
    """JSON, CSV and picture of single calls; the paths written."""
    files = [folder / "latency.json", folder / "latency.csv", folder / "latency.png"]
    measured.to_json(files[0])
    measured.to_csv(files[1])
    figures.latency(measured.rows, files[2])
    return files
