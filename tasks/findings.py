"""Findings: what verify can find, in the words in which people read it."""

from collections.abc import Iterable, Sequence
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from tasks.budget import usd_text
from tasks.report import Part
from tasks.soundness import Fault, Faults
from tasks.summary import Row

EXAMPLES = 5
"""Places that a finding names."""
RECALL_BOUND = 0.9
"""Least recall@10 of a vector index against exact search that goes without a word."""


class Kind(NamedTuple):
    """A kind of finding: what it is called, and what to do about it."""

    label: str
    to_do: str


_REINDEX = "Run `embed-once reindex`: the corpus has changed, or a row was lost."
_REPAIR = "Run `embed-once verify --repair`."
_VECTOR = (
    "Run `embed-once verify --repair`: it takes the vector from where a good one is, and takes "
    "the row out where there is none, so that the next reindex pays for that text alone."
)
_ENTRY = (
    "Run `embed-once verify --repair`: the entry is dropped, and taken from the index where that "
    "has a good one."
)

_FAULTS: dict[Fault, tuple[str, str]] = {
    Fault.NOT_FINITE: ("not_finite", "with numbers that are not finite"),
    Fault.ZERO: ("zero", "of zeros"),
    Fault.CONSTANT: ("constant", "of one number throughout"),
    Fault.NORM: ("norm", "that are not of length 1"),
    Fault.TYPE: ("type", "of another dimension or type than the space has"),
    Fault.WRONG: ("wrong_vector", "that do not belong to their text"),
    Fault.OTHER_SPACE: ("other_space", "of another space"),
}

KINDS: dict[str, Kind] = {
    "space": Kind(
        "the index is of another space",
        "Go back to the embedding it was made with, or name another index.table.",
    ),
    "columns": Kind(
        "columns of ours that the index lacks, or has as another type",
        "Drop the table and run `embed-once reindex`: what the cache holds costs nothing.",
    ),
    "splitter": Kind(
        "rows cut by another splitter",
        "Run `embed-once reindex --accept-splitter`, or go back to the former splitter. Until "
        "then the corpus cannot be held against the index.",
    ),
    "missing": Kind("rows missing", _REINDEX),
    "stale": Kind("rows whose text, metadata or lines are old", _REINDEX),
    "orphan": Kind("rows that are no longer in the corpus", _REINDEX),
    "duplicate": Kind("rows that repeat an id", _REPAIR),
    "hash": Kind("rows whose text_hash is not that of their text", _REPAIR),
    "quarantined": Kind(
        "rows whose text is quarantined",
        "Run `embed-once verify --repair`: they go, or, where the cache holds the provider's "
        "answer for the text, it leaves the quarantine.",
    ),
    "recall": Kind(
        f"recall@10 of the vector index below {RECALL_BOUND:.0%}",
        "Build the vector index anew, or with finer settings.",
    ),
    **{name: Kind(f"vectors {what}", _VECTOR) for name, what in _FAULTS.values()},
    **{f"cache_{name}": Kind(f"cache entries {what}", _ENTRY) for name, what in _FAULTS.values()},
    "cache_duplicate": Kind("cache entries that repeat a text_hash", _REPAIR),
    "journal": Kind(
        "answers in the journal that cannot be read",
        "Run `embed-once verify --repair`: they are set aside. What was in them is paid for "
        "again where it is needed.",
    ),
    "tag": Kind("generations whose version is gone", _REPAIR),
    "commit": Kind(
        "commits that no generation names", "Run `embed-once reindex` or `verify --repair`."
    ),
}
"""Every kind, by its name in the JSON."""


class Finding(Part):
    """Something that is not as it should be.

    Attributes:
        kind: A key of KINDS.
        count: Rows, entries or files of that kind.
        examples: The first few: places such as `guide.md:3-9`, hashes or files.
        what: The kind in words.
        to_do: What a person does about it.
    """

    kind: str
    count: int
    examples: tuple[str, ...] = ()
    what: str
    to_do: str


class ToPay(Part):
    """What only the provider can mend: texts that need a vector and have none anywhere."""

    texts: int = 0
    tokens: int = 0
    usd: float = 0.0


class Repair(Part):
    """What was mended, none of it paid for.

    Attributes:
        found: What was found before.
        generation: The newest one afterwards.
        published: Whether it is a new one.
        written: Rows written.
        added: Those of them that the index lacked.
        deleted: Rows taken out, copies of others included.
        entries_dropped: Entries dropped from the cache.
        entries_added: Vectors put into the cache from index and journals.
        released: Texts taken out of the quarantine, since the provider has embedded them.
        set_aside: Unreadable journal files moved to `state.uri`/set-aside.
        tags_removed: Tags of generations that are gone.
    """

    found: tuple[Finding, ...] = ()
    generation: int = 0
    published: bool = False
    written: int = 0
    added: int = 0
    deleted: int = 0
    entries_dropped: int = 0
    entries_added: int = 0
    released: int = 0
    set_aside: int = 0
    tags_removed: int = 0


class Verified(Part):
    """What verify saw; after a repair, what it saw afterwards.

    Attributes:
        source: Absolute path of the corpus.
        index: Folder and table.
        space: Provider, model, dimension and dtype.
        generation: The newest one; 0 where there is none.
        rows: Rows in the index.
        cached: Entries in the cache.
        embedded_again: Texts embedded again to see whether their vectors are right.
        recall: recall@10 of the vector index; null where there is none.
        answers_waiting: Vectors in the journal that the next run will take up.
        unread: Rows that stay because their document could not be read.
        findings: All that is not as it should be.
        to_pay: What only the provider can mend.
        usd: What `embedded_again` cost.
        repair: What was mended; null where nothing was to be.
    """

    name: str
    source: str
    index: str
    space: str
    generation: int
    rows: int
    cached: int
    embedded_again: int
    recall: float | None
    answers_waiting: int
    unread: int
    findings: tuple[Finding, ...]
    to_pay: ToPay
    usd: float
    seconds: float
    repair: Repair | None = None

    @property
    def clean(self) -> bool:
        """Whether nothing is wrong, or nothing any more."""
        return not self.findings


def finding(kind: str, count: int, examples: Iterable[str] = ()) -> list[Finding]:
    """The finding of this kind, or none where there is nothing to count."""
    if not count:
        return []
    words = KINDS[kind]
    return [
        Finding(
            kind=kind, count=count, examples=tuple(examples), what=words.label, to_do=words.to_do
        )
    ]


def fault_kinds(faults: Faults, prefix: str = "") -> list[tuple[str, npt.NDArray[np.int64]]]:
    """The kinds of `faults` with the positions at which each stands."""
    return [
        (prefix + name, np.flatnonzero(faults == fault)) for fault, (name, _) in _FAULTS.items()
    ]


def headline(verified: Verified) -> str:
    """What was seen, in one sentence."""
    left = sum(each.count for each in verified.findings)
    done = verified.repair
    if done is None:
        if verified.clean:
            return f"{verified.name}: index, cache and corpus agree, {verified.rows:,} rows."
        return f"{verified.name}: not everything is as it should be, found: {left:,}."
    found = sum(each.count for each in done.found)
    mended = f"generation {done.generation} published, " if done.published else ""
    return f"{verified.name}: {mended}found: {found:,}, left: {left:,}, {verified.rows:,} rows."


def verified_rows(verified: Verified) -> list[Row]:
    """What was seen as label and value, in the order people read it."""
    rows = [
        ("source", verified.source),
        ("index", verified.index),
        ("space", verified.space),
        ("generation", str(verified.generation)),
        ("rows", f"{verified.rows:,}"),
        ("cache entries", f"{verified.cached:,}"),
    ]
    if verified.embedded_again:
        cost = f" for {usd_text(verified.usd)}" if verified.usd else ""
        rows.append(("embedded again", f"{verified.embedded_again:,} texts{cost}"))
    if verified.recall is not None:
        rows.append(("recall@10", f"{verified.recall:.3f} of the vector index"))
    if verified.answers_waiting:
        rows.append(
            ("answers waiting", f"{verified.answers_waiting:,} in the journal, for the next run")
        )
    if verified.unread:
        rows.append(("kept unread", f"{verified.unread:,} (not readable in the corpus)"))
    rows += _repair_rows(verified.repair) if verified.repair else []
    rows += [("found", _line(each)) for each in verified.findings]
    pay = verified.to_pay
    if pay.texts:
        price = usd_text(pay.usd)
        rows.append(("to pay", f"{pay.texts:,} texts, about {pay.tokens:,} tokens, {price}"))
    return [*rows, ("time", f"{verified.seconds:.1f} s")]


def to_do_lines(findings: Sequence[Finding]) -> list[str]:
    """Each thing to do once, in the order of the findings."""
    return list(dict.fromkeys(each.to_do for each in findings))


def _repair_rows(repair: Repair) -> list[Row]:
    rows = [("was found", _line(each)) for each in repair.found]
    done = {
        "rows written": repair.written,
        "rows taken out": repair.deleted,
        "cache entries dropped": repair.entries_dropped,
        "cache entries added": repair.entries_added,
        "texts released from quarantine": repair.released,
        "journal files set aside": repair.set_aside,
        "tags removed": repair.tags_removed,
    }
    mended = ", ".join(f"{count:,} {what}" for what, count in done.items() if count)
    return [*rows, ("mended", mended or "nothing")]


def _line(found: Finding) -> str:
    more = ", …" if found.count > len(found.examples) else ""
    shown = f" ({', '.join(found.examples)}{more})" if found.examples else ""
    return f"{found.what}: {found.count:,}{shown}"
