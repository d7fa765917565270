"""Files that torch.save wrote elsewhere, read without running code that they bring; damaged ones are told apart."""

from __future__ import annotations

import re
import warnings
import zipfile
from pathlib import Path
from typing import Any

import torch

_FOREIGN = re.compile(r"Unsupported (?:global: GLOBAL|class) ([\w.]+)")


def load_torch_file(path: Path, argument: str) -> Any:
    """What `path` holds, on the CPU.

    Args:
        path: a file that torch.save wrote, of either format.
        argument: what errors name.

    Raises:
        ValueError: the file is no PyTorch file, is damaged, or holds objects besides tensors and plain Python values.
            The format before torch 1.6 has no checksums, so there a damaged weight is just another weight.
        OSError: it cannot be opened.
    """
    with path.open("rb") as file:
        beginning = file.read(16)
    if not beginning.startswith((b"PK", b"\x80")):
        begins = f"begins with {beginning!r}" if beginning else "is empty"
        raise ValueError(f"{argument}: {path} is not a PyTorch file, it {begins}; download or copy the .bin file again")
    try:
        if beginning.startswith(b"PK"):
            _check_archive(path)
        with warnings.catch_warnings():
            # about the pickle protocol that a damaged byte names
            warnings.simplefilter("ignore")
            return torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # what a damaged pickle raises has no common class
        foreign = _FOREIGN.search(str(error))
        if foreign is None:
            raise ValueError(
                f"{argument}: {path} is cut short or damaged ({type(error).__name__}); copy or download it again"
            ) from error
        raise ValueError(
            f"{argument}: {path} holds an object of {foreign[1]} besides tensors. It could run code, so it is not "
            "read; save only the tensors where the model was trained: torch.save(model.state_dict(), FILE)"
        ) from error


def _check_archive(path: Path) -> None:
    """Raise zipfile.BadZipFile where a member of the archive is not what was written; torch.load does not look."""
    with zipfile.ZipFile(path) as archive:
        member = archive.testzip()
    if member is not None:
        raise zipfile.BadZipFile(member)
