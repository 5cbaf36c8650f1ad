"""The cache: vectors by text_hash, one LanceDB table per space.

A hit in the wrong space is impossible: the space names the table. Indexes that share
`state.uri` share the cache, so a text that any of them paid for is free for all.
"""

import threading
from collections.abc import Iterable, Iterator
from contextlib import AbstractContextManager
from datetime import UTC, datetime
from pathlib import Path

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc
from lancedb.table import Table

from tasks.errors import EmbedOnceError, IndexHeld
from tasks.key_rows import KeyRows
from tasks.keys import KeySet, first_of_each
from tasks.lance import (
    PRIMARY_KEY,
    connect,
    make_table,
    open_table,
    opening,
    read_located,
    reading,
    sync_table,
    table_lock,
    writing,
)
from tasks.providers import Space
from tasks.schemas import HASH, vectors_schema
from tasks.soundness import numbers
from tasks.storage import is_local

SPACE = b"embed_once.space"
"""Key of the space in a table's metadata."""
ENTRIES = 8192
"""Entries dropped at a time."""
READ_ROWS = 2**17
"""Entries read at a time."""
REMEMBERED_AT = pa.field("remembered_at", pa.timestamp("ms", "UTC"))
"""Column of the table: when the vector came; null where it came before the column did."""
PREFIX = "vectors-"


class Cache:
    """Vectors of one space. While one thread remembers, others may refresh and ask."""

    def __init__(self, state_uri: str, space: Space) -> None:
        self.space = space
        self.name = f"{PREFIX}{space.id}"
        self._uri = state_uri
        self._table: Table | None = None
        self._entries = KeyRows()
        self._newest = 0
        self._version = 0
        self._looked = False
        self._refreshing = threading.Lock()

    def __len__(self) -> int:
        return len(self._known)

    def refresh(self) -> None:
        """Take up what other runs have added.

        Raises:
            EmbedOnceError: The cache cannot be read, or (`IndexHeld`) it changed meanwhile.
        """
        with self._refreshing:
            if self._table is None:
                self._table = open_table(self._uri, self.name)
            if self._table is not None:
                with self._reading(self._table):
                    self._table.checkout_latest()  # type: ignore[no-untyped-call]
                    version = self._table.version
                    if version != self._version:
                        self._take_up(self._table, version)
                self._version = version
            self._looked = True

    def _take_up(self, table: Table, version: int) -> None:
        """Read what has come since; all of it where rows have gone or moved meanwhile."""
        entries, newest = self._entries, self._newest
        query = table.search().select(["text_hash"]).with_row_id(True)
        # A row that is added has a higher id than all before; one that moves gets one, too.
        grown = len(entries) > 0 and version > self._version
        if grown and table.count_rows(f"_rowid <= {newest}") == len(entries):
            query = query.where(f"_rowid > {newest}")
        else:
            entries, newest = KeyRows(), 0
        for batch in query.to_batches(READ_ROWS):
            ids = batch.column("_rowid").to_numpy()
            entries = entries.with_more(batch.column("text_hash"), ids)
            newest = max(newest, int(ids.max(initial=0)))
        self._entries, self._newest = entries, newest

    def holds(self, hashes: pa.Array | pa.ChunkedArray) -> npt.NDArray[np.bool_]:
        """For each text_hash whether its vector is here."""
        if not len(hashes):  # nor is anything read
            return np.zeros(0, dtype=bool)
        return self._known.holds(hashes)

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
            EmbedOnceError: One of them is not here, or (`IndexHeld`) left meanwhile.
        """
        self.require(hashes)
        if not len(hashes):
            return pa.array([], self.space.vector_type)
        found = self.take(self._entries.rows(hashes))
        places = KeySet(found.column("text_hash")).positions(hashes)
        if (places < 0).any():
            raise IndexHeld(
                f"{int(np.sum(places < 0))} vectors left {self._told} while they were read, say by "
                "a repair. Run again."
            )
        return _at(found.column("vector"), places)

    def take(self, row_ids: npt.NDArray[np.uint64]) -> pa.Table:
        """text_hash, vector and _rowid of the entries in these rows of the table, each once."""
        if (table := self._opened) is None:
            raise LookupError(f"{self.name} has no rows to take")
        query = table.take_row_ids(np.unique(row_ids).tolist())
        with self._reading(table):
            return query.select(["text_hash", "vector"]).with_row_id().to_arrow()

    @property
    def fits(self) -> bool:
        """Whether the table is one for vectors of this space, by its own word and type."""
        if (table := self._opened) is None:
            return True
        schema = table.schema
        said = (schema.metadata or {}).get(SPACE, b"").decode()
        fits = schema.field("vector").type == self.space.vector_type
        return bool(fits and said == self.space.to_json())

    def entries(self) -> Iterator[pa.RecordBatch]:
        """All there is, a batch at a time: text_hash, _rowid, and where it `fits` the vector."""
        if (table := self._opened) is None:
            return
        columns = ["text_hash", "vector"] if self.fits else ["text_hash"]
        with self._reading(table):
            yield from read_located(table, columns)

    def forget(self, row_ids: npt.NDArray[np.uint64], hashes: pa.Array) -> None:
        """Drop these rows of the table, which hold these text hashes; all of it if it never fits.

        Rows may move while a table is compacted; by their hashes no other entry goes then.
        """
        if (table := self._opened) is None:
            return
        with writing(f"the cache {self.name} in {self._uri}"):
            if not self.fits:
                connect(self._uri).create_table(self.name, schema=self._schema(), mode="overwrite")
            for start in range(0, len(row_ids) if self.fits else 0, ENTRIES):
                rows = ", ".join(map(str, row_ids[start : start + ENTRIES].tolist()))
                texts = hashes.slice(start, ENTRIES).to_pylist()
                named = ", ".join(f"X'{each.hex()}'" for each in texts)
                table.delete(f"_rowid IN ({rows}) AND text_hash IN ({named})")
        self._table, self._version = None, 0
        self.refresh()

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
        # What is all new, as it mostly is, is not copied.
        if len(first := first_of_each(new.column("text_hash"))) < new.num_rows:
            new = new.take(pa.array(first))
        table = self._made()
        with table_lock(self._uri, self.name, "remembering vectors"):
            self.refresh()  # from here on nobody else adds any
            if (held := self.holds(new.column("text_hash"))).any():
                new = new.filter(pa.array(~held))
            if not new.num_rows:
                return 0
            now = pa.scalar(datetime.now(tz=UTC), REMEMBERED_AT.type)
            new = new.append_column(REMEMBERED_AT, pa.repeat(now, new.num_rows))
            with writing(self._told):
                # A merge would need no lock, but twice the time and some times the memory.
                table.add(new)
        with self._refreshing:
            self._looked = False  # who asks next reads what came
        return int(new.num_rows)

    def _made(self) -> Table:
        """The table to write to; made, or given its newer column, where it is not yet."""
        table = self._opened
        with writing(self._told):
            if table is None or REMEMBERED_AT.name not in table.schema.names:
                table = self._table = make_table(self._uri, self.name, self._schema())
        return table

    def sync(self, since: float) -> None:
        """Have what anybody has remembered since then on disk before this returns.

        Args:
            since: Seconds since 1970.

        Raises:
            EmbedOnceError: It could not be synced.
        """
        if self._opened is not None:
            with writing(self._told):
                sync_table(self._uri, self.name, since)

    @property
    def _known(self) -> KeyRows:
        """What is here; read when it is asked for first, since many a run never does."""
        if not self._looked:
            self.refresh()
        return self._entries

    @property
    def _opened(self) -> Table | None:
        """The table, if there is one; which entries it has is not asked anew."""
        if self._table is None and not self._looked:
            self.refresh()
        return self._table

    def _reading(self, table: Table) -> AbstractContextManager[None]:
        return reading(
            table,
            f"the cache {self.name}",
            "move that folder aside and run `embed-once reindex`: it takes the vectors of the "
            "index from there, and embeds anew what else is needed.",
        )

    @property
    def _told(self) -> str:
        return f"the cache {self.name} in {self._uri}"

    @property
    def state_uri(self) -> str:
        """The folder it is in."""
        return self._uri

    def table(self) -> Table | None:
        """The table at its newest version, for maintenance; None where there is none yet."""
        return open_table(self._uri, self.name)

    def drop_unused(self, used: KeySet, before: datetime) -> int:
        """Forget what nothing uses and what came before a time.

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
        row_ids, hashes = list[npt.NDArray[np.uint64]](), list[pa.Array]()
        with self._reading(table):
            for entries in read_located(table, ["text_hash", REMEMBERED_AT.name]):
                old = pc.less(entries.column(REMEMBERED_AT.name), limit).fill_null(False)
                gone = np.asarray(old) & ~used.holds(entries.column("text_hash"))
                row_ids.append(entries.column("_rowid").to_numpy()[gone])
                hashes.append(entries.column("text_hash").filter(pa.array(gone)))
        dropped = pa.chunked_array(hashes, HASH).combine_chunks()
        if len(dropped):
            self.forget(np.concatenate(row_ids), dropped)
        return len(dropped)

    def _schema(self) -> pa.Schema:
        text_hash, vector = vectors_schema(self.space.vector_type)
        return pa.schema(
            [text_hash.with_metadata(PRIMARY_KEY), vector, REMEMBERED_AT],
            metadata={SPACE: self.space.to_json().encode()},
        )


def _at(vectors: pa.ChunkedArray, places: npt.NDArray[np.int64]) -> pa.FixedSizeListArray:
    """The vectors at `places`, each of them there; Arrow's `take` takes three times as long."""
    kind = vectors.type
    found = np.empty((len(places), kind.list_size), kind.value_type.to_pandas_dtype())
    start = 0
    for chunk in vectors.chunks:
        here = (places >= start) & (places < start + len(chunk))
        found[here] = numbers(chunk)[places[here] - start]
        start += len(chunk)
    return pa.FixedSizeListArray.from_arrays(pa.array(found.reshape(-1)), type=kind)


def caches(state_uri: str) -> list[Cache]:
    """All caches of a state, one a space."""
    return [Cache(state_uri, space) for space in _spaces(state_uri)]


def caches_beside(cache: Cache, state_uri: str) -> list[Cache]:
    """The caches of other spaces whose vectors are of the same type."""
    return [
        Cache(state_uri, space)
        for space in _spaces(state_uri)
        if space != cache.space and space.vector_type == cache.space.vector_type
    ]


def _spaces(state_uri: str) -> Iterator[Space]:
    if is_local(state_uri) and not Path(state_uri).is_dir():
        return
    with opening(f"The state in {state_uri}"):
        names = connect(state_uri).list_tables(limit=1000).tables
    for name in names:
        table = open_table(state_uri, name) if name.startswith(PREFIX) else None
        if table is not None and SPACE in (table.schema.metadata or {}):
            yield Space.from_json(table.schema.metadata[SPACE].decode())
