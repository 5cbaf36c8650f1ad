"""A corpus in an object store: what a folder would give, and never a deletion by mistake."""

import json
import os
from collections.abc import Callable, Iterator
from datetime import timedelta
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Thread
from typing import Any

import lancedb
import obstore
import pyarrow as pa
import pytest
import requests
from pyarrow import csv, parquet

from tasks.errors import CorpusError, SettingsError, StorageFailed
from tasks.form import Overrides
from tasks.index import open_index
from tasks.params import Config, FilesSource, TableSource
from tasks.plan import make_plan
from tasks.read import ReadNotes, bucket as buckets
from tasks.read.files import FilesReader
from tasks.read.tables import TableReader
from tasks.storage import objects, storage_at
from tasks.survey import require_runnable

pytestmark = pytest.mark.slow


def put(uri: str, files: dict[str, str | bytes]) -> None:
    """Objects by their names, which need not be such as obstore would write."""
    name, _, prefix = uri.removeprefix("s3://").partition("/")
    for key, content in files.items():
        data = content.encode() if isinstance(content, str) else content
        way = f"{prefix}/{key}" if prefix else key
        quoted = requests.utils.quote(way, safe="/")
        request = requests.Request("PUT", "http://host", data=data).prepare()
        request.url = f"{os.environ['AWS_ENDPOINT_URL']}/{name}/{quoted}"  # as it stands: `//` is a key too
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


FOLDER = {
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
    names = [f"{number % 7}/{number:05}.txt" for number in range(120)]
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
