"""The run: its clock, and its report counted from what the stages left."""

import time
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from datetime import UTC, datetime

import numpy as np
import pyarrow as pa

from tasks.claims import Shared
from tasks.compare import tally
from tasks.fill import Filled
from tasks.fingerprint import Keyed
from tasks.form import Overrides
from tasks.harvest import Settled
from tasks.job_notes import Submission
from tasks.journal import RunFolder
from tasks.keys import KeySet
from tasks.lane_report import batch_lane_of
from tasks.ledger import Ledger
from tasks.limiter import LimiterStatistics
from tasks.memory import peak_bytes
from tasks.notes import OUTCOMES, About, Call, Refused
from tasks.params import Config
from tasks.plan import chunks_of, cost_of, texts_of
from tasks.providers import Space
from tasks.publish import Published, publish
from tasks.quarantine import Quarantine
from tasks.read.tree import CHANGED
from tasks.recover import Recovered
from tasks.report import (
    Calls,
    Chunks,
    Concurrency,
    Cost,
    Latency,
    LeftOut,
    Memory,
    RunReport,
    Saved,
    Seconds,
    Texts,
    Throughput,
    Tokens,
    ledger_row,
    place,
)
from tasks.scan import keep_scan
from tasks.schemas import CHANGES, DELETIONS
from tasks.stamps import keep_stamps
from tasks.survey import Survey

LEFT_OUT_SHOWN = 20
"""Chunks left out that a report names."""


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


def about_run(config: Config, space: Space, run_id: str, clock: Clock) -> About:
    """What the run is, before it has done anything; `space` is that of its vectors."""
    return About(
        run_id=run_id,
        name=config.name,
        index=config.index.place,
        started_at=clock.started_at.isoformat(timespec="milliseconds"),
        concurrency=config.limits.concurrency,
        model=space.model_name,
    )


def died_report(about: About, calls: Sequence[Call]) -> RunReport:
    """The report of a run that was killed."""
    return ended_report(about, calls, "died", "The run ended without a word.")


def record_notes(folder: RunFolder, calls: Sequence[Call]) -> None:
    """Enter what a run wrote down, its calls and refused texts, in ledger and quarantine."""
    Ledger(folder.state_uri).record_calls(calls)
    now = datetime.now(tz=UTC).isoformat(timespec="milliseconds")
    for space_id, refused in folder.refused().items():
        Quarantine(folder.state_uri, space_id).add(refused.values(), folder.run_id, now)


def enter(report: RunReport, folder: RunFolder) -> list[Call]:
    """Enter a run that ended in the ledger, with what it wrote down; its calls."""
    calls = folder.calls()
    record_notes(folder, calls)
    Ledger(folder.state_uri).record_run(ledger_row(report))
    folder.forget_notes()
    return calls


def record_death(folder: RunFolder, calls: Sequence[Call]) -> None:
    """Enter a run that was killed in the ledger, with what it wrote down."""
    record_notes(folder, calls)
    if about := folder.about():
        Ledger(folder.state_uri).record_run(ledger_row(died_report(about, calls)))


def publish_found(survey: Survey, filled: Filled, run_id: str) -> Published:
    """Publish what a run has filled; raises as `publish`."""
    return publish(
        rows=filled.rows,
        deletions=filled.deletions,
        updates=filled.updates,
        index=survey.config.index,
        identity=survey.identity,
        cache=survey.cache,
        run_id=run_id,
        sizes=survey.sizes,
    )


def keep_found(survey: Survey, filled: Filled, published: Published) -> None:
    """Keep what the run found in files, so that the next one need not read them all."""
    keyed = survey.keyed
    if keyed.stamped is None or not published.generation:
        return
    if filled.unsettled:  # some file changed while it was read, and which one nobody knows
        keep_stamps(survey.config, None, published.generation, published.version)
    elif keyed.fresh or published.way != "none":
        keep_stamps(survey.config, keyed.stamped, published.generation, published.version)


def keep_scanned(survey: Survey, filled: Filled) -> None:
    """Keep what the run knows of the index at its end, so that the next one need not read it."""
    # A row that was held while the columns changed has no longer the values that were scanned.
    if survey.same_columns:
        keep_scan(
            survey.config,
            survey.indexed,
            survey.indexed_version,
            filled.rows,
            filled.deletions,
        )


def settle_quarantine(
    survey: Survey, overrides: Overrides, refused: Sequence[Refused], run_id: str
) -> dict[bytes, str]:
    """Bring the quarantine in step with what a run has seen.

    Returns:
        Why each text is left out, by its hash.
    """
    quarantine, now = survey.quarantine, datetime.now(tz=UTC).isoformat(timespec="milliseconds")
    quarantine.saw(survey.looked_up.quarantined.to_pylist(), run_id, now)
    if overrides.retry_quarantined:
        taken = survey.cache.holds(quarantine.hashes)
        quarantine.release(quarantine.hashes.filter(pa.array(taken)).to_pylist())
    return quarantine.reasons | {text.text_hash: text.reason for text in refused}


def embedded_texts(calls: Sequence[Call]) -> int:
    """Texts of the corpus that `calls` brought vectors of."""
    return sum(call.texts for call in calls if call.status == "ok" and call.cause != "proof")


def finished_report(
    *,
    survey: Survey,
    filled: Filled,
    published: Published,
    recovered: Recovered,
    calls: Sequence[Call],
    settled: Settled,
    shared: Shared,
    sent: LimiterStatistics,
    reasons: Mapping[bytes, str],
    about: About,
    clock: Clock,
) -> RunReport:
    """The report of a run that published, or had nothing to publish.

    `calls` are its own, beside those that `settled` has from the Batch lane.
    """
    counts = tally(filled.changes.load(CHANGES), filled.deletions.load(DELETIONS))
    at_once, calls = calls, [*settled.calls, *calls]
    tokens = _tokens(calls)
    embedded = embedded_texts(calls)
    left_out = KeySet(filled.left_out.column("text_hash").combine_chunks())
    skipped = Counter(survey.keyed.notes.skipped)
    if filled.unsettled:
        skipped[CHANGED] += filled.unsettled
    state = "unchanged" if published.way == "none" else "completed"
    incomplete = bool(filled.unsettled or survey.keyed.notes.failed or survey.compared.held)
    if incomplete:
        state = "incomplete"
    if filled.left_out.num_rows:
        state = "quarantined"
    embed_s = clock.seconds.get("embed", 0.0)
    return RunReport(
        run_id=about.run_id,
        name=about.name,
        index=about.index,
        model=about.model,
        generation=published.generation,
        published=published.way,
        state=state,
        started_at=about.started_at,
        chunks=chunks_of(survey, counts, quarantined=filled.left_out.num_rows),
        texts=texts_of(survey, embedded, shared.texts),
        calls=_calls(calls),
        tokens=tokens,
        cost=cost_of(
            survey,
            tokens.billed,
            left_out,
            shared.tokens,
            lane_saves=survey.facts.usd(settled.tokens) - settled.usd,
        ),
        seconds=Seconds(
            read=survey.keyed.read_s,
            fingerprint=survey.keyed.fingerprint_s,
            compare=survey.compare_s,
            lookup=survey.lookup_s,
            embed=embed_s,
            publish=clock.seconds.get("publish", 0.0),
            total=clock.total(),
        ),
        throughput=_throughput(survey.keyed, at_once, embed_s, sent),
        latency_ms=_latency(at_once),
        concurrency=Concurrency(
            limit=survey.config.limits.concurrency,
            reached=sent.peak_in_flight,
            busy_fraction=sent.in_flight_seconds / sent.slot_seconds if sent.slot_seconds else 0.0,
        ),
        memory=Memory(peak_bytes=peak_bytes()),
        known_texts=(
            survey.compared.unique_texts
            - survey.packed.texts
            - len(survey.looked_up.quarantined)
            - survey.looked_up.came
            + shared.texts
        ),
        refused_texts=len(filled.left_out.column("text_hash").unique()),
        failed_calls=_failed_calls(calls),
        waited_seconds=sent.waited_seconds,
        refused=_left_out(filled, reasons),
        skipped=dict(skipped),
        examples=survey.keyed.notes.examples,
        held=survey.compared.held,
        recovered_vectors=recovered.vectors,
        unreadable_answers=len(recovered.set_aside),
        incomplete=incomplete,
        batch_lane=batch_lane_of(survey, settled),
    )


def waiting_report(
    survey: Survey,
    settled: Settled,
    submitted: Sequence[Submission],
    about: About,
    clock: Clock,
) -> RunReport:
    """The report of a run that ends while texts are in the Batch lane; the index is as it was."""
    report = ended_report(about, settled.calls, "waiting", "", clock.total())
    lane = batch_lane_of(survey, settled, submitted)
    left = survey.packed.texts - lane.submitted_texts
    saved = survey.facts.usd(settled.tokens) - settled.usd
    return report.model_copy(
        update={
            "texts": texts_of(survey, report.texts.embedded),
            "batch_lane": lane.model_copy(update={"left_texts": left}),
            "cost": Cost(
                usd=settled.usd,
                usd_without_reuse=settled.usd + saved,
                saved_usd=Saved(batch_lane=saved),
            ),
        }
    )


def ended_report(
    about: About, calls: Sequence[Call], state: str, error: str, seconds: float = 0.0
) -> RunReport:
    """The report of a run that failed, died or was cancelled; what it paid for is kept."""
    tokens = _tokens(calls)
    embedded = embedded_texts(calls)
    return RunReport(
        run_id=about.run_id,
        name=about.name,
        index=about.index,
        model=about.model,
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
        latency_ms=_latency(calls),
        concurrency=Concurrency(limit=about.concurrency),
        memory=Memory(peak_bytes=peak_bytes() if seconds else 0),
        failed_calls=_failed_calls(calls),
        error=error,
    )


def _calls(calls: Sequence[Call]) -> Calls:
    ended = Counter(OUTCOMES.get(call.status, "failed") for call in calls)
    return Calls(**ended, retried=sum(call.cause == "retry" for call in calls))


def _failed_calls(calls: Sequence[Call]) -> dict[str, int]:
    failed = Counter(call.status for call in calls if call.status not in OUTCOMES)
    return dict(failed.most_common())


def _tokens(calls: Sequence[Call]) -> Tokens:
    return Tokens(
        estimated=sum(call.tokens_estimated for call in calls if call.status == "ok"),
        billed=sum(call.tokens_billed for call in calls),
    )


def _throughput(
    read: Keyed, calls: Sequence[Call], seconds: float, sent: LimiterStatistics
) -> Throughput:
    embedded, tokens = embedded_texts(calls), sum(call.tokens_billed for call in calls)
    limited = sent.requests_per_minute or sent.tokens_per_minute
    sending = bool(embedded and seconds)
    read_s = read.read_s + read.fingerprint_s
    return Throughput(
        chunks_per_second=embedded / seconds if sending else 0.0,
        tokens_per_second=tokens / seconds if sending else 0.0,
        documents_per_second=(read.notes.documents - read.notes.untouched) / read_s,
        kilobytes_per_second=read.text_bytes / 1000 / read_s,
        limit_used_fraction=sent.limit_used_fraction if sending and limited else None,
        requests_per_minute=sent.requests_per_minute,
        tokens_per_minute=sent.tokens_per_minute,
    )


def _latency(calls: Sequence[Call]) -> Latency:
    ok = [call.seconds * 1000 for call in calls if call.status == "ok" and call.lane == "realtime"]
    if not ok:
        return Latency()
    p50, p95, p99 = np.percentile(ok, [50, 95, 99])
    return Latency(p50=float(p50), p95=float(p95), p99=float(p99))


def _left_out(filled: Filled, reasons: Mapping[bytes, str]) -> tuple[LeftOut, ...]:
    """The first of the chunks whose text is refused."""
    rows = filled.left_out.slice(0, LEFT_OUT_SHOWN).to_pylist()
    return tuple(
        LeftOut(chunk=place(row), reason=reasons.get(row["text_hash"], "refused")) for row in rows
    )
