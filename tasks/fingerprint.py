"""Fingerprint: each text is hashed once, each chunk gets its key; the texts are let go."""

import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from itertools import chain
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from tasks.aside import one_ahead
from tasks.errors import CorpusError
from tasks.keys import digest, first_of_each, identified, key_columns
from tasks.limits import Estimator
from tasks.prepare import Preparation
from tasks.read import Reader, ReadNotes
from tasks.schemas import KEYED, TableRef, found_schema, stamped_schema
from tasks.stage import stage
from tasks.stamps import MADE_BY, FirstPass

NAMED = 5
"""Repeated ids that a message names."""


@dataclass(frozen=True)
class Keyed:
    """The corpus without its texts.

    Attributes:
        table: KEYED, one row a chunk in corpus order.
        notes: What the reader left out.
        chunks_read: How many of them were read, and not known from the last run.
        text_bytes: UTF-8 bytes of the texts of those.
        read_s: Seconds spent reading and splitting, or waiting for it.
        fingerprint_s: Seconds spent hashing.
        stamped: STAMPED, to be kept for the next run; None where nothing is.
        fresh: Whether that is not what was kept before.
    """

    table: TableRef
    notes: ReadNotes = field(repr=False)
    chunks_read: int
    text_bytes: int
    read_s: float
    fingerprint_s: float
    stamped: TableRef | None = None
    fresh: bool = False


@stage("read and fingerprint")
def fingerprint(
    reader: Reader, estimate: Estimator, target: Path, first_pass: FirstPass | None = None
) -> Keyed:
    """First pass over the corpus: keys and sizes only.

    Args:
        reader: The corpus.
        estimate: How many tokens a text has.
        target: File for the KEYED table.
        first_pass: What is known of files already; None: all is read.

    Raises:
        CorpusError: An id stands twice in the corpus.
    """
    started = time.perf_counter()
    notes = first_pass.notes if first_pass else ReadNotes()
    if first_pass:  # which must hear of each document when those before it are through
        reading = _Timed(reader.chunks(notes, first_pass.wanted))
    else:
        reading = _Timed(one_ahead(reader.chunks(notes)))
    rows = identified(reading, reader.metadata, reader.preparation)
    numbers = estimate.sizes(pa.array([], pa.utf8())).shape[1]
    found = (_found(batch, reader.preparation, estimate, numbers) for batch in rows)
    stamped = None
    if first_pass:
        stamped, table = _with_known(first_pass, found, estimate, target, numbers)
    else:
        table = TableRef.write(target, KEYED, (_keyed(batch, estimate) for batch in found))
    _refuse_repeated(table, reader)
    total = time.perf_counter() - started
    return Keyed(
        table,
        notes,
        chunks_read=reading.rows,
        text_bytes=reading.text_bytes,
        read_s=reading.seconds,
        fingerprint_s=total - reading.seconds,
        stamped=stamped,
        fresh=bool(first_pass and first_pass.fresh),
    )


def _with_known(
    first_pass: FirstPass,
    found: Iterator[pa.RecordBatch],
    estimate: Estimator,
    target: Path,
    numbers: int,
) -> tuple[TableRef, TableRef]:
    """STAMPED, to be kept, and KEYED of this corpus."""
    schema = stamped_schema(numbers).with_metadata({MADE_BY: first_pass.made})
    merged = first_pass.merged(found, schema)
    stamped = TableRef.write(target.with_name("stamped.arrow"), schema, merged)
    batches = stamped.load(schema).to_batches()
    chunks = (batch.filter(batch.column("key").is_valid()) for batch in batches)
    table = TableRef.write(target, KEYED, (_keyed(batch, estimate) for batch in chunks))
    if first_pass.narrow:
        whole = chain(batches, first_pass.not_looked_at())
        stamped = TableRef.write(target.with_name("all-stamped.arrow"), schema, whole)
    return stamped, table


def _found(
    rows: pa.RecordBatch, preparation: Preparation, estimate: Estimator, numbers: int
) -> pa.RecordBatch:
    """FOUND for `rows`."""
    sizes = pa.array(estimate.sizes(preparation.texts(rows)).reshape(-1))
    columns = {
        **key_columns(rows),
        "sizes": pa.FixedSizeListArray.from_arrays(sizes, numbers),
        **{name: rows.column(name) for name in ("text_hash", "start_line", "end_line")},
    }
    schema = found_schema(numbers)
    return pa.record_batch([columns[name] for name in schema.names], schema=schema)


def _keyed(found: pa.RecordBatch, estimate: Estimator) -> pa.RecordBatch:
    """KEYED for `found`, FOUND or more."""
    sizes = found.column("sizes")
    numbers = sizes.flatten().to_numpy().reshape(-1, sizes.type.list_size)
    tokens = pa.array(estimate.of_sizes(numbers), pa.int32())
    columns = [tokens if name == "tokens" else found.column(name) for name in KEYED.names]
    return pa.record_batch(columns, schema=KEYED)


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
    """An iterator that knows how long it was waited for, in seconds, and how much it gave."""

    def __init__(self, batches: Iterator[pa.RecordBatch]) -> None:
        self._batches = batches
        self.seconds = 0.0
        self.rows = 0
        self.text_bytes = 0

    def __next__(self) -> pa.RecordBatch:
        started = time.perf_counter()
        try:
            batch = next(self._batches)
        finally:
            self.seconds += time.perf_counter() - started
        self.rows += batch.num_rows
        self.text_bytes += pc.sum(pc.binary_length(batch.column("text"))).as_py() or 0
        return batch
