"""Progress: how far a run is, for whoever listens in this process."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass


@dataclass(frozen=True)
class Progress:
    """Where a run is.

    Attributes:
        stage: "reading", "embedding", "waiting", "cancelling" or "publishing".
        done: Texts embedded so far.
        total: Texts to embed; 0 outside of embedding.
        note: What is waited for.
    """

    stage: str
    done: int = 0
    total: int = 0
    note: str = ""

    @property
    def percent(self) -> float:
        """0 to 100."""
        return 100 * self.done / self.total if self.total else 0.0


Listener = Callable[[Progress], None]

_listeners: list[Listener] = []


@contextmanager
def listening(listener: Listener) -> Iterator[None]:
    """Have `listener` called with each step of runs in this process."""
    _listeners.append(listener)
    try:
        yield
    finally:
        _listeners.remove(listener)


def tell(progress: Progress) -> None:
    """Tell all listeners."""
    for listener in _listeners:
        listener(progress)


def tell_waiting(note: str) -> None:
    """Tell all listeners what is waited for."""
    tell(Progress("waiting", note=note))
