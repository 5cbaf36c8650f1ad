"""Report: what a run did and what it cost, in numbers that are counted."""

from collections.abc import Mapping
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
        from_cache: Needed by added, changed or moved chunks and already paid for, before this
            run or by another one meanwhile.
        embedded: Paid for in this run.
    """

    unique: int
    from_cache: int
    embedded: int


class Calls(Part):
    """Counts of provider calls by how they ended, and of those that had to be sent again.

    Attributes:
        ok: Brought vectors.
        failed: Brought none: an error, or a text that is refused.
        throttled: Refused because of the account's limits.
        split: Refused because they held too much.
        retried: Sent again after a failure; each of them is counted above too.
    """

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
    """List price of what did not have to be embedded, or for less in the Batch lane, by cause."""

    unchanged: float = 0.0
    duplicates: float = 0.0
    cache: float = 0.0
    batch_lane: float = 0.0


class BatchLane(Part):
    """What a run had to do with the Batch lane.

    Attributes:
        submitted_texts: Sent there by this run.
        submitted_tokens: Estimated.
        submitted_usd: Their list price there, by that estimate; billed by the run that takes
            them in.
        left_texts: Missing texts that are not sent yet: over the budget or the account's limits, or
            to go at once when all others have come.
        waiting_texts: Texts of the corpus that are there when the run ends.
        waiting_jobs: Jobs under way by then.
        came_texts: Texts whose vectors this run has taken in; `texts.embedded`, `tokens` and
            `cost` have them too.
        came_tokens: Billed.
        came_usd: Their list price.
        superseded_texts: Texts that have come or wait and that the corpus no longer has: they
            are paid for and cached all the same.
        failed: Texts that came without a vector, by what the provider says.
        why: Why the missing texts went this way; "" where nobody asked.
    """

    submitted_texts: int = 0
    submitted_tokens: int = 0
    submitted_usd: float = 0.0
    left_texts: int = 0
    waiting_texts: int = 0
    waiting_jobs: int = 0
    came_texts: int = 0
    came_tokens: int = 0
    came_usd: float = 0.0
    superseded_texts: int = 0
    failed: dict[str, int] = {}
    why: str = ""


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
    """What was reached while embedding, and while reading the corpus.

    Attributes:
        chunks_per_second: Texts embedded a second.
        tokens_per_second: Tokens embedded a second.
        documents_per_second: Documents read and fingerprinted a second.
        kilobytes_per_second: Their text, 1,000 bytes in UTF-8, a second.
        limit_used_fraction: Share of the account's limit a minute; null where there is none.
        requests_per_minute: The account's limit at the end, named or learned; null where none is
            known.
        tokens_per_minute: As above.
    """

    chunks_per_second: float = 0.0
    tokens_per_second: float = 0.0
    documents_per_second: float = 0.0
    kilobytes_per_second: float = 0.0
    limit_used_fraction: float | None = None
    requests_per_minute: int | None = None
    tokens_per_minute: int | None = None


class Latency(Part):
    """Percentiles of the time a successful call took, in milliseconds."""

    p50: float = 0.0
    p95: float = 0.0
    p99: float = 0.0


class Concurrency(Part):
    """Calls in flight at once.

    Attributes:
        limit: Most allowed by the config.
        reached: Most there were.
        busy_fraction: Share of the open slots' time in which a call was in flight; slots
            open and close with what helps.
    """

    limit: int
    reached: int = 0
    busy_fraction: float = 0.0


class LeftOut(Part):
    """A chunk that is not in the index because the provider refuses its text.

    Attributes:
        chunk: Where it stands, say `guide.md:3-9`, or its id.
        reason: What the provider says.
    """

    chunk: str
    reason: str


class Memory(Part):
    """Most memory the process held, in bytes."""

    peak_bytes: int = 0


class RunReport(Part):
    """What one run did. Every number is counted.

    Attributes:
        run_id: Id of the Prefect flow run; `-2`, … follows where it was retried.
        name: The config's name.
        index: Folder and table; "" where there is none.
        model: Provider and model, `voyage/voyage-4`.
        generation: The newest one after the run; 0 where there is none.
        published: "none" where nothing changed, else how it was committed.
        restored: The older generation that a rollback published again; null for other runs.
        state: "completed", "unchanged", "quarantined" (the provider refuses some texts),
            "incomplete" (something could not be read), "failed", "over budget" (it
            stopped at its budget), "waiting" (for the Batch lane), "not approved" (nobody approved
            its price), "cancelled" or "died" (killed; told by the run that takes up after it).
        started_at: ISO 8601, UTC.
        known_texts: Distinct texts of the corpus whose vector was in the index or the cache before
            this run, or paid for by another one meanwhile.
        refused_texts: Those without one, because the provider refuses them.
        failed_calls: `calls.failed` by the name of the error.
        waited_seconds: Time in which the next call waited for its turn, by what it waited for.
        skipped: Documents and rows left out, counted by reason.
        examples: The first few of them, by reason.
        refused: The first of the chunks whose text the provider refuses; `chunks.quarantined`
            counts all of them.
        held: Rows of the index that stay because they could not be read in the corpus.
        recovered_vectors: Paid for by runs that died, taken up by this one.
        unreadable_answers: Journal files of such runs that are not whole, set aside.
        incomplete: Whether something of the corpus could not be read.
        error: What went wrong, "" if nothing did.
    """

    run_id: str
    name: str
    index: str
    model: str
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
    restored: int | None = None
    known_texts: int = 0
    refused_texts: int = 0
    failed_calls: dict[str, int] = {}
    waited_seconds: dict[str, float] = {}
    batch_lane: BatchLane = BatchLane()
    refused: tuple[LeftOut, ...] = ()
    skipped: dict[str, int] = {}
    examples: dict[str, list[str]] = {}
    held: int = 0
    recovered_vectors: int = 0
    unreadable_answers: int = 0
    incomplete: bool = False
    error: str = ""

    def to_frame(self) -> "pd.DataFrame":
        """The report as a frame of one row, columns such as `chunks.added`."""
        import pandas as pd  # noqa: PLC0415

        return pd.json_normalize(self.model_dump())


def place(row: Mapping[str, Any]) -> str:
    """Where the chunk of this row stands, say `guide.md:3-9`."""
    where = row["document"] or row["id"]
    lines = f":{row['start_line']}-{row['end_line']}" if row["start_line"] is not None else ""
    return f"{where}{lines}"


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
