"""The engine as a library: texts in, vectors out, over the very pieces that the flows use.

    with BatchEmbedder("configs/voyage.yaml") as embedder:
        found = embedder.embed_batch(["a wolf", "two foxes"])

What was ever paid for is taken from the cache under `state.uri`, whoever paid for it; the rest
goes out in as few calls as the provider takes, within the account's limits. An answer is durable
before anything else can fail: after a kill the next run, or the next embedder, goes on from there.
"""

import threading
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from contextlib import ExitStack
from datetime import UTC, datetime
from pathlib import Path
from types import TracebackType
from typing import Any, Self
from uuid import uuid4

import numpy as np
import pyarrow as pa

from tasks.asked import Asked, invalid
from tasks.cache import Cache
from tasks.catalog import facts_for
from tasks.embed import RETRIES
from tasks.embedder_report import EmbedderReport, Tally
from tasks.embeddings import Embeddings, StreamProgress, TextError
from tasks.errors import BatchRefused, CorpusError, EmbedOnceError, ProviderBusy, RunStopped
from tasks.flights import Flight, Flights, Landed
from tasks.journal import RunFolder
from tasks.keys import KeySet
from tasks.notes import About
from tasks.params import Config, Engine, engine_of
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
CANCELLED = "The embedder was cancelled before this text was sent."


class BatchEmbedder:
    """Embeds texts, each of them once. Serves many threads; open it in a `with` block.

    Args:
        config: Path of a config file, or `embedding`, `limits`, `on_error` and `state` as they
            stand in one. `on_error` tells what a text without a vector does: quarantine and
            collect name it in the result's errors, and quarantine does not send it again;
            fail_fast raises at the first one, before any call where it is blank or no text.
        memory_mb: About what texts and vectors on their way may take, in MiB: calls get smaller
            where they would take more. None: no limit.
        retries: So often a call that may work later is tried again, 1, 2, 4, … s apart.

    Raises:
        SettingsError: The config is wrong; at the opening also: there is no key.
    """

    def __init__(
        self,
        config: Engine | Mapping[str, Any] | str | Path,
        *,
        memory_mb: int | None = None,
        retries: int = RETRIES,
    ) -> None:
        self._config = engine_of(config)
        self._memory_bytes = None if memory_mb is None else memory_mb * 2**20
        self._retries = retries
        self._open: _Open | None = None

    def __enter__(self) -> Self:
        self._open = _Open(self._config, self._memory_bytes, self._retries)
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        run, self._open = self._opened(), None
        if error is not None:
            run.cancel()
        run.close("failed" if isinstance(error, Exception) else "completed")

    def embed(self, text: str) -> Vectors:
        """The vector of one text, shape (dimension,): a batch of one.

        Raises:
            EmbedOnceError: It has none; the message says why.
        """
        found = self.embed_batch([text])
        if found.errors:
            raise EmbedOnceError(found.errors[0].message)
        vector: Vectors = found.vectors[0]
        return vector

    def embed_batch(self, texts: Sequence[str]) -> Embeddings:
        """The vectors of `texts`, row for row; a text that stands twice is sent once.

        Raises:
            ValueError: There are no texts.
            CorpusError: on_error is fail_fast, and one of them is blank or no text.
            ProviderError: No call can work, or on_error is fail_fast and one did not.
            StorageFailed: The state takes no answers; nothing more is sent.
        """
        return self._opened().embed(texts)

    def submit(self, texts: Sequence[str]) -> "Future[Embeddings]":
        """`embed_batch` on a bounded pool of threads; in async code, `asyncio.wrap_future` it.

        Raises:
            ValueError: There are no texts.
        """
        run = self._opened()
        _require_texts(texts)
        return run.callers.submit(run.embed, texts)

    def stream(
        self, source: Source, progress: Callable[[StreamProgress], None] | None = None
    ) -> Stream:
        """Embed more texts than memory holds; iterate with `for` or `async for` over the parts.

        Args:
            source: Texts, or a path: of a file with a text a line, or of a folder, whose
                documents are cut into chunks as for an index.
            progress: Is told how far it is, after each part.

        Raises:
            SettingsError: There is nothing at the path.
        """
        return self._opened().stream(source, progress)

    def cancel(self) -> None:
        """Send nothing more. What waits is given back as cancelled, answers in flight are kept.

        It returns when they are in or given up, after 22 s at most.
        """
        self._opened().cancel()

    def report(self) -> EmbedderReport:
        """What was done so far, and how well."""
        return self._opened().report()

    def _opened(self) -> "_Open":
        if self._open is None:
            raise RuntimeError("The embedder is not open: use it in a `with` block.")
        return self._open


class _Open:
    """An embedder between its opening and its end: one run of the state."""

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
            )
            self._remembers_refused = config.on_error == "quarantine"
            self._flights = Flights(terms, self._cache, retries, memory_bytes)
            self.callers = ThreadPoolExecutor(self._about.concurrency, thread_name_prefix="asked")
            self._stack = stack.pop_all()

    def embed(self, texts: Sequence[str | None]) -> Embeddings:
        _require_texts(texts)
        with self._tally.at_work():
            started = time.perf_counter()
            found = self._embedded(texts, started)
        self._tally.add(found)
        return found

    def stream(self, source: Source, progress: Callable[[StreamProgress], None] | None) -> Stream:
        preparation = self._provider.preparation
        return Stream(source, self._submit_window, self._window_full, preparation, progress)

    def _submit_window(self, texts: Sequence[str | None]) -> "Future[Embeddings]":
        return self.callers.submit(self.embed, texts)

    def _window_full(self, texts: int, characters: int) -> bool:
        """Whether so many texts of a stream are enough for two such windows to fill all slots."""
        most = self._flights.most_texts(texts, characters)
        return texts >= most * max(2, self._about.concurrency // 2)

    def cancel(self) -> None:
        self._cancelled.set()
        self._flights.sender.settle(CANCELLED)

    def report(self) -> EmbedderReport:
        sender = self._flights.sender
        return self._tally.report(
            calls=list(sender.calls),
            sent=sender.limiter.statistics(),
            memory_limit_bytes=self._memory_bytes,
            vector_bytes=self._provider.space.vector_bytes,
            concurrent_workers=self._about.concurrency,
        )

    def close(self, state: str) -> None:
        """Wait for what was asked for, and enter it all in the ledger."""
        if self._cancelled.is_set() and state == "completed":
            state = "cancelled"
        with self._stack:
            self.callers.shutdown()
            self._flights.close()
            seconds = self._tally.seconds
            report = ended_report(self._about, self._folder.calls(), state, "", seconds)
            enter(report, self._folder)

    def _embedded(self, texts: Sequence[str | None], started: float) -> Embeddings:
        errors = invalid(texts)
        if errors and self._fail_fast:
            at, error = min(errors.items())
            raise CorpusError(f"Text {at + 1:,} of {len(texts):,}: {error.message}", position=at)
        asked = Asked(texts, errors)
        journey = self._journey(asked)
        vectors, cached = self._gathered(asked, journey)
        return Embeddings(
            texts=texts,
            vectors=asked.spread(vectors),
            cached=asked.spread(cached),
            errors=errors | asked.errors_of(journey.failed),
            calls=[call for call in self._flights.sender.calls if call.batch in journey.batches],
            space=self._provider.space,
            processing_time_seconds=time.perf_counter() - started,
        )

    def _journey(self, asked: "Asked") -> "_Journey":
        """See that each text is known, and wait until those are that are on their way."""
        journey = _Journey()
        lacking = self._lacking(asked)
        if lacking.keys() - self._flights.landed:
            self._cache.refresh()  # other runs may have folded them
            lacking = self._lacking(asked)
        for text_hash in lacking.keys() & self._refused.keys():
            reason = f"The provider has refused it before: {self._refused[text_hash]}"
            journey.failed[text_hash] = TextError("quarantined", reason)
            del lacking[text_hash]
        flights = self._take_off(lacking, journey)
        while flights:
            landed, _ = wait(set(flights.values()), return_when=FIRST_COMPLETED)
            for flight in landed:
                wanted = {each for each, own in flights.items() if own is flight}
                flights = {each: own for each, own in flights.items() if each not in wanted}
                if flight.cancelled():  # by somebody else who waited for it and gave up
                    flights |= self._take_off({each: lacking[each] for each in wanted}, journey)
                    continue
                try:
                    self._land(flight.result(), wanted, journey)
                except BaseException:
                    self._flights.give_up(flights.values())
                    raise
        return journey

    def _lacking(self, asked: Asked) -> dict[bytes, str]:
        return asked.texts_at(np.flatnonzero(~self._cache.holds(asked.unique)))

    def _take_off(self, texts: Mapping[bytes, str], journey: "_Journey") -> dict[bytes, Flight]:
        taken = self._flights.take_off(texts)
        journey.known |= taken.landed
        journey.ours |= taken.ours
        return taken.flights

    def _land(self, found: Landed, wanted: Iterable[bytes], journey: "_Journey") -> None:
        if self._remembers_refused:
            self._refused |= found.refused
        for each in wanted:
            if each in journey.ours:
                journey.batches.add(found.batch)
            if each in found.vectors:
                (journey.paid if each in journey.ours else journey.known)[each] = found.vectors[
                    each
                ]
            elif each in found.refused:
                journey.failed[each] = self._refusal(each, found.refused[each])
            elif found.error is not None:
                journey.failed[each] = self._error(found.error)

    def _refusal(self, text_hash: bytes, reason: str) -> TextError:
        if self._fail_fast:
            raise BatchRefused(
                f"The provider refuses a text: {reason} Change it, or set on_error to quarantine "
                "or collect.",
                text_hash=text_hash,
            )
        return TextError("refused", reason)

    def _error(self, error: Exception) -> TextError:
        """What an error means for one text; raised where it means the same for all."""
        if isinstance(error, RunStopped) and self._cancelled.is_set():
            return TextError("cancelled", CANCELLED)
        if isinstance(error, ProviderBusy) and not self._fail_fast:
            return TextError("failed", str(error))
        raise error

    def _gathered(self, asked: "Asked", journey: "_Journey") -> tuple[Vectors, Vectors]:
        """The vector of each unique text, and whether it was there before."""
        size = self._provider.space.vector_type.list_size
        bits = self._provider.space.dtype == "ubinary"
        vectors = np.full((len(asked.unique), size), 0 if bits else np.nan, self._provider_dtype)
        rest = np.ones(len(vectors), dtype=bool)
        cached = np.ones(len(vectors), dtype=bool)
        keys = KeySet(asked.unique)
        for found, paid in ((journey.known, False), (journey.paid, True)):
            if found:
                at = keys.positions(pa.array(list(found), HASH))
                vectors[at] = np.stack(list(found.values()))
                rest[at], cached[at] = False, not paid
        if journey.failed:
            at = keys.positions(pa.array(list(journey.failed), HASH))
            rest[at] = cached[at] = False
        known = np.flatnonzero(rest)
        for start in range(0, len(known), GATHERED):
            at = known[start : start + GATHERED]
            vectors[at] = numbers(self._cache.vectors(asked.unique.take(pa.array(at))))
        return vectors, cached

    @property
    def _provider_dtype(self) -> type[np.generic]:
        return np.uint8 if self._provider.space.dtype == "ubinary" else np.float32


class _Journey:
    """What becomes of the texts of one question, by text_hash."""

    def __init__(self) -> None:
        self.known: dict[bytes, Vectors] = {}
        self.paid: dict[bytes, Vectors] = {}
        self.failed: dict[bytes, TextError] = {}
        self.ours: set[bytes] = set()
        self.batches: set[int] = set()


def _require_texts(texts: Sequence[object]) -> None:
    if isinstance(texts, str):
        raise TypeError("Give a list of texts; a single one goes to `embed`.")
    if not len(texts):
        raise ValueError("There are no texts to embed.")
