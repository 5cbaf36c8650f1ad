"""Rate limits: what a key asked of a model in the last minute.

How the real service cuts its minutes is not documented, so both usual ways are here.
"""

import threading
from collections import deque
from dataclasses import dataclass
from typing import Literal

from tasks.catalog import Tier

MINUTE_S = 60.0

Kind = Literal["sliding", "fixed_minute"]


@dataclass(frozen=True)
class Exceeded:
    """Why a request is too much.

    Attributes:
        unit: Which limit it is.
        limit: How many of the unit a minute allows.
        used: How many of it were used in this minute before the request.
        wait_s: Simulated seconds until the same request would pass; the whole minute for
            one that never will.
    """

    unit: Literal["requests", "tokens"]
    limit: int
    used: int
    wait_s: float


class Minute:
    """The requests of the last minute, oldest first. Not safe between threads."""

    def __init__(self, kind: Kind = "sliding") -> None:
        self._kind = kind
        self._asked: deque[tuple[float, int]] = deque()
        self.requests = 0
        self.tokens = 0

    def add(self, now: float, tokens: int) -> None:
        """Take in one request."""
        self.forget(now)
        self._asked.append((now, tokens))
        self.requests += 1
        self.tokens += tokens

    def forget(self, now: float) -> None:
        """Drop what is no longer of this minute."""
        while self._asked and self._leaves(self._asked[0][0]) <= now:
            _, tokens = self._asked.popleft()
            self.requests -= 1
            self.tokens -= tokens

    def exceeded(self, now: float, limits: Tier, tokens: int) -> Exceeded | None:
        """Why a request of so many tokens cannot pass now; None where it can."""
        self.forget(now)
        found = _excess(limits, self.requests, self.tokens, tokens)
        if found is None:
            return None
        unit, limit, used = found
        return Exceeded(unit, limit, used, self._wait_s(now, limits, tokens))

    def _wait_s(self, now: float, limits: Tier, tokens: int) -> float:
        requests, used = self.requests, self.tokens
        for then, size in self._asked:
            requests, used = requests - 1, used - size
            if _excess(limits, requests, used, tokens) is None:
                return self._leaves(then) - now
        return MINUTE_S

    def _leaves(self, then: float) -> float:
        if self._kind == "sliding":
            return then + MINUTE_S
        return (then // MINUTE_S + 1) * MINUTE_S


class Windows:
    """A minute for each key and model."""

    def __init__(self, kind: Kind) -> None:
        self.kind = kind
        self._lock = threading.Lock()
        self._minutes: dict[tuple[str, str], Minute] = {}

    def admit(
        self,
        account: tuple[str, str],
        limits: Tier,
        tokens: int,
        now: float,
        *,
        count_rejected: bool,
    ) -> Exceeded | None:
        """Take in a request, or say why not.

        Args:
            account: Whose minute it is: key and model.
            limits: What that account may ask in a minute.
            tokens: Of the request.
            now: Simulated seconds.
            count_rejected: Whether a request that does not pass uses the limits up too.
        """
        if limits == Tier():
            return None
        with self._lock:
            minute = self._minutes.setdefault(account, Minute(self.kind))
            exceeded = minute.exceeded(now, limits, tokens)
            if exceeded is None or count_rejected:
                minute.add(now, tokens)
            return exceeded


def _excess(
    limits: Tier, requests: int, used: int, tokens: int
) -> tuple[Literal["requests", "tokens"], int, int] | None:
    """The limit that a request of `tokens` would pass, beside what is in the minute."""
    if limits.requests_per_minute is not None and requests + 1 > limits.requests_per_minute:
        return "requests", limits.requests_per_minute, requests
    if limits.tokens_per_minute is not None and used + tokens > limits.tokens_per_minute:
        return "tokens", limits.tokens_per_minute, used
    return None
