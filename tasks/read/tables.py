"""Tables as a corpus: one row is one chunk.

Parquet, CSV, JSON lines, Arrow, a LanceDB table, or a folder of files of one kind. The rows
stream through in batches; of the whole corpus only one number for each document is held.
"""

import difflib
import hashlib
import os
from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from tasks.errors import CorpusError, SettingsError
from tasks.params import TableSource
from tasks.read import ReadNotes, Wanted
from tasks.read.formats import KINDS, Part, merged, reading
from tasks.schemas import CHUNKS, OWN_COLUMNS

LINES = ("start_line", "end_line")
"""Integer columns of these names become the index's own."""

LANCE_COLUMNS = frozenset({"_distance", "_score", "_relevance_score"})
"""What LanceDB names columns of a search's answer; so does all that starts with `_row`."""

EXAMPLES = 5


class TableReader:
    """The rows of a table, or of a folder of files of one kind, as chunks.

    Rows keep the order they have; rows of one document that stand apart stay apart.

    Attributes:
        source: Where the table is, and which columns are what.
    """

    splitter = ""

    def __init__(self, source: TableSource) -> None:
        self.source = source

    @property
    def metadata(self) -> "list[pa.Field[Any]]":
        """The source's own columns, as they stand in the index.

        Raises:
            SettingsError: The path or a column is missing, or a column takes a name of ours.
            CorpusError: A file cannot be read, or has other columns than the first one.
        """
        return list(self._layout.metadata)

    def chunks(self, notes: ReadNotes, wanted: Wanted | None = None) -> Iterator[pa.RecordBatch]:
        """The rows of all documents, or of those that are `wanted`, in the order they have.

        Yields:
            Batches of at most 8192 rows: CHUNKS followed by the metadata columns.

        Raises:
            SettingsError: The path or a column is missing, or a column takes a name of ours.
            CorpusError: A row has no id, or a file cannot be read to its end.
        """
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
        return _parts(self.source)

    @cached_property
    def _layout(self) -> "_Layout":
        return _layout(self._parts, self.source)


@dataclass(frozen=True)
class _Layout:
    """Which columns are read, as which types, and what becomes of them."""

    source: TableSource
    read: pa.Schema
    lines: tuple[str, ...]
    metadata: "tuple[pa.Field[Any], ...]"

    @cached_property
    def chunks(self) -> pa.Schema:
        return pa.schema([*CHUNKS, *self.metadata])


@dataclass
class _Sift:
    """What is kept between the batches of one reading."""

    layout: _Layout
    notes: ReadNotes
    wanted: Wanted | None
    documents: set[bytes] = field(default_factory=set)
    without_id: list[str] = field(default_factory=list)
    count_without_id: int = 0

    def chunks(self, batch: pa.RecordBatch, path: Path, row: int) -> pa.RecordBatch | None:
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
        rows = self._keep_wanted(rows)
        rows = self._drop_unfit(rows)
        columns = {name: rows.column(name) for name in rows.schema.names}
        own: dict[str, Any] = {
            "id": columns[self.layout.source.id],
            "document": columns.get(name) if name is not None else None,
            "text": columns[self.layout.source.text],
            **{line: columns[line] for line in self.layout.lines},
        }
        arrays = [
            pa.nulls(rows.num_rows, wish.type) if own.get(wish.name) is None else own[wish.name]
            for wish in CHUNKS
        ]
        arrays += [columns[wish.name] for wish in self.layout.metadata]
        return pa.RecordBatch.from_arrays(arrays, schema=self.layout.chunks)

    def refuse_rows_without_id(self) -> None:
        """Raise a CorpusError if a row had no id."""
        if self.count_without_id:
            more = ", ..." if self.count_without_id > len(self.without_id) else ""
            raise CorpusError(
                f"{self.count_without_id} rows have no id (null or empty) in the column "
                f"{self.layout.source.id!r}: {', '.join(self.without_id)}{more}. Give each row an "
                "id of its own, or remove these rows.",
                rows=self.count_without_id,
            )

    def _cast(self, batch: pa.RecordBatch, path: Path) -> pa.RecordBatch:
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

    def _check_ids(self, ids: "pa.Array[Any]", path: Path, row: int) -> None:
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
        return self._drop(rows, [int(row) for row in found], "blank text")

    def _drop(self, rows: pa.RecordBatch, unfit: list[int], reason: str) -> pa.RecordBatch:
        """`rows` without those that are `unfit`, which are noted."""
        if not unfit:
            return rows
        for key in rows.column(self.layout.source.id).take(pa.array(unfit)).to_pylist():
            self.notes.skip(reason, str(key))
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


def _parts(source: TableSource) -> list[Part]:
    """The files of the corpus, in order."""
    path = Path(source.path)
    if not path.exists():
        raise SettingsError(f"There is nothing at source.path: {path.absolute()}.", path=str(path))
    if not path.is_dir() or path.suffix.lower() == ".lance":
        return [_kind(path)(path, source)]
    parts: list[Part] = []
    for file in _files(path, ()):
        kind = _kind(file)
        if parts and not isinstance(parts[0], kind):
            raise SettingsError(
                f"source.path must hold files of one kind: {parts[0].path} and {file} are of two. "
                "Name one file, or a folder of one kind.",
                path=str(path),
            )
        parts.append(kind(file, source))
    if not parts:
        raise SettingsError(
            f"The folder at source.path holds no table: {path.absolute()}. {_supported()}",
            path=str(path),
        )
    return parts


def _files(folder: Path, above: tuple[str, ...]) -> Iterator[Path]:
    """The files below `folder`, sorted; links are followed, but never in a circle."""
    real = os.path.realpath(folder)
    if real in above:
        return
    with reading(folder, "Make it readable."):
        entries = sorted(folder.iterdir(), key=lambda entry: entry.name)
    for entry in entries:
        if entry.name.startswith((".", "_")):
            continue
        if not entry.is_dir():
            yield entry
        elif entry.suffix.lower() == ".lance":
            raise SettingsError(
                f"{entry} is a LanceDB table, which source.path must name itself.", path=str(entry)
            )
        else:
            yield from _files(entry, (*above, real))


def _kind(path: Path) -> type[Part]:
    kind = KINDS.get(path.suffix.lower())
    if kind is None:
        raise SettingsError(f"{path} is of no known kind. {_supported()}", path=str(path))
    return kind


def _supported() -> str:
    return f"Supported are {', '.join(KINDS)}, and folders of files of one kind."


def _layout(parts: list[Part], source: TableSource) -> _Layout:
    """The columns of all `parts` together.

    Raises:
        SettingsError: A column is missing, of a type that cannot be, or takes a name of ours.
        CorpusError: A file cannot be read, or has other columns than the first one.
    """
    types, empty = _types(parts, source)
    keys = [name for name in (source.id, source.text, source.document) if name is not None]
    lines = tuple(
        name
        for name in LINES
        if name in types
        and name not in keys
        and (pa.types.is_integer(types[name]) or pa.types.is_null(types[name]))
    )
    own = [name for name in types if name not in keys]
    if source.metadata is not None:
        own = list(dict.fromkeys(source.metadata))
    own = [name for name in own if name not in lines]
    if not empty:
        _require_columns(keys, own, list(types), parts[0].path)
    for name in own:
        _refuse_reserved(name, parts[0].path)
    for use, column in (("id", source.id), ("document", source.document), ("text", source.text)):
        if column is not None:
            _require_text(use, column, types.get(column, pa.null()), parts[0].path)

    metadata = tuple(pa.field(name, _plain(types.get(name, pa.null()), pa.utf8())) for name in own)
    read: dict[str, pa.Field[Any]] = {name: pa.field(name, pa.utf8()) for name in keys}
    read |= {name: pa.field(name, pa.int32()) for name in lines}
    read = {column.name: column for column in metadata} | read
    return _Layout(source, pa.schema(list(read.values())), lines, metadata)


def _types(parts: list[Part], source: TableSource) -> tuple[dict[str, pa.DataType], bool]:
    """The plain type of each column, and whether no part states any.

    Raises:
        SettingsError: A column is of a type that LanceDB does not hold.
        CorpusError: A file cannot be read, or has other columns than the first one.
    """
    asked = {source.id, source.text, *LINES, *(source.metadata or ())}
    keys = {source.id}
    if source.document is not None:
        asked.add(source.document)
        keys.add(source.document)
    types: dict[str, pa.DataType] = {}
    first: Part | None = None
    for part in parts:
        schema = part.schema()
        if part.sparse and not schema.names:
            continue  # JSON lines without a line
        names = set(schema.names)
        read = names if source.metadata is None else names & asked
        twice = sorted(name for name in read if schema.names.count(name) > 1)
        if twice:
            raise CorpusError(
                f"{part.path} has two columns named {twice[0]!r}. Rename one of them, or list in "
                "source.metadata the columns to keep.",
                path=str(part.path),
            )
        before = types.keys() if source.metadata is None else types.keys() & asked
        if first is not None and not part.sparse and read != before:
            raise CorpusError(
                f"{part.path} has other columns than {first.path}: one has and the other lacks "
                f"{sorted(read ^ before)}. Files of one corpus must have the same columns.",
                path=str(part.path),
            )
        first = first or part
        for column in schema:
            if column.name not in read:
                types.setdefault(column.name, column.type)
                continue
            type_ = _stored(column, part.path, key=column.name in keys)
            known = types.get(column.name, type_)
            both = type_ if type_ == known else merged(known, type_)
            if both is None:
                raise CorpusError(
                    f"{part.path}: the column {column.name!r} holds {type_}, but {known} in the "
                    "files before it. Make them of one type, or list in source.metadata the "
                    "columns to keep.",
                    path=str(part.path),
                    column=column.name,
                )
            types[column.name] = both
    return types, first is None


def _stored(column: "pa.Field[Any]", path: Path, *, key: bool) -> pa.DataType:
    """The type that the values of `column` are stored as; integers of a key become text."""
    try:
        type_ = _plain(column.type, pa.null())
    except TypeError as error:
        raise SettingsError(
            f"{path}: the column {column.name!r} holds {error}, which LanceDB cannot store. "
            "Convert it, or list in source.metadata the columns to keep, without it.",
            column=column.name,
        ) from None
    return pa.utf8() if key and pa.types.is_integer(type_) else type_


def _plain(type_: Any, null: pa.DataType) -> pa.DataType:
    """`type_` as LanceDB stores it without ado, with `null` for what has only nulls.

    Raises:
        TypeError: LanceDB cannot store it.
    """
    is_ = pa.types
    plain: pa.DataType = type_
    if isinstance(type_, pa.BaseExtensionType):
        plain = _plain(type_.storage_type, null)
    elif is_.is_dictionary(type_) or is_.is_run_end_encoded(type_):
        plain = _plain(type_.value_type, null)
    elif is_.is_null(type_):
        plain = null
    elif is_.is_large_string(type_) or is_.is_string_view(type_):
        plain = pa.utf8()
    elif is_.is_binary_view(type_):
        plain = pa.binary()
    elif is_.is_decimal32(type_) or is_.is_decimal64(type_):
        plain = pa.decimal128(type_.precision, type_.scale)
    elif is_.is_interval(type_):
        raise TypeError(str(type_))
    elif is_.is_nested(type_):
        plain = _plain_nested(type_, null)
    return plain


def _plain_nested(type_: Any, null: pa.DataType) -> pa.DataType:
    is_ = pa.types
    if is_.is_struct(type_):
        return pa.struct([pa.field(one.name, _plain(one.type, null)) for one in type_])
    if is_.is_map(type_):
        return pa.map_(_plain(type_.key_type, null), _plain(type_.item_type, null))
    if is_.is_union(type_):
        raise TypeError(str(type_))
    inner = _plain(type_.value_type, null)
    plain: pa.DataType = pa.list_(inner)
    if is_.is_large_list(type_) or is_.is_large_list_view(type_):
        plain = pa.large_list(inner)
    elif (
        is_.is_fixed_size_list(type_)
        and type_.list_size > 0
        and (is_.is_integer(inner) or is_.is_floating(inner))
    ):
        plain = pa.list_(inner, type_.list_size)
    return plain


def _require_columns(keys: list[str], own: list[str], names: list[str], path: Path) -> None:
    for name in [*keys, *own]:
        if name not in names:
            near = difflib.get_close_matches(name, names, n=1)
            hint = f" Did you mean {near[0]!r}?" if near else ""
            raise SettingsError(
                f"{path} has no column {name!r}; it has {', '.join(map(repr, names))}.{hint} "
                "Name the columns in source.id, source.text, source.document and source.metadata.",
                column=name,
            )


def _refuse_reserved(name: str, path: Path) -> None:
    """Refuse a metadata column of a name that the index or LanceDB uses itself."""
    if name in OWN_COLUMNS or name in LANCE_COLUMNS or name.startswith("_row"):
        why = "takes a name that the index needs itself"
    elif not name or "." in name or "`" in name:
        why = "has a name that LanceDB cannot store (empty, or with a dot or a backtick)"
    else:
        return
    raise SettingsError(
        f"{path}: the column {name!r} {why}. Rename it, or list in source.metadata the columns "
        "to keep, without it.",
        column=name,
    )


def _require_text(use: str, name: str, type_: pa.DataType, path: Path) -> None:
    if pa.types.is_string(type_) or pa.types.is_null(type_):
        return
    wish = "text" if use == "text" else "text or integers"
    raise SettingsError(
        f"{path}: the column {name!r} holds {type_}, but source.{use} must name a column of "
        f"{wish}. Convert it, or name another one.",
        column=name,
        type=str(type_),
    )
