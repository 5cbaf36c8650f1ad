"""Turns: who of those that wait goes next, and the time in which they wait."""

import threading
import time
from collections import deque
from dataclasses import dataclass


class Clock:
    """The time (monotonic seconds), and something to wait for in it."""

    def now(self) -> float:
        """Seconds since some fixed moment."""
        return time.monotonic()

    def condition(self, lock: threading.Lock) -> threading.Condition:
        """What one thread waits for, up to so many seconds, and another notifies."""
        return threading.Condition(lock)


REAL = Clock()


@dataclass(eq=False)
class Ticket:
    """A call that waits for its turn.

    Attributes:
        number: Its place: the lowest goes first.
        tokens: What it wants to send.
        splittable: Whether it could be cut.
        since: When it came (seconds).
        wake: What it waits for.
        ask_at: When to ask for a shared quota again (seconds).
        reserved: Whether it holds a part of the shared quota.
    """

    number: int
    tokens: int
    splittable: bool
    since: float
    wake: threading.Condition
    ask_at: float = 0.0
    reserved: bool = False


class Turns:
    """Those that wait, in the order they came; whoever uses it holds `lock`."""

    def __init__(self, clock: Clock, lock: threading.Lock) -> None:
        self._clock, self._lock = clock, lock
        self._waiting: deque[Ticket] = deque()
        self._numbers = 0
        self._sent_back: dict[int, list[int]] = {}

    def join(self, tokens: int, *, splittable: bool) -> Ticket:
        """Wait from now on, at the place of before if the call was sent back."""
        if numbers := self._sent_back.get(tokens):
            number = numbers.pop(0)
        else:
            self._numbers += 1
            number = self._numbers
        wake = self._clock.condition(self._lock)
        ticket = Ticket(number, tokens, splittable, self._clock.now(), wake)
        self._waiting.insert(sum(1 for each in self._waiting if each.number < number), ticket)
        return ticket

    def first(self, ticket: Ticket) -> bool:
        """Whether it is the turn of `ticket`."""
        return self._waiting[0] is ticket

    def leave(self, ticket: Ticket) -> None:
        """Wait no longer."""
        self._waiting.remove(ticket)
        self.wake_first()

    def send_back(self, number: int, tokens: int) -> None:
        """Keep the place of a call that will come again: one of the same size gets it."""
        self._sent_back.setdefault(tokens, []).append(number)

    def wake_first(self) -> None:
        """Let the first look whether it may go."""
        if self._waiting:
            self._waiting[0].wake.notify_all()

    def wake_all(self) -> None:
        """Let all look whether they still have to wait."""
        for ticket in self._waiting:
            ticket.wake.notify_all()
