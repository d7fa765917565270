"""This tree beside another commit: which seconds are refused, what is unpacked, and that both trees take turns."""

from __future__ import annotations

import subprocess
from pathlib import Path
from typing import ClassVar

import bench_base
import pytest

ROWS = [("good", 1), ("bad", 3), ("good", 2), ("bad", 1)]


def test_a_speed_whose_proof_fails_has_no_seconds() -> None:
    assert bench_base.reason_to_refuse(ROWS, ROWS) is None
    moved = [*ROWS[:3], ("bad", 2)]
    assert bench_base.reason_to_refuse(moved, ROWS) == (
        "25.0% of its rows are not those of the reference, at most 0.5% may differ"
    )
    assert bench_base.reason_to_refuse(ROWS[:3], ROWS) is not None
    # one row that lies on the speed
    many = ROWS * 100
    assert bench_base.reason_to_refuse([("bad", 1), *many[1:]], many) is None


def test_a_table_shows_reasons_in_the_place_of_refused_seconds() -> None:
    fine = bench_base.Comparison(0.3, {"here": 1.0, "base": 1.5}, 1.5, 1.0, {})
    wrong = bench_base.Comparison(0.5, {"here": None, "base": None}, None, None, {"base": "25.0% of its rows"})
    lines = bench_base.table([fine, wrong], "main").splitlines()
    assert lines[2] == "| 0.3 | 1.000 | 1.500 | 1.50x | 100.00% |"
    assert lines[3] == "| 0.5 | refused | refused | main: 25.0% of its rows | |"


class FakeTree:
    """Answers as a process would; the base is twice as slow, and wrong at speed 0.5."""

    asked: ClassVar[list[tuple[str, str]]] = []

    def __init__(self, folder: Path, arguments: list[str]) -> None:
        self.name = folder.name

    def __enter__(self) -> FakeTree:
        return self

    def __exit__(self, *_: object) -> None: ...

    def ask(self, do: str, speed: float) -> dict[str, object]:
        self.asked.append((do, self.name))
        if do == "time":
            return {"seconds": 2.0 if self.name == "base" else 1.0}
        is_wrong = self.name == "base" and speed == 0.5
        return {"answers": ROWS[:1] if is_wrong else ROWS, "reference": ROWS}


def test_trees_take_turns_and_only_proved_speeds_are_timed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bench_base, "Tree", FakeTree)
    FakeTree.asked.clear()
    proved, refused = bench_base.compare({"here": Path("here"), "base": Path("base")}, [], [0.0, 0.5], repeats=2)
    assert proved.ratio == 2.0
    assert proved.seconds == {"here": 1.0, "base": 2.0}
    assert proved.same_answers == 1.0
    assert refused.seconds == {"here": None, "base": None}
    assert list(refused.refused) == ["base"]
    timed = [name for do, name in FakeTree.asked if do == "time"]
    assert timed == ["base", "here", "here", "base"]


def test_a_commit_is_unpacked_with_a_library(tmp_path: Path) -> None:
    if subprocess.run(["git", "rev-parse", "HEAD"], cwd=bench_base.ROOT, capture_output=True).returncode:
        pytest.skip("this is no git checkout")
    changed = subprocess.run(
        ["git", "diff", "--quiet", "HEAD", "--", "csrc", "setup.py"], cwd=bench_base.ROOT
    ).returncode
    if changed:
        pytest.skip("csrc is being changed, so that unpacking would build")
    bench_base.unpack("HEAD", tmp_path)
    assert (tmp_path / "python" / "fastkd" / "__init__.py").exists()
    built = {path.name for path in (bench_base.ROOT / "fastkd_kernels").glob("_C*.so")}
    assert {path.name for path in (tmp_path / "fastkd_kernels").glob("_C*.so")} == built


def test_an_unknown_commit_is_named(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="base: git knows no 'nowhere'"):
        bench_base.unpack("nowhere", tmp_path)
