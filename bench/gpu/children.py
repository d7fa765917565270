"""Processes of a run: each in a session of its own, watched while it works, and ended with all that it started.

All times are those of `time.monotonic()`, which processes share: the clock of a fresh machine may be set meanwhile.
"""

from __future__ import annotations

import ctypes
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from gpu import ROOT

DEAD_CONTEXT = 87
"""The exit status of a process whose CUDA context answers nothing any more."""
LOG_BYTES = 256 * 1024
UNWANTED = (
    "CUDA_LAUNCH_BLOCKING",
    "PYTEST_ADDOPTS",
    "PYTORCH_NO_CUDA_MEMORY_CACHING",
    "TORCHDYNAMO_DISABLE",
    "TORCH_COMPILE_DISABLE",
    "TRITON_ALWAYS_COMPILE",
    "TRITON_INTERPRET",
)
"""Left in a shell by earlier work, these would measure or prove something else."""
_PR_SET_PDEATHSIG = 1


@dataclass
class Child:
    """A process and its log."""

    name: str
    command: Sequence[str]
    environment: Mapping[str, str] = field(default_factory=dict)
    log: Path | None = None
    process: subprocess.Popen[bytes] | None = None
    started: float = 0.0
    note: str = ""
    """Why it was ended from outside, if it was."""

    def start(self, folder: Path) -> Child:
        """Begin; what it says goes to a log in `folder`, after what an earlier process of this name said."""
        self.log = folder / f"{self.name.replace(' ', '-').replace(',', '')}.log"
        self.started = time.monotonic()
        self.note = ""
        with self.log.open("ab") as log:
            self.process = subprocess.Popen(
                list(self.command),
                cwd=ROOT,
                env=environment_of(self.environment),
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                start_new_session=True,  # so that what it starts ends with it
                preexec_fn=_end_with_parent if sys.platform == "linux" else None,
            )
        return self

    @property
    def code(self) -> int | None:
        """None while it runs."""
        assert self.process is not None
        return self.process.poll()

    def end(self, why: str) -> None:
        """Stop it and its children; one that the driver holds fast is left behind."""
        assert self.process is not None
        self.note = self.note or why
        for number, patience in ((signal.SIGTERM, 2), (signal.SIGKILL, 3)):
            try:
                os.killpg(self.process.pid, number)
                self.process.wait(patience)
            except subprocess.TimeoutExpired:
                continue
            except (ProcessLookupError, PermissionError):
                break
        self._end_group()

    def _end_group(self) -> None:
        """Compile workers outlive a process that died by itself."""
        assert self.process is not None
        try:
            os.killpg(self.process.pid, signal.SIGKILL)
        except (ProcessLookupError, PermissionError):
            return

    def wait(self, deadline: float, watch: Callable[[], str | None] = lambda: None) -> int | None:
        """Its exit status; None where the deadline or `watch`, which gives a reason, ended it. `note` says which."""
        while (code := self.code) is None:
            why = "its time was over" if time.monotonic() >= deadline else watch()
            if why is not None:
                self.end(why)
                return None
            time.sleep(0.1)
        self._end_group()
        return code

    def text(self) -> str:
        return "" if self.log is None or not self.log.exists() else self.log.read_text(errors="replace")

    def last_line(self) -> str:
        lines = [line.strip() for line in self.text().splitlines() if line.strip()]
        return (lines[-1] if lines else "it said nothing").replace("|", "/")[:300]


def _end_with_parent() -> None:
    """Where the report itself is killed, nothing goes on using the GPU."""
    _libc.prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)


_libc = ctypes.CDLL(None)  # loaded before any fork


def environment_of(added: Mapping[str, str]) -> dict[str, str]:
    """The environment of a child: the checkout is the installation, and nothing is fetched."""
    paths = [str(ROOT), str(ROOT / "python"), str(ROOT / "bench"), os.environ.get("PYTHONPATH", "")]
    fixed = {
        "PYTHONPATH": os.pathsep.join(filter(None, paths)),
        "PYTHONUNBUFFERED": "1",
        "PYTHONDONTWRITEBYTECODE": "1",  # the checkout may be read-only, and others compile it at the same time
        "HF_HUB_OFFLINE": "1",
        "TOKENIZERS_PARALLELISM": "false",
    }
    inherited = {name: value for name, value in os.environ.items() if name not in UNWANTED}
    return {**inherited, **fixed, **added}


def shortened(text: str) -> str:
    """A log that fits: its beginning and its end."""
    if len(text) <= LOG_BYTES:
        return text
    said = f"[... {len(text) - LOG_BYTES} characters left out ...]"
    return f"{text[: LOG_BYTES // 4]}\n{said}\n{text[-3 * LOG_BYTES // 4 :]}"


def workers(wanted: int, cores: int, free_gib: float, each_gib: float) -> int:
    """How many processes may use the GPU at a time: as many as have a core and `each_gib` of its free memory."""
    return max(min(wanted, cores, int(free_gib // each_gib)), 1)
