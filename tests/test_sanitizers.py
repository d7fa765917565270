"""The sanitizers of `make sanitize` and `make sanitize-threads` see planted faults, with the flags of the build."""

from __future__ import annotations

import os
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

import setup

HERE = Path(__file__).parent
CALL = """
import ctypes, sys, threading
fault = getattr(ctypes.CDLL(sys.argv[1]), sys.argv[2])
threads = [threading.Thread(target=fault, args=(7,)) for _ in range(int(sys.argv[3]))]
for thread in threads: thread.start()
for thread in threads: thread.join()
"""
MEMORY, THREADS = ("libasan.so", "libubsan.so", "libstdc++.so"), ("libtsan.so",)


@pytest.mark.parametrize(
    ("sanitizers", "runtimes", "fault", "threads", "report"),
    [
        ("address,undefined", MEMORY, "write_behind_the_end", 1, "heap-buffer-overflow"),
        ("address,undefined", MEMORY, "overflow", 1, "signed integer overflow"),
        ("thread", THREADS, "race", 2, "data race"),
    ],
)
def test_a_planted_fault_is_found(
    sanitizers: str,
    runtimes: tuple[str, ...],
    fault: str,
    threads: int,
    report: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("FASTKD_SANITIZE", sanitizers)
    compiler = shlex.split(os.environ.get("CXX", "c++"))
    plain = {name: value for name, value in os.environ.items() if name not in ("LD_PRELOAD", "PYTHONPATH")}
    found = [
        subprocess.run(
            [*compiler, f"-print-file-name={name}"], capture_output=True, text=True, env=plain
        ).stdout.strip()
        for name in runtimes
    ]
    if not all(os.path.isabs(path) for path in found):
        pytest.skip(f"{compiler[0]} brings no {', '.join(runtimes)}: install the sanitizers of gcc")
    library = tmp_path / "libplanted.so"
    flags = [*setup.CXX_FLAGS, *setup.sanitizer_flags()]
    subprocess.run([*compiler, "-shared", "-fPIC", *flags, str(HERE / "planted_faults.cpp"), "-o", str(library)],
                   check=True, env=plain)  # fmt: skip
    still = [path, "-R"] if threads > 1 and (path := shutil.which("setarch")) else []
    ended = subprocess.run(
        [*still, sys.executable, "-c", CALL, str(library), fault, str(threads)],
        env={**plain, "LD_PRELOAD": " ".join(found), "ASAN_OPTIONS": "detect_leaks=0"}, capture_output=True, text=True,
    )  # fmt: skip
    assert ended.returncode != 0, ended.stderr
    assert report in ended.stderr
    assert "planted_faults.cpp" in ended.stderr
