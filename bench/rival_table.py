"""Ours beside what people run on a CPU: seconds, accuracy and agreement of whole models, in one interleaved run.

`bench_end_to_end.py --rivals` calls it. Everybody gets the same rows, sorted by length, and the same threads: batches
of each size for all, and the whole file, which ours streams and they take in batches of 32. Rows where we lose stay.

    python bench/rival_table.py docs/measured.md bench/results/cpu-rivals-*.json

puts the table of those results between the two markers of a page; a test holds docs/measured.md to them.
"""

from __future__ import annotations

import json
import statistics
import sys
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from datetime import date
from functools import cache, partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from rivals import INPUTS, Arrays, Prepared
from torch import Tensor

import fastkd
from fastkd.data.files import write_json, write_text
from fastkd.inference.interleaved import interleaved

FILE = "file"
FILE_BATCH = 32
"""Rows a batch of those that have no stream."""


@dataclass(frozen=True)
class RivalRow:
    """One contestant on one form of the rows."""

    form: str
    """"1", "8"...: rows a batch; or "file"."""
    contestant: str
    how: str
    speed: float
    ms_per_row: float
    accuracy: float
    agreement: float
    """Share of rows with the answer of transformers in float32."""
    average_layers: float
    gflops: float | None
    """Billion operations a second of a full model, products of the attention included."""
    share_of_peak: float | None
    """Of what oneDNN reaches on one large product in that dtype, measured in this run."""
    over_best_rival: float
    """How many times faster than the fastest full model that is not ours."""


@dataclass(frozen=True)
class _Contestant:
    name: str
    run: Callable[[], tuple[Tensor, Tensor | None]]
    """Predictions in the order of the sorted rows, and exit layers where rows may leave."""
    dtype: str
    is_ours: bool
    how: str = ""
    speed: float = 0.0


def measure_form(
    form: str,
    settings: Mapping[str, Any],
    prepared: Sequence[Prepared],
    speeds: Sequence[float],
    repeats: int,
) -> list[RivalRow]:
    """Every contestant on one form of the rows.

    Args:
        form: "file", or rows a batch.
        settings: of `bench_end_to_end.Setting`, by dtype; "fp32" is one of them.
        prepared: the rivals, by `rivals.prepare`.
        speeds: above 0, at which ours is measured besides.
        repeats: interleaved passes.
    """
    reference = settings["fp32"]
    contestants = [
        _Contestant(f"transformers {dtype}", partial(_transformers, setting), dtype, is_ours=False)
        for dtype, setting in settings.items()
        if dtype != "int8"
    ]
    batches = [arrays(batch) for batch in reference.sorted_batches]
    rivals = [one.ready(cache(partial(_padded, batches))) for one in prepared]
    contestants += [
        _Contestant(
            rival.name, partial(_rival, rival.run, _padded(batches, rival.pad_to)), rival.name.split()[-1], False,
            rival.how,
        )
        for rival in rivals
    ]  # fmt: skip
    for dtype, setting in settings.items():
        for speed in (0.0, *speeds):
            run = partial(_stream if form == FILE else _forward, setting, speed)
            name = f"fastkd {dtype}, {'stream' if form == FILE else 'forward'}"
            contestants.append(_Contestant(name, run, dtype, is_ours=True, speed=speed))
    seconds, answers = interleaved(
        {(one.name, one.speed): one.run for one in contestants},
        repeats,
        lambda key: print(f"\r{form}: {key[0]} {key[1]:g}          ", end="", flush=True),
    )
    print()
    medians = {key: statistics.median(values) for key, values in seconds.items()}
    best = min(medians[one.name, one.speed] for one in contestants if not one.is_ours)
    agreed = answers["transformers fp32", 0.0][0]
    labels = reference.labels[reference.order]
    rows = []
    for one in contestants:
        predictions, exit_layers = answers[one.name, one.speed]
        taken = medians[one.name, one.speed]
        layers = reference.model.num_layers if exit_layers is None else exit_layers.double().mean().item()
        gflops = None if one.speed else _operations(reference) / taken / 1e9
        rows.append(
            RivalRow(
                form=form,
                contestant=one.name,
                how=one.how,
                speed=one.speed,
                ms_per_row=1e3 * taken / len(labels),
                accuracy=_share(predictions, labels),
                agreement=_share(predictions, agreed),
                average_layers=layers,
                gflops=gflops,
                share_of_peak=None if gflops is None else gflops / peak_gflops(one.dtype),
                over_best_rival=best / taken,
            )
        )
    return rows


def _share(predictions: Tensor, expected: Tensor) -> float:
    return (predictions == expected).double().mean().item()


def _transformers(setting: Any) -> tuple[Tensor, None]:
    return setting.transformers(setting.sorted_batches, setting.model.backbone).predictions, None


def _rival(run: Callable[[Sequence[Arrays]], np.ndarray], batches: Sequence[Arrays]) -> tuple[Tensor, None]:
    return torch.from_numpy(run(batches)).argmax(-1), None


def _forward(setting: Any, speed: float) -> tuple[Tensor, Tensor]:
    answers = setting.forward(setting.sorted_batches, speed, None)
    return answers.predictions, answers.exit_layers


def _stream(setting: Any, speed: float) -> tuple[Tensor, Tensor]:
    answers = setting.stream(speed)
    return answers.predictions[setting.order], answers.exit_layers


def arrays(batch: Mapping[str, Tensor]) -> Arrays:
    """A batch as the rivals take it."""
    return {name: batch[name].numpy() for name in INPUTS if name in batch}


def _padded(batches: Sequence[Arrays], pad_to: int) -> list[Arrays]:
    """The batches with their lengths rounded up; what is added is masked."""
    if pad_to == 1:
        return list(batches)
    return [
        {name: np.pad(values, ((0, 0), (0, -values.shape[1] % pad_to))) for name, values in batch.items()}
        for batch in batches
    ]


def _operations(setting: Any) -> int:
    """Of the full model at the true lengths, padding left out."""
    config = setting.model.config
    count = cache(lambda length: fastkd.flops(config, length, convention="all_matmuls"))
    return sum(map(count, setting.lengths))


@cache
def peak_gflops(dtype: str) -> float:
    """What oneDNN reaches here on one large product, the best of several; int8 counts as float operations do."""
    size = 2048
    kind = "int8" if dtype == "int8" else {"bf16": "bfloat16"}.get(dtype, "float32")
    if kind == "int8":
        # unsigned, for which VNNI has instructions; oneDNN's way with signed ones takes minutes there
        a = torch.randint(0, 256, (size, size), dtype=torch.uint8)
        weight = torch.ops.onednn.qlinear_prepack(torch.randint(-127, 128, (size, size), dtype=torch.int8), None)
        scale, zero = torch.ones(size), torch.zeros(size, dtype=torch.int32)
        run = partial(
            torch.ops.onednn.qlinear_pointwise, a, 1.0, 0, weight, scale, zero, None, 1.0, 0, torch.float32, "none",
            [], "",
        )  # fmt: skip
    else:
        a = torch.randn(size, size, dtype=getattr(torch, kind))
        run = partial(torch.mm, a, a)
    run()
    taken = []
    for _ in range(8):
        started = time.perf_counter()
        run()
        taken.append(time.perf_counter() - started)
    return 2 * size**3 / min(taken) / 1e9


def markdown(rows: Iterable[RivalRow], facts: Mapping[str, Any]) -> str:
    """A table of one run, its machine and instruction set above it."""
    rows = list(rows)
    peaks = {row.contestant.split()[1].rstrip(","): row for row in rows if row.share_of_peak}
    shown = ", ".join(f"{dtype} {row.gflops / row.share_of_peak:.0f}" for dtype, row in peaks.items())  # type: ignore[operator]
    lines = [
        f"**{facts['data']}**, {facts['rows']:,} rows, {facts['processor']}, {facts['instruction_set']}, "
        f"{facts['threads']} threads, medians of {facts['repeats']} interleaved passes; one large product by oneDNN "
        f"reaches, in GFLOP/s: {shown}.",
        "",
        "| rows a batch | contestant | speed | ms a row | over the best rival | accuracy | agreement | layers "
        "| GFLOP/s | of peak |",
        "|---|---|---|---|---|---|---|---|---|---|",
    ]
    for row in rows:
        work = "| |" if row.gflops is None else f"| {row.gflops:.0f} | {row.share_of_peak:.0%} |"
        lines.append(
            f"| {row.form} | {row.contestant} | {row.speed:g} | {row.ms_per_row:.3f} | {row.over_best_rival:.2f}x | "
            f"{row.accuracy:.2%} | {row.agreement:.2%} | {row.average_layers:.2f} {work}"
        )
    chosen = {f"{row.contestant} (rows a batch: {row.form}): {row.how}" for row in rows if row.how}
    return "\n".join([*lines, "", *(f"* {sentence}" for sentence in sorted(chosen)), ""])


def write(rows: Sequence[RivalRow], facts: Mapping[str, Any], output: Path) -> None:
    """The rows as JSON, and as a table beside it."""
    facts = {**facts, "date": date.today().isoformat()}
    write_json(output, {"machine": facts, "rows": [asdict(row) for row in rows]})
    write_text(output.with_suffix(".md"), markdown(rows, facts))


BEGIN, END = "<!-- rivals: made by bench/rival_table.py -->", "<!-- end of rivals -->"


def page_table(results: Sequence[Mapping[str, Any]]) -> str:
    """Milliseconds a row of every contestant, one column for each file and form, and what accuracy the file had.

    Args:
        results: what `write` wrote, one for each run; in this order.
    """
    if not results:
        return ""
    columns: dict[tuple[str, str], dict[tuple[str, float], Mapping[str, Any]]] = {}
    machines = {}
    for result in results:
        facts = result["machine"]
        machines[f"{facts['processor']}, {facts['instruction_set']}, {facts['threads']} threads, {facts['date']}"] = 1
        for row in result["rows"]:
            name = row["contestant"].split(",")[0]
            columns.setdefault((facts["data"], row["form"]), {})[name, row["speed"]] = row
    names = list(dict.fromkeys(key for column in columns.values() for key in column))
    # ours last, whatever order the runs had
    names.sort(key=lambda key: key[0].startswith("fastkd"))
    heads = [data if form == FILE else f"{data}, B={form}" for data, form in columns]
    lines = [
        f"Milliseconds a row, and accuracy where the whole file ran; {'; '.join(machines)}:",
        "",
        f"| contestant | speed | {' | '.join(heads)} |",
        "|" + "---|" * (2 + len(heads)),
    ]
    for key in names:
        cells = [_cell(form, column.get(key)) for (_, form), column in columns.items()]
        lines.append(f"| {key[0]} | {key[1]:g} | {' | '.join(cells)} |")
    return "\n".join(lines)


def _cell(form: str, row: Mapping[str, Any] | None) -> str:
    if row is None:
        return ""
    taken = f"{row['ms_per_row']:.2f}"
    return f"{taken}, {row['accuracy']:.2%}" if form == FILE else taken


def page_with(page: str, table: str) -> str:
    """The page with this table between its markers."""
    before, rest = page.split(BEGIN)
    return f"{before}{BEGIN}\n{table}\n{END}{rest.split(END)[1]}"


def _main(page: str, *results: str) -> None:
    path = Path(page)
    found = [json.loads(Path(result).read_text(encoding="utf-8")) for result in sorted(results)]
    write_text(path, page_with(path.read_text(encoding="utf-8"), page_table(found)))


if __name__ == "__main__":
    _main(*sys.argv[1:])
