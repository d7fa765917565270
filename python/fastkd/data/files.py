"""Output files that are either whole or absent: written under a temporary name, then renamed."""

from __future__ import annotations

import json
import os
import shutil
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any


@contextmanager
def atomic_path(path: str | os.PathLike[str]) -> Iterator[Path]:
    """Give a temporary path beside `path`; rename it to `path` if the block succeeds, delete it otherwise.

    The temporary name keeps the suffix of `path`, because many writers choose their format by it. Missing parent
    folders are made.

    Raises:
        IsADirectoryError: `path` is a folder.
    """
    target = Path(path)
    if target.is_dir():
        raise IsADirectoryError(f"output {target} is a folder; give the name of a file in it")
    target.parent.mkdir(parents=True, exist_ok=True)
    handle, name = tempfile.mkstemp(prefix=f".{target.stem}-", suffix=target.suffix, dir=target.parent)
    os.close(handle)
    temporary = Path(name)
    try:
        yield temporary
        # mkstemp makes files private; outputs follow the user's umask like any other file
        mask = os.umask(0)
        os.umask(mask)
        temporary.chmod(0o666 & ~mask)
        temporary.replace(target)
    except BaseException:
        with suppress(FileNotFoundError):
            temporary.unlink()
        raise


def write_text(path: str | os.PathLike[str], text: str) -> None:
    """Write UTF-8 text atomically."""
    with atomic_path(path) as temporary:
        temporary.write_text(text, encoding="utf-8")


def write_json(path: str | os.PathLike[str], value: Any) -> None:
    """Write `value` as indented JSON atomically."""
    write_text(path, json.dumps(value, indent=2, ensure_ascii=False) + "\n")


def changed_settings(path: Path, settings: Mapping[str, Any]) -> list[str]:
    """The names in `settings` whose values are not those of the JSON file `path`, sorted."""
    earlier = json.loads(path.read_text(encoding="utf-8"))
    return sorted(name for name in settings if earlier.get(name) != settings[name])


@contextmanager
def atomic_folder(target: Path) -> Iterator[Path]:
    """Give a temporary folder beside `target`; put it in its place if the block succeeds, delete it otherwise."""
    target.parent.mkdir(parents=True, exist_ok=True)
    holder = Path(tempfile.mkdtemp(prefix=f".{target.name}-", dir=target.parent))
    # mkdtemp makes its folder private; one made inside follows the user's umask
    fresh, replaced = holder / "new", holder / "old"
    try:
        fresh.mkdir()
        yield fresh
        if target.exists():
            target.rename(replaced)
        try:
            fresh.rename(target)
        except OSError:
            if replaced.exists():
                replaced.rename(target)
            raise
    finally:
        shutil.rmtree(holder, ignore_errors=True)
