"""Output files and folders that are either whole or absent, and never take the place of what they must not.

A regular file is written under a temporary name and renamed; links are followed; pipes and devices are written to. A
folder is replaced only where fastkd wrote all of it. The next run removes what a killed one left, or puts it
back.
"""

from __future__ import annotations

import ctypes
import errno
import hashlib
import json
import os
import reprlib
import shutil
import socket
import stat
import tempfile
import zlib
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from contextvars import ContextVar
from pathlib import Path
from typing import Any

from fastkd.data.own_files import foreign_in_model, temporary

_CHECKSUM = "crc32"
MODEL_TYPE = "fastkd_early_exit"
"""What config.json of an early-exit model says."""
RUN_LOG = "trainer_log.json"
"""Every training leaves it in the folder of its model."""

_DATA_SUFFIXES = (".tsv", ".csv", ".jsonl", ".ndjson", ".parquet", ".txt", ".safetensors")
_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
# writers in Rust and C++ raise errors of their own, with these words in them
_FULL_WORDS = ("No space left on device", "Disk quota exceeded", "File too large", "PytorchStreamWriter failed")

_inputs: ContextVar[frozenset[tuple[int, int]]] = ContextVar("_inputs", default=frozenset())


# Inputs, which no output may replace


@contextmanager
def reading(*paths: str | os.PathLike[str]) -> Iterator[None]:
    """Inside, no output takes the place of one of these files, of the data in these folders, or of a folder that holds
    them; paths that do not exist are left out."""
    token = _inputs.set(_inputs.get() | {identity for path in paths for identity in _identities(Path(path))})
    try:
        yield
    finally:
        _inputs.reset(token)


def _identities(path: Path) -> Iterator[tuple[int, int]]:
    with suppress(OSError):
        found = path.stat()
        yield found.st_dev, found.st_ino
        if stat.S_ISDIR(found.st_mode):
            for file in path.iterdir():
                if file.suffix.lower() in _DATA_SUFFIXES:
                    yield from _identities(file)


def _is_input(path: Path) -> bool:
    with suppress(OSError):
        found = path.stat()
        return stat.S_ISREG(found.st_mode) and (found.st_dev, found.st_ino) in _inputs.get()
    return False


def check_output_file(path: str | os.PathLike[str]) -> None:
    """Find out before any work whether a file may be written.

    Raises:
        IsADirectoryError: it is a folder.
        NotADirectoryError: its folder is a file.
        ValueError: it is one of the files that are read, see `reading`.
    """
    target = Path(path)
    _check_parents(target)
    if target.is_dir():
        raise IsADirectoryError(f"output {target} is a folder; give the name of a file in it")
    if _is_input(target):
        raise ValueError(f"output: {target} is also an input, which would be lost; choose another name")


def _check_parents(target: Path) -> None:
    for parent in target.parents:
        if parent.exists():
            if parent.is_dir():
                return
            raise NotADirectoryError(
                f"output: {parent} is a file, so nothing can be written into it; choose another place for {target.name}"
            )


def is_special(path: str | os.PathLike[str]) -> bool:
    """Whether a path is a pipe, a device or an open file of this process: written to as it is, never replaced."""
    if os.path.abspath(path).startswith(("/dev/fd/", "/dev/std", "/proc/")):
        return True
    with suppress(OSError):
        mode = os.stat(path).st_mode
        return not stat.S_ISREG(mode) and not stat.S_ISDIR(mode)
    return False


# Files


@contextmanager
def atomic_path(path: str | os.PathLike[str]) -> Iterator[Path]:
    """Give a temporary path beside `path`; rename it to `path` if the block succeeds, delete it otherwise.

    The temporary name keeps the suffix of `path`, because many writers choose their format by it. Missing parent
    folders are made. What a link names is replaced, not the link; a pipe or a device gets the bytes at the end.

    Raises:
        IsADirectoryError: `path` is a folder.
        ValueError: `path` is one of the files that are read, see `reading`.
        OSError: the disk is full, whatever the writer raised.
    """
    check_output_file(path)
    with told_if_full(path):
        if is_special(path):
            with tempfile.TemporaryDirectory() as folder:
                temporary = Path(folder) / f"output{Path(path).suffix}"
                yield temporary
                with temporary.open("rb") as source, open(path, "wb") as special:
                    shutil.copyfileobj(source, special)
            return
        target = Path(os.path.realpath(path))
        target.parent.mkdir(parents=True, exist_ok=True)
        _clear(target.parent)
        handle, name = tempfile.mkstemp(prefix=_temporary_prefix(target.stem), suffix=target.suffix, dir=target.parent)
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


def is_disk_full(error: BaseException) -> bool:
    """Whether an error of any writer says that there is no room."""
    if isinstance(error, OSError) and error.errno in _FULL:
        return True
    return any(words in str(error) for words in _FULL_WORDS)


@contextmanager
def told_if_full(target: str | os.PathLike[str]) -> Iterator[None]:
    """Inside, whatever a writer of `target` raises where there is no room is an OSError that says so."""
    try:
        yield
    except Exception as error:
        if not is_disk_full(error):
            raise
        raise OSError(
            f"output: the disk is full, so {target} was not written; make room there and run the command again"
        ) from error


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
        raise ValueError(f"{argument}: {file} is damaged or not JSON ({error}); {remedy}") from error
    if not isinstance(value, dict):
        raise ValueError(f"{argument}: {file} holds a {type(value).__name__}, expected an object; {remedy}")
    stored = value.pop(_CHECKSUM, None)
    if stored is not None and stored != _checksum(value):
        raise ValueError(f"{argument}: {file} is damaged or was edited (its checksum does not match); {remedy}")
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


# Folders


def check_output_folder(folder: str | os.PathLike[str], *, overwrite: bool) -> None:
    """Find out before any work whether a folder may be made, or take the place of the one that is there.

    Raises:
        FileExistsError: something is there, and `overwrite` is False or fastkd did not write all of it.
        NotADirectoryError: what it would lie in is a file.
        ValueError: an input of the command, the working folder or the home folder would be lost.
    """
    target = Path(folder)
    _check_parents(target)
    restore(target)
    # even an empty one may be where the user stands
    if target.is_dir():
        _check_place(target)
    if not target.exists() or (target.is_dir() and not any(target.iterdir())):
        return
    if not overwrite:
        raise FileExistsError(f"output_dir: {target} already exists; choose another, or pass overwrite=True")
    _check_replaceable(target)


def _check_place(target: Path) -> None:
    place = target.resolve()
    for name, other in (("the folder you are in", Path.cwd()), ("your home folder", Path.home())):
        if other.resolve().is_relative_to(place):
            raise ValueError(f"output_dir: {target} is or holds {name}; choose a separate folder for the output")


def _check_replaceable(target: Path) -> None:
    _check_place(target)
    if not is_ours(target):
        raise FileExistsError(
            f"output_dir: {target} was not written by fastkd, so it is not replaced; choose another, or remove it "
            "yourself"
        )
    read = holds_input(target)
    if read is not None:
        raise ValueError(f"output_dir: {target} would be replaced, but {read} is an input; choose another output")
    foreign = foreign_in_model(target)
    if foreign is not None:
        what = f"the folder {foreign.name}" if foreign.is_dir() else foreign.name
        raise FileExistsError(
            f"output_dir: {target} holds {what}, which is yours and would be lost; move it away, or choose another "
            "output"
        )


def holds_input(folder: Path) -> Path | None:
    """What of a folder, the folder itself included, is an input, see `reading`; None where nothing is."""
    read = _inputs.get()
    return next((path for path in (folder, *folder.rglob("*")) if _identity(path) in read), None)


def _identity(path: Path) -> tuple[int, int] | None:
    with suppress(OSError):
        found = path.stat()
        return found.st_dev, found.st_ino
    return None


def is_ours(folder: Path) -> bool:
    """Whether fastkd wrote a model folder: with the log of a training or the configuration of an early-exit model."""
    for name, key, values in (
        (RUN_LOG, "stage", ("finetune", "distill", "kd")),
        ("config.json", "model_type", (MODEL_TYPE,)),
    ):
        with suppress(OSError, ValueError, AttributeError):
            if json.loads((folder / name).read_text(encoding="utf-8")).get(key) in values:
                return True
    return False


@contextmanager
def atomic_folder(target: Path) -> Iterator[Path]:
    """Give a temporary folder beside `target`; put it in its place if the block succeeds, delete it otherwise.

    A folder is under its name at every moment: old and new are exchanged in one step where the file system can. Where
    it cannot, `restore` puts the old one back after a kill between the two steps.

    Raises:
        FileExistsError, ValueError: as `check_output_folder` with `overwrite`.
        OSError: the disk is full, whatever the writer raised.
    """
    check_output_folder(target, overwrite=True)
    named, target = target, Path(os.path.realpath(target))
    target.parent.mkdir(parents=True, exist_ok=True)
    _clear(target.parent)
    holder = Path(tempfile.mkdtemp(prefix=_temporary_prefix(target.name), dir=target.parent))
    # mkdtemp makes its folder private; one made inside follows the user's umask
    fresh, replaced = holder / _FRESH, holder / _REPLACED
    try:
        with told_if_full(named):
            fresh.mkdir()
            yield fresh
        if target.exists():
            if _exchange(fresh, target):
                return
            target.rename(replaced)
        try:
            fresh.rename(target)
        except OSError:
            if replaced.exists():
                replaced.rename(target)
            raise
    finally:
        if replaced.exists() and not target.exists():
            replaced.rename(target)
        shutil.rmtree(holder, ignore_errors=True)


_FRESH, _REPLACED = "new", "old"


def _exchange(first: Path, second: Path) -> bool:
    """Exchange two names in one step; False where the system cannot."""
    here, exchange = -100, 2  # AT_FDCWD, RENAME_EXCHANGE
    try:
        rename = ctypes.CDLL(None, use_errno=True).renameat2
    except (OSError, AttributeError):
        return False
    return rename(here, os.fsencode(first), here, os.fsencode(second), exchange) == 0


# What killed runs leave


def _here() -> str:
    """This machine and its table of processes: a number of a process says something here alone."""
    table = ""
    with suppress(OSError):
        table = os.readlink("/proc/self/ns/pid")
    return hashlib.sha256(f"{socket.gethostname()}{table}".encode()).hexdigest()[:8]


def _temporary_prefix(name: str) -> str:
    return f".{name}-fastkd-{_here()}-{os.getpid()}-"


_cleared: set[tuple[int, Path]] = set()


def _left_in(folder: Path) -> Iterator[tuple[str, Path]]:
    """The temporaries in a folder whose process on this machine is gone, each with the name that it was for."""
    here = _here()
    for entry in list(folder.iterdir()):
        match = temporary(entry)
        if match and match["here"] == here and not _runs(int(match["process"])):
            yield match["name"], entry


def _runs(process: int) -> bool:
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return False
    except OSError:
        return True
    return True


def _clear(folder: Path) -> None:
    """Remove what killed runs left in a folder, once a process."""
    if (os.getpid(), folder) in _cleared:
        return
    _cleared.add((os.getpid(), folder))
    with suppress(OSError):
        for name, left in _left_in(folder):
            if left.is_dir() and not left.is_symlink():
                _put_back(left, folder / name)
                shutil.rmtree(left, ignore_errors=True)
            else:
                left.unlink(missing_ok=True)


def restore(target: str | os.PathLike[str]) -> None:
    """Put a folder back under its name, where a run was killed while it replaced it."""
    path = Path(os.path.realpath(target))
    if path.exists() or not path.parent.is_dir():
        return
    with suppress(OSError):
        for name, left in _left_in(path.parent):
            if name == path.name:
                _put_back(left, path)


def _put_back(left: Path, target: Path) -> None:
    if (left / _REPLACED).is_dir() and not target.exists():
        (left / _REPLACED).rename(target)
