"""What we need of LanceDB beside its own calls."""

import math
import re
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, suppress
from pathlib import Path
from typing import Any

import lancedb
import numpy as np
import numpy.typing as npt
import pyarrow as pa
from lancedb.db import DBConnection
from lancedb.table import Table

from tasks.aside import meanwhile
from tasks.errors import EmbedOnceError, IndexHeld, StorageFailed
from tasks.storage import is_local, storage_at
from tasks.storage.folder import sync

PRIMARY_KEY = {b"lance-schema:unenforced-primary-key": b"true"}
"""Field metadata that makes concurrent upserts of one key meet.

Without it five processes upserting the same 100 keys left 500 rows and no error.
"""
ALONG_S = 0.5
"""So often what a commit writes is synced while it is written."""
WINDOW_ROWS = 8192
"""Most rows of one query where a whole table is read with its vectors."""
WINDOW_BYTES = 64 * 2**20
"""Most bytes of whole rows of one query, as they lie on disk, where texts take about a half."""

METADATA_BYTES = 32 * 2**20
"""What a connection may keep in memory of versions and files that were read.

LanceDB's own limit is 1 GiB. It keeps the list of fragments of each version, so that a cache which
grew in 750 commits held 300 MB of them, and this 5, in the same time.
"""

Wanted = Callable[[pa.Array], npt.NDArray[np.bool_]]
"""For each value of a column whether its row is wanted."""

CLOCK_SLACK_S = 300.0
"""So far the clock of a disk, say of another machine's, may be from ours."""


def connect(uri: str) -> DBConnection:
    """A connection that keeps no more than METADATA_BYTES of the versions that were read."""
    session = lancedb.Session(metadata_cache_size_bytes=METADATA_BYTES)
    return lancedb.connect(uri, session=session)


def open_table(uri: str, name: str) -> Table | None:
    """The table, or None where there is none yet.

    A writer that was killed before its first commit leaves a folder without a version in it;
    that is no table either, and creating one goes over it.

    Raises:
        StorageFailed: Its disk or store does not let us look.
    """
    if is_local(uri) and not (Path(uri) / f"{name}.lance").exists():
        return None
    with opening(f"The table {name} in {uri}"):
        try:
            return connect(uri).open_table(name)
        except ValueError as error:
            if "was not found" in str(error):
                return None
            raise


@contextmanager
def opening(what: str) -> Iterator[None]:
    """Say in words that LanceDB could not open `what`.

    Raises:
        StorageFailed: For whatever LanceDB raises; a store that does not answer when it connects
            is a ValueError to it (0.40).
    """
    try:
        yield
    except (RuntimeError, OSError, ValueError) as error:
        raise StorageFailed(
            f"{what} cannot be opened: {in_short(error)}. See that its disk or store is there, "
            "then run again."
        ) from error


def make_table(uri: str, name: str, schema: pa.Schema) -> Table:
    """The table, made with `schema` if there is none yet.

    One that has not all columns yet, as an older version of embed-once made it, gets them.

    Two processes that create one table at once would let the later one overwrite what the
    first has written meanwhile (17 of 150 times, with `exist_ok=True`); hence the lock.
    """
    table = open_table(uri, name)
    if table is not None and not _lacking(table, schema):
        return table
    with table_lock(uri, name, "making the table"):
        table = open_table(uri, name)
        if table is None:
            return connect(uri).create_table(name, schema=schema, exist_ok=True)
        if lacking := _lacking(table, schema):
            table.add_columns(pa.schema([field.with_nullable(True) for field in lacking]))
        return table


def table_lock(uri: str, name: str, what_for: str) -> AbstractContextManager[object]:
    """Held by who makes the table or adds what nobody else may add meanwhile; others wait."""
    return storage_at(uri).held(f"{name}.lock", f"{what_for} {name}", wait_s=math.inf)


def _lacking(table: Table, schema: pa.Schema) -> list[pa.Field]:
    return [field for field in schema if field.name not in table.schema.names]


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
            f"LanceDB could not write {what}: {in_short(error)}. "
            "What was paid for is kept. See that it can be written and has room, then run again."
        ) from error


def in_short(error: Exception) -> str:
    """What LanceDB says, without where in its own source that stands."""
    first = str(error).splitlines()[0] if str(error) else type(error).__name__
    return re.sub(r"^lance error: |LanceError\(\w+\): |, /\S+\.rs:\d+:\d+", "", first).rstrip(". ")


@contextmanager
def durable(uri: str, name: str) -> Iterator[None]:
    """Have what is committed to the table in this block on disk when it ends.

    What it writes is synced meanwhile, so that at its end little is left to wait for.

    Raises:
        OSError: It could not be synced.
    """
    if not is_local(uri):
        yield
        return
    since = time.time()

    def sync_along() -> None:
        _sync_newer((Path(uri) / f"{name}.lance" / "data").glob("*"), since)

    with meanwhile(sync_along, ALONG_S):  # an error that it was told, nobody is told again
        yield
    sync_table(uri, name, since)


def sync_table(uri: str, name: str, since: float) -> None:
    """Have all that was written to the table since then on disk before this returns.

    LanceDB syncs no file and no folder (0.40, by strace): after a power cut a commit may be
    empty files. On object stores there is nothing to do.

    Args:
        uri: The database.
        name: The table.
        since: Seconds since 1970, by this machine's clock.

    Raises:
        OSError: It could not be synced.
    """
    if not is_local(uri):
        return
    folder = Path(uri) / f"{name}.lance"
    _sync_newer((folder, *folder.rglob("*")), since)
    sync(folder.parent)


def _sync_newer(paths: Iterable[Path], since: float) -> None:
    """Sync the folders among `paths`, and what has been written since then."""
    for path in paths:
        with suppress(FileNotFoundError):  # what another process compacts away
            if path.is_dir() or path.stat().st_mtime >= since - CLOCK_SLACK_S:
                sync(path)


@contextmanager
def reading(table: Table, what: str, last_resort: str) -> Iterator[None]:
    """Say in words that LanceDB could not read `table`, say because one of its files is gone.

    Args:
        table: As it was opened.
        what: The same for people.
        last_resort: What to do where its files are lost for good.

    Raises:
        IndexHeld: Another run has written a newer version meanwhile; by that, files of this one
            may be tidied away.
        EmbedOnceError: For whatever else LanceDB raises.
    """
    try:
        yield
    except (RuntimeError, OSError, ValueError) as error:
        place = table.uri  # type: ignore[attr-defined] # of any table but a cloud one
        if _newest(table) > table.version:
            raise IndexHeld(
                f"Another run changed {what} in {place} while it was read. "
                "Run again when it has ended."
            ) from error
        raise EmbedOnceError(
            f"LanceDB could not read {what} in {place}: {in_short(error)}. See that its disk "
            f"or store is there, and run again. As a last resort {last_resort}"
        ) from error


def versions_of(table: Table) -> list[dict[str, Any]]:
    """What LanceDB tells of each version that is kept: number, time, figures; in no order.

    Raises:
        StorageFailed: Its disk or store does not let us look.
    """
    with opening(_told(table)):
        return list(table.list_versions())


def tags_of(table: Table) -> dict[str, int]:
    """The version of each tag; errors as in `versions_of`."""
    with opening(_told(table)):
        return {name: int(tag["version"]) for name, tag in table.tags.list().items()}


def _told(table: Table) -> str:
    place = table.uri  # type: ignore[attr-defined] # of any table but a cloud one
    return f"The table {table.name} in {place}"


def _newest(table: Table) -> int:
    """The newest version there is; 0 where that cannot be read."""
    with suppress(RuntimeError, OSError, ValueError):
        return max((entry["version"] for entry in table.list_versions()), default=0)
    return 0


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
    for query in _windows(table, columns, WINDOW_ROWS):
        yield from query.with_row_id(True).to_batches(WINDOW_ROWS)


def read_where(
    table: Table, key: str, wanted: Wanted, columns: Sequence[str] | None = None
) -> Iterator[pa.RecordBatch]:
    """The rows of `table` whose `key` is wanted, in the order of the table, a window at a time.

    Args:
        table: At a version that stays.
        key: A column; of windows where none of it is wanted, nothing else is read.
        wanted: Says so for each of its values.
        columns: What is read of the rows; all if None.
    """
    at_once = WINDOW_ROWS
    if columns is None:
        row = max(1, data_bytes(table) // max(1, table.count_rows()))
        at_once = min(WINDOW_ROWS, max(1, WINDOW_BYTES // row))
    windows = (_windows(table, each, at_once) for each in ([key], columns))
    for keys, rows in zip(*windows, strict=True):
        keep = wanted(keys.to_arrow().column(key).combine_chunks())
        if keep.any():
            yield from rows.to_arrow().filter(pa.array(keep)).to_batches()


def replace_rows(
    table: Table,
    key: str,
    leaving: Wanted,
    new: pa.RecordBatchReader | None,
    may_commit: Callable[[], None],
) -> None:
    """Take rows out of `table` and put others in, in one commit that costs what these rows cost.

    LanceDB's own merge (0.40) reads and holds every column of the table where rows leave: for
    100,000 rows of 1,024 floats 540 MB and 0.9 s; this took 100 MB and 0.1 s for 2,000 of them.

    Args:
        table: At its newest version.
        key: The column that tells which rows leave.
        leaving: Says so for each of its values.
        new: What comes, of the schema of the table; None: nothing.
        may_commit: Called right before the commit; if it raises, there is none.
    """
    # Not where no row leaves: it takes 25 MB.
    import lance  # noqa: PLC0415
    from lance.fragment import write_fragments  # noqa: PLC0415

    # `table.to_lance()` takes what stands behind a question mark in a path for no part of it.
    place = table.uri  # type: ignore[attr-defined] # of any table but a cloud one
    dataset = lance.dataset(place, version=table.version)
    fragments = {each.fragment_id: each for each in dataset.get_fragments()}
    update = lance.LanceOperation.Update()
    for number, offsets in _by_fragment(dataset, key, leaving):
        # Then no list is made of them: a number of Python's for each row of the table.
        all_leave = len(offsets) == fragments[number].count_rows()
        left = None if all_leave else fragments[number].delete_rows(offsets.tolist())
        if left is None:
            update.removed_fragment_ids.append(number)
        else:
            update.updated_fragments.append(left)
    if new is not None:
        update.new_fragments = write_fragments(new, dataset, schema=new.schema)
    may_commit()
    lance.LanceDataset.commit(dataset, update, read_version=dataset.version)
    table.checkout_latest()  # type: ignore[no-untyped-call]


def _by_fragment(
    dataset: Any, key: str, leaving: Wanted
) -> Iterator[tuple[int, npt.NDArray[np.uint64]]]:
    """The rows whose `key` is leaving: the number of a fragment, and which rows of it."""
    batches = dataset.scanner(columns=[key], with_row_address=True).to_batches()
    found = [each.column("_rowaddr").to_numpy()[leaving(each.column(key))] for each in batches]
    addresses = np.sort(np.concatenate([np.zeros(0, np.uint64), *found]))
    # An address is the fragment in its upper half and the row in its lower one.
    fragments, starts = np.unique(addresses >> np.uint64(32), return_index=True)
    rows = np.split(addresses & np.uint64(2**32 - 1), starts[1:])
    yield from zip(fragments.tolist(), rows, strict=False)


def data_bytes(table: Table) -> int:
    """Bytes on disk of the columns of the newest version; search indexes do not count.

    Raises:
        StorageFailed: Its disk or store does not let us look.
    """
    newest = max(versions_of(table), key=lambda entry: entry["version"])
    return int(newest["metadata"]["total_files_size"])


def _windows(table: Table, columns: Sequence[str] | None, at_once: int) -> Iterator[Any]:
    """Queries, each for the next `at_once` rows of `table`."""
    for start in range(0, table.count_rows(), at_once):
        query = table.search()
        if columns is not None:
            query = query.select(list(columns))
        yield query.limit(at_once).offset(start)


def quoted(text: str) -> str:
    """`text` as a literal of a LanceDB predicate; double quotes would name a column."""
    return "'" + text.replace("'", "''") + "'"
