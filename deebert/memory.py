"""What the C library does with memory that a layer has freed.

Knows nothing of models.
"""

from __future__ import annotations

import ctypes

# Parameters of glibc's `mallopt`, from malloc.h.
_TRIM_THRESHOLD, _TOP_PAD, _MMAP_THRESHOLD = -1, -2, -3
LARGEST_KEPT_BYTES = 32 << 20
"""The most that glibc allows: a tensor as large, or larger, still comes as new pages each time."""
_MOST_KEPT_BYTES = 512 << 20
# What a thread's own arena grows by, and gives back as soon as it is empty unless less than the padding would be left.
_HEAP_BYTES = 64 << 20


def keep_freed_memory() -> bool:
    """Let freed memory stay with this process, for the next layer to use.

    By default glibc hands large blocks back to the kernel as soon as they are free, so that every layer's
    activations come as new pages, each one a page fault and zeroed before use: 1,700 a layer at 2,048 tokens
    of width 384. Process-wide, idempotent; at most `_MOST_KEPT_BYTES` lie idle in the main thread's memory, and
    whatever other threads had at their largest.

    Returns:
        Whether the C library knows how (glibc does); elsewhere nothing changes.
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is None:
        return False
    # Every call: all must be set, and each says 1 where it was understood.
    understood = (
        mallopt(_MMAP_THRESHOLD, LARGEST_KEPT_BYTES),
        mallopt(_TRIM_THRESHOLD, _MOST_KEPT_BYTES),
        mallopt(_TOP_PAD, _HEAP_BYTES),
    )
    return understood == (1, 1, 1)
