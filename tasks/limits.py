"""How much a run may ask of a provider, and the gate that keeps to it."""

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass


@dataclass(frozen=True)
class Limits:
    """What one account may ask of one model; None means no limit.

    Attributes:
        requests_per_minute: Calls a minute.
        tokens_per_minute: Tokens a minute over all calls.
        texts_per_request: Most texts in one call.
        tokens_per_request: Most tokens in one call.
        concurrency: Calls in flight at once.
    """

    requests_per_minute: int | None
    tokens_per_minute: int | None
    texts_per_request: int
    tokens_per_request: int | None
    concurrency: int

    def seconds_needed(self, calls: int, tokens: int) -> float:
        """The least time the account's limits allow for `calls` with `tokens` in all."""
        return 60 * max(self._minutes(calls, tokens).values())

    def binding(self, calls: int, tokens: int) -> str:
        """Which limit that time comes from; "" where none does."""
        minutes = self._minutes(calls, tokens)
        longest = max(minutes, key=lambda name: minutes[name])
        return longest if minutes[longest] else ""

    def _minutes(self, calls: int, tokens: int) -> dict[str, float]:
        return {
            "tokens per minute": tokens / self.tokens_per_minute if self.tokens_per_minute else 0.0,
            "requests per minute": (
                calls / self.requests_per_minute if self.requests_per_minute else 0.0
            ),
        }


class Packer:
    """Fills batches in the order the texts come.

    No batch passes `limits`, but for a single text that is longer than one call takes:
    it goes alone, and the provider is asked.
    """

    def __init__(self, limits: Limits) -> None:
        self._limits = limits
        self._texts = 0
        self._tokens = 0
        self.batch = 0

    def place(self, tokens: int) -> int:
        """The number of the batch, from 1, that takes the next text of so many tokens."""
        most = self._limits.tokens_per_request
        full = self._texts >= self._limits.texts_per_request or (
            most is not None and self._tokens + tokens > most
        )
        if self.batch == 0 or (full and self._texts):
            self.batch += 1
            self._texts = self._tokens = 0
        self._texts += 1
        self._tokens += tokens
        return self.batch


class Gate:
    """At most so many calls in flight at once. A slot is held only while sending."""

    def __init__(self, slots: int) -> None:
        self._slots = threading.BoundedSemaphore(slots)

    @contextmanager
    def slot(self) -> Iterator[None]:
        """Wait for a free slot and hold it."""
        with self._slots:
            yield


_gates: dict[tuple[str, int], Gate] = {}
_gates_lock = threading.Lock()


def gate(run_id: str, slots: int) -> Gate:
    """The gate that all tasks of this run in this process share."""
    with _gates_lock:
        return _gates.setdefault((run_id, slots), Gate(slots))
