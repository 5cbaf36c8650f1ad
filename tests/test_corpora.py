"""Corpora that hurt: a clear outcome, and neither time nor memory that runs away."""

import json
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
from pyarrow import parquet

from tasks.compare import Held, compare, tally
from tasks.errors import CorpusError, SettingsError
from tasks.fingerprint import NAMED, fingerprint
from tasks.index import open_index
from tasks.params import Config, FilesSource, Split, TableSource
from tasks.providers.lexical import Lexical
from tasks.read import ReadNotes
from tasks.read.files import ROWS, FilesReader
from tasks.read.portions import BATCH_BYTES
from tasks.read.tables import TableReader
from tasks.read.tree import CHANGED
from tasks.schemas import CHANGES, DELETIONS, INDEXED, KEYED, TableRef

LONG_ENOUGH = "A sentence that fills a chunk well enough, all of it to the end.\n" * (ROWS + 1)
"""So many chunks that a first batch is full: what follows has been listed, but not read."""
PEAK_OF_READING = """
import sys
from tasks.params import TableSource
from tasks.read import ReadNotes
from tasks.read.tables import TableReader
rows = 0
for batch in TableReader(TableSource(kind="table", path=sys.argv[1])).chunks(ReadNotes()):
    assert batch.num_rows == 1 or batch.nbytes < 40_000_000, batch.nbytes
    rows += batch.num_rows
for line in open("/proc/self/status"):
    if line.startswith("VmHWM:"):
        print(rows, int(line.split()[1]) * 1024)
"""


@contextmanager
def seconds_of_work(most: float) -> Iterator[None]:
    """The block takes at most so many seconds of this process' CPU."""
    started = time.process_time()
    yield
    assert time.process_time() - started < most


def files_in(root: Path, **settings: Any) -> FilesReader:
    return FilesReader(FilesSource.model_validate({"kind": "files", "path": str(root), **settings}))


def table_at(path: Path, **settings: Any) -> TableReader:
    return TableReader(TableSource(kind="table", path=str(path), **settings))


def texts_of(config: Config) -> dict[str, str]:
    """The rows that readers see, by document."""
    table = open_index(config.index)
    assert table is not None
    rows = table.search().select(["document", "text"]).to_list()
    return {row["document"]: row["text"] for row in rows}


@pytest.fixture
def notebook(tmp_path: Path) -> Config:
    """The config of an index of the files below `corpus`."""
    (tmp_path / "corpus").mkdir()
    return Config.model_validate(
        {
            "name": "t",
            "source": {"kind": "files", "path": str(tmp_path / "corpus")},
            "embedding": {"provider": "lexical", "dimension": 256},
            "index": {
                "uri": str(tmp_path / "index"),
                "table": "t",
                "max_deleted_fraction": 1.0,
            },
            "state": {"uri": str(tmp_path / "state")},
        }
    )


# Many of a kind


def test_the_chunks_of_one_text_under_other_names_move_without_quadratic_time(
    fresh: Callable[[], Path],
) -> None:
    count, folder = 400_000, fresh()
    hashes = np.zeros((2 * count, 2), np.uint64)
    hashes[:, 0] = np.arange(2 * count)

    def column(rows: Any) -> pa.Array:
        return pa.Array.from_buffers(
            pa.binary(16), len(rows), [None, pa.py_buffer(np.ascontiguousarray(rows))]
        )

    def table(schema: pa.Schema, own: Any) -> TableRef:
        same = column(np.zeros((count, 2), np.uint64))
        lines = pa.nulls(count, pa.int32())
        columns: dict[str, Any] = {
            "id": pa.array(map(str, own[:, 0].tolist())),
            "document": pa.array(map(str, own[:, 0].tolist())),
            "key": column(own),
            "document_key": column(own),
            "text_hash": same,
            "row_hash": column(own),
            "start_line": lines,
            "end_line": lines,
            "tokens": pa.array(np.ones(count, np.int32)),
        }
        batch = pa.record_batch([columns[name] for name in schema.names], schema=schema)
        return TableRef.write(folder / f"{len(schema)}.arrow", schema, [batch])

    corpus, index = table(KEYED, hashes[:count]), table(INDEXED, hashes[count:])
    with seconds_of_work(8):
        found = compare(corpus, index, "files", Held(), folder)
        counts = tally(found.changes.load(CHANGES), found.deletions.load(DELETIONS))
    assert counts == {"moved": count, "deleted": 0}
    assert found.unique_texts == 1


def test_many_unread_documents_are_held_without_quadratic_time() -> None:
    names = [f"folder-{number}/note.md" for number in range(20_000)]
    held = Held((*names[::2], "shut/"))
    with seconds_of_work(5):
        assert sum(map(held.covers, names)) == len(names) // 2
    assert held.covers("shut/deep/a.md")


def test_many_repeated_ids_are_counted_and_a_few_of_them_named(
    tmp_path: Path, lexical: Lexical, memory_reader: type[Any]
) -> None:
    rows = [(str(number // 2), None, "x", None) for number in range(2000)]
    with pytest.raises(CorpusError, match=r"1,000 ids stand more than once .* '4', …") as caught:
        fingerprint(memory_reader([rows]), lexical, tmp_path / "keyed.arrow")
    assert len(caught.value.facts["ids"]) == NAMED


# A folder that changes while it is read


def test_what_changes_after_it_was_listed_is_noted_and_its_rows_kept(tmp_path: Path) -> None:
    names = ["emptied.txt", "folder.txt", "gone.txt", "good.txt", "pipe.txt", "sub/a.txt"]
    (tmp_path / "sub").mkdir()
    (tmp_path / "a.txt").write_text(LONG_ENOUGH)
    for name in names:
        (tmp_path / name).write_text("alpha")
    notes = ReadNotes()
    batches = files_in(tmp_path, split=Split(max_tokens=17, overlap_tokens=0)).chunks(notes)
    assert next(batches).num_rows == ROWS
    for name in ("folder.txt", "gone.txt", "pipe.txt"):
        (tmp_path / name).unlink()
    (tmp_path / "folder.txt").mkdir()
    os.mkfifo(tmp_path / "pipe.txt")
    (tmp_path / "emptied.txt").write_text("")
    shutil.rmtree(tmp_path / "sub")
    (tmp_path / "new.txt").write_text("beta")
    last = pa.Table.from_batches(batches)
    assert set(last.column("document").to_pylist()) == {"a.txt", "good.txt"}
    assert notes.skipped == {CHANGED: 4, "empty file": 1}
    assert notes.unread == ["folder.txt", "gone.txt", "pipe.txt", "sub/"]
    assert notes.failed == 4


def test_what_changes_between_the_passes_keeps_its_rows_until_the_next_run(
    notebook: Config, reindex: Callable[..., Any]
) -> None:
    root = Path(notebook.source.path)
    names = ["folder.txt", "gone.txt", "good.txt", "pipe.txt", "short.txt"]
    for name in names:
        (root / name).write_text(f"before {name}")
    reindex(notebook)
    for name in names:
        (root / name).write_text(f"after {name}, and more of it")

    def meanwhile() -> None:
        for name in ("folder.txt", "gone.txt", "pipe.txt"):
            (root / name).unlink()
        (root / "folder.txt").mkdir()
        (root / "folder.txt" / "a.txt").write_text("inside")
        os.mkfifo(root / "pipe.txt")
        (root / "short.txt").write_text("after")
        (root / "new.txt").write_text("new")

    ran = reindex(notebook, before_second_pass=meanwhile)
    assert ran.sent == ["after good.txt, and more of it"]
    assert texts_of(notebook) == {name: f"before {name}" for name in names} | {
        "good.txt": "after good.txt, and more of it"
    }
    assert ran.published.rows == len(names)
    reindex(notebook)
    assert texts_of(notebook) == {
        "folder.txt/a.txt": "inside",
        "good.txt": "after good.txt, and more of it",
        "new.txt": "new",
        "short.txt": "after",
    }


def test_a_table_with_other_columns_in_the_second_pass_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "t.parquet"
    parquet.write_table(pa.table({"id": ["a"], "text": ["alpha"], "lang": ["en"]}), path)
    reader = table_at(path)
    assert len(list(reader.chunks(ReadNotes()))) == 1
    parquet.write_table(pa.table({"id": ["a"], "text": ["alpha"]}), path)
    with pytest.raises(CorpusError, match=r"t\.parquet cannot be read in full: .*lang"):
        list(reader.chunks(ReadNotes()))


def test_an_arrow_file_that_becomes_shorter_is_refused_and_kills_nobody(tmp_path: Path) -> None:
    path = tmp_path / "t.arrow"
    table = pa.table({"id": pa.array(range(60_000)), "text": ["alpha " * 40] * 60_000})
    with pa.ipc.new_file(str(path), table.schema) as writer:
        writer.write_table(table)
    code = f"""
import os
from tasks.params import TableSource
from tasks.read import ReadNotes
from tasks.read.tables import TableReader
batches = TableReader(TableSource(kind="table", path={str(path)!r})).chunks(ReadNotes())
next(batches)
os.truncate({str(path)!r}, 1_000_000)
list(batches)
"""
    done = subprocess.run([sys.executable, "-c", code], check=False, capture_output=True, text=True)
    assert done.returncode == 1
    assert "t.arrow became shorter while it was read" in done.stderr


# Links, pipes and names


def test_a_table_is_never_waited_for_at_a_pipe(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_text('{"id": 1, "text": "x"}')
    for name in ("b.jsonl", "c.parquet", "d.csv", "e.arrow"):
        os.mkfifo(tmp_path / name)
        with pytest.raises(CorpusError, match=f"{name} is neither a file nor a folder"):
            list(table_at(tmp_path / name).chunks(ReadNotes()))
    for name in ("c.parquet", "d.csv", "e.arrow"):
        (tmp_path / name).unlink()
    with pytest.raises(CorpusError, match=r"b\.jsonl is neither a file nor a folder"):
        list(table_at(tmp_path).chunks(ReadNotes()))


def test_loops_of_links_in_a_folder_of_tables_are_walked_once_or_refused(tmp_path: Path) -> None:
    ours = [tmp_path / "ours"]
    (tmp_path / "t" / "sub").mkdir(parents=True)
    (tmp_path / "t" / "sub" / "a.jsonl").write_text('{"id": 1, "text": "x"}')
    (tmp_path / "t" / "sub" / "up").symlink_to("..")
    source = TableSource(kind="table", path=str(tmp_path / "t"))
    assert len(list(TableReader(source, ours).chunks(ReadNotes()))) == 1
    (tmp_path / "t" / "loop.jsonl").symlink_to("loop.jsonl")
    with pytest.raises(CorpusError, match=r"loop\.jsonl cannot be read in full: Too many"):
        list(TableReader(source, ours).chunks(ReadNotes()))


@pytest.mark.skipif(sys.platform != "linux", reason="other file systems refuse such names")
def test_a_table_whose_name_is_not_utf8_is_refused_in_words_that_can_be_written(
    tmp_path: Path,
) -> None:
    Path(os.fsdecode(os.fsencode(tmp_path) + b"/\xff.jsonl")).write_text('{"id": 1, "text": "x"}')
    with pytest.raises(SettingsError, match="\ufffd\\.jsonl: this name is not UTF-8") as caught:
        list(table_at(tmp_path).chunks(ReadNotes()))
    str(caught.value).encode()


def test_patterns_read_names_with_line_feeds_to_their_end(tmp_path: Path) -> None:
    names = ["a\nb.txt", "new\nline/c.txt", "docs/d\ne.txt", "secret.txt", "secret.txt\n"]
    for name in names:
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text("x")

    def found(**settings: Any) -> list[str]:
        batches = files_in(tmp_path, **settings).chunks(ReadNotes())
        return [row["document"] for batch in batches for row in batch.to_pylist()]

    assert found() == sorted(names)
    assert found(include=["**/*.txt"]) == sorted(names[:-1])
    assert found(include=["docs/", "new*/"]) == ["docs/d\ne.txt", "new\nline/c.txt"]
    assert found(exclude=["secret.txt"]) == sorted({*names} - {"secret.txt"})
    (tmp_path / ".gitignore").write_text("secret.txt\n*line/\n.gitignore\n")
    assert found() == ["a\nb.txt", "docs/d\ne.txt", "secret.txt\n"]


def test_odd_names_are_indexed_found_and_left_like_any_other(
    notebook: Config, reindex: Callable[..., Any]
) -> None:
    root = Path(notebook.source.path)
    names = [
        "a\nb.txt",
        'it\'s "1".txt',
        "\x1b[31mred.txt",
        "tab\there/x\r.txt",
        "ü.txt",
        "u\u0308.txt",
    ]
    for name in names:
        (root / name).parent.mkdir(exist_ok=True)
        (root / name).write_text(f"text of {name!r}")
    reindex(notebook)
    assert texts_of(notebook) == {name: f"text of {name!r}" for name in names}
    for name in names[:3]:
        (root / name).unlink()
    assert reindex(notebook).sent == []
    assert sorted(texts_of(notebook)) == sorted(names[3:])


# Size


@pytest.mark.parametrize("kind", ["parquet", "jsonl", "arrow"])
def test_long_texts_come_in_smaller_batches(kind: str, tmp_path: Path) -> None:
    count = 20 * BATCH_BYTES // 10_000_000
    texts = [f"{number} " + "lorem ipsum " * 80_000 for number in range(count)]
    table = pa.table({"id": pa.array(range(count)), "text": texts})
    path = tmp_path / f"t.{kind}"
    if kind == "parquet":
        parquet.write_table(table, path, compression="none")
    elif kind == "arrow":
        with pa.ipc.new_file(str(path), table.schema) as writer:
            writer.write_table(table)
    else:
        path.write_text("".join(json.dumps(row) + "\n" for row in table.to_pylist()))
    batches = list(table_at(path).chunks(ReadNotes()))
    assert pa.Table.from_batches(batches).column("text").to_pylist() == texts
    assert all(batch.nbytes < 1.2 * BATCH_BYTES for batch in batches)


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="reads its peak from /proc")
@pytest.mark.parametrize(("kind", "size"), [("jsonl", 100_000), ("jsonl", 1000), ("parquet", 1000)])
def test_a_large_file_is_read_in_flat_memory(kind: str, size: int, tmp_path: Path) -> None:
    """One row group, one file: the peak at 240 MB beside that at 120 MB."""
    peaks = {}
    random = np.random.default_rng(7)
    for megabytes in (120, 240):
        count, path = megabytes * 1_000_000 // size, tmp_path / f"t{megabytes}.{kind}"
        texts = (random.bytes(size // 2).hex() for _ in range(count))
        if kind == "jsonl":
            with path.open("w") as file:
                file.writelines(
                    json.dumps({"id": number, "text": text}) + "\n"
                    for number, text in enumerate(texts)
                )
        else:
            table = pa.table({"id": pa.array(range(count)), "text": pa.array(texts, pa.utf8())})
            parquet.write_table(table, path, row_group_size=count)
        done = subprocess.run(
            [sys.executable, "-c", PEAK_OF_READING, str(path)],
            check=True,
            capture_output=True,
            text=True,
        )
        rows, peaks[megabytes] = map(int, done.stdout.split())
        assert rows == count
    assert peaks[240] < 1.1 * peaks[120], peaks
