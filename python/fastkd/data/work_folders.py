"""Folders in which a command works for long, and goes on where it stopped: empty at first, and its own from then on."""

from __future__ import annotations

import json
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path

from fastkd.data.files import holds_input, write_json
from fastkd.data.own_files import foreign_in_work, remove_own, temporary

MARK = "fastkd.json"
"""Says whose folder it is."""
_COMMAND = "command"


def check_work_folder(folder: Path, command: str, kept_from: Sequence[str] = ()) -> None:
    """Find out before any work whether `command` may work in a folder.

    Args:
        folder: absent, empty, or claimed before.
        command: without the word fastkd.
        kept_from: other commands whose folders it may go on with.

    Raises:
        FileExistsError: a file, or a folder with anything that none of these commands left.
    """
    if folder.exists() and not folder.is_dir():
        raise FileExistsError(f"output: {folder} is not a folder; choose another --output")
    if not folder.exists() or owner_of(folder) in (command, *kept_from):
        return
    found = [path for path in folder.iterdir() if temporary(path) is None]
    foreign = next((path.name for path in found if owner_of(path) not in kept_from), None)
    if foreign is not None:
        raise FileExistsError(
            f"output: {folder} holds {foreign}, which fastkd {command} did not leave there; choose another --output"
        )


def claim_folder(folder: Path, command: str, kept_from: Sequence[str] = ()) -> None:
    """Take a folder for what `command` leaves there, run after run; else as `check_work_folder`."""
    check_work_folder(folder, command, kept_from)
    if owner_of(folder) is None:
        write_json(folder / MARK, {_COMMAND: command})


def owner_of(folder: Path) -> str | None:
    """The command that claimed a folder; None where none did."""
    with suppress(OSError, ValueError, AttributeError):
        return json.loads((folder / MARK).read_text(encoding="utf-8")).get(_COMMAND)
    return None


def forget_folders(folders: Sequence[Path]) -> None:
    """Remove these of a claimed folder, to start over.

    Raises:
        FileExistsError: one of them holds a file that fastkd did not write; then none is removed.
        ValueError: one of them holds an input of the command; then none is removed.
    """
    for folder in folders:
        read = holds_input(folder)
        if read is not None:
            raise ValueError(f"output: {folder} would be removed, but {read} is an input; choose another --output")
        foreign = foreign_in_work(folder)
        if foreign is not None:
            raise FileExistsError(
                f"output: {folder} would be removed, but {foreign} is yours; move it away, or choose another --output"
            )
    for folder in folders:
        remove_own(folder)
