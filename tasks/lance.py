"""What we need of LanceDB beside its own calls."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import lancedb
import pyarrow as pa
from filelock import FileLock
from lancedb.table import Table

from tasks.errors import EmbedOnceError

PRIMARY_KEY = {b"lance-schema:unenforced-primary-key": b"true"}
"""Field metadata that makes concurrent upserts of one key meet.

Without it five processes upserting the same 100 keys left 500 rows and no error.
"""
WINDOW_ROWS = 8192
"""Rows of one query where a whole table is read with its vectors."""


def open_table(uri: str, name: str) -> Table | None:
    """The table, or None where there is none yet.

    A writer that was killed before its first commit leaves a folder without a version in it;
    that is no table either, and creating one goes over it.
    """
    if not (Path(uri) / f"{name}.lance").exists():
        return None
    try:
        return lancedb.connect(uri).open_table(name)
    except ValueError as error:
        if "was not found" in str(error):
            return None
        raise


def make_table(uri: str, name: str, schema: pa.Schema) -> Table:
    """The table, made with `schema` if there is none yet.

    One that has not all columns yet, as an older version of embed-once made it, gets them.

    Two processes that create one table at once would let the later one overwrite what the
    first has written meanwhile (17 of 150 times, with `exist_ok=True`); hence the lock.
    """
    Path(uri).mkdir(parents=True, exist_ok=True)
    with FileLock(Path(uri) / f"{name}.lock"):
        table = open_table(uri, name)
        if table is None:
            return lancedb.connect(uri).create_table(name, schema=schema, exist_ok=True)
        lacking = [field for field in schema if field.name not in table.schema.names]
        if lacking:
            table.add_columns(pa.schema([field.with_nullable(True) for field in lacking]))
        return table


@contextmanager
def writing(what: str) -> Iterator[None]:
    """Say in words that LanceDB could not write `what`.

    Raises:
        EmbedOnceError: For whatever LanceDB raises: it has no errors of its own.
    """
    try:
        yield
    except (RuntimeError, OSError, ValueError) as error:
        raise EmbedOnceError(
            f"LanceDB could not write {what}: {str(error).splitlines()[0]} "
            "The index is as it was; what was paid for is kept."
        ) from error


@contextmanager
def reading(what: str, way_out: str) -> Iterator[None]:
    """Say in words that LanceDB could not read `what`, say because one of its files is lost.

    Raises:
        EmbedOnceError: For whatever LanceDB raises; the message ends with `way_out`.
    """
    try:
        yield
    except (RuntimeError, OSError, ValueError) as error:
        raise EmbedOnceError(
            f"LanceDB could not read {what}: {str(error).splitlines()[0]} {way_out}"
        ) from error


def read_batches(
    table: Table, batch_rows: int, columns: Sequence[str] | None = None
) -> Iterator[pa.RecordBatch]:
    """All rows of `table`, a batch at a time."""
    query = table.search()
    if columns is not None:
        query = query.select(list(columns))
    yield from query.to_batches(batch_rows)


def read_located(table: Table, columns: Sequence[str]) -> Iterator[pa.RecordBatch]:
    """All rows of `table` with their `_rowid`, in the order of the table, a window at a time.

    One query for all of it reads ahead further than it is followed: 300k vectors of 256
    floats took 366 MB, in windows 172 MB however many there are.
    """
    for start in range(0, table.count_rows(), WINDOW_ROWS):
        query = table.search().select(list(columns)).with_row_id(True)
        yield from query.limit(WINDOW_ROWS).offset(start).to_batches(WINDOW_ROWS)


def quoted(text: str) -> str:
    """`text` as a literal of a LanceDB predicate; double quotes would name a column."""
    return "'" + text.replace("'", "''") + "'"
