"""Tidy: what index and cache take on disk stays within twice what they would take freshly written.

LanceDB keeps each file that a version needs. `optimize` writes all small fragments into one, then
drops versions, in this order and never one without the other; a fragment of which more than a
tenth is deleted is written anew too. So three things happen apart from each other here:

- rewrite: the newest version as one fragment. The generations kept stay on the old copy.
- prune: once no generation that is kept needs it, the old copy goes. For this not to write a third
  copy, a bookkeeping index covers the fragment of the last rewrite: LanceDB puts together only
  neighbours that the same indexes cover.
- make room: what publish is about to write may need the old copy gone sooner than that.
"""

import logging
import os
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

from lancedb.index import Bitmap
from lancedb.table import Table

from tasks.cache import Cache
from tasks.errors import EmbedOnceError
from tasks.index import TAG, Generation, generations, open_index
from tasks.journal import none_starts
from tasks.params import Index
from tasks.search_indexes import refresh_text_index, vector_index

COVER = "embed_once_base"
"""Bookkeeping index on `run_id`, a few bytes a run: covers what the last rewrite wrote."""
FLOOR = 256 * 2**10
"""Bytes that are never worth tidying."""
WASTE = 0.2
"""Share of the live bytes that may be waste before a table is rewritten."""
FRAGMENTS = 50
"""Most fragments before the index is rewritten; each one costs a search."""
REWRITTEN = 0.1
"""LanceDB writes a fragment anew of which more than this share is deleted."""
DISK_FACTOR = 2 * 0.97
"""Times the live bytes that index and cache may take; the rest is for manifests."""
FOREVER = timedelta(days=36_500)
BRIEFLY = timedelta(milliseconds=1)
"""All versions but the newest, which always stays, are older."""
LATENESS_S = (0.001, 0.002, 0.005, 0.02, 0.1, 1.0, 10.0)
"""What LanceDB may take from our look at the clock to its own; the tag stops it if more.

As little as will do: milliseconds before its own version a rewrite makes one of the old files.
"""

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Copy:
    """Versions in a row that share one copy of the rows, each with what was added since.

    Attributes:
        first: The first of them.
        last: The last of them.
        size: Bytes of all their data files.
    """

    first: int
    last: int
    size: int


@dataclass(frozen=True)
class Shape:
    """What a table takes on disk, in bytes.

    Attributes:
        copies: Oldest first; the newest version is in the last one.
        disk: All files; what killed writers left is among them.
        newest: Data files of the newest version.
        live: What the newest version would take freshly written, its indexes included.
        indexes: Indexes of the newest version.
        fragments: Of the newest version.
        deleted: Rows deleted in them.
        largest: Rows of the largest of them.
        rows: Rows of the newest version.
    """

    copies: tuple[Copy, ...]
    disk: int
    newest: int
    live: int
    indexes: int
    fragments: int
    deleted: int
    largest: int
    rows: int

    @property
    def waste(self) -> int:
        """Bytes of the newest version that are deleted rows."""
        return self.newest + self.indexes - self.live

    def bytes_of(self, rows: int) -> int:
        """What so many rows take."""
        return rows * self.live // max(self.rows, 1)

    def unneeded(self, since: int) -> int:
        """Bytes of copies that end before version `since`."""
        return sum(copy.size for copy in self.copies if copy.last < since)


@dataclass(frozen=True)
class Taken:
    """What index and cache take on disk, in bytes, and what they may take."""

    disk: int
    limit: int

    @classmethod
    def of(cls, shape: Shape, cache: Cache) -> "Taken":
        """Of an index of this shape and its cache."""
        table = cache.table()
        if table is None:
            return cls(shape.disk, int(DISK_FACTOR * shape.live))
        theirs = shape_of(table)
        return cls(shape.disk + theirs.disk, int(DISK_FACTOR * (shape.live + theirs.live)))

    @property
    def room(self) -> int:
        """Bytes that may be written; negative where too much is there already."""
        return self.limit - self.disk


def shape_of(table: Table) -> Shape:
    """What `table`, at its newest version, takes on disk."""
    versions = sorted(table.list_versions(), key=lambda entry: entry["version"])
    facts = [{name: int(value) for name, value in entry["metadata"].items()} for entry in versions]
    copies: list[Copy] = []
    before: dict[str, int] | None = None
    for entry, now in zip(versions, facts, strict=True):
        version, size = int(entry["version"]), now["total_files_size"]
        if before is None or (
            # What only adds has more fragments, what only deletes has the same files.
            now["total_fragments"] <= before["total_fragments"]
            and size != before["total_files_size"]
            and _first_fragment(table, version) != _first_fragment(table, copies[-1].last)
        ):
            copies.append(Copy(version, version, size))
        else:
            last = copies[-1]
            copies[-1] = Copy(last.first, version, max(last.size, size))
        before = now
    newest = facts[-1]
    stats: Any = table.stats()
    stored = max(newest["total_data_file_rows"], 1)
    indexes = max(stats["total_bytes"] - newest["total_files_size"], 0)
    return Shape(
        copies=tuple(copies),
        disk=max(
            bytes_of_folder(str(table.uri)),  # type: ignore[attr-defined]
            sum(copy.size for copy in copies),
        ),
        newest=newest["total_files_size"],
        live=newest["total_files_size"] * newest["total_rows"] // stored + indexes,
        indexes=indexes,
        fragments=newest["total_fragments"],
        deleted=newest["total_deletion_file_rows"],
        largest=stats["fragment_stats"]["lengths"]["max"],
        rows=newest["total_rows"],
    )


def bytes_of_folder(path: str) -> int:
    """Bytes of all files below `path`; 0 where it is no folder of this machine."""
    total = 0
    for folder, _, files in os.walk(path):
        for name in files:
            with suppress(FileNotFoundError):
                total += (Path(folder) / name).stat().st_size
    return total


def _first_fragment(table: Table, version: int) -> int:
    """Number of the fragment that the rows of a version begin with; LanceDB uses none twice."""
    table.checkout(version)
    try:
        found = table.search().select([]).with_row_id(True).limit(1).to_arrow()
    finally:
        table.checkout_latest()  # type: ignore[no-untyped-call]
    return int(found.column("_rowid")[0].as_py()) >> 32 if found.num_rows else -1


def keep_newest(table: Table, keep: int) -> list[Generation]:
    """Give up all generations but the newest `keep`.

    Returns:
        Those that are kept, oldest first.
    """
    known = generations(table)
    for generation in known[:-keep]:
        table.tags.delete(f"{TAG}{generation.number}")
    return known[-keep:]


def make_room(index: Index, cache: Cache, run_id: str, *, writes: int | None, leaves: int) -> None:
    """Give up older generations where publish would need more disk than there may be.

    Args:
        index: The caller holds it.
        cache: That of the index.
        run_id: The caller's run.
        writes: Rows that publish will write; None: the whole table.
        leaves: Rows of the newest version that it will delete or replace.
    """
    table = open_index(index)
    if table is None:
        return
    shape = shape_of(table)
    if shape.live < FLOOR:
        return
    extra = shape.live if writes is None else shape.bytes_of(writes)
    room = Taken.of(shape, cache).room
    last_chance = shape.deleted <= REWRITTEN * shape.largest < shape.deleted + leaves
    if len(shape.copies) > 1 and (room < extra or (last_chance and room < extra + shape.live)):
        _give_up_old_copies(table, shape)
        room = Taken.of(shape_of(table), cache).room
    if room < extra + shape.live:
        tidy_cache(cache, run_id, room=room - extra)


def tidy(
    index: Index, cache: Cache, run_id: str, *, wrote: int = 0, thorough: bool = False
) -> list[str]:
    """Prune and rewrite index and cache where that is due; nothing, where it is not.

    Args:
        index: The caller holds it.
        cache: That of the index; both share the disk that may be taken.
        run_id: The caller's run.
        wrote: Rows that the last publish wrote, as the next one may.
        thorough: Do also what is not due yet, as far as the disk allows it.

    Returns:
        What was done, a phrase each.
    """
    table = open_index(index)
    if table is None:
        return []
    done = []
    kept = keep_newest(table, index.keep_generations)
    shape = shape_of(table)
    share, floor, fragments = (0.05, 0, 8) if thorough else (WASTE, FLOOR, FRAGMENTS)
    worth = max(int(share * shape.live), floor)
    if kept and shape.unneeded(kept[0].version) > worth:
        freed = prune(table, kept[0].version)
        done.append(f"versions that no generation needs dropped ({freed:,} bytes)")
        shape = shape_of(table)
    done += tidy_cache(cache, run_id, room=Taken.of(shape, cache).room, thorough=thorough)
    room = Taken.of(shape, cache).room
    due = shape.waste > worth or shape.fragments > fragments
    # Where vectors are few beside the texts, an early rewrite fits and a late one does not.
    last_chance = shape.waste > FLOOR and room < shape.live + 2 * shape.bytes_of(wrote)
    overdue = shape.waste > 2 * worth + FLOOR and len(shape.copies) == 1
    fits = shape.live <= max(room, FLOOR)
    if shape.live > floor and ((fits and (due or last_chance)) or overdue):
        rewrite(table)
        done.append(f"{shape.fragments:,} fragments written into one ({shape.live:,} bytes)")
    return done


def cover(table: Table) -> None:
    """Mark what the newest version consists of, so that a prune leaves it alone."""
    if shape_of(table).live >= FLOOR:
        table.create_index("run_id", config=Bitmap(), name=COVER, replace=True)


def rewrite(table: Table) -> None:
    """Write the newest version as one fragment, with the indexes that it has.

    With a vector index LanceDB itself compacts step by step, by what each of its parts covers;
    there only deleted rows go.
    """
    if COVER in {each.name for each in table.list_indices()}:
        table.drop_index(COVER)
    if vector_index(table) is None:
        refresh_text_index(table)
    table.optimize(cleanup_older_than=FOREVER)
    table.create_index("run_id", config=Bitmap(), name=COVER, replace=True)


def prune(table: Table, since: int) -> int:
    """Drop all versions before `since`, and what killed writers left.

    Args:
        table: At its newest version; nobody else writes to it.
        since: The oldest version to keep: the newest one, or one that carries a tag.

    Returns:
        Bytes freed.
    """
    before = shape_of(table).disk
    at = next(each["timestamp"] for each in table.list_versions() if each["version"] == since)
    for lateness in LATENESS_S:
        age = datetime.now(tz=UTC) - at.astimezone(UTC) + timedelta(seconds=lateness)
        if since == table.version:
            age = BRIEFLY
        try:
            table.optimize(cleanup_older_than=age, delete_unverified=True)
        except RuntimeError as error:
            if "tagged version" not in str(error) or lateness == LATENESS_S[-1]:
                raise
        else:
            break
    return max(before - shape_of(table).disk, 0)


def tidy_cache(cache: Cache, run_id: str, *, room: int, thorough: bool = False) -> list[str]:
    """Compact the cache and drop its old versions where that is due; nothing, where it is not.

    Nor while another run lives: it finds rows by their place in the version that it has open.

    Args:
        cache: That of the caller's run.
        run_id: The caller's run.
        room: Bytes that may be written for it.
        thorough: Do also what is not due yet.

    Returns:
        What was done, a phrase each.
    """
    table = cache.table()
    if table is None:
        return []
    shape = shape_of(table)
    spare = shape.disk - shape.live
    due = shape.fragments > FRAGMENTS or spare > max(int(WASTE * shape.live), FLOOR)
    needs = shape.live if shape.fragments > 1 else 0
    if not (due or (thorough and shape.fragments > 1)) or needs > max(room, FLOOR):
        return []
    with none_starts(cache.state_uri, run_id) as alone:
        if not alone:
            return []
        table.optimize(cleanup_older_than=FOREVER)
        freed = drop_old_versions(table)
    cache.refresh()
    return [f"cache compacted, {shape.fragments:,} fragments ({freed:,} bytes freed)"]


def drop_old_versions(table: Table) -> int:
    """Drop all versions but the newest of a table that nobody else uses.

    Returns:
        Bytes freed.
    """
    before = shape_of(table).disk
    table.optimize(cleanup_older_than=BRIEFLY)
    return max(before - shape_of(table).disk, 0)


@contextmanager
def unharmed() -> Iterator[None]:
    """Leave to the next run what fails here: the run that tidies has published."""
    try:
        yield
    except (EmbedOnceError, RuntimeError, OSError, ValueError) as error:
        logger.warning("Tidying was left for the next run: %s", error)


def _give_up_old_copies(table: Table, shape: Shape) -> None:
    """Keep only generations on the newest copy; the newest one moves there if it is on none."""
    known = generations(table)
    if not known:
        return
    first = shape.copies[-1].first
    since = next((each.version for each in known if each.version >= first), table.version)
    for generation in known[:-1]:
        if generation.version < since:
            table.tags.delete(f"{TAG}{generation.number}")
    if known[-1].version < since:
        # What follows a generation without being one, say a rewrite, has the same rows.
        table.tags.update(f"{TAG}{known[-1].number}", since)
    prune(table, since)
