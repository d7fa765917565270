"""Prove, measure and report everything on a GPU: one command, under nine minutes.

    python bench/gpu_report.py                          # or: make gpu
    python bench/gpu_report.py --only ops,models --budget 300
    python bench/gpu_report.py --rehearse               # every line on the CPU with tiny shapes; reports no numbers

Works from the checkout with whatever Python has torch; nothing is installed. Steps run in processes of their own, one
after the other where they time something, each with a share of the budget, and the report is written again after every
one: a step that fails, hangs or upsets the device costs its own results only. Rows of an op whose tests failed in the
same run are left out, and the report says so. Results: <gpu>-<date>.json, .md and pictures.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from datetime import date
from importlib import metadata, util
from pathlib import Path
from typing import Any

import torch
from gpu import ROOT, outcomes, render
from gpu.records import TESTS_OF_OP, Report, StepResult
from gpu.steps import STEPS, Part, run_step

SHARES = {"build": 60, "proof": 190, "ceilings": 25, "ops": 95, "models": 95, "sweep": 55}
"""Seconds that the steps take of a budget of 520; what one leaves over goes to those after it."""
BUDGET = 520
REHEARSED = "empty_batch or bad_input or bad_speed or speed_1 or exit_layers_at_run_time or other_sizes_and_lengths"
"""Some tests of every file that proves rows, so that a rehearsal shows all tables."""


@dataclass(frozen=True)
class Options:
    output: Path
    budget: float
    only: Sequence[str]
    rehearse: bool
    tests: Sequence[str]


@dataclass
class Child:
    """A process of one step."""

    name: str
    command: Sequence[str]
    environment: Mapping[str, str] = field(default_factory=dict)
    log: Path | None = None
    process: subprocess.Popen[bytes] | None = None
    started: float = 0.0
    finished: float | None = None

    def start(self, folder: Path) -> None:
        self.log = folder / f"{self.name.replace(' ', '-')}.log"
        self.started = time.time()
        with self.log.open("wb") as log:
            self.process = subprocess.Popen(
                list(self.command),
                cwd=ROOT,
                env=_environment(self.environment),
                stdout=log,
                stderr=subprocess.STDOUT,
                start_new_session=True,  # so that what it starts ends with it
            )

    def wait(self, deadline: float) -> StepResult:
        """Until it ends or the deadline, which ends it."""
        assert self.process is not None
        try:
            code = self.process.wait(max(deadline - time.time(), 0.1))
        except subprocess.TimeoutExpired:
            self._end()
            return StepResult(self.name, "timed out", time.time() - self.started, "its time was over")
        status = "done" if code == 0 else "failed"
        return StepResult(self.name, status, time.time() - self.started, "" if code == 0 else self.last_line())

    def _end(self) -> None:
        assert self.process is not None
        for number in (signal.SIGTERM, signal.SIGKILL):
            try:
                os.killpg(self.process.pid, number)
                self.process.wait(5)
                return
            except subprocess.TimeoutExpired:
                continue
            except ProcessLookupError:
                return

    def text(self) -> str:
        return "" if self.log is None else self.log.read_text(errors="replace")

    def last_line(self) -> str:
        lines = [line.strip() for line in self.text().splitlines() if line.strip()]
        return (lines[-1] if lines else "it said nothing").replace("|", "/")[:300]


def _environment(added: Mapping[str, str]) -> dict[str, str]:
    paths = [str(ROOT), str(ROOT / "python"), str(ROOT / "bench"), os.environ.get("PYTHONPATH", "")]
    return {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, paths)), **added}


class Run:
    """One run of the report: its steps, its clock, and what it has found so far."""

    def __init__(self, options: Options) -> None:
        self.options = options
        self.started = time.time()
        self.stem = _stem(options.rehearse)
        options.output.mkdir(parents=True, exist_ok=True)
        self.parts = Path(tempfile.mkdtemp(prefix=f"{self.stem}-"))
        print(f"logs of the steps: {self.parts}", flush=True)
        self.report = Report(environment=environment(), rehearsal=options.rehearse)

    def remaining(self) -> float:
        return self.options.budget - (time.time() - self.started)

    def deadline(self, step: str) -> float:
        """When `step` has to end: its share of what is left, in proportion to the steps that come after it."""
        names = [name for name in SHARES if name in self.options.only]
        after = names[names.index(step) :]
        return time.time() + self.remaining() * SHARES[step] / sum(SHARES[name] for name in after)

    def go(self) -> Report:
        steps: dict[str, Callable[[], None]] = {
            "build": self.build,
            "proof": self.prove,
            **{name: lambda name=name: self.measure(name) for name in STEPS},  # type: ignore[misc]
        }
        for name in SHARES:
            if name not in self.options.only:
                continue
            try:
                steps[name]()
            except Exception as error:  # what this step lost must not cost the others
                self.note(StepResult(name, "failed", 0.0, f"{type(error).__name__}: {error}"))
            self.write()
        return self.report

    def note(self, result: StepResult, child: Child | None = None) -> None:
        self.report.steps.append(result)
        print(f"{time.time() - self.started:5.0f} s  {result.name}: {result.status} {result.note}", flush=True)
        if child is not None and result.status in ("failed", "timed out"):
            print("\n".join(f"       | {line}" for line in child.text().splitlines()[-20:]), flush=True)

    def build(self) -> None:
        """The extension with its CUDA kernels, where it is not there yet."""
        from fastkd_kernels import _extension

        if self.options.rehearse or _extension.has_kernel("compact", "CUDA"):
            self.note(StepResult("build", "skipped", 0.0, "the extension is there"))
            return
        jobs = str(min(os.cpu_count() or 1, 16))
        child = Child("build", [sys.executable, "setup.py", "-q", "build_ext", "--inplace"], {"MAX_JOBS": jobs})
        child.start(self.parts)
        self.note(child.wait(self.deadline("build")), child)

    def prove(self) -> None:
        """Tests and sanitizers; beside them, what the timed steps need is compiled."""
        deadline = self.deadline("proof")
        lines = self.parts / "outcomes.jsonl"
        # many processes share the cores here
        few = {"OMP_NUM_THREADS": "2", "TORCHINDUCTOR_COMPILE_THREADS": "4"}
        tests = Child("tests", self._pytest(), {outcomes.FILE_VARIABLE: str(lines)})
        others = [*self._sanitizers(), *self._warm_ups(deadline - 5)]
        for child in (tests, *others):
            child.environment = {**few, **child.environment}
            child.start(self.parts)
        self.note(_tests_result(tests.wait(deadline)), tests)
        self.report.tests = outcomes.read(lines)
        for child in others:
            result = child.wait(deadline + 5)
            if child.name.startswith("compile"):
                if result.status == "failed":
                    self.note(result, child)
                continue
            self.note(_sanitizer_result(result, child.text()), child)
            if self.report.steps[-1].status == "failed":
                self.report.problems.append(f"{child.name}: {self.report.steps[-1].note}")

    def _pytest(self) -> list[str]:
        command = [sys.executable, "-m", "pytest", "-q", "-p", "gpu.outcomes", "--continue-on-collection-errors"]
        if util.find_spec("xdist") is not None and not self.options.rehearse:
            command += ["-n", str(max((os.cpu_count() or 2) - 6, 2)), "--dist", "loadgroup"]
        command += ["-k", REHEARSED] if self.options.rehearse else []
        # those that rows depend on come first, should the time not do for all of them
        proofs = dict.fromkeys(f"tests/{name}.py" for names in TESTS_OF_OP.values() for name in names)
        return [*command, *(self.options.tests or (*proofs, "tests"))]

    def _sanitizers(self) -> list[Child]:
        tool = shutil.which("compute-sanitizer") or shutil.which("compute-sanitizer", path="/usr/local/cuda/bin")
        script = [sys.executable, "bench/sanitize.py"]
        if self.options.rehearse:
            return [Child("sanitize", script, {"TRITON_INTERPRET": "1"})]
        if tool is None:
            self.note(StepResult("compute-sanitizer", "skipped", 0.0, "the tool is not installed"))
            return []
        return [
            Child(kind, [tool, "--tool", kind, "--error-exitcode", "86", *script]) for kind in ("memcheck", "racecheck")
        ]

    def _warm_ups(self, deadline: float) -> list[Child]:
        shards = {name: count for name, count in (("ops", 2), ("models", 4), ("sweep", 3)) if name in self.options.only}
        if self.options.rehearse:
            shards = dict.fromkeys(shards, 1)
        return [
            Child(
                f"compile {name} {shard}",
                [
                    *self._step_command(name, deadline, self.parts / f"warm-{name}-{shard}.json"),
                    *("--warm-up", "--shard", f"{shard}/{count}"),
                ],
            )
            for name, count in shards.items()
            for shard in range(count)
        ]

    def _step_command(self, name: str, deadline: float, part: Path) -> list[str]:
        command = [sys.executable, "bench/gpu_report.py", "--step", name, "--part", str(part)]
        command += ["--deadline", str(deadline)]
        if self.report.ceilings is not None:
            command += ["--ceilings", ",".join(str(value) for value in asdict(self.report.ceilings).values())]
        return command + (["--rehearse"] if self.options.rehearse else [])

    def measure(self, name: str) -> None:
        """A timed step, alone on the device."""
        path = self.parts / f"{name}.json"
        deadline = self.deadline(name)
        child = Child(name, self._step_command(name, deadline, path))
        child.start(self.parts)
        result = child.wait(deadline + 10)  # the case that was begun may end
        self.note(result, child)
        if not path.exists():
            self.report.problems.append(f"{name}: {result.note or 'the step left no results'}")
            return
        part = Part.read(path)
        self.report.ceilings = self.report.ceilings or part.ceilings
        self.report.rows += part.rows
        self.report.sweeps += part.sweeps
        self.report.models += part.models
        self.report.problems += part.problems

    def write(self) -> None:
        """JSON first, pictures last: the numbers are what must not be lost."""
        folder, stem = self.options.output, self.stem
        _write(folder / f"{stem}.json", json.dumps(self.report.to_dict(), indent=1) + "\n")
        pictures: list[str] = []
        try:
            pictures = render.plot(self.report, folder, stem)
        except Exception as error:  # a picture less is no reason to lose a table
            print(f"no pictures: {error}", file=sys.stderr)
        _write(folder / f"{stem}.md", render.markdown(self.report, pictures))


def _tests_result(result: StepResult) -> StepResult:
    note = "the outcomes so far count" if result.status == "timed out" else result.note
    return StepResult("tests", result.status, result.seconds, note)


def _sanitizer_result(result: StepResult, log: str) -> StepResult:
    """A tool that this machine refuses has found nothing, which is not the same as a finding."""
    refused = re.search(r"Device not supported|not supported on this|Unable to find|InsufficientPrivileges", log)
    if result.status == "failed" and refused:
        return StepResult(result.name, "skipped", result.seconds, f"the tool does not run here: {refused.group()}")
    summary = re.findall(r"(?:ERROR|RACECHECK) SUMMARY: .*", log)
    return StepResult(result.name, result.status, result.seconds, summary[-1] if summary else result.note)


def _write(path: Path, text: str) -> None:
    temporary = path.with_name(f".{path.name}.tmp")
    temporary.write_text(text, encoding="utf-8")
    temporary.replace(path)


def _stem(rehearse: bool) -> str:
    if rehearse:
        return f"rehearsal-{date.today()}"
    name = re.sub(r"[^a-z0-9]+", "-", torch.cuda.get_device_name().lower()).strip("-")
    return f"{name}-{date.today()}"


def environment() -> dict[str, Any]:
    """Where the numbers come from."""
    facts: dict[str, Any] = {"device": "cpu", "date": str(date.today())}
    if torch.cuda.is_available():
        properties = torch.cuda.get_device_properties(0)
        facts |= {
            "device": properties.name,
            "multiprocessors": properties.multi_processor_count,
            "L2_MB": round(properties.L2_cache_size / 1e6),
            "cuda": torch.version.cuda,
        }
    facts |= {"python": platform.python_version(), "torch": torch.__version__}
    for package in ("triton", "transformers", "liger-kernel", "quack-kernels"):
        try:
            facts[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            facts[package] = "not installed"
    facts["commit"] = _commit()
    return facts


def _commit() -> str:
    found = subprocess.run(["git", "describe", "--always", "--dirty"], cwd=ROOT, capture_output=True, text=True)
    return found.stdout.strip() or "unknown"


def _arguments(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=(__doc__ or "").splitlines()[0],
        epilog="Example: python bench/gpu_report.py --only proof,ceilings,ops --budget 300",
    )
    parser.add_argument("--output", type=Path, default=ROOT / "bench" / "results", help="folder of the results")
    parser.add_argument("--budget", type=float, default=BUDGET, help="seconds for everything (default %(default)s)")
    parser.add_argument("--only", default=",".join(SHARES), help="steps, of %(default)s")
    parser.add_argument("--tests", nargs="*", default=(), help="what pytest gets instead of the whole suite")
    parser.add_argument("--rehearse", action="store_true", help="every step on the CPU with tiny shapes")
    for name in ("step", "part", "deadline", "ceilings", "shard"):
        parser.add_argument(f"--{name}", help=argparse.SUPPRESS)
    parser.add_argument("--warm-up", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args(arguments)
    options.only = tuple(name for name in options.only.split(",") if name)
    unknown = set(options.only) - set(SHARES)
    if unknown:
        parser.error(f"--only: got {', '.join(sorted(unknown))}, expected some of {', '.join(SHARES)}")
    if options.budget <= 0:
        parser.error(f"--budget: got {options.budget}, expected seconds above 0")
    return options


def main(arguments: Sequence[str] | None = None) -> int:
    """0 where every step was done, 1 where one was not, 2 where nothing could be done."""
    options = _arguments(arguments)
    if not options.rehearse and not torch.cuda.is_available():
        print(
            "gpu_report: PyTorch sees no CUDA GPU here, and this report measures one; run it on a machine with a GPU, "
            "or with --rehearse to see on the CPU that its steps work.",
            file=sys.stderr,
        )
        return 2
    if options.step:
        shard = tuple(int(part) for part in (options.shard or "0/1").split("/"))
        ceilings = None if options.ceilings is None else [float(value) for value in options.ceilings.split(",")]
        run_step(
            options.step,
            Path(options.part),
            float(options.deadline),
            rehearse=options.rehearse,
            warm_up=options.warm_up,
            shard=(shard[0], shard[1]),
            ceilings=ceilings,
        )
        return 0
    run = Run(Options(options.output, options.budget, options.only, options.rehearse, options.tests))
    report = run.go()
    print((run.options.output / f"{run.stem}.md").read_text(encoding="utf-8"))
    return 0 if all(step.status in ("done", "skipped") for step in report.steps) else 1


if __name__ == "__main__":
    sys.exit(main())
