"""Maintain: the index made fast, what nobody needs dropped, the cache kept to what is used.

A reindex tidies by itself what would grow without bounds; this does the rest.
"""

from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from pathlib import Path
from uuid import uuid4

import pyarrow as pa

from tasks.cache import PREFIX, Cache, caches
from tasks.errors import EmbedOnceError, IndexHeld, StorageFailed
from tasks.index import (
    SCAN_ROWS,
    adopt,
    generations,
    held,
    identity_of,
    published_index,
    still_held,
    writing_index,
)
from tasks.journal import none_starts
from tasks.keys import KeySet
from tasks.lance import durable, in_short, open_table, read_batches, versions_of, writing
from tasks.ledger import Ledger
from tasks.params import Config
from tasks.providers import Space
from tasks.recover import recover
from tasks.run import record_death
from tasks.schemas import HASH
from tasks.search_indexes import build_search_indexes
from tasks.shape import bytes_of_folder
from tasks.storage import is_local
from tasks.tidy import drop_old_versions, keep_newest, tidy

STATE_TABLES = ("ledger", "calls", "quarantine", "calibrations")
STATE_VERSIONS = 10
"""Versions of such a table that are not worth compacting it."""
STATE_STAYS = timedelta(minutes=1)
"""Versions of such a table that are younger may be in use."""


@dataclass(frozen=True)
class Maintained:
    """What was done.

    Attributes:
        name: The config's name.
        done: What, a phrase each.
        kept: Numbers of the generations that stay readable.
        index_bytes: Of the index on disk, before and after; None on an object store.
        state_bytes: Of cache, ledger and what else there is under state.uri; the same.
    """

    name: str
    done: tuple[str, ...]
    kept: tuple[int, ...]
    index_bytes: tuple[int, int] | None
    state_bytes: tuple[int, int] | None

    def rows(self) -> list[tuple[str, str]]:
        """For people: label and value."""
        return [
            *(("done", each) for each in self.done or ("nothing was due",)),
            ("generations kept", ", ".join(map(str, self.kept)) or "none"),
            *(
                (name, f"{known[1]:,} bytes, before {known[0]:,}")
                for name, known in (("index", self.index_bytes), ("state", self.state_bytes))
                if known is not None
            ),
        ]


def maintain(config: Config, prune_cache: int | None = None) -> Maintained:
    """Tidy the index and its state, and build what makes searches fast.

    Args:
        config: Whose index.
        prune_cache: Drop cache entries that no kept generation of any index sharing the state
            uses and that are older than so many days; None: none.

    Raises:
        IndexHeld: Another run holds the index, or counts on the cache that is to be pruned.
        EmbedOnceError: An index that shares the cache cannot be found.
        LockLost: Another run has taken the index over.
        SettingsError: There is no index yet.
    """
    published_index(config.index)  # before the lock: it would make the folder
    places = (f"{config.index.uri}/{config.index.table}.lance", config.state.uri)
    before = [_bytes(place) for place in places]
    run_id = f"maintain-{uuid4()}"
    with held(config.index, run_id):
        recover(config.state.uri, record_death)  # else what died still counts on the cache
        adopt(config.index)
        table = published_index(config.index)
        given_up = generations(table)[: -config.index.keep_generations]
        keep_newest(table, config.index, run_id)
        done = []
        if given_up:
            names = ", ".join(str(each.number) for each in given_up)
            done.append(f"generations given up: {names}")
        if prune_cache is not None:
            done += prune_caches(config, prune_cache, run_id)
        with writing_index(config.index):
            cache = Cache(config.state.uri, identity_of(table).space)
            done += tidy(config.index, cache, run_id, thorough=True)
            with still_held(config.index, run_id), durable(config.index.uri, config.index.table):
                done += build_search_indexes(published_index(config.index), config.metric)
        done += _tidy_state(config.state.uri)
        kept = tuple(each.number for each in generations(published_index(config.index)))
    index_bytes, state_bytes = (
        None if then is None else (then, bytes_of_folder(place))
        for place, then in zip(places, before, strict=True)
    )
    return Maintained(config.name, tuple(done), kept, index_bytes, state_bytes)


def prune_caches(config: Config, days: int, run_id: str = "prune") -> list[str]:
    """Drop what no index needs from all caches of a state, while none of its runs lives or starts.

    Entries of an unknown age, from before their age was kept, stay. The indexes are that of
    `config`, whose state it is, and all that the ledger knows.

    Returns:
        What was done, a phrase each.

    Raises:
        IndexHeld: A run of this state is going on.
        EmbedOnceError: An index cannot be found or read.
    """
    state_uri, before = config.state.uri, datetime.now(tz=UTC) - timedelta(days=days)
    with none_starts(state_uri, run_id) as alone:
        if not alone:
            raise IndexHeld(
                f"Another run of the state in {state_uri} is going on, and counts on the cache. "
                "Prune the cache when it has ended; nothing of the cache was dropped."
            )
        used = _used(config)
        done = []
        for cache in caches(state_uri):
            keys = KeySet(pa.chunked_array(used.get(cache.space, []), HASH))
            dropped = cache.drop_unused(keys, before)
            table = cache.table()
            if dropped and table is not None:
                with writing(f"the cache {cache.name} in {state_uri}"):
                    drop_old_versions(table, state_uri)
                name = cache.name.removeprefix(PREFIX)
                done.append(f"{dropped:,} vectors of {name} forgotten, unused for {days:,} days")
    return done


def _used(config: Config) -> dict[Space, list[pa.Array]]:
    """text_hash of each row of each kept generation of all indexes that share the state."""
    state_uri = config.state.uri
    runs = Ledger(state_uri).runs()
    used: dict[Space, list[pa.Array]] = {}
    indexes = {config.index.place, *(runs["index"] if len(runs) else ())}
    for name in sorted(indexes - {""}):  # an embedder has none
        folder, _, table_name = str(name).rpartition("/")
        if is_local(folder) and not Path(folder).is_dir():
            raise EmbedOnceError(
                f"The folder of the index {name}, which shares the state in {state_uri}, is not "
                "there, so nobody can tell what it needs; nothing of the cache was dropped. Bring "
                "it back, or make an empty folder in its place if the index is gone for good."
            )
        try:
            table = open_table(folder, table_name)
            if table is None:
                continue
            known = used.setdefault(identity_of(table).space, [])
            newest = table.version
            for version in {newest, *(each.version for each in generations(table))}:
                table.checkout(version)
                batches = read_batches(table, SCAN_ROWS, ["text_hash"])
                known += [batch.column("text_hash") for batch in batches]
        except (RuntimeError, OSError, ValueError, StorageFailed) as error:
            raise EmbedOnceError(
                f"LanceDB could not read the index {name}, which shares the state in {state_uri}: "
                f"{in_short(error)}. Nothing of the cache was dropped, as nobody can tell what "
                "that index needs."
            ) from error
    return used


def _tidy_state(state_uri: str) -> list[str]:
    """Compact the small tables of the state; each is opened for one reading or writing only."""
    done = []
    for name in STATE_TABLES:
        table = open_table(state_uri, name)
        if table is None or len(versions_of(table)) <= STATE_VERSIONS:
            continue
        with writing(f"the table {name} in {state_uri}"):
            drop_old_versions(table, state_uri, STATE_STAYS)
        done.append(f"{name} compacted")
    return done


def _bytes(place: str) -> int | None:
    return bytes_of_folder(place) if is_local(place) else None
