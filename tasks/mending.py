"""Mending: which rows of the index are written anew, and which are taken out.

A row in the corpus is written from there, one that could not be read from the index itself.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from tasks.cache import Cache
from tasks.errors import SettingsError
from tasks.examine import Flags
from tasks.fill import Filling
from tasks.keys import KeySet, digest_column, first_of_each
from tasks.limits import Limits, tokens_of
from tasks.providers import Provider
from tasks.schemas import (
    CHANGES,
    DELETIONS,
    HASH,
    PACKED,
    TableRef,
    metadata_fields,
    rows_schema,
)
from tasks.soundness import Fault
from tasks.verify import Differences, Look

TAKEN_ROWS = 4096


@dataclass(frozen=True)
class Mending:
    """What is to happen to the index.

    Attributes:
        changes: CHANGES to take from the corpus.
        copies: Positions of index rows to write again with the vector that the cache has.
        leaving: For each row of the index whether it goes for good.
    """

    changes: pa.Table
    copies: npt.NDArray[np.int64]
    leaving: Flags

    @classmethod
    def of(cls, seen: Look, found: Differences, cache: Cache) -> "Mending":
        """What can be mended by what `cache` holds now."""
        keys, hashes = found.indexed.column("key"), found.indexed.column("text_hash")
        bad = bad_rows(seen, found)
        stale = np.asarray(found.changes.column("in_index"), dtype=bool)
        stale_keys = KeySet(found.changes.column("key").filter(pa.array(stale)))
        touched = keys.filter(pa.array((bad | stale_keys.holds(keys)) & ~found.orphan))
        touched = touched.take(pa.array(first_of_each(touched)))

        at = np.full(len(touched), -1)
        if found.same_splitter:
            at = KeySet(found.corpus.column("key")).positions(touched)
        in_corpus = at >= 0
        texts = found.corpus.column("text_hash").take(pa.array(at[in_corpus]))
        refused, from_corpus = np.zeros(len(at), dtype=bool), np.zeros(len(at), dtype=bool)
        from_corpus[in_corpus] = cache.holds(texts)
        refused[in_corpus] = found.refused.holds(texts) & ~from_corpus[in_corpus]

        # What only has an old text stays until its new one is paid for.
        rest = KeySet(keys.filter(pa.array(bad))).holds(touched) & ~from_corpus & ~refused
        bad_hash = unclear = np.zeros(len(keys), dtype=bool)
        if seen.rows is not None:
            bad_hash = seen.rows.bad_hash
            # Which of hash and text is wrong cannot be told without the corpus.
            unclear = bad_hash & (seen.rows.faults == Fault.SOUND)
        usable = ~bad_hash & cache.holds(hashes)
        copies = np.flatnonzero(usable)
        copy = KeySet(keys.take(pa.array(copies))).positions(touched)
        stays = ~in_corpus & KeySet(keys.filter(pa.array(unclear))).holds(touched)
        gone = refused | (rest & (copy < 0) & ~stays)
        missing = found.changes.filter(pa.array(~stale))
        missing = missing.filter(pa.array(cache.holds(missing.column("text_hash"))))
        written = pa.concat_arrays(
            [touched.filter(pa.array(from_corpus)).combine_chunks(), _whole(missing.column("key"))]
        )
        if not found.same_splitter:
            written = written.slice(0, 0)
        return cls(
            changes=_changes(found, written),
            copies=copies[copy[rest & (copy >= 0)]],
            leaving=found.orphan | KeySet(touched.filter(pa.array(gone))).holds(keys),
        )


def bad_rows(seen: Look, found: Differences) -> Flags:
    """For each row of the index whether it must not stay as it is, whatever the corpus says."""
    if seen.rows is None:
        return np.zeros(0, dtype=bool)
    refused = found.refused.holds(seen.rows.hashes)
    return ~seen.rows.good | found.duplicate | refused


def require_few_leave(seen: Look, found: Differences, leaving: Flags) -> None:
    """Refuse a repair that would take too much away.

    Raises:
        SettingsError: More would go than `index.max_deleted_fraction` allows.
    """
    index = seen.config.index
    rows, gone = int(np.sum(~found.duplicate)), int(np.sum(leaving & ~found.duplicate))
    if gone > index.max_deleted_fraction * rows:
        raise SettingsError(
            f"This repair would take {gone:,} of {rows:,} chunks out of the index "
            f"{index.table!r}, more than index.max_deleted_fraction ({index.max_deleted_fraction:g}"
            f") allows. The index was not touched. See that {seen.config.source.path} is complete; "
            "if it is, run with --set index.max_deleted_fraction=1.",
            deleted=gone,
        )


@dataclass(frozen=True)
class Mended:
    """Tables for publish.

    Attributes:
        rows: `rows_schema(metadata)`.
        deletions: DELETIONS, one for each row that goes.
        updates: Rows of the index that `rows` takes the place of.
        added: How many of `rows` the index lacks.
        repeated: How many of the updates only repeat an id.
    """

    rows: TableRef
    deletions: TableRef
    updates: int
    added: int
    repeated: int


def mended(seen: Look, found: Differences, mending: Mending, folder: Path) -> Mended:
    """The rows to write, read from corpus and index, and those to take out."""
    reader, metadata = found.survey.reader, found.survey.reader.metadata
    if not found.same_splitter and seen.rows is not None:
        metadata = metadata_fields(seen.rows.table.schema)
    schema = rows_schema(metadata)
    leaving = found.indexed.filter(pa.array(mending.leaving)).select(["id", "document_key"])
    leaving = leaving.append_column("change", pa.array(["deleted"] * leaving.num_rows, pa.utf8()))
    deletions = TableRef.write(folder / "leaving.arrow", DELETIONS, [leaving.cast(DELETIONS)])
    parts: list[Iterator[pa.RecordBatch]] = [_copies(seen, mending.copies, schema)]
    if mending.changes.num_rows:
        filling = Filling(
            reader=reader,
            changes=TableRef.write(folder / "mended.arrow", CHANGES, [mending.changes]),
            deletions=deletions,
            packed=TableRef.write(folder / "nothing.arrow", PACKED, []),
            sizes=_Estimated(found.survey.provider),
            folder=folder,
        )
        for _ in filling.batches():
            raise AssertionError("a repair sends nothing")
        filled = filling.finish(pa.array([], HASH))
        deletions = filled.deletions
        parts.append(filled.rows.batches(schema))
    rows = TableRef.write(
        folder / "repaired.arrow", schema, (batch for part in parts for batch in part)
    )
    ids = rows.load(schema).column("id")
    written = KeySet(pa.chunked_array([digest_column(chunk) for chunk in ids.chunks], HASH))
    updates = written.holds(found.indexed.column("key"))
    once = int(np.sum(updates & ~found.duplicate))
    return Mended(
        rows,
        deletions,
        updates=int(updates.sum()),
        added=rows.rows - once,
        repeated=int(updates.sum()) - once,
    )


def _changes(found: Differences, keys: pa.Array) -> pa.Table:
    """CHANGES that write these keys from the corpus."""
    rows = found.corpus.filter(pa.array(KeySet(keys).holds(found.corpus.column("key"))))
    there = KeySet(found.indexed.column("key")).holds(rows.column("key"))
    names = np.where(there, "changed", "added")
    rows = rows.select(CHANGES.names[:-2]).append_column("change", pa.array(names, pa.utf8()))
    return rows.append_column("in_index", pa.array(there)).cast(CHANGES)


def _copies(
    seen: Look, copies: npt.NDArray[np.int64], schema: pa.Schema
) -> Iterator[pa.RecordBatch]:
    """Rows of the index as rows to write."""
    for start in range(0, len(copies) if seen.rows is not None else 0, TAKEN_ROWS):
        have = seen.rows.table.schema  # type: ignore[union-attr]
        same = [own.name for own in schema if own.name in have.names]
        rows = seen.rows.take(copies[start : start + TAKEN_ROWS], same)  # type: ignore[union-attr]
        columns = [
            _whole(rows.column(own.name))
            if own.name in same and have.field(own.name).type == own.type
            else pa.nulls(rows.num_rows, own.type)
            for own in schema
        ]
        yield pa.record_batch(columns, schema=schema)


def _whole(column: pa.ChunkedArray) -> pa.Array:
    return column.combine_chunks()


@dataclass(frozen=True)
class _Estimated:
    """Sizes of texts, of which none will be sent."""

    provider: Provider

    def counts(self, texts: pa.Array) -> npt.NDArray[np.int32]:
        return tokens_of(self.provider.estimate, texts)

    def request_limits(self) -> Limits:
        return self.provider.limits
