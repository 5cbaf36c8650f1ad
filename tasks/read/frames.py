"""A pandas DataFrame as a corpus: written to an Arrow file, which `TableReader` reads."""

from collections.abc import Hashable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pyarrow as pa

from tasks.errors import CorpusError, SettingsError
from tasks.params import TableSource
from tasks.read import ReadNotes
from tasks.read.formats import short, text_array
from tasks.read.portions import ROWS
from tasks.read.tables import TableReader

if TYPE_CHECKING:
    import pandas as pd


def write_frame(frame: "pd.DataFrame", path: Path, source: TableSource) -> None:
    """Write the columns of `frame` that `source` asks for to an Arrow file at `path`.

    The index is written only where `source.id` is its name. A text with a lone surrogate is
    written as the invalid bytes it comes to, so that the reader counts and names its row.

    Args:
        frame: One chunk a row.
        path: Where to write; ends in `.arrow`.
        source: Which columns are what; its path is not looked at.

    Raises:
        SettingsError: A column is missing, or two share a name, or one cannot be stored.
        CorpusError: A row has no id, or a column holds values of several types.
    """
    columns: dict[str, Any] = {}
    if frame.index.name == source.id and source.id not in frame.columns:
        columns[source.id] = frame.index.to_series()
    for position, label in enumerate(frame.columns):
        name = _name(label)
        if name in columns:
            raise SettingsError(f"The frame has two columns named {name!r}. Rename one of them.")
        columns[name] = frame.iloc[:, position]
    if source.metadata is not None:
        asked = {source.id, source.text, source.document, "start_line", "end_line"}
        asked.update(source.metadata)
        columns = {name: values for name, values in columns.items() if name in asked}

    arrays = [_array(name, values) for name, values in columns.items()]
    table = pa.Table.from_arrays(arrays, names=list(columns))
    path.parent.mkdir(parents=True, exist_ok=True)
    with pa.ipc.new_file(str(path), table.schema) as writer:
        writer.write_table(table, max_chunksize=ROWS)
    _check(source.model_copy(update={"path": str(path)}))


def _check(written: TableSource) -> None:
    """Read what was written, so that its faults are told of the frame, not of a file.

    Raises:
        SettingsError: A column is missing, of a type that cannot be, or takes a name of ours.
        CorpusError: A row has no id.
    """
    try:
        for _ in TableReader(written).chunks(ReadNotes()):
            pass
    except (SettingsError, CorpusError) as error:
        message = str(error).replace(written.path, "the frame")
        facts = {key: value for key, value in error.facts.items() if key != "path"}
        raise type(error)(message[:1].upper() + message[1:], **facts) from None


def _name(label: Hashable) -> str:
    """The name of a column; pandas also takes numbers and tuples for one."""
    return label if isinstance(label, str) else str(label)


def _array(name: str, values: "pd.Series[Any]") -> "pa.Array[Any] | pa.ChunkedArray[Any]":
    """The values of the column `name`, missing ones as null."""
    array: pa.Array[Any] | pa.ChunkedArray[Any]
    try:
        array = pa.array(values, from_pandas=True)
    except UnicodeEncodeError:
        why = "hold a text that is not valid Unicode, within others or beside values of no text"
        try:
            return text_array(values.astype(object).where(values.notna(), None).to_list())
        except TypeError:
            pass
    except OverflowError:
        why = "hold an integer too large to store"
    except (pa.ArrowException, TypeError, ValueError) as error:
        why = f"are not of one type: {short(error)}"
    else:
        return array
    raise CorpusError(
        f"The values of the column {name!r} {why}. Convert the column, or "
        "leave it out of source.metadata.",
        column=name,
    )
