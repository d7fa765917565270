"""What a command shows: lines where standard error is a file, and tables."""

from __future__ import annotations

import time
import warnings

import pytest

from fastkd.commands import screen
from fastkd.data.text_counts import TextWarning
from fastkd.exits.sweep import Sweep, SweepRow


def test_lines_tell_rate_and_time_left() -> None:
    now = 100.0
    lines = screen.ProgressLines("tracing", None, clock=lambda: now)
    now += 20
    assert lines.line() == "tracing: 20 s so far"
    lines.update(40, "", 1240)
    now += 20
    lines.update(80)
    assert lines.line() == "tracing: 80 of 1240, 2 per second, 9 min 40 s left"
    lines.update(2, "other work", 10)
    now += 2
    lines.update(4)
    assert lines.line() == "other work: 4 of 10, 1 per second, 6 s left"


def test_a_line_comes_every_few_seconds_also_while_one_step_is_long(
    capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(screen, "SECONDS_A_LINE", 0.02)
    shown = screen.Screen(False)
    with shown.progress("rows answered", None) as update:
        update(3)
        deadline = time.monotonic() + 20
        said = ""
        while said.count("rows answered: 3") < 3 and time.monotonic() < deadline:
            time.sleep(0.02)
            said += capfd.readouterr().err
    assert said.count("rows answered: 3") >= 3


def test_what_does_not_fit_between_texts_and_tokenizer_is_told_once(capfd: pytest.CaptureFixture[str]) -> None:
    with screen.screen_for(False):
        for _ in range(3):
            warnings.warn("rows: [3] cannot be read", TextWarning, stacklevel=1)
    assert capfd.readouterr().err == "warning: rows: [3] cannot be read\n"


def test_a_deep_model_leaves_room_for_every_number() -> None:
    for layers, is_shown in ((12, True), (24, False)):
        costs = {"fastbert": 1e9}, {"fastbert": 2.0}
        row = SweepRow(0.5, 0.9, 1.0, [1000] * layers, *costs)
        table = screen.sweep_table(Sweep([row], "entropy", None, 64), "name")
        headings = [str(column.header) for column in table.columns]
        assert (f"left after layer 1..{layers}" in headings) == is_shown
        assert len(headings) == 5 + is_shown
