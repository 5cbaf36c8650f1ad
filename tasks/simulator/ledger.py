"""What was asked, answered and billed. It holds no key and no text, only their hashes."""

import threading
from collections import Counter, deque
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from hashlib import sha256
from typing import Any, Literal

from tasks.simulator.tokens import utf8
from tasks.simulator.window import Minute

_SHA256_BYTES = 32
_MOST_HASHES = 1_000_000
# Eight bytes tell ten million texts apart but for one chance in a hundred thousand.
_SHORT = 8

Space = tuple[str, str | None, int, str]


@dataclass(frozen=True, slots=True)
class Record:
    """One request for embeddings, or one line of a job that was answered.

    Attributes:
        ordinal: Number of the request, from 1 since the last reset; 0 for a line.
        t: Simulated seconds at its arrival.
        key: Hash of the key; "" without one.
        model: Name in the request; "" where it could not be read.
        input_type: As asked for.
        dimension: Length of the vectors; 0 where it did not come to that.
        dtype: Of the vectors; "" where it did not come to that.
        n_texts: Texts in the request.
        tokens: What they count after truncation; 0 where it did not come to that.
        billed_tokens: What was charged.
        status: Of the answer; None where the connection ended without one.
        fault: The action of the rule that had it.
        request_id: The header of the same name.
        connection: Number of the connection, from 1.
        hashes: SHA-256 of each text, one after the other.
        lane: realtime, or batch for a line of a job.
    """

    ordinal: int
    t: float
    key: str
    model: str
    input_type: str | None
    dimension: int
    dtype: str
    n_texts: int
    tokens: int
    billed_tokens: int
    status: int | None
    fault: str | None
    request_id: str
    connection: int
    hashes: bytes
    lane: Literal["realtime", "batch"] = "realtime"

    @property
    def text_hashes(self) -> list[str]:
        """SHA-256 of each text, in hexadecimal."""
        starts = range(0, len(self.hashes), _SHA256_BYTES)
        return [self.hashes[start : start + _SHA256_BYTES].hex() for start in starts]

    def as_json(self) -> dict[str, Any]:
        """All of it, hashes in hexadecimal."""
        return {**asdict(self), "hashes": self.text_hashes}


def hash_key(key: str) -> str:
    """What the ledger shows for a key."""
    return sha256(utf8(key)).hexdigest()[:16] if key else ""


def hash_texts(texts: Sequence[str]) -> bytes:
    """SHA-256 of each text, one after the other."""
    return b"".join(sha256(utf8(text)).digest() for text in texts)


class Ledger:
    """Thread-safe. The last requests are kept, the totals cover all since the last reset.

    Attributes:
        arrivals: Requests that came, those in flight among them; the totals count answered ones.
    """

    def __init__(self, keep_requests: int) -> None:
        self._lock = threading.Lock()
        self._in_flight = 0
        self._accepted = self._open = 0
        self._keep = keep_requests
        self._clear()

    def _clear(self) -> None:
        self._records: deque[Record] = deque()
        self._hashes = 0
        self.arrivals = self._calls = self._ok = 0
        self._usd = 0.0
        self._jobs = self._lines = self._line_tokens = 0
        self._line_usd = 0.0
        self._billed: Counter[str] = Counter()
        self._statuses: Counter[str] = Counter()
        self._paid: dict[Space, tuple[set[bytes], set[bytes]]] = {}
        self._max_in_flight = self._in_flight
        self._connections = self._open
        self._requests, self._tokens = Minute(), Minute()
        self._peak_requests = self._peak_tokens = 0

    @property
    def requests(self) -> list[Record]:
        """The last requests, in the order they were answered."""
        with self._lock:
            return list(self._records)

    def totals(self) -> dict[str, Any]:
        """The sums, as `GET /_sim/ledger` gives them."""
        with self._lock:
            once = [texts for texts, _ in self._paid.values()]
            distinct = len(once[0]) if len(once) == 1 else len(set().union(*once))
            return {
                "calls": self._calls,
                "ok": self._ok,
                "billed_tokens": sum(self._billed.values()),
                "usd": self._usd,
                "billed_by_model": dict(self._billed),
                "batch_jobs": self._jobs,
                "batch_lines": self._lines,
                "batch_tokens": self._line_tokens,
                "batch_usd": self._line_usd,
                "distinct_texts": distinct,
                "texts_billed_again": sum(len(again) for _, again in self._paid.values()),
                "max_concurrency": self._max_in_flight,
                "connections": self._connections,
                "peak_requests_per_minute": self._peak_requests,
                "peak_tokens_per_minute": self._peak_tokens,
                "statuses": dict(sorted(self._statuses.items())),
            }

    def connected(self) -> int:
        """A connection was accepted; its number."""
        with self._lock:
            self._accepted += 1
            self._open += 1
            self._connections += 1
            return self._accepted

    def disconnected(self) -> None:
        """A connection ended."""
        with self._lock:
            self._open -= 1

    def arrived(self, now: float) -> tuple[int, int]:
        """A request came: its number, and how many are in flight with it."""
        with self._lock:
            self.arrivals += 1
            self._in_flight += 1
            self._max_in_flight = max(self._max_in_flight, self._in_flight)
            self._requests.add(now, 0)
            self._peak_requests = max(self._peak_requests, self._requests.requests)
            return self.arrivals, self._in_flight

    def counted(self, now: float, tokens: int) -> None:
        """A request reached the rate limit with so many tokens."""
        with self._lock:
            self._tokens.add(now, tokens)
            self._peak_tokens = max(self._peak_tokens, self._tokens.tokens)

    def record(self, record: Record, *, ok: bool, usd: float) -> None:
        """A request is about to be answered."""
        with self._lock:
            self._calls += 1
            self._ok += ok
            self._statuses["none" if record.status is None else str(record.status)] += 1
            self._enter(record, usd)

    def job(self) -> None:
        """A job was created."""
        with self._lock:
            self._jobs += 1

    def line(self, record: Record, usd: float) -> None:
        """A line of a job was answered; it counts as no call."""
        with self._lock:
            self._lines += 1
            self._line_tokens += record.billed_tokens
            self._line_usd += usd
            self._enter(record, usd)

    def _enter(self, record: Record, usd: float) -> None:
        if record.billed_tokens:
            self._billed[record.model] += record.billed_tokens
            self._usd += usd
            self._pay(record)
        self._records.append(record)
        self._hashes += len(record.hashes) // _SHA256_BYTES
        while len(self._records) > self._keep or self._hashes > _MOST_HASHES:
            self._hashes -= len(self._records.popleft().hashes) // _SHA256_BYTES

    def left(self) -> None:
        """A request is no longer in flight."""
        with self._lock:
            self._in_flight -= 1

    def keep(self, requests: int) -> None:
        """Keep so many requests from now on."""
        with self._lock:
            self._keep = requests

    def reset(self) -> None:
        """Forget all requests. What is in flight or connected stays so, and counts anew."""
        with self._lock:
            self._clear()

    def _pay(self, record: Record) -> None:
        """Note each text that was billed; again, where it was billed in this space before."""
        space = (record.model, record.input_type, record.dimension, record.dtype)
        texts, again = self._paid.setdefault(space, (set(), set()))
        for start in range(0, len(record.hashes), _SHA256_BYTES):
            text = record.hashes[start : start + _SHORT]
            (again if text in texts else texts).add(text)
