"""Which rows the weights of a model have seen, as a file of hashes beside them."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path

import numpy as np
import safetensors.numpy

from fastkd.data.files import atomic_path
from fastkd.data.row_hashes import Hashes, count_shared

SEEN_ROWS = "training_rows.safetensors"


def save_seen_rows(seen: Mapping[str, Hashes], folder: str | os.PathLike[str]) -> None:
    """Write the hashes by their part in training ("finetune train"...) into a model folder; nothing where none are."""
    if not seen:
        return
    Path(folder).mkdir(parents=True, exist_ok=True)
    with atomic_path(Path(folder) / SEEN_ROWS) as temporary:
        safetensors.numpy.save_file({part: np.unique(hashes) for part, hashes in seen.items()}, temporary)


def load_seen_rows(folder: str | os.PathLike[str]) -> dict[str, Hashes]:
    """What `save_seen_rows` wrote; empty where it is not there.

    Raises:
        ValueError: a damaged file.
    """
    path = Path(folder) / SEEN_ROWS
    if not path.is_file():
        return {}
    try:
        return safetensors.numpy.load_file(path)
    except Exception as error:
        raise ValueError(
            f"{path} is damaged ({error}); copy the model again, or remove the file, and calibration will not know "
            "which rows training has seen"
        ) from error


def count_seen(seen: Mapping[str, Hashes], rows: Hashes) -> tuple[dict[str, int], int]:
    """How many of `rows` are in each part, and how many in any."""
    anywhere = np.concatenate(list(seen.values())) if seen else np.empty(0, np.int64)
    return {part: count_shared(rows, hashes) for part, hashes in seen.items()}, count_shared(rows, anywhere)
