"""A report as Markdown and as plots."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from gpu.records import OURS, Measured, ModelRow, Quantiles, Report, Row, SweepRow, best_of_sweep, by_case

NOT_MEASURED = "not yet measured"


def markdown(report: Report, pictures: Sequence[str] = ()) -> str:
    """The whole report; rows that no test of the same run proves stand apart at its end."""
    blocks = [_head(report), _tests(report)]
    blocks += _measured(report.proven())
    blocks += [f"![{name}]({name})" for name in pictures]
    blocks += [_steps(report), _problems(report), *_unproven(report)]
    return "\n\n".join(block for block in blocks if block) + "\n"


def _measured(measured: Measured) -> list[str]:
    grouped = by_case(measured.rows)
    ops = dict.fromkeys(op for op, _ in grouped)
    blocks = [_op(op, {case: rows for (of, case), rows in grouped.items() if of == op}) for op in ops]
    return [*blocks, _models(measured.models), _sweeps(measured.sweeps)]


def summary(report: Report) -> str:
    """What has to arrive even where no file does: a page at most, the most important last."""
    failed = [test for outcomes in report.tests.values() for test in outcomes.failed]
    proven = report.proven()
    lines = ["A rehearsal: no GPU produced these numbers."] if report.rehearsal else []
    lines += [f"failed: {test}" for test in failed[:20]]
    lines += [f"... and {len(failed) - 20} more failed" for _ in failed[20:21]]
    lines += [f"problem: {problem[:200]}" for problem in report.problems[:20]]
    lines += [f"... and {len(report.problems) - 20} more problems" for _ in report.problems[20:21]]
    lines += [reason[:200] for reason in report.reasons()]
    for row in proven.rows:
        lines += [
            f"{row.op} {row.case}: {goal.text}: {goal.value:.3g}, {'met' if goal.met else 'missed'}"
            for goal in row.goals
        ]
    for (op, case), (best, chosen) in best_of_sweep(proven.sweeps).items():
        if chosen is not None and chosen is not best:
            lines.append(f"{op} {case}: {best.config} {best.median_us:.2f} us, chosen {chosen.median_us:.2f} us")
    for model in proven.models:
        lines.append(f"models B={model.batch_size} {model.average_layers:.2f}: {model.engine} ratio {model.ratio:.2f}")
    lines += [f"step {step.name}: {step.status}, {step.seconds:.0f} s {step.note[:100]}" for step in report.steps]
    return "\n".join(lines)


def _head(report: Report) -> str:
    lines = [f"# {report.environment.get('device', 'unknown device')}"]
    if report.rehearsal:
        lines = ["# A rehearsal: no GPU produced these numbers", "", "They only show that every step runs."]
    lines += ["", ", ".join(f"{name} {value}" for name, value in report.environment.items())]
    ceilings = report.ceilings
    if ceilings is None:
        lines += ["", f"Ceilings: {NOT_MEASURED}, so no floors are known."]
    else:
        lines += [
            "",
            f"Ceilings of this run: copy {ceilings.copy_bytes_per_s / 1e12:.2f} TB/s (read + written), bf16 product "
            f"{ceilings.matmul_flops_per_s / 1e12:.0f} TFLOP/s, empty kernel in a CUDA graph "
            f"{ceilings.launch_us:.2f} us.",
        ]
    lines += [
        "",
        "Times are microseconds a call. *warm* repeats one set of inputs, *cold* rotates over sets that exceed L2 "
        "twice (or evicts it before each call, where inputs are small); both are replays of a CUDA graph between "
        "events, or plain calls where a provider waits for the device. *floor* is the larger of bytes over copy "
        "bandwidth and operations over the rate of the product; *share* is floor over the time in bold. *host* is "
        "until the call returns, *end to end* includes the waiting for its result.",
    ]
    return "\n".join(lines)


def _tests(report: Report) -> str:
    if not report.tests:
        return "No test ran in this run, so every row is unproven."
    lines = [
        "## Tests on the device",
        "",
        "| file | passed | failed | skipped | not reached |",
        "|---|---|---|---|---|",
    ]
    for name, outcomes in sorted(report.tests.items()):
        failed = len(outcomes.failed)
        lines.append(f"| {name} | {outcomes.passed} | {failed} | {outcomes.skipped} | {outcomes.not_reached} |")
    lines += ["", *[f"* failed: `{test}`" for outcomes in report.tests.values() for test in outcomes.failed]]
    return "\n".join(lines).rstrip()


def _unproven(report: Report) -> list[str]:
    reasons = report.reasons()
    if not reasons:
        return []
    said = "No test of this run proves what follows, or one failed: numbers to look for the fault with, none to quote."
    tables = [block.replace("\n## ", "\n### ") for block in _measured(report.proven(False)) if block]
    tables = [f"#{block}" if block.startswith("## ") else block for block in tables]
    return ["\n".join(["## Unproven", "", said, "", *[f"* {reason}" for reason in reasons]]), *tables]


def _op(op: str, cases: dict[str, dict[str, Row]]) -> str:
    lines = [f"## {op}", ""]
    lines += ["| case | provider | warm | cold | p20 to p80 | host | end to end | floor | share | against ours |"]
    lines += ["|---|---|---|---|---|---|---|---|---|---|"]
    for case, rows in cases.items():
        ours = rows[OURS]
        for name, row in rows.items():
            times = row.times
            provider = name if times.timing == "graph" else f"{name} (calls)"
            lines.append(
                f"| {case} | {provider} | {_time(row, 'warm')} | {_time(row, 'cold')} | {row.quantiles.p20:.2f} to "
                f"{row.quantiles.p80:.2f} | {times.host_us:.1f} | {times.end_to_end_us:.1f} | {_floor(row)} | "
                f"{row.share_of_floor:.0%} | {row.median_us / ours.median_us:.2f}x |"
            )
    goals = [(case, goal) for case, rows in cases.items() for goal in rows[OURS].goals]
    if goals:
        lines += ["", "| case | goal | measured | met |", "|---|---|---|---|"]
        lines += [
            f"| {case} | {goal.text} | {goal.value:.3g} | {'yes' if goal.met else 'no'} |" for case, goal in goals
        ]
    return "\n".join(lines)


def _time(row: Row, kind: str) -> str:
    value: Quantiles | None = getattr(row.times, kind)
    if value is None:
        return ""
    return f"**{value.median:.2f}**" if value is row.quantiles else f"{value.median:.2f}"


def _floor(row: Row) -> str:
    if row.floor_us != row.floor_us:
        return ""
    return f"{row.floor_us:.2f} {'bytes' if row.memory_us >= row.compute_us else 'FLOPs'}"


def _models(rows: Sequence[ModelRow]) -> str:
    if not rows:
        return ""
    lines = [
        "## Whole early-exit BERT-base against the best full model",
        "",
        "Random weights, imposed exit pattern. The ratio is wall-clock speed-up over FLOPs speed-up (fastbert "
        "convention); the goal at batch 32 and more is 0.8, for streams 0.9. `stream` gets its rows as lists of token "
        "numbers, `stream_batches` as the other engines do; both run a layer on as many tokens as a batch has, with "
        "long runs on 16,384. Their ms are for as many rows as a batch has.",
        "",
        "| batch | average layers | engine | ms a batch | p20 to p80 | best full model | ms a batch | speed-up | FLOPs "
        "| ratio | goal met |",
        "|---|---|---|---|---|---|---|---|---|---|---|",
    ]
    for row in rows:
        batches = row.rows / row.batch_size
        ms, p20, p80, full = (
            seconds / batches * 1e3 for seconds in (row.seconds, row.p20_seconds, row.p80_seconds, row.full_seconds)
        )
        met = "" if row.goal is None else "yes" if row.ratio >= row.goal else "no"
        lines.append(
            f"| {row.batch_size} | {row.average_layers:.2f} | {row.engine} | {ms:.3f} | {p20:.3f} to {p80:.3f} | "
            f"{row.full_engine} | {full:.3f} | {row.speedup:.2f}x | {row.flops_speedup:.2f}x | {row.ratio:.2f} | "
            f"{met} |"
        )
    return "\n".join(lines)


def _sweeps(rows: Sequence[SweepRow]) -> str:
    if not rows:
        return ""
    lines = [
        "## Launch configurations",
        "",
        "| op | case | fastest | us | chosen, us | gain |",
        "|---|---|---|---|---|---|",
    ]
    for (op, case), (best, chosen) in best_of_sweep(rows).items():
        usual = "" if chosen is None else f"{chosen.median_us:.2f}"
        gain = "" if chosen is None else f"{chosen.median_us / best.median_us:.2f}x"
        lines.append(f"| {op} | {case} | {best.config} | {best.median_us:.2f} | {usual} | {gain} |")
    return "\n".join(lines)


def _steps(report: Report) -> str:
    lines = [
        "## Steps",
        "",
        "| step | status | s | estimate | CPU-s | estimate | note |",
        "|---|---|---|---|---|---|---|",
    ]
    for step in report.steps:
        estimates = ["" if value is None else f"{value:.0f}" for value in (step.estimate, step.cpu_estimate)]
        lines.append(
            f"| {step.name} | {step.status} | {step.seconds:.0f} | {estimates[0]} | {step.cpu_seconds:.0f} | "
            f"{estimates[1]} | {step.note} |"
        )
    return "\n".join(lines)


def _problems(report: Report) -> str:
    return "\n".join(["## Problems", "", *[f"* {problem}" for problem in report.problems]]) if report.problems else ""


def plot(report: Report, folder: Path, stem: str) -> list[str]:
    """One picture of all ops and one of the models; names of the files, fewer where there is nothing to draw."""
    import matplotlib

    matplotlib.use("Agg")
    names = []
    if report.proven().rows:
        names.append(_plot_ops(report, folder / f"{stem}-ops.png"))
    if report.proven().models:
        names.append(_plot_models(report, folder / f"{stem}-models.png"))
    return names


def _title(report: Report, text: str) -> str:
    place = "rehearsal, no GPU" if report.rehearsal else str(report.environment.get("device", ""))
    return f"{text} ({place})"


def _plot_ops(report: Report, path: Path) -> str:
    from matplotlib import pyplot

    grouped = by_case(report.proven().rows)
    ops = list(dict.fromkeys(op for op, _ in grouped))
    figure, axes = pyplot.subplots(len(ops), 1, figsize=(11, 3.2 * len(ops)), squeeze=False, layout="constrained")
    for op, axis in zip(ops, axes[:, 0], strict=True):
        cases = {case: rows for (of, case), rows in grouped.items() if of == op}
        for provider in dict.fromkeys(name for rows in cases.values() for name in rows):
            points = [(case, rows[provider].median_us) for case, rows in cases.items() if provider in rows]
            style = {"linewidth": 2.5, "color": "black"} if provider == OURS else {"linewidth": 1}
            axis.plot([case for case, _ in points], [us for _, us in points], marker="o", label=provider, **style)
        floors = [rows[OURS].floor_us for rows in cases.values()]
        axis.plot(list(cases), floors, linestyle=":", color="grey", label="floor")
        axis.set(yscale="log", ylabel="us a call", title=_title(report, op))
        axis.tick_params(axis="x", labelrotation=20, labelsize=7)
        axis.legend(fontsize=7, ncols=3)
    figure.savefig(path, dpi=110)
    pyplot.close(figure)
    return path.name


def _plot_models(report: Report, path: Path) -> str:
    from matplotlib import pyplot

    rows = report.proven().models
    figure, axis = pyplot.subplots(figsize=(8, 4.5), layout="constrained")
    for depth in dict.fromkeys(round(row.average_layers, 1) for row in rows):
        of_depth = [row for row in rows if round(row.average_layers, 1) == depth]
        for engine in dict.fromkeys(row.engine for row in of_depth):
            points = [row for row in of_depth if row.engine == engine]
            label = f"{engine}, {depth:.1f} layers"
            axis.plot([str(row.batch_size) for row in points], [row.speedup for row in points], marker="o", label=label)
        sizes = dict.fromkeys(str(row.batch_size) for row in of_depth)
        flops = of_depth[-1].flops_speedup
        axis.plot(list(sizes), [flops] * len(sizes), linestyle=":", label=f"FLOPs, {depth:.1f} layers")
    axis.set(xlabel="batch size", ylabel="speed-up over the best full model", title=_title(report, "Early-exit BERT"))
    axis.set_ylim(bottom=0)
    axis.legend(fontsize=8)
    figure.savefig(path, dpi=110)
    pyplot.close(figure)
    return path.name
