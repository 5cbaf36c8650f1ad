"""Summary: plan and report in the words and the order in which people read them."""

from collections.abc import Sequence

from tasks.budget import usd_text
from tasks.report import Calls, Chunks, Cost, RunReport, Seconds

Row = tuple[str, str]


def chunk_rows(chunks: Chunks) -> list[Row]:
    """What became of the chunks, as label and value."""
    rows = [
        ("chunks", f"{chunks.total:,}"),
        ("unchanged", f"{chunks.unchanged:,}"),
        ("added", f"{chunks.added:,}"),
        ("changed", f"{chunks.changed:,}"),
        ("moved", f"{chunks.moved:,}"),
        ("deleted", f"{chunks.deleted:,}"),
    ]
    if chunks.quarantined:
        rows.append(("quarantined", f"{chunks.quarantined:,} (their text is refused)"))
    return rows


def report_rows(report: RunReport) -> list[Row]:
    """The report as label and value, in the order people read it."""
    rows = [
        ("index", report.index),
        ("generation", _generation(report)),
        *chunk_rows(report.chunks),
        (
            "texts embedded",
            (
                f"{report.texts.embedded:,} of {report.texts.unique:,}"
                f" ({report.texts.from_cache:,} from the cache)"
            ),
        ),
        ("calls", calls_text(report.calls)),
        ("tokens", f"{report.tokens.billed:,} billed, {report.tokens.estimated:,} estimated"),
        ("cost", cost_text(report.cost)),
        ("time", time_text(report.seconds)),
    ]
    read = report.throughput
    if read.documents_per_second:
        rate = (
            f"{read.documents_per_second:,.0f} documents/s, {read.kilobytes_per_second:,.0f} kB/s"
        )
        rows.append(("reading", rate))
    if report.texts.embedded:
        rows += sending_rows(report)
    if report.recovered_vectors:
        rows.append(
            ("recovered", f"{report.recovered_vectors:,} texts paid for by a run that died")
        )
    if report.unreadable_answers:
        rows.append(("set aside", f"{report.unreadable_answers:,} unreadable journal files"))
    if report.held:
        rows.append(("kept unread", f"{report.held:,} (in the index, not readable in the corpus)"))
    rows += skipped_rows(report.skipped, report.examples)
    rows += [(f"left out: {each.chunk}", each.reason) for each in report.refused]
    if report.chunks.quarantined > len(report.refused) > 0:
        more = report.chunks.quarantined - len(report.refused)
        rows.append(("left out", f"{more:,} more"))
    if report.error:
        rows.append(("error", report.error))
    return rows


def calls_text(calls: Calls) -> str:
    """Calls with what became of them, in one line."""
    total = calls.ok + calls.failed + calls.throttled + calls.split
    named = {
        "failed": calls.failed,
        "throttled": calls.throttled,
        "split": calls.split,
        "retried": calls.retried,
    }
    parts = [f"{count:,} {name}" for name, count in named.items() if count]
    return f"{total:,}" + (f" ({', '.join(parts)})" if parts else "")


def sending_rows(report: RunReport) -> list[Row]:
    """How well the account and the connections were used, as label and value."""
    used = report.throughput.limit_used_fraction
    rows = [
        (
            "throughput",
            f"{report.throughput.chunks_per_second:,.0f} texts/s, "
            f"{report.throughput.tokens_per_second:,.0f} tokens/s"
            + (f", {used:.0%} of the account's limit" if used is not None else ""),
        ),
        (
            "latency",
            (
                f"{report.latency_ms.p50:,.0f} ms median, {report.latency_ms.p95:,.0f} p95, "
                f"{report.latency_ms.p99:,.0f} p99"
            ),
        ),
        (
            "in flight",
            (
                f"{report.concurrency.reached} at most of {report.concurrency.limit}, "
                f"slots busy {report.concurrency.busy_fraction:.0%}"
            ),
        ),
    ]
    waits = {cause: seconds for cause, seconds in report.waited_seconds.items() if seconds >= 1}
    if waits:
        longest = sorted(waits.items(), key=lambda item: -item[1])
        rows.append(("waited for", ", ".join(f"{cause} {s:,.0f} s" for cause, s in longest)))
    return rows


def prepend_rows(names: Sequence[str]) -> list[Row]:
    """What stands in front of texts: why one counts as another that reads as before."""
    if not names:
        return []
    what = "a rename" if "document" in names else "another value"
    return [("in front of texts", f"{', '.join(names)} ({what} makes a new text)")]


def skipped_rows(skipped: dict[str, int], examples: dict[str, list[str]]) -> list[Row]:
    """What was left out, as label and value."""
    rows = []
    for reason, count in sorted(skipped.items()):
        names = examples.get(reason, [])
        more = ", …" if count > len(names) else ""
        shown = f" ({', '.join(map(repr, names))}{more})" if names else ""
        rows.append((f"skipped: {reason}", f"{count:,}{shown}"))
    return rows


def as_text(rows: Sequence[Row]) -> str:
    """Rows as aligned lines."""
    width = max(len(label) for label, _ in rows)
    return "\n".join(f"  {label:<{width}}  {value}" for label, value in rows)


def as_markdown(title: str, sentence: str, rows: Sequence[Row]) -> str:
    """Rows as a Markdown table under a title and a sentence."""
    lines = [f"| {label} | {_cell(value)} |" for label, value in rows]
    return "\n".join([f"## {title}", "", sentence, "", "| | |", "|---|---|", *lines])


ENDED = {
    "failed": "failed; the index is as it was.",
    "over budget": ("stopped at its budget; the index is as it was, what was paid for is kept."),
    "not approved": "not approved; the index is as it was, nothing was spent.",
    "cancelled": "cancelled; the index is as it was, what was paid for is kept.",
}
"""What is said of runs that ended early, by their state."""


def headline(report: RunReport) -> str:
    """The run in one sentence."""
    if report.state in ENDED:
        return f"{report.name}: {ENDED[report.state]}"
    if report.published == "rollback":
        return (
            f"{report.name}: generation {report.generation} published, the same as generation "
            f"{report.restored}. A reindex brings the index forward again at no cost."
        )
    left_out = ""
    if report.chunks.quarantined:
        left_out += f" {report.chunks.quarantined:,} chunks are left out: their text is refused."
    if report.incomplete:
        left_out += " Something could not be read; its rows stay as they were."
    if report.published == "none":
        sentence = f"{report.name}: nothing changed, nothing embedded, no new version."
        return sentence + left_out
    changed = report.chunks.added + report.chunks.changed + report.chunks.moved
    sentence = (
        f"{report.name}: generation {report.generation} published, {changed:,} chunks written, "
        f"{report.chunks.deleted:,} deleted, {report.texts.embedded:,} texts embedded."
    )
    return sentence + left_out


def cost_text(cost: Cost) -> str:
    """Cost and savings in one line."""
    saved = cost.saved_usd
    parts = [
        f"{cause} {usd_text(value)}"
        for cause, value in (
            ("unchanged", saved.unchanged),
            ("duplicates", saved.duplicates),
            ("cache", saved.cache),
        )
        if value
    ]
    without = (
        f"; {usd_text(cost.usd_without_reuse)} without reuse" if cost.usd_without_reuse else ""
    )
    return f"{usd_text(cost.usd)}{without}" + (f" (saved: {', '.join(parts)})" if parts else "")


def span_text(seconds: float) -> str:
    """A span of time as people say it: 40 ms, 3.2 s, 43 min, 2 h 5 min."""
    if seconds < 0.1:  # noqa: PLR2004
        return f"{seconds * 1000:.0f} ms" if seconds >= 1e-3 else "under 1 ms"  # noqa: PLR2004
    if seconds < 90:  # noqa: PLR2004
        return f"{seconds:.1f} s"
    minutes = round(seconds / 60)
    if minutes < 90:  # noqa: PLR2004
        return f"{minutes} min"
    hours, minutes = divmod(minutes, 60)
    return f"{hours} h {minutes} min" if minutes else f"{hours} h"


def time_text(seconds: Seconds) -> str:
    """Wall time with its largest parts."""
    stages = seconds.model_dump(exclude={"total"})
    longest = sorted(stages.items(), key=lambda item: -item[1])[:3]
    parts = ", ".join(f"{name} {value:.1f} s" for name, value in longest if value >= 0.05)  # noqa: PLR2004
    return f"{seconds.total:.1f} s" + (f" ({parts})" if parts else "")


def _generation(report: RunReport) -> str:
    if report.published == "none":
        return f"{report.generation} (unchanged, no new version)"
    return str(report.generation)


def _cell(value: str) -> str:
    return value.replace("|", "\\|").replace("\n", "<br>")
