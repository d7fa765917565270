"""Several processes of one training: the first works, all fail together, and one of them says why."""

from __future__ import annotations

from pathlib import Path

import pytest

pytest.importorskip("datasets", reason="datasets is not installed: pip install datasets")

from training_worker import torchrun

from fastkd.training.processes import by_first

SCRIPT = """
import os, sys, time
from pathlib import Path
from accelerate import PartialState
from fastkd.commands.screen import screen_for
from fastkd.training.processes import by_first

folder, rank = Path(sys.argv[1]), os.environ["RANK"]
PartialState(cpu=True)

class Unsendable(Exception):
    def __init__(self, first, second):
        super().__init__(f"{first} {second}")

def fail(error):
    raise error

for number, error in enumerate([FileExistsError("output_dir: it is there"), Unsendable("no", "room")]):
    try:
        by_first(lambda: fail(error))
    except Exception as caught:
        (folder / f"failed-{number}-{rank}").write_text(f"{type(caught).__name__}: {caught}")
given = by_first(lambda: (folder / f"worked-{rank}").write_text("four"))
assert given == (4 if rank == "0" else None), given

with screen_for(as_json=False) as screen:
    screen.say("working")
    screen.out.print("a result")
    if rank == "1":
        raise ValueError("rows: there is nothing in them")
    time.sleep(120)
"""


@pytest.mark.slow
def test_all_fail_and_one_speaks(tmp_path: Path) -> None:
    script = tmp_path / "script.py"
    script.write_text(SCRIPT)
    finished = torchrun(script, tmp_path)
    shown = finished.stdout + finished.stderr
    # what the first process raised is raised in both
    found = {path.name: path.read_text() for path in tmp_path.glob("failed-*")}
    assert found == {
        "failed-0-0": "FileExistsError: output_dir: it is there",
        "failed-0-1": "FileExistsError: output_dir: it is there",
        "failed-1-0": "Unsendable: no room",
        "failed-1-1": "RuntimeError: Unsendable: no room",
    }, shown
    assert [path.name for path in tmp_path.glob("worked-*")] == ["worked-0"]
    # the second process fails alone: it says why, and the first, which is ended for it, says nothing
    assert finished.returncode != 0
    assert shown.count("error: rows: there is nothing in them") == 1
    assert "terminated;" not in shown
    assert (shown.count("working"), shown.count("a result")) == (1, 1)


def test_one_process_works_by_itself() -> None:
    assert by_first(lambda: 3) == 3
    with pytest.raises(KeyError, match="own"):
        by_first(lambda: {}["own"])
