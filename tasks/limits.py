"""How much a run may ask of a provider, and how texts are cut into batches by it."""

from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Protocol

import numpy as np
import numpy.typing as npt
import pyarrow as pa

SLACK = 1 / 60
"""Part of a minute that two calls may come closer together on the way to the provider."""


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

    def with_margin(self, margin: float) -> "Limits":
        """The same, with so much of a call left free that an estimate may be off by `margin`."""
        if self.tokens_per_request is None:
            return self
        most = max(1, int(self.tokens_per_request / (1 + margin)))
        return replace(self, tokens_per_request=most)

    def wait(self, calls: Iterable[int]) -> tuple[float, str]:
        """How long calls of so many tokens each wait for the account's limits.

        A minute's quota goes out at once, so that a run within one waits for nothing.

        Returns:
            Seconds, and the limit that most of them come from; "" where there are none.
        """
        waits, requests, tokens = Counter[str](), 0, 0
        for size in calls:
            cause = ""
            if self.requests_per_minute and requests == self.requests_per_minute:
                cause = "requests per minute"
            elif self.tokens_per_minute and requests and tokens + size > self.tokens_per_minute:
                cause = "tokens per minute"
            if cause:
                waits[cause] += 1
                requests = tokens = 0
            requests, tokens = requests + 1, tokens + size
        seconds = 60 * (1 + SLACK) * waits.total()
        return seconds, max(waits, key=lambda cause: waits[cause], default="")


@dataclass(frozen=True)
class Learned:
    """Limits that a provider named itself; None where it did not."""

    requests_per_minute: int | None = None
    tokens_per_minute: int | None = None
    texts_per_request: int | None = None
    tokens_per_request: int | None = None


class Estimator(Protocol):
    """How many tokens a text has, as far as one can know without asking. A value: it pickles."""

    @property
    def margin(self) -> float:
        """How far the truth may lie above an estimate, relative to it; 0 where it is exact."""

    @property
    def measure(self) -> str:
        """Names what `sizes` are: while it stays the same, so do the sizes of a text."""

    def count(self, text: str) -> int:
        """Tokens of `text`, at least 1."""

    def counts(self, texts: Sequence[str]) -> npt.NDArray[np.int32]:
        """Tokens of each of `texts`, at least 1."""

    def sizes(self, texts: pa.Array) -> npt.NDArray[np.int32]:
        """What the tokens of each of `texts` follow from, a row of one or more numbers each."""

    def of_sizes(self, sizes: npt.NDArray[np.int32]) -> npt.NDArray[np.int32]:
        """The tokens that follow from `sizes`: what `counts` says of their texts."""


def tokens_of(estimate: Estimator, texts: pa.Array) -> npt.NDArray[np.int32]:
    """Tokens of each of `texts`, utf8, as `counts` says, but without a Python object for each."""
    return estimate.of_sizes(estimate.sizes(texts))


class Packer:
    """Fills batches in the order the texts come.

    No batch passes `limits`, but for a single text that is longer than one call takes:
    it goes alone, and the provider is asked.

    Attributes:
        limits: What one call takes; it may change while batches fill.
        batch: Number of the newest batch, from 1.
    """

    def __init__(self, limits: Limits) -> None:
        self.limits = limits
        self._texts = 0
        self._tokens = 0
        self.batch = 0

    def place(self, tokens: int) -> int:
        """The number of the batch, from 1, that takes the next text of so many tokens."""
        most = self.limits.tokens_per_request
        full = self._texts >= self.limits.texts_per_request or (
            most is not None and self._tokens + tokens > most
        )
        if self.batch == 0 or (full and self._texts):
            self.batch += 1
            self._texts = self._tokens = 0
        self._texts += 1
        self._tokens += tokens
        return self.batch
