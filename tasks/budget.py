"""The budget of a run: it stops before the call that would cost more."""

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import numpy as np
import numpy.typing as npt

Bill = Callable[[int], None]
"""Is told how many tokens a call was billed."""


class Budget:
    """What a run may still spend, at list price. Serves many threads.

    Calls in flight count as spent, by their estimates, until their bill is known.

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
        self._lock = threading.Lock()

    @property
    def tokens_left(self) -> int | None:
        """Tokens that may still be sent; None where there is no limit, or no price."""
        if self.max_usd is None or not self._usd_per_million_tokens:
            return None
        most = int(self.max_usd / self._usd_per_million_tokens * 1e6)
        with self._lock:
            return max(0, most - self._taken)

    def affords(self, counts: npt.NDArray[np.int32]) -> int:
        """How many texts of so many tokens each, from the first, it is enough for."""
        left = self.tokens_left
        if left is None:
            return len(counts)
        return int(np.searchsorted(np.cumsum(counts, dtype=np.int64), left, side="right"))

    @contextmanager
    def held(self, tokens: int) -> Iterator[Bill]:
        """Count a call of about so many tokens as spent; it yields who is told its bill."""
        self._take(tokens)
        bills = list[int]()

        def bill(billed: int) -> None:
            self._take(billed - tokens)
            bills.append(billed)

        try:
            yield bill
        finally:
            if not bills:  # it was never made
                self._take(-tokens)

    def _take(self, tokens: int) -> None:
        with self._lock:
            self._taken += tokens
