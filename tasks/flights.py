"""Flights: texts on their way to a provider, each of them once, whoever waits for it.

Each batch is one flight on a bounded pool of threads. Its answers are durable in the journal
when it has landed, and are folded into the cache in groups.
"""

import itertools
import threading
from collections.abc import Iterable, Mapping, Sequence
from collections.abc import Set as AbstractSet
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from pathlib import Path

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from tasks.cache import Cache
from tasks.claims import take_up
from tasks.embed import embed_with_retries
from tasks.journal import fold, read_answer
from tasks.keys import hash_column
from tasks.limits import Limits
from tasks.pack import cut
from tasks.providers import Vectors
from tasks.schemas import BATCH, Batch
from tasks.sender import Sender, Terms, forget_sender, sender_of
from tasks.soundness import numbers

FOLD_BYTES = 64 * 2**20
"""Vectors are folded into the cache in groups of about so many bytes."""
COPIES = 4
"""Copies of a vector that a flight holds at once: as it came, checked, in the journal, for who
asked."""
OVERHEAD = 1.25
"""Beside texts and vectors a flight holds a quarter more: hashes, tables, what Python adds."""


def estimated_bytes(texts: int, characters: int, vector_bytes: int) -> int:
    """Memory that embedding takes at once.

    Args:
        texts: How many.
        characters: Of all of them; two bytes each, between ASCII and the rest.
        vector_bytes: Of one vector.
    """
    return int(OVERHEAD * (COPIES * texts * vector_bytes + 2 * COPIES * characters))


@dataclass(frozen=True)
class Landed:
    """What became of a batch.

    Attributes:
        batch: Its number.
        vectors: By text_hash.
        refused: Why, of each text that no call will embed.
        error: Why the rest of it has no vectors.
    """

    batch: int
    vectors: Mapping[bytes, Vectors] = field(repr=False)
    refused: Mapping[bytes, str]
    error: Exception | None = None


Flight = Future[Landed]


@dataclass(frozen=True)
class TakenOff:
    """Where texts are that are not in the cache, by hash.

    Attributes:
        landed: Vectors that may not be in the cache yet.
        flights: Those of the other texts.
        ours: The texts whose flight began for this question, and not for another one.
    """

    landed: dict[bytes, Vectors]
    flights: dict[bytes, Flight]
    ours: AbstractSet[bytes]


class Flights:
    """All flights of one run. Serves many threads.

    Attributes:
        sender: Who sends.
        landed: Vectors by text_hash that may not be in the cache yet.

    Args:
        terms: What all batches of the run share.
        cache: Vectors known.
        retries: So often a batch is tried again.
        memory_bytes: What all flights together may hold; None: no limit.
    """

    def __init__(
        self, terms: Terms, cache: Cache, retries: int, memory_bytes: int | None = None
    ) -> None:
        self.sender = sender_of(terms, cache)
        self._terms, self._cache, self._retries = terms, cache, retries
        self._concurrency = terms.provider.limits.concurrency
        self._memory_bytes = memory_bytes
        self._vector_bytes = terms.provider.space.vector_bytes
        # The limiter bounds the calls; while one thread takes in an answer, another one sends.
        self._pool = ThreadPoolExecutor(2 * self._concurrency, thread_name_prefix="embed")
        self._numbers = itertools.count(1)
        self._lock = threading.RLock()
        self._flying: dict[bytes, Flight] = {}
        self.landed: dict[bytes, Vectors] = {}
        self._unfolded: list[str] = []
        self._folding = threading.Lock()

    def take_off(self, texts: Mapping[bytes, str]) -> "TakenOff":
        """See that each of these texts, given by its hash, is on its way once."""
        with self._lock:  # a text moves on from flying to landed to cached, and overlaps
            landed = {each: self.landed[each] for each in texts if each in self.landed}
            flights = {each: self._flying[each] for each in texts if each in self._flying}
            rest = [each for each in texts if each not in landed and each not in flights]
            unknown = ~self._cache.holds(hash_column(rest))
            ours = {each: texts[each] for each, new in zip(rest, unknown, strict=True) if new}
            for rows in self._cut(ours):
                hashes = rows.column("text_hash").to_pylist()
                flight = self._pool.submit(self._fly, next(self._numbers), rows, hashes)
                own = dict.fromkeys(hashes, flight)
                flights |= own
                self._flying |= own
            flights = {each: flights[each] for each in flights if each not in landed}
            return TakenOff(landed, flights, ours.keys())

    def give_up(self, flights: Iterable[Flight]) -> None:
        """Do not begin those that have not begun; who waits for them is told."""
        for flight in flights:
            flight.cancel()
        with self._lock:
            gone = [each for each, flight in self._flying.items() if flight.cancelled()]
            for each in gone:
                del self._flying[each]

    def close(self) -> None:
        """Wait for what flies, then fold all that has landed.

        Raises:
            EmbedOnceError: The cache cannot be written; the answers stay in the journal.
        """
        self._pool.shutdown()
        try:
            with self._folding:
                fold(self._terms.folder, self._cache)
            self.sender.save()
        finally:
            forget_sender(self._terms.folder)

    def most_texts(self, texts: int, characters: int) -> int:
        """How many of such texts one flight may hold, by memory and by what a call takes."""
        most = self._terms.provider.limits.texts_per_request
        if self._memory_bytes is None or not texts:
            return most
        one = estimated_bytes(texts, characters, self._vector_bytes) / texts
        # Half of it is for what has landed and for what waits.
        share = self._memory_bytes / 2 / self._concurrency
        return max(1, min(most, int(share / one)))

    def _cut(self, texts: Mapping[bytes, str]) -> list[pa.Table]:
        if not texts:
            return []
        table = pa.table(
            [hash_column(list(texts)), pa.array(texts.values(), pa.utf8())],
            schema=pa.schema([BATCH.field("text_hash"), BATCH.field("text")]),
        )
        most = self.most_texts(len(texts), sum(map(len, texts.values())))
        return cut(table, _Sizes(self.sender, most))

    def _fly(self, number: int, rows: pa.Table, hashes: list[bytes]) -> Landed:
        """Embed a batch; an error is part of what became of it."""
        landed = Landed(number, {}, {})
        try:
            batch = Batch.write(number, self._terms.folder.staging, rows.to_batches())
            landed = self._embedded(batch)
            Path(batch.table.path).unlink()
        except Exception as error:  # noqa: BLE001 - raised again by whoever asked for the texts
            vectors = self._taken(self._terms.folder.answers_of(number))
            landed = replace(landed, vectors=vectors, error=error)
        finally:
            with self._lock:
                for each in hashes:
                    del self._flying[each]
        return landed

    def _embedded(self, batch: Batch) -> Landed:
        embedded = embed_with_retries(batch, self._terms, self._retries)
        vectors = self._taken(embedded.answers)
        if len(embedded.found):
            with self._folding:
                take_up(self._cache, self._terms.folder.state_uri, embedded.found)
            found = numbers(self._cache.vectors(embedded.found))
            vectors |= dict(zip(embedded.found.to_pylist(), found, strict=True))
        self._fold_if_due()
        refused = {each.text_hash: each.reason for each in embedded.refused}
        return Landed(batch.number, vectors, refused)

    def _taken(self, names: Iterable[str]) -> dict[bytes, Vectors]:
        """The vectors of answers in the journal, kept until they are folded."""
        vectors: dict[bytes, Vectors] = {}
        for name in (names := list(names)):
            answer = read_answer(self._terms.folder, name)
            if answer is not None:
                hashes = answer.table.column("text_hash").to_pylist()
                rows = numbers(answer.table.column("vector").combine_chunks())
                vectors |= dict(zip(hashes, rows, strict=True))
        with self._lock:
            self.landed |= vectors
            self._unfolded += names
        return vectors

    def _fold_if_due(self) -> None:
        most = FOLD_BYTES
        if self._memory_bytes is not None:
            most = min(most, self._memory_bytes // 4)
        with self._folding:
            with self._lock:
                if len(self.landed) * self._vector_bytes < most:
                    return
                names, self._unfolded = self._unfolded, []
                folded = list(self.landed)
            fold(self._terms.folder, self._cache, names)
            with self._lock:
                for each in folded:
                    del self.landed[each]


@dataclass(frozen=True)
class _Sizes:
    """What the sender knows of sizes, and what memory allows."""

    sender: Sender
    most_texts: int

    def counts(self, texts: Sequence[str]) -> npt.NDArray[np.int32]:
        return self.sender.counts(texts)

    def request_limits(self) -> Limits:
        limits = self.sender.request_limits()
        return replace(limits, texts_per_request=min(limits.texts_per_request, self.most_texts))
