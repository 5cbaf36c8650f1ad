"""The run: its clock, and its report counted from what the stages left."""

import resource
import sys
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from datetime import datetime

import numpy as np

from tasks.compare import tally
from tasks.fill import Filled
from tasks.journal import Call, Recovered
from tasks.params import Config
from tasks.plan import Survey, chunks_of, cost_of, index_name, texts_of
from tasks.publish import Published
from tasks.report import (
    Calls,
    Chunks,
    Concurrency,
    Cost,
    Latency,
    Memory,
    RunReport,
    Seconds,
    Texts,
    Throughput,
    Tokens,
)
from tasks.schemas import CHANGES, DELETIONS


@dataclass
class Clock:
    """How long the stages of a run took, in seconds."""

    started_at: datetime
    started: float = field(default_factory=time.perf_counter)
    seconds: dict[str, float] = field(default_factory=dict)

    @contextmanager
    def stage(self, name: str) -> Iterator[None]:
        """Time the block as stage `name`."""
        started = time.perf_counter()
        try:
            yield
        finally:
            self.seconds[name] = time.perf_counter() - started

    def total(self) -> float:
        """Seconds since the run started."""
        return time.perf_counter() - self.started


def finished_report(
    *,
    survey: Survey,
    filled: Filled,
    published: Published,
    recovered: Recovered,
    calls: Sequence[Call],
    run_id: str,
    clock: Clock,
) -> RunReport:
    """The report of a run that published, or had nothing to publish."""
    counts = tally(filled.changes.load(CHANGES), filled.deletions.load(DELETIONS))
    ok = [call for call in calls if call.status == "ok"]
    tokens = _tokens(calls)
    embedded = sum(call.texts for call in ok)
    skipped = Counter(survey.keyed.notes.skipped)
    if filled.unsettled:
        skipped["changed while it was read"] = filled.unsettled
    left_out = bool(filled.unsettled or survey.keyed.notes.unread)
    state = "unchanged" if published.way == "none" else "completed"
    embed_s = clock.seconds.get("embed", 0.0)
    return RunReport(
        run_id=run_id,
        name=survey.config.name,
        index=index_name(survey.config),
        generation=published.generation,
        published=published.way,
        state="incomplete" if left_out else state,
        started_at=clock.started_at.isoformat(timespec="seconds"),
        chunks=chunks_of(survey, counts),
        texts=texts_of(survey, embedded),
        calls=_calls(calls),
        tokens=tokens,
        cost=cost_of(survey, tokens.billed),
        seconds=Seconds(
            read=survey.keyed.read_s,
            fingerprint=survey.keyed.fingerprint_s,
            compare=survey.compare_s,
            lookup=survey.lookup_s,
            embed=embed_s,
            publish=clock.seconds.get("publish", 0.0),
            total=clock.total(),
        ),
        throughput=_throughput(survey, embedded, len(calls), tokens.billed, embed_s),
        latency_ms=_latency(ok),
        concurrency=_concurrency(survey.config, calls, embed_s),
        memory=Memory(peak_bytes=peak_bytes()),
        skipped=dict(skipped),
        recovered_vectors=recovered.vectors,
        unreadable_answers=len(recovered.set_aside),
    )


def failed_report(
    config: Config, calls: Sequence[Call], run_id: str, clock: Clock, error: str
) -> RunReport:
    """The report of a run that stopped; what it paid for is in it and in the cache."""
    tokens = _tokens(calls)
    embedded = sum(call.texts for call in calls if call.status == "ok")
    return RunReport(
        run_id=run_id,
        name=config.name,
        index=index_name(config),
        generation=0,
        published="none",
        state="failed",
        started_at=clock.started_at.isoformat(timespec="seconds"),
        chunks=Chunks(total=0, unchanged=0, added=0, changed=0, moved=0, deleted=0, duplicate=0),
        texts=Texts(unique=0, from_cache=0, embedded=embedded),
        calls=_calls(calls),
        tokens=tokens,
        cost=Cost(usd=sum(call.usd for call in calls)),
        seconds=Seconds(total=clock.total()),
        throughput=Throughput(),
        latency_ms=Latency(),
        concurrency=Concurrency(limit=config.limits.concurrency),
        memory=Memory(peak_bytes=peak_bytes()),
        error=error,
    )


def peak_bytes() -> int:
    """Most memory this process held, in bytes."""
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


def _calls(calls: Sequence[Call]) -> Calls:
    ok = sum(call.status == "ok" for call in calls)
    return Calls(
        ok=ok,
        failed=len(calls) - ok,
        retried=sum(call.attempt > 1 for call in calls),
    )


def _tokens(calls: Sequence[Call]) -> Tokens:
    return Tokens(
        estimated=sum(call.tokens_estimated for call in calls if call.status == "ok"),
        billed=sum(call.tokens_billed for call in calls),
    )


def _throughput(
    survey: Survey, embedded: int, calls: int, tokens: int, seconds: float
) -> Throughput:
    if not embedded or not seconds:
        return Throughput()
    needed = survey.provider.limits.seconds_needed(calls, tokens)
    return Throughput(
        chunks_per_second=embedded / seconds,
        tokens_per_second=tokens / seconds,
        limit_used_fraction=needed / seconds if needed else None,
    )


def _latency(ok: Sequence[Call]) -> Latency:
    if not ok:
        return Latency()
    p50, p95, p99 = np.percentile([call.seconds * 1000 for call in ok], [50, 95, 99])
    return Latency(p50=float(p50), p95=float(p95), p99=float(p99))


def _concurrency(config: Config, calls: Sequence[Call], seconds: float) -> Concurrency:
    limit = config.limits.concurrency
    busy = sum(call.seconds for call in calls)
    return Concurrency(limit=limit, busy_fraction=busy / (limit * seconds) if seconds else 0.0)
