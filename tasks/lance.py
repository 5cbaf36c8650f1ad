"""What we need of LanceDB beside its own calls."""

from collections.abc import Iterator, Sequence

import pyarrow as pa
from lancedb.table import Table

PRIMARY_KEY = {b"lance-schema:unenforced-primary-key": b"true"}
"""Field metadata that makes concurrent upserts of one key meet.

Without it five processes upserting the same 100 keys left 500 rows and no error.
"""


def read_batches(
    table: Table, batch_rows: int, columns: Sequence[str] | None = None
) -> Iterator[pa.RecordBatch]:
    """All rows of `table`, a batch at a time."""
    query = table.search()
    if columns is not None:
        query = query.select(list(columns))
    yield from query.to_batches(batch_rows)


def quoted(text: str) -> str:
    """`text` as a literal of a LanceDB predicate; double quotes would name a column."""
    return "'" + text.replace("'", "''") + "'"
