"""The index: an ordinary LanceDB table that says of itself which space it holds.

A generation is one published state of it, tagged `gen-N` on its LanceDB version.
"""

import json
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path

import pyarrow as pa
from filelock import FileLock, Timeout
from lancedb.table import Table

from tasks.cache import SPACE
from tasks.errors import EmbedOnceError, IndexConflict, IndexHeld
from tasks.keys import KeySet, key_columns
from tasks.lance import PRIMARY_KEY, open_table, read_batches
from tasks.params import Index
from tasks.providers import Space
from tasks.schemas import INDEXED, TableRef, metadata_fields, rows_schema

FORMAT = b"embed_once.format"
SPLITTER = b"embed_once.splitter"
TAG = "gen-"
SCAN_ROWS = 8192


@dataclass(frozen=True)
class Identity:
    """What an index must agree on with whoever writes to it.

    Attributes:
        space: Where its vectors live.
        splitter: Version of what cut its documents; "" for a table of chunks.
    """

    space: Space
    splitter: str

    def schema(self, metadata: list[pa.Field]) -> pa.Schema:
        """Schema of the index: one row a chunk."""
        rows = list(rows_schema(metadata))
        rows[0] = rows[0].with_metadata(PRIMARY_KEY)
        vector = pa.field("vector", self.space.vector_type, nullable=False)
        return pa.schema(
            [*rows[:4], vector, *rows[4:], pa.field("run_id", pa.utf8(), nullable=False)],
            metadata={
                FORMAT: b"1",
                SPACE: self.space.to_json().encode(),
                SPLITTER: self.splitter.encode(),
            },
        )


@dataclass(frozen=True)
class Generation:
    """One published state of an index."""

    number: int
    version: int
    published_at: datetime


def open_index(index: Index) -> Table | None:
    """The table, or None where nothing was published yet.

    Raises:
        IndexConflict: The table was not made by embed-once.
    """
    table = open_table(index.uri, index.table)
    if table is None:
        return None
    if FORMAT not in (table.schema.metadata or {}):
        raise IndexConflict(
            f"The table {index.table!r} in {index.uri} was not made by embed-once, so it is left "
            "alone. Name another table in index.table."
        )
    return table


def identity_of(table: Table) -> Identity:
    """What the table says of itself."""
    metadata = table.schema.metadata
    return Identity(Space.from_json(metadata[SPACE].decode()), metadata[SPLITTER].decode())


def require_space(table: Table, index: Index, space: Space) -> None:
    """Refuse to mix vectors that cannot be compared.

    Raises:
        IndexConflict: The table holds vectors of another space.
    """
    theirs = identity_of(table).space
    if theirs != space:
        raise IndexConflict(
            f"The table {index.table!r} in {index.uri} holds vectors of {theirs}, the config asks "
            f"for {space}. Vectors of two spaces cannot be compared: name another table in "
            "index.table, and switch over when it is built."
        )


def scan(table: Table | None, target: Path) -> TableRef:
    """The rows of the index as INDEXED; none where there is no index yet."""
    return TableRef.write(target, INDEXED, [] if table is None else _indexed(table))


def _indexed(table: Table) -> Iterator[pa.RecordBatch]:
    metadata = [field.name for field in metadata_fields(table.schema)]
    kept = ["id", "document", "text_hash", "start_line", "end_line"]
    for batch in read_batches(table, SCAN_ROWS, [*kept, *metadata]):
        columns = {**key_columns(batch), **{name: batch.column(name) for name in kept}}
        yield pa.record_batch([columns[name] for name in INDEXED.names], schema=INDEXED)


def generations(table: Table) -> list[Generation]:
    """All generations that are kept, oldest first."""
    # LanceDB tells the time of this machine, without saying so.
    published = {
        entry["version"]: entry["timestamp"].astimezone(UTC) for entry in table.list_versions()
    }
    found = [
        Generation(int(name.removeprefix(TAG)), tag["version"], published[tag["version"]])
        for name, tag in table.tags.list().items()
        if name.startswith(TAG) and tag["version"] in published
    ]
    return sorted(found, key=lambda generation: generation.number)


def broken_tags(table: Table) -> list[str]:
    """Tags of generations whose version is gone."""
    versions = {entry["version"] for entry in table.list_versions()}
    tags = table.tags.list().items()
    return sorted(
        name for name, tag in tags if name.startswith(TAG) and tag["version"] not in versions
    )


def tag_generation(table: Table) -> Generation:
    """Make the newest version the next generation, unless it is one already."""
    known = generations(table)
    version = table.version
    if known and known[-1].version == version:
        return known[-1]
    # A tag whose version is gone still takes its number.
    taken = [name for name in table.tags.list() if name.startswith(TAG)]
    number = max((int(name.removeprefix(TAG)) for name in taken), default=0) + 1
    table.tags.create(f"{TAG}{number}", version)
    return Generation(number, version, datetime.now(tz=UTC))


@contextmanager
def committing(index: Index, version: int) -> Iterator[None]:
    """Write down that a commit is about to follow `version`, until it is tagged.

    Versions that others make, say by compaction, are no generations; by this note `adopt`
    tells a commit of ours whose run died before it could tag it.
    """
    note = _note(index)
    note.parent.mkdir(parents=True, exist_ok=True)
    note.write_text(str(version), encoding="utf-8")
    try:
        yield
    except EmbedOnceError:  # the commit was undone
        note.unlink()
        raise
    note.unlink()


def unadopted(index: Index) -> bool:
    """Whether a run committed that died before it could tag its generation."""
    table, note = open_index(index), _note(index)
    if table is None or not note.exists():
        return False
    noted = note.read_text(encoding="utf-8")
    return noted.isdigit() and table.version > int(noted)


def adopt(index: Index) -> None:
    """Tag what a run committed that died before it could say so."""
    table = open_index(index)
    if table is not None and unadopted(index):
        tag_generation(table)
    _note(index).unlink(missing_ok=True)


def _note(index: Index) -> Path:
    return Path(index.uri) / f"{index.table}.committing"


def vectors_of(index: Index, hashes: pa.Array) -> Iterator[pa.Table]:
    """The vectors that the index holds for these text hashes, a few thousand at a time."""
    table = open_index(index)
    if table is None or not len(hashes):
        return
    wanted = KeySet(hashes)
    for batch in read_batches(table, SCAN_ROWS, ["text_hash", "vector"]):
        found = batch.filter(pa.array(wanted.holds(batch.column("text_hash"))))
        if found.num_rows:
            yield pa.Table.from_batches([found.select(["text_hash", "vector"])])


@contextmanager
def held(index: Index, run_id: str) -> Iterator[None]:
    """Hold the index against all other runs; the lock frees itself when the process dies.

    Raises:
        IndexHeld: Another run holds it; the message says which.
    """
    folder = Path(index.uri)
    folder.mkdir(parents=True, exist_ok=True)
    holder = folder / f"{index.table}.holder.json"
    lock = FileLock(folder / f"{index.table}.lock", timeout=0)
    try:
        lock.acquire()
    except Timeout:
        raise IndexHeld(
            f"Another run holds the index {index.table!r} in {index.uri}{_holder(holder)}. "
            "Run again when it has ended."
        ) from None
    try:
        since = datetime.now(tz=UTC).isoformat(timespec="seconds")
        holder.write_text(json.dumps({"run_id": run_id, "since": since}), encoding="utf-8")
        yield
    finally:
        lock.release()


def _holder(file: Path) -> str:
    try:
        who = json.loads(file.read_text(encoding="utf-8"))
        return f": run {who['run_id']}, since {who['since']}"
    except (OSError, ValueError, KeyError):
        return ""
