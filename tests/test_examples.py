"""Every script in examples/ runs and prints what it did."""

from __future__ import annotations

import importlib
import re
import sys
from pathlib import Path

import pytest

pytest.importorskip("datasets", reason="datasets is not installed: pip install datasets")

from tiny_models import one_thread  # noqa: F401  # a fixture

FOLDER = Path(__file__).parents[1] / "examples"
# of each script, what it must have printed
PRINTS = {
    "early_exit": r"fine-tuned: accuracy [6-9]\d\.\d%\n.*speed 0\.0: .*, 3\.00 layers a row\n.*after layer [1-3] of 3",
    "data_frame": r"speed \d\.\d+ changes \d+ of \d+ answers\n.*topic.*layer",
    "small_student": r"teacher, 3 layers.*none: accuracy.*kd: accuracy.*universal-cg: accuracy",
    "language_model": r"step 0: divergence from the teacher \d\.\d+\n.*step 20: divergence",
    "your_own_loop": r"layer 1: \d+ rows leave, \d+ go on\n.*layer 4: the other \d+ rows.*answers: \[",
}


def test_every_script_is_listed_and_tested() -> None:
    scripts = {path.stem for path in FOLDER.glob("*.py")} - {"made_up"}
    assert scripts == set(PRINTS)
    listed = re.findall(r"^\| `(\w+)\.py` \|", (FOLDER / "README.md").read_text(encoding="utf-8"), re.MULTILINE)
    assert set(listed) == scripts


@pytest.mark.slow
@pytest.mark.parametrize("name", PRINTS)
def test_a_script_runs_and_says_what_it_did(
    name: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    if name == "data_frame":
        pytest.importorskip("pandas", reason="pandas is not installed: pip install pandas")
    monkeypatch.syspath_prepend(str(FOLDER))
    monkeypatch.setattr(sys, "argv", [f"{name}.py"])
    importlib.import_module(name).main()
    assert re.search(PRINTS[name], capsys.readouterr().out, re.DOTALL)
