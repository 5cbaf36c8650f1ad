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
from tasks.journal import About, Call, Recovered
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


def about_run(config: Config, run_id: str, clock: Clock) -> About:
    """What the run is, before it has done anything."""
    return About(
        run_id=run_id,
        name=config.name,
        index=index_name(config),
        started_at=clock.started_at.isoformat(timespec="milliseconds"),
        concurrency=config.limits.concurrency,
    )


def died_report(about: About, calls: Sequence[Call]) -> RunReport:
    """The report of a run that was killed."""
    return ended_report(about, calls, "died", "The run ended without a word.")


def finished_report(
    *,
    survey: Survey,
    filled: Filled,
    published: Published,
    recovered: Recovered,
    calls: Sequence[Call],
    about: About,
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
    left_out = bool(filled.unsettled or survey.keyed.notes.failed or survey.compared.held)
    state = "unchanged" if published.way == "none" else "completed"
    embed_s = clock.seconds.get("embed", 0.0)
    return RunReport(
        run_id=about.run_id,
        name=about.name,
        index=about.index,
        generation=published.generation,
        published=published.way,
        state="incomplete" if left_out else state,
        started_at=about.started_at,
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
        examples=survey.keyed.notes.examples,
        held=survey.compared.held,
        recovered_vectors=recovered.vectors,
        unreadable_answers=len(recovered.set_aside),
    )


def ended_report(
    about: About, calls: Sequence[Call], state: str, error: str, seconds: float = 0.0
) -> RunReport:
    """The report of a run that failed or died; what it paid for is in it and in the cache."""
    tokens = _tokens(calls)
    embedded = sum(call.texts for call in calls if call.status == "ok")
    return RunReport(
        run_id=about.run_id,
        name=about.name,
        index=about.index,
        generation=0,
        published="none",
        state=state,
        started_at=about.started_at,
        chunks=Chunks(total=0, unchanged=0, added=0, changed=0, moved=0, deleted=0, duplicate=0),
        texts=Texts(unique=0, from_cache=0, embedded=embedded),
        calls=_calls(calls),
        tokens=tokens,
        cost=Cost(usd=sum(call.usd for call in calls)),
        seconds=Seconds(total=seconds),
        throughput=Throughput(),
        latency_ms=Latency(),
        concurrency=Concurrency(limit=about.concurrency),
        memory=Memory(peak_bytes=peak_bytes() if seconds else 0),
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
