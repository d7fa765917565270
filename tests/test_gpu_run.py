"""A run of the GPU report without a GPU: what it loses when something dies, hangs, is missing or takes too long."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import tarfile
import textwrap
import time
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import gpu_report
import pytest
from gpu import children, device, outcome_lines, plan, probe, render, store
from gpu.parts import Part, progress_of
from gpu.plan import MODES, ORDER, RESERVE, STEPS, Step
from gpu.proof import Proof
from gpu.records import OURS, Ceilings, Outcomes, Quantiles, Row, Times

ROOT = Path(__file__).parents[1]
CEILINGS = Ceilings(copy_bytes_per_s=4e12, matmul_flops_per_s=8e14, launch_us=1.5)
ONCE = Quantiles(4.0, 3.9, 4.1)
ROW = Row("compact", "[4]", OURS, Times("graph", ONCE, None, 7.0, 50.0), 1.0, 0.5, "warm")
FACTS = {"device": "NVIDIA H200", "cores": 16, "free_GiB": 139.0}


def run_in(folder: Path, steps: Sequence[str], facts: dict[str, Any] = FACTS, **options: Any) -> gpu_report.Run:
    missing = options.pop("missing", {})
    return gpu_report.Run(gpu_report.Options(folder, options.pop("budget", 60.0), steps, **options), facts, missing)


def statuses(run: gpu_report.Run) -> dict[str, str]:
    return {step.name: step.status for step in run.report.steps}


# Tests: workers that die

# in the place of torch: once `break_device` was called, every synchronisation raises, as after an illegal access
STAND_IN = """
import sys, types
dead = []
def synchronize():
    if dead:
        raise RuntimeError("CUDA error: an illegal memory access was encountered")
query = types.SimpleNamespace(query=lambda: True)
cuda = types.SimpleNamespace(is_initialized=lambda: True, synchronize=synchronize, current_stream=lambda: query)
sys.modules["torch"] = types.SimpleNamespace(cuda=cuda, break_device=lambda: dead.append(1))
"""
SUITE = """
import pytest
def test_good(): pass
def test_bad(): assert False
@pytest.mark.skip
def test_skipped(): pass
def test_nothing_spills(): assert False
@pytest.fixture
def broken(): raise RuntimeError
def test_error(broken): pass
"""


def proof_of(folder: Path, suite: dict[str, str], count: int = 1, seconds_a_test: float = 60.0) -> Proof:
    for name, text in suite.items():
        (folder / f"{name}.py").write_text(textwrap.dedent(text))
    arguments = ["-c", "/dev/null", "-p", "no:cacheprovider", str(folder)]
    return Proof(arguments, folder / "outcomes", folder, count, {}, seconds_a_test)


def run_tests(
    folder: Path, suite: dict[str, str], count: int = 1, seconds_a_test: float = 60.0
) -> tuple[Proof, tuple[str, str], dict[str, Outcomes]]:
    tests = proof_of(folder, suite, count, seconds_a_test)
    tests.start()
    ended = tests.wait(time.monotonic() + 170)
    return tests, ended, outcome_lines.read(tests.folder)


def test_outcomes_are_written_as_they_come(tmp_path: Path) -> None:
    suite = {
        "test_later": SUITE,
        "test_exit_gate": "def test_first(): pass",
        "test_absent": "import a_package_that_is_not_there",
    }
    tests, ended, found = run_tests(tmp_path, suite)
    assert (ended, tests.problems) == (("done", ""), []), "a test that fails is an outcome, no problem of the run"
    assert found["test_exit_gate"] == Outcomes(passed=1)
    assert found["test_later"] == Outcomes(1, ("test_later::test_bad", "test_later::test_error"), 1)
    assert found["test_later, machine code"].failed == ("test_later, machine code::test_nothing_spills",)
    assert found["test_absent"].failed == ("test_absent::its collection",)
    ran = [line["file"] for line in outcome_lines.lines_of(tests.folder) if "outcome" in line]
    assert ran.index("test_exit_gate") < ran.index("test_later"), "what proves the rows runs first"


def test_outcomes_of_a_worker_that_was_stopped_in_a_line(tmp_path: Path) -> None:
    (tmp_path / "outcomes-0.jsonl").write_text(
        '{"file": "test_compact", "collected": 5}\n{"file": "test_compact", "test": "a", "outcome": "passed"}\n'
        '{"file": "test_compact", "test": "torn'
    )
    assert outcome_lines.read(tmp_path) == {"test_compact": Outcomes(passed=1, not_reached=4)}
    store.append_line(tmp_path / "outcomes-0.jsonl", {"file": "test_compact", "test": "b", "outcome": "failed"})
    assert outcome_lines.read(tmp_path)["test_compact"].failed == ("test_compact::b",), "a torn line costs itself"
    assert outcome_lines.read(tmp_path / "missing") == {}


def test_workers_share_the_tests(tmp_path: Path) -> None:
    tests_of_file = "import pytest\n@pytest.mark.parametrize('n', range(40))\ndef test_it(n): pass\n"
    suite = {f"test_{name}": tests_of_file for name in "abc"}
    tests, ended, found = run_tests(tmp_path, suite, count=3)
    assert ended == ("done", "")
    assert found == {name: Outcomes(passed=40) for name in suite}
    begun = Counter(line["begun"] for line in outcome_lines.lines_of(tests.folder) if "begun" in line)
    assert set(begun.values()) == {1}, "none runs twice"


def test_machine_code_for_other_gpus_costs_no_time_of_this_one(tmp_path: Path) -> None:
    suite = {
        "cubins": "def compile_kernels(specs): raise AssertionError('minutes')",
        "conftest": "import pathlib, sys; sys.path.insert(0, str(pathlib.Path(__file__).parent)); import cubins",
        "test_it": "from cubins import compile_kernels\ndef test_a(): compile_kernels([])\ndef test_b(): pass",
    }
    _, _, found = run_tests(tmp_path, suite)
    assert found == {"test_it": Outcomes(passed=1, skipped=1)}


KILLERS = {
    "raises": "torch.break_device(); torch.cuda.synchronize()",
    "passes": "torch.break_device()",
    "is killed": "os.kill(os.getpid(), signal.SIGKILL)",
    "crashes": "os.abort()",
    "hangs": "time.sleep(100)",
    "ends the process": "os._exit(0)",
}


@pytest.mark.parametrize("killer", KILLERS)
def test_what_ends_a_worker_costs_one_test(killer: str, tmp_path: Path) -> None:
    """Eleven tests, the fifth of which leaves no device or no process behind."""
    suite = f"""
        import os, signal, sys, time
        import pytest
        torch = sys.modules["torch"]

        @pytest.fixture(scope="module")
        def costly():
            yield 1

        @pytest.mark.parametrize("n", range(11))
        def test_it(n, costly):
            torch.cuda.synchronize()
            if n == 4:
                {KILLERS[killer]}
    """
    tests, (status, _), found = run_tests(
        tmp_path, {"conftest": STAND_IN, "test_it": suite}, seconds_a_test=8.0 if killer == "hangs" else 60.0
    )
    assert found["test_it"] == Outcomes(passed=10, failed=("test_it::test_it[4]",))
    assert status == "failed"
    assert len(tests.problems) == 1
    assert "test_it[4]" in tests.problems[0]
    assert "started again behind it" in tests.problems[0]
    if killer in ("raises", "passes"):
        assert "it left a dead CUDA context" in tests.problems[0]
    if killer == "hangs":
        assert "it took more than 8 s" in tests.problems[0]


def test_a_worker_that_cannot_begin_is_given_up(tmp_path: Path) -> None:
    """No device comes back, say: the budget is not spent on starting again and again."""
    tests, (status, _), found = run_tests(tmp_path, {"conftest": "import os; os._exit(9)", "test_it": SUITE})
    assert (status, found) == ("failed", {})
    assert "not started again, it began no test before it ended" in tests.problems[0]


def test_tests_end_at_their_deadline_with_what_they_have(tmp_path: Path) -> None:
    suite = {"test_it": "import time\ndef test_a(): pass\ndef test_b(): time.sleep(300)\ndef test_c(): pass\n"}
    tests = proof_of(tmp_path, suite)
    tests.start()
    wait_for(lambda: "test_b" in "".join(line.get("begun", "") for line in outcome_lines.lines_of(tests.folder)))
    assert tests.wait(time.monotonic()) == ("timed out", "the outcomes so far count")
    assert outcome_lines.read(tests.folder) == {"test_it": Outcomes(passed=1, not_reached=2)}
    assert all(worker.child.code is not None for worker in tests.workers)


# Measuring: workers that die

# gpu.steps itself, on cases of one addition; the second has baselines that break the device, at once and later, and the
# third hangs while it is timed
TIMED = """
import os, sys, time
import torch
from gpu import cases, steps
from gpu.cases import Case
from gpu.records import OURS, Work
from gpu.timing import Provider

torch.cuda.is_initialized = lambda: True
torch.cuda.current_stream = lambda: type("Stream", (), {"query": lambda self: True})()
torch.cuda.empty_cache = lambda: None
dead = []
def synchronize():
    if dead:
        raise RuntimeError("CUDA error: an illegal memory access was encountered")
torch.cuda.synchronize = synchronize

def sticky(x):
    dead.append(1)
    raise RuntimeError("CUDA error: an illegal memory access was encountered")

def sticky_later(x):
    dead.append(1)
    return x + 1

calls = []
def hangs_later(x):
    calls.append(1)
    if len(calls) > 2:
        time.sleep(100)
    return x + 1

def check(result, x):
    assert result.equal(x + 1)

def case(name, ours=lambda x: x + 1, **others):
    providers = {OURS: Provider(ours), **{key: Provider(run) for key, run in others.items()}}
    return Case("compact", name, providers, lambda: (torch.zeros(4),), check, Work(32))

def all_cases(scale, device):
    yield case("first", eager=lambda x: x + 1)
    yield case("second", sticky=sticky, sticky_later=sticky_later, eager=lambda x: x + 1)
    yield case("third", hangs_later)
    yield case("fourth")

cases.ALL = {"compact": all_cases}
steps.main(sys.argv[1:])
"""


@pytest.mark.slow
def test_what_ends_a_timed_step_costs_one_case(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    script = tmp_path / "timed.py"
    script.write_text(TIMED)
    command = gpu_report.Run._work_command

    def of_script(self: gpu_report.Run, work: Sequence[str], part: Path, deadline: float) -> list[str]:
        asked = command(self, ["ops:compact"], part, deadline)
        return [sys.executable, str(script), *asked[3:]]

    monkeypatch.setattr(gpu_report.Run, "_work_command", of_script)
    # far above what a case takes on a machine that others use
    monkeypatch.setattr(gpu_report, "SECONDS_A_CASE", 20.0)
    monkeypatch.setattr(gpu_report, "STARTING", 200.0)
    run = run_in(tmp_path / "out", ["compaction"], budget=900.0, rehearse=True)
    run.go()
    found = run.found()
    assert [(row.case, row.provider) for row in found.rows] == [
        ("first", OURS),
        ("first", "eager"),
        ("second", OURS),
        ("second", "eager"),
        ("fourth", OURS),
    ], run.report.problems
    lost = [problem.split(": ", 1)[1] for problem in run.report.problems]
    assert len(lost) == 3, lost
    assert lost[0] == "lost compact second: sticky: it left a dead CUDA context"
    assert lost[1] == "lost compact second: sticky_later: it left a dead CUDA context"
    assert lost[2] == "lost compact third: nothing moved for 20 s"
    assert statuses(run) == {"compaction": "done"}


def test_a_step_that_cannot_begin_is_given_up(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    script = "import sys; sys.exit('no | device')"
    monkeypatch.setattr(gpu_report.Run, "_work_command", lambda *_: [sys.executable, "-c", script])
    run = run_in(tmp_path, ["ceilings", "compaction"], budget=100.0)
    run.go()
    assert statuses(run) == {"ceilings": "failed", "compaction": "failed"}
    assert run.report.problems == [
        f"{name}: its process ended with 1: no / device" for name in ("ceilings", "compaction")
    ]
    assert "no / device" in (tmp_path / f"{run.stem}.md").read_text()


def test_a_context_that_answers_is_alive(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse() -> None:
        raise RuntimeError("CUDA error: unspecified launch failure\nCompile with")

    cuda = SimpleNamespace(
        is_initialized=lambda: False, synchronize=refuse, current_stream=lambda: SimpleNamespace(query=lambda: True)
    )
    monkeypatch.setitem(sys.modules, "torch", SimpleNamespace(cuda=cuda))
    assert device.why_dead() is None, "where CUDA was not used nothing is waited for"
    cuda.is_initialized = lambda: True
    assert device.why_dead() == "RuntimeError: CUDA error: unspecified launch failure Compile with"
    cuda.synchronize = lambda: None
    assert device.why_dead() is None


# Results that survive

# a run of two steps: the first leaves a row, the second leaves another and does not end
LASTING = """
import sys, time
from pathlib import Path
import gpu_report
from gpu import store
from gpu.parts import Part, progress_of
from test_gpu_run import CEILINGS, ROW, run_in

def command(self, work, part, deadline):
    return [sys.executable, __file__, str(part)]

if sys.argv[1].endswith(".json"):
    path = Path(sys.argv[1])
    part = Part(path, CEILINGS)
    part.rows = [ROW]
    part.write()
    print("said by the step", flush=True)
    if path.stem == "compaction":
        store.append_line(progress_of(path), {"begun": "compact [5]", "at": time.monotonic()})
        time.sleep(300)
else:
    gpu_report.Run._work_command = command
    gpu_report.CHECKPOINT = 0.3
    run_in(Path(sys.argv[1]), ["ceilings", "compaction"], budget=250.0).go()
"""


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM], ids=["killed", "told to end"])
def test_what_was_found_is_on_disk_when_the_report_is_gone(number: signal.Signals, tmp_path: Path) -> None:
    """The machine is lost in the middle of the second step."""
    (tmp_path / "run.py").write_text(LASTING)
    out = tmp_path / "out"
    paths = os.pathsep.join([str(ROOT), str(ROOT / "python"), str(ROOT / "bench"), str(ROOT / "tests")])
    environment = {**os.environ, "PYTHONPATH": paths, "TMPDIR": str(tmp_path)}
    process = subprocess.Popen([sys.executable, str(tmp_path / "run.py"), str(out)], env=environment)
    try:
        wait_for(lambda: any(len(json.loads(path.read_text())["unproven"]["rows"]) == 2 for path in out.glob("*.json")))
        process.send_signal(number)
        process.wait(30)
    finally:
        process.kill()
    written = json.loads(next(out.glob("*.json")).read_text())
    assert [step["name"] for step in written["steps"]] == ["ceilings"]
    assert written["ceilings"]["launch_us"] == CEILINGS.launch_us
    assert len(written["unproven"]["rows"]) == 2, "the step that was running had left one"
    assert "## Unproven" in next(out.glob("*.md")).read_text()
    with tarfile.open(next(out.glob("*.tar.gz"))) as logs:
        assert {"ceilings.log", "ceilings.json", "compaction.json"} <= set(logs.getnames())
        log = logs.extractfile("ceilings.log")
        assert log is not None
        assert b"said by the step" in log.read()
    told = [problem for problem in written["problems"] if "the run was stopped: SIGTERM" in problem]
    assert len(told) == (number == signal.SIGTERM)
    wait_for(lambda: not running_with(str(tmp_path / "run.py")))


def wait_for(true: Callable[[], bool], seconds: float = 60.0) -> None:
    deadline = time.monotonic() + seconds
    while not true():
        assert time.monotonic() < deadline, "it did not happen in time"
        time.sleep(0.1)


def running_with(argument: str) -> bool:
    """Whether a process that was started with `argument` still uses the device."""
    for path in Path("/proc").glob("[0-9]*/cmdline"):
        try:
            if argument.encode() in path.read_bytes().split(b"\0"):
                return True
        except OSError:
            continue
    return False


def test_few_files_whole_after_every_step(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """At most eight files come back from a lent machine, none deeper than two folders."""
    seen: list[list[str]] = []
    write = gpu_report.Run.write

    def write_and_look(self: gpu_report.Run, pictures: bool = False) -> None:
        write(self, pictures)
        json.loads((tmp_path / f"{self.stem}.json").read_text())
        seen.append(sorted(path.name for path in tmp_path.rglob("*")))

    monkeypatch.setattr(gpu_report.Run, "write", write_and_look)
    monkeypatch.setattr(gpu_report.Run, "_how", lambda self, step: lambda step, deadline: ("done", ""))
    run = run_in(tmp_path, ["build", "ceilings"])
    run.report.problems += ["lost"]
    part = run.parts["ceilings"] = run.work / "ceilings.json"
    Part(part, CEILINGS, rows=[ROW]).write()
    run.test_folders = [run.work]
    (run.work / "outcomes-0.jsonl").write_text('{"file": "test_compact", "test": "a", "outcome": "passed"}\n')
    run.go()
    assert len(seen) == 3, "after each step and at the end"
    assert all(len(names) <= 8 for names in seen)
    assert [name.removeprefix(run.stem) for name in seen[-1]] == ["-logs.tar.gz", "-ops.png", ".json", ".md"]
    assert run.stem == f"all-nvidia-h200-{time.strftime('%Y-%m-%d')}"


def test_a_file_is_whole_or_the_old_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "x.json"
    store.write(path, "old")

    def full(descriptor: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(store.os, "fsync", full)
    with pytest.raises(OSError, match="No space left"):
        store.write(path, "new")
    assert path.read_text() == "old"


def test_a_full_disk_does_not_end_the_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def full(path: Path, content: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(gpu_report.Run, "_how", lambda self, step: lambda step, deadline: ("done", ""))
    run = run_in(tmp_path, ["build", "ceilings"])
    monkeypatch.setattr(store, "write", full)
    run.go()
    assert statuses(run) == {"build": "done", "ceilings": "done"}
    assert "No space left on device" in capsys.readouterr().err


def test_long_logs_are_shortened(tmp_path: Path) -> None:
    text = "a" * children.LOG_BYTES + "b" * children.LOG_BYTES
    short = children.shortened(text)
    assert len(short) < children.LOG_BYTES + 100
    assert (short[0], short[-1]) == ("a", "b")
    assert f"{children.LOG_BYTES} characters left out" in short


@pytest.mark.parametrize("case", ["--output", "OUT", "neither", "read-only checkout", "OUT is no folder"])
def test_where_results_go(case: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("OUT", raising=False)
    monkeypatch.setattr(store, "ROOT", tmp_path / "checkout")
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    monkeypatch.setattr(store.tempfile, "tempdir", None)
    if case in ("--output", "OUT"):
        monkeypatch.setenv("OUT", str(tmp_path / "out"))
    if case == "OUT is no folder":
        (tmp_path / "file").write_text("")
        monkeypatch.setenv("OUT", str(tmp_path / "file"))
    if case == "read-only checkout":
        monkeypatch.setattr(store, "ROOT", Path("/proc/nowhere"))
    folder, said = store.choose_folder(tmp_path / "asked" if case == "--output" else None, "2026-11-28")
    assert folder.is_dir(), "it is made where it is missing"
    assert list(folder.iterdir()) == []
    if case == "read-only checkout":
        assert folder.parent == tmp_path
        assert "/proc/nowhere" in said[0]
        assert said[1].startswith("RESULTS GO TO")
        return
    checkout = tmp_path / "checkout" / "bench" / "results" / "gpu-2026-11-28"
    expected = {"--output": tmp_path / "asked", "OUT": tmp_path / "out"}
    assert folder == expected.get(case, checkout)
    assert len(said) == (case == "OUT is no folder")


def test_an_output_that_cannot_be_written_is_refused(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(gpu_report, "ask", lambda deadline: (FACTS, {}))
    assert gpu_report.main(["--output", "/proc/nowhere"]) == 2
    assert "/proc/nowhere" in capsys.readouterr().err


def test_the_last_words_fit_where_files_do_not_come_back(tmp_path: Path) -> None:
    run = run_in(tmp_path, [])
    run.report.problems = [f"problem {number} {'x' * 500}" for number in range(100)]
    run.report.tests = {"test_compact": Outcomes(1, tuple(f"test_compact::test_{number}" for number in range(100)))}
    report = run.report
    report.rows, report.steps = [ROW], [gpu_report.StepResult("build", "done", 3.0)]
    said = render.summary(report)
    assert len(said) < 9_000
    assert "... and 80 more failed" in said
    assert said.splitlines()[-1].startswith("step build: done, 3 s")


# Order and budget


def test_the_order_of_a_first_call() -> None:
    names = [step.name for step in ORDER]
    first = ["build", "sanitizers", "early exit", "ceilings", "compaction", "gates and heads", "models"]
    assert names[: len(first)] == first == list(MODES["prove"].steps)
    assert STEPS["compaction"].work[0] == "sweep:compact", "it decides which copy is the default"
    assert STEPS["models"].work == ("models:large",)
    proofs = {"test_exit_gate", "test_student_head", "test_compact", "test_engine_graphs"}
    assert proofs <= set(STEPS["early exit"].tests)
    for mode in MODES.values():
        assert list(mode.steps) == [name for name in names if name in mode.steps], "every mode keeps the order"


def test_the_notes_have_the_estimates_of_the_steps() -> None:
    assert plan.table() in (ROOT / "NOTES-performance.md").read_text(encoding="utf-8")


def test_every_mode_has_a_budget_that_holds_what_it_is_for() -> None:
    assert (MODES["prove"].budget, MODES["measure"].budget) == (240, 450)
    assert MODES["all"].budget < 600
    for name, last in (("prove", "gates and heads"), ("measure", "rest")):
        steps = MODES[name].steps
        needed = sum(STEPS[step].seconds for step in steps[: steps.index(last) + 1])
        assert needed + RESERVE <= MODES[name].budget
    for step in ORDER:
        assert step.seconds > 0
        assert step.cpu_seconds > 0
        assert step.does


def test_what_proves_the_rows_of_a_step_runs_in_the_same_mode() -> None:
    from gpu.records import TESTS_OF_OP

    tested = {name for step in MODES["measure"].steps for name in STEPS[step].tests}
    assert {name for names in TESTS_OF_OP.values() for name in names} <= tested
    first = {name for step in MODES["prove"].steps for name in STEPS[step].tests}
    ops = ("compact", "compaction step", "exit_gate", "student_head_exit", "early exit")
    assert {name for op in ops for name in TESTS_OF_OP[op]} <= first


def test_a_step_that_does_not_fit_is_left_out_by_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    began: list[str] = []

    def how(self: gpu_report.Run, step: Step) -> Any:
        return lambda step, deadline: (began.append(step.name), ("done", ""))[1]

    monkeypatch.setattr(gpu_report.Run, "_how", how)
    run = run_in(tmp_path, ["ceilings", "models", "rest"], budget=RESERVE + 50)
    run.go()
    assert began == ["ceilings", "rest"], "a shorter one after it may fit"
    left_out = run.report.steps[1]
    assert (left_out.status, left_out.estimate, left_out.cpu_estimate) == ("left out", 90, 150)
    assert left_out.note == "it takes about 90 s, and 50 s of the budget are left"
    assert "| models | left out | 0 | 90 | 0 | 150 |" in (tmp_path / f"{run.stem}.md").read_text()


def test_no_step_may_overrun() -> None:
    step = Step("x", 20, 20, "x")
    assert plan.limit(step, 20 + RESERVE - 1) is None
    assert plan.limit(step, 25 + RESERVE) == 25, "what it gets ends before the budget does"
    assert plan.limit(step, 500) == 35


@pytest.mark.slow
def test_a_budget_is_kept_by_steps_that_hang(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Children that ignore being told to end, in a measuring step, a sanitizer and a test."""
    stubborn = "import signal, time; signal.signal(signal.SIGTERM, signal.SIG_IGN); time.sleep(300)"
    monkeypatch.setattr(gpu_report.Run, "_work_command", lambda *_: [sys.executable, "-c", stubborn])
    tool = tmp_path / "compute-sanitizer"
    tool.write_text(f"#!{sys.executable}\n{stubborn}\n")
    tool.chmod(0o755)
    monkeypatch.setattr(gpu_report.shutil, "which", lambda name, path=None: str(tool))
    steps = {name: Step(name, 2, 2, "x", STEPS[name].work, STEPS[name].tests) for name in STEPS}
    monkeypatch.setattr(gpu_report, "STEPS", steps)
    suite = tmp_path / "test_hangs.py"
    suite.write_text(f"def test_it():\n    exec({stubborn!r})\n")
    started = time.monotonic()
    run = run_in(
        tmp_path / "out", ["sanitizers", "early exit", "compaction", "models"], {**FACTS, "cores": 2}, budget=45.0,
        tests=["-c", "/dev/null", str(suite)],
    )  # fmt: skip
    run.go()
    assert time.monotonic() - started < 45
    assert [statuses(run)[name] for name in ("sanitizers", "early exit")] == ["timed out", "timed out"]
    assert set(statuses(run).values()) <= {"timed out", "failed", "left out"}
    assert all(child.code is not None for child in run.children)


def test_a_failing_step_costs_only_itself(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def how(self: gpu_report.Run, step: Step) -> Any:
        return (lambda step, deadline: 1 / 0) if step.name == "ceilings" else (lambda step, deadline: ("done", ""))

    monkeypatch.setattr(gpu_report.Run, "_how", how)
    run = run_in(tmp_path, ["ceilings", "rest"], budget=100.0)
    run.go()
    assert [(s.name, s.status, s.note) for s in run.report.steps] == [
        ("ceilings", "failed", "ZeroDivisionError: division by zero"),
        ("rest", "done", ""),
    ]


# Memory of the GPU


@pytest.mark.parametrize(("free", "cores"), [(139.0, 16), (22.5, 16), (22.5, 64), (14.5, 8), (7.0, 8), (139.0, 2)])
def test_workers_fit_the_free_memory(free: float, cores: int, tmp_path: Path) -> None:
    """A card of 24 GB passes: as many processes as it has room for."""
    run = run_in(tmp_path, [], {"device": "x", "cores": cores, "free_GiB": free})
    tests, compiling = run._test_workers(), run._warm_up_workers()
    used = tests * gpu_report.GIB_A_TEST_WORKER + compiling * gpu_report.GIB_A_WARM_UP
    assert used <= max(free, gpu_report.GIB_A_TEST_WORKER + gpu_report.GIB_A_WARM_UP)
    assert tests >= 1
    assert compiling >= 1
    assert tests + compiling <= max(cores, 2)
    if (free, cores) == (139.0, 16):
        assert (tests, compiling) == (12, 4)
    if (free, cores) == (22.5, 16):
        assert (tests, compiling) == (5, 2)


# Silly reasons to fail


def test_without_git_the_sources_have_a_fingerprint_all_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    def no_git(*_: Any, **__: Any) -> None:
        raise FileNotFoundError(2, "No such file or directory: 'git'")

    with_git = gpu_report.origin()
    monkeypatch.setattr(gpu_report.subprocess, "run", no_git)
    origin = gpu_report.origin()
    assert origin["commit"] == "unknown"
    assert origin["sources"] == with_git["sources"]
    assert len(origin["sources"]) == 12


def test_a_machine_that_does_not_answer_is_one_sentence(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    """PyTorch missing or broken: nothing here needs it before this is asked."""
    monkeypatch.setattr(probe, "MARK", "another mark: ")
    monkeypatch.setattr(children, "environment_of", lambda added: {"PYTHONPATH": str(tmp_path), "PATH": "/nowhere"})
    assert gpu_report.main(["--output", str(tmp_path)]) == 2
    said = capsys.readouterr().err
    assert said.count("\n") == 1
    assert "asking what this machine is failed: " in said
    assert list(tmp_path.iterdir()) == []


def test_the_report_itself_needs_no_package() -> None:
    """What a broken image lacks costs a step, not the report."""
    code = "import sys; sys.path.insert(0, 'bench'); import gpu_report; print([*sys.modules])"
    said = subprocess.run([sys.executable, "-S", "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    for package in ("torch", "numpy", "pytest", "matplotlib", "triton", "transformers", "fastkd_kernels"):
        assert f"'{package}'" not in said.stdout


def test_without_matplotlib_only_pictures_are_missing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    monkeypatch.setattr(gpu_report.Run, "_how", lambda self, step: lambda step, deadline: ("done", ""))
    run = run_in(tmp_path, ["build"])
    run.go()
    assert sorted(path.suffix for path in tmp_path.iterdir()) == [".gz", ".json", ".md"]
    assert "not all could be written" in capsys.readouterr().err


def test_without_pytest_everything_is_unproven(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gpu_report.util, "find_spec", lambda name: None)
    run = run_in(tmp_path, ["early exit"], budget=100.0)
    run.go()
    assert statuses(run) == {"early exit": "failed"}
    assert run.report.problems == ["early exit: pytest is not installed, so nothing is proved"]


def test_without_compute_sanitizer_the_step_is_skipped(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gpu_report.shutil, "which", lambda name, path=None: None)
    run = run_in(tmp_path, ["sanitizers"], budget=100.0)
    run.go()
    assert run.report.steps[0].note == "compute-sanitizer is not installed"
    assert statuses(run) == {"sanitizers": "skipped"}


def test_without_a_compiler_the_rest_is_measured_and_the_loss_is_loud(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """No bundle, no nvcc, or a checkout that cannot be written: the extension cannot be built."""
    monkeypatch.setattr(gpu_report.Run, "_start", lambda self, child: child)
    monkeypatch.setattr(children.Child, "wait", lambda self, deadline, watch=None: 1)
    run = run_in(tmp_path, ["build"], missing={"compact": "the extension has no CUDA kernel of compact"})
    run.go()
    assert statuses(run) == {"build": "failed"}
    assert "NO KERNEL OF compact HERE: the extension has no CUDA kernel of compact" in capsys.readouterr().out
    assert run.report.fallbacks == {"compact": "the extension has no CUDA kernel of compact"}
    assert any("building the extension" in problem for problem in run.report.problems)


def test_nothing_is_fetched_and_the_checkout_is_what_is_imported(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in children.UNWANTED:
        monkeypatch.setenv(name, "1")
    environment = children.environment_of({"X": "1"})
    assert not set(environment) & {"TRITON_INTERPRET", "CUDA_LAUNCH_BLOCKING", "PYTEST_ADDOPTS"}
    assert "PYTORCH_NO_CUDA_MEMORY_CACHING" not in environment
    assert children.environment_of({"TRITON_INTERPRET": "1"})["TRITON_INTERPRET"] == "1"
    assert environment["PYTHONPATH"].startswith(os.pathsep.join([str(ROOT), str(ROOT / "python"), str(ROOT / "bench")]))
    assert (environment["HF_HUB_OFFLINE"], environment["PYTHONDONTWRITEBYTECODE"], environment["X"]) == ("1", "1", "1")


def test_a_probe_tells_what_is_missing() -> None:
    told = subprocess.run(
        [sys.executable, "-m", "gpu.probe"], env=children.environment_of({}), capture_output=True, text=True, check=True
    ).stdout
    line = next(line for line in told.splitlines() if line.startswith(probe.MARK))
    value = json.loads(line.removeprefix(probe.MARK))
    assert value["facts"]["torch"]
    assert value["facts"]["cores"] >= 1
    assert all(isinstance(reason, str) for reason in value["missing"].values())


@pytest.mark.parametrize(
    "arguments", [["--only", "everything"], ["--budget", "0"], ["--prove", "--measure"]], ids=lambda a: a[0]
)
def test_bad_arguments(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stopped:
        gpu_report.main(arguments)
    assert stopped.value.code == 2
    assert arguments[-1].replace("everything", "--only: got").replace("0", "--budget: got") in capsys.readouterr().err


def test_without_a_gpu_it_is_one_sentence(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(gpu_report, "ask", lambda deadline: ({"device": "cpu"}, {}))
    assert gpu_report.main([]) == 2
    said = capsys.readouterr().err
    assert said.count("\n") == 1
    assert "no CUDA GPU" in said
    assert "--rehearse" in said


def test_what_is_compiled_ahead(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """While sanitizers and tests have the device: whole models first, and each step once."""
    monkeypatch.setattr(gpu_report.Run, "_start", lambda self, child: child)
    run = run_in(tmp_path, MODES["all"].steps)
    run._warm_up_after(STEPS["sanitizers"], 0.0)
    assert len(run.warm_ups) == 4
    command = list(run.warm_ups[0].command)
    work = command[command.index("--work") + 1].split(",")
    assert work[0] == "models:large"
    assert set(work) == {one for name in ("compaction", "gates and heads", "models") for one in STEPS[name].work}
    assert command[-3:] == ["--warm-up", "--shard", "0/4"]
    assert run.warm_ups[0].environment["TORCHINDUCTOR_COMPILE_THREADS"] == "2", "Inductor would start one a core"
    run._warm_up_after(STEPS["early exit"], 0.0)
    assert len(run.warm_ups) == 4, "that was begun already"
    run._warm_up_after(STEPS["streams"], 0.0)
    command = list(run.warm_ups[-1].command)
    assert command[command.index("--work") + 1] == "sweep:student_head_exit,sweep:exit_gate"


@pytest.mark.slow
def test_a_whole_run_of_one_step(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    code = gpu_report.main(["--rehearse", "--only", "build,ceilings", "--output", str(tmp_path), "--budget", "120"])
    assert code == 0
    assert "step ceilings: done" in capsys.readouterr().out
    written = next(tmp_path.glob("*.md")).read_text()
    assert "Ceilings of this run: copy" in written
    assert written.startswith("# A rehearsal: no GPU produced these numbers")
    assert progress_of(tmp_path / "x.json").name == "x.progress.jsonl"
