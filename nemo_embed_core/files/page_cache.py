"""What the kernel keeps of files in memory: is a file there, and how much memory could be had."""

from __future__ import annotations

import os
from pathlib import Path


def is_cached(fd: int) -> bool:
    """Whether the end of the file, which the reader of a header does not touch, is in the page cache."""
    try:
        return os.preadv(fd, [bytearray(1)], os.fstat(fd).st_size - 1, os.RWF_NOWAIT) == 1
    except OSError:  # it would have to wait, or the file system cannot say
        return False


def available_memory() -> int:
    """Bytes that can be had without swapping: free ones, and what the page cache would give back."""
    for line in Path("/proc/meminfo").read_text().splitlines():
        if line.startswith("MemAvailable:"):
            return int(line.split()[1]) * 1024
    return os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
