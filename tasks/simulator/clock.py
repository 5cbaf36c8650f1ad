"""Simulated time: real time, faster or slower, or moved by hand."""

import threading
import time


class Clock:
    """Seconds since the simulator started."""

    def __init__(self, *, manual: bool, scale: float) -> None:
        self._lock = threading.Lock()
        self._manual = manual
        self._scale = scale
        self._passed = 0.0
        self._since = time.monotonic()

    def now(self) -> float:
        """Simulated seconds."""
        with self._lock:
            return self._now()

    def advance(self, seconds: float) -> None:
        """Move on by `seconds`, whether manual or not.

        Raises:
            ValueError: `seconds` is negative.
        """
        if not seconds >= 0:
            raise ValueError(f"seconds must be 0 or more, found {seconds}.")
        with self._lock:
            self._passed += seconds

    def rescale(self, scale: float) -> None:
        """Let time run at another speed from now on."""
        with self._lock:
            self._passed, self._since = self._now(), time.monotonic()
            self._scale = scale

    def real(self, seconds: float) -> float:
        """The real seconds that simulated ones take. A manual clock is nothing to wait for."""
        return 0.0 if self._manual else seconds / self._scale

    def _now(self) -> float:
        if self._manual:
            return self._passed
        return self._passed + (time.monotonic() - self._since) * self._scale
