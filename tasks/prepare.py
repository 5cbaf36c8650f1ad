"""Preparation: the exact text that is sent for a chunk, built here and nowhere else.

By default that is the chunk's own text. A config may have columns of its row stand in front of
it, a line each, then a blank line:

    document: guides/install.md
    title: Guide > Install

    Copy the files …

A field that is null or blank has no line; where none says anything, the text stands alone. White
space within a field counts as one space, so that a value never looks like a further line. Items
of a list are joined by commas.
"""

import difflib
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc

from tasks.errors import SettingsError

RECIPE = "prepend-1"
"""Names how the text is built; a change of anything below needs another one."""

_COMBINED = re.compile(r"(?P<own>.*?)\+prepend-\d+\((?P<names>.*)\)", re.DOTALL)


@dataclass(frozen=True)
class Preparation:
    """What stands in front of each text.

    Attributes:
        names: Columns of the index, in that order.
    """

    names: tuple[str, ...] = ()

    def recipe(self, own: str) -> str:
        """`Space.preparation` of these texts, with a provider whose `own` one is this."""
        return f"{own}+{RECIPE}({','.join(self.names)})" if self.names else own

    def require(self, columns: Mapping[str, pa.DataType], where: str) -> None:
        """See that all that stands in front is known and can be said in one way only.

        Args:
            columns: What may stand there, with its type.
            where: What has these columns, for the message.

        Raises:
            SettingsError: There is no such column, or it holds no text, integers, dates or
                lists of them.
        """
        known = ", ".join(columns) or "nothing"
        for name in self.names:
            if name not in columns:
                near = difflib.get_close_matches(name, columns, n=1)
                hint = f" Did you mean {near[0]!r}?" if near else ""
                raise SettingsError(
                    f"embedding.prepend: {where} has no {name!r} to put in front of a text.{hint} "
                    f"Known here: {known}.",
                    column=name,
                )
            if not _has_one_spelling(columns[name]):
                raise SettingsError(
                    f"embedding.prepend: the column {name!r} holds {columns[name]}, which can be "
                    "written in several ways. Only text, integers, true and false, dates and "
                    "lists of them can stand in front of a text; convert it to text.",
                    column=name,
                )

    def texts(self, rows: pa.RecordBatch | pa.Table) -> pa.Array:
        """The text that is sent for each of `rows`, which have `text` and the columns in front."""
        own = rows.column("text")
        if isinstance(own, pa.ChunkedArray):
            own = own.combine_chunks()
        if not self.names:
            return own
        columns = [_lines(name, rows.column(name)) for name in self.names]
        heads = ["".join(lines) for lines in zip(*columns, strict=True)]
        heads = [f"{head}\n" if head else "" for head in heads]
        return pc.binary_join_element_wise(pa.array(heads, own.type), own, "")


PLAIN = Preparation()
"""Nothing stands in front."""


def taken_apart(recipe: str) -> tuple[str, tuple[str, ...]]:
    """The provider's own part of a `Space.preparation`, and what stands in front of its texts."""
    found = _COMBINED.fullmatch(recipe)
    return (found["own"], tuple(found["names"].split(","))) if found else (recipe, ())


def _lines(name: str, column: pa.Array | pa.ChunkedArray) -> list[str]:
    """The line of each value; "" where it says nothing."""
    said = map(_said, column.to_pylist())
    return [f"{name}: {value}\n" if value else "" for value in said]


def _said(value: Any) -> str:
    """`value` on one line; "" where it says nothing."""
    if value is None:
        return ""
    if isinstance(value, list):
        return ", ".join(filter(None, map(_said, value)))
    said = str(value).lower() if isinstance(value, bool) else str(value)
    return " ".join(said.split())


def _has_one_spelling(kind: Any) -> bool:
    is_ = pa.types
    if is_.is_list(kind) or is_.is_large_list(kind) or is_.is_fixed_size_list(kind):
        kind = kind.value_type
    return bool(
        is_.is_string(kind)
        or is_.is_large_string(kind)
        or is_.is_integer(kind)
        or is_.is_boolean(kind)
        or is_.is_date(kind)
        or is_.is_null(kind)
    )
