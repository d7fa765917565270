"""Draws the figures of the documentation: `python docs/figures/draw.py` writes the SVG files beside this one.

They are plain SVG without scripts or fonts of their own, and follow the reader's light or dark scheme.
"""

from __future__ import annotations

import ast
import json
import re
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any
from xml.sax.saxutils import escape

REPOSITORY = Path(__file__).parents[2]
RESULTS = REPOSITORY / "bench" / "results"
STYLE = """
svg { --page: #ffffff; --ink: #1f2328; --soft: #57606a; --line: #8c959f; --fill: #eaeef2;
      --blue: #0072b2; --orange: #b34e00; --green: #00704f; --blue-fill: #d6e8f5; --orange-fill: #fbe3d1; }
@media (prefers-color-scheme: dark) {
  svg { --page: #1e2129; --ink: #e6edf3; --soft: #9da7b1; --line: #6e7681; --fill: #2d333b;
        --blue: #6cb6ff; --orange: #f0883e; --green: #4cc38a; --blue-fill: #16324f; --orange-fill: #4d2d14; } }
text { font: 14px system-ui, sans-serif; fill: var(--ink); }
.page { fill: var(--page); }
.soft { fill: var(--soft); } .small { font-size: 12px; } .bold { font-weight: 600; }
.blue { fill: var(--blue); } .orange { fill: var(--orange); } .green { fill: var(--green); }
.middle { text-anchor: middle; } .end { text-anchor: end; }
.box { fill: var(--fill); stroke: var(--line); } .bluebox { fill: var(--blue-fill); stroke: var(--blue); }
.orangebox { fill: var(--orange-fill); stroke: var(--orange); } .nobox { fill: none; stroke: var(--line); }
.gone { fill: none; stroke: var(--line); stroke-dasharray: 3 3; }
.arrow { stroke: var(--line); stroke-width: 1.5; fill: none; marker-end: url(#tip); }
.rule { stroke: var(--line); stroke-width: 1; fill: none; }
.curve { stroke-width: 2; fill: none; } .stroke-blue { stroke: var(--blue); } .stroke-orange { stroke: var(--orange); }
.stroke-green { stroke: var(--green); } .dashed { stroke-dasharray: 5 4; }
"""
TIP = (
    '<marker id="tip" viewBox="0 0 8 8" refX="7" refY="4" markerWidth="7" markerHeight="7" orient="auto">'
    '<path d="M0 0 L8 4 L0 8 z" style="fill: var(--line)"/></marker>'
)


class Drawing:
    """Shapes in the order of drawing; coordinates are pixels from the top left."""

    def __init__(self, width: int, height: int, title: str) -> None:
        self.width, self.height, self.title = width, height, title
        self.parts: list[str] = []

    def text(self, x: float, y: float, text: str, style: str = "") -> None:
        self.parts.append(f'<text x="{x:g}" y="{y:g}" class="{style}">{escape(text)}</text>')

    def box(self, x: float, y: float, width: float, height: float, style: str = "box", label: str = "") -> None:
        self.parts.append(f'<rect x="{x:g}" y="{y:g}" width="{width:g}" height="{height:g}" rx="4" class="{style}"/>')
        lines = label.split("\n") if label else []
        for number, line in enumerate(lines):
            baseline = y + height / 2 + 5 + 17 * (number - (len(lines) - 1) / 2)
            self.text(x + width / 2, baseline, line, "middle" if number == 0 else "middle small soft")

    def path(self, points: Sequence[tuple[float, float]], style: str = "arrow") -> None:
        steps = " L".join(f"{x:g} {y:g}" for x, y in points)
        self.parts.append(f'<path d="M{steps}" class="{style}"/>')

    def dot(self, x: float, y: float, style: str) -> None:
        self.parts.append(f'<circle cx="{x:g}" cy="{y:g}" r="4" class="{style}"/>')

    def svg(self) -> str:
        return (
            f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {self.width} {self.height}" role="img" '
            f'width="{self.width}" height="{self.height}"><title>{escape(self.title)}</title><style>{STYLE}</style>'
            f"<defs>{TIP}</defs>\n"
            # a ground of its own, because a page may be dark where the reader's system is light
            f'<rect width="{self.width}" height="{self.height}" rx="6" class="page"/>\n'
            + "\n".join(self.parts)
            + "\n</svg>\n"
        )


def early_exit() -> Drawing:
    """A batch that shrinks from layer to layer."""
    drawing = Drawing(760, 330, "A batch of eight sentences that shrinks from layer to layer")
    leaves_after = [1, 3, 1, 1, 2, 6, 2, 1]
    columns, left, top, size = 6, 150, 60, 24
    for row, last in enumerate(leaves_after):
        drawing.text(left - 12, top + row * (size + 5) + 17, f"sentence {row + 1}", "end soft small")
        for layer in range(columns):
            x = left + layer * 95
            if layer < last:
                drawing.box(x, top + row * (size + 5), 56, size, "orangebox" if layer + 1 == last else "bluebox")
            else:
                drawing.box(x, top + row * (size + 5), 56, size, "gone")
    for layer in range(columns):
        x = left + layer * 95
        drawing.text(x + 28, 28, f"layer {layer + 1}", "middle bold")
        running = sum(last > layer for last in leaves_after)
        drawing.text(x + 28, 46, f"{running} row{'s' if running > 1 else ''}", "middle small soft")
    drawing.box(left, 302, 18, 14, "bluebox")
    drawing.text(left + 26, 314, "goes on", "small")
    drawing.box(left + 105, 302, 18, 14, "orangebox")
    drawing.text(left + 131, 314, "certain: its head answers and it leaves", "small")
    drawing.box(left + 400, 302, 18, 14, "gone")
    drawing.text(left + 426, 314, "not computed", "small")
    return drawing


def exit_gate() -> Drawing:
    """From logits to survivors."""
    drawing = Drawing(760, 320, "The exit gate: logits in, uncertainty, survivors, count and record out")
    values = [0.12, 0.81, 0.34, 0.05, 0.66, 0.48, 0.93, 0.22]
    top, step = 52, 29
    drawing.text(20, 30, "logits [B, C]", "bold")
    drawing.text(180, 30, "uncertainty [B]", "bold")
    for row, value in enumerate(values):
        y = top + row * step
        stays = value > 0.5
        drawing.box(20, y, 96, 22, "box")
        drawing.text(68, y + 16, f"row {row}", "middle small")
        drawing.box(180, y, 200 * value, 22, "bluebox" if stays else "orangebox")
        drawing.text(188 + 200 * value, y + 16, f"{value:.2f}", "small soft")
    drawing.path([(124, 160), (168, 160)])
    drawing.text(147, 150, "softmax", "middle small soft")
    drawing.path([(280, 42), (280, top + 8 * step)], "rule dashed")
    drawing.text(280, top + 8 * step + 18, "speed 0.5", "middle small")
    drawing.path([(440, 110), (480, 110)])
    drawing.path([(440, 220), (480, 220)])
    drawing.text(490, 64, "stay: survivors, ascending", "blue bold")
    for number, row in enumerate(row for row, value in enumerate(values) if value > 0.5):
        drawing.box(490 + 46 * number, 92, 40, 34, "bluebox", str(row))
    drawing.text(640, 114, "count = 3")
    drawing.text(490, 146, "on the device: no wait", "small soft")
    drawing.text(490, 186, "leave: into the record, at row_ids", "orange bold")
    for number, row in enumerate(row for row, value in enumerate(values) if value <= 0.5):
        drawing.box(490 + 46 * number, 204, 40, 34, "orangebox", str(row))
    drawing.text(490, 258, "logits, uncertainty and exit layer", "small soft")
    drawing.text(490, 292, "One launch, or one call on a CPU.", "small")
    return drawing


def student_head() -> Drawing:
    """The head as FastBERT writes it, and folded."""
    drawing = Drawing(760, 430, "FastBERT's head as it is written, and folded for its one query")
    for x, title, cost in ((30, "as written", "50.4 million operations"), (420, "folded", "25.5 million operations")):
        drawing.text(x + 150, 24, title, "middle bold")
        drawing.text(x + 150, 42, cost + ", 128 tokens", "middle small soft")
    drawing.box(80, 58, 200, 40, "box", "hidden states\n[T, 768]")
    drawing.path([(180, 98), (180, 116)])
    drawing.box(80, 118, 200, 40, "box", "narrow, tanh\n[T, 128]")
    for number, name in enumerate(("query", "key", "value")):
        drawing.path([(180, 158), (85 + 95 * number, 182)])
        drawing.box(42 + 95 * number, 184, 86, 40, "orangebox", f"{name}\n[T, 128]")
        drawing.path([(85 + 95 * number, 224), (180, 248)])
    drawing.box(80, 250, 200, 40, "orangebox", "softmax(q k') v\n[T, T] and [T, 128]")
    drawing.path([(180, 290), (180, 306)])
    drawing.box(80, 308, 200, 40, "orangebox", "output projection\n[T, 128]")
    drawing.path([(180, 348), (180, 364)])
    drawing.box(80, 366, 200, 40, "box", "dense, tanh, classifier\ntoken 0 only, [C]")

    drawing.box(470, 58, 200, 40, "box", "hidden states\n[T, 768]")
    drawing.path([(570, 98), (570, 116)])
    drawing.box(470, 118, 200, 40, "box", "narrow, tanh, tile by tile\nnever written to memory")
    drawing.path([(570, 158), (570, 182)])
    drawing.box(470, 184, 200, 62, "bluebox", "s_t = (U a_0 + e) . a_t\none query, online softmax\nc = sum of p_t a_t")
    drawing.path([(570, 246), (570, 280)])
    drawing.box(470, 282, 200, 40, "bluebox", "tanh(M c + m)\n[128]")
    drawing.path([(570, 322), (570, 346)])
    last = "classifier, softmax, gate\n[C], and the batch is compacted\nby the last program to finish"
    drawing.box(470, 348, 200, 58, "box", last)
    drawing.path([(372, 60), (372, 405)], "rule dashed")
    return drawing


def compact() -> Drawing:
    """Rows of several tensors gathered in one launch."""
    drawing = Drawing(760, 290, "compact gathers the surviving rows of several tensors in one launch")
    survivors = [1, 4, 6]
    tensors = (("hidden states [B, T, H]", 190, 30), ("mask [B, T]", 90, 270), ("row ids [B]", 46, 410))
    for name, width, x in tensors:
        drawing.text(x, 26, name, "bold small")
        for row in range(8):
            stays = row in survivors
            drawing.box(x, 40 + row * 27, width, 22, "bluebox" if stays else "gone")
            drawing.text(x + width / 2, 56 + row * 27, f"row {row}" if width > 60 else str(row), "middle small soft")
    drawing.path([(478, 150), (538, 150)])
    drawing.text(508, 140, "one launch", "middle small soft")
    for width, x in ((100, 550), (46, 660), (30, 716)):
        for number, row in enumerate(survivors):
            drawing.box(x, 106 + number * 27, width, 22, "bluebox")
            drawing.text(x + width / 2, 122 + number * 27, str(row), "middle small")
    drawing.text(550, 96, "contiguous, in order", "small soft")
    drawing.text(550, 208, "rows past count are not touched", "small soft")
    return drawing


def packed() -> Drawing:
    """The padded and the packed layout of four sequences."""
    drawing = Drawing(760, 250, "Four sequences padded to the longest, and packed one behind the other")
    lengths, cell = [7, 3, 5, 2], 26
    drawing.text(30, 24, "padded: 28 tokens are computed", "bold small")
    for row, length in enumerate(lengths):
        for token in range(max(lengths)):
            style = ("bluebox" if row % 2 == 0 else "orangebox") if token < length else "gone"
            drawing.box(30 + token * (cell + 2), 36 + row * (cell + 4), cell, cell, style)
    drawing.text(300, 54, "dashed: padding, computed for nothing", "small soft")
    drawing.text(30, 184, "packed: 17 tokens, and cu_seqlens = 0, 7, 10, 15, 17", "bold small")
    x = 30
    for row, length in enumerate(lengths):
        for _ in range(length):
            drawing.box(x, 196, cell, cell, "bluebox" if row % 2 == 0 else "orangebox")
            x += cell + 2
        drawing.text(x - length * (cell + 2) / 2, 242, f"sequence {row + 1}", "middle small soft")
    return drawing


def stream() -> Drawing:
    """Survivors of several batches in one queue a layer."""
    drawing = Drawing(760, 300, "In the stream engine the survivors of several batches wait at their layer")
    drawing.text(30, 26, "input", "bold")
    for number in range(3):
        drawing.box(30, 44 + number * 70, 90, 48, "box", f"batch {number + 1}")
        drawing.path([(120, 68 + number * 70), (176, 138)])
    queues = ((180, "layer 1", 8, "full: runs"), (370, "layer 2", 5, "fills up"), (560, "layer 3", 2, "waits"))
    for x, name, waiting, state in queues:
        drawing.text(x + 50, 64, name, "middle bold")
        drawing.box(x, 78, 100, 120, "nobox")
        for slot in range(8):
            style = "bluebox" if slot < waiting else "gone"
            drawing.box(x + 8 + 44 * (slot % 2), 86 + 28 * (slot // 2), 40, 22, style)
        drawing.text(x + 50, 218, state, "middle small soft")
        drawing.path([(x + 100, 138), (x + 188, 138)])
        drawing.text(x + 144, 130, "stay", "middle small soft")
        drawing.path([(x + 50, 226), (x + 50, 252)])
    drawing.text(400, 274, "certain: answers, given in the order of the input", "middle orange bold small")
    return drawing


def stream_batches() -> Drawing:
    """The host settles a run and launches another one while the device is busy."""
    drawing = Drawing(760, 210, "While the device is busy with run 2, the host settles run 1 and launches run 3")
    left, unit = 84, 60
    host = (
        (0, "launch 1"), (1, "launch 2"), (3, "settle 1"), (4, "launch 3"),
        (6, "settle 2"), (7, "launch 4"), (9, "settle 3"), (10, "launch 5"),
    )  # fmt: skip
    runs = ((1, 2), (3, 3), (6, 3), (9, 2))
    drawing.text(left - 14, 64, "host", "end bold")
    drawing.text(left - 14, 140, "device", "end bold")
    for at, label in host:
        style = "orangebox" if label.startswith("settle") else "box"
        drawing.box(left + at * unit, 42, unit - 2, 36, style)
        drawing.text(left + at * unit + unit / 2 - 1, 64, label, "middle small")
    for at in (2, 5, 8):
        drawing.box(left + at * unit, 42, unit - 2, 36, "gone")
        drawing.text(left + at * unit + unit / 2 - 1, 64, "waits", "middle small soft")
    for number, (at, length) in enumerate(runs, start=1):
        drawing.box(left + at * unit, 118, length * unit - 2, 36, "bluebox", f"run {number}")
    for launched, begins in ((0, 1), (1, 3), (4, 6), (7, 9)):
        drawing.path([(left + launched * unit + unit / 2, 78), (left + begins * unit + 8, 116)])
    drawing.text(left, 24, "settle: read which rows stay, and queue them", "small soft")
    drawing.text(
        left, 184, "The device never waits to be told what stays; rows that stay in run 1 go on in run 3.", "small"
    )
    return drawing


def measured() -> Drawing:
    """Speed-up in FLOPs against seconds, AG News on two CPU cores, from the table of whole files in bench/results."""
    drawing = Drawing(760, 360, "AG News on two CPU cores: speed-up promised by FLOPs and measured in seconds")
    series = {engine: _promised_and_measured(engine) for engine in ("stream", "packed", "batch")}
    left, bottom, scale_x, scale_y = 70, 310, 95, 42

    def place(point: tuple[float, float]) -> tuple[float, float]:
        return left + point[0] * scale_x, bottom - point[1] * scale_y

    for tick in range(7):
        x, y = place((tick, tick))
        drawing.path([(left, y), (left + 6 * scale_x, y)], "rule" if tick == 0 else "rule dashed")
        drawing.text(left - 10, y + 5, f"{tick}x", "end small soft")
        drawing.text(x, bottom + 20, f"{tick}x", "middle small soft")
    drawing.path([place((0, 0)), place((6, 6))], "rule")
    drawing.text(*place((2.9, 4.3)), "as FLOPs promise", "small soft")
    for number, (name, points) in enumerate(series.items()):
        colour = ("blue", "orange", "green")[number]
        drawing.path([place(point) for point in points], f"curve stroke-{colour}")
        for point in points:
            drawing.dot(*place(point), colour)
        drawing.dot(664, 130 + 24 * number, colour)
        drawing.text(676, 135 + 24 * number, name)
    drawing.text(left + 3 * scale_x, 348, "speed-up in FLOPs (fastbert convention)", "middle small")
    drawing.text(left, 30, "speed-up in seconds over our best full model, bf16, speeds 0.1, 0.3, 0.5 and 0.8", "small")
    return drawing


def _promised_and_measured(engine: str) -> list[tuple[float, float]]:
    """Speed-ups of an engine in the first table of the run on whole files: in FLOPs, and over our best full model."""
    *_, newest = sorted(RESULTS.glob("cpu-end-to-end-*.txt"))
    table = newest.read_text(encoding="utf-8").split("OMP_NUM_THREADS=")[1]
    lines = [line.split() for line in table.splitlines() if re.match(rf" +\d+ +{engine} +0\.", line)]
    # rows a batch, engine, speed, rows a second, accuracy, layers, FLOPs, padded, sorted, best
    return [(float(cells[6]), float(cells[9])) for cells in lines]


_SHOWN = {
    ("transformers fp32", 0.0): "transformers, fp32",
    ("onnxruntime int8", 0.0): "ONNX Runtime, int8",
    ("openvino int8", 0.0): "OpenVINO, int8",
    ("fastkd bf16", 0.0): "fastkd, bf16, all layers",
    ("fastkd bf16", 0.3): "fastkd, bf16, speed 0.3",
    ("fastkd bf16", 0.5): "fastkd, bf16, speed 0.5",
    ("fastkd int8", 0.5): "fastkd, int8, speed 0.5",
}
_TITLES = {"ag_news": "AG News", "sst2": "SST-2"}


def speed() -> Drawing:
    """Milliseconds a row and accuracy of whole files, from the newest tables of the rivals."""
    results = [json.loads(path.read_text(encoding="utf-8")) for path in sorted(RESULTS.glob("cpu-rivals-*.json"))]
    step, head, width = 25, 52, 480
    drawing = Drawing(
        width, 20 + len(results) * (head + step * len(_SHOWN)),
        "Milliseconds a row and accuracy on two CPU cores: transformers, ONNX Runtime, OpenVINO and fastkd",
    )  # fmt: skip
    longest = max(row["ms_per_row"] for result in results for row in _file_rows(result).values())
    top = 0
    for result in results:
        rows = _file_rows(result)
        facts = result["machine"]
        drawing.text(16, top + 28, f"{_TITLES[facts['data']]}: milliseconds a row, accuracy", "bold")
        for number, (key, label) in enumerate(_SHOWN.items()):
            y = top + 40 + number * step
            row = rows[key]
            is_ours = key[0].startswith("fastkd")
            length = max(2.0, 150 * row["ms_per_row"] / longest)
            drawing.text(16, y + 15, label)
            drawing.box(192, y, length, 19, "bluebox" if is_ours else "orangebox")
            drawing.text(
                200 + length,
                y + 15,
                f"{row['ms_per_row']:.2f} ms, {row['accuracy']:.2%}",
                "bold" if is_ours else "soft",
            )
        top += head + step * len(_SHOWN)
    drawing.text(
        16,
        top + 8,
        f"{facts['rows']} rows a file, {facts['threads']} threads, {facts['processor']}, {facts['date']}",
        "small soft",
    )
    return drawing


def _file_rows(result: Mapping[str, Any]) -> dict[tuple[str, float], Mapping[str, Any]]:
    """What the picture shows of one file."""
    found = {(row["contestant"].split(",")[0], row["speed"]): row for row in result["rows"] if row["form"] == "file"}
    return {key: found[key] for key in _SHOWN}


def rooms() -> dict[str, list[str]]:
    """The table of rooms that tests/test_package.py holds the package to, from the ground up."""
    source = (REPOSITORY / "tests" / "test_package.py").read_text(encoding="utf-8")
    for node in ast.parse(source).body:
        if isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name) and node.target.id == "ROOMS":
            assert node.value is not None
            return ast.literal_eval(node.value)
    raise LookupError("tests/test_package.py has no table ROOMS")


def architecture() -> Drawing:
    """The rooms of the package fastkd, each above every room that it imports."""
    imports = rooms()
    floors: dict[str, int] = {}
    for room, others in imports.items():
        floors[room] = 1 + max((floors[other] for other in others), default=0)
    by_floor = [[room for room in imports if floors[room] == floor] for floor in range(1, max(floors.values()) + 1)]
    width, height, step = 112, 34, 62
    drawing = Drawing(760, len(by_floor) * step + 70, "The rooms of fastkd: an arrow points to a room that is imported")
    place = {}
    for number, floor in enumerate(by_floor):
        y = (len(by_floor) - number - 1) * step + 14
        for index, room in enumerate(floor):
            place[room] = (380 + (index - (len(floor) - 1) / 2) * 370, y)
    for room, others in imports.items():
        implied = {below for other in others for below in _everything_below(other, imports)}
        for other in [other for other in others if other not in implied]:
            (from_x, from_y), (to_x, to_y) = place[room], place[other]
            drawing.path([(from_x, from_y + height), (to_x, to_y - 2)])
    for room, (x, y) in place.items():
        drawing.box(x - width / 2, y, width, height, "bluebox", room)
    bottom = len(by_floor) * step + 14
    drawing.box(100, bottom, 560, height, "box", "fastkd_kernels, by its public names")
    drawing.text(380, bottom + height + 18, "arrows that follow from others are left out", "middle small soft")
    return drawing


def _everything_below(room: str, imports: dict[str, list[str]]) -> set[str]:
    return {below for other in imports[room] for below in {other, *_everything_below(other, imports)}}


FIGURES: dict[str, Callable[[], Drawing]] = {
    "speed": speed,
    "early_exit": early_exit,
    "exit_gate": exit_gate,
    "student_head": student_head,
    "compact": compact,
    "packed": packed,
    "stream": stream,
    "stream_batches": stream_batches,
    "measured": measured,
    "architecture": architecture,
}


def main(folder: Path) -> None:
    for name, draw in FIGURES.items():
        (folder / f"{name}.svg").write_text(draw().svg(), encoding="utf-8")


if __name__ == "__main__":
    main(Path(sys.argv[1]) if len(sys.argv) > 1 else Path(__file__).parent)
