"""What passes between the stages: Arrow schemas, and tables handed on by reference.

A stage writes its table to a file in the run's staging folder and hands on a `TableRef`.
The next one maps the file into memory, so Prefect neither copies nor hashes rows and a
stage holds only what it touches.
"""

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pyarrow as pa

from tasks.errors import StorageFailed

HASH = pa.binary(16)
"""blake2b-128 digest."""

CHUNKS = pa.schema(
    [
        pa.field("id", pa.utf8()),
        pa.field("document", pa.utf8()),
        pa.field("text", pa.utf8(), nullable=False),
        pa.field("start_line", pa.int32()),
        pa.field("end_line", pa.int32()),
    ]
)
"""What a reader yields; the source's metadata columns follow. Files have no id yet."""

KEYED = pa.schema(
    [
        pa.field("key", HASH, nullable=False),
        pa.field("document_key", HASH, nullable=False),
        pa.field("text_hash", HASH, nullable=False),
        pa.field("row_hash", HASH, nullable=False),
        pa.field("start_line", pa.int32()),
        pa.field("end_line", pa.int32()),
        pa.field("tokens", pa.int32(), nullable=False),
    ]
)
"""One row a chunk of the corpus, fixed width: all that is held of the whole corpus.

`key` hashes the id, `document_key` the document (zeros where there is none), `text_hash`
the exact text that is sent, `row_hash` the document and metadata; `tokens` is its estimate.
"""


def found_schema(numbers: int) -> pa.Schema:
    """Schema of FOUND: KEYED with the sizes, so many numbers each, that its tokens follow from."""
    sizes = pa.field("sizes", pa.list_(pa.int32(), numbers), nullable=False)
    return pa.schema([*[field for field in KEYED if field.name != "tokens"], sizes])


def stamped_schema(numbers: int) -> pa.Schema:
    """Schema of STAMPED: FOUND with the stamp of its file; null where that cannot be trusted.

    A file without a chunk has one row, of a `document_key` and why it was `skipped`.
    """
    found = [
        field if field.name == "document_key" else field.with_nullable(True)
        for field in found_schema(numbers)
    ]
    return pa.schema([*found, pa.field("stamp", HASH), pa.field("skipped", pa.utf8())])


INDEXED = pa.schema(
    [
        pa.field("id", pa.utf8(), nullable=False),
        pa.field("document", pa.utf8()),
        *[field for field in KEYED if field.name != "tokens"],
    ]
)
"""One row a chunk of the published index, keyed like the corpus."""

CHANGES = pa.schema(
    [
        pa.field("key", HASH, nullable=False),
        pa.field("document_key", HASH, nullable=False),
        pa.field("text_hash", HASH, nullable=False),
        pa.field("tokens", pa.int32(), nullable=False),
        pa.field("change", pa.utf8(), nullable=False),
        pa.field("in_index", pa.bool_(), nullable=False),
    ]
)
"""One row for each row the index must gain or rewrite: added, changed, moved or relined.

`in_index` tells the rewritten ones, whose id the index has already.
"""

DELETIONS = pa.schema(
    [
        pa.field("id", pa.utf8(), nullable=False),
        pa.field("document_key", HASH, nullable=False),
        pa.field("change", pa.utf8(), nullable=False),
    ]
)
"""The ids that must leave the index: deleted, or changed or moved under another id."""

MISSES = pa.schema(
    [
        pa.field("text_hash", HASH, nullable=False),
        pa.field("tokens", pa.int32(), nullable=False),
    ]
)
"""Each text to pay for, once, in corpus order."""

PACKED = pa.schema([*MISSES, pa.field("batch", pa.int32(), nullable=False)])
"""The same with the number of the batch it is planned for, from 1."""

BATCH = pa.schema(
    [
        pa.field("text_hash", HASH, nullable=False),
        pa.field("text", pa.utf8(), nullable=False),
        pa.field("tokens", pa.int32(), nullable=False),
    ]
)
"""The texts of one batch."""


def vectors_schema(vector: pa.DataType) -> pa.Schema:
    """Schema of remembered vectors: text_hash and vector, of the type that the space has."""
    return pa.schema(
        [
            pa.field("text_hash", HASH, nullable=False),
            pa.field("vector", vector, nullable=False),
        ]
    )


def rows_schema(metadata: Iterable[pa.Field]) -> pa.Schema:
    """Schema of ROWS: what the index gains or rewrites, still without its vector."""
    return pa.schema(
        [
            pa.field("id", pa.utf8(), nullable=False),
            pa.field("document", pa.utf8()),
            pa.field("text", pa.utf8(), nullable=False),
            pa.field("text_hash", HASH, nullable=False),
            pa.field("start_line", pa.int32()),
            pa.field("end_line", pa.int32()),
            *metadata,
        ]
    )


LEFT_OUT = pa.schema(
    [
        pa.field("id", pa.utf8(), nullable=False),
        pa.field("document", pa.utf8()),
        pa.field("text_hash", HASH, nullable=False),
        pa.field("start_line", pa.int32()),
        pa.field("end_line", pa.int32()),
    ]
)
"""Rows that the index lacks because the provider refuses their text."""


OWN_COLUMNS = frozenset(
    {"id", "document", "text", "text_hash", "vector", "start_line", "end_line", "run_id"}
)
"""Columns of the index that metadata may not take the name of."""


def metadata_fields(schema: pa.Schema) -> list[pa.Field]:
    """The fields of `schema` that are the source's own metadata."""
    return [field for field in schema if field.name not in OWN_COLUMNS]


def require(found: pa.Schema, wanted: pa.Schema, where: str) -> None:
    """Check a border between two stages.

    Raises:
        TypeError: `found` has not exactly the fields of `wanted`; a fault of ours, not the user's.
    """
    if not found.equals(wanted):
        raise TypeError(f"{where}: expected {wanted}, found {found}")


@dataclass(frozen=True)
class TableRef:
    """A table in a file of the run's staging folder.

    Attributes:
        path: Arrow IPC file.
        rows: Number of rows.
    """

    path: str
    rows: int

    @classmethod
    def write(
        cls, path: Path, schema: pa.Schema, batches: Iterable[pa.RecordBatch | pa.Table]
    ) -> "TableRef":
        """Write `batches`, each checked against `schema`, to the file at `path`.

        Raises:
            StorageFailed: The disk does not take it.
        """
        rows = 0
        with writing_file(path):
            path.parent.mkdir(parents=True, exist_ok=True)
            writer = pa.ipc.new_file(str(path), schema)
        try:
            for batch in batches:
                require(batch.schema, schema, path.name)
                with writing_file(path):
                    writer.write(batch)
                rows += batch.num_rows
        finally:
            with writing_file(path):
                writer.close()
        return cls(str(path), rows)

    @classmethod
    def of(cls, path: Path) -> "TableRef":
        """The table in the file at `path`."""
        with pa.memory_map(str(path)) as source:
            reader = pa.ipc.open_file(source)
            counts = [reader.get_batch(i).num_rows for i in range(reader.num_record_batches)]
            return cls(str(path), sum(counts))

    def schema(self) -> pa.Schema:
        """Schema of the file."""
        with pa.memory_map(self.path) as source:
            return pa.ipc.open_file(source).schema

    def load(self, schema: pa.Schema) -> pa.Table:
        """The table, mapped into memory and checked against `schema`."""
        table = pa.ipc.open_file(pa.memory_map(self.path)).read_all()
        require(table.schema, schema, self.path)
        return table

    def batches(self, schema: pa.Schema) -> Iterator[pa.RecordBatch]:
        """The table's batches, one at a time, each a copy in memory.

        Not mapped: pages of a mapped file count as memory of the process for as long as nobody
        else wants it. In the file values lie at multiples of 8 bytes; LanceDB wants decimals at
        16, and `create_table` leaves the table empty without an error where they are not.
        """
        with pa.OSFile(self.path) as source:
            reader = pa.ipc.open_file(source)
            require(reader.schema, schema, self.path)
            for number in range(reader.num_record_batches):
                batch = reader.get_batch(number)
                yield batch.take(pa.array(range(batch.num_rows), pa.int64()))


@contextmanager
def writing_file(path: Path) -> Iterator[None]:
    """Say in words that the disk does not take the file at `path`.

    Raises:
        StorageFailed: It does not.
    """
    try:
        yield
    except OSError as error:
        raise StorageFailed(
            f"{path} cannot be written: {error.strerror or error}. See that the disk of "
            f"{path.parent} is there and has room, then run again."
        ) from error


@dataclass(frozen=True)
class Batch:
    """Texts for one call.

    Attributes:
        number: From 1.
        table: BATCH.
        tokens: Estimated tokens in all.
    """

    number: int
    table: TableRef
    tokens: int

    @classmethod
    def write(cls, number: int, folder: Path, rows: Iterable[pa.RecordBatch]) -> "Batch":
        """The batch of these BATCH `rows`, in a file of `folder`."""
        parts = list(rows)
        table = TableRef.write(folder / f"batch-{number:08d}.arrow", BATCH, parts)
        tokens = sum(int(np.sum(part.column("tokens").to_numpy())) for part in parts)
        return cls(number, table, tokens)
