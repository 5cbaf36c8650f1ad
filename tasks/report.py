"""Report: what a run did and what it cost, for machines (JSON) and for people (text)."""

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from pydantic import BaseModel, ConfigDict

if TYPE_CHECKING:
    import pandas as pd


class Part(BaseModel):
    """A part of a report."""

    model_config = ConfigDict(extra="forbid", frozen=True)


class Chunks(Part):
    """Counts of chunks. `duplicate` chunks share their text with an earlier one."""

    total: int
    unchanged: int
    added: int
    changed: int
    moved: int
    deleted: int
    duplicate: int
    quarantined: int = 0


class Texts(Part):
    """Counts of distinct texts.

    Attributes:
        unique: In the whole corpus.
        from_cache: Needed by added, changed or moved chunks and already paid for.
        embedded: Paid for in this run.
    """

    unique: int
    from_cache: int
    embedded: int


class Calls(Part):
    """Counts of provider calls, by how they ended, and of calls that repeated another."""

    ok: int = 0
    failed: int = 0
    throttled: int = 0
    split: int = 0
    retried: int = 0


class Tokens(Part):
    """Tokens of the texts embedded: by our estimate, and by the provider's word."""

    estimated: int = 0
    billed: int = 0


class Saved(Part):
    """List price of what did not have to be embedded, by cause."""

    unchanged: float = 0.0
    duplicates: float = 0.0
    cache: float = 0.0


class Cost(Part):
    """List price in US dollars; free tokens are unknown to us."""

    usd: float = 0.0
    usd_without_reuse: float = 0.0
    saved_usd: Saved = Saved()


class Seconds(Part):
    """Wall time by stage. Filling the batches is part of `embed`."""

    read: float = 0.0
    fingerprint: float = 0.0
    compare: float = 0.0
    lookup: float = 0.0
    embed: float = 0.0
    publish: float = 0.0
    total: float = 0.0


class Throughput(Part):
    """What was reached while embedding.

    Attributes:
        chunks_per_second: Texts embedded a second.
        tokens_per_second: Tokens embedded a second.
        limit_used_fraction: Share of the account's limit a minute; null where there is none.
    """

    chunks_per_second: float = 0.0
    tokens_per_second: float = 0.0
    limit_used_fraction: float | None = None


class Latency(Part):
    """Percentiles of the seconds a successful call took, in milliseconds."""

    p50: float = 0.0
    p95: float = 0.0
    p99: float = 0.0


class Concurrency(Part):
    """Calls in flight: most allowed, and the share of that time they were busy."""

    limit: int
    busy_fraction: float = 0.0


class Memory(Part):
    """Most memory the process held, in bytes."""

    peak_bytes: int = 0


class RunReport(Part):
    """What one run did. Every number is counted.

    Attributes:
        run_id: Also the id of the Prefect flow run.
        name: The config's name.
        index: Folder and table.
        generation: The newest one after the run; 0 where there is none.
        published: "none" where nothing changed, else how it was committed.
        state: "completed", "unchanged", "incomplete" (something was left out),
            "failed" or "died" (killed; told by the run that takes up after it).
        started_at: ISO 8601, UTC.
        skipped: Documents and rows left out, counted by reason.
        examples: The first few of them, by reason.
        held: Rows of the index that stay because they could not be read in the corpus.
        recovered_vectors: Paid for by runs that died, taken up by this one.
        unreadable_answers: Journal files of such runs that are not whole, set aside.
        error: What went wrong, "" if nothing did.
    """

    run_id: str
    name: str
    index: str
    generation: int
    published: str
    state: str
    started_at: str
    chunks: Chunks
    texts: Texts
    calls: Calls
    tokens: Tokens
    cost: Cost
    seconds: Seconds
    throughput: Throughput
    latency_ms: Latency
    concurrency: Concurrency
    memory: Memory
    skipped: dict[str, int] = {}
    examples: dict[str, list[str]] = {}
    held: int = 0
    recovered_vectors: int = 0
    unreadable_answers: int = 0
    error: str = ""

    def to_frame(self) -> "pd.DataFrame":
        """The report as a frame of one row, columns such as `chunks.added`."""
        import pandas as pd  # noqa: PLC0415

        return pd.json_normalize(self.model_dump())


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
        rows.append(("quarantined", f"{chunks.quarantined:,}"))
    return rows


def report_rows(report: RunReport) -> list[Row]:
    """The report as label and value, in the order people read it."""
    calls = report.calls.ok + report.calls.failed + report.calls.throttled
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
        ("calls", f"{calls:,}" + (f" ({report.calls.failed} failed)" if calls else "")),
        ("tokens", f"{report.tokens.billed:,} billed, {report.tokens.estimated:,} estimated"),
        ("cost", cost_text(report.cost)),
        ("time", time_text(report.seconds)),
    ]
    if report.texts.embedded:
        rows.append(("throughput", f"{report.throughput.chunks_per_second:,.0f} texts/s"))
    if report.recovered_vectors:
        rows.append(
            ("recovered", f"{report.recovered_vectors:,} texts paid for by a run that died")
        )
    if report.unreadable_answers:
        rows.append(("set aside", f"{report.unreadable_answers:,} unreadable journal files"))
    if report.held:
        rows.append(("kept unread", f"{report.held:,} (in the index, not readable in the corpus)"))
    rows += skipped_rows(report.skipped, report.examples)
    if report.error:
        rows.append(("error", report.error))
    return rows


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


def headline(report: RunReport) -> str:
    """The run in one sentence."""
    if report.state == "failed":
        return f"{report.name}: failed; the index is as it was."
    left_out = " Something could not be read; its rows stay as they were."
    if report.published == "none":
        sentence = f"{report.name}: nothing changed, nothing embedded, no new version."
        return sentence + (left_out if report.state == "incomplete" else "")
    changed = report.chunks.added + report.chunks.changed + report.chunks.moved
    sentence = (
        f"{report.name}: generation {report.generation} published, {changed:,} chunks written, "
        f"{report.chunks.deleted:,} deleted, {report.texts.embedded:,} texts embedded."
    )
    if report.state == "incomplete":
        sentence += left_out
    return sentence


def cost_text(cost: Cost) -> str:
    """Cost and savings in one line."""
    saved = cost.saved_usd
    parts = [
        f"{cause} ${value:.4f}"
        for cause, value in (
            ("unchanged", saved.unchanged),
            ("duplicates", saved.duplicates),
            ("cache", saved.cache),
        )
        if value
    ]
    without = f"; ${cost.usd_without_reuse:.4f} without reuse" if cost.usd_without_reuse else ""
    return f"${cost.usd:.4f}{without}" + (f" (saved: {', '.join(parts)})" if parts else "")


def time_text(seconds: Seconds) -> str:
    """Wall time with its largest parts."""
    stages = seconds.model_dump(exclude={"total"})
    longest = sorted(stages.items(), key=lambda item: -item[1])[:3]
    parts = ", ".join(f"{name} {value:.1f} s" for name, value in longest if value >= 0.05)  # noqa: PLR2004
    return f"{seconds.total:.1f} s" + (f" ({parts})" if parts else "")


def ledger_row(report: RunReport) -> dict[str, Any]:
    """The report as a row of the ledger."""
    return {
        "run_id": report.run_id,
        "index": report.index,
        "state": report.state,
        "started_at": report.started_at,
        "generation": report.generation,
        "tokens_billed": report.tokens.billed,
        "usd": report.cost.usd,
        "report": report.model_dump_json(),
    }


def _generation(report: RunReport) -> str:
    if report.published == "none":
        return f"{report.generation} (unchanged, no new version)"
    return str(report.generation)


def _cell(value: str) -> str:
    return value.replace("|", "\\|").replace("\n", "<br>")
