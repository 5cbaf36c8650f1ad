"""A table comes in row by row, the same from every format, and never in part."""

import csv
import json
import subprocess
import sys
import tempfile
from collections.abc import Callable
from functools import partial
from operator import eq
from pathlib import Path
from random import Random
from typing import Any

import lancedb
import pandas as pd
import pyarrow as pa
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pyarrow import parquet

from tasks.errors import CorpusError, SettingsError
from tasks.params import TableSource
from tasks.read import ReadNotes
from tasks.read.frames import write_frame
from tasks.read.tables import TableReader
from tasks.schemas import CHUNKS

SURROGATE = b"\xed\xa0\x80"


def to_parquet(table: pa.Table, folder: Path, name: str = "t") -> Path:
    parquet.write_table(table, folder / f"{name}.parquet")
    return folder / f"{name}.parquet"


def to_csv(table: pa.Table, folder: Path, name: str = "t") -> Path:
    path = folder / f"{name}.csv"
    with path.open("w", encoding="utf-8", newline="") as file:
        writer = csv.writer(file, quoting=csv.QUOTE_ALL)
        writer.writerow(table.column_names)
        writer.writerows(row.values() for row in table.to_pylist())
    return path


def to_jsonl(table: pa.Table, folder: Path, name: str = "t") -> Path:
    path = folder / f"{name}.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in table.to_pylist()))
    return path


def to_arrow(table: pa.Table, folder: Path, name: str = "t") -> Path:
    with pa.ipc.new_file(str(folder / f"{name}.arrow"), table.schema) as writer:
        writer.write_table(table)
    return folder / f"{name}.arrow"


def to_stream(table: pa.Table, folder: Path, name: str = "t") -> Path:
    with pa.ipc.new_stream(str(folder / f"{name}.ipc"), table.schema) as writer:
        writer.write_table(table)
    return folder / f"{name}.ipc"


def to_lance(table: pa.Table, folder: Path, name: str = "t") -> Path:
    lancedb.connect(str(folder)).create_table(name, table, mode="overwrite")
    return folder / f"{name}.lance"


Writer = Callable[..., Path]
WRITERS: list[Writer] = [to_parquet, to_csv, to_jsonl, to_arrow, to_stream, to_lance]
FILES = [to_parquet, to_csv, to_jsonl, to_arrow, to_stream]
TYPED = [to_parquet, to_arrow, to_stream, to_lance]
every_format = pytest.mark.parametrize("write", WRITERS)
every_file = pytest.mark.parametrize("write", FILES)
every_typed_file = pytest.mark.parametrize("write", [f for f in FILES if f is not to_csv])
every_typed = pytest.mark.parametrize("write", TYPED)


def reader(path: Path, **columns: Any) -> TableReader:
    return TableReader(TableSource(kind="table", path=str(path), **columns))


def read(path: Path, notes: ReadNotes | None = None, **columns: Any) -> list[dict[str, Any]]:
    """All chunks; each batch is held against the schema that was promised."""
    source = reader(path, **columns)
    promised = pa.schema([*CHUNKS, *source.metadata])
    rows: list[dict[str, Any]] = []
    for batch in source.chunks(notes if notes is not None else ReadNotes()):
        assert batch.schema.equals(promised, check_metadata=True)
        assert 0 < batch.num_rows <= 8192
        batch.validate(full=True)
        rows += batch.to_pylist()
    return rows


def raw_text(*values: bytes) -> Any:
    encoded = pa.array(values, pa.binary())
    return pa.Array.from_buffers(pa.utf8(), len(encoded), encoded.buffers())


def as_written(write: Writer, value: object) -> object:
    """What a metadata value comes back as: CSV knows text only."""
    if write is to_csv:
        return "" if value is None else str(value)
    return value


def small(**columns: Any) -> pa.Table:
    return pa.table({"id": ["a", "b"], "text": ["alpha", "beta"], **columns})


@every_format
def test_a_row_is_a_chunk_with_its_document_lines_and_metadata(
    write: Writer, tmp_path: Path
) -> None:
    table = pa.table(
        {
            "n": [7, 8],
            "key": ["x;'\"", "ü\n2"],
            "body": ["alpha\nbeta", ' "quoted", with commas '],
            "doc": ["one", None],
            "start_line": pa.array([1, 5], pa.int64()),
            "end_line": pa.array([4, None], pa.int64()),
            "score": [0.5, 2.0],
        }
    )
    notes = ReadNotes()
    source = {"id": "key", "text": "body", "document": "doc"}
    rows = read(write(table, tmp_path), notes, **source)
    assert rows == [
        {
            "id": "x;'\"",
            "document": "one",
            "text": "alpha\nbeta",
            "start_line": 1,
            "end_line": 4,
            "n": as_written(write, 7),
            "score": as_written(write, 0.5),
        },
        {
            "id": "ü\n2",
            "document": None,
            "text": ' "quoted", with commas ',
            "start_line": 5,
            "end_line": None,
            "n": as_written(write, 8),
            "score": as_written(write, 2.0),
        },
    ]
    assert notes.documents == 1
    assert not notes.skipped


@every_format
def test_only_the_listed_metadata_is_kept(write: Writer, tmp_path: Path) -> None:
    path = write(small(vector=[1, 2], run_id=["r", "r"], lang=["de", "en"]), tmp_path)
    assert [row["lang"] for row in read(path, metadata=["lang"])] == ["de", "en"]
    assert list(read(path, metadata=[])[0]) == CHUNKS.names
    assert reader(path, metadata=["lang"]).metadata == [pa.field("lang", pa.utf8())]


@every_typed
@pytest.mark.parametrize("type_", [pa.int8(), pa.int64(), pa.uint64()])
def test_integer_ids_become_decimal_text(type_: pa.DataType, write: Writer, tmp_path: Path) -> None:
    largest = {"int8": 127, "int64": 2**63 - 1, "uint64": 2**64 - 1}[str(type_)]
    table = pa.table({"id": pa.array([0, largest], type_), "text": ["a", "b"]})
    assert [row["id"] for row in read(write(table, tmp_path))] == ["0", str(largest)]


def test_json_ids_may_be_integers_of_any_size_or_text(tmp_path: Path) -> None:
    path = tmp_path / "t.jsonl"
    path.write_text(
        '{"id": 12345678901234567890123, "text": "a"}\n{"id": "2024-01-01", "text": "b"}'
    )
    assert [row["id"] for row in read(path)] == ["12345678901234567890123", "2024-01-01"]


def test_csv_cells_stay_as_they_are_written(tmp_path: Path) -> None:
    path = tmp_path / "t.csv"
    path.write_text("id,text,doc,zip\n007,1.50,0042,01234\nNA,NA,,\n")
    assert read(path, document="doc") == [
        {"id": "007", "document": "0042", "text": "1.50", "start_line": None, "end_line": None}
        | {"zip": "01234"},
        {"id": "NA", "document": None, "text": "NA", "start_line": None, "end_line": None}
        | {"zip": ""},
    ]


def test_csv_lines_are_integers_or_empty(tmp_path: Path) -> None:
    path = tmp_path / "t.csv"
    path.write_text("id,text,start_line,end_line\na,alpha, 3 ,\nb,beta,,04\n")
    assert [(row["start_line"], row["end_line"]) for row in read(path)] == [(3, None), (None, 4)]
    assert reader(path).metadata == []
    for cell in ("x", "1.5", "99999999999"):
        path.write_text(f"id,text,start_line\na,alpha,{cell}\n")
        with pytest.raises(
            CorpusError, match=r"t\.csv: the column 'start_line' must hold integers"
        ):
            read(path)


def test_csv_files_of_a_folder_need_not_look_alike(tmp_path: Path) -> None:
    (tmp_path / "a.csv").write_text("id,text,zip\na,t,01234\n")
    (tmp_path / "b.csv").write_text("id,text,zip\nb,t,SW1A\n")
    (tmp_path / "c.csv").write_text("id,text,zip\n")
    assert [row["zip"] for row in read(tmp_path)] == ["01234", "SW1A"]


@every_typed
@pytest.mark.parametrize(
    "ids", [[1.0, 2.0], [True, False], [[1], [2]], [b"a", b"b"]], ids=["float", "bool", "list", "b"]
)
def test_ids_of_another_type_are_refused_with_their_type(
    ids: list[Any], write: Writer, tmp_path: Path
) -> None:
    table = pa.table({"id": ids, "text": ["a", "b"]})
    with pytest.raises(
        SettingsError, match=r"'id' holds .*source\.id .* text or integers"
    ) as error:
        read(write(table, tmp_path))
    assert str(table.schema.field("id").type) in str(error.value)


@pytest.mark.parametrize("value", ["1.5", "true", "[1]", "{}"])
def test_json_ids_of_another_type_are_refused(value: str, tmp_path: Path) -> None:
    path = tmp_path / "t.jsonl"
    path.write_text('{"id": %s, "text": "a"}\n' % value)  # noqa: UP031 - braces
    with pytest.raises(SettingsError, match="text or integers"):
        read(path)


@every_format
def test_rows_without_id_are_counted_and_named(write: Writer, tmp_path: Path) -> None:
    ids = [None if row in (1, 9000) else "" if row == 3 else str(row) for row in range(9001)]
    path = write(pa.table({"id": ids, "text": ["t"] * 9001}), tmp_path)
    batches: list[pa.RecordBatch] = []
    with pytest.raises(CorpusError, match="3 rows have no id") as error:
        batches.extend(reader(path).chunks(ReadNotes()))
    assert not batches
    assert f"{path} row 2, {path} row 4, {path} row 9001" in str(error.value)


@every_typed
def test_a_column_of_nulls_is_no_id(write: Writer, tmp_path: Path) -> None:
    with pytest.raises(CorpusError, match="2 rows have no id"):
        read(write(pa.table({"id": pa.nulls(2), "text": ["a", "b"]}), tmp_path))


@every_format
def test_blank_texts_are_skipped_and_named(write: Writer, tmp_path: Path) -> None:
    texts = ["alpha", None, "", " \t\n\u00a0\u2003", "\x00"]
    notes = ReadNotes()
    rows = read(write(pa.table({"id": list("abcde"), "text": texts}), tmp_path), notes)
    assert [(row["id"], row["text"]) for row in rows] == [("a", "alpha"), ("e", "\x00")]
    assert notes.skipped == {"blank text": 3}
    assert notes.examples == {"blank text": ["b", "c", "d"]}
    assert not notes.unread_ids
    assert not notes.failed


@pytest.mark.parametrize("write", [to_parquet, to_arrow, to_stream])
def test_a_row_with_invalid_unicode_is_failed_and_named(write: Writer, tmp_path: Path) -> None:
    table = pa.table(
        {
            "id": ["a", "b", "c", "d", "e"],
            "text": raw_text(b"alpha", SURROGATE, b"gamma", b"delta", b"eta"),
            "tag": raw_text(b"x", b"x", b"\xff", b"x", b"x").dictionary_encode(),
            "nested": pa.StructArray.from_arrays(
                [raw_text(b"x", b"x", b"x", b"\xc0", b"x")], ["inner"]
            ),
        }
    )
    notes = ReadNotes()
    assert [row["id"] for row in read(write(table, tmp_path), notes)] == ["a", "e"]
    assert notes.examples == {
        "text is not valid Unicode": ["b"],
        "metadata is not valid Unicode": ["c", "d"],
    }
    assert notes.unread_ids == ["b", "c", "d"]
    assert notes.failed == 3


def test_invalid_bytes_in_csv_and_json_cost_one_row(tmp_path: Path) -> None:
    (tmp_path / "t.csv").write_bytes(b'id,text,n\na,\xff,1\nb,beta,2\nc,"x\x80",3\n')
    (tmp_path / "t.jsonl").write_bytes(
        b'{"id": "a", "text": "\xff", "n": 1}\n{"id": "b", "text": "beta", "n": 2}\n'
        b'{"id": "c", "text": "x\\ud800", "n": 3}\n'
    )
    for name in ("t.csv", "t.jsonl"):
        notes = ReadNotes()
        assert [row["id"] for row in read(tmp_path / name, notes)] == ["b"]
        assert notes.examples == {"text is not valid Unicode": ["a", "c"]}
        assert notes.unread_ids == ["a", "c"]
        assert notes.failed == 2


def test_invalid_unicode_in_a_document_costs_its_row_and_in_an_id_the_run(tmp_path: Path) -> None:
    notes = ReadNotes()
    bad = raw_text(b"ok", SURROGATE)
    assert len(read(to_parquet(small(doc=bad), tmp_path), notes, document="doc")) == 1
    assert notes.examples == {"document is not valid Unicode": ["b"]}
    assert notes.unread_ids == ["b"]
    with pytest.raises(CorpusError, match=r"t\.parquet row 2: the id .* not valid Unicode"):
        read(to_parquet(pa.table({"id": bad, "text": ["a", "b"]}), tmp_path))


@every_typed
def test_a_text_column_of_numbers_is_refused(write: Writer, tmp_path: Path) -> None:
    with pytest.raises(SettingsError, match=r"'text' holds int64, .* a column of text\."):
        read(write(pa.table({"id": ["a"], "text": [1]}), tmp_path))


@every_format
def test_a_missing_column_is_named_beside_those_there_are(write: Writer, tmp_path: Path) -> None:
    path = write(small(lang=["de", "en"]), tmp_path)
    wrong: list[dict[str, Any]] = [
        {"id": "textt"},
        {"text": "textt"},
        {"document": "textt"},
        {"metadata": ["textt"]},
    ]
    for columns in wrong:
        with pytest.raises(SettingsError, match=r"no column 'textt'.*Did you mean 'text'") as error:
            _ = reader(path, **columns).metadata
        assert "'id', 'text', 'lang'" in str(error.value)


@every_file
@pytest.mark.parametrize(
    "name", ["vector", "text_hash", "run_id", "document", "_rowid", "_score", "a.b"]
)
def test_a_metadata_column_of_a_reserved_name_is_refused_unless_left_out(
    name: str, write: Writer, tmp_path: Path
) -> None:
    path = write(small(**{name: ["x", "y"]}), tmp_path)
    with pytest.raises(SettingsError, match=r"Rename it, or list in source\.metadata") as error:
        _ = reader(path).metadata
    assert repr(name) in str(error.value)
    assert len(read(path, metadata=[])) == 2


@every_typed_file
def test_lines_that_are_no_integers_take_a_name_of_ours(write: Writer, tmp_path: Path) -> None:
    path = write(small(start_line=["x", "y"]), tmp_path)
    with pytest.raises(SettingsError, match="column 'start_line' takes a name"):
        _ = reader(path).metadata
    assert len(read(path, metadata=[])) == 2


@every_format
def test_another_column_called_id_is_a_clash(write: Writer, tmp_path: Path) -> None:
    path = write(small(chunk_id=[1, 2]), tmp_path)
    with pytest.raises(SettingsError, match="column 'id' takes a name"):
        _ = reader(path, id="chunk_id").metadata
    assert [row["id"] for row in read(path, id="chunk_id", metadata=[])] == ["1", "2"]


@every_format
def test_only_wanted_documents_come_in(write: Writer, tmp_path: Path) -> None:
    table = pa.table({"id": list("abc"), "text": ["t", " ", "t"], "doc": ["x", "y", None]})
    source = reader(write(table, tmp_path), document="doc")
    cases: list[tuple[str | None, list[str], int]] = [
        ("x", ["a"], 1),
        (None, ["c"], 0),
        ("y", [], 1),
    ]
    for wanted, ids, documents in cases:
        notes = ReadNotes()
        batches = list(source.chunks(notes, partial(eq, wanted)))
        assert [key for batch in batches for key in batch.column("id").to_pylist()] == ids
        assert notes.documents == documents
        assert notes.skipped == ({"blank text": 1} if wanted == "y" else {})


def test_integer_documents_become_text_and_are_counted_once(tmp_path: Path) -> None:
    count = 20_000
    table = pa.table(
        {
            "id": range(count),
            "text": ["t"] * count,
            "doc": [row // 7 for row in range(count)],
        }
    )
    notes = ReadNotes()
    rows = read(to_parquet(table, tmp_path), notes, document="doc")
    assert [row["id"] for row in rows] == [str(row) for row in range(count)]
    assert rows[-1]["document"] == str((count - 1) // 7)
    assert notes.documents == (count - 1) // 7 + 1


def test_metadata_is_stored_plainly(tmp_path: Path) -> None:
    table = small(
        large=pa.array(["x", None], pa.large_string()),
        view=pa.array(["x", None], pa.string_view()),
        coded=pa.array(["x", None]).dictionary_encode(),
        nothing=pa.nulls(2),
        when=pa.array([1, None], pa.timestamp("us", "UTC")),
        flag=[True, None],
        lists=pa.array([["x"], []], pa.list_(pa.field("element", pa.large_string(), False))),
        texts=pa.array([["x"], ["y"]], pa.list_(pa.utf8(), 1)),
        embedding=pa.array([[1.0], [2.0]], pa.list_(pa.float32(), 1)),
        structs=pa.array([{"a": None, "b": 1}, None]),
        small=pa.array([1, 2], pa.uint8()),
    )
    source = reader(to_arrow(table, tmp_path))
    assert {field.name: str(field.type) for field in source.metadata} == {
        "large": "string",
        "view": "string",
        "coded": "string",
        "nothing": "string",
        "when": "timestamp[us, tz=UTC]",
        "flag": "bool",
        "lists": "list<item: string>",
        "texts": "list<item: string>",
        "embedding": "fixed_size_list<item: float>[1]",
        "structs": "struct<a: string, b: int64>",
        "small": "uint8",
    }
    assert read(Path(source.source.path))[0]["lists"] == ["x"]
    chunks = pa.Table.from_batches(source.chunks(ReadNotes()))
    stored = lancedb.connect(str(tmp_path)).create_table("index", chunks)
    assert stored.to_arrow().schema.field("coded").type == pa.utf8()
    assert stored.to_arrow().drop_columns("text").equals(chunks.drop_columns("text"))


def test_a_type_that_lancedb_cannot_store_is_refused_unless_left_out(tmp_path: Path) -> None:
    path = to_arrow(small(span=pa.nulls(2, pa.month_day_nano_interval())), tmp_path)
    with pytest.raises(SettingsError, match="'span' holds month_day_nano_interval"):
        _ = reader(path).metadata
    assert len(read(path, metadata=[])) == 2


@pytest.mark.parametrize("write", [to_arrow, to_stream])
@pytest.mark.parametrize(
    "type_",
    [
        pa.struct([]),
        pa.list_(pa.struct([])),
        pa.struct([("a", pa.struct([])), ("b", pa.int64())]),
        pa.map_(pa.utf8(), pa.struct([])),
    ],
    ids=str,
)
def test_a_struct_without_fields_is_refused_unless_left_out(
    type_: pa.DataType, write: Writer, tmp_path: Path
) -> None:
    path = write(small(m=pa.nulls(2, type_)), tmp_path)
    with pytest.raises(SettingsError, match=r"'m' holds .*leave it out of source\.metadata"):
        read(path)
    assert len(read(path, metadata=[])) == 2


@pytest.mark.parametrize("value", ["{}", "[{}]", '{"k": {}}'])
def test_json_objects_that_are_all_empty_are_refused_unless_left_out(
    value: str, tmp_path: Path
) -> None:
    path = tmp_path / "a.jsonl"
    path.write_text('{"id": 1, "text": "t", "m": %s}\n' % value)  # noqa: UP031 - braces
    with pytest.raises(SettingsError, match=r"'m' holds .*leave it out of source\.metadata"):
        read(path)
    assert len(read(path, metadata=[])) == 1


def test_an_empty_json_object_takes_the_fields_of_others(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_text('{"id": 1, "text": "t", "m": {}}\n')
    (tmp_path / "b.jsonl").write_text('{"id": 2, "text": "t", "m": {"k": 1}}\n')
    assert [row["m"] for row in read(tmp_path)] == [{"k": None}, {"k": 1}]


@every_file
def test_a_folder_is_its_files_in_order(write: Writer, tmp_path: Path) -> None:
    (tmp_path / "m").mkdir()
    for name, key in [("z", 3), ("m/b", 2), ("a", 1)]:
        write(pa.table({"id": [f"{key}"], "text": ["t"], "n": [key]}), tmp_path, name)
    (tmp_path / "_SUCCESS").touch()
    (tmp_path / ".hidden").touch()
    (tmp_path / "circle").symlink_to(tmp_path)
    notes = ReadNotes()
    assert [(row["id"], row["n"]) for row in read(tmp_path, notes)] == [
        (str(key), as_written(write, key)) for key in (1, 2, 3)
    ]
    assert notes.documents == 3


@every_typed_file
def test_types_that_fit_together_are_widened_over_all_files(write: Writer, tmp_path: Path) -> None:
    write(small(x=[1, None]), tmp_path, "a")
    write(small(x=[0.5, 1.5]), tmp_path, "b")
    write(small(x=pa.nulls(2)), tmp_path, "c")
    assert [row["x"] for row in read(tmp_path)] == [1.0, None, 0.5, 1.5, None, None]


@every_typed_file
def test_types_that_do_not_fit_together_are_refused(write: Writer, tmp_path: Path) -> None:
    write(small(x=[1, 2]), tmp_path, "a")
    path = write(small(x=["one", "two"]), tmp_path, "b")
    with pytest.raises(
        CorpusError, match=r"'x' holds string, but int64 in the files before"
    ) as error:
        read(tmp_path)
    assert str(path) in str(error.value)
    assert len(read(tmp_path, metadata=[])) == 4


@pytest.mark.parametrize("write", [to_parquet, to_csv, to_arrow, to_stream])
def test_a_file_with_other_columns_is_named(write: Writer, tmp_path: Path) -> None:
    write(small(x=[1, 2]), tmp_path, "a")
    path = write(small(y=[1, 2]), tmp_path, "b")
    with pytest.raises(CorpusError, match=r"other columns than .*\['x', 'y'\]") as error:
        read(tmp_path)
    assert str(path) in str(error.value)
    assert len(read(tmp_path, metadata=[])) == 4


def test_a_key_that_a_json_row_lacks_is_null(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_text('{"id": 1, "text": "a"}\n\n{"id": 2, "text": "b", "n": 1}')
    (tmp_path / "b.jsonl").write_text('\ufeff{"id": 3, "text": "c", "m": {"k": [1]}}\n')
    (tmp_path / "c.jsonl").touch()
    rows = read(tmp_path)
    assert [(row["id"], row["n"], row["m"]) for row in rows] == [
        ("1", None, None),
        ("2", 1, None),
        ("3", None, {"k": [1]}),
    ]


@pytest.mark.slow
def test_a_json_key_that_comes_late_is_never_lost_silently(tmp_path: Path) -> None:
    path = tmp_path / "t.jsonl"
    head = "".join(f'{{"id": {row}, "text": "t"}}\n' for row in range(20_000))
    path.write_text(head + '{"id": "x", "text": "t", "late": 1}\n')
    with pytest.raises(CorpusError, match="line 20001: the key 'late'"):
        read(path)
    assert read(path, metadata=["late"])[-1]["late"] == 1
    assert len(read(path, metadata=[])) == 20_001


def test_a_value_that_does_not_fit_the_guessed_type_is_an_error_that_names_the_file(
    tmp_path: Path,
) -> None:
    path = tmp_path / "t.jsonl"
    path.write_text(
        '{"id": 1, "text": "t", "n": 3}\n' * 20_000 + '{"id": 2, "text": "t", "n": "zz"}\n'
    )
    with pytest.raises(CorpusError, match=r"source\.metadata") as error:
        read(path)
    assert str(path) in str(error.value)
    assert read(path, metadata=[])[-1]["id"] == "2"


@pytest.mark.parametrize("write", [to_parquet, to_csv, to_arrow, to_stream, to_lance])
def test_no_rows_are_no_chunks(write: Writer, tmp_path: Path) -> None:
    path = write(small(n=[1, 2]).slice(0, 0), tmp_path)
    assert read(path) == []
    assert [field.name for field in reader(path).metadata] == ["n"]


def test_an_empty_json_lines_file_is_no_chunks(tmp_path: Path) -> None:
    (tmp_path / "t.jsonl").touch()
    assert read(tmp_path / "t.jsonl", metadata=["lang"], document="doc") == []


@pytest.mark.parametrize("end", ["", "\n", "\r\n", "\n\n"])
def test_a_csv_file_may_end_as_it_likes(end: str, tmp_path: Path) -> None:
    (tmp_path / "t.csv").write_bytes(("id,text\na,alpha\nb,beta" + end).encode())
    assert [row["text"] for row in read(tmp_path / "t.csv")] == ["alpha", "beta"]
    (tmp_path / "t.csv").write_bytes(("id,text" + end).encode())
    assert read(tmp_path / "t.csv") == []


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("t.csv", b""),
        ("t.csv", b"id,text\na,alpha,more\n"),
        ("t.csv", b"id,te\xffxt\na,alpha\n"),
        ("t.csv", b'id,text\na,alpha\nb,"beta\nc,gamma\n'),
        ("t.csv", b'id,text\na,"alpha\n'),
        ("t.csv", b"id,text,text\na,b,c\n"),
        ("t.jsonl", b'[{"id": 1}]\n'),
        ("t.jsonl", b'{"id": 1, "text": "a"}\n{"id": 2, "te'),
        ("t.jsonl", b'{"id": 1, "text": "a"}\n{"id": 2, "text": 3}\n'),
        ("t.jsonl", b'{"id": 1, "text": "a", "m": ["\\ud800"]}\n'),
        ("t.jsonl", b'{"id": 1, "text": "a", "m": ' + b"9" * 30 + b"}\n"),
        ("t.jsonl", b"[" * 100_000),
        ("t.parquet", b""),
        ("t.parquet", b"PAR1 no, not really PAR1"),
        ("t.arrow", b""),
        ("t.arrow", b"ARROW1\x00\x00 no"),
        ("t.arrow", b"FEA1 of old"),
        ("t.feather", b"neither"),
        ("t.lance", b"a file"),
    ],
)
def test_a_file_that_cannot_be_read_is_named(name: str, content: bytes, tmp_path: Path) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(CorpusError) as error:
        read(tmp_path / name)
    assert str(tmp_path / name) in str(error.value)


@pytest.mark.parametrize(
    ("name", "content", "why"),
    [
        (
            "t.csv",
            b"id,text\na,alpha,more\n",
            r"a row has more or fewer cells .*2 columns, got 3\)",
        ),
        ("t.csv", b"id;text\na;x, y\n", r"more or fewer cells .* Is it separated by ';'\?"),
        ("t.csv", b"", "is empty: not even a header"),
        ("t.csv", "id,text\na,alpha\n".encode("utf-16"), "written in UTF-16"),
        ("t.csv", "id,text\na,alpha\n".encode("utf-16-le"), "written in UTF-16"),
        ("t.jsonl", '{"id": 1, "text": "a"}'.encode("utf-16"), "written in UTF-16"),
        ("t.parquet", b"", "is empty"),
        ("t.arrow", b"", "is empty"),
        ("t.jsonl", b'{"id": 1, "text": "a", "m": ["\\ud800"]}\n', "'m' hold a text that is not"),
        (
            "t.jsonl",
            b'{"id": 1, "text": "a", "m": {"k": ' + b"9" * 30 + b"}}\n",
            "'m' hold an integer too large to store",
        ),
    ],
)
def test_a_message_says_what_is_wrong_with_a_file(
    name: str, content: bytes, why: str, tmp_path: Path
) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(CorpusError, match=why) as error:
        read(tmp_path / name)
    assert "type" not in str(error.value)


@pytest.mark.parametrize(("mark", "name"), [(";", "';'"), ("\t", "tabs")])
def test_a_csv_file_with_another_separator_is_told_so(mark: str, name: str, tmp_path: Path) -> None:
    (tmp_path / "t.csv").write_text(f"id{mark}text\na{mark}alpha\n")
    with pytest.raises(SettingsError) as error:
        read(tmp_path / "t.csv")
    assert str(error.value).endswith(
        f"has no column 'id'; it has {f'id{mark}text'!r}. Is it separated by {name}? "
        "embed-once reads commas."
    )


def test_one_row_without_id_is_one_row(tmp_path: Path) -> None:
    with pytest.raises(CorpusError, match=r"1 row has no id .*, or remove this row\."):
        read(to_parquet(pa.table({"id": ["a", None], "text": ["t", "t"]}), tmp_path))


@every_file
def test_a_file_cut_short_never_looks_like_a_smaller_corpus(write: Writer, tmp_path: Path) -> None:
    table = pa.table({"id": range(5000), "n": range(5000), "text": ['long "text"\n'] * 5000})
    path = write(table, tmp_path)
    whole = path.read_bytes()
    for cut in (len(whole) - 4, len(whole) * 2 // 3, 40):
        path.write_bytes(whole[:cut])
        with pytest.raises(CorpusError) as error:
            read(path)
        assert str(path) in str(error.value)


def test_a_stream_without_end_is_refused(tmp_path: Path) -> None:
    path = to_stream(small(), tmp_path)
    path.write_bytes(path.read_bytes()[:-8])
    with pytest.raises(CorpusError, match="no end"):
        read(path)


@pytest.mark.parametrize("header", ["id,n,text", "text,n,id"])
def test_a_quote_that_is_never_closed_is_found(header: str, tmp_path: Path) -> None:
    (tmp_path / "t.csv").write_text(f'{header}\na,1,alpha\nb,2,"beta\nc,3,gamma\n')
    with pytest.raises(CorpusError, match=r"t\.csv ends within a quoted cell"):
        read(tmp_path / "t.csv")


def test_newlines_in_quotes_may_stand_where_csv_blocks_meet(tmp_path: Path) -> None:
    text = "line\n" * 200
    path = to_csv(pa.table({"id": range(10_000), "text": [text] * 10_000}), tmp_path)
    rows = read(path)
    assert [row["id"] for row in rows] == [str(row) for row in range(10_000)]
    assert {row["text"] for row in rows} == {text}


def test_a_parquet_page_that_fails_its_checksum_is_an_error(tmp_path: Path) -> None:
    path = tmp_path / "t.parquet"
    parquet.write_table(
        small(), path, use_dictionary=False, compression="none", write_page_checksum=True
    )
    path.write_bytes(path.read_bytes().replace(b"alpha", b"alphX"))
    with pytest.raises(CorpusError, match=r"t\.parquet cannot be read in full"):
        read(path)


def test_a_wrong_path_is_named(tmp_path: Path) -> None:
    with pytest.raises(SettingsError, match=r"nothing at source\.path: ") as error:
        read(tmp_path / "nowhere.parquet")
    assert str(tmp_path / "nowhere.parquet") in str(error.value)
    (tmp_path / "t.xlsx").touch()
    with pytest.raises(SettingsError, match=r"t\.xlsx is of no known kind.*\.parquet, \.csv"):
        read(tmp_path / "t.xlsx")
    with pytest.raises(SettingsError, match=r"t\.xlsx is of no known kind"):
        read(tmp_path)


def test_a_folder_without_a_table_is_no_chunks(tmp_path: Path) -> None:
    (tmp_path / "sub").mkdir()
    (tmp_path / "_SUCCESS").touch()
    notes = ReadNotes()
    assert read(tmp_path, notes, metadata=["lang"]) == []
    assert reader(tmp_path, metadata=["lang"]).metadata == []
    assert notes == ReadNotes()


def test_an_index_of_ours_is_never_its_own_source(tmp_path: Path) -> None:
    own = tmp_path / "index"
    own.mkdir()
    table = to_lance(small(), own)
    (tmp_path / "link").symlink_to(own)
    for path in (table, own, tmp_path / "link" / "t.lance"):
        source = TableReader(TableSource(kind="table", path=str(path)), [own])
        with pytest.raises(SettingsError, match=r"source\.path: .* is where the index or its"):
            _ = source.metadata
        with pytest.raises(SettingsError, match=r"source\.path: .* is where the index or its"):
            next(source.chunks(ReadNotes()))
    to_csv(small(), tmp_path, "corpus")
    source = TableReader(TableSource(kind="table", path=str(tmp_path)), [own])
    assert sum(batch.num_rows for batch in source.chunks(ReadNotes())) == 2


def test_a_folder_of_several_kinds_is_refused(tmp_path: Path) -> None:
    to_csv(small(), tmp_path, "a")
    to_parquet(small(), tmp_path, "b")
    with pytest.raises(SettingsError, match=r"one kind: .*a\.csv and .*b\.parquet"):
        read(tmp_path)


def test_a_database_is_not_a_table(tmp_path: Path) -> None:
    to_lance(small(), tmp_path, "docs")
    with pytest.raises(SettingsError, match=r"docs\.lance is a LanceDB table, which source\.path"):
        read(tmp_path)


def test_a_lancedb_table_is_read_at_one_version(tmp_path: Path) -> None:
    path = to_lance(small(), tmp_path)
    source = reader(path)
    assert sum(batch.num_rows for batch in source.chunks(ReadNotes())) == 2
    lancedb.connect(str(tmp_path)).open_table("t").add(small())
    assert sum(batch.num_rows for batch in source.chunks(ReadNotes())) == 2
    assert len(read(path)) == 4


@every_format
def test_many_rows_come_in_order_and_in_small_batches(write: Writer, tmp_path: Path) -> None:
    count = 30_000
    path = write(pa.table({"id": range(count), "text": ["t"] * count}), tmp_path)
    source = reader(path)
    for _ in range(2):
        ids = [key for part in source.chunks(ReadNotes()) for key in part.column("id").to_pylist()]
        assert ids == [str(row) for row in range(count)]
    assert len(read(path)) == count


def frame_rows(frame: pd.DataFrame, folder: Path, notes: ReadNotes, **columns: Any) -> list[Any]:
    path = folder / "frame.arrow"
    write_frame(frame, path, TableSource(kind="table", path=str(path), **columns))
    return read(path, notes, **columns)


def test_a_frame_is_read_like_a_table(tmp_path: Path) -> None:
    frame = pd.DataFrame(
        {
            "id": [1, 2, 3, 4],
            "text": pd.Series(["alpha", "\ud800", None, "delta"], dtype=object),
            "when": [pd.Timestamp("2024-01-01"), pd.NaT, pd.NaT, pd.NaT],
            "kind": pd.Categorical(["x", "y", "x", "x"]),
        }
    )
    notes = ReadNotes()
    rows = frame_rows(frame, tmp_path, notes)
    assert [(row["id"], row["text"], row["kind"]) for row in rows] == [
        ("1", "alpha", "x"),
        ("4", "delta", "x"),
    ]
    assert rows[0]["when"] == pd.Timestamp("2024-01-01")
    assert rows[1]["when"] is None
    assert notes.examples == {"text is not valid Unicode": ["2"], "blank text": ["3"]}


def test_the_index_of_a_frame_is_used_only_as_the_id(tmp_path: Path) -> None:
    frame = pd.DataFrame({"text": ["alpha", "beta"]}, index=pd.Index(["a", "b"], name="key"))
    rows = frame_rows(frame, tmp_path, ReadNotes(), id="key")
    assert [row["id"] for row in rows] == ["a", "b"]
    assert list(frame_rows(frame.assign(id=[1, 2]), tmp_path, ReadNotes())[0]) == CHUNKS.names


def test_a_frame_column_of_mixed_types_is_refused_unless_left_out(tmp_path: Path) -> None:
    frame = pd.DataFrame({"id": ["a"] * 2, "text": ["t"] * 2, "odd": [1, "\ud800"]})
    with pytest.raises(CorpusError, match="'odd' are not of one type"):
        frame_rows(frame, tmp_path, ReadNotes())
    assert len(frame_rows(frame, tmp_path, ReadNotes(), metadata=[])) == 2
    with pytest.raises(CorpusError, match="'odd' are not of one type"):
        frame_rows(frame.assign(odd=["a", 1.5]), tmp_path, ReadNotes())
    with pytest.raises(SettingsError, match="two columns named 'id'"):
        frame_rows(frame[["id", "id", "text"]], tmp_path, ReadNotes())


@pytest.mark.parametrize(
    ("columns", "why"),
    [
        ({"id": None}, "The frame has no column 'id'; it has 'text'"),
        ({"text": None}, "The frame has no column 'text'"),
        ({"id": ["a", None]}, "1 row has no id .*'id': the frame row 2"),
        ({"id": [1.5, 2.5]}, "The frame: the column 'id' holds double"),
        ({"text": [1, 2]}, "The frame: the column 'text' holds int64"),
        ({"vector": [1, 2]}, "The frame: the column 'vector' takes a name"),
        ({"m": [{}, {}]}, "The frame: the column 'm' holds struct<>"),
        ({"m": [[10**30], [1]]}, "'m' hold an integer too large"),
        ({"m": [["\ud800"], ["x"]]}, "'m' hold a text that is not valid Unicode"),
    ],
)
def test_the_faults_of_a_frame_are_told_of_the_frame(
    columns: dict[str, Any], why: str, tmp_path: Path
) -> None:
    values: dict[str, Any] = {"id": ["a", "b"], "text": ["alpha", "beta"]} | columns
    frame = pd.DataFrame({name: value for name, value in values.items() if value is not None})
    path = tmp_path / "frame.arrow"
    with pytest.raises((SettingsError, CorpusError), match=why) as error:
        write_frame(frame, path, TableSource(kind="table", path="elsewhere"))
    assert str(tmp_path) not in str(error.value)


def test_importing_the_reader_loads_no_heavy_library() -> None:
    code = (
        "import sys, tasks.read.tables, tasks.read.frames\n"
        "print([m for m in ('pandas', 'lancedb', 'pyarrow.dataset') if m in sys.modules])"
    )
    root = Path(__file__).parents[1]
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=root, capture_output=True, text=True, check=True
    )
    assert done.stdout.strip() == "[]"


some_text = st.text(st.characters(exclude_categories=["Cs"]), max_size=8)
some_rows = st.lists(
    st.tuples(
        some_text.filter(bool), st.none() | some_text, st.none() | st.integers(-(2**53), 2**53)
    ),
    max_size=8,
)


@every_format
@given(rows=some_rows)
@settings(max_examples=30, deadline=None)
def test_any_table_comes_back_with_its_ids_and_texts(
    write: Writer, rows: list[tuple[str, str | None, int | None]]
) -> None:
    table = pa.table(
        {
            "id": pa.array([row[0] for row in rows], pa.utf8()),
            "text": pa.array([row[1] for row in rows], pa.utf8()),
            "n": pa.array([row[2] for row in rows], pa.int64()),
        }
    )
    notes = ReadNotes()
    with tempfile.TemporaryDirectory() as folder:
        found = read(write(table, Path(folder)), notes)
    kept = [row for row in rows if row[1] is not None and row[1].strip()]
    if write is to_csv:  # it cannot tell an empty cell from a missing one
        found = [row | {"n": int(row["n"]) if row["n"] else None} for row in found]
    assert [(row["id"], row["text"], row["n"]) for row in found] == kept
    assert notes.skipped.total() == len(rows) - len(kept)


def test_what_is_read_of_a_parquet_file_is_not_held_to_its_end(tmp_path: Path) -> None:
    random = Random(7)
    texts = [random.randbytes(400).hex() for _ in range(80_000)]
    table = pa.table({"id": [str(number) for number in range(80_000)], "text": texts})
    parquet.write_table(table, tmp_path / "t.parquet", row_group_size=2000, use_dictionary=False)
    size = table.nbytes
    del table, texts
    before, most = pa.total_allocated_bytes(), 0
    for _ in reader(tmp_path / "t.parquet").chunks(ReadNotes()):
        most = max(most, pa.total_allocated_bytes() - before)
    assert most < size / 4
