"""Pack: the missing texts are cut into batches that one call takes."""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from tasks.limits import Limits, Packer
from tasks.schemas import MISSES, PACKED, TableRef
from tasks.stage import stage

ROWS = 2**16
"""Texts that are placed at a time."""


@dataclass(frozen=True)
class Packed:
    """The batches to come.

    Attributes:
        table: PACKED.
        batches: How many calls it takes.
        texts: Texts in all.
        tokens: Estimated tokens in all.
    """

    table: TableRef
    batches: int
    texts: int
    tokens: int

    def calls(self) -> list[int]:
        """Tokens of each batch, in their order."""
        table = self.table.load(PACKED)
        batch, tokens = (table.column(name).to_numpy() for name in ("batch", "tokens"))
        sums: list[int] = np.bincount(batch, tokens, self.batches + 1)[1:].astype(int).tolist()
        return sums


@stage("pack")
def pack(misses: TableRef, limits: Limits, target: Path) -> Packed:
    """Say which text goes in which batch.

    Args:
        misses: MISSES, each text once.
        limits: What one call takes, with a margin for estimates.
        target: File for the PACKED table.
    """
    packer = Packer(limits)
    ref = TableRef.write(target, PACKED, _placed(misses.load(MISSES), packer))
    tokens = pc.sum(ref.load(PACKED).column("tokens")).as_py() or 0
    return Packed(ref, batches=packer.batch, texts=ref.rows, tokens=tokens)


def _placed(misses: pa.Table, packer: Packer) -> Iterator[pa.RecordBatch]:
    """PACKED for `misses`; a number of Python's takes 32 bytes, so some of them at a time."""
    for rows in misses.to_batches(max_chunksize=ROWS):
        numbers = [packer.place(tokens) for tokens in rows.column("tokens").to_pylist()]
        columns = [*rows.columns, pa.array(numbers, pa.int32())]
        yield pa.record_batch(columns, schema=PACKED)


def cut(rows: pa.Table, limits: Limits) -> list[pa.Table]:
    """Texts cut into what one call takes, as far as that can be told before.

    Args:
        rows: BATCH, each text once.
        limits: What one call takes, with a margin for estimates.

    Returns:
        BATCH tables, in the order of the texts.
    """
    packer = Packer(limits)
    numbers = [packer.place(tokens) for tokens in rows.column("tokens").to_pylist()]
    starts = np.flatnonzero(np.diff(np.array(numbers, np.int64), prepend=0)).tolist()
    ends = [*starts[1:], len(numbers)]
    return [rows.slice(start, end - start) for start, end in zip(starts, ends, strict=False)]
