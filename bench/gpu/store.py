"""Where results go, so that they survive: few files, each whole at any moment."""

from __future__ import annotations

import io
import json
import os
import tarfile
import tempfile
import time
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from gpu import ROOT
from gpu.children import shortened

OUT_VARIABLE = "OUT"
"""A folder whose files outlive a lent machine; often only a handful of files come back from it."""


def choose_folder(asked: Path | None, name: str) -> tuple[Path, list[str]]:
    """The first folder that can be written, with what has to be said about it.

    In this order: the one that was asked for, `$OUT`, bench/results/gpu-<date> of the checkout, and a temporary one.

    Raises:
        OSError: the folder that was asked for cannot be written; nothing else is tried then.
    """
    if asked is not None:
        _prove_writable(asked)
        return asked, []
    said: list[str] = []
    out = os.environ.get(OUT_VARIABLE)
    candidates = [Path(out)] if out else []
    candidates.append(ROOT / "bench" / "results" / f"gpu-{name}")
    for folder in candidates:
        try:
            _prove_writable(folder)
            return folder, said
        except OSError as error:
            said.append(f"{folder} cannot be written ({error.strerror or error})")
    folder = Path(tempfile.mkdtemp(prefix=f"gpu-{name}-"))
    said.append(f"RESULTS GO TO {folder}, WHICH ENDS WITH THIS MACHINE: copy them, or set OUT or --output")
    return folder, said


def _prove_writable(folder: Path) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    probe = folder / f".writable-{os.getpid()}"
    probe.write_text("")
    probe.unlink()


def working_folder(beside: Path, stem: str) -> Path:
    """For logs while they grow; not in the folder of the results, of which few files may come back."""
    try:
        return Path(tempfile.mkdtemp(prefix=f"{stem}-"))
    except OSError:
        return Path(tempfile.mkdtemp(prefix=f".{stem}-", dir=beside))


def write(path: Path, content: str | bytes) -> None:
    """Whole or not at all, also where the machine stops in the middle."""
    temporary = path.with_name(f".{path.name}.tmp")
    with temporary.open("wb") as stream:
        stream.write(content.encode() if isinstance(content, str) else content)
        stream.flush()
        os.fsync(stream.fileno())
    temporary.replace(path)


def append_line(path: Path, line: Mapping[str, Any]) -> None:
    """One JSON object more, on a line of its own even where the one before was torn."""
    with path.open("a", encoding="utf-8") as stream:
        stream.write(f"\n{json.dumps(line)}\n")


def read_lines(path: Path) -> list[dict[str, Any]]:
    """Every whole JSON object of a file that may not be there; a process that was killed leaves a torn line."""
    found = []
    for line in path.read_text(encoding="utf-8", errors="replace").splitlines() if path.exists() else ():
        try:
            value = json.loads(line)
        except json.JSONDecodeError:
            continue
        if isinstance(value, dict):
            found.append(value)
    return found


def archive(folder: Path, suffixes: Iterable[str] = (".log", ".json", ".jsonl", ".txt")) -> bytes:
    """All logs and partial results of a run as one .tar.gz: one file instead of dozens."""
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w:gz", compresslevel=6) as tar:
        for name, text in _texts(folder, tuple(suffixes)).items():
            data = shortened(text).encode(errors="replace")
            entry = tarfile.TarInfo(name)
            entry.size, entry.mtime = len(data), int(time.time())
            tar.addfile(entry, io.BytesIO(data))
    return buffer.getvalue()


def _texts(folder: Path, suffixes: tuple[str, ...]) -> Mapping[str, str]:
    texts = {}
    for path in sorted(folder.rglob("*")):
        if path.suffix in suffixes and "cache" not in path.parts:
            try:
                texts[str(path.relative_to(folder))] = path.read_text(errors="replace")
            except OSError:  # a process may have taken it away since it was listed
                continue
    return texts
