"""Stamp: what tells that a file was not touched since, without reading it.

Device, inode, size, time of modification and time of change. A program may set the time of
modification back, but not the time of change.
"""

import os
import time

from tasks.keys import digest

FINE_NS = 100_000_000
"""A file that was touched so shortly ago may be touched again without a trace: most clocks of
file systems tick every few milliseconds."""
COARSE_NS = 3_000_000_000
"""The same where a file system counts in steps of a second, or of two."""
SECOND_NS = 1_000_000_000


def stamp_of(path: str) -> bytes | None:
    """16 bytes that change whenever the file at `path`, or what a link there leads to, does.

    Taken before the file is read. None where a later change could go unseen, and where there is
    no file to be seen.
    """
    now = time.time_ns()
    try:
        found = os.stat(path)  # noqa: PTH116 - a Path costs as much again
    except OSError:
        return None
    times = (found.st_mtime_ns, found.st_ctime_ns)
    coarse = not any(each % SECOND_NS for each in times)
    if max(times) > now - (COARSE_NS if coarse else FINE_NS):
        return None
    seen = (found.st_dev, found.st_ino, found.st_size, *times)
    return digest(" ".join(map(str, seen)).encode())
