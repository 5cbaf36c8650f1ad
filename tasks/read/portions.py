"""Portions: how many rows of a corpus are held at once, whatever their size."""

from collections.abc import Iterable, Iterator

import pyarrow as pa
from pyarrow import parquet

ROWS = 8192
"""Rows a batch holds at most."""

BATCH_BYTES = 16 << 20
"""Bytes a batch holds at most, unless one row alone has more."""

BLOCK_BYTES = 4 << 20
"""Bytes of a CSV file that are parsed at once."""

PAGE_BYTES = 1 << 20
"""Bytes of a column of a Parquet file that are fetched at once."""


def portions(batches: Iterable[pa.RecordBatch]) -> Iterator[pa.RecordBatch]:
    """The rows of `batches`, at most ROWS and about BATCH_BYTES at a time."""
    for batch in batches:
        for start in range(0, batch.num_rows, ROWS):
            yield from halved(batch.slice(start, ROWS))


def halved(batch: pa.RecordBatch) -> list[pa.RecordBatch]:
    """The rows of `batch` in parts of at most BATCH_BYTES, none of them copied."""
    if batch.num_rows < 2 or batch.nbytes <= BATCH_BYTES:  # noqa: PLR2004 - one row has no half
        return [batch]
    half = batch.num_rows // 2
    return [*halved(batch.slice(0, half)), *halved(batch.slice(half))]


def copied(batch: pa.RecordBatch) -> pa.RecordBatch:
    """`batch` in memory of its own, but for columns of views, which Arrow cannot copy."""
    rows, columns = pa.array(range(batch.num_rows), pa.int64()), []
    for column in batch.columns:
        try:
            columns.append(column.take(rows))
        except pa.ArrowNotImplementedError:
            columns.append(column)
    return pa.RecordBatch.from_arrays(columns, schema=batch.schema)


def rows_at_once(footer: parquet.FileMetaData, names: set[str]) -> int:
    """Rows that make a batch of about BATCH_BYTES, ROWS at most, by what the footer says."""
    most = 0.0
    for number in range(footer.num_row_groups):
        group = footer.row_group(number)
        columns = map(group.column, range(group.num_columns))
        size = sum(
            column.total_uncompressed_size
            for column in columns
            if column.path_in_schema.partition(".")[0] in names
        )
        most = max(most, size / max(group.num_rows, 1))
    return max(1, min(ROWS, int(BATCH_BYTES / max(most, 1))))
