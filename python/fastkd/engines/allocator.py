"""Memory that a model frees after one layer and needs again for the next.

glibc hands large blocks back to the system, which gives them again page by page, each with a fault and filled with
zeros. Whether that happens depends on what else lies in memory; where it does, it costs a full model or a stream 8 to
20 % of its time.
"""

from __future__ import annotations

import ctypes

# of <malloc.h>
_M_TRIM_THRESHOLD, _M_MMAP_MAX = -1, -4


def keep_freed_memory(up_to: int = 2**30) -> bool:
    """Make glibc keep what this process frees for what it allocates next. The command `fastkd` does so when it starts.

    Args:
        up_to: bytes that it keeps at the end of its memory; below 2^31.

    Returns:
        Whether the C library of this process is glibc; of others nothing is asked.

    Raises:
        ValueError: `up_to` is out of range.
    """
    if not 0 <= up_to < 2**31:
        raise ValueError(f"up_to: got {up_to}, expected 0 to 2^31 - 1 bytes")
    try:
        process = ctypes.CDLL(None)
    except (OSError, TypeError):  # Windows has no library of the whole process
        return False
    if not hasattr(process, "gnu_get_libc_version"):
        return False
    return bool(process.mallopt(_M_TRIM_THRESHOLD, up_to) and process.mallopt(_M_MMAP_MAX, 0))
