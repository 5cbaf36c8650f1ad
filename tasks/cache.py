"""The cache: vectors by text_hash, one LanceDB table per space.

A hit in the wrong space is impossible: the space names the table. Indexes that share
`state.uri` share the cache, so a text that any of them paid for is free for all.
"""

import threading
from collections.abc import Iterable

import numpy as np
import numpy.typing as npt
import pyarrow as pa
from lancedb.table import Table

from tasks.errors import EmbedOnceError
from tasks.keys import KeySet, first_of_each
from tasks.lance import PRIMARY_KEY, make_table, open_table, sync_table, writing
from tasks.providers import Space
from tasks.schemas import HASH, vectors_schema

SPACE = b"embed_once.space"
"""Key of the space in a table's metadata."""


class Cache:
    """Vectors of one space. While one thread remembers, others may refresh and ask."""

    def __init__(self, state_uri: str, space: Space) -> None:
        self.space = space
        self.name = f"vectors-{space.id}"
        self._uri = state_uri
        self._table: Table | None = None
        self._hashes = pa.array([], HASH)
        self._row_ids: npt.NDArray[np.uint64] = np.empty(0, np.uint64)
        self._keys = KeySet(self._hashes)
        self._version = 0
        self._refreshing = threading.Lock()
        self.refresh()

    def __len__(self) -> int:
        return len(self._keys)

    def refresh(self) -> None:
        """Take up what other runs have added."""
        with self._refreshing:
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
        with writing(self._told):
            if self._table is None:
                self._table = self._create()
            self._table.merge_insert("text_hash").when_not_matched_insert_all().execute(new)
        self.refresh()
        return int(new.num_rows)

    def sync(self, since: float) -> None:
        """Have what anybody has remembered since then on disk before this returns.

        Args:
            since: Seconds since 1970.

        Raises:
            EmbedOnceError: It could not be synced.
        """
        if self._table is not None:
            with writing(self._told):
                sync_table(self._uri, self.name, since)

    @property
    def _told(self) -> str:
        return f"the cache {self.name} in {self._uri}"

    def _create(self) -> Table:
        text_hash, vector = vectors_schema(self.space.vector_type)
        schema = pa.schema(
            [text_hash.with_metadata(PRIMARY_KEY), vector],
            metadata={SPACE: self.space.to_json().encode()},
        )
        return make_table(self._uri, self.name, schema)
