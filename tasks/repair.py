"""Repair: what verify found is mended as far as that costs nothing, in one generation.

A vector is taken from wherever a good one is: cache, index or journal. A row whose text has
none anywhere is taken out, so that the next reindex pays for exactly that text.
"""

import tempfile
from contextlib import ExitStack
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from pathlib import Path
from uuid import uuid4

import numpy as np
import pyarrow as pa

from tasks.errors import EmbedOnceError
from tasks.findings import Finding, Repair, Verified
from tasks.index import Identity, adopt, broken_tags, generations, held, open_index, writing_index
from tasks.journal import RunFolder, fold
from tasks.keys import KeySet, first_of_each
from tasks.memory import MOST, giving_back
from tasks.mending import TAKEN_ROWS, Mending, bad_rows, mended, require_few_leave
from tasks.notes import About
from tasks.params import Config
from tasks.providers.opening import open_provider
from tasks.publish import Published, publish, tidy_published
from tasks.quarantine import Quarantine
from tasks.recover import recover
from tasks.report import Chunks
from tasks.run import Clock, about_run, ended_report, enter, record_death
from tasks.schemas import vectors_schema
from tasks.soundness import Fault
from tasks.verify import Differences, Look, is_paid, look, state_findings, verified_of

REPAIR = "repair"
"""How the ledger says that a generation came to be."""


def repair(config: Config, sample: int | None = None) -> Verified:
    """Mend what can be mended for free, then look again.

    Args:
        config: Which index; it is held meanwhile.
        sample: Texts to embed again, as in `verify`; what is paid for serves the repair.

    Returns:
        What is left, and in `repair` what was found and mended.

    Raises:
        IndexHeld: A run holds the index.
        SettingsError: More would be taken out than `index.max_deleted_fraction` allows.
        EmbedOnceError: As in `verify`, or the index cannot be written: it is as it was.
    """
    folder = RunFolder(config.state.uri, f"repair-{uuid4()}")
    clock = Clock(datetime.now(tz=UTC))
    about = about_run(config, open_provider(config).space, folder.run_id, clock)
    with ExitStack() as stack:
        stack.enter_context(held(config.index, folder.run_id))
        early = state_findings(config, open_index(config.index), ours=True)
        done = _Done()
        recovered = recover(config.state.uri, record_death)
        done.entries_added, done.set_aside = recovered.vectors, len(recovered.set_aside)
        adopt(config.index)
        done.tags_removed = _remove_tags(config)
        stack.enter_context(folder.alive(about))
        try:
            seen = look(config, folder.staging, sample, folder if is_paid(config, sample) else None)
            found = [*early, *_besides(early, seen.findings)]
            published = _mend(seen, folder, done)
        except EmbedOnceError as error:
            _record(config, folder, about, clock, done, error=str(error))
            raise
        usd = sum(call.usd for call in folder.calls())
        if found or usd:
            _record(config, folder, about, clock, done)
        if published is not None:
            cache = seen.entries.cache
            tidy_published(published, done.written, config.index, cache, folder.run_id)
        with tempfile.TemporaryDirectory(prefix="embed-once-") as staging:
            free = not is_paid(config, sample)
            again = look(config, Path(staging), sample if free else 0, None)
            verified = verified_of(again, usd, clock.total())
    if not found:
        return verified
    outcome = Repair(found=tuple(found), generation=verified.generation, **asdict(done))
    return verified.model_copy(update={"repair": outcome, "embedded_again": seen.asked})


@dataclass
class _Done:
    """What was mended so far; fields as in `Repair`."""

    published: bool = False
    written: int = 0
    added: int = 0
    deleted: int = 0
    entries_dropped: int = 0
    entries_added: int = 0
    released: int = 0
    set_aside: int = 0
    tags_removed: int = 0


def _remove_tags(config: Config) -> int:
    table = open_index(config.index)
    broken = broken_tags(table) if table is not None else []
    for name in broken:
        with writing_index(config.index):
            table.tags.delete(name)  # type: ignore[union-attr]
    return len(broken)


def _besides(early: list[Finding], later: list[Finding]) -> list[Finding]:
    """`later` without what was found early already."""
    kinds = {each.kind for each in early}
    return [each for each in later if each.kind not in kinds]


def _mend(seen: Look, folder: RunFolder, done: _Done) -> Published | None:
    """Mend the cache, then the index, if there is one, in one commit."""
    config, found, entries = seen.config, seen.differences, seen.entries
    cache = entries.cache
    spoiled = np.flatnonzero((entries.faults != Fault.SOUND) | entries.duplicate)
    texts = entries.hashes.take(pa.array(spoiled))
    if len(spoiled):
        cache.forget(entries.row_ids[spoiled], texts)
        done.entries_dropped = len(spoiled)
    done.entries_added += fold(folder, cache)
    if found is None:
        return None
    done.entries_added += _take_from_index(seen, found, texts)
    mending = Mending.of(seen, found, cache)
    require_few_leave(seen, found, mending.leaving)
    ready = mended(seen, found, mending, folder.staging)
    with giving_back(MOST):
        published = publish(
            rows=ready.rows,
            deletions=ready.deletions,
            updates=ready.updates,
            index=config.index,
            identity=Identity(found.survey.identity.space, found.survey.indexed_splitter),
            cache=cache,
            run_id=folder.run_id,
            anew=bool(found.duplicate.any() and (ready.rows.rows or ready.deletions.rows)),
        )
    done.published = published.way != "none"
    done.written, done.added = ready.rows.rows, ready.added
    done.deleted = ready.deletions.rows + ready.repeated
    released = found.indexed.column("text_hash").filter(pa.array(found.quarantined))
    released = released.filter(pa.array(cache.holds(released))).unique()
    Quarantine(config.state.uri, cache.space.id).release(released.to_pylist())
    done.released = len(released)
    return published


def _take_from_index(seen: Look, found: Differences, dropped: pa.Array) -> int:
    """Put into the cache what it lacks, the mending needs, and the index has a good vector of."""
    rows, cache = seen.rows, seen.entries.cache
    if rows is None:
        return 0
    bad = KeySet(found.indexed.column("key").filter(pa.array(bad_rows(seen, found))))
    wanted = [
        dropped,
        found.changes.column("text_hash").combine_chunks(),
        rows.hashes.filter(pa.array(bad.holds(found.indexed.column("key")))),
        found.corpus.column("text_hash")
        .filter(pa.array(bad.holds(found.corpus.column("key"))))
        .combine_chunks(),
    ]
    lacking = KeySet(pa.concat_arrays(wanted)).holds(rows.hashes) & ~cache.holds(rows.hashes)
    at = np.flatnonzero(lacking & rows.good & ~found.refused.holds(rows.hashes))
    at = at[first_of_each(rows.hashes.take(pa.array(at)))]
    names = vectors_schema(cache.space.vector_type).names
    return sum(
        cache.remember([rows.take(at[start : start + TAKEN_ROWS], names)])
        for start in range(0, len(at), TAKEN_ROWS)
    )


def _record(
    config: Config, folder: RunFolder, about: About, clock: Clock, done: _Done, *, error: str = ""
) -> None:
    """Enter the repair in the ledger, with what it paid for where it was asked to."""
    table = open_index(config.index)
    known = generations(table) if table is not None and not error else []
    report = ended_report(
        about, folder.calls(), "failed" if error else "completed", error, clock.total()
    ).model_copy(
        update={
            "generation": known[-1].number if known else 0,
            "published": REPAIR if done.published and not error else "none",
            "chunks": Chunks(
                total=0 if table is None else table.count_rows(),
                unchanged=0,
                added=done.added,
                changed=done.written - done.added,
                moved=0,
                deleted=done.deleted,
                duplicate=0,
            ),
        }
    )
    enter(report, folder)
