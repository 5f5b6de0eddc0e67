"""Memory of programs that take and free the same megabytes over and over: a batch of training, a flush of the worker.

By default glibc gives such blocks back, and taking them again costs page faults: half of an epoch, and two thirds of packing a flush.
"""

from __future__ import annotations

import ctypes


def keep_freed_memory() -> None:
    """Tell glibc not to give freed memory back to the kernel."""
    m_trim_threshold, m_mmap_threshold = -1, -3
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (OSError, AttributeError):  # not glibc
        return
    mallopt(m_mmap_threshold, 1 << 30)
    mallopt(m_trim_threshold, 1 << 30)
