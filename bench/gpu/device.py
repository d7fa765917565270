"""Whether this process's CUDA context still answers: some errors end it, and every later call repeats them."""

from __future__ import annotations

import gc
import sys
from typing import NoReturn


def why_dead() -> str | None:
    """The error that a synchronisation raises, or None where the context answers or there is none."""
    torch = sys.modules.get("torch")
    if torch is None or not torch.cuda.is_initialized():
        return None
    try:
        torch.cuda.synchronize()
        torch.cuda.current_stream().query()
    except Exception as error:
        return f"{type(error).__name__}: {' '.join(str(error).split())[:200]}"
    return None


def free_memory() -> None:
    """What a case that failed has left, so that one without memory costs no other."""
    gc.collect()
    torch = sys.modules.get("torch")
    if torch is not None and torch.cuda.is_initialized():
        torch.cuda.empty_cache()


def leave(why: str) -> NoReturn:
    """End this process at once: destructors of a dead context raise, hang or crash."""
    import os

    from gpu.children import DEAD_CONTEXT

    print(f"the CUDA context is dead, so this process ends: {why}", flush=True)
    sys.stderr.flush()
    os._exit(DEAD_CONTEXT)
