"""Lookup: which of the texts that are needed nobody has paid for yet."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from tasks.cache import Cache
from tasks.keys import KeySet, first_of_each
from tasks.schemas import CHANGES, HASH, INDEXED, MISSES, TableRef
from tasks.stage import stage

NONE = pa.array([], HASH)


@dataclass(frozen=True)
class LookedUp:
    """What is known and what is not.

    Attributes:
        misses: MISSES, each text once, in corpus order.
        from_cache: Texts of added, changed and moved rows whose vector is known.
        cache_tokens: Their estimated tokens.
        in_index: text_hash of those known only from the published index.
        quarantined: text_hash of those that nobody will send again.
        came: Of those known, what this run has taken from the Batch lane.
        waiting: Texts that are in the Batch lane.
        waiting_tokens: Their estimated tokens.
    """

    misses: TableRef
    from_cache: int
    cache_tokens: int
    in_index: pa.Array
    quarantined: pa.Array
    came: int
    waiting: int
    waiting_tokens: int


@stage("lookup")
def lookup(
    changes: TableRef,
    indexed: TableRef,
    cache: Cache,
    target: Path,
    *,
    unfolded: Sequence[pa.Array],
    quarantined: pa.Array,
    waiting: pa.Array = NONE,
    came: pa.Array = NONE,
) -> LookedUp:
    """Hold the texts of `changes` against all vectors that are already paid for.

    Duplicates collapse here: whatever needs a text, it is one row of the result.

    Args:
        changes: CHANGES.
        indexed: INDEXED of the published index, in the cache's space.
        cache: Vectors known.
        target: File for the MISSES table.
        unfolded: text_hash columns of answers that are paid but not in the cache yet.
        quarantined: text_hash of texts that the provider has refused.
        waiting: text_hash of texts that are in the Batch lane.
        came: text_hash of texts that this run itself has taken from there.
    """
    table = changes.load(CHANGES)
    # Lines alone differ in relined rows: they need their vector too, but nothing was saved.
    counted = table.filter(pc.not_equal(table.column("change"), "relined"))
    table = pa.concat_tables([counted, table.filter(pc.equal(table.column("change"), "relined"))])
    first = first_of_each(table.column("text_hash"))
    needed = table.take(pa.array(first)).select(MISSES.names)
    counts = first < counted.num_rows
    hashes = needed.column("text_hash")
    cached = cache.holds(hashes)
    for column in unfolded:
        cached |= KeySet(column).holds(hashes)
    published = KeySet(indexed.load(INDEXED).column("text_hash")).holds(hashes)
    known = cached | published
    taken_in = KeySet(came).holds(hashes)
    counts &= ~taken_in
    waits = KeySet(waiting).holds(hashes) & ~known
    refused = KeySet(quarantined).holds(hashes) & ~known & ~waits
    misses = needed.filter(pa.array(~known & ~refused & ~waits)).cast(MISSES)
    return LookedUp(
        misses=TableRef.write(target, MISSES, [misses]),
        from_cache=int(np.sum(known & counts)),
        cache_tokens=pc.sum(needed.filter(pa.array(known & counts)).column("tokens")).as_py() or 0,
        in_index=hashes.filter(pa.array(published & ~cached)).combine_chunks(),
        quarantined=hashes.filter(pa.array(refused)).combine_chunks(),
        came=int(np.sum(known & taken_in)),
        waiting=int(np.sum(waits)),
        waiting_tokens=pc.sum(needed.filter(pa.array(waits)).column("tokens")).as_py() or 0,
    )
