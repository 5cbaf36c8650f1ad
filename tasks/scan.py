"""Scan: the rows of the published index, keyed like the corpus.

What a run knows of them at its end is kept in the state, for exactly the version of the table that
it leaves. While that is the newest, the next run does not read and hash the same rows again.
"""

import logging
import os
import shutil
from collections.abc import Iterator
from datetime import UTC
from pathlib import Path

import pyarrow as pa
from lancedb.table import Table

from tasks.errors import EmbedOnceError
from tasks.index import SCAN_ROWS, open_index, reading_index
from tasks.keys import KeySet, digest, digest_column, key_columns
from tasks.lance import read_batches, versions_of
from tasks.params import Config, Index
from tasks.schemas import DELETIONS, INDEXED, TableRef, metadata_fields
from tasks.storage import is_local, storage_at
from tasks.storage.folder import make_folder, sync

FORMAT = 1
"""Counts up whenever the same row is keyed in another way."""
KEPT = ["id", "document", "text_hash", "start_line", "end_line"]
"""The columns that INDEXED has of the index."""

logger = logging.getLogger(__name__)


def scan(table: Table | None, target: Path) -> TableRef:
    """The rows of the index as INDEXED, all read; none where there is no index yet."""
    return TableRef.write(target, INDEXED, [] if table is None else _indexed(table))


def scan_unless_known(config: Config, table: Table | None, target: Path) -> TableRef:
    """The same, not read where they are known from the last run."""
    # What was scanned here before may be the kept file itself, by another name.
    target.unlink(missing_ok=True)
    name = None if table is None or not _is_kept(config) else _name(config.index, table)
    if table is None or name is None:
        return scan(table, target)
    try:
        # The next run may drop it meanwhile: what is linked stays.
        _link(Path(config.state.uri) / name, target)
        known = TableRef.of(target)
        if known.rows == table.count_rows() and known.schema().equals(INDEXED):
            return known
    except FileNotFoundError:
        return scan(table, target)
    except (OSError, pa.ArrowException) as error:
        logger.warning("The index is read, since what was kept of it cannot be: %s", error)
    target.unlink(missing_ok=True)
    return scan(table, target)


def keep_scan(
    config: Config, indexed: TableRef, version: int, rows: TableRef, deletions: TableRef
) -> None:
    """Keep for the next run what this one knows of the rows, and forget what was kept before.

    That it cannot be kept harms nobody: then the next run reads the index. Nothing is kept where
    the table is not as this run left it, say since somebody else wrote to it or it was compacted.

    Args:
        config: Whose index; the caller holds it.
        indexed: INDEXED, as the run found it.
        version: Of the table by then; 0 where there was none.
        rows: `rows_schema(metadata)`: what the run has written since.
        deletions: DELETIONS: what it has deleted.
    """
    if not _is_kept(config):
        return
    try:
        table = open_index(config.index)
        name = None if table is None else _name(config.index, table)
        if table is None or name is None:
            return
        storage = storage_at(config.state.uri)
        others = set(storage.names(_folder(config.index)))
        wrote = bool(rows.rows or deletions.rows)
        if table.version == version + wrote and name not in others:
            if wrote:
                left = Path(indexed.path).with_name("left.arrow")
                indexed = TableRef.write(left, INDEXED, _left(indexed, rows, deletions))
            if indexed.rows == table.count_rows():
                _keep(Path(indexed.path), Path(config.state.uri) / name)
        storage.delete(others - {name})
    except (EmbedOnceError, RuntimeError, OSError, ValueError) as error:
        logger.warning("The next run reads the index: what is known of it is not kept: %s", error)


def _keep(staged: Path, kept: Path) -> None:
    """Have the staged file stay, durably."""
    make_folder(kept.parent)
    unfinished = kept.with_name("unfinished.tmp")
    unfinished.unlink(missing_ok=True)
    _link(staged, unfinished)
    sync(unfinished)
    unfinished.replace(kept)
    sync(kept.parent)


def _link(file: Path, name: Path) -> None:
    """Give the file another name; a copy gets it where the file system has no such thing."""
    try:
        os.link(file, name)
    except FileNotFoundError:
        raise
    except OSError:  # it is on another disk, or somebody else's
        shutil.copyfile(file, name)


def _left(indexed: TableRef, rows: TableRef, deletions: TableRef) -> Iterator[pa.RecordBatch]:
    """What the index holds after a run."""
    schema = rows.schema()
    if indexed.rows:
        written = [digest_column(batch.column("id")) for batch in rows.batches(schema)]
        deleted = digest_column(deletions.load(DELETIONS).column("id").combine_chunks())
        gone = KeySet(pa.chunked_array([*written, deleted]))
        for batch in indexed.batches(INDEXED):
            yield batch.filter(pa.array(~gone.holds(batch.column("key"))))
    for batch in rows.batches(schema):
        yield _keyed(batch)


def _indexed(table: Table) -> Iterator[pa.RecordBatch]:
    metadata = [field.name for field in metadata_fields(table.schema)]
    with reading_index(table):
        for batch in read_batches(table, SCAN_ROWS, [*KEPT, *metadata]):
            yield _keyed(batch)


def _keyed(rows: pa.RecordBatch) -> pa.RecordBatch:
    """INDEXED of rows that have the columns of the index, or some of them."""
    columns = {**key_columns(rows), **{name: rows.column(name) for name in KEPT}}
    return pa.record_batch([columns[name] for name in INDEXED.names], schema=INDEXED)


def _is_kept(config: Config) -> bool:
    """Whether anything is kept: from an object store it would come no faster than the index."""
    return is_local(config.state.uri)


def _folder(index: Index) -> str:
    return f"scans/{digest(index.place.encode()).hex()}"


def _name(index: Index, table: Table) -> str | None:
    """By number alone the version of a table that was dropped and made anew would look the same.

    None where another run has tidied this version away meanwhile.
    """
    for each in versions_of(table):
        if each["version"] == table.version:
            made = each["timestamp"].astimezone(UTC)
            return f"{_folder(index)}/{FORMAT}-{table.version}-{made:%Y%m%dT%H%M%S%f}.arrow"
    return None
