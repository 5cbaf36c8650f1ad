"""How many calls may be in flight at once: as many as help, and no more."""

import math
from dataclasses import dataclass

PATIENCE = 8
"""Successes for each step above the number of calls that was once too many."""

MOST_PATIENCE = 2048

ENOUGH = 8
"""Calls to have seen at a number of calls in flight before it is judged."""

FEWEST = 3
"""Calls to have seen at the number that it is compared with."""

BURST = 3
"""Calls in a row without an answer that halve the number of calls in flight.

So few are chance no more: where each seventh call fails, three in a row are one in 300.
"""


@dataclass(slots=True)
class _Seen:
    """Calls that were answered; old ones fade: what counts is how the provider is now."""

    calls: int = 0
    weight: float = 0.0
    tokens: float = 0.0
    seconds: float = 0.0

    def add(self, tokens: int, seconds: float) -> None:
        self.calls += 1
        self.weight = 0.9 * self.weight + 1
        self.tokens = 0.9 * self.tokens + tokens
        self.seconds = 0.9 * self.seconds + seconds

    def alike(self, other: "_Seen") -> bool:
        """Whether the calls are of about one size: only then do their speeds compare."""
        one, two = self.tokens * other.weight, other.tokens * self.weight
        return min(self.seconds, one, two) > 0 and max(one, two) < 2 * min(one, two)


class Slots:
    """Slots for calls in flight.

    There is one at first, so that a wrong key costs one call; each success while a call
    waits for a slot, and not for the quota, opens one more, up to `most`. Above the number
    that was once too many the steps are rare.
    """

    def __init__(self, most: int, now: float = 0.0) -> None:
        self.limit = 1
        self.in_flight = 0
        self.peak = 0
        self.in_flight_seconds = 0.0
        self.slot_seconds = 0.0
        self._most = most
        self._easy = most
        self._patience = PATIENCE
        self._steps = 0
        self._wanted = False
        self._busy = 0
        self._cut_at = now - 1
        self._ticked_at = now
        self._started = False
        self._speeds: dict[int, _Seen] = {}

    def free(self) -> bool:
        """Whether one more call may be in flight; asked only by a call that could go."""
        if self.in_flight < self.limit:
            return True
        self._wanted = True
        return False

    def take(self, now: float) -> int:
        """Hold a slot; the number of calls in flight with this one."""
        self.tick(now)
        self._started = True
        self.in_flight += 1
        self.peak = max(self.peak, self.in_flight)
        return self.in_flight

    def release(self, now: float) -> None:
        """Give a slot back."""
        self.tick(now)
        self.in_flight -= 1

    def tick(self, now: float) -> None:
        """Count the time since the last tick; the time before the first call does not count."""
        if self._started:
            self.in_flight_seconds += self.in_flight * (now - self._ticked_at)
            self.slot_seconds += self.limit * (now - self._ticked_at)
        self._ticked_at = now

    def answered(self, now: float, sent_at: float, at_once: int, tokens: int) -> None:
        """Take in an answer to a call that was sent as one of `at_once`."""
        self._busy = 0
        seen = self._speeds.setdefault(at_once, _Seen())
        seen.add(tokens, now - sent_at)
        if at_once == self.limit and self._useful(at_once) < at_once:
            self._cut(now, self._useful(at_once))
        elif self._wanted and self.limit < self._most:
            self._wanted = False
            self._steps += 1
            if self.limit < self._easy or self._steps >= self._patience:
                self.limit, self._steps = self.limit + 1, 0

    def too_many(self, now: float, sent_at: float, at_once: int) -> None:
        """Take in that the provider refused a call because `at_once` were in flight."""
        if sent_at > self._cut_at:
            self._cut(now, at_once - 1)

    def busy(self, now: float, sent_at: float) -> None:
        """Take in that the provider did not answer; several times in a row halves the calls."""
        if sent_at > self._cut_at:
            self._busy += 1
            if self._busy >= BURST and self.limit > 1:
                self._cut(now, self.limit // 2)

    def _cut(self, now: float, limit: int) -> None:
        # A second cut soon after a step above the mark: the mark holds, look there less often.
        above = self.limit > self._easy
        self._patience = min(self._patience * 4, MOST_PATIENCE) if above else PATIENCE
        self.limit = self._easy = max(1, min(limit, self.limit))
        self._steps = self._busy = 0
        self._cut_at = now
        self._speeds = {level: seen for level, seen in self._speeds.items() if level <= self.limit}

    def _useful(self, at_once: int) -> int:
        """How many of `at_once` calls the provider really worked on at once.

        Fewer than there are, by how much slower it was than with a quarter of them: the
        rest only waited. Less than a factor of two may be noise.
        """
        few, now = _Seen(), self._speeds[at_once]
        for level, seen in self._speeds.items():
            if level <= at_once // 4:
                few.calls, few.weight = few.calls + seen.calls, few.weight + seen.weight
                few.tokens, few.seconds = few.tokens + seen.tokens, few.seconds + seen.seconds
        if few.calls < FEWEST or now.calls < ENOUGH or not now.alike(few):
            return at_once
        useful = at_once * (now.tokens / now.seconds) * (few.seconds / few.tokens)
        return math.ceil(1.5 * useful) if 2 * useful < at_once else at_once
