"""One run of an embedder: questions are answered from the cache, and by flights for the rest."""

import threading
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from contextlib import ExitStack
from datetime import UTC, datetime
from uuid import uuid4

import numpy as np
import pyarrow as pa

from tasks.aside import out_of_reach
from tasks.asked import Asked
from tasks.cache import Cache
from tasks.catalog import facts_for
from tasks.embedder_report import EmbedderReport, Tally
from tasks.embeddings import Embeddings, StreamProgress, TextError
from tasks.errors import BatchRefused, CorpusError, ProviderBusy, RunStopped
from tasks.flights import Flight, Flights
from tasks.journal import RunFolder
from tasks.keys import KeySet
from tasks.notes import About, Call, Refused
from tasks.params import Config, Engine
from tasks.providers import Provider, Vectors
from tasks.providers.opening import open_embedder
from tasks.quarantine import Quarantine
from tasks.recover import recover
from tasks.run import ended_report, enter, record_death
from tasks.schemas import HASH
from tasks.sender import Terms
from tasks.soundness import numbers
from tasks.stream import Source, Stream

GATHERED = 8192
"""Vectors taken from the cache at a time."""
NOT_OPEN = "The embedder is not open: use it in a `with` block."
CANCELLED = "The embedder was cancelled before this text was sent."


class EmbedderRun:
    """One run of an embedder, from its opening to its end. Serves many threads.

    Args:
        config: As it was checked.
        memory_bytes: What texts and vectors on their way may take; None: no limit.
        retries: So often a batch is tried again.

    Raises:
        SettingsError: There is no key, or what the provider needs is not installed.
    """

    def __init__(self, config: Engine, memory_bytes: int | None, retries: int) -> None:
        self._provider: Provider = open_embedder(config)
        self._fail_fast = config.on_error == "fail_fast"
        self._memory_bytes = memory_bytes
        self._folder = RunFolder(config.state.uri, f"embedder-{uuid4()}")
        self._about = About(
            run_id=self._folder.run_id,
            name=config.name if isinstance(config, Config) else "embedder",
            index="",
            started_at=datetime.now(tz=UTC).isoformat(timespec="milliseconds"),
            concurrency=self._provider.limits.concurrency,
            model=self._provider.space.model_name,
        )
        self._cancelled = threading.Event()
        self._tally = Tally()
        with ExitStack() as stack:
            stack.enter_context(self._folder.alive(self._about))
            recover(config.state.uri, record_death, besides=self._folder.run_id)
            space = self._provider.space
            self._cache = Cache(config.state.uri, space)
            self._refused: dict[bytes, str] = {}
            if config.on_error == "quarantine":
                self._refused = Quarantine(config.state.uri, space.id).reasons
            terms = Terms(
                self._provider,
                self._folder,
                facts_for(config.embedding).usd_per_million_tokens,
                # A refused text ends what asked for it, not all that others ask for.
                on_error="collect" if self._fail_fast else config.on_error,
                max_wait_s=config.limits.max_wait,
                shared=config.limits.shared,
                max_usd=config.budget.max_usd,
            )
            self._flights = Flights(terms, self._cache, retries, self._tally.count, memory_bytes)
            self._callers = ThreadPoolExecutor(self._about.concurrency, thread_name_prefix="asked")
            self._stack = stack.pop_all()

    def answer(self, texts: Sequence[object], start: int = 0) -> Embeddings:
        """`embed_batch`; the first of `texts` is number `start` of what is asked for."""

        def work() -> Embeddings:
            with self._tally.at_work():
                return self._answered(Asked(texts), start)

        return out_of_reach(work)

    def submit(self, texts: Sequence[object], start: int = 0) -> "Future[Embeddings]":
        """The same on the pool of threads."""
        try:
            return out_of_reach(lambda: self._callers.submit(self.answer, texts, start))
        except RuntimeError:  # the block has ended
            raise RuntimeError(NOT_OPEN) from None

    def stream(self, source: Source, progress: Callable[[StreamProgress], None] | None) -> Stream:
        """As `BatchEmbedder.stream`."""
        preparation = self._provider.preparation
        return Stream(source, self.submit, self._window_full, preparation, progress)

    def cancel(self) -> None:
        """As `BatchEmbedder.cancel`."""
        self._cancelled.set()
        self._flights.sender.settle(CANCELLED)

    def report(self) -> EmbedderReport:
        """As `BatchEmbedder.report`."""
        return self._tally.report(
            sent=self._flights.sender.limiter.statistics(),
            memory_limit_bytes=self._memory_bytes,
            vector_bytes=self._provider.space.vector_bytes,
            concurrent_workers=self._about.concurrency,
        )

    def close(self, state: str) -> None:
        """Wait for what was asked for, and enter it all in the ledger."""
        with self._stack:
            try:
                self._wait()
            except BaseException:  # a Ctrl-C while it waits
                self.cancel()
                self._wait()
                raise
            finally:
                if self._cancelled.is_set() and state == "completed":
                    state = "cancelled"
                self._end(state)

    def _wait(self) -> None:
        self._callers.shutdown()
        self._tally.rest()  # who asks in a thread of its own
        self._flights.join()

    def _end(self, state: str) -> None:
        self._flights.close()
        calls, seconds = self._folder.calls(), self._tally.seconds
        enter(ended_report(self._about, calls, state, "", seconds), self._folder)

    def _window_full(self, texts: int, characters: int) -> bool:
        """Whether so many texts of a stream are enough for two such windows to fill all slots."""
        most = self._flights.most_texts(texts, characters)
        return texts >= most * max(2, self._about.concurrency // 2)

    def _answered(self, asked: Asked, start: int) -> Embeddings:
        started = time.perf_counter()
        if asked.invalid and self._fail_fast:
            at, error = min(asked.invalid.items())
            raise CorpusError(f"Text {start + at + 1:,}: {error.message}", position=start + at)
        journey = self._journey(asked)
        vectors, cached = self._gathered(asked, journey)
        found = Embeddings(
            texts=asked.texts,
            vectors=asked.spread(vectors),
            cached=asked.spread(cached),
            errors=asked.invalid | asked.errors_of(journey.failed),
            calls=journey.calls,
            space=self._provider.space,
            processing_time_seconds=time.perf_counter() - started,
        )
        self._tally.add(found)
        return found

    def _journey(self, asked: Asked) -> "_Journey":
        """See that each text is known, and wait until those are that are on their way."""
        journey = _Journey()
        lacking = self._lacking(asked)
        if any(each not in self._flights.landed for each in lacking):
            self._cache.refresh()  # other runs may have folded them
            lacking = self._lacking(asked)
        for text_hash in lacking.keys() & self._refused.keys():
            reason = f"The provider has refused it before: {self._refused[text_hash]}"
            journey.failed[text_hash] = TextError("quarantined", reason)
            del lacking[text_hash]
        self._require_kept()
        flights = self._take_off(lacking, journey)
        while flights:
            landed, _ = wait(flights, return_when=FIRST_COMPLETED)
            for flight in landed:
                wanted = flights.pop(flight)
                if flight.cancelled():  # by somebody else who waited for it and gave up
                    flights |= self._take_off({each: lacking[each] for each in wanted}, journey)
                    continue
                try:
                    self._land(flight, wanted, journey)
                except BaseException:
                    self._flights.give_up(flights)
                    raise
        self._require_kept()
        return journey

    def _lacking(self, asked: Asked) -> dict[bytes, str]:
        return asked.texts_at(np.flatnonzero(~self._cache.holds(asked.unique)))

    def _require_kept(self) -> None:
        """Raise where answers cannot be kept: whoever asks on must not believe that all is well."""
        if self._flights.failed is not None:
            raise self._flights.failed

    def _take_off(
        self, texts: Mapping[bytes, str], journey: "_Journey"
    ) -> dict[Flight, list[bytes]]:
        if not texts:
            return {}
        taken = self._flights.take_off(texts)
        journey.known |= taken.landed
        journey.ours |= taken.ours
        return taken.flights

    def _land(self, flight: Flight, wanted: Iterable[bytes], journey: "_Journey") -> None:
        found, ours = flight.result(), flight in journey.ours
        self._refused |= {
            each.text_hash: each.reason for each in found.refused.values() if each.lasting
        }
        if ours:
            journey.calls += found.calls
        for each in wanted:
            if each in found.vectors:
                paid = ours and each not in found.elsewhere
                (journey.paid if paid else journey.known)[each] = found.vectors[each]
            elif each in found.refused:
                journey.failed[each] = self._refusal(found.refused[each])
            elif found.error is not None:
                journey.failed[each] = self._error(found.error)

    def _refusal(self, refused: Refused) -> TextError:
        if self._fail_fast:
            raise BatchRefused(
                f"The provider refuses a text: {refused.reason} Change it, or set on_error to "
                "quarantine or collect.",
                text_hash=refused.text_hash,
            )
        return TextError("refused", refused.reason)

    def _error(self, error: Exception) -> TextError:
        """What an error means for one text; raised where it means the same for all."""
        self._require_kept()
        if isinstance(error, RunStopped) and self._cancelled.is_set():
            return TextError("cancelled", CANCELLED)
        if isinstance(error, ProviderBusy) and not self._fail_fast:
            return TextError("failed", str(error))
        raise error

    def _gathered(self, asked: Asked, journey: "_Journey") -> tuple[Vectors, Vectors]:
        """The vector of each unique text, and whether it was there before."""
        size = self._provider.space.vector_type.list_size
        bits = self._provider.space.dtype == "ubinary"
        dtype = np.uint8 if bits else np.float32
        vectors: Vectors = np.empty((len(asked.unique), size), dtype)
        rest = np.ones(len(vectors), dtype=bool)
        cached = np.ones(len(vectors), dtype=bool)
        keys = KeySet(asked.unique)
        for found, paid in ((journey.known, False), (journey.paid, True)):
            if found:
                at = keys.positions(pa.array(list(found), HASH))
                for place, vector in zip(at.tolist(), found.values(), strict=True):
                    vectors[place] = vector
                rest[at], cached[at] = False, not paid
        if journey.failed:
            at = keys.positions(pa.array(list(journey.failed), HASH))
            rest[at] = cached[at] = False
            vectors[at] = 0 if bits else np.nan
        known = np.flatnonzero(rest)
        for start in range(0, len(known), GATHERED):
            at = known[start : start + GATHERED]
            vectors[at] = numbers(self._cache.vectors(asked.unique.take(pa.array(at))))
        return vectors, cached


class _Journey:
    """What becomes of the texts of one question, by text_hash."""

    def __init__(self) -> None:
        self.known: dict[bytes, Vectors] = {}
        self.paid: dict[bytes, Vectors] = {}
        self.failed: dict[bytes, TextError] = {}
        self.ours: set[Flight] = set()
        self.calls: list[Call] = []
