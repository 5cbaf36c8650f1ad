"""Pack: the missing texts are cut into batches that one call takes."""

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pyarrow as pa

from tasks.limits import Limits, Packer, Sizes
from tasks.schemas import BATCH, MISSES, PACKED, TableRef
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


def cut(texts: pa.Table, sizes: Sizes) -> list[pa.Table]:
    """Texts cut into what one call takes, as far as that can be told before.

    Args:
        texts: Columns `text_hash` and `text` of BATCH, each text once.
        sizes: What is known of the sizes of texts and of calls.

    Returns:
        BATCH tables, in the order of the texts.
    """
    counts = sizes.counts(texts.column("text").to_pylist())
    packer = Packer(sizes.request_limits())
    numbers = np.array([packer.place(int(tokens)) for tokens in counts], dtype=np.int64)
    rows = texts.append_column("tokens", pa.array(counts, pa.int32())).cast(BATCH)
    starts = np.flatnonzero(np.diff(numbers, prepend=0))
    ends = [*starts[1:], len(numbers)]
    return [rows.slice(start, end - start) for start, end in zip(starts, ends, strict=True)]
