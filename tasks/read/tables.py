"""Tables as a corpus: one row is one chunk.

Parquet, CSV, JSON lines, Arrow, a LanceDB table, or a folder of files of one kind. The rows
stream through in batches; of the whole corpus only one number for each document is held.
"""

import hashlib
import os
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from tasks.errors import CorpusError, SettingsError
from tasks.keys import has_bytes
from tasks.params import TableSource
from tasks.prepare import PLAIN, Preparation
from tasks.read import ReadNotes, Wanted
from tasks.read.arrow_files import ArrowPart
from tasks.read.columns import Layout, layout_of
from tasks.read.formats import (
    CsvPart,
    LancePart,
    ParquetPart,
    Part,
    Place,
    reading,
)
from tasks.read.json_lines import JsonPart
from tasks.storage import is_local

KINDS: dict[str, type[Part]] = {
    ".parquet": ParquetPart,
    ".csv": CsvPart,
    ".jsonl": JsonPart,
    ".ndjson": JsonPart,
    ".arrow": ArrowPart,
    ".feather": ArrowPart,
    ".ipc": ArrowPart,
    ".lance": LancePart,
}
"""How each kind of file is read, by its extension."""

EXAMPLES = 5
"""Rows without an id that a message names."""


class TableReader:
    """The rows of a table, or of a folder of files of one kind, as chunks.

    Rows keep the order they have; rows of one document that stand apart stay apart.

    Attributes:
        source: Where the table is, and which columns are what.
        skip_paths: Our own files and folders, paths or addresses; never read.
        preparation: What stands in front of the texts: the document, or metadata columns.
    """

    splitter = ""

    def __init__(
        self,
        source: TableSource,
        skip_paths: Iterable[str | Path] = (),
        preparation: Preparation = PLAIN,
    ) -> None:
        self.source = source
        self.skip_paths = tuple(skip_paths)
        self.preparation = preparation

    @property
    def metadata(self) -> "list[pa.Field[Any]]":
        """The source's own columns, as they stand in the index; none of an empty folder.

        Raises:
            SettingsError: The path or a column is missing, or a column takes a name of ours.
            CorpusError: A file cannot be read, or has other columns than the first one.
        """
        return list(self._layout.metadata) if self._parts else []

    def chunks(self, notes: ReadNotes, wanted: Wanted | None = None) -> Iterator[pa.RecordBatch]:
        """The rows of all documents, or of those that are `wanted`, in the order they have.

        Yields:
            Batches of at most 8192 rows: CHUNKS followed by the metadata columns.

        Raises:
            SettingsError: The path or a column is missing, or a column takes a name of ours.
            CorpusError: A row has no id, or a file cannot be read to its end.
        """
        if not self._parts:
            return
        sift = _Sift(self._layout, notes, wanted)
        for part in self._parts:
            row = 1
            if self.source.document is None:
                notes.documents += 1
            for batch in part.batches(self._layout.read):
                chunks = sift.chunks(batch, part.path, row)
                row += batch.num_rows
                if chunks is not None and chunks.num_rows:
                    yield chunks
        sift.refuse_rows_without_id()

    @cached_property
    def _parts(self) -> list[Part]:
        return _parts(self.source, self.skip_paths)

    @cached_property
    def _layout(self) -> Layout:
        return layout_of(self._parts, self.source, self.preparation)


@dataclass
class _Sift:
    """What is kept between the batches of one reading."""

    layout: Layout
    notes: ReadNotes
    wanted: Wanted | None
    documents: set[bytes] = field(default_factory=set)
    without_id: list[str] = field(default_factory=list)
    count_without_id: int = 0

    def chunks(self, batch: pa.RecordBatch, path: Place, row: int) -> pa.RecordBatch | None:
        """The chunks of `batch`, whose first row is number `row` of the file at `path`.

        None once a row without id was met: then the rest is only counted.
        """
        rows = self._cast(batch, path)
        self._check_ids(rows.column(self.layout.source.id), path, row)
        if self.count_without_id:
            return None
        name = self.layout.source.document
        if name is not None:
            rows = self._drop(
                rows, _not_unicode(rows.column(name)), "document is not valid Unicode"
            )
        return self.layout.chunks(self._drop_unfit(self._keep_wanted(rows)))

    def refuse_rows_without_id(self) -> None:
        """Raise a CorpusError if a row had no id."""
        if self.count_without_id:
            more = ", ..." if self.count_without_id > len(self.without_id) else ""
            one = self.count_without_id == 1
            what = "1 row has" if one else f"{self.count_without_id} rows have"
            them = "this row" if one else "these rows"
            raise CorpusError(
                f"{what} no id (null or empty) in the column {self.layout.source.id!r}: "
                f"{', '.join(self.without_id)}{more}. Give each row an id of its own, or remove "
                f"{them}.",
                rows=self.count_without_id,
            )

    def _cast(self, batch: pa.RecordBatch, path: Place) -> pa.RecordBatch:
        """The columns of the layout, in its types; an empty document is none."""
        arrays = []
        for wish in self.layout.read:
            with reading(path, f"The fault is in the column {wish.name!r}."):
                arrays.append(_cast(batch.column(wish.name), wish.type))
        rows = pa.RecordBatch.from_arrays(arrays, schema=self.layout.read)
        name = self.layout.source.document
        if name is None or name == self.layout.source.id:
            return rows
        documents: Any = rows.column(name)
        none: Any = pa.scalar(None, pa.utf8())
        named = pc.if_else(pa.array(_empty(documents)), none, documents)
        return rows.set_column(rows.schema.get_field_index(name), name, named)

    def _check_ids(self, ids: "pa.Array[Any]", path: Place, row: int) -> None:
        missing = np.flatnonzero(_empty(ids))
        self.count_without_id += len(missing)
        room = EXAMPLES - len(self.without_id)
        self.without_id += [f"{path} row {row + int(found)}" for found in missing[:room]]
        bad = _not_unicode(ids)
        if bad:
            raise CorpusError(
                f"{path} row {row + bad[0]}: the id in the column {self.layout.source.id!r} is not "
                "valid Unicode. Mend it, or remove the row.",
                row=row + bad[0],
            )

    def _keep_wanted(self, rows: pa.RecordBatch) -> pa.RecordBatch:
        """The rows of the wanted documents, which are counted."""
        name = self.layout.source.document
        if name is None:
            return rows if self.wanted is None or self.wanted(None) else rows.slice(0, 0)
        coded: Any = rows.column(name).dictionary_encode()
        names = coded.dictionary.to_pylist()
        if self.wanted is not None:
            flags = [self.wanted(document) for document in names]
            names = [document for document, flag in zip(names, flags, strict=True) if flag]
            flags.append(coded.null_count > 0 and self.wanted(None))
            places = coded.indices.fill_null(len(flags) - 1).to_numpy(zero_copy_only=False)
            rows = rows.filter(pa.array(np.array(flags, dtype=bool)[places]))
        before = len(self.documents)
        self.documents.update(
            hashlib.blake2b(document.encode(), digest_size=8).digest() for document in names
        )
        self.notes.documents += len(self.documents) - before
        return rows

    def _drop_unfit(self, rows: pa.RecordBatch) -> pa.RecordBatch:
        """The rows an index can hold: with a text, all of it Unicode."""
        text = self.layout.source.text
        bad = _not_unicode(rows.column(text))
        rows = self._drop(rows, bad, "text is not valid Unicode")
        for own in self.layout.metadata:
            bad = _not_unicode(rows.column(own.name))
            rows = self._drop(rows, bad, "metadata is not valid Unicode")
        texts: Any = rows.column(text)
        spaces: Any = pc.utf8_is_space(texts)
        blank = _empty(texts) | spaces.fill_null(False).to_numpy(zero_copy_only=False)
        found = np.flatnonzero(blank)
        return self._drop(rows, [int(row) for row in found], "blank text", self.notes.skip)

    def _drop(
        self,
        rows: pa.RecordBatch,
        unfit: list[int],
        reason: str,
        note: Callable[[str, str], None] | None = None,
    ) -> pa.RecordBatch:
        """`rows` without those that are `unfit`, each with a `note`: by default, as failed."""
        if not unfit:
            return rows
        for key in rows.column(self.layout.source.id).take(pa.array(unfit)).to_pylist():
            (note or self.notes.fail_row)(reason, str(key))
        kept = np.ones(rows.num_rows, dtype=bool)
        kept[unfit] = False
        return rows.filter(pa.array(kept))


def _empty(texts: Any) -> "np.ndarray[Any, np.dtype[np.bool_]]":
    """Which of `texts` are empty or null."""
    lengths: Any = pc.binary_length(texts)
    empty: np.ndarray[Any, np.dtype[np.bool_]] = (
        lengths.fill_null(0).to_numpy(zero_copy_only=False) == 0
    )
    return empty


def _cast(array: "pa.Array[Any]", type_: pa.DataType) -> "pa.Array[Any]":
    if isinstance(array, pa.ExtensionArray):
        array = array.storage
    return array if array.type == type_ else array.cast(type_)


def _not_unicode(array: "pa.Array[Any]") -> list[int]:
    """The rows of `array` that hold invalid UTF-8 anywhere."""
    try:
        array.validate(full=True)
    except pa.ArrowInvalid as error:
        if "UTF8" not in str(error):
            return []  # a value out of range, which is another's affair
        if len(array) == 1:
            return [0]
    else:
        return []
    # A slice of a nested array still holds the texts of its neighbours; `take` copies.
    rows = (array.take(pa.array([row])) for row in range(len(array)))
    return [row for row, one in enumerate(rows) if _not_unicode(one)]


def _parts(source: TableSource, skip_paths: Iterable[str | Path]) -> list[Part]:
    """The files of the corpus, in order; none of a folder that is empty."""
    files: Iterable[Place]
    if is_local(source.path):
        own = (Path(skipped) for skipped in skip_paths if is_local(str(skipped)))
        files = _files_at(Path(source.path), frozenset(path.resolve() for path in own))
    else:
        from tasks.read.bucket import files_at  # noqa: PLC0415 - only who uses it loads it

        files = files_at(source.path, skip_paths)
    parts: list[Part] = []
    for file in files:
        kind = _kind(file)
        if parts and not isinstance(parts[0], kind):
            raise SettingsError(
                f"source.path must hold files of one kind: {parts[0].path} and {file} are of two. "
                "Name one file, or a folder of one kind.",
                path=source.path,
            )
        parts.append(kind(file, source))
    return parts


def _files_at(path: Path, skip_paths: frozenset[Path]) -> Iterable[Path]:
    """The files at or below `path`, or the LanceDB table that is there."""
    if not path.exists():
        raise SettingsError(f"There is nothing at source.path: {path.absolute()}.", path=str(path))
    real = path.resolve()
    if not skip_paths.isdisjoint((real, *real.parents)):
        raise SettingsError(
            f"source.path: {path} is where the index or its state is kept; name another one.",
            path=str(path),
        )
    if not path.is_dir() or path.suffix.lower() == ".lance":
        return [path]
    return _files(path, (), skip_paths)


def _files(folder: Path, above: tuple[str, ...], skip_paths: frozenset[Path]) -> Iterator[Path]:
    """The files below `folder`, sorted; links are followed, but never in a circle or to ours."""
    real = os.path.realpath(folder)
    if real in above:
        return
    with reading(folder, "Make it readable."):
        entries = sorted(folder.iterdir(), key=lambda entry: entry.name)
    for entry in entries:
        if entry.name.startswith((".", "_")) or Path(os.path.realpath(entry)) in skip_paths:
            continue
        if not has_bytes(entry.name):
            shown = os.fsencode(entry).decode(errors="replace")
            raise SettingsError(
                f"{shown}: this name is not UTF-8. Rename it; readers of tables take no other.",
                path=shown,
            )
        if not entry.is_dir():
            yield entry
        elif entry.suffix.lower() == ".lance":
            raise SettingsError(
                f"{entry} is a LanceDB table, which source.path must name itself.", path=str(entry)
            )
        else:
            yield from _files(entry, (*above, real), skip_paths)


def _kind(path: Place) -> type[Part]:
    kind = KINDS.get(path.suffix.lower())
    if kind is None:
        raise SettingsError(f"{path} is of no known kind. {_supported()}", path=str(path))
    return kind


def _supported() -> str:
    return f"Supported are {', '.join(KINDS)}, and folders of files of one kind."
