"""What a `BatchEmbedder` has done so far, and how well."""

import threading
import time
from collections import Counter, defaultdict
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

from pydantic import BaseModel, ConfigDict

from tasks.budget import usd_text
from tasks.embeddings import Embeddings
from tasks.limiter import LimiterStatistics
from tasks.memory import estimated_bytes, peak_bytes
from tasks.notes import Call


class EmbedderReport(BaseModel):
    """What was done so far. Rates are 0 where nothing was; shares are 0 to 1.

    Attributes:
        total_texts: Texts asked for; `batch_size` is the same.
        successful_texts: Those that have a vector.
        failed_texts: Those that have none; `errors` is the same.
        success_rate: Share of the successful ones.
        error_categories: The others, by kind.
        total_characters: Of all texts asked for.
        tokens_estimated: Of the texts that were sent, by our own count.
        tokens_billed: Of all calls, by the provider's word.
        usd: Their list price.
        batches_processed: Questions answered: calls of `embed_batch`, parts of streams.
        average_batch_texts: Texts of one of them.
        average_batch_seconds: Time of one of them.
        texts_per_second: Texts by the time in which any was worked on.
        tokens_per_second: Billed tokens by the same.
        processing_time_seconds: That time.
        cache_hits: Texts whose vector was there before.
        cache_hit_rate: Their share.
        api_calls: Calls to the provider, failed ones too.
        calls_saved: Texts asked for, less calls.
        avg_latency_ms: Of a call that brought vectors.
        concurrent_workers: Most calls in flight.
        worker_utilization: Share of the time that open slots were in flight.
        memory_estimate_bytes: The most that one question was expected to take.
        memory_limit_bytes: What all may take; None: no limit.
        peak_memory_bytes: The most that this process ever held.
    """

    model_config = ConfigDict(frozen=True)

    total_texts: int
    successful_texts: int
    failed_texts: int
    success_rate: float
    error_categories: dict[str, int]
    total_characters: int
    tokens_estimated: int
    tokens_billed: int
    usd: float
    batches_processed: int
    average_batch_texts: float
    average_batch_seconds: float
    texts_per_second: float
    tokens_per_second: float
    processing_time_seconds: float
    batch_size: int
    cache_hits: int
    cache_hit_rate: float
    api_calls: int
    calls_saved: int
    avg_latency_ms: float
    errors: int
    concurrent_workers: int
    worker_utilization: float
    memory_estimate_bytes: int
    memory_limit_bytes: int | None
    peak_memory_bytes: int

    def summary(self) -> str:
        """For people: a few lines."""
        failed = ", ".join(f"{count:,} {kind}" for kind, count in self.error_categories.items())
        limit = self.memory_limit_bytes
        limited = f" of {limit / 2**20:,.0f} MiB for texts and vectors" if limit else ""
        failed = f" ({failed})" if failed else ""
        return (
            f"{self.total_texts:,} texts: {self.successful_texts:,} embedded "
            f"({self.success_rate:.1%}), {self.failed_texts:,} failed{failed}\n"
            f"{self.cache_hits:,} from the cache ({self.cache_hit_rate:.1%}), "
            f"{self.api_calls:,} calls, {self.calls_saved:,} calls saved\n"
            f"{self.tokens_billed:,} tokens billed, {usd_text(self.usd)}\n"
            f"{self.processing_time_seconds:.1f} s: {self.texts_per_second:,.0f} texts/s, "
            f"{self.tokens_per_second:,.0f} tokens/s, {self.avg_latency_ms:,.0f} ms a call, "
            f"slots busy {self.worker_utilization:.0%}\n"
            f"{self.peak_memory_bytes / 2**20:,.0f} MiB at most{limited}"
        )


class Tally:
    """Counts what is answered, for many threads at once.

    Attributes:
        seconds: Time in which any question was worked on.
    """

    def __init__(self) -> None:
        self.seconds = 0.0
        self._lock = threading.Lock()
        self._rests = threading.Condition(self._lock)
        self._at_work = 0
        self._since = 0.0
        self._answered: Counter[str] = Counter()
        self._failed: Counter[str] = Counter()
        self._calls: defaultdict[str, float] = defaultdict(float)
        self._batch_seconds = 0.0
        self._largest = (0, 0, 0)

    @contextmanager
    def at_work(self) -> Iterator[None]:
        """Count the block as work on a question."""
        with self._lock:
            if not self._at_work:
                self._since = time.perf_counter()
            self._at_work += 1
        try:
            yield
        finally:
            with self._lock:
                self._at_work -= 1
                if not self._at_work:
                    self.seconds += time.perf_counter() - self._since
                    self._rests.notify_all()

    def rest(self) -> None:
        """Wait until no question is worked on."""
        with self._rests:
            self._rests.wait_for(lambda: not self._at_work)

    def count(self, calls: Sequence[Call]) -> None:
        """Take in calls that were made."""
        with self._lock:
            for call in calls:
                self._calls["made"] += 1
                self._calls["billed"] += call.tokens_billed
                self._calls["usd"] += call.usd
                if call.status == "ok":
                    self._calls["good"] += 1
                    self._calls["seconds"] += call.seconds
                    self._calls["estimated"] += call.tokens_estimated

    def add(self, found: Embeddings) -> None:
        """Take in one answer."""
        characters = sum(len(text) for text in found.texts if isinstance(text, str))
        with self._lock:
            self._answered.update(
                batches=1, texts=len(found), characters=characters, hits=found.cache_hits
            )
            self._failed.update(error.kind for error in found.errors.values())
            self._batch_seconds += found.processing_time_seconds
            self._largest = max(self._largest, (len(found) + characters, len(found), characters))

    def report(
        self,
        *,
        sent: LimiterStatistics,
        memory_limit_bytes: int | None,
        vector_bytes: int,
        concurrent_workers: int,
    ) -> EmbedderReport:
        """What was counted until now."""
        with self._lock:
            now = time.perf_counter() - self._since if self._at_work else 0.0
            seconds = self.seconds + now
            count, failed = self._answered.copy(), self._failed.copy()
            calls = self._calls.copy()
        texts, batches = count["texts"], count["batches"]
        made, billed = int(calls["made"]), int(calls["billed"])
        return EmbedderReport(
            total_texts=texts,
            successful_texts=texts - failed.total(),
            failed_texts=failed.total(),
            success_rate=_ratio(texts - failed.total(), texts),
            error_categories=dict(sorted(failed.items())),
            total_characters=count["characters"],
            tokens_estimated=int(calls["estimated"]),
            tokens_billed=billed,
            usd=calls["usd"],
            batches_processed=batches,
            average_batch_texts=_ratio(texts, batches),
            average_batch_seconds=_ratio(self._batch_seconds, batches),
            texts_per_second=_ratio(texts, seconds),
            tokens_per_second=_ratio(billed, seconds),
            processing_time_seconds=seconds,
            batch_size=texts,
            cache_hits=count["hits"],
            cache_hit_rate=_ratio(count["hits"], texts),
            api_calls=made,
            calls_saved=texts - made,
            avg_latency_ms=_ratio(1000 * calls["seconds"], calls["good"]),
            errors=failed.total(),
            concurrent_workers=concurrent_workers,
            worker_utilization=_ratio(sent.in_flight_seconds, sent.slot_seconds),
            memory_estimate_bytes=estimated_bytes(*self._largest[1:], vector_bytes),
            memory_limit_bytes=memory_limit_bytes,
            peak_memory_bytes=peak_bytes(),
        )


def _ratio(part: float, whole: float) -> float:
    return part / whole if whole else 0.0
