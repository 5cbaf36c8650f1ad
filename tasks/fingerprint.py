"""Fingerprint: each text is hashed once, each chunk gets its key; the texts are let go."""

import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from tasks.errors import CorpusError
from tasks.keys import digest, first_of_each, identified, key_columns
from tasks.limits import Estimator
from tasks.prepare import Preparation
from tasks.read import Reader, ReadNotes
from tasks.schemas import KEYED, TableRef
from tasks.stage import stage

NAMED = 5
"""Repeated ids that a message names."""


@dataclass(frozen=True)
class Keyed:
    """The corpus without its texts.

    Attributes:
        table: KEYED, one row a chunk in corpus order.
        notes: What the reader left out.
        text_bytes: UTF-8 bytes of the texts of all chunks.
        read_s: Seconds spent reading and splitting.
        fingerprint_s: Seconds spent hashing.
    """

    table: TableRef
    notes: ReadNotes = field(repr=False)
    text_bytes: int
    read_s: float
    fingerprint_s: float


@stage("read and fingerprint")
def fingerprint(reader: Reader, estimate: Estimator, target: Path) -> Keyed:
    """First pass over the corpus: keys and sizes only.

    Args:
        reader: The corpus.
        estimate: How many tokens a text has.
        target: File for the KEYED table.

    Raises:
        CorpusError: An id stands twice in the corpus.
    """
    started = time.perf_counter()
    notes = ReadNotes()
    reading = _Timed(reader.chunks(notes))
    rows = identified(reading, reader.metadata, reader.preparation)
    keys = (_keys(batch, reader.preparation, estimate) for batch in rows)
    table = TableRef.write(target, KEYED, keys)
    _refuse_repeated(table, reader)
    total = time.perf_counter() - started
    return Keyed(
        table,
        notes,
        text_bytes=reading.text_bytes,
        read_s=reading.seconds,
        fingerprint_s=total - reading.seconds,
    )


def _keys(rows: pa.RecordBatch, preparation: Preparation, estimate: Estimator) -> pa.RecordBatch:
    """KEYED for `rows`."""
    tokens = estimate.counts(preparation.texts(rows).to_pylist())
    columns = {
        **key_columns(rows),
        "tokens": pa.array(tokens, pa.int32()),
        **{name: rows.column(name) for name in ("text_hash", "start_line", "end_line")},
    }
    return pa.record_batch([columns[name] for name in KEYED.names], schema=KEYED)


def _refuse_repeated(table: TableRef, reader: Reader) -> None:
    """Stop before anything else when an id stands twice; a second read finds its name."""
    keys = table.load(KEYED).column("key")
    first = first_of_each(keys)
    if len(first) == len(keys):
        return
    again = np.setdiff1d(np.arange(len(keys)), first)
    repeated = set(keys.take(pa.array(again)).to_pylist())
    names: list[str] = []
    for batch in identified(reader.chunks(ReadNotes()), reader.metadata, reader.preparation):
        for id_ in batch.column("id").to_pylist():
            if len(names) < NAMED and digest(id_.encode()) in repeated and id_ not in names:
                names.append(id_)
        if len(names) == NAMED:
            break
    raise CorpusError(
        f"{len(repeated):,} ids stand more than once in the corpus: "
        f"{', '.join(map(repr, names))}{', …' if len(repeated) > len(names) else ''}. "
        "Give each chunk an id of its own, or name another column in source.id.",
        ids=names,
    )


class _Timed(Iterator[pa.RecordBatch]):
    """An iterator that knows how long it was waited for, in seconds, and how much text it gave."""

    def __init__(self, batches: Iterator[pa.RecordBatch]) -> None:
        self._batches = batches
        self.seconds = 0.0
        self.text_bytes = 0

    def __next__(self) -> pa.RecordBatch:
        started = time.perf_counter()
        try:
            batch = next(self._batches)
        finally:
            self.seconds += time.perf_counter() - started
        self.text_bytes += pc.sum(pc.binary_length(batch.column("text"))).as_py() or 0
        return batch
