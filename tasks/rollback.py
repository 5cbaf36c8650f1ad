"""Rollback: an older generation becomes the newest one, in one commit and at no cost."""

from datetime import UTC, datetime
from uuid import uuid4

import numpy as np
import pyarrow as pa
from lancedb.table import Table

from tasks.errors import SettingsError
from tasks.index import (
    SCAN_ROWS,
    Generation,
    adopt,
    committing,
    generations,
    held,
    identity_of,
    published_index,
    reading_index,
    still_held,
    tag_generation,
    writing_index,
)
from tasks.keys import KeySet, digest_column
from tasks.lance import read_batches
from tasks.ledger import Ledger
from tasks.params import Config
from tasks.report import Chunks, RunReport, ledger_row
from tasks.run import Clock, about_run, ended_report
from tasks.schemas import HASH
from tasks.tidy import keep_newest


def rollback(config: Config, number: int | None = None) -> RunReport:
    """Publish an older generation of the index again, as a new one.

    A reindex brings the index forward again, and pays nothing for it.

    Args:
        config: Whose index.
        number: Of the generation; None: the one before the newest.

    Returns:
        What changed for readers; also a row of the ledger.

    Raises:
        SettingsError: There is no such generation, or it is not kept any more.
        IndexHeld: Another run holds the index.
        LockLost: Another run has taken it over.
    """
    published_index(config.index)  # before the lock: it would make the folder
    clock = Clock(datetime.now(tz=UTC))
    run_id = f"rollback-{uuid4()}"
    with held(config.index, run_id):
        adopt(config.index)
        table = published_index(config.index)
        target = _chosen(config, generations(table), number)
        with reading_index(table):
            newest, older = _rows(table, None), _rows(table, target.version)
        with (
            still_held(config.index, run_id),
            writing_index(config.index),
            committing(config.index, table.version),
        ):
            table.checkout(target.version)
            table.restore()
            generation = tag_generation(table)
        keep_newest(table, config.index, run_id)
        ended = ended_report(
            about_run(config, identity_of(table).space, run_id, clock),
            [],
            "completed",
            "",
            clock.total(),
        )
        report = ended.model_copy(
            update={
                "generation": generation.number,
                "published": "rollback",
                "restored": target.number,
                "chunks": _changed(newest, older),
            }
        )
        Ledger(config.state.uri).record_run(ledger_row(report))
    return report


def _chosen(config: Config, kept: list[Generation], number: int | None) -> Generation:
    """The generation to go back to."""
    names = ", ".join(str(each.number) for each in kept) or "none"
    index = f"{config.index.table!r} in {config.index.uri}"
    if number is None:
        if len(kept) < 2:  # noqa: PLR2004 - the newest one and one before
            raise SettingsError(
                f"The index {index} keeps no generation before the newest one (kept: {names})."
            )
        return kept[-2]
    for each in kept:
        if each.number == number:
            if each is kept[-1]:
                raise SettingsError(
                    f"Generation {number} of the index {index} is the newest one already "
                    f"(kept: {names})."
                )
            return each
    raise SettingsError(
        f"Generation {number} of the index {index} is not kept; choose one of {names}. "
        "index.keep_generations says how many are."
    )


def _rows(table: Table, version: int | None) -> tuple[pa.ChunkedArray, pa.ChunkedArray]:
    """Key of the id and text_hash of each row of a version; None: of the newest one."""
    if version is not None:
        table.checkout(version)
    try:
        batches = list(read_batches(table, SCAN_ROWS, ["id", "text_hash"]))
    finally:
        table.checkout_latest()  # type: ignore[no-untyped-call]
    return (
        pa.chunked_array([digest_column(each.column("id")) for each in batches], HASH),
        pa.chunked_array([each.column("text_hash") for each in batches], HASH),
    )


def _changed(
    before: tuple[pa.ChunkedArray, pa.ChunkedArray], after: tuple[pa.ChunkedArray, pa.ChunkedArray]
) -> Chunks:
    """What readers see changed."""
    at = KeySet(before[0]).positions(after[0])
    stays = at >= 0
    theirs = before[1].take(pa.array(at[stays]))
    ours = after[1].filter(pa.array(stays))
    changed = int(np.sum(~np.asarray(pa.compute.equal(ours, theirs))))
    return Chunks(
        total=len(at),
        unchanged=int(stays.sum()) - changed,
        added=int((~stays).sum()),
        changed=changed,
        moved=0,
        deleted=len(before[0]) - int(stays.sum()),
        duplicate=0,
    )
