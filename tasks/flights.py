"""Flights: texts on their way to a provider, each of them once, whoever waits for it.

Each batch is one flight on a bounded pool of threads; questions take turns, so that a text
somebody waits for does not stand behind a whole import. Answers are durable in the journal when
a flight has landed, and are folded into the cache in groups.
"""

import itertools
import threading
from collections import OrderedDict, deque
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from pathlib import Path

import pyarrow as pa

from tasks.cache import Cache
from tasks.claims import take_up
from tasks.embed import embed_with_retries
from tasks.errors import RunStopped, StorageFailed
from tasks.journal import StoredAnswer, fold
from tasks.keys import hash_column
from tasks.memory import most_texts
from tasks.notes import Call, Refused
from tasks.pack import cut
from tasks.providers import Vectors
from tasks.schemas import BATCH, Batch
from tasks.sender import Terms, forget_sender, sender_of
from tasks.soundness import numbers

FOLD_BYTES = 64 * 2**20
"""Vectors are folded into the cache in groups of about so many bytes."""
ENTRY_BYTES = 220
"""What Python takes for a vector that has landed, beside its numbers."""


@dataclass(frozen=True)
class Landed:
    """What became of a batch.

    Attributes:
        vectors: By text_hash.
        elsewhere: text_hash of those that another run has paid for.
        refused: Texts that no call will embed, by hash.
        calls: All that were made for it.
        error: Why the rest of it has no vectors.
    """

    vectors: Mapping[bytes, Vectors] = field(repr=False)
    elsewhere: frozenset[bytes] = frozenset()
    refused: Mapping[bytes, Refused] = field(default_factory=dict)
    calls: Sequence[Call] = ()
    error: Exception | None = None


Flight = Future[Landed]


@dataclass(frozen=True)
class TakenOff:
    """Where texts are that are not in the cache.

    Attributes:
        landed: Vectors that may not be in the cache yet, by hash.
        flights: The hashes of the other texts, by flight.
        ours: The flights that began for this question, and not for another one.
    """

    landed: dict[bytes, Vectors]
    flights: dict[Flight, list[bytes]]
    ours: frozenset[Flight]


class Flights:
    """All flights of one run. Serves many threads.

    Attributes:
        sender: Who sends.
        landed: Vectors by text_hash that may not be in the cache yet.
        failed: Why nothing more can be kept, so that nothing more is sent.

    Args:
        terms: What all batches of the run share.
        cache: Vectors known.
        retries: So often a batch is tried again.
        made: Is told of all calls.
        memory_bytes: What all flights together may hold; None: no limit.
    """

    def __init__(
        self,
        terms: Terms,
        cache: Cache,
        retries: int,
        made: Callable[[Sequence[Call]], None],
        memory_bytes: int | None = None,
    ) -> None:
        self.sender = sender_of(terms, cache)
        self.sender.arrived = self._arrived
        self.landed: dict[bytes, Vectors] = {}
        self.failed: Exception | None = None
        self._terms, self._cache, self._retries, self._made = terms, cache, retries, made
        self._concurrency = terms.provider.limits.concurrency
        self._memory_bytes = memory_bytes
        self._vector_bytes = terms.provider.space.vector_bytes
        # The limiter bounds the calls; while one thread takes in an answer, another one sends.
        self._pool = ThreadPoolExecutor(2 * self._concurrency, thread_name_prefix="embed")
        self._numbers = itertools.count(1)
        self._lock = threading.Lock()
        self._flying: dict[bytes, Flight] = {}
        self._waiting: OrderedDict[int, deque[tuple[Flight, pa.Table]]] = OrderedDict()
        self._brought: dict[int, list[StoredAnswer]] = {}
        self._unfolded: list[StoredAnswer] = []
        self._folding = threading.Lock()

    def take_off(self, texts: Mapping[bytes, str]) -> TakenOff:
        """See that each of these texts, given by its hash, is on its way once."""
        hashes = hash_column(list(texts))
        column = pa.array(texts.values(), pa.utf8())
        columns = [hashes, column, pa.array(self.sender.counts(column), pa.int32())]
        rows = pa.Table.from_arrays(columns, schema=BATCH)
        flights: dict[Flight, list[bytes]] = {}
        with self._lock:  # a text moves on from flying to landed to cached, and overlaps
            landed = {each: self.landed[each] for each in texts if each in self.landed}
            for each in texts:
                if each in self._flying and each not in landed:
                    flights.setdefault(self._flying[each], []).append(each)
            there = [each in landed or each in self._flying for each in texts]
            new = ~self._cache.holds(hashes) & ~pa.array(there, pa.bool_()).to_numpy(False)
            ours = self._queued(rows.filter(pa.array(new)))
        for _ in ours:
            self._pool.submit(self._fly_next)
        return TakenOff(landed, flights | ours, frozenset(ours))

    def give_up(self, flights: Iterable[Flight]) -> None:
        """Do not begin those that have not begun; who else waits for them is told."""
        with self._lock:
            for flight in flights:
                if flight.cancel():
                    flight.set_running_or_notify_cancel()
            for queue in self._waiting.values():
                for flight, rows in list(queue):
                    if flight.cancelled():
                        queue.remove((flight, rows))
                        self._forget(rows)

    def close(self) -> None:
        """Fold all that has landed; nothing flies any more.

        Raises:
            EmbedOnceError: The cache cannot be written; the answers stay in the journal.
        """
        try:
            with self._folding:
                fold(self._terms.folder, self._cache)
            self.sender.save()
        finally:
            forget_sender(self._terms.folder)

    def join(self) -> None:
        """Wait for what flies; nothing takes off any more."""
        self._pool.shutdown()

    def most_texts(self, texts: int, characters: int) -> int:
        """How many of such texts one flight may hold, by memory and by what a call takes."""
        most = self._terms.provider.limits.texts_per_request
        if self._memory_bytes is None or not texts:
            return most
        # Half of it is for what has landed and for what waits.
        share = self._memory_bytes // 2 // self._concurrency
        return min(most, most_texts(share, texts, characters, self._vector_bytes))

    def _queued(self, rows: pa.Table) -> dict[Flight, list[bytes]]:
        """New flights for the texts of a question, which wait for their turn."""
        if not rows.num_rows:
            return {}
        most = self.most_texts(rows.num_rows, rows.column("text").nbytes)
        limits = self.sender.request_limits()
        limits = replace(limits, texts_per_request=min(limits.texts_per_request, most))
        queue = deque((Flight(), part) for part in cut(rows, limits))
        flights = {flight: part.column("text_hash").to_pylist() for flight, part in queue}
        for flight, hashes in flights.items():
            self._flying |= dict.fromkeys(hashes, flight)
        self._waiting[next(self._numbers)] = queue
        return flights

    def _next(self) -> tuple[Flight, pa.Table] | None:
        """The next flight of the question whose turn it is; None where it was given up."""
        with self._lock:
            while self._waiting:
                question, queue = self._waiting.popitem(last=False)
                if not queue:
                    continue
                flight, rows = queue.popleft()
                self._waiting[question] = queue
                if flight.set_running_or_notify_cancel():
                    return flight, rows
        return None

    def _fly_next(self) -> None:
        if (found := self._next()) is None:
            return
        flight, rows = found
        landed = self._fly(next(self._numbers), rows)
        self._made(landed.calls)
        with self._lock:
            self._forget(rows)
        flight.set_result(landed)
        try:
            self._fold_if_due()
        except Exception as error:  # noqa: BLE001 - raised by whatever is asked from now on
            self._fail(error)

    def _forget(self, rows: pa.Table) -> None:
        for each in rows.column("text_hash").to_pylist():
            self._flying.pop(each, None)

    def _fly(self, number: int, rows: pa.Table) -> Landed:
        """Embed a batch; an error is part of what became of it."""
        try:
            batch = Batch.write(number, self._terms.folder.staging, rows.to_batches())
            landed = self._embedded(batch)
            Path(batch.table.path).unlink()
        except Exception as error:  # noqa: BLE001 - raised again by whoever asked for the texts
            landed = self._broken_off(number, rows, error)
        self._brought.pop(number, None)
        return replace(landed, calls=self.sender.calls.pop(number, ()))

    def _embedded(self, batch: Batch) -> Landed:
        embedded = embed_with_retries(batch, self._terms, self._retries)
        vectors = self._taken(batch.number)
        if len(embedded.found):
            with self._folding:
                take_up(self._cache, self._terms.folder.state_uri, embedded.found)
            found = numbers(self._cache.vectors(embedded.found))
            vectors |= dict(zip(embedded.found.to_pylist(), found, strict=True))
        return Landed(
            vectors,
            elsewhere=frozenset(embedded.found.to_pylist()),
            refused={each.text_hash: each for each in embedded.refused},
        )

    def _broken_off(self, number: int, rows: pa.Table, error: Exception) -> Landed:
        """What a batch has brought, and found out, before an error."""
        if isinstance(error, StorageFailed):
            self._fail(error)
        vectors = self._taken(number)
        try:
            refused = self._terms.folder.refused().get(self._terms.provider.space.id, {})
        except StorageFailed as lost:
            self._fail(lost)
            return Landed(vectors, error=error)
        known = set(rows.column("text_hash").to_pylist())
        return Landed(
            vectors,
            refused={each: refused[each] for each in known & refused.keys()},
            error=error,
        )

    def _fail(self, error: Exception) -> None:
        """Send nothing more: what came could not be kept."""
        self.failed = error
        self.sender.stop(RunStopped(str(error)))

    def _arrived(self, answer: StoredAnswer) -> None:
        """Keep an answer, which is in the journal by now."""
        self._brought.setdefault(answer.call.batch, []).append(answer)

    def _taken(self, number: int) -> dict[bytes, Vectors]:
        """The vectors a batch has brought, kept until they are folded.

        Not sooner: a retry of the batch looks for its own answers in the journal.
        """
        vectors: dict[bytes, Vectors] = {}
        brought = self._brought.get(number, [])
        for answer in brought:
            hashes, found = (answer.table.column(name) for name in ("text_hash", "vector"))
            vectors |= dict(zip(hashes.to_pylist(), numbers(found), strict=True))
        with self._lock:
            self.landed |= vectors
            self._unfolded += brought
        return vectors

    def _fold_if_due(self) -> None:
        if not self._fold_is_due():
            return
        with self._folding:
            if not self._fold_is_due():  # another thread has done it
                return
            with self._lock:
                answers, folded = list(self._unfolded), list(self.landed)
            fold(self._terms.folder, self._cache, answers)
            self._cache.refresh()  # not by who asks next, which is under the lock
            with self._lock:
                del self._unfolded[: len(answers)]
                for each in folded:
                    del self.landed[each]

    def _fold_is_due(self) -> bool:
        most = FOLD_BYTES
        if self._memory_bytes is not None:
            most = min(most, self._memory_bytes // 8)  # while they are folded they are there thrice
        with self._lock:
            return len(self.landed) * (self._vector_bytes + ENTRY_BYTES) >= most
