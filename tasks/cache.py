"""The cache: vectors by text_hash, one LanceDB table per space.

A hit in the wrong space is impossible: the space names the table. Indexes that share
`state.uri` share the cache, so a text that any of them paid for is free for all.
"""

from collections.abc import Iterable, Iterator
from datetime import UTC, datetime
from pathlib import Path

import lancedb
import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc
from lancedb.table import Table

from tasks.errors import EmbedOnceError
from tasks.keys import KeySet, first_of_each
from tasks.lance import PRIMARY_KEY, make_table, open_table, read_batches, writing
from tasks.providers import Space
from tasks.schemas import HASH, vectors_schema

SPACE = b"embed_once.space"
"""Key of the space in a table's metadata."""
REMEMBERED_AT = pa.field("remembered_at", pa.timestamp("ms", "UTC"))
"""Column of the table: when the vector came; null where it came before the column did."""
PREFIX = "vectors-"
SCAN_ROWS = 8192


class Cache:
    """Vectors of one space."""

    def __init__(self, state_uri: str, space: Space) -> None:
        self.space = space
        self.name = f"{PREFIX}{space.id}"
        self._uri = state_uri
        self._table: Table | None = None
        self._hashes = pa.array([], HASH)
        self._row_ids: npt.NDArray[np.uint64] = np.empty(0, np.uint64)
        self._keys = KeySet(self._hashes)
        self._version = 0
        self.refresh()

    def __len__(self) -> int:
        return len(self._keys)

    def refresh(self) -> None:
        """Take up what other runs have added."""
        if self._table is None:
            self._table = open_table(self._uri, self.name)
        if self._table is None:
            return
        self._table.checkout_latest()  # type: ignore[no-untyped-call]
        if self._table.version == self._version:
            return
        self._version = self._table.version
        query = self._table.search().select(["text_hash"]).with_row_id(True)
        found = query.to_arrow()
        self._hashes = found.column("text_hash").combine_chunks()
        self._row_ids = found.column("_rowid").to_numpy()
        self._keys = KeySet(self._hashes)

    def holds(self, hashes: pa.Array | pa.ChunkedArray) -> npt.NDArray[np.bool_]:
        """For each text_hash whether its vector is here."""
        return self._keys.holds(hashes)

    def require(self, hashes: pa.Array | pa.ChunkedArray) -> None:
        """Check that the vector of each text_hash is here, or came from another run by now.

        Raises:
            EmbedOnceError: One of them is not here.
        """
        if self.holds(hashes).all():
            return
        self.refresh()
        missing = int(np.sum(~self.holds(hashes)))
        if missing:
            raise EmbedOnceError(
                f"{missing} vectors are missing from the cache {self.name} in {self._uri}. "
                "Run again: they are embedded anew."
            )

    def vectors(self, hashes: pa.Array | pa.ChunkedArray) -> pa.FixedSizeListArray:
        """The vector of each text_hash, in their order, of the space's `vector_type`.

        Raises:
            EmbedOnceError: One of them is not here.
        """
        self.require(hashes)
        at = self._keys.positions(hashes)
        if self._table is None or not len(at):
            return pa.array([], self.space.vector_type)
        row_ids = np.unique(self._row_ids[at])
        query = self._table.take_row_ids(row_ids.tolist()).select(["text_hash", "vector"])
        found = query.to_arrow()
        place = KeySet(found.column("text_hash")).positions(hashes)
        return found.column("vector").combine_chunks().take(pa.array(place))

    def remember(self, answers: Iterable[pa.Table]) -> int:
        """Keep the vectors of `answers` that are not here yet, in one commit at most.

        Args:
            answers: Tables of `vectors_schema(space.vector_type)`.

        Returns:
            Vectors added.
        """
        tables = list(answers)
        if not tables:
            return 0
        schema = vectors_schema(self.space.vector_type)
        new = pa.concat_tables([table.cast(schema) for table in tables])
        new = new.take(pa.array(first_of_each(new.column("text_hash"))))
        self.refresh()
        new = new.filter(pa.array(~self.holds(new.column("text_hash"))))
        if not new.num_rows:
            return 0
        if self._table is None or REMEMBERED_AT.name not in self._table.schema.names:
            self._table = self._made()
        now = pa.scalar(datetime.now(tz=UTC), REMEMBERED_AT.type)
        new = new.append_column(REMEMBERED_AT, pa.repeat(now, new.num_rows))
        merge = self._table.merge_insert("text_hash").when_not_matched_insert_all()
        with writing(f"the cache {self.name} in {self._uri}"):
            merge.execute(new)
        self.refresh()
        return int(new.num_rows)

    @property
    def state_uri(self) -> str:
        """The folder it is in."""
        return self._uri

    def table(self) -> Table | None:
        """The table at its newest version, for maintenance; None where there is none yet."""
        return open_table(self._uri, self.name)

    def drop_unused(self, used: KeySet, before: datetime) -> int:
        """Forget what nothing uses and what came before a time, in one commit at most.

        What came at an unknown time stays. Nobody else may use the cache meanwhile.

        Args:
            used: text_hash of each vector to keep whatever its age.
            before: With a time zone.

        Returns:
            Vectors dropped.
        """
        table = self.table()
        if table is None or REMEMBERED_AT.name not in table.schema.names:
            return 0
        limit = pa.scalar(before, REMEMBERED_AT.type)

        def gone(batch: pa.RecordBatch) -> npt.NDArray[np.bool_]:
            old = pc.less(batch.column(REMEMBERED_AT.name), limit).fill_null(False)
            return np.asarray(old) & ~used.holds(batch.column("text_hash"))

        columns = ["text_hash", REMEMBERED_AT.name]
        dropped = sum(int(gone(each).sum()) for each in read_batches(table, SCAN_ROWS, columns))
        if not dropped:
            return 0

        def staying() -> Iterator[pa.RecordBatch]:
            for batch in read_batches(table, SCAN_ROWS):
                yield batch.filter(pa.array(~gone(batch)))

        reader = pa.RecordBatchReader.from_batches(table.schema, staying())
        with writing(f"the cache {self.name} in {self._uri}"):
            lancedb.connect(self._uri).create_table(
                self.name, data=reader, schema=table.schema, mode="overwrite"
            )
        self.refresh()
        return dropped

    def _made(self) -> Table:
        text_hash, vector = vectors_schema(self.space.vector_type)
        schema = pa.schema(
            [text_hash.with_metadata(PRIMARY_KEY), vector, REMEMBERED_AT],
            metadata={SPACE: self.space.to_json().encode()},
        )
        return make_table(self._uri, self.name, schema)


def caches(state_uri: str) -> list[Cache]:
    """All caches of a state, one a space."""
    if not Path(state_uri).is_dir():
        return []
    found = lancedb.connect(state_uri).list_tables().tables
    tables = [open_table(state_uri, name) for name in found if name.startswith(PREFIX)]
    return [
        Cache(state_uri, Space.from_json(table.schema.metadata[SPACE].decode()))
        for table in tables
        if table is not None
    ]
