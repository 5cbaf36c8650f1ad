"""Aside: work in a thread of its own, out of reach of Ctrl-C and SIGTERM.

Python raises what a signal means between any two instructions of the main thread, also where
that has just taken the lock of a future or a condition. Such a lock is never released, and the
thread that brings the future its result waits for good. So whatever shares locks with other
threads is done aside, and the main thread waits by a bare lock that nobody else wants.
"""

import _thread
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import copy_context
from itertools import islice
from typing import Generic, TypeVar

T = TypeVar("T")

LOOK_S = 0.01
"""So often a bounded wait looks whether the work is done."""


class Aside(Generic[T]):
    """Work for a thread of its own. The thread starts when told to, or when waited for."""

    def __init__(self, work: Callable[[], T]) -> None:
        context = copy_context()
        self._work: Callable[[], T] = lambda: context.run(work)
        self._asked = self._prevented = False
        self._gate = threading.Lock()
        self._running = threading.Lock()
        self._running.acquire()
        self._value: T
        self._error: BaseException | None = None

    @property
    def ended(self) -> bool:
        """Whether it is done."""
        return not self._running.locked()

    def prevent(self) -> bool:
        """Keep it from beginning; False where it has begun."""
        if not self._prevented:
            self._prevented = self._gate.acquire(blocking=False)
        return self._prevented

    def start(self) -> None:
        """Begin, if it has not begun."""
        if not self._asked:
            self._asked = True
            # Thread.start() would wait for the new thread by a condition, see above.
            _thread.start_new_thread(self._run, ())

    def wait(self) -> None:
        """Wait until it is done. A signal may end the wait, but not the work."""
        self.start()
        # Not by acquire() and release(): between them a signal would leave it locked for good.
        with self._running:
            pass

    def wait_at_most(self, seconds: float) -> None:
        """Wait for what has begun, but no longer than so many seconds."""
        until = time.monotonic() + seconds
        while not self.ended and time.monotonic() < until:
            time.sleep(LOOK_S)

    def result(self) -> T:
        """What the work returned.

        Raises:
            BaseException: What the work raised, or what a signal means.
        """
        self.wait()
        if self._error is not None:
            raise self._error
        return self._value

    def _run(self) -> None:
        if not self._gate.acquire(blocking=False):
            return
        try:
            self._value = self._work()
        except BaseException as error:  # noqa: BLE001 - raised where the result is asked for
            self._error = error
        finally:
            self._running.release()


def out_of_reach(work: Callable[[], T]) -> T:
    """What `work` returns, done where no signal interrupts it."""
    if threading.current_thread() is not threading.main_thread():
        return work()
    return Aside(work).result()


def one_ahead(items: Iterator[T]) -> Iterator[T]:
    """`items`, each of them fetched while the one before is worked on."""

    def fetching() -> Aside[list[T]]:
        fetched = Aside(lambda: list(islice(items, 1)))
        fetched.start()
        return fetched

    coming = fetching()
    try:
        while found := coming.result():
            coming = fetching()
            yield found[0]
    finally:
        coming.wait()


@contextmanager
def meanwhile(work: Callable[[], None], every_s: float) -> Iterator[None]:
    """Do `work` again and again while the block runs; what it raised is raised at its end.

    Args:
        work: Done aside.
        every_s: Seconds before each time.
    """
    goes_on = threading.Lock()
    goes_on.acquire()

    def repeat() -> None:
        while not goes_on.acquire(timeout=every_s):
            work()

    along = Aside(repeat)
    try:
        along.start()
        yield
    finally:
        goes_on.release()
        along.wait()
    along.result()
