"""Verify: index, cache and corpus held against each other. It writes nothing."""

import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from datetime import UTC, datetime
from itertools import islice
from pathlib import Path
from uuid import uuid4

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc
from lancedb.table import Table

from tasks.cache import Cache
from tasks.catalog import ModelFacts, facts_for
from tasks.errors import IndexHeld
from tasks.examine import Entries, Flags, Rows
from tasks.findings import (
    EXAMPLES,
    RECALL_BOUND,
    Finding,
    ToPay,
    Verified,
    fault_kinds,
    finding,
)
from tasks.form import Overrides
from tasks.index import (
    broken_tags,
    differences,
    generations,
    identity_of,
    is_held,
    open_index,
    reading_index,
    unadopted,
)
from tasks.journal import RunFolder, fold, unfolded_hashes, unreadable
from tasks.judge import FREE_SAMPLE, Asking, judge
from tasks.keys import KeySet, digest_column, document_key, first_of_each, identified
from tasks.params import Config, Index
from tasks.providers import Space
from tasks.providers.opening import open_embedder, open_provider
from tasks.quarantine import Quarantine
from tasks.read import ReadNotes
from tasks.recall import recall
from tasks.report import place
from tasks.run import Clock, about_run, record_notes
from tasks.schemas import (
    CHANGES,
    DELETIONS,
    HASH,
    INDEXED,
    KEYED,
    OWN_COLUMNS,
    metadata_fields,
)
from tasks.survey import Survey, survey


@dataclass
class Differences:
    """How the index differs from the corpus, row by row of either.

    Attributes:
        survey: What a run would know; its corpus, its index.
        corpus: KEYED.
        indexed: INDEXED, row for row as examined.
        changes: CHANGES that a run would make, without texts that are refused.
        orphan: For each row of the index whether it is no longer in the corpus.
        duplicate: The same for rows that repeat the id of an earlier one.
        quarantined: The same for rows whose text is quarantined.
        refused: text_hash of texts that are quarantined and have no vector.
    """

    survey: Survey
    corpus: pa.Table
    indexed: pa.Table
    changes: pa.Table
    orphan: Flags
    duplicate: Flags
    quarantined: Flags
    refused: KeySet

    @property
    def same_splitter(self) -> bool:
        """Whether the corpus was cut as the index was; if not, they cannot be compared."""
        return self.survey.indexed_splitter == self.survey.identity.splitter


@dataclass
class Look:
    """All that one look saw.

    Attributes:
        config: Of which index.
        facts: Of the model.
        entries: The cache.
        rows: The index; None where there is none, or none that can be read.
        differences: Between index and corpus; None where they cannot be compared.
        waiting: text_hash of answers in the journal that no run has folded.
        asked: Texts embedded again.
        recall: recall@10 of the vector index, if there is one.
        findings: What is not as it should be.
    """

    config: Config
    facts: ModelFacts
    entries: Entries
    rows: Rows | None = None
    differences: Differences | None = None
    waiting: pa.Array = field(default_factory=lambda: pa.array([], HASH))
    asked: int = 0
    recall: float | None = None
    findings: list[Finding] = field(default_factory=list)

    def known(self, hashes: pa.Array | pa.ChunkedArray) -> Flags:
        """For each text_hash whether a good vector of it is anywhere."""
        known = self.entries.holds(hashes) | KeySet(self.waiting).holds(hashes)
        if self.rows is not None:
            good = self.rows.hashes.filter(pa.array(self.rows.good))
            known |= KeySet(good).holds(hashes)
        return known

    def to_pay(self) -> ToPay:
        """The texts that the index needs, and that no good vector is known of."""
        if self.differences is None or not self.differences.same_splitter:
            return ToPay()
        found = self.differences
        keys = found.changes.column("key").combine_chunks()
        if self.rows is not None:
            bad = found.indexed.column("key").filter(pa.array(~self.rows.good)).combine_chunks()
            keys = pa.concat_arrays([keys, bad])
        needed = found.corpus.filter(pa.array(KeySet(keys).holds(found.corpus.column("key"))))
        needed = needed.take(pa.array(first_of_each(needed.column("text_hash"))))
        hashes = needed.column("text_hash")
        unknown = ~self.known(hashes) & ~found.refused.holds(hashes)
        tokens = pc.sum(needed.column("tokens").filter(pa.array(unknown))).as_py() or 0
        return ToPay(texts=int(unknown.sum()), tokens=tokens, usd=self.facts.usd(tokens))


def verify(config: Config, sample: int | None = None) -> Verified:
    """Hold index, cache and corpus against each other.

    Args:
        config: Which index.
        sample: Texts to embed again. None: as many as is sensible where that costs nothing,
            else none. Where it costs something, their calls go into the ledger, and answers
            that the cache lacks into the cache.

    Raises:
        SettingsError: The config fits neither corpus nor model.
        IndexHeld: A run changed the index meanwhile.
        EmbedOnceError: Corpus, index or cache cannot be read.
    """
    started = time.perf_counter()
    with paying(config, sample) as folder, tempfile.TemporaryDirectory(prefix="embed-once-") as at:
        seen = look(config, Path(at), sample, folder)
        usd = sum(call.usd for call in folder.calls()) if folder else 0.0
        return verified_of(seen, usd, time.perf_counter() - started)


def is_paid(config: Config, sample: int | None) -> bool:
    """Whether embedding so many texts again costs something."""
    return bool(sample and facts_for(config.embedding).usd_per_million_tokens)


@contextmanager
def paying(config: Config, sample: int | None) -> Iterator[RunFolder | None]:
    """A run's folder for what is paid for, if anything is."""
    if not is_paid(config, sample):
        yield None
        return
    folder, space = RunFolder(config.state.uri, f"verify-{uuid4()}"), open_provider(config).space
    with folder.alive(about_run(config, space, folder.run_id, Clock(datetime.now(tz=UTC)))):
        try:
            yield folder
            fold(folder, Cache(config.state.uri, space))
        finally:
            record_notes(folder, folder.calls())
            folder.forget_notes()


def look(config: Config, staging: Path, sample: int | None, folder: RunFolder | None) -> Look:
    """Look once; errors as in `verify`.

    Args:
        config: Which index.
        staging: For the tables between the stages.
        sample: As in `verify`.
        folder: For what is paid for; None where nothing may be.
    """
    facts = facts_for(config.embedding)
    provider = open_embedder(config) if folder is not None else open_provider(config)
    table = open_index(config.index)
    entries = Entries.of(Cache(config.state.uri, provider.space))
    seen = Look(config, facts, entries)
    seen.findings += state_findings(config, table)
    seen.waiting = _waiting(config, provider.space)
    whole = table is None or not _misfits(seen, table, provider.space)
    if table is not None and whole:
        with reading_index(table):
            seen.rows = Rows.of(table, provider.space, entries, provider.preparation)
    if whole:
        seen.differences = _differences(seen, survey(config, Overrides(), staging, anew=True))
    if seen.rows is not None:
        asking = Asking(
            config,
            provider,
            facts.usd_per_million_tokens,
            sample=FREE_SAMPLE if sample is None else sample,
            folder=folder,
        )
        seen.asked = judge(seen.rows, entries, asking)
        with reading_index(seen.rows.table):
            seen.recall = recall(seen.rows, config)
    now = open_index(config.index)
    if table is not None and (now is None or now.version != table.version):
        raise _changed_meanwhile(config.index)
    _find(seen)
    return seen


def _changed_meanwhile(index: Index) -> IndexHeld:
    return IndexHeld(
        f"Another run changed the index {index.table!r} in {index.uri} while it was looked at. "
        "Run again when it has ended."
    )


def verified_of(seen: Look, usd: float, seconds: float) -> Verified:
    """What was seen, for people and machines."""
    config, table = seen.config, open_index(seen.config.index)
    known = generations(table) if table is not None else []
    found = seen.differences
    return Verified(
        name=config.name,
        source=config.source.path,
        index=config.index.place,
        space=str(seen.entries.cache.space),
        generation=known[-1].number if known else 0,
        rows=table.count_rows() if table is not None else 0,
        cached=len(seen.entries.hashes),
        embedded_again=seen.asked,
        recall=seen.recall,
        answers_waiting=len(seen.waiting),
        unread=found.survey.compared.held if found is not None and found.same_splitter else 0,
        findings=tuple(seen.findings),
        to_pay=seen.to_pay(),
        usd=usd,
        seconds=seconds,
    )


def state_findings(config: Config, table: Table | None, *, ours: bool = False) -> list[Finding]:
    """What is wrong beside rows and entries: journal files, tags, a commit without a name.

    Args:
        config: Of which index.
        table: The index.
        ours: Whether the caller holds the index. Who else does names its commit in a moment.
    """
    lost = unreadable(config.state.uri)
    tags = broken_tags(table) if table is not None else []
    return [
        *finding("journal", len(lost), lost[:EXAMPLES]),
        *finding("tag", len(tags), tags[:EXAMPLES]),
        *finding("commit", int(_nameless(config.index, ours=ours))),
    ]


def _nameless(index: Index, *, ours: bool) -> bool:
    # Again at the end: between the first two the run may have ended.
    return unadopted(index) and (ours or (not is_held(index) and unadopted(index)))


def _waiting(config: Config, space: Space) -> pa.Array:
    return pa.concat_arrays([pa.array([], HASH), *unfolded_hashes(config.state.uri, space)])


def _misfits(seen: Look, table: Table, space: Space) -> bool:
    """Whether the table as a whole is not what the config asks for, so that rows say nothing."""
    identity = identity_of(table)
    wanted = identity.schema(metadata_fields(table.schema))
    odd = [
        own.name
        for own in wanted
        if own.name in OWN_COLUMNS
        and (
            own.name not in table.schema.names
            or (table.schema.field(own.name).type != own.type and own.name != "vector")
        )
    ]
    other = identity.space != space
    if not other:
        odd += sorted({*seen.config.embedding.prepend} - {*table.schema.names})
    seen.findings += finding("columns", len(odd), odd)
    if other:
        theirs = f"{identity.space}{differences(identity.space, space)}"
        seen.findings += finding("space", table.count_rows() or 1, [theirs])
    return bool(odd) or other


def _differences(seen: Look, surveyed: Survey) -> Differences:
    indexed = surveyed.indexed.load(INDEXED)
    rows = len(seen.rows) if seen.rows is not None else 0
    hashes = indexed.column("text_hash").combine_chunks()
    if len(hashes) != rows or (seen.rows is not None and not hashes.equals(seen.rows.hashes)):
        raise _changed_meanwhile(seen.config.index)
    quarantine = Quarantine(seen.config.state.uri, surveyed.identity.space.id).hashes
    paid = seen.entries.holds(quarantine) | KeySet(seen.waiting).holds(quarantine)
    refused = KeySet(quarantine.filter(pa.array(~paid)))
    changes = surveyed.compared.changes.load(CHANGES)
    new = ~np.asarray(changes.column("in_index"), dtype=bool)
    changes = changes.filter(pa.array(~(new & refused.holds(changes.column("text_hash")))))
    gone = surveyed.compared.deletions.load(DELETIONS).column("id").combine_chunks()
    duplicate = np.ones(rows, dtype=bool)
    duplicate[first_of_each(indexed.column("key"))] = False
    return Differences(
        survey=surveyed,
        corpus=surveyed.keyed.table.load(KEYED),
        indexed=indexed,
        changes=changes,
        orphan=KeySet(digest_column(gone)).holds(indexed.column("key")),
        duplicate=duplicate,
        quarantined=KeySet(quarantine).holds(hashes),
        refused=refused,
    )


def _find(seen: Look) -> None:
    """Enter what was seen as findings."""
    found, rows, entries = seen.differences, seen.rows, seen.entries
    if found is not None and rows is not None:

        def there(kind: str, flags: Flags | npt.NDArray[np.int64]) -> None:
            at = np.flatnonzero(flags) if flags.dtype == bool else flags
            few = found.indexed.take(pa.array(at[:EXAMPLES])).to_pylist()
            seen.findings.extend(finding(kind, len(at), map(place, few)))

        if found.same_splitter:
            _find_changes(seen, found)
            there("orphan", found.orphan)
        else:
            seen.findings += finding("splitter", len(rows), [found.survey.indexed_splitter])
        there("duplicate", found.duplicate)
        there("hash", rows.bad_hash)
        there("quarantined", found.quarantined)
        for kind, positions in fault_kinds(rows.faults):
            there(kind, positions)
        if seen.recall is not None and seen.recall < RECALL_BOUND:
            seen.findings += finding("recall", 1, [f"{seen.recall:.3f}"])
    elif found is not None:
        _find_changes(seen, found)
    for kind, at in fault_kinds(entries.faults, "cache_"):
        seen.findings += finding(kind, len(at), _hex(entries, at))
    again = np.flatnonzero(entries.duplicate)
    seen.findings += finding("cache_duplicate", len(again), _hex(entries, again))


def _hex(entries: Entries, at: npt.NDArray[np.int64]) -> list[str]:
    return [each.hex() for each in entries.hashes.take(pa.array(at[:EXAMPLES])).to_pylist()]


def _find_changes(seen: Look, found: Differences) -> None:
    """Missing and stale rows. A row whose hash is wrong counts as that, not as stale."""
    changes, new = found.changes, ~np.asarray(found.changes.column("in_index"), dtype=bool)
    missing = changes.filter(pa.array(new)).column("key")
    seen.findings += finding("missing", len(missing), _places_in_corpus(found, missing))
    keys = changes.filter(pa.array(~new)).column("key")
    at = KeySet(found.indexed.column("key")).positions(keys)
    if seen.rows is not None:
        at = at[~seen.rows.bad_hash[at]]
    few = found.indexed.take(pa.array(at[:EXAMPLES])).to_pylist()
    seen.findings += finding("stale", len(at), map(place, few))


def _places_in_corpus(found: Differences, keys: pa.ChunkedArray) -> list[str]:
    """Where the first chunks with these keys stand; of keys alone that cannot be told."""
    few = KeySet(keys.slice(0, EXAMPLES))
    if not len(few):
        return []
    theirs = found.corpus.filter(pa.array(few.holds(found.corpus.column("key"))))
    documents = set(theirs.column("document_key").to_pylist())
    reader = found.survey.reader
    chunks = reader.chunks(ReadNotes(), lambda document: document_key(document) in documents)
    rows = (
        row
        for batch in identified(chunks, reader.metadata, reader.preparation)
        for row in batch.filter(pa.array(few.holds(digest_column(batch.column("id"))))).to_pylist()
    )
    return [place(row) for row in islice(rows, len(few))]
