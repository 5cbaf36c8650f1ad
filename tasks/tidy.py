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
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta

from lancedb.index import Bitmap
from lancedb.table import Table

from tasks.cache import Cache
from tasks.errors import EmbedOnceError
from tasks.index import TAG, Generation, generations, open_index, require_held, writing_index
from tasks.journal import none_starts
from tasks.lance import durable, sync_table, versions_of
from tasks.params import Index
from tasks.search_indexes import refresh_text_index, vector_index
from tasks.shape import Shape, shape_of
from tasks.storage import is_local

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


def keep_newest(table: Table, index: Index, run_id: str) -> list[Generation]:
    """Give up all generations but the newest `index.keep_generations`.

    Returns:
        Those that are kept, oldest first.

    Raises:
        LockLost: Another run has taken the index over.
    """
    known = generations(table)
    _give_up(table, known[: -index.keep_generations], index, run_id)
    return known[-index.keep_generations :]


def _give_up(table: Table, unneeded: list[Generation], index: Index, run_id: str) -> None:
    for generation in unneeded:
        require_held(index, run_id)
        with writing_index(index):
            table.tags.delete(f"{TAG}{generation.number}")


def make_room(index: Index, cache: Cache, run_id: str, *, writes: int | None, leaves: int) -> None:
    """Give up older generations where publish would need more disk than there may be.

    The copy that the newest generation was published on stays even so, for its readers; where
    it has been rewritten since, index and cache may take more by this one copy until the next run.

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
        _give_up_old_copies(table, shape, index, run_id)
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

    Raises:
        LockLost: Another run has taken the index over.
    """
    table = open_index(index)
    if table is None:
        return []
    done = []
    kept = keep_newest(table, index, run_id)
    shape = shape_of(table)
    share, floor, fragments = (0.05, 0, 8) if thorough else (WASTE, FLOOR, FRAGMENTS)
    worth = max(int(share * shape.live), floor)
    if kept and shape.unneeded(kept[0].version) > worth:
        freed = prune(table, kept[0].version, index, run_id)
        done.append(f"versions that no generation needs dropped ({freed:,} bytes)")
        shape = shape_of(table)
    done += tidy_cache(cache, run_id, room=Taken.of(shape, cache).room, thorough=thorough)
    room = Taken.of(shape, cache).room
    due = shape.waste > worth or shape.fragments > fragments
    # Where vectors are few beside the texts, an early rewrite fits and a late one does not.
    last_chance = shape.waste > FLOOR and room < shape.live + 2 * shape.bytes_of(wrote)
    overdue = shape.waste > 2 * worth + FLOOR and len(shape.copies) == 1
    # Beside the copy of readers and this one, the next publish may write another.
    fits = 2 * shape.live <= max(room, FLOOR)
    if shape.live > floor and ((fits and (due or last_chance)) or overdue):
        rewrite(table, index, run_id)
        done.append(f"{shape.fragments:,} fragments written into one ({shape.live:,} bytes)")
    return done


def cover(index: Index, run_id: str) -> None:
    """Mark what the newest version consists of, so that a prune leaves it alone.

    Raises:
        LockLost: Another run has taken the index over.
    """
    table = open_index(index)
    if table is not None and shape_of(table).live >= FLOOR:
        require_held(index, run_id)
        with durable(index.uri, index.table):
            table.create_index("run_id", config=Bitmap(), name=COVER, replace=True)


def rewrite(table: Table, index: Index, run_id: str) -> None:
    """Write the newest version as one fragment, with the indexes that it has.

    With a vector index LanceDB itself compacts step by step, by what each of its parts covers;
    there only deleted rows go.

    Raises:
        LockLost: Another run has taken the index over.
    """
    require_held(index, run_id)
    with durable(index.uri, index.table):
        if COVER in {each.name for each in table.list_indices()}:
            table.drop_index(COVER)
        if vector_index(table) is None:
            refresh_text_index(table)
        table.optimize(cleanup_older_than=FOREVER)
        table.create_index("run_id", config=Bitmap(), name=COVER, replace=True)


def prune(table: Table, since: int, index: Index, run_id: str) -> int:
    """Drop all versions before `since`, and of a folder what killed writers left.

    On an object store the files of killed writers stay: a run that has lost its lease could
    take those of its successor for them. What stays is on disk already: who wrote it has synced it.

    Args:
        table: At its newest version; nobody else writes to it.
        since: The oldest version to keep: the newest one, or one that carries a tag.
        index: That of the table; the caller holds it.
        run_id: The caller's run.

    Returns:
        Bytes freed.

    Raises:
        LockLost: Another run has taken the index over.
    """
    before = shape_of(table).disk
    at = next(each["timestamp"] for each in versions_of(table) if each["version"] == since)
    for lateness in LATENESS_S:
        age = datetime.now(tz=UTC) - at.astimezone(UTC) + timedelta(seconds=lateness)
        if since == table.version:
            age = BRIEFLY
        require_held(index, run_id)
        with durable(index.uri, index.table):  # what it put together before it was stopped, too
            try:
                table.optimize(cleanup_older_than=age, delete_unverified=is_local(index.uri))
                break
            except RuntimeError as error:
                if "tagged version" not in str(error) or lateness == LATENESS_S[-1]:
                    raise
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
        freed = drop_old_versions(table, cache.state_uri)
    cache.refresh()
    return [f"cache compacted, {shape.fragments:,} fragments ({freed:,} bytes freed)"]


def drop_old_versions(table: Table, uri: str, older_than: timedelta = BRIEFLY) -> int:
    """Compact a table of a state, then drop its old versions.

    Args:
        table: One without indexes, at its newest version.
        uri: The state.
        older_than: Versions younger than this stay for others; the newest one always does.

    Returns:
        Bytes freed.
    """
    before = shape_of(table).disk
    table.optimize(cleanup_older_than=FOREVER)
    # Else a power cut would take the new files, after the old ones have gone.
    sync_table(uri, table.name, since=0.0)
    table.optimize(cleanup_older_than=older_than)
    return max(before - shape_of(table).disk, 0)


@contextmanager
def unharmed() -> Iterator[None]:
    """Leave to the next run what fails here: the run that tidies has published."""
    try:
        yield
    except (EmbedOnceError, RuntimeError, OSError, ValueError) as error:
        logger.warning("Tidying was left for the next run: %s", error)


def _give_up_old_copies(table: Table, shape: Shape, index: Index, run_id: str) -> None:
    """Keep only generations on the copy of the newest one, and what follows it, say a rewrite."""
    known = generations(table)
    if not known:
        return
    first = next(copy.first for copy in shape.copies if copy.last >= known[-1].version)
    since = next(each.version for each in known if each.version >= first)
    if shape.unneeded(since):
        _give_up(table, [each for each in known if each.version < since], index, run_id)
        prune(table, since, index, run_id)
