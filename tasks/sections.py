"""Sections: a run report cut into what people ask, in the order in which they ask it.

Terminal, Prefect artifact and HTML file show the same ones. None is empty, and their size does
not grow with the corpus.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from tasks.budget import usd_text
from tasks.notes import Call
from tasks.pictures import Bar, Level, Picture, area, bars, ranges
from tasks.report import BatchLane, Cost, RunReport, Saved
from tasks.summary import (
    ENDED,
    Row,
    calls_text,
    chunk_rows,
    cut,
    figure,
    percent_text,
    saved_text,
    skipped_rows,
    span_text,
    waits_text,
)
from tasks.targets import targets
from tasks.timeline import Measure, Timeline

FEW_CALLS = 3
"""A picture of fewer calls says nothing."""
LONGEST_NAME = 120
LONGEST_REASON = 400
MOST_ROWS = 20
"""Kinds of skipped documents, and chunks left out, that are named."""
MOST_EXAMPLES = 5

FAILURES = {
    "ProviderBusy": "provider busy, or no answer",
    "AnswerRejected": "wrong answer",
    "ProviderUnreachable": "nobody at the address",
    "BatchRefused": "a text refused",
    "ProviderDenied": "key, address or model refused",
    "RunStopped": "given up with the run",
    "unforeseen": "unforeseen",
}
"""What errors of calls mean; the others go by their own names."""


@dataclass(frozen=True)
class Section:
    """One question about a run, answered.

    Attributes:
        title: The question, in a word or two.
        rows: Label and value, at least one.
        pictures: The same, and more, to look at.
    """

    title: str
    rows: tuple[Row, ...]
    pictures: tuple[Picture, ...] = ()


def sections(report: RunReport, calls: Sequence[Call] = ()) -> list[Section]:
    """The report in sections.

    Args:
        report: What the run did.
        calls: Its provider calls, for pictures of them; without, there are none.
    """
    good = sum(call.status == "ok" for call in calls)
    over_time = Timeline.of(calls) if good >= FEW_CALLS else None
    found = [
        Section("What changed", _changed(report)),
        Section("Money", _money(report), _money_pictures(report.cost)),
        Section("Batch lane", _batch_lane(report.batch_lane)),
        Section("Calls", _calls(report), _call_pictures(over_time)),
        Section("Limits", _limits(report), _limit_pictures(report, over_time)),
        Section("Failed or left out", _failures(report)),
        Section("Time", _time(report), _time_pictures(report)),
        Section("Targets", targets(report)),
    ]
    return [section for section in found if section.rows]


def _changed(report: RunReport) -> tuple[Row, ...]:
    rows = [("index", cut(report.index, LONGEST_NAME))]
    if report.generation:
        same = " (unchanged, no new version)" if report.published == "none" else ""
        rows.append(("generation", f"{report.generation:,}{same}"))
    if report.state in ENDED:
        return tuple(rows)
    counted = chunk_rows(report.chunks)
    rows += [row for row in counted if row[0] == "chunks" or row[1] != "0"]
    if report.chunks.duplicate:
        rows.append(
            ("duplicates", f"{report.chunks.duplicate:,} (their text stands elsewhere too)")
        )
    return tuple(rows)


def _money(report: RunReport) -> tuple[Row, ...]:
    if report.published == "rollback" or report.state == "not approved":
        return ()
    texts, tokens, cost = report.texts, report.tokens, report.cost
    embedded = f"{texts.embedded:,}" if texts.embedded else "none"
    if texts.unique:
        embedded += f" of {texts.unique:,}"
    if texts.from_cache:
        embedded += f" ({texts.from_cache:,} from the cache)"
    rows = [("texts embedded", embedded)]
    if tokens.billed or tokens.estimated:
        rows.append(("tokens", f"{tokens.billed:,} billed, {tokens.estimated:,} estimated"))
    free = "nothing (the model has no list price)" if tokens.billed else "nothing"
    rows.append(("spent", f"{usd_text(cost.usd)} at list price" if cost.usd else free))
    if causes := _saved(cost.saved_usd):
        usd, without = sum(causes.values()), cost.usd_without_reuse
        rows += [
            ("saved", f"{usd_text(usd)}, {percent_text(usd / without)} ({saved_text(causes)})"),
            ("without reuse", usd_text(without)),
        ]
    if report.recovered_vectors:
        count = f"{report.recovered_vectors:,} texts paid for by a run that died"
        rows.append(("recovered", count))
    return tuple(rows)


def _batch_lane(lane: BatchLane) -> tuple[Row, ...]:
    rows = list[Row]()
    if lane.submitted_texts:
        price = f"about {lane.submitted_tokens:,} tokens, {usd_text(lane.submitted_usd)}"
        rows.append(("submitted", f"{lane.submitted_texts:,} texts, {price}"))
    if lane.waiting_texts:
        jobs = "job" if lane.waiting_jobs == 1 else "jobs"
        rows.append(("waiting", f"{lane.waiting_texts:,} texts in {lane.waiting_jobs:,} {jobs}"))
    if lane.left_texts:
        rows.append(("not sent yet", f"{lane.left_texts:,} texts"))
    if lane.came_texts:
        price = f"{lane.came_tokens:,} tokens, {usd_text(lane.came_usd)}"
        rows.append(("came", f"{lane.came_texts:,} texts, {price}"))
    if lane.superseded_texts:
        gone = f"{lane.superseded_texts:,} texts that the corpus no longer has"
        rows.append(("superseded", f"{gone}; paid for, and kept in the cache"))
    for reason, count in lane.failed.items():
        rows.append((f"failed: {cut(reason, LONGEST_NAME)}", f"{count:,} texts"))
    if lane.why:
        rows.append(("why", lane.why))
    return tuple(rows)


def _saved(saved: Saved) -> dict[str, float]:
    named = saved.model_dump()
    return {cause.replace("_", " "): value for cause, value in named.items() if value}


def _money_pictures(cost: Cost) -> tuple[Picture, ...]:
    causes = _saved(cost.saved_usd)
    if len(causes) + bool(cost.usd) < 2:  # noqa: PLR2004 - a bar alone compares with nothing
        return ()
    rows = [Bar("spent", cost.usd, usd_text(cost.usd))] if cost.usd else []
    for cause, usd in causes.items():
        share = percent_text(usd / cost.usd_without_reuse)
        rows.append(Bar(f"saved: {cause}", usd, f"{usd_text(usd)}, {share}", "good"))
    alt = f"Spent {usd_text(cost.usd)}, saved {usd_text(sum(causes.values()))}"
    return (Picture(alt, bars("US dollars spent and saved, at list price", rows)),)


def _calls(report: RunReport) -> tuple[Row, ...]:
    text = calls_text(report.calls)
    if text == "0":
        return ()
    rows, speed, took = [("calls", text)], report.throughput, report.latency_ms
    if speed.chunks_per_second:
        rate = (
            f"{figure(speed.chunks_per_second)} texts/s, {figure(speed.tokens_per_second)} tokens/s"
        )
        rows.append(("throughput", rate))
    if took.p99:  # what came through the Batch lane took no time of ours
        parts = f"{figure(took.p50)} ms median, {figure(took.p95)} p95, {figure(took.p99)} p99"
        rows.append(("latency", parts))
    slots = report.concurrency
    if slots.reached:
        busy = f"slots busy {percent_text(slots.busy_fraction)}"
        rows.append(("in flight", f"{slots.reached} at most of {slots.limit}, {busy}"))
    return tuple(rows)


def _call_pictures(calls: Timeline | None) -> tuple[Picture, ...]:
    if calls is None:
        return ()
    rates, took, seconds = calls.tokens_per_second(), calls.latencies(), calls.seconds
    speed = area("Tokens per second", seconds, rates)
    latency = ranges(
        "Milliseconds a call took, by when it was sent",
        seconds,
        took.at,
        least=took.least,
        middle=took.median,
        most=took.most,
    )
    over = f"over {span_text(seconds)}"
    return (
        Picture(f"Tokens per second {over}, {figure(float(rates.max()))} at most", speed),
        Picture(f"Latency of calls {over}, {figure(float(took.most.max()))} ms at most", latency),
    )


def _limits(report: RunReport) -> tuple[Row, ...]:
    if calls_text(report.calls) == "0":
        return ()
    speed, rows = report.throughput, list[Row]()
    most = {"tokens": speed.tokens_per_minute, "requests": speed.requests_per_minute}
    if named := " and ".join(f"{limit:,} {what}" for what, limit in most.items() if limit):
        rows.append(("account's limit", f"{named} a minute"))
    if speed.limit_used_fraction is not None:
        rows.append(("used", f"{percent_text(speed.limit_used_fraction)} of it"))
    if waited := waits_text(report.waited_seconds):
        rows.append(("waited for", waited))
    return tuple(rows)


def _limit_pictures(report: RunReport, calls: Timeline | None) -> tuple[Picture, ...]:
    """What each minute held, of the limit that was used most."""
    speed = report.throughput
    known: dict[Measure, int] = {}
    if speed.tokens_per_minute:
        known["tokens"] = speed.tokens_per_minute
    if speed.requests_per_minute:
        known["requests"] = speed.requests_per_minute
    if calls is None or not known:
        return ()
    held = {measure: calls.last_minute(measure) for measure in known}
    measure = max(known, key=lambda each: float(held[each].max()) / known[each])
    limit, most = known[measure], float(held[measure].max())
    throttled = report.calls.throttled
    drawn = area(
        f"{measure.title()} in the last 60 seconds",
        calls.seconds,
        held[measure],
        level=Level(f"limit: {limit:,} {measure} a minute", limit),
        marks=calls.throttled_at(),
        marked=f"throttled: {throttled:,} {'call' if throttled == 1 else 'calls'}",
    )
    alt = f"{measure.title()} in the last minute, {most:,.0f} at most of {limit:,}"
    return (Picture(alt, drawn),)


def _failures(report: RunReport) -> tuple[Row, ...]:
    rows = list[Row]()
    if report.error:
        rows.append(("error", cut(report.error, LONGEST_REASON)))
    if report.failed_calls:
        kinds = ", ".join(
            f"{FAILURES.get(kind, kind)} {count:,}" for kind, count in report.failed_calls.items()
        )
        rows.append(("failed calls", kinds))
    if report.unreadable_answers:
        rows.append(("set aside", f"{report.unreadable_answers:,} unreadable journal files"))
    if report.held:
        rows.append(("kept unread", f"{report.held:,} (in the index, not readable in the corpus)"))
    rows += _skipped(report.skipped, report.examples)
    for each in report.refused[:MOST_ROWS]:
        name = cut(each.chunk, LONGEST_NAME)
        rows.append((f"left out: {name}", cut(each.reason, LONGEST_REASON)))
    if report.refused and (more := report.chunks.quarantined - len(report.refused[:MOST_ROWS])) > 0:
        rows.append(("left out", f"{more:,} more"))
    return tuple(rows)


def _skipped(skipped: Mapping[str, int], examples: Mapping[str, Sequence[str]]) -> list[Row]:
    """What was left out, the most frequent reasons first where there are many."""
    kept = sorted(skipped, key=lambda reason: -skipped[reason])[:MOST_ROWS]
    short = {
        reason: [cut(name, LONGEST_NAME) for name in examples.get(reason, ())[:MOST_EXAMPLES]]
        for reason in kept
    }
    rows = skipped_rows({reason: skipped[reason] for reason in kept}, short)
    rows = [(cut(label, LONGEST_NAME), value) for label, value in rows]
    if more := sum(count for reason, count in skipped.items() if reason not in kept):
        rows.append(("skipped", f"{more:,} more, for other reasons"))
    return rows


def _stages(report: RunReport) -> dict[str, float]:
    """Seconds by stage, in the order of the data; what is in none of them at the end."""
    stages = report.seconds.model_dump(exclude={"total"})
    if not any(stages.values()):
        return {}
    stages["other"] = max(0.0, report.seconds.total - sum(stages.values()))
    return {name: seconds for name, seconds in stages.items() if seconds}


def _time(report: RunReport) -> tuple[Row, ...]:
    total = report.seconds.total
    if not total:
        return ()
    rows, read = [("time", span_text(total))], report.throughput
    for name, seconds in _stages(report).items():
        rows.append((name, f"{span_text(seconds)}, {percent_text(seconds / total)}"))
    if read.documents_per_second:
        rate = f"{figure(read.documents_per_second)} documents/s"
        rows.append(("reading", f"{rate}, {figure(read.kilobytes_per_second)} kB/s"))
    return tuple(rows)


def _time_pictures(report: RunReport) -> tuple[Picture, ...]:
    stages, total = _stages(report), report.seconds.total
    if not stages:
        return ()
    rows = [
        Bar(name, seconds, f"{span_text(seconds)}, {percent_text(seconds / total)}")
        for name, seconds in stages.items()
    ]
    longest = max(stages, key=lambda name: stages[name])
    alt = f"Time by stage: {longest} took {span_text(stages[longest])} of {span_text(total)}"
    return (Picture(alt, bars("Time by stage", rows)),)
