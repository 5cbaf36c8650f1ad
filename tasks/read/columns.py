"""Columns: what of a table becomes id, document, text, lines and metadata of a chunk.

All files of a corpus share one layout: a type for each column that holds what each of them
has there, and that LanceDB stores without ado.
"""

import difflib
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import pyarrow as pa

from tasks.errors import CorpusError, SettingsError
from tasks.params import TableSource
from tasks.prepare import PLAIN, Preparation
from tasks.read.formats import LINES, Part, Place, merged, other_separator
from tasks.schemas import CHUNKS, OWN_COLUMNS

LANCE_COLUMNS = frozenset({"_distance", "_score", "_relevance_score"})
"""What LanceDB names columns of a search's answer; so does all that starts with `_row`."""


@dataclass(frozen=True)
class Layout:
    """Which columns are read, as which types, and what becomes of them.

    Attributes:
        source: Which columns are asked for.
        read: The columns that are read.
        lines: Those of LINES that the source has.
        metadata: The source's own columns, as they stand in the index.
    """

    source: TableSource
    read: pa.Schema
    lines: tuple[str, ...]
    metadata: "tuple[pa.Field[Any], ...]"

    def chunks(self, rows: pa.RecordBatch) -> pa.RecordBatch:
        """`rows` with the columns of `read`, as CHUNKS followed by the metadata columns."""
        source = {
            "id": self.source.id,
            "document": self.source.document,
            "text": self.source.text,
            **{line: line for line in self.lines},
        }
        columns: list[pa.Array[Any]] = []
        for wish in CHUNKS:
            name = source.get(wish.name)
            found = pa.nulls(rows.num_rows, wish.type) if name is None else rows.column(name)
            columns.append(found)
        columns += [rows.column(own.name) for own in self.metadata]
        return pa.RecordBatch.from_arrays(columns, schema=self._chunks)

    @cached_property
    def _chunks(self) -> pa.Schema:
        return pa.schema([*CHUNKS, *self.metadata])


def layout_of(
    parts: Sequence[Part], source: TableSource, preparation: Preparation = PLAIN
) -> Layout:
    """The columns of all `parts` together.

    Raises:
        SettingsError: A column is missing, of a type that cannot be, or takes a name of ours;
            or what is to stand in front of texts is not among those that are kept.
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

    for name in own:
        _refuse_fieldless(name, types.get(name, pa.null()), source)
    metadata = tuple(pa.field(name, _plain(types.get(name, pa.null()), pa.utf8())) for name in own)
    if not empty:
        kept = {"document": pa.utf8()} if source.document is not None else {}
        kept |= {column.name: column.type for column in metadata}
        preparation.require(kept, source.path)
    read: dict[str, pa.Field[Any]] = {name: pa.field(name, pa.utf8()) for name in keys}
    read |= {name: pa.field(name, pa.int32()) for name in lines}
    read = {column.name: column for column in metadata} | read
    return Layout(source, pa.schema(list(read.values())), lines, metadata)


def _types(parts: Sequence[Part], source: TableSource) -> tuple[dict[str, pa.DataType], bool]:
    """The plain type of each column, and whether no part states any.

    Raises:
        SettingsError: A column is of a type that LanceDB does not hold.
        CorpusError: A file cannot be read, or has other columns than the first one.
    """
    keys = {source.id, source.document}
    asked = {*keys, source.text, *LINES, *(source.metadata or ())}
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


def _stored(column: "pa.Field[Any]", path: Place, *, key: bool) -> pa.DataType:
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


def _refuse_fieldless(name: str, type_: Any, source: TableSource) -> None:
    """Refuse a metadata column that LanceDB would store, but could not read again."""
    if _fieldless(type_):
        raise SettingsError(
            f"{source.path}: the column {name!r} holds {type_}, a struct without fields, which "
            "LanceDB cannot store. Give it a field, or leave it out of source.metadata (null "
            "there keeps all columns).",
            column=name,
        )


def _fieldless(type_: Any) -> bool:
    if pa.types.is_struct(type_):
        return type_.num_fields == 0 or any(_fieldless(one.type) for one in type_)
    if pa.types.is_map(type_):
        return _fieldless(type_.key_type) or _fieldless(type_.item_type)
    return pa.types.is_nested(type_) and _fieldless(type_.value_type)


def _require_columns(keys: list[str], own: list[str], names: list[str], path: Place) -> None:
    for name in [*keys, *own]:
        if name not in names:
            other = other_separator(names[0]) if path.suffix.lower() == ".csv" else ""
            if other and len(names) == 1:
                raise SettingsError(
                    f"{path} has no column {name!r}; it has {names[0]!r}.{other}", column=name
                )
            near = difflib.get_close_matches(name, names, n=1)
            hint = f" Did you mean {near[0]!r}?" if near else ""
            raise SettingsError(
                f"{path} has no column {name!r}; it has {', '.join(map(repr, names))}.{hint} "
                "Name the columns in source.id, source.text, source.document and source.metadata.",
                column=name,
            )


def _refuse_reserved(name: str, path: Place) -> None:
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


def _require_text(use: str, name: str, type_: pa.DataType, path: Place) -> None:
    if pa.types.is_string(type_) or pa.types.is_null(type_):
        return
    wish = "text" if use == "text" else "text or integers"
    raise SettingsError(
        f"{path}: the column {name!r} holds {type_}, but source.{use} must name a column of "
        f"{wish}. Convert it, or name another one.",
        column=name,
        type=str(type_),
    )
