"""A corpus in an object store: what a folder would give, and never a deletion by mistake."""

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any
from urllib.parse import quote

import lancedb
import obstore
import pyarrow as pa
import pytest
import requests
from pyarrow import csv, parquet

from tasks.errors import CorpusError, SettingsError
from tasks.params import FilesSource, TableSource
from tasks.read import ReadNotes, formats
from tasks.read import bucket as buckets
from tasks.read.files import FilesReader
from tasks.read.tables import TableReader
from tasks.storage import objects, storage_at

pytestmark = pytest.mark.slow


def put(uri: str, files: dict[str, str | bytes]) -> None:
    """Objects by their names, which need not be such as obstore would write."""
    name, _, prefix = uri.removeprefix("s3://").partition("/")
    for key, content in files.items():
        data = content.encode() if isinstance(content, str) else content
        way = f"{prefix}/{key}" if prefix else key
        quoted = quote(way, safe="/")
        request = requests.Request("PUT", "http://host", data=data).prepare()
        request.url = (
            f"{os.environ['AWS_ENDPOINT_URL']}/{name}/{quoted}"  # as it stands: `//` is a key too
        )
        requests.Session().send(request, timeout=10).raise_for_status()


def files_reader(
    path: str, skip: tuple[str, ...] = (), narrow: str | None = None, **more: Any
) -> FilesReader:
    source = FilesSource.model_validate({"kind": "files", "path": path, **more})
    return FilesReader(source, skip, narrow)


def texts(reader: FilesReader, notes: ReadNotes | None = None) -> dict[str, str]:
    found: dict[str, str] = {}
    for batch in reader.chunks(notes or ReadNotes()):
        for row in batch.to_pylist():
            found[row["document"]] = found.get(row["document"], "") + row["text"]
    return found


FOLDER: dict[str, str | bytes] = {
    "z.txt": "last",
    ".gitignore": "*.tmp\nbuild/\n!keep.tmp\n",
    "-early/.gitignore": "mine.txt\n",
    "-early/+before.txt": "before its ignore file",
    "-early/mine.txt": "ignored",
    "-early/.github/x.txt": "also before",
    "a.txt": "alpha",
    "a-b.txt": "a-b",
    "a/b.txt": "below a",
    "a/x.tmp": "ignored",
    "a/keep.tmp": "kept",
    "build/out.txt": "ignored",
    "guides/api/one.md": "# One\n",
    "guides/api.md": "# Api\n",
    "guides/.gitignore": "two.md\n",
    "guides/api/two.md": "# Two\n",
    "guides/api/deep/three.md": "# Three\n",
    ".git/config": "ignored",
    "sub/.git/x": "ignored",
    "empty.txt": "",
    "binary": b"\0\1",
    "Größe mit %20 + & #?.txt": "named",
}


@pytest.fixture
def both(s3: str, bucket: str, tmp_path: Path) -> Callable[..., tuple[FilesReader, FilesReader]]:
    """The same documents on the disk and in a bucket, and who reads them."""
    for name, text in FOLDER.items():
        path = tmp_path / "corpus" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(text.encode() if isinstance(text, str) else text)
    put(f"{bucket}/pre/fix", FOLDER)
    put(bucket, {"pre/fix-not": "not ours", "pre/fiz": "not ours"})

    def make(**settings: Any) -> tuple[FilesReader, FilesReader]:
        return (
            files_reader(str(tmp_path / "corpus"), **settings),
            files_reader(f"{bucket}/pre/fix", **settings),
        )

    return make


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"include": ["*.md", "a/"]},
        {"exclude": ["guides/", "a-*"]},
        {"respect_gitignore": False},
        {"narrow": "guides/api"},
        {"narrow": "guides/api/one.md"},
        {"narrow": "guides/api/two.md"},
        {"narrow": "./-early/"},
        {"narrow": "build"},
    ],
    ids=str,
)
def test_a_bucket_gives_the_documents_that_a_folder_gives(
    both: Callable[..., tuple[FilesReader, FilesReader]], settings: dict[str, Any]
) -> None:
    disk, stored = both(**settings)
    disk_notes, stored_notes = ReadNotes(), ReadNotes()
    expected = texts(disk, disk_notes)
    found = texts(stored, stored_notes)
    assert list(found.items()) == list(expected.items())
    assert stored_notes == disk_notes
    assert bool(expected) == (settings.get("narrow") not in {"build", "guides/api/two.md"})


def test_a_single_object_is_a_corpus_too(bucket: str) -> None:
    put(bucket, {"a/b.txt": "alpha", "a/b.txt.old": "no"})
    assert texts(files_reader(f"{bucket}/a/b.txt")) == {"b.txt": "alpha"}
    assert texts(files_reader(bucket)) == {"a/b.txt": "alpha", "a/b.txt.old": "no"}
    with pytest.raises(SettingsError, match=r"narrow: there is no 'x' below source.path \(s3:"):
        files_reader(f"{bucket}/a", narrow="x").chunks(ReadNotes())


def test_an_object_that_stands_for_a_folder_is_no_document(bucket: str) -> None:
    put(bucket, {"d/": b"", "d/sub/": b"", "d/sub/a.txt": "a", "d/sub-x.txt": "x", "d/alone/": b""})
    notes = ReadNotes()
    assert list(texts(files_reader(f"{bucket}/d"), notes)) == ["sub-x.txt", "sub/a.txt"]
    assert not notes.skipped
    put(bucket, {"none/": b""})
    assert texts(files_reader(f"{bucket}/none")) == {}  # an empty folder, as on a disk


def test_more_objects_than_a_page_holds_come_in_order(bucket: str) -> None:
    names = [f"{number % 7}/{number:05}.txt" for number in range(45)]
    store = objects.open_store(bucket)
    for name in names:
        obstore.put(store, name, b"text of " + name.encode())
    found = texts(files_reader(bucket))
    assert list(found) == sorted(names)
    assert all(text == f"text of {name}" for name, text in found.items())


@pytest.mark.parametrize("odd", ["a//b.txt", "a/../up.txt", "a/./x.txt", "a/tab\there.txt"])
def test_a_key_that_is_no_path_spoils_its_own_folder_only(bucket: str, odd: str) -> None:
    put(bucket, {"c/a/one.txt": "1", f"c/{odd}": "odd", "c/b/two.txt": "2", "c/0.txt": "0"})
    notes = ReadNotes()
    assert list(texts(files_reader(f"{bucket}/c"), notes)) == ["0.txt", "b/two.txt"]
    assert (notes.unread, notes.failed) == (["a/"], 1)
    with pytest.raises(SettingsError, match=r"source\.path: .*/c/a cannot be listed.*no path"):
        texts(files_reader(f"{bucket}/c/a"))


@pytest.mark.slow
def test_what_was_listed_of_a_folder_before_an_odd_key_is_read(bucket: str) -> None:
    many = {f"c/x/a{number:04}.txt": str(number) for number in range(1100)}  # a page is 1,000
    put(bucket, {**many, "c/x/b\x01.txt": "odd", "c/z.txt": "z"})
    notes = ReadNotes()
    read = list(texts(files_reader(f"{bucket}/c"), notes))
    assert (read[0], read[-1], notes.unread) == ("x/a0000.txt", "z.txt", ["x/"])
    assert len(set(read)) == len(read) > 1000


def test_an_object_and_a_folder_of_one_name_are_read_once(bucket: str) -> None:
    put(bucket, {"c/notes": "n", "c/notes.md": "m", "c/notes/": "", "c/notes/a": "a", "c/z": "z"})
    read = texts(files_reader(f"{bucket}/c", include=["**"]))
    assert read == {"notes": "n", "notes.md": "m", "notes/a": "a", "z": "z"}


def test_our_own_places_are_not_read(bucket: str) -> None:
    put(bucket, {"c/a.txt": "a", "c/index/t.lance/x.txt": "no", "c/index-of.txt": "yes"})
    own = (f"{bucket}/c/index", f"{bucket}/c/state")
    assert list(texts(files_reader(f"{bucket}/c", own))) == ["a.txt", "index-of.txt"]
    for path in ("c/index", "c/index/t.lance"):
        with pytest.raises(SettingsError, match="where the index or its state is kept"):
            files_reader(f"{bucket}/{path}", own).chunks(ReadNotes())


def test_only_so_much_is_read_ahead(bucket: str, monkeypatch: pytest.MonkeyPatch) -> None:
    put(bucket, {f"{number}.txt": "x" * 100 for number in range(9)})
    asked = list[str]()
    read = buckets.Bucket.read

    def noted(self: buckets.Bucket, name: str) -> bytes:
        asked.append(name)
        return read(self, name)

    monkeypatch.setattr(buckets.Bucket, "read", noted)
    place = buckets.Bucket(bucket)
    monkeypatch.setattr(buckets, "AHEAD_BYTES", 300)
    contents = place.contents(place.objects(), ReadNotes(), None)
    next(contents)
    assert len(asked) == 3
    monkeypatch.setattr(buckets, "AHEAD", 2)
    monkeypatch.setattr(buckets, "AHEAD_BYTES", 1 << 20)
    asked.clear()
    contents = place.contents(place.objects(), ReadNotes(), lambda name: name != "1.txt")
    assert next(contents)[0] == "0.txt"
    assert len(asked) == 2
    assert [name for name, _ in contents] == [f"{number}.txt" for number in range(2, 9)]


# Tables

ROWS = pa.table(
    {
        "id": [f"row-{number}" for number in range(20_000)],
        "text": [f"text {number} ü" for number in range(20_000)],
        "lang": ["en", "de"] * 10_000,
    }
)


def write_csv(table: pa.Table, path: Path) -> None:
    csv.write_csv(table, path)


def write_lines(table: pa.Table, path: Path) -> None:
    path.write_text("".join(f"{json.dumps(row)}\n" for row in table.to_pylist()))


def write_arrow(table: pa.Table, path: Path) -> None:
    with pa.ipc.new_file(str(path), table.schema) as writer:
        writer.write_table(table, max_chunksize=3000)


def write_stream(table: pa.Table, path: Path) -> None:
    with pa.ipc.new_stream(str(path), table.schema) as writer:
        writer.write_table(table, max_chunksize=3000)


def write_parquet(table: pa.Table, path: Path) -> None:
    parquet.write_table(table, path, row_group_size=7000)


WRITERS = {
    "t.csv": write_csv,
    "t.jsonl": write_lines,
    "t.arrow": write_arrow,
    "t.ipc": write_stream,
    "t.parquet": write_parquet,
}


def table_reader(path: str, skip: tuple[str, ...] = (), **columns: Any) -> TableReader:
    return TableReader(TableSource.model_validate({"kind": "table", "path": path, **columns}), skip)


def rows_of(reader: TableReader, columns: tuple[str, ...] = ("id", "text", "lang")) -> pa.Table:
    schema = pa.schema([(name, pa.utf8()) for name in columns])
    found = pa.Table.from_batches(reader.chunks(ReadNotes()))
    return found.select(list(columns)).cast(schema).combine_chunks()


@pytest.mark.parametrize("name", WRITERS)
def test_a_file_of_a_table_is_read_as_on_a_disk(bucket: str, tmp_path: Path, name: str) -> None:
    WRITERS[name](ROWS, tmp_path / name)
    put(bucket, {f"tables/{name}": (tmp_path / name).read_bytes()})
    assert rows_of(table_reader(f"{bucket}/tables/{name}")) == ROWS
    some = table_reader(f"{bucket}/tables/{name}", metadata=[])
    assert rows_of(some, ("id", "text")) == ROWS.select(["id", "text"])


def test_a_lancedb_table_in_a_bucket_is_a_corpus(bucket: str) -> None:
    lancedb.connect(f"{bucket}/db").create_table("t", ROWS)
    found = rows_of(table_reader(f"{bucket}/db/t.lance"))
    assert found.sort_by("id") == ROWS.sort_by("id")
    with pytest.raises(SettingsError, match=r"db/t\.lance is a LanceDB table.*must name itself"):
        rows_of(table_reader(f"{bucket}/db"))
    with pytest.raises(SettingsError, match="where the index or its state is kept"):
        rows_of(table_reader(f"{bucket}/db/t.lance", (f"{bucket}/db/t.lance",)))


def test_a_folder_of_tables_is_read_in_order_less_what_is_hidden_or_ours(bucket: str) -> None:
    lines = {name: json.dumps({"id": name, "text": name}) for name in ("b/2", "a/1", "b-/0")}
    put(f"{bucket}/t", {f"{name}.jsonl": line for name, line in lines.items()})
    put(f"{bucket}/t", {"_meta/x.json": "no", ".x/y.txt": "no", "state/z.arrow": "no", "old/": b""})
    reader = table_reader(f"{bucket}/t", (f"{bucket}/t/state",))
    assert rows_of(reader, ("id",)).column("id").to_pylist() == ["a/1", "b-/0", "b/2"]
    put(f"{bucket}/t", {"c.csv": "id,text\n1,x\n"})
    with pytest.raises(SettingsError, match=r"must hold files of one kind: .*/t/a/1\.jsonl and"):
        rows_of(table_reader(f"{bucket}/t", (f"{bucket}/t/state",)))
    put(f"{bucket}/t", {"b//odd.jsonl": "{}"})
    with pytest.raises(CorpusError, match=r"/t/b/ cannot be listed.*read in part"):
        rows_of(table_reader(f"{bucket}/t", (f"{bucket}/t/state",)))


@pytest.mark.parametrize("name", WRITERS)
def test_a_file_that_changes_while_it_is_read_is_no_corpus(
    bucket: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    monkeypatch.setattr(buckets, "RANGE_BYTES", 1 << 16)
    monkeypatch.setattr(formats, "BLOCK_BYTES", 1 << 16)
    WRITERS[name](ROWS, tmp_path / name)
    put(bucket, {name: (tmp_path / name).read_bytes()})
    chunks = table_reader(f"{bucket}/{name}").chunks(ReadNotes())
    next(chunks)
    WRITERS[name](ROWS.slice(1), tmp_path / name)
    storage_at(bucket).write(name, (tmp_path / name).read_bytes())
    with pytest.raises(CorpusError, match=rf"{name} cannot be read in full: it was changed while"):
        list(chunks)


def test_a_parquet_file_is_asked_for_by_columns_and_in_steps(
    bucket: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    noise = pa.array([os.urandom(600).hex() for _ in range(10_000)])
    table = pa.table({"id": ROWS["id"][:10_000], "text": noise, "other": noise})
    parquet.write_table(table, tmp_path / "t.parquet", compression="none", use_dictionary=False)
    data = (tmp_path / "t.parquet").read_bytes()
    put(bucket, {"t.parquet": data})
    sizes = list[int]()
    ranged = buckets.Bucket.range

    def noted(self: buckets.Bucket, name: str, start: int, end: int, e_tag: str | None) -> bytes:
        sizes.append(end - start)
        return ranged(self, name, start, end, e_tag)

    monkeypatch.setattr(buckets.Bucket, "range", noted)
    reader = table_reader(f"{bucket}/t.parquet", metadata=[])
    assert rows_of(reader, ("id", "text")) == table.select(["id", "text"])
    assert max(sizes) < 6 << 20 < len(data) // 2
    assert sum(sizes) < len(data) * 0.6
    assert len(sizes) < 20


@pytest.mark.parametrize("name", ["t.parquet", "t.csv", "t.jsonl", "t.arrow"])
def test_a_file_that_holds_nothing_is_said(bucket: str, name: str) -> None:
    put(bucket, {name: b""})
    reader = table_reader(f"{bucket}/{name}")
    if name == "t.jsonl":
        assert not list(reader.chunks(ReadNotes()))
    else:
        with pytest.raises(CorpusError, match=rf"{bucket}/{name} is empty"):
            list(reader.chunks(ReadNotes()))
