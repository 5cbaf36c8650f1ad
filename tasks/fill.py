"""Fill: the second pass over the corpus, for the documents that changed.

It streams the missing texts into batches while the first ones are already being embedded,
and writes down the rows that the index will gain. A document that changed again since the
first pass keeps its old rows: the next run sees it as it is then.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc

from tasks.keys import (
    NO_DOCUMENT,
    KeySet,
    digest_column,
    document_key,
    document_keys,
    first_of_each,
    halves,
    identified,
)
from tasks.limits import Limits, Packer
from tasks.read import Reader, ReadNotes
from tasks.schemas import (
    BATCH,
    CHANGES,
    DELETIONS,
    HASH,
    KEYED,
    LEFT_OUT,
    PACKED,
    Batch,
    TableRef,
    rows_schema,
)


@dataclass(frozen=True)
class Filled:
    """What the second pass leaves for publish.

    Attributes:
        rows: `rows_schema(metadata)`: what the index gains or rewrites.
        changes: CHANGES that hold; those of unsettled documents are gone.
        deletions: DELETIONS that hold.
        updates: How many of `rows` the index has already.
        unsettled: Documents or rows that changed between the two passes.
        left_out: LEFT_OUT, rows whose text has no vector.
    """

    rows: TableRef
    changes: TableRef
    deletions: TableRef
    updates: int
    unsettled: int
    left_out: pa.Table


class KnownSizes(Protocol):
    """What is known by now of the sizes of texts and of calls."""

    def counts(self, texts: pa.Array) -> npt.NDArray[np.int32]:
        """Estimated tokens of each of `texts`, utf8."""

    def request_limits(self) -> Limits:
        """What one call takes, with a margin for estimates."""


class Filling:
    """One second pass: first iterate over `batches()` to its end, then call `finish()`."""

    def __init__(
        self,
        *,
        reader: Reader,
        changes: TableRef,
        deletions: TableRef,
        packed: TableRef,
        sizes: KnownSizes,
        folder: Path,
        table_rows: TableRef | None = None,
    ) -> None:
        """Prepare it.

        Args:
            reader: The corpus.
            changes: CHANGES.
            deletions: DELETIONS.
            packed: PACKED.
            sizes: Of texts and calls.
            folder: Staging folder.
            table_rows: KEYED of a table: where its rows still stand in that order, only those that
                changed are hashed again.
        """
        self._reader = reader
        # Not held: pages of a mapped file that were looked at count as memory until it is let go.
        self._changes, self._deletions = changes, deletions
        planned = changes.load(CHANGES)
        self._keys = KeySet(planned.column("key"))
        self._planned = _told(planned.column("text_hash"), planned.column("document_key"))
        self._documents = planned.column("document_key").unique()
        self._seen = np.zeros(changes.rows, dtype=bool)
        self._missing = KeySet(packed.load(PACKED).column("text_hash"))
        self._sent = np.zeros(packed.rows, dtype=bool)
        self._places = None if table_rows is None else self._places_in(table_rows.load(KEYED))
        self._sizes = sizes
        self._packer = Packer(sizes.request_limits())
        self._folder = folder
        self._rows = folder / "rows.arrow"

    def batches(self) -> Iterator[Batch]:
        """The batches to embed, as they fill, cut by what is known of sizes by then.

        Yields:
            Batches numbered from 1; each missing text stands in exactly one of them.
        """
        schema = rows_schema(self._reader.metadata)
        waiting: list[pa.RecordBatch] = []
        current = 1
        with pa.ipc.new_file(str(self._rows), schema) as writer:
            for rows in self._changed_rows():
                writer.write_batch(rows)
                for number, part in self._missing_texts(rows):
                    if number != current:
                        yield Batch.write(current, self._folder, waiting)
                        current, waiting = number, []
                    waiting.append(part)
        if waiting:
            yield Batch.write(current, self._folder, waiting)

    def finish(self, without: pa.Array) -> Filled:
        """Leave out what did not come again, what goes with it, and what has no vector.

        Args:
            without: text_hash of the texts that the provider refuses.
        """
        schema = rows_schema(self._reader.metadata)
        rows = TableRef.of(self._rows)
        changes, deletions = self._changes.load(CHANGES), self._deletions.load(DELETIONS)
        lost = np.flatnonzero(~self._seen)
        unsettled = 0
        if len(lost):
            whose = changes.take(pa.array(lost)).column("document_key").to_pylist()
            documents = {key for key in whose if key != NO_DOCUMENT}
            unsettled = len(documents) + whose.count(NO_DOCUMENT)
            held = KeySet(pa.array(sorted(documents), HASH))
            rows = TableRef.write(
                self._folder / "settled-rows.arrow",
                schema,
                (
                    _without(batch, document_keys(batch.column("document")), held)
                    for batch in rows.batches(schema)
                ),
            )
            changes = changes.filter(pa.array(self._seen))
            changes = _without(changes, changes.column("document_key"), held)
            deletions = _without(deletions, deletions.column("document_key"), held)
        rows, changes, deletions, left_out = self._leave_out(
            rows, changes, deletions, KeySet(without)
        )
        return Filled(
            rows,
            TableRef.write(self._folder / "settled-changes.arrow", CHANGES, [changes]),
            TableRef.write(self._folder / "settled-deletions.arrow", DELETIONS, [deletions]),
            updates=pc.sum(changes.column("in_index")).as_py() or 0,
            unsettled=unsettled,
            left_out=left_out,
        )

    def _leave_out(
        self, rows: TableRef, changes: pa.Table, deletions: pa.Table, refused: KeySet
    ) -> tuple[TableRef, pa.Table, pa.Table, pa.Table]:
        """Take the rows out whose text is refused; one that the index has leaves it too.

        Its old text no longer stands in the corpus, and a row must not tell what is gone.
        """
        bad = refused.holds(changes.column("text_hash"))
        if not bad.any():
            return rows, changes, deletions, LEFT_OUT.empty_table()
        schema = rows_schema(self._reader.metadata)
        left_out = pa.Table.from_batches(
            (
                batch.filter(pa.array(refused.holds(batch.column("text_hash")))).select(
                    LEFT_OUT.names
                )
                for batch in rows.batches(schema)
            ),
            LEFT_OUT,
        )
        kept = TableRef.write(
            self._folder / "kept-rows.arrow",
            schema,
            (_without(batch, batch.column("text_hash"), refused) for batch in rows.batches(schema)),
        )
        replaced = changes.filter(pa.array(bad & np.asarray(changes.column("in_index"))))
        at = KeySet(replaced.column("key")).positions(digest_column(left_out.column("id")))
        gone = left_out.filter(pa.array(at >= 0))
        leaving = pa.table(
            [
                gone.column("id"),
                document_keys(gone.column("document").combine_chunks()),
                pa.array(["refused"] * gone.num_rows, pa.utf8()),
            ],
            schema=DELETIONS,
        )
        return (
            kept,
            changes.filter(pa.array(~bad)),
            pa.concat_tables([deletions, leaving]),
            left_out,
        )

    def _changed_rows(self) -> Iterator[pa.RecordBatch]:
        """The rows of the corpus that the index will gain or rewrite, each once."""
        if not len(self._keys):
            return
        if self._places is not None:
            yield from self._settled(_standing_at(self._places, self._chunks()))
        if self._places is None or not self._seen.all():  # else every row is where it was
            yield from self._settled(self._chunks())

    def _places_in(self, keyed: pa.Table) -> npt.NDArray[np.bool_]:
        """For each row that `_chunks` will give again whether it changed."""
        again = KeySet(self._documents).holds(keyed.column("document_key"))
        return self._keys.holds(keyed.column("key"))[again]

    def _chunks(self) -> Iterator[pa.RecordBatch]:
        documents = set(self._documents.to_pylist())
        return self._reader.chunks(
            ReadNotes(), wanted=lambda document: document_key(document) in documents
        )

    def _settled(self, chunks: Iterator[pa.RecordBatch]) -> Iterator[pa.RecordBatch]:
        """Those of `chunks` that are as the first pass found them, each once."""
        for rows in identified(chunks, self._reader.metadata, self._reader.preparation):
            keys = digest_column(rows.column("id"))
            at = self._keys.positions(keys)
            once = np.zeros(len(at), dtype=bool)
            once[first_of_each(keys)] = True
            fits = once & (at >= 0)
            told = _told(rows.column("text_hash"), document_keys(rows.column("document")))
            fits &= told == self._planned[np.where(fits, at, 0)]
            fits[fits] &= ~self._seen[at[fits]]
            self._seen[at[fits]] = True
            if fits.any():
                yield rows if fits.all() else rows.filter(pa.array(fits))

    def _missing_texts(self, rows: pa.RecordBatch) -> Iterator[tuple[int, pa.RecordBatch]]:
        """The texts among `rows` that nobody has paid for, with the batch each run goes in."""
        at = self._missing.positions(rows.column("text_hash"))
        first = np.zeros(len(at), dtype=bool)
        first[first_of_each(rows.column("text_hash"))] = True
        take = np.flatnonzero(first & (at >= 0))
        take = take[~self._sent[at[take]]]
        if not len(take):
            return
        self._sent[at[take]] = True
        missing = rows if len(take) == len(at) else rows.take(pa.array(take))
        texts = self._reader.preparation.texts(missing)
        tokens = self._sizes.counts(texts)
        self._packer.limits = self._sizes.request_limits()
        numbers = np.array([self._packer.place(int(count)) for count in tokens])
        table = pa.record_batch(
            [missing.column("text_hash"), texts, pa.array(tokens, pa.int32())],
            schema=BATCH,
        )
        starts = np.flatnonzero(np.diff(numbers, prepend=-1))
        for start, end in zip(starts, [*starts[1:], len(numbers)], strict=True):
            yield int(numbers[start]), table.slice(start, end - start)


def _standing_at(
    places: npt.NDArray[np.bool_], batches: Iterator[pa.RecordBatch]
) -> Iterator[pa.RecordBatch]:
    """The rows of `batches` whose place is marked."""
    done = 0
    for batch in batches:
        here = places[done : done + batch.num_rows]
        done += batch.num_rows
        if here.any():
            known = batch.slice(0, len(here))
            yield known if here.all() else known.filter(pa.array(here))


def _told(
    text_hashes: pa.Array | pa.ChunkedArray, keys_of_documents: pa.Array | pa.ChunkedArray
) -> npt.NDArray[np.uint64]:
    """Eight bytes of text and document of each row, enough to see that one of them changed."""
    return halves(text_hashes)[0] ^ halves(keys_of_documents)[1]


def _without(
    table: pa.Table | pa.RecordBatch, documents: pa.Array | pa.ChunkedArray, held: KeySet
) -> pa.Table | pa.RecordBatch:
    return table.filter(pa.array(~held.holds(documents)))
