"""JSON lines: one object a line, whose columns and types show only as it is read."""

import json
from collections.abc import Iterator, Sequence
from typing import Any

import pyarrow as pa

from tasks.errors import CorpusError
from tasks.read.formats import Part, merged, reading, refuse_utf16, short, text_array
from tasks.read.portions import BATCH_BYTES, ROWS

SAMPLE_ROWS = 16_384
"""Rows that the columns and their types are taken from."""

LINE_BYTES = 256 << 20
"""Longest line."""

_Row = tuple[int, dict[str, Any]]
"""Number of its line, and the object."""


class JsonPart(Part):
    """JSON lines: one object a line. A key that a row lacks is null.

    Read in Python, because only so one bad line does not spoil the file: Arrow's reader takes a
    lone surrogate, or a text that looks like a date, for the whole column's fault or type.
    """

    sparse = True

    def schema(self) -> pa.Schema:
        """The keys of the first rows, and of as many more as it takes to meet those asked for."""
        wanted = {self.source.id, self.source.text, *(self.source.metadata or ())}
        if self.source.document is not None:
            wanted.add(self.source.document)
        types: dict[str, pa.DataType] = {}
        count = 0
        for some in self._blocks():
            count += len(some)
            for name in dict.fromkeys(key for _, row in some for key in row):
                types[name] = self._column(some, name, types.get(name, pa.null()), widen=True).type
            if count >= SAMPLE_ROWS and not wanted - types.keys():
                break
        with reading(self.path):
            return pa.schema(list(types.items()))

    def batches(self, schema: pa.Schema) -> Iterator[pa.RecordBatch]:
        """All rows, each value of the type in `schema`."""
        for some in self._blocks():
            if self.source.metadata is None:
                self._refuse_new_keys(some, set(schema.names))
            columns = [self._column(some, field.name, field.type) for field in schema]
            yield pa.record_batch(columns, names=schema.names)

    def _blocks(self) -> Iterator[list[_Row]]:
        """The objects with the numbers of their lines, as many as make a batch at a time."""
        block: list[_Row] = []
        size = 0
        for number, row, length in self._rows():
            block.append((number, row))
            size += length
            if len(block) == ROWS or size >= BATCH_BYTES:
                yield block
                block, size = [], 0
        if block:
            yield block

    def _rows(self) -> Iterator[tuple[int, dict[str, Any], int]]:
        """The objects, each with the number and the bytes of its line."""
        refuse_utf16(self.path)
        with reading(self.path), self.path.open("rb") as file:
            for number, line in enumerate(iter(lambda: file.readline(LINE_BYTES), b""), 1):
                # Invalid bytes become lone surrogates, which are found with the others.
                text = line.decode("utf-8-sig" if number == 1 else "utf-8", "surrogateescape")
                if text.isspace():
                    continue
                if len(line) == LINE_BYTES:
                    raise self._bad(number, f"it is longer than {LINE_BYTES >> 20} MiB")
                try:
                    row = json.loads(text)
                except (ValueError, RecursionError) as error:
                    raise self._bad(number, f"this is not JSON: {short(error)}") from None
                if not isinstance(row, dict):
                    raise self._bad(number, f"this is no object, but {_kind(row)}")
                yield number, row, len(line)

    def _column(
        self,
        rows: Sequence[_Row],
        name: str,
        type_: pa.DataType,
        *,
        widen: bool = False,
    ) -> "pa.Array[Any]":
        """The values under `name` as `type_`, or as what holds them and `type_` if `widen`."""
        values = [row.get(name) for _, row in rows]
        if name in {self.source.id, self.source.document}:
            values = [str(value) if type(value) is int else value for value in values]
        try:
            array = _array(values)
            integers = pa.types.is_integer(array.type) and pa.types.is_integer(type_)
            if array.type == type_ or integers:
                return array
            both = merged(array.type, type_)
            if both is not None and (widen or both == type_):
                return array if both == array.type else pa.array(values, both)
            why = f"are not of one type: they hold {array.type}, but {type_} stands before"
        except OverflowError:
            why = "hold an integer too large to store"
        except UnicodeEncodeError:
            why = "hold a text that is not valid Unicode"
        except (pa.ArrowException, TypeError) as error:
            why = f"are not of one type: {short(error)}"
        lines = f"{rows[0][0]} to {rows[-1][0]}"
        raise CorpusError(
            f"{self.path}, lines {lines}: the values of {name!r} {why}. Mend them, or "
            "list in source.metadata the columns to keep.",
            path=str(self.path),
            column=name,
        )

    def _refuse_new_keys(self, rows: Sequence[_Row], known: set[str]) -> None:
        for number, row in rows:
            if not row.keys() <= known:
                name = min(row.keys() - known)
                raise CorpusError(
                    f"{self.path}, line {number}: the key {name!r} is not among those of the "
                    f"first {SAMPLE_ROWS} rows. List in source.metadata the columns to keep, "
                    "with it or without it.",
                    path=str(self.path),
                    line=number,
                )

    def _bad(self, number: int, why: str) -> CorpusError:
        return CorpusError(
            f"{self.path}, line {number}: {why}. Each line must be one JSON object; mend the "
            "file, or make it again.",
            path=str(self.path),
            line=number,
        )


def _array(values: Sequence[Any]) -> "pa.Array[Any]":
    """`values` as the type Arrow sees in them."""
    array: pa.Array[Any]
    try:
        array = pa.array(values)
    except UnicodeEncodeError:
        if all(value is None or isinstance(value, str) for value in values):
            return text_array(values)
        raise
    except OverflowError:
        if not all(value is None or type(value) is int for value in values):
            raise
        array = pa.array(values, pa.uint64())
    return array


def _kind(value: Any) -> str:
    names = {list: "an array", str: "a text", bool: "true or false", type(None): "null"}
    return names.get(type(value), "a number")
