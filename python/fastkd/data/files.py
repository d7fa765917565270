"""Output files that are either whole or absent: written under a temporary name, then renamed."""

from __future__ import annotations

import json
import os
import reprlib
import shutil
import tempfile
import zlib
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

_CHECKSUM = "crc32"


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


def write_result(path: str | os.PathLike[str], value: Mapping[str, Any]) -> None:
    """Write an object as JSON atomically, with a checksum that `read_json` looks at."""
    write_json(path, {**value, _CHECKSUM: _checksum(value)})


def read_json(path: str | os.PathLike[str], argument: str, remedy: str) -> dict[str, Any]:
    """The object in a JSON file, without the checksum that `write_result` may have put there.

    Args:
        path: of the file.
        argument: how messages call it.
        remedy: what to do if it is missing or damaged.

    Raises:
        FileNotFoundError: no such file.
        ValueError: it holds no JSON, no object, or something else than was written.
    """
    file = Path(path)
    if not file.is_file():
        raise FileNotFoundError(f"{argument}: no file {file}; {remedy}")
    try:
        value = json.loads(file.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{argument}: {file} is damaged or no JSON ({error}); {remedy}") from error
    if not isinstance(value, dict):
        raise ValueError(f"{argument}: {file} holds a {type(value).__name__}, expected an object; {remedy}")
    stored = value.pop(_CHECKSUM, None)
    if stored is not None and stored != _checksum(value):
        raise ValueError(f"{argument}: {file} is damaged or was edited (its checksum is not that of it); {remedy}")
    return value


def _checksum(value: Mapping[str, Any]) -> str:
    return f"{zlib.crc32(json.dumps(value, sort_keys=True).encode()):08x}"


def check_fields(
    found: Mapping[str, Any], fields: Mapping[str, type | tuple[type, ...]], path: Path, argument: str, remedy: str
) -> None:
    """Raise ValueError unless what was read from `path` has all these fields with values of these types."""
    for name, kind in fields.items():
        value = found.get(name)
        # JSON's true is no number
        if name not in found or not isinstance(value, kind) or (isinstance(value, bool) and kind is not bool):
            got = f"{name} {reprlib.repr(value)}" if name in found else f"no {name}"
            raise ValueError(f"{argument}: {path} has {got}, so it is not what fastkd wrote; {remedy}")


def changed_settings(path: Path, settings: Mapping[str, Any]) -> list[str]:
    """The names in `settings` whose values are not those of the JSON file `path`, sorted.

    Raises:
        ValueError: the file is damaged.
    """
    earlier = read_json(path, "output", "pass --start-over to forget it, or choose another --output")
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
