"""Examine: one pass over the cache and one over the index, a few bytes kept of each row."""

from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc
from lancedb.table import Table

from tasks.cache import Cache
from tasks.index import reading_index
from tasks.keys import KeySet, digest_column, first_of_each
from tasks.lance import read_located
from tasks.prepare import PLAIN, Preparation
from tasks.providers import Space
from tasks.schemas import HASH
from tasks.soundness import SAME, Fault, Faults, distances, faults_of, numbers

Flags = npt.NDArray[np.bool_]
RowIds = npt.NDArray[np.uint64]


@dataclass
class Entries:
    """What stands in the cache, without its vectors.

    Attributes:
        hashes: text_hash of each entry.
        row_ids: Where it is in the cache's table.
        faults: What is wrong with it; later stages add what they find.
        duplicate: Whether it repeats another entry that is as good.
    """

    cache: Cache
    hashes: pa.Array
    row_ids: RowIds
    faults: Faults
    duplicate: Flags
    _first: npt.NDArray[np.int64]
    _keys: KeySet

    @classmethod
    def of(cls, cache: Cache) -> "Entries":
        """All of `cache`."""
        hashes, row_ids, faults = [], [], []
        for batch in cache.entries():
            hashes.append(_own(batch.column("text_hash")))
            row_ids.append(batch.column("_rowid").to_numpy().copy())
            if cache.fits:
                faults.append(faults_of(batch.column("vector"), cache.space))
            else:
                faults.append(np.full(batch.num_rows, Fault.TYPE, np.uint8))
        every = pa.concat_arrays([pa.array([], HASH), *hashes])
        found = np.concatenate([np.empty(0, np.uint8), *faults])
        # Of several entries for one text the first sound one counts.
        order = np.argsort(found != Fault.SOUND, kind="stable")
        first = order[first_of_each(every.take(pa.array(order)))]
        duplicate = np.ones(len(every), dtype=bool)
        duplicate[first] = False
        return cls(
            cache=cache,
            hashes=every,
            row_ids=np.concatenate([np.empty(0, np.uint64), *row_ids]),
            faults=found,
            duplicate=duplicate,
            _first=first,
            _keys=KeySet(every.take(pa.array(first))),
        )

    def at(self, hashes: pa.Array | pa.ChunkedArray) -> npt.NDArray[np.int64]:
        """For each text_hash the position of its sound entry, -1 where it has none."""
        found = self._keys.positions(hashes)
        if not len(self._first):
            return found
        entry = self._first[found]
        return np.where((found >= 0) & (self.faults[entry] == Fault.SOUND), entry, -1)

    def holds(self, hashes: pa.Array | pa.ChunkedArray) -> Flags:
        """For each text_hash whether there is a sound entry."""
        return self.at(hashes) >= 0

    def vectors(self, at: npt.NDArray[np.int64]) -> Any:
        """The vectors of the entries at these positions, as numbers."""
        taken = self.cache.take(self.row_ids[at])
        return numbers(taken.column("vector"))[_places(taken, self.row_ids[at])]


@dataclass
class Rows:
    """What stands in the index, in the order of the table, without texts and vectors.

    Attributes:
        table: The index at the version that was examined.
        hashes: text_hash of each row.
        row_ids: Where it is in the table.
        faults: What is wrong with its vector; later stages add what they find.
        bad_hash: Whether its text_hash is not that of its text and of what stood in front.
        unlike: Whether the cache has another vector for its text.
        preparation: What stood in front of the texts when they were sent.
    """

    table: Table
    hashes: pa.Array
    row_ids: RowIds
    faults: Faults
    bad_hash: Flags
    unlike: Flags
    preparation: Preparation = PLAIN

    def __len__(self) -> int:
        return len(self.hashes)

    @classmethod
    def of(
        cls, table: Table, space: Space, entries: Entries, preparation: Preparation = PLAIN
    ) -> "Rows":
        """All of `table`, held against the cache."""
        of_type = table.schema.field("vector").type == space.vector_type
        columns = ["text", *preparation.names, "text_hash", *(["vector"] if of_type else [])]
        hashes, row_ids, faults, bad_hash, unlike = [], [], [], [], []
        for batch in read_located(table, columns):
            hashes.append(_own(batch.column("text_hash")))
            row_ids.append(batch.column("_rowid").to_numpy().copy())
            digests = digest_column(preparation.texts(batch))
            bad_hash.append(pc.not_equal(digests, hashes[-1]).to_numpy(zero_copy_only=False))
            if of_type:
                faults.append(faults_of(batch.column("vector"), space))
                comparable = (faults[-1] == Fault.SOUND) & ~bad_hash[-1]
                unlike.append(_unlike(batch, comparable, entries))
            else:
                faults.append(np.full(batch.num_rows, Fault.TYPE, np.uint8))
                unlike.append(np.zeros(batch.num_rows, dtype=bool))
        return cls(
            table=table,
            hashes=pa.concat_arrays([pa.array([], HASH), *hashes]),
            row_ids=np.concatenate([np.empty(0, np.uint64), *row_ids]),
            faults=np.concatenate([np.empty(0, np.uint8), *faults]),
            bad_hash=np.concatenate([np.empty(0, bool), *bad_hash]),
            unlike=np.concatenate([np.empty(0, bool), *unlike]),
            preparation=preparation,
        )

    @property
    def good(self) -> Flags:
        """For each row whether its vector is one to rely on, as far as is known."""
        return np.asarray((self.faults == Fault.SOUND) & ~self.bad_hash)

    def texts(self, at: npt.NDArray[np.int64]) -> pa.Array:
        """The texts at these positions as they are sent."""
        return self.preparation.texts(self.take(at, ["text", *self.preparation.names]))

    def take(self, at: npt.NDArray[np.int64], columns: list[str]) -> pa.Table:
        """The rows at these positions, in their order; each position once."""
        query = self.table.take_row_ids(self.row_ids[at].tolist()).select(columns)
        with reading_index(self.table):
            found = query.with_row_id().to_arrow()
        places = _places(found, self.row_ids[at])
        # Arrow takes no rows of a vector column that is in several chunks.
        return found.combine_chunks().take(pa.array(places)).select(columns)


def _places(found: pa.Table, row_ids: RowIds) -> npt.NDArray[np.int64]:
    """Where in `found` each of these rows stands; LanceDB gives them in an order of its own."""
    have = found.column("_rowid").to_numpy()
    order = np.argsort(have)
    return np.asarray(order[np.searchsorted(have, row_ids, sorter=order)], dtype=np.int64)


def _own(column: pa.Array) -> pa.Array:
    """`column` in memory of its own: a column from LanceDB keeps all of its batch."""
    return column.take(pa.array(range(len(column)), pa.int64()))


def _unlike(batch: pa.RecordBatch, comparable: Flags, entries: Entries) -> Flags:
    """For each row whether the cache has another vector for its text."""
    at = entries.at(batch.column("text_hash"))
    both = np.flatnonzero(comparable & (at >= 0))
    unlike = np.zeros(batch.num_rows, dtype=bool)
    if len(both):
        ours = numbers(batch.column("vector"))[both]
        unlike[both] = distances(ours, entries.vectors(at[both])) > SAME
    return unlike
