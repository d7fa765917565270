"""What a command shows where standard error is a file: lines that tell how far it is."""

from __future__ import annotations

import time
import warnings

import pytest

from fastkd.commands import screen
from fastkd.data.text_counts import TextWarning


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
