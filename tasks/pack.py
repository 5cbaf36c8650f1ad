"""Pack: the missing texts are cut into batches that one call takes."""

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pyarrow as pa

from tasks.limits import Limits, Packer
from tasks.schemas import MISSES, PACKED, TableRef
from tasks.stage import stage


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
    table = misses.load(MISSES)
    packer = Packer(limits)
    tokens = table.column("tokens").to_pylist()
    numbers = [packer.place(count) for count in tokens]
    packed = table.append_column("batch", pa.array(numbers, pa.int32())).cast(PACKED)
    ref = TableRef.write(target, PACKED, [packed])
    return Packed(ref, batches=packer.batch, texts=len(tokens), tokens=sum(tokens))


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
