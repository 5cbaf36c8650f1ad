"""How tests wait for what comes by itself, in another thread, process or machine."""

import time
from collections.abc import Callable
from typing import TypeVar

T = TypeVar("T")


def until(condition: Callable[[], T], seconds: float = 120, every: float = 0.02) -> T:
    """What `condition` returns once that is true.

    Args:
        condition: Asked again and again.
        seconds: So long at most.
        every: Seconds between two times.

    Raises:
        AssertionError: It did not come to that.
    """
    ends = time.monotonic() + seconds
    while not (found := condition()):
        assert time.monotonic() < ends, f"it did not come to that within {seconds} s"
        time.sleep(every)
    return found
