"""The budget of a run: it stops before the call that would cost more."""

import math
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import numpy as np
import numpy.typing as npt

from tasks.errors import ProviderBusy, ProviderError

Bill = Callable[[int], None]
"""Is told how many tokens a call was billed."""

MOST_DECIMALS = 12
LOOK_S = 0.5
"""So often a call that waits for the bill of another one looks whether the run goes on."""


def usd_text(usd: float, beside: float | None = None) -> str:
    """A price with four decimals, or as many as show what it is: $1.2500, $0.000020.

    Args:
        usd: The price.
        beside: Another one that it is compared with; it gets as many as tell the two apart.
    """
    decimals = 4 if usd <= 0 else max(4, 1 - math.floor(math.log10(usd)))
    while beside not in {None, usd} and decimals < MOST_DECIMALS:
        if f"{usd:.{decimals}f}" != f"{beside:.{decimals}f}":
            break
        decimals += 1
    return f"${usd:,.{decimals}f}"


def may_be_charged(error: ProviderError) -> bool:
    """Whether a call that ended so may stand on the bill: it was sent, and no reply came."""
    return type(error) is ProviderBusy and "status" not in error.facts


class Budget:
    """What a run may still spend, at list price. Serves many threads.

    Calls in flight count as spent, by their estimates, until their bill is known; so does a call
    whose answer was lost, as it may have been charged.

    Attributes:
        max_usd: Most that the run may cost; None: no limit.

    Args:
        max_usd: As the attribute.
        usd_per_million_tokens: List price.
    """

    def __init__(self, max_usd: float | None, usd_per_million_tokens: float) -> None:
        self.max_usd = max_usd
        self._usd_per_million_tokens = usd_per_million_tokens
        self._taken = 0
        self._in_flight = 0
        self._changed = threading.Condition()

    @property
    def told(self) -> str:
        """The most it may cost, for people."""
        return usd_text(self.max_usd or 0.0)

    @property
    def tokens_left(self) -> int | None:
        """Tokens that may still be sent; None where there is no limit, or no price."""
        if self.max_usd is None or not self._usd_per_million_tokens:
            return None
        most = int(self.max_usd / self._usd_per_million_tokens * 1e6)
        with self._changed:
            return max(0, most - self._taken)

    def affords(self, tokens: npt.NDArray[np.float64]) -> int:
        """How many texts of so many tokens each, from the first, it is enough for."""
        left = self.tokens_left
        if left is None:
            return len(tokens)
        return int(np.searchsorted(np.cumsum(tokens), left, side="right"))

    @contextmanager
    def held(self, tokens: int) -> Iterator[Bill]:
        """Count a call of about so many tokens as spent; it yields who is told its bill."""
        self._take(tokens, calls=1)
        bills = list[int]()

        def bill(billed: int) -> None:
            bills.append(billed)
            self._take(billed - tokens, calls=-1)

        try:
            yield bill
        finally:
            if not bills:  # it was never made
                self._take(-tokens, calls=-1)

    def wait_for_a_bill(self) -> bool:
        """Wait a while for calls in flight, which may cost less than is held for them.

        Returns:
            False where there are none.
        """
        with self._changed:
            if not self._in_flight:
                return False
            self._changed.wait(LOOK_S)
            return True

    def _take(self, tokens: int, calls: int) -> None:
        with self._changed:
            self._taken += tokens
            self._in_flight += calls
            self._changed.notify_all()
