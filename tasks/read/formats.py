"""The files and tables that hold one chunk a row, each read a batch of rows at a time.

A part either brings all its rows or raises: what stands in half a file is never taken
for the whole.
"""

import io
import re
import uuid
from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any, ClassVar, TypeAlias, cast

import pyarrow as pa
import pyarrow.compute as pc
from pyarrow import csv as pa_csv
from pyarrow import parquet

from tasks.errors import CorpusError
from tasks.params import TableSource
from tasks.read.portions import (
    BLOCK_BYTES,
    PAGE_BYTES,
    ROWS,
    portions,
    rows_at_once,
)

if TYPE_CHECKING:
    from tasks.read.bucket import Stored

Place: TypeAlias = "Path | Stored"
"""Where a file or table is: on a disk, or in a bucket."""

LINES = ("start_line", "end_line")
"""Integer columns of these names become the index's own."""

LONGEST_HEADER = 1 << 16
"""Characters of a CSV header that are looked at for a message."""

_FAULTS = (pa.ArrowException, OSError, LookupError, ValueError, RuntimeError, ArithmeticError)


@contextmanager
def reading(path: Place, hint: str = "Mend the file, or make it again.") -> Iterator[None]:
    """Turn what a format's library raises into a CorpusError; refuse a pipe, which has no end."""
    if isinstance(path, Path) and path.exists() and not (path.is_file() or path.is_dir()):
        raise CorpusError(
            f"{path} is neither a file nor a folder, but a pipe or a device. A corpus is read more "
            "than once: write what comes from it to a file.",
            path=str(path),
        )
    try:
        yield
    except _FAULTS as error:
        raise CorpusError(
            f"{path} cannot be read in full: {short(error)}. {hint} "
            "Nothing is taken from a corpus that is read in part.",
            path=str(path),
        ) from error


def short(error: BaseException) -> str:
    """The first line of the message of `error`, without the row it may quote."""
    if isinstance(error, UnicodeDecodeError):
        return "a column name is not UTF-8"
    if isinstance(error, OSError) and error.strerror:
        return error.strerror
    line = (str(error).strip().splitlines() or [type(error).__name__])[0]
    return re.sub(r"(got \d+): .*", r"\1", line)[:200].rstrip(". ")


def merged(one: pa.DataType, other: pa.DataType) -> pa.DataType | None:
    """The type that holds the values of both, or None."""
    schemas = [pa.schema([pa.field("", one)]), pa.schema([pa.field("", other)])]
    try:
        both: pa.DataType = pa.unify_schemas(schemas, promote_options="permissive").field(0).type
    except pa.ArrowException:
        return None
    return both


def text_array(values: Sequence[Any]) -> "pa.Array[Any]":
    """`values` as utf8, lone surrogates kept as the invalid bytes a reader can find.

    Raises:
        TypeError: A value is neither text nor None.
    """
    raw = [
        None if value is None else str.encode(value, "utf-8", "surrogatepass") for value in values
    ]
    encoded = pa.array(raw, pa.binary())
    return pa.Array.from_buffers(pa.utf8(), len(encoded), encoded.buffers())


def refuse_utf16(path: Place) -> None:
    """Raise a CorpusError if the file at `path` is UTF-16 by its first bytes."""
    with reading(path), path.open("rb") as file:
        start = file.read(2)
    if start in {b"\xff\xfe", b"\xfe\xff"} or (len(start) > 1 and 0 in start):
        raise CorpusError(
            f"{path} is written in UTF-16, but only UTF-8 is read. Save it as UTF-8.",
            path=str(path),
        )


def other_separator(header: str) -> str:
    """A hint, where a header that is one column to us looks like several."""
    if "," not in header:
        for mark, name in ((";", "';'"), ("\t", "tabs")):
            if mark in header:
                return f" Is it separated by {name}? embed-once reads commas."
    return ""


@dataclass(frozen=True)
class Part(ABC):
    """One file or table of the corpus.

    Attributes:
        path: Where it is.
        source: Which columns are asked for.
        sparse: Whether a row need not name every column.
    """

    path: Place
    source: TableSource
    sparse: ClassVar[bool] = False

    @abstractmethod
    def schema(self) -> pa.Schema:
        """The columns, without reading all rows.

        Raises:
            CorpusError: The file cannot be read.
        """

    @abstractmethod
    def batches(self, schema: pa.Schema) -> Iterator[pa.RecordBatch]:
        """All rows, in order, with at least the columns of `schema`.

        Where the format states types they stand as they are; else they are those of `schema`.

        Raises:
            CorpusError: The file cannot be read to its end.
        """


class ParquetPart(Part):
    """A Parquet file."""

    def schema(self) -> pa.Schema:
        """The columns that the footer states."""
        with reading(self.path), self._opened() as file:
            return file.schema_arrow

    def batches(self, schema: pa.Schema) -> Iterator[pa.RecordBatch]:
        """All rows; of the columns asked for, a few pages at a time, not a whole row group."""
        with reading(self.path), self._opened() as file:
            rows = rows_at_once(file.metadata, set(schema.names))
            yield from portions(file.iter_batches(rows, columns=schema.names, use_threads=False))

    @contextmanager
    def _opened(self) -> Iterator[parquet.ParquetFile]:
        on_disk = isinstance(self.path, Path)
        with self.path.open("rb", buffering=0) as raw:
            if not raw.seek(0, io.SEEK_END):
                raise CorpusError(f"{self.path} is empty, and so no Parquet file. Make it again.")
            # Else all of a column of a row group is held, or asked of a bucket, at once; and what
            # was handed out is kept to the end of the file (pyarrow 26).
            with parquet.ParquetFile(
                self.path if on_disk else raw,
                pre_buffer=False,
                buffer_size=PAGE_BYTES if on_disk else BLOCK_BYTES,
                page_checksum_verification=True,
            ) as file:
                yield file


class LancePart(Part):
    """A LanceDB table. An open one stays at the version it was opened at."""

    @cached_property
    def _table(self) -> Any:
        from tasks.lance import connect  # noqa: PLC0415 - takes a second, and few corpora need it

        hint = "The path must be a table that LanceDB can open, <database>/<table>.lance."
        with reading(self.path, hint):
            return connect(str(self.path.parent)).open_table(self.path.stem)

    def schema(self) -> pa.Schema:
        """The columns of the table."""
        schema: pa.Schema = self._table.schema
        return schema

    def batches(self, schema: pa.Schema) -> Iterator[pa.RecordBatch]:
        """All rows, in the order of the table's fragments."""
        with reading(self.path):
            query = self._table.search().select(schema.names)
            yield from portions(query.to_batches(batch_size=ROWS))


class CsvPart(Part):
    """A CSV file with a header. Its cells are text; only lines of a document are integers."""

    def schema(self) -> pa.Schema:
        """The columns of the header."""
        refuse_utf16(self.path)
        with (
            self._reading(),
            _Ended(self.path, b"\n") as file,
            pa_csv.open_csv(cast("IO[bytes]", file), **self._options([])) as reader,
        ):
            schema = reader.schema
        with reading(self.path, "Save the file as UTF-8."):
            names = schema.names
        lines = set(LINES) - {self.source.id, self.source.text, self.source.document}
        types = [pa.int32() if name in lines else pa.utf8() for name in names]
        return pa.schema(list(zip(names, types, strict=True)))

    def batches(self, schema: pa.Schema) -> Iterator[pa.RecordBatch]:
        """All rows; an empty cell is an empty text, but no line."""
        mark = uuid.uuid4().hex
        # No cell of it is quoted: a quote would close the one that was left open.
        row = ",".join(mark * (name == self.source.id) for name in self.schema().names)
        held: pa.RecordBatch | None = None
        with (
            self._reading(),
            _Ended(self.path, f"\n{row}\n".encode()) as file,
            pa_csv.open_csv(cast("IO[bytes]", file), **self._options(schema.names)) as reader,
        ):
            for batch in portions(reader):
                if held is not None:
                    yield self._parsed(held, schema)
                held = batch
        if held is None or held.column(self.source.id)[-1].as_py() != mark:
            raise CorpusError(
                f"{self.path} ends within a quoted cell: it was written or copied in part, or a "
                "quote is missing. Mend the file, or make it again."
            )
        yield self._parsed(held.slice(0, held.num_rows - 1), schema)

    def _parsed(self, rows: pa.RecordBatch, schema: pa.Schema) -> pa.RecordBatch:
        """`rows` with the columns that are integers in `schema` as such."""
        for place, wish in enumerate(schema):
            if not pa.types.is_integer(wish.type):
                continue
            try:
                cells: Any = pc.utf8_trim_whitespace(rows.column(wish.name))
                none: Any = pa.scalar(None, pa.utf8())
                numbers = pc.if_else(pc.equal(cells, ""), none, cells).cast(wish.type)
            except pa.ArrowInvalid as error:
                raise CorpusError(
                    f"{self.path}: the column {wish.name!r} must hold integers, the lines of a "
                    f"document: {short(error)}. Mend it, or rename it.",
                    path=str(self.path),
                    column=wish.name,
                ) from None
            rows = rows.set_column(place, wish, numbers)
        return rows

    @contextmanager
    def _reading(self) -> Iterator[None]:
        with reading(self.path):
            try:
                yield
            except pa.ArrowInvalid as error:
                message = str(error)
                if "Empty CSV file" in message:
                    raise CorpusError(
                        f"{self.path} is empty: not even a header with the names of its columns "
                        "stands in it. Make it again.",
                        path=str(self.path),
                    ) from None
                if "columns, got" not in message:
                    raise
                with self.path.open("rb") as file:
                    hint = other_separator(file.readline(LONGEST_HEADER).decode(errors="replace"))
                raise CorpusError(
                    f"{self.path}: a row has more or fewer cells than the header "
                    f"({short(error).removeprefix('CSV parse error: ')}). A cell that holds a "
                    f"comma must stand in quotes. Mend the file.{hint}",
                    path=str(self.path),
                ) from None

    @staticmethod
    def _options(names: list[str]) -> dict[str, Any]:
        return {
            "read_options": pa_csv.ReadOptions(block_size=BLOCK_BYTES),
            "parse_options": pa_csv.ParseOptions(newlines_in_values=True),
            "convert_options": pa_csv.ConvertOptions(
                column_types=dict.fromkeys(names, pa.utf8()),
                include_columns=names,
                check_utf8=False,
            ),
        }


class _Ended(io.RawIOBase):
    """A file followed by `end`.

    A quote that is never closed swallows the rest of a CSV file without an error. Followed by
    one row of ours, it swallows that row too, and that is seen.
    """

    def __init__(self, path: Place, end: bytes) -> None:
        self._file = cast("io.BufferedReader", path.open("rb"))
        self._end = end

    def readable(self) -> bool:
        """It is."""
        return True

    def readinto(self, buffer: Any) -> int:
        """Fill `buffer` from the file, then from the end: a short answer is a block to Arrow."""
        view = memoryview(buffer)
        count = 0
        while count < len(view) and (some := self._file.readinto(view[count:])):
            count += some
        rest = min(len(view) - count, len(self._end))
        view[count : count + rest], self._end = self._end[:rest], self._end[rest:]
        return count + rest

    def close(self) -> None:
        """Close the file."""
        self._file.close()
        super().close()
