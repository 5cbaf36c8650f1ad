"""The index: an ordinary LanceDB table that says of itself which space it holds.

A generation is one published state of it, tagged `gen-N` on its LanceDB version.
"""

from collections.abc import Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager
from dataclasses import dataclass
from datetime import UTC, datetime

import pyarrow as pa
from lancedb.table import Table

from tasks.cache import SPACE
from tasks.errors import (
    EmbedOnceError,
    IndexConflict,
    IndexHeld,
    LockLost,
    SettingsError,
    StorageFailed,
)
from tasks.keys import KeySet
from tasks.lance import (
    PRIMARY_KEY,
    durable,
    open_table,
    read_where,
    reading,
    sync_table,
    tags_of,
    versions_of,
    writing,
)
from tasks.params import Index
from tasks.prepare import taken_apart
from tasks.progress import tell_waiting
from tasks.providers import Space
from tasks.schemas import rows_schema
from tasks.storage import Holder, Taken, storage_at

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


def published_index(index: Index) -> Table:
    """The table of an index that was published.

    Raises:
        SettingsError: Nothing was published yet.
        IndexConflict: The table was not made by embed-once.
    """
    table = open_index(index)
    if table is None:
        raise SettingsError(
            f"There is no index {index.table!r} in {index.uri} yet. "
            "Run `embed-once reindex` with this config first."
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
            f"for {space}{differences(theirs, space)}. Vectors of two spaces cannot be compared: "
            "name another table in index.table, and switch over when it is built; or go back to "
            "the embedding it was made with."
        )


def differences(theirs: Space, ours: Space) -> str:
    """What differs between two spaces beyond their names, to go on with a sentence."""
    recipe, names = taken_apart(theirs.preparation)
    our_recipe, our_names = taken_apart(ours.preparation)
    told = []
    if names != our_names:
        stands, wanted = (" and ".join(each) or "nothing" for each in (names, our_names))
        told.append(f"in front of its texts stands {stands}, embedding.prepend asks for {wanted}")
    if theirs.input_type != ours.input_type:
        told.append(f"its input_type is {theirs.input_type}, the config's is {ours.input_type}")
    if recipe != our_recipe and theirs.provider == ours.provider:
        told.append(f"its vectors are made by {recipe}, now they are by {our_recipe}")
    return "".join(f"; {each}" for each in told)


def reading_index(table: Table) -> AbstractContextManager[None]:
    """Say in words that rows of the index could not be read; errors as in `reading`."""
    return reading(
        table,
        f"the index {table.name!r}",
        "move that folder aside and run `embed-once reindex`: what the cache holds costs nothing.",
    )


def writing_index(index: Index) -> AbstractContextManager[None]:
    """Say in words that the index could not be written; errors as in `writing`."""
    return writing(f"the index {index.table!r} in {index.uri}")


def generations(table: Table) -> list[Generation]:
    """All generations that are kept, oldest first."""
    # LanceDB tells the time of this machine, without saying so.
    published = {
        entry["version"]: entry["timestamp"].astimezone(UTC) for entry in versions_of(table)
    }
    found = [
        Generation(int(name.removeprefix(TAG)), version, published[version])
        for name, version in tags_of(table).items()
        if name.startswith(TAG) and version in published
    ]
    return sorted(found, key=lambda generation: generation.number)


def broken_tags(table: Table) -> list[str]:
    """Tags of generations whose version is gone."""
    versions = {entry["version"] for entry in versions_of(table)}
    tags = tags_of(table).items()
    return sorted(
        name for name, version in tags if name.startswith(TAG) and version not in versions
    )


def tag_generation(table: Table) -> Generation:
    """Make the newest version the next generation, unless it is one already."""
    known = generations(table)
    version = table.version
    if known and known[-1].version == version:
        return known[-1]
    # A tag whose version is gone still takes its number.
    taken = [name for name in tags_of(table) if name.startswith(TAG)]
    number = max((int(name.removeprefix(TAG)) for name in taken), default=0) + 1
    table.tags.create(f"{TAG}{number}", version)
    return Generation(number, version, datetime.now(tz=UTC))


@contextmanager
def committing(index: Index, version: int) -> Iterator[None]:
    """Write down that a commit is about to follow `version`, until it is tagged.

    Versions that others make, say by compaction, are no generations; by this note `adopt`
    tells a commit of ours whose run died before it could tag it.
    """
    storage, note = storage_at(index.uri), _note(index)
    storage.write(note, str(version).encode())
    try:
        with durable(index.uri, index.table):
            yield
    except (LockLost, StorageFailed):  # the note may be another run's, or the commit made
        raise
    except EmbedOnceError:  # the commit was undone
        storage.delete([note])
        raise
    storage.delete([note])


def unadopted(index: Index) -> bool:
    """Whether a commit was made that no generation names: its run is about to, or has died."""
    table = _committed(index)
    return table is not None and all(each.version != table.version for each in generations(table))


def _committed(index: Index) -> Table | None:
    """The index, where a run has written a commit down and made it; else None."""
    table, noted = open_index(index), storage_at(index.uri).read(_note(index))
    if table is None or noted is None:
        return None
    version = noted.to_pybytes()
    return table if version.isdigit() and table.version > int(version) else None


def adopt(index: Index) -> None:
    """Tag what a run committed that died before it could say so."""
    table = _committed(index)
    if table is not None:  # it may be tagged and not synced yet
        tag_generation(table)
        sync_table(index.uri, index.table, since=0.0)
    storage_at(index.uri).delete([_note(index)])


def _note(index: Index) -> str:
    return f"{index.table}.committing"


def vectors_of(index: Index, hashes: pa.Array) -> Iterator[pa.Table]:
    """The vectors that the index holds for these text hashes, a few thousand at a time."""
    table = open_index(index)
    if table is None or not len(hashes):
        return
    wanted = KeySet(hashes)
    with reading_index(table):
        for batch in read_where(table, "text_hash", wanted.holds, ["text_hash", "vector"]):
            yield pa.Table.from_batches([batch])


@contextmanager
def held(index: Index, run_id: str) -> Iterator[None]:
    """Hold the index against all other runs; the lock frees itself when the process dies.

    A run that finds it held waits for at most `index.max_wait` seconds.

    Raises:
        IndexHeld: Another run still holds it; the message says which.
        StorageFailed: The folder or store does not take a lock.
    """

    def told(holder: Holder | None) -> None:
        if index.max_wait:
            who = f": {holder}" if holder else ""
            tell_waiting(f"the index {index.table} is held by another run{who}")

    with ExitStack() as stack:
        lock = storage_at(index.uri).held(_lock(index), run_id, index.max_wait, told)
        try:
            stack.enter_context(lock)
        except Taken as taken:  # only of this lock: a run takes others inside
            raise IndexHeld(_held_message(index, taken.holder)) from None
        yield


def is_held(index: Index) -> bool:
    """Whether a run holds the index; one that died may seem to for a while."""
    return storage_at(index.uri).lives(_lock(index))


def require_held(index: Index, run_id: str) -> None:
    """Make sure, just before a commit of a run, that no other one has taken the index over.

    Raises:
        LockLost: One has: this process did not renew its lock in time.
    """
    storage_at(index.uri).require_held(_lock(index), run_id)


@contextmanager
def still_held(index: Index, run_id: str) -> Iterator[None]:
    """Have the block begin only while the index is ours, and say so if it fails because it is not.

    Raises:
        LockLost: As in `require_held`.
    """
    require_held(index, run_id)
    try:
        yield
    except EmbedOnceError:
        require_held(index, run_id)
        raise


def _lock(index: Index) -> str:
    return f"{index.table}.lock"


def _held_message(index: Index, holder: Holder | None) -> str:
    waited = f" after {index.max_wait:g} s" if index.max_wait else ""
    return (
        f"Another run holds the index {index.table!r} in {index.uri}{waited}"
        f"{f': {holder}' if holder else ''}. Run again when it has ended, or have runs wait for "
        "it with index.max_wait."
    )
