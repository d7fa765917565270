"""Prove, measure and report everything on a GPU: one command, in calls that keep their budget.

    python bench/gpu_report.py --prove                  # a first call, under 240 s: sanitizers, tests, first numbers
    python bench/gpu_report.py --measure                # a second one, under 450 s
    python bench/gpu_report.py                          # or: make gpu; all steps, as far as 530 s go
    python bench/gpu_report.py --only "early exit,ceilings,compaction" --budget 200
    python bench/gpu_report.py --rehearse               # every line on the CPU with tiny shapes; reports no numbers

Works from the checkout with whatever Python has torch; nothing is installed or fetched. Steps run in processes of
their own, those that time something alone on the device. A step begins only where its estimate fits into what is left
of the budget, and is left out by name where not. After every step, and every few seconds within one, results and logs
are written whole: to --output, else to $OUT, else to bench/results/gpu-<date>. What dies, hangs or upsets the device
costs the case that did it. Rows that no test of the same run proves are kept apart as unproven.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import resource
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from datetime import datetime
from hashlib import sha256
from importlib import util
from pathlib import Path
from typing import Any

from gpu import ROOT, outcome_lines, probe, render, store
from gpu.children import DEAD_CONTEXT, Child, workers
from gpu.parts import Part, progress_of
from gpu.plan import MODES, RESERVE, STEPS, Step, limit
from gpu.proof import SECONDS_A_TEST, Proof
from gpu.records import Ceilings, Report, StepResult

REHEARSED = (
    "every_kernel_has_a_launcher or empty_batch or bad_input or bad_speed or speed_1 or exit_layers_at_run_time "
    "or other_sizes_and_lengths"
)
"""Some tests of every file that proves rows, so that a rehearsal shows all tables."""
REHEARSAL_BUDGET = 1200.0
SECONDS_A_CASE = 90.0
"""Between two signs of life of a step that times something; compiling a whole model is the longest."""
STARTING = 60.0
"""Until the first one."""
BUILDING = 110.0
"""Seconds for the extension, where neither it nor a bundle is there."""
CHECKPOINT = 10.0
"""Seconds between two writings within a step."""
GIB_A_TEST_WORKER, GIB_A_WARM_UP = 2.0, 4.0
FEW_THREADS = {"OMP_NUM_THREADS": "2", "TORCHINDUCTOR_COMPILE_THREADS": "2"}
"""Of each process while many share the cores."""
BLAMED = {DEAD_CONTEXT: "it left a dead CUDA context"}


class Stopped(BaseException):
    """The run was told to end from outside."""


@dataclass(frozen=True)
class Options:
    """What a run was asked for; `output` None leaves the choice to `store.choose_folder`."""

    output: Path | None
    budget: float
    steps: Sequence[str]
    rehearse: bool = False
    tests: Sequence[str] = ()
    mode: str = "all"
    started: float = 0.0


class Run:
    """One run of the report: its steps, its clock, and what it has found so far."""

    def __init__(self, options: Options, facts: Mapping[str, Any], missing: Mapping[str, str]) -> None:
        self.options = options
        self.started = options.started or time.monotonic()
        self.facts = dict(facts)
        self.stem = _stem(options, str(facts.get("device", "unknown")))
        self.folder, said = store.choose_folder(options.output, f"{datetime.now():%Y-%m-%d-%H%M%S}")
        self.work = store.working_folder(self.folder, self.stem)
        self.report = Report(environment={**self.facts, **origin()}, rehearsal=options.rehearse)
        self.report.fallbacks = {} if options.rehearse else dict(missing)
        self.report.problems += said
        self.parts: dict[str, Path] = {}
        self.test_folders: list[Path] = []
        self.warm_ups: list[Child] = []
        self.warmed: set[str] = set()
        self.children: list[Child] = []
        self._written = time.monotonic()
        self._count = 0
        for line in (f"results: {self.folder}", f"logs of the steps until they are there: {self.work}", *said):
            print(line, flush=True)

    def remaining(self) -> float:
        return self.options.budget - (time.monotonic() - self.started)

    # --- the steps, one after the other ---

    def go(self) -> Report:
        """Every step that fits; what was found is on disk after each of them."""
        try:
            with _signals():
                for name in self.options.steps:
                    self.do(STEPS[name])
        except Stopped as stopped:
            self.report.problems.append(f"the run was stopped: {stopped}; what stands here was found before")
        finally:
            for child in self.children:
                if child.process is not None and child.code is None:
                    child.end("the run ended")
            self.write(pictures=True)
        return self.report

    def do(self, step: Step) -> None:
        """One step, if it fits; what it loses must not cost the others."""
        seconds = self._limit(step)
        if seconds is None:
            left = max(self.remaining() - RESERVE, 0)
            note = f"it takes about {step.seconds:g} s, and {left:.0f} s of the budget are left"
            self.note(StepResult(step.name, "left out", 0.0, note, 0.0, step.seconds, step.cpu_seconds))
            self.write()
            return
        began, spent = time.monotonic(), _cpu_seconds()
        try:
            status, note = self._how(step)(step, began + seconds)
        except Exception as error:
            status, note = "failed", f"{type(error).__name__}: {error}"
        elapsed, used = time.monotonic() - began, _cpu_seconds() - spent
        self.note(StepResult(step.name, status, elapsed, note, used, step.seconds, step.cpu_seconds))
        self.write()

    def _limit(self, step: Step) -> float | None:
        if self.options.rehearse:  # estimates are about a GPU
            return max(self.remaining() - RESERVE, 0) or None
        return limit(step, self.remaining())

    def _how(self, step: Step) -> Callable[[Step, float], tuple[str, str]]:
        if step.work:
            return self.measure
        if step.tests:
            return self.prove
        return {"build": self.build, "sanitizers": self.sanitize}[step.name]

    def note(self, result: StepResult) -> None:
        self.report.steps.append(result)
        print(f"{time.monotonic() - self.started:5.0f} s  {result.name}: {result.status} {result.note}", flush=True)

    def _start(self, child: Child) -> Child:
        child.environment = {**self._caches(), **child.environment}
        self.children.append(child.start(self.work))
        return child

    def _caches(self) -> dict[str, str]:
        """New ones: nothing stale is loaded, and a home that cannot be written does not matter."""
        new = {name: str(self.work / "cache" / name) for name in ("TORCHINDUCTOR_CACHE_DIR", "TRITON_CACHE_DIR")}
        return {**new, **{name: os.environ[name] for name in new if name in os.environ}}

    # --- build and bundle check ---

    def build(self, step: Step, deadline: float) -> tuple[str, str]:
        """The extension with its CUDA kernels where it is missing; whatever is missing then is said loudly."""
        if self.options.rehearse:
            return "skipped", "a rehearsal takes what is there"
        status = "done"
        if "compact" in self.report.fallbacks:
            jobs = str(min(self._cores(), 16))
            command = [sys.executable, "setup.py", "-q", "build_ext", "--inplace"]
            child = self._start(Child("build", command, {"MAX_JOBS": jobs}))
            code = child.wait(time.monotonic() + min(BUILDING, self.remaining() / 2), self._checkpoint)
            if code == 0:
                self.report.fallbacks = ask(time.monotonic() + 60)[1]
            else:
                status = "failed"
                self.report.problems.append(f"building the extension: {child.note or child.last_line()}")
        loud = [f"NO KERNEL OF {op} HERE: {reason}" for op, reason in self.report.fallbacks.items()]
        for line in loud:
            print(line, flush=True)
        self.report.problems += loud
        return status, f"no kernel of {', '.join(self.report.fallbacks)}" if loud else "every op has its kernel"

    # --- sanitizers ---

    def sanitize(self, step: Step, deadline: float) -> tuple[str, str]:
        """compute-sanitizer's memcheck and racecheck, side by side."""
        self._warm_up_after(step, deadline)
        script = [sys.executable, "bench/sanitize.py"]
        if self.options.rehearse:
            children = [Child("sanitize", script, {"TRITON_INTERPRET": "1"})]
        else:
            tool = shutil.which("compute-sanitizer") or shutil.which("compute-sanitizer", path="/usr/local/cuda/bin")
            if tool is None:
                return "skipped", "compute-sanitizer is not installed"
            kinds = ("memcheck", "racecheck")
            children = [Child(kind, [tool, "--tool", kind, "--error-exitcode", "86", *script]) for kind in kinds]
        for child in children:
            self._start(child)
        results = [self._sanitizer_result(child, deadline) for child in children]
        self.report.problems += [f"{name}: {note}" for name, status, note in results if status == "failed"]
        worst = next(
            (status for status in ("failed", "timed out", "done") if status in {r[1] for r in results}), "skipped"
        )
        return worst, "; ".join(f"{name}: {note or status}" for name, status, note in results)

    def _sanitizer_result(self, child: Child, deadline: float) -> tuple[str, str, str]:
        code = child.wait(deadline, self._checkpoint)
        status = "timed out" if code is None else "done" if code == 0 else "failed"
        return (child.name, *sanitizer_result(status, child.note or child.last_line(), child.text()))

    # --- tests ---

    def prove(self, step: Step, deadline: float) -> tuple[str, str]:
        """Tests on several workers; beside them, what the next timed steps need is compiled."""
        if util.find_spec("pytest") is None:
            self.report.problems.append(f"{step.name}: pytest is not installed, so nothing is proved")
            return "failed", "pytest is not installed"
        self._warm_up_after(step, deadline)
        folder = self.work / f"tests of {step.name}".replace(" ", "-")
        few = {**self._caches(), **FEW_THREADS}
        seconds_a_test = 3 * SECONDS_A_TEST if self.options.rehearse else SECONDS_A_TEST
        tests = Proof(self._pytest(step), folder, self.work, self._test_workers(), few, seconds_a_test)
        tests.start()
        self.children += [worker.child for worker in tests.workers]
        self.test_folders.append(folder)
        status, note = tests.wait(deadline, self._checkpoint)
        self.report.problems += tests.problems
        failed = sum(len(outcomes.failed) for outcomes in outcome_lines.read(folder).values())
        if failed and status == "done":
            status, note = "failed", f"{failed} tests failed"
        return status, note

    def _pytest(self, step: Step) -> list[str]:
        selected = ["-k", REHEARSED] if self.options.rehearse else []
        if self.options.tests:
            return [*selected, *self.options.tests]
        if step.tests != ("*",):
            return [*selected, *(f"tests/{name}.py" for name in step.tests)]
        before = [name for other in STEPS.values() if other.name in self.options.steps for name in other.tests]
        return [*selected, "tests", *(f"--ignore=tests/{name}.py" for name in before if name != "*")]

    def _cores(self) -> int:
        return int(self.facts.get("cores", 2))

    def _free_gib(self) -> float:
        return float(self.facts.get("free_GiB", 2 * GIB_A_TEST_WORKER))

    def _test_workers(self) -> int:
        """Tests and compilations share memory and cores half and half, though most of the cores go to the tests."""
        wanted = 1 if self.options.rehearse else max(self._cores() - self._warm_up_workers(), 1)
        return workers(wanted, self._cores(), self._free_gib() / 2, GIB_A_TEST_WORKER)

    # --- compiling ahead ---

    def _warm_up_workers(self) -> int:
        if self.options.rehearse:
            return 1
        return workers(4, max(self._cores() // 4, 1), self._free_gib() / 2, GIB_A_WARM_UP)

    def _warm_up_after(self, step: Step, deadline: float) -> None:
        """Start compiling what the next timed steps launch, while tests or sanitizers have the device anyway."""
        work = [one for name in self._timed_after(step) if name not in self.warmed for one in STEPS[name].work]
        work = sorted((one for one in work if one != "ceilings"), key=lambda one: not one.startswith("models"))
        self.warmed |= set(self._timed_after(step))
        if not work:
            return
        count = self._warm_up_workers()
        for shard in range(count):
            self._count += 1
            part = self.work / f"compiled-{self._count}.json"
            command = [*self._work_command(work, part, self.started + self.options.budget), "--warm-up"]
            child = Child(f"compile {self._count}", [*command, "--shard", f"{shard}/{count}"], FEW_THREADS)
            self.warm_ups.append(self._start(child))

    def _timed_after(self, step: Step) -> list[str]:
        """The timed steps that follow, up to the next one during which can be compiled."""
        names = list(self.options.steps)
        timed: list[str] = []
        for name in names[names.index(step.name) + 1 :]:
            if STEPS[name].work:
                timed.append(name)
            elif timed:
                break
        return timed

    def _end_warm_ups(self) -> None:
        for child in self.warm_ups:
            code = child.code
            if code is None:
                child.end("the step that needs the device for itself began")
                self.report.problems.append(f"{child.name}: not finished, so later steps compile the rest")
            elif code != 0:
                self.report.problems.append(f"{child.name}: {BLAMED.get(code, child.last_line())}")
        self.warm_ups.clear()

    # --- measuring ---

    def measure(self, step: Step, deadline: float) -> tuple[str, str]:
        """A timed step, alone on the device; a worker that dies or hangs is started again behind the case it was at."""
        self._end_warm_ups()
        part = self.parts[step.name] = self.work / f"{step.name.replace(' ', '-')}.json"
        child = self._start(Child(step.name, self._work_command(step.work, part, deadline)))
        while True:
            # the case that was begun may end
            code = child.wait(deadline + 4, lambda: self._watch(child, part))
            if code == 0:
                return "done", ""
            why = child.note or BLAMED.get(code or 0) or f"its process ended with {code}: {child.last_line()}"
            case = _running(part, child.started)
            if case is None:
                self.report.problems.append(f"{step.name}: {why}")
                return "failed", why
            store.append_line(progress_of(part), {"deadly": case, "why": why})
            self.report.problems.append(f"{step.name}: lost {case}: {why}")
            if time.monotonic() >= deadline:
                return "timed out", f"it was at {case}"
            self._start(child)

    def _work_command(self, work: Sequence[str], part: Path, deadline: float) -> list[str]:
        command = [sys.executable, "-m", "gpu.steps", "--work", ",".join(work), "--part", str(part)]
        command += ["--deadline", str(deadline)]
        ceilings = self._ceilings()
        if ceilings is not None:
            command += ["--ceilings", ",".join(str(value) for value in asdict(ceilings).values())]
        return command + (["--rehearse"] if self.options.rehearse else [])

    def _watch(self, child: Child, part: Path) -> str | None:
        lines = [line for line in store.read_lines(progress_of(part)) if "begun" in line]
        last = lines[-1]["at"] if lines else 0.0
        patience = SECONDS_A_CASE if last >= child.started else STARTING
        if time.monotonic() - max(last, child.started) > patience:
            return f"nothing moved for {patience:g} s"
        return self._checkpoint()

    def _ceilings(self) -> Ceilings | None:
        return next((part.ceilings for part in self._read_parts() if part.ceilings is not None), None)

    def _read_parts(self) -> list[Part]:
        return [Part.read(path) for path in self.parts.values() if path.exists()]

    # --- writing ---

    def _checkpoint(self) -> None:
        """Within a step, too, what is known is on disk every few seconds."""
        if time.monotonic() - self._written >= CHECKPOINT:
            self.write()

    def found(self) -> Report:
        """What is known by now, parts of the step that is running included."""
        parts = self._read_parts()
        report = Report(**{name: getattr(self.report, name) for name in Report.__dataclass_fields__})
        report.ceilings = self._ceilings()
        report.rows = [row for part in parts for row in part.rows]
        report.sweeps = [row for part in parts for row in part.sweeps]
        report.models = [row for part in parts for row in part.models]
        report.problems = [*self.report.problems, *(problem for part in parts for problem in part.problems)]
        report.tests = {name: found for path in self.test_folders for name, found in outcome_lines.read(path).items()}
        return report

    def write(self, pictures: bool = False) -> None:
        """Results and logs, whole; JSON first, pictures last: the numbers are what must not be lost."""
        self._written = time.monotonic()
        names: list[str] = []
        try:
            report = self.found()
            store.write(self.folder / f"{self.stem}.json", json.dumps(report.to_dict(), indent=1) + "\n")
            store.write(self.folder / f"{self.stem}.md", render.markdown(report))
            store.write(self.folder / f"{self.stem}-logs.tar.gz", store.archive(self.work))
            if pictures:
                names = render.plot(report, self.folder, self.stem)
                store.write(self.folder / f"{self.stem}.md", render.markdown(report, names))
        except Exception as error:  # a full disk, no matplotlib: less is written, and the run goes on
            print(f"not all could be written: {type(error).__name__}: {error}", file=sys.stderr, flush=True)


@contextmanager
def _signals() -> Iterator[None]:
    """A run that is told to end still writes what it has."""

    def stop(number: int, frame: object) -> None:
        raise Stopped(signal.Signals(number).name)

    before = {number: signal.signal(number, stop) for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP)}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _cpu_seconds() -> float:
    """Of all processes that have ended so far."""
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return used.ru_utime + used.ru_stime


def _running(part: Path, since: float) -> str | None:
    """What a worker had begun last."""
    begun = [line for line in store.read_lines(progress_of(part)) if "begun" in line and line["at"] >= since]
    return begun[-1]["begun"] if begun else None


def sanitizer_result(status: str, note: str, log: str) -> tuple[str, str]:
    """Status and note; a tool that this machine refuses has found nothing, which is not the same as a finding."""
    refused = re.search(r"Device not supported|not supported on this|Unable to find|InsufficientPrivileges", log)
    if status == "failed" and refused:
        return "skipped", f"the tool does not run here: {refused.group()}"
    summary = re.findall(r"(?:ERROR|RACECHECK) SUMMARY: .*", log)
    if summary:
        return status, summary[-1]
    return status, "" if status == "done" else note


def _stem(options: Options, device: str) -> str:
    today = f"{datetime.now():%Y-%m-%d}"
    if options.rehearse:
        return f"rehearsal-{today}"
    name = re.sub(r"[^a-z0-9]+", "-", device.lower()).strip("-")
    return f"{options.mode}-{name}-{today}"


def origin() -> dict[str, str]:
    """Which code was measured: its commit where git tells, and a fingerprint of the sources in any case."""
    try:
        found = subprocess.run(["git", "describe", "--always", "--dirty"], cwd=ROOT, capture_output=True, timeout=10)
        commit = found.stdout.decode(errors="replace").strip()
    except (OSError, subprocess.SubprocessError):
        commit = ""
    digest = sha256()
    for folder in ("fastkd_kernels", "python", "csrc", "tests", "bench"):
        for path in sorted((ROOT / folder).rglob("*")):
            if path.suffix in (".py", ".cpp", ".h", ".cu"):
                digest.update(path.read_bytes())
    return {
        "date": f"{datetime.now():%Y-%m-%d %H:%M}",
        "commit": commit or "unknown",
        "sources": digest.hexdigest()[:12],
    }


def ask(deadline: float) -> tuple[dict[str, Any], dict[str, str]]:
    """What this machine is, and which ops have no kernel here; asked in a process of its own, which may hang.

    Raises:
        RuntimeError: it told nothing; the message says why.
    """
    folder = store.working_folder(ROOT, "gpu-probe")
    child = Child("probe", [sys.executable, "-m", "gpu.probe"]).start(folder)
    code = child.wait(deadline)
    said, log = child.note or child.last_line(), child.text()
    shutil.rmtree(folder, ignore_errors=True)
    lines = [line.removeprefix(probe.MARK) for line in log.splitlines() if line.startswith(probe.MARK)]
    if code != 0 or not lines:
        raise RuntimeError(f"asking what this machine is failed: {said}")
    told = json.loads(lines[-1])
    return told["facts"], told["missing"]


def _arguments(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=(__doc__ or "").splitlines()[0],
        epilog='Example: python bench/gpu_report.py --only "early exit,ceilings,compaction" --budget 200',
    )
    modes = parser.add_mutually_exclusive_group()
    for name in ("prove", "measure"):
        does = f"{MODES[name].does}, within {MODES[name].budget:g} s"
        modes.add_argument(f"--{name}", dest="mode", action="store_const", const=name, default="all", help=does)
    parser.add_argument(
        "--output", type=Path, help="folder of the results (default: $OUT, or bench/results/gpu-<date>)"
    )
    parser.add_argument("--budget", type=float, help="seconds for everything, starting included (default: the mode's)")
    parser.add_argument("--only", help=f"steps, of: {', '.join(STEPS)}")
    parser.add_argument("--tests", nargs="*", default=(), help="what pytest gets instead of a step's own files")
    parser.add_argument("--rehearse", action="store_true", help="every step on the CPU with tiny shapes")
    options = parser.parse_args(arguments)
    chosen = MODES[options.mode].steps if options.only is None else options.only.split(",")
    options.steps = tuple(name.strip() for name in chosen if name.strip())
    unknown = set(options.steps) - set(STEPS)
    if unknown:
        parser.error(f"--only: got {', '.join(sorted(unknown))}, expected some of {', '.join(STEPS)}")
    if options.budget is None:
        options.budget = REHEARSAL_BUDGET if options.rehearse else MODES[options.mode].budget
    if options.budget <= 0:
        parser.error(f"--budget: got {options.budget}, expected seconds above 0")
    return options


def main(arguments: Sequence[str] | None = None) -> int:
    """0 where every step was done, skipped or left out, 1 where one was not, 2 where nothing could be done."""
    started = time.monotonic()
    options = _arguments(arguments)
    try:
        facts, missing = ask(started + 90)
        if not options.rehearse and facts["device"] == "cpu":
            raise RuntimeError(
                "PyTorch sees no CUDA GPU here, and this report measures one; run it on a machine with a GPU"
            )
        run = Run(
            Options(
                options.output, options.budget, options.steps, options.rehearse, options.tests, options.mode, started
            ),
            facts,
            missing,
        )
    except (RuntimeError, OSError) as error:
        print(f"gpu_report: {error}, or with --rehearse to see on the CPU that its steps work.", file=sys.stderr)
        return 2
    run.go()
    report = run.found()
    print(render.summary(report))
    print(f"results: {run.folder}")
    return 0 if all(step.status in ("done", "skipped", "left out") for step in report.steps) else 1


if __name__ == "__main__":
    sys.exit(main())
