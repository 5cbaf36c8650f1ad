"""Timeline: what the calls of a run tell over time, in parts whose number they do not change."""

from collections.abc import Sequence
from dataclasses import dataclass
from datetime import datetime
from typing import Literal

import numpy as np
import numpy.typing as npt

from tasks.errors import ProviderThrottled
from tasks.notes import Call

PARTS = 120
"""Into so many parts the time of a run is cut."""
MINUTE_S = 60.0

Numbers = npt.NDArray[np.float64]
Measure = Literal["tokens", "requests"]


@dataclass(frozen=True)
class Latencies:
    """How long good calls took, in milliseconds, by the part in which they were sent.

    Attributes:
        at: Middle of each part that has any, in seconds.
        least: Of the calls of the part.
        median: As above.
        most: As above.
    """

    at: Numbers
    least: Numbers
    median: Numbers
    most: Numbers


@dataclass(frozen=True)
class Timeline:
    """The calls of a run over time; arrays hold one number a call, in the order of sending.

    Attributes:
        sent: Seconds from the first call to this one.
        took: Seconds to the end of its answer.
        tokens: Tokens of the texts it embedded, as billed; 0 where it brought no vectors.
        ok: Whether it brought vectors.
        throttled: Whether it was refused because of the account's limits.
    """

    sent: Numbers
    took: Numbers
    tokens: Numbers
    ok: npt.NDArray[np.bool_]
    throttled: npt.NDArray[np.bool_]

    @classmethod
    def of(cls, calls: Sequence[Call]) -> "Timeline":
        """The timeline of `calls`, at least one, in any order."""
        started = np.array([datetime.fromisoformat(call.started_at).timestamp() for call in calls])
        order = np.argsort(started, kind="stable")
        # An answer may say 0 although tokens were used: then our own count stands.
        tokens = [
            (call.tokens_billed or call.tokens_estimated) if call.status == "ok" else 0
            for call in calls
        ]
        ended = np.array([call.status for call in calls])[order]
        return cls(
            sent=(started - started.min())[order],
            took=np.array([call.seconds for call in calls], float)[order],
            tokens=np.array(tokens, float)[order],
            ok=ended == "ok",
            throttled=ended == ProviderThrottled.__name__,
        )

    @property
    def seconds(self) -> float:
        """From the first call to the last answer."""
        return float(np.max(self.sent + self.took))

    @property
    def edges(self) -> Numbers:
        """Where the parts begin and end, in seconds."""
        return np.linspace(0.0, self.seconds, PARTS + 1)

    def tokens_per_second(self) -> Numbers:
        """Tokens a second in each part; those of a call are spread over the time it took."""
        edges, done = self.edges, np.zeros(PARTS + 1)
        took = np.maximum(self.took, 1e-9)
        for at, edge in enumerate(edges):
            done[at] = np.sum(self.tokens * np.clip((edge - self.sent) / took, 0.0, 1.0))
        return np.diff(done) / np.diff(edges)

    def latencies(self) -> Latencies:
        """How long the good calls took, by part."""
        parts, took = self._parts()[self.ok], 1000 * self.took[self.ok]
        found = [(part, took[parts == part]) for part in np.unique(parts)]
        return Latencies(
            at=np.array([(part + 0.5) * self.seconds / PARTS for part, _ in found]),
            least=np.array([each.min() for _, each in found]),
            median=np.array([np.median(each) for _, each in found]),
            most=np.array([each.max() for _, each in found]),
        )

    def last_minute(self, measure: Measure) -> Numbers:
        """The most that a minute held that ends in this part, for each part."""
        amounts = self.tokens if measure == "tokens" else np.ones(len(self.sent))
        sums = np.concatenate([[0.0], np.cumsum(amounts)])

        def held(ends: Numbers) -> Numbers:
            before = np.searchsorted(self.sent, ends - MINUTE_S, side="right")
            held: Numbers = sums[np.searchsorted(self.sent, ends, side="right")] - sums[before]
            return held

        most = held(self.edges[:-1])
        np.maximum.at(most, self._parts(), held(self.sent))
        return most

    def throttled_at(self) -> Numbers:
        """Middle of each part in which a call was throttled, in seconds."""
        parts = np.unique(self._parts()[self.throttled])
        return (parts + 0.5) * self.seconds / PARTS

    def _parts(self) -> npt.NDArray[np.int64]:
        """The part in which each call was sent."""
        parts = self.sent / self.seconds * PARTS
        return np.minimum(parts.astype(np.int64), PARTS - 1)
