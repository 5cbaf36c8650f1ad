"""Publish: the index follows the corpus in one commit, or in none where nothing changed.

Readers see the old rows or the new ones, never a mixture, whichever of the four ways a
run takes: create, add, merge or overwrite.
"""

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from functools import partial
from typing import Literal

import numpy as np
import pyarrow as pa
from lancedb.table import Table

from tasks.aside import one_ahead
from tasks.cache import Cache
from tasks.errors import CorpusError, EmbedOnceError
from tasks.index import (
    Identity,
    committing,
    generations,
    open_index,
    require_held,
    still_held,
    tag_generation,
    writing_index,
)
from tasks.keys import KeySet, digest_column, first_of_each
from tasks.lance import Wanted, connect, read_batches, read_where, replace_rows
from tasks.memory import MOST, Sizes
from tasks.params import Index
from tasks.schemas import DELETIONS, HASH, TableRef, metadata_fields, rows_schema
from tasks.soundness import numbers
from tasks.stage import stage
from tasks.tidy import cover, make_room, tidy, unharmed

MERGE_ROWS = 1_000_000
"""Most rows that leave or change in one merge, which holds about 100 bytes for each; beyond, the
table is written anew."""

Way = Literal["none", "create", "add", "merge", "overwrite"]


@dataclass(frozen=True)
class Published:
    """What was committed.

    Attributes:
        way: How.
        generation: Number of the newest generation; 0 where there is no index.
        version: Its LanceDB version.
        rows: Rows in the index.
    """

    way: Way
    generation: int
    version: int
    rows: int


@stage("publish")
def publish(
    *,
    rows: TableRef,
    deletions: TableRef,
    updates: int,
    index: Index,
    identity: Identity,
    cache: Cache,
    run_id: str,
    sizes: Sizes = MOST,
    anew: bool = False,
) -> Published:
    """Bring the index in step, in at most one commit.

    Args:
        rows: `rows_schema(metadata)`: what the index gains or rewrites.
        deletions: DELETIONS.
        updates: How many of `rows` the index has already.
        index: Where it is; the caller holds it.
        identity: Space and splitter of the new generation.
        cache: Holds the vector of each row.
        run_id: Stands in each row that is written.
        sizes: How much of the rows is held at once.
        anew: Write the table anew at any rate: a merge cannot tell two rows of one id apart.

    Raises:
        CorpusError: `rows` holds an id twice.
        LockLost: Another run has taken the index over; nothing was published.
        EmbedOnceError: A vector is missing; nothing was published.
    """
    metadata = metadata_fields(rows.schema())
    _require_publishable(rows, metadata, cache)
    table = open_index(index)
    schema = identity.schema(_in_order_of(table, metadata))
    replaced = updates + deletions.rows
    way = _way(table, schema, rows.rows, replaced)
    if anew and table is not None:
        way = "overwrite"
    if way == "none":
        return _nothing_new(table)
    with unharmed():
        writes = None if way == "overwrite" else rows.rows
        make_room(index, cache, run_id, writes=writes, leaves=replaced)
    table = open_index(index)
    # LanceDB writes the one before meanwhile.
    vectors = one_ahead(_with_vectors(rows, schema, cache, run_id, sizes))
    held = partial(require_held, index, run_id)
    # Where LanceDB itself writes, it refuses NaN, and has to be stopped from committing.
    stream = _finite(vectors) if way == "merge" else _then(vectors, held)
    new = pa.RecordBatchReader.from_batches(schema, stream)
    with (
        still_held(index, run_id),
        writing_index(index),
        committing(index, 0 if table is None else table.version),
    ):
        if table is None:
            table = _create(index, schema, new, rows.rows, held)
            expected = rows.rows
        else:
            expected = table.count_rows() + rows.rows - replaced
            before = table.version
            if way == "add":
                table.add(new)
            elif way == "merge":
                coming = new if rows.rows else None
                replace_rows(table, "id", _leaving(rows, deletions), coming, held)
            else:
                table = _overwrite(table, index, schema, new, _leaving(rows, deletions))
            _require_rows(table, before, expected, held)
        newest = tag_generation(table)
    return Published(way, newest.number, newest.version, expected)


def tidy_published(
    published: Published, wrote: int, index: Index, cache: Cache, run_id: str
) -> None:
    """Tidy index and cache after `publish`, once the run is in the ledger: it may take a while.

    Args:
        published: What it committed.
        wrote: Rows that it wrote.
        index: The caller holds it.
        cache: That of the index.
        run_id: The caller's run.
    """
    if published.way == "none":
        return
    with unharmed():
        if published.way == "overwrite":
            cover(index, run_id)
        tidy(index, cache, run_id, wrote=wrote)


def _in_order_of(table: Table | None, metadata: list[pa.Field]) -> list[pa.Field]:
    """The columns in the order the table has them, so that another order changes nothing."""
    known = table.schema.names if table is not None else []
    return sorted(
        metadata, key=lambda field: known.index(field.name) if field.name in known else len(known)
    )


def _nothing_new(table: Table | None) -> Published:
    known = generations(table) if table is not None else []
    if table is None or not known:
        return Published("none", 0, 0, 0 if table is None else table.count_rows())
    return Published("none", known[-1].number, known[-1].version, table.count_rows())


def _way(table: Table | None, schema: pa.Schema, rows: int, replaced: int) -> Way:
    if table is None:
        return "create" if rows else "none"
    if not table.schema.equals(schema, check_metadata=True):
        return "overwrite"
    if not rows and not replaced:
        return "none"
    if not replaced:
        return "add"
    return "overwrite" if replaced > MERGE_ROWS else "merge"


def _create(
    index: Index,
    schema: pa.Schema,
    new: pa.RecordBatchReader,
    expected: int,
    require_held: Callable[[], None],
) -> Table:
    """The first generation, or none at all: a fault while it streams leaves an empty table."""
    connection = connect(index.uri)
    table = connection.create_table(index.table, data=new, schema=schema)
    found = table.count_rows()
    if found != expected:
        require_held()  # else it may be the table of another run
        connection.drop_table(index.table)
        raise EmbedOnceError(
            f"LanceDB wrote {found} rows of {expected}, so the table was dropped again. "
            "Nothing was published; what was paid for is kept."
        )
    return table


def _leaving(rows: TableRef, deletions: TableRef) -> Wanted:
    """Of ids of the index those that are deleted, or written again."""
    staged, gone = rows.load(rows.schema()).column("id"), deletions.load(DELETIONS).column("id")
    ids = pa.chunked_array([*staged.chunks, *gone.chunks], pa.utf8())
    keys = KeySet(digest_column(ids))
    return lambda found: keys.holds(digest_column(found))


def _overwrite(
    table: Table, index: Index, schema: pa.Schema, new: pa.RecordBatchReader, leaving: Wanted
) -> Table:
    """Write the table anew: its rows that stay, then the new ones. Old versions stay readable."""

    def stream() -> Iterator[pa.RecordBatch]:
        for batch in read_where(table, "id", lambda ids: ~leaving(ids)):
            yield _fitted(batch, schema)
        yield from new

    reader = pa.RecordBatchReader.from_batches(schema, stream())
    connection = connect(index.uri)
    return connection.create_table(index.table, data=reader, schema=schema, mode="overwrite")


def _fitted(batch: pa.RecordBatch, schema: pa.Schema) -> pa.RecordBatch:
    """`batch` with the columns of `schema`; a metadata column it lacks is null."""
    columns = []
    for field in schema:
        if field.name in batch.schema.names and batch.schema.field(field.name).type == field.type:
            columns.append(batch.column(field.name))
        else:
            columns.append(pa.nulls(batch.num_rows, field.type))
    return pa.record_batch(columns, schema=schema)


def _with_vectors(
    rows: TableRef, schema: pa.Schema, cache: Cache, run_id: str, sizes: Sizes
) -> Iterator[pa.RecordBatch]:
    """`rows` as rows of the index, about `sizes.written` bytes of vectors at a time."""
    most = max(1, sizes.written // cache.space.vector_bytes)
    for read in rows.batches(rows.schema()):
        for start in range(0, read.num_rows, most):
            batch = read.slice(start, most)
            own = {
                "vector": cache.vectors(batch.column("text_hash")),
                "run_id": pa.array([run_id] * batch.num_rows, pa.utf8()),
            }
            columns = [own[name] if name in own else batch.column(name) for name in schema.names]
            yield pa.record_batch(columns, schema=schema)


def _then(batches: Iterator[pa.RecordBatch], check: Callable[[], None]) -> Iterator[pa.RecordBatch]:
    """`batches`, and `check` once LanceDB has taken them all: right before it commits."""
    yield from batches
    check()


def _finite(batches: Iterator[pa.RecordBatch]) -> Iterator[pa.RecordBatch]:
    """`batches`, if all their vectors are finite."""
    for batch in batches:
        if not np.isfinite(numbers(batch.column("vector"))).all():
            raise EmbedOnceError("a vector in the cache is not finite, see `embed-once verify`")
        yield batch


def _require_publishable(rows: TableRef, metadata: list[pa.Field], cache: Cache) -> None:
    """Refuse what no commit may hold: an id twice, a row without its vector."""
    # Not held: pages of a mapped file that were looked at count as memory until it is let go.
    staged = rows.load(rows_schema(metadata))
    # The primary key does not stop duplicates inside one commit.
    if repeats := _repeats(staged.column("id").chunks):
        raise CorpusError(
            f"{repeats} rows to publish repeat an id of another. Nothing was published; "
            "give each chunk an id of its own."
        )
    cache.require(staged.column("text_hash"))  # LanceDB would hide the error in its own


def _repeats(ids: Iterable[pa.Array]) -> int:
    """How many of `ids` another one before them is equal to."""
    keys = pa.chunked_array([digest_column(each) for each in ids], HASH)
    return len(keys) - len(first_of_each(keys))


def _require_rows(
    table: Table, before: int, expected: int, require_held: Callable[[], None]
) -> None:
    """Undo a commit that did not bring what it should."""
    found = table.count_rows()
    alone = table.version == before + 1  # else another writer may have added what we did, too
    ids = (each.column("id") for each in read_batches(table, 8192, ["id"]))
    if found == expected and (alone or not _repeats(ids)):
        return
    require_held()  # else it may be the commit of another run
    table.checkout(before)
    table.restore()
    raise EmbedOnceError(
        f"The commit left {found} rows in the index instead of {expected}, or an id twice; "
        f"version {before} was restored. Something else may be writing to this table: see that "
        "only embed-once does."
    )
