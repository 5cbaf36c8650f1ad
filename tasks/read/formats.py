"""The files and tables that hold one chunk a row, each read a batch of rows at a time.

A part either brings all its rows or raises: what stands in half a file is never taken
for the whole.
"""

import io
import re
import uuid
from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator, Sequence
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

if TYPE_CHECKING:
    from tasks.read.bucket import Stored

Place: TypeAlias = "Path | Stored"
"""Where a file or table is: on a disk, or in a bucket."""

ROWS = 8192
"""Rows a batch holds at most."""

BLOCK_BYTES = 4 << 20
"""Bytes of a CSV file that are parsed at once, and of a column that are asked of a bucket."""

LINES = ("start_line", "end_line")
"""Integer columns of these names become the index's own."""

LONGEST_HEADER = 1 << 16
"""Characters of a CSV header that are looked at for a message."""

STREAM_END = b"\xff\xff\xff\xff\x00\x00\x00\x00"


@contextmanager
def reading(path: Place, hint: str = "Mend the file, or make it again.") -> Iterator[None]:
    """Turn what a format's library raises into a CorpusError that names the file."""
    try:
        yield
    except (pa.ArrowException, OSError, ValueError, RuntimeError, OverflowError) as error:
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


def _slices(batches: Iterable[pa.RecordBatch]) -> Iterator[pa.RecordBatch]:
    """The rows of `batches`, at most ROWS at a time."""
    for batch in batches:
        for start in range(0, batch.num_rows, ROWS):
            yield batch.slice(start, ROWS)


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
        """All rows; only the pages of the columns asked for are read."""
        with reading(self.path), self._opened() as file:
            yield from file.iter_batches(ROWS, columns=schema.names)

    @contextmanager
    def _opened(self) -> Iterator[parquet.ParquetFile]:
        on_disk = isinstance(self.path, Path)
        with self.path.open("rb", buffering=0) as raw:
            if not raw.seek(0, io.SEEK_END):
                raise CorpusError(f"{self.path} is empty, and so no Parquet file. Make it again.")
            # Else all that a row group holds is asked of a bucket at once.
            with parquet.ParquetFile(
                self.path if on_disk else raw,
                pre_buffer=on_disk,
                buffer_size=0 if on_disk else BLOCK_BYTES,
                page_checksum_verification=True,
            ) as file:
                yield file


class ArrowPart(Part):
    """An Arrow IPC file or stream."""

    def schema(self) -> pa.Schema:
        """The columns that the file states first."""
        with reading(self.path), self._opened() as file:
            return self._open(file, None).schema

    def batches(self, schema: pa.Schema) -> Iterator[pa.RecordBatch]:
        """All rows, on a disk mapped into memory."""
        names = self.schema().names
        with reading(self.path), self._opened() as file:
            # Columns that are left out are not unpacked, but those that are read are copied then.
            some = [names.index(name) for name in schema.names]
            reader = self._open(file, some if len(some) < len(names) else None)
            if isinstance(reader, pa.ipc.RecordBatchFileReader):
                numbers = range(reader.num_record_batches)
                yield from _slices(self._whole(reader.get_batch(number)) for number in numbers)
            else:
                yield from _slices(self._whole(batch) for batch in reader)

    def _opened(self) -> pa.NativeFile:
        if isinstance(self.path, Path):
            return pa.memory_map(str(self.path))
        return pa.PythonFile(self.path.open("rb"), "r")

    def _open(
        self, file: pa.NativeFile, columns: list[int] | None
    ) -> pa.ipc.RecordBatchFileReader | pa.ipc.RecordBatchStreamReader:
        options = pa.ipc.IpcReadOptions(included_fields=columns)
        start = file.read(6)
        if not start:
            raise CorpusError(f"{self.path} is empty, and so no Arrow file. Make it again.")
        if start == b"ARROW1":
            return pa.ipc.open_file(file, options=options)
        if start.startswith(b"FEA1"):
            raise CorpusError(f"{self.path} is Feather version 1. Write it again as version 2.")
        file.seek(max(file.size() - len(STREAM_END), 0))
        if file.read() != STREAM_END:
            raise CorpusError(
                f"{self.path} is no Arrow file, and as an Arrow stream it has no end: it was "
                "written or copied in part. Make it again."
            )
        file.seek(0)
        return pa.ipc.open_stream(file, options=options)

    @staticmethod
    def _whole(batch: pa.RecordBatch) -> pa.RecordBatch:
        """`batch`, whose offsets were checked: nothing else checks those of a mapped file."""
        try:
            batch.validate(full=True)
        except pa.ArrowInvalid as error:
            if "UTF8" not in str(error):
                raise
        return batch


class LancePart(Part):
    """A LanceDB table. An open one stays at the version it was opened at."""

    @cached_property
    def _table(self) -> Any:
        import lancedb  # noqa: PLC0415 - takes a second, and few corpora need it

        hint = "The path must be a table that LanceDB can open, <database>/<table>.lance."
        with reading(self.path, hint):
            return lancedb.connect(str(self.path.parent)).open_table(self.path.stem)

    def schema(self) -> pa.Schema:
        """The columns of the table."""
        schema: pa.Schema = self._table.schema
        return schema

    def batches(self, schema: pa.Schema) -> Iterator[pa.RecordBatch]:
        """All rows, in the order of the table's fragments."""
        with reading(self.path):
            query = self._table.search().select(schema.names)
            yield from _slices(query.to_batches(batch_size=ROWS))


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
            for batch in _slices(reader):
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
