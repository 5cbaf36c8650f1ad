"""Files: what is listed, what is left out, and that bad input is never an exception."""

import os
import shutil
import socket
import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

import pytest

from tasks.errors import SettingsError
from tasks.params import FilesSource, Split
from tasks.read import ReadNotes
from tasks.read.files import ROWS, FilesReader
from tasks.schemas import CHUNKS

Files = Callable[..., Path]


@pytest.fixture
def folder(tmp_path: Path) -> Files:
    """Makes files of the given names and texts below an empty folder."""

    def make(files: dict[str, str | bytes] | None = None) -> Path:
        root = tmp_path / "corpus"
        root.mkdir(exist_ok=True)
        for name, content in (files or {}).items():
            (root / name).parent.mkdir(parents=True, exist_ok=True)
            data = content.encode() if isinstance(content, str) else content
            (root / name).write_bytes(data)
        return root

    return make


def source(path: Path, **settings: object) -> FilesSource:
    return FilesSource.model_validate({"kind": "files", "path": str(path), **settings})


def read(reader: FilesReader, notes: ReadNotes | None = None) -> dict[str, str]:
    """Text of each document's chunks, in the order of reading."""
    texts: dict[str, str] = {}
    for batch in reader.chunks(notes or ReadNotes()):
        for row in batch.to_pylist():
            texts[row["document"]] = texts.get(row["document"], "") + row["text"]
    return texts


def names(path: Path, **settings: object) -> list[str]:
    return list(read(FilesReader(source(path, **settings))))


def notes_of(path: Path, **settings: object) -> ReadNotes:
    notes = ReadNotes()
    read(FilesReader(source(path, **settings)), notes)
    return notes


def test_documents_are_named_and_sorted_by_their_path_below_the_source(folder: Files) -> None:
    root = folder({"b/c.txt": "x", "b.txt": "x", "b-a.txt": "x", "a.txt": "x", "B.txt": "x"})
    found = names(root)
    assert found == ["B.txt", "a.txt", "b-a.txt", "b.txt", "b/c.txt"]
    assert found == sorted(found)


def test_a_row_has_document_text_and_lines_but_no_id_yet(folder: Files) -> None:
    root = folder({"a.txt": "\n\nfirst\nsecond\n"})
    (batch,) = FilesReader(source(root)).chunks(ReadNotes())
    assert batch.schema.equals(CHUNKS)
    assert batch.to_pylist() == [
        {
            "id": None,
            "document": "a.txt",
            "text": "first\nsecond",
            "start_line": 3,
            "end_line": 4,
        }
    ]


def test_a_single_file_is_a_source(folder: Files) -> None:
    root = folder({"a.txt": "alpha", "b.txt": "beta"})
    assert read(FilesReader(source(root / "a.txt"))) == {"a.txt": "alpha"}


def test_a_missing_source_is_refused_by_name(tmp_path: Path) -> None:
    with pytest.raises(SettingsError, match=rf"source\.path.*{tmp_path}/gone"):
        FilesReader(source(tmp_path / "gone")).chunks(ReadNotes())


def test_a_source_that_is_a_pipe_is_refused(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(SettingsError, match="neither a folder nor a file"):
        FilesReader(source(tmp_path / "pipe")).chunks(ReadNotes())


def test_an_empty_folder_has_no_chunks(folder: Files) -> None:
    assert list(FilesReader(source(folder())).chunks(ReadNotes())) == []


@pytest.mark.parametrize(
    ("include", "exclude", "found"),
    [
        (["**/*"], [], ["a.md", "a.py", "docs/b.md", "docs/old/c.md"]),
        (["*.md"], [], ["a.md", "docs/b.md", "docs/old/c.md"]),
        (["/*.md"], [], ["a.md"]),
        (["docs/"], [], ["docs/b.md", "docs/old/c.md"]),
        (["*.md", "!docs/"], [], ["a.md"]),
        (["**/*"], ["old/"], ["a.md", "a.py", "docs/b.md"]),
        (["**/*"], ["docs/*", "!docs/b.md"], ["a.md", "a.py", "docs/b.md"]),
        (["**/*.md"], ["*", "!a.*"], ["a.md"]),
    ],
)
def test_include_and_exclude_read_as_in_gitignore(
    folder: Files, include: Sequence[str], exclude: Sequence[str], found: list[str]
) -> None:
    root = folder({"a.md": "x", "a.py": "x", "docs/b.md": "x", "docs/old/c.md": "x"})
    assert names(root, include=include, exclude=exclude) == found


def test_a_pattern_that_is_none_is_refused_with_its_key(folder: Files) -> None:
    with pytest.raises(SettingsError, match=r"source\.exclude: '!' is no pattern"):
        names(folder({"a.txt": "x"}), exclude=["!"])


def test_git_ignore_files_count_at_every_level(folder: Files) -> None:
    root = folder(
        {
            ".gitignore": "*.log\r\nbuild/\r\n",
            "a.log": "x",
            "build/a.txt": "x",
            "sub/.gitignore": "!keep.log\n/own.txt\n",
            "sub/keep.log": "x",
            "sub/own.txt": "x",
            "sub/b.log": "x",
            "own.txt": "x",
        }
    )
    assert names(root) == [".gitignore", "own.txt", "sub/.gitignore", "sub/keep.log"]
    assert "build/a.txt" in names(root, respect_gitignore=False)


def test_git_ignore_files_above_the_source_count_up_to_the_repository(folder: Files) -> None:
    root = folder(
        {
            ".gitignore": "outside.txt",
            "repo/.git/info/exclude": "private.txt",
            "repo/.gitignore": "/docs/drafts\n*.tmp",
            "repo/docs/drafts/a.txt": "x",
            "repo/docs/a.tmp": "x",
            "repo/docs/private.txt": "x",
            "repo/docs/outside.txt": "x",
        }
    )
    assert names(root / "repo/docs") == ["outside.txt"]


def test_a_source_that_git_ignores_as_a_whole_is_read_when_it_is_named(folder: Files) -> None:
    root = folder({".git/HEAD": "", ".gitignore": "/data/", "data/a.txt": "x"})
    assert names(root) == [".gitignore"]
    assert names(root / "data") == ["a.txt"]


@pytest.mark.skipif(shutil.which("git") is None, reason="git is the judge here")
@pytest.mark.parametrize(
    "patterns",
    ["*\n!*/\n!*.py", "a/**\n!a/keep.md", "/*\n!/a", "a/*\n!a/b", "**/b/*.py\n!b", "*/\n!/a/"],
)
def test_what_git_ignores_is_what_git_says(folder: Files, patterns: str) -> None:
    files = ["a/keep.md", "a/x.py", "a/b/x.py", "a/b/keep.md", "b/x.py", "b/a/b/x.py", "keep.md"]
    root = folder(
        {".gitignore": patterns, "a/b/.gitignore": "!keep.md", **dict.fromkeys(files, "x")}
    )
    subprocess.run(["git", "init", "-q", str(root)], check=True)
    command = ["git", "-C", str(root), "ls-files", "--others", "--exclude-standard"]
    said = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    assert names(root) == sorted(said.splitlines())


def test_folders_of_version_control_are_never_read(folder: Files) -> None:
    root = folder({".git/a.txt": "x", "sub/.hg/a.txt": "x", "sub/.svn/a.txt": "x", "a.txt": "x"})
    assert names(root, respect_gitignore=False) == ["a.txt"]


def test_our_own_folders_are_never_read_not_even_through_a_link(folder: Files) -> None:
    root = folder({"data/index/a.txt": "x", "data/a.txt": "x"})
    (root / "link.txt").symlink_to(root / "data/index/a.txt")
    reader = FilesReader(source(root), skip_paths=[root / "data/index"])
    assert list(read(reader)) == ["data/a.txt"]


def test_a_source_that_is_our_own_folder_is_refused(folder: Files) -> None:
    root = folder({"a.txt": "x"})
    with pytest.raises(SettingsError, match=r"source\.path: .* index or its state"):
        FilesReader(source(root), skip_paths=[root]).chunks(ReadNotes())


@pytest.mark.parametrize(
    ("narrow", "found"),
    [
        ("docs", ["docs/a.txt", "docs/b/c.txt"]),
        ("docs/", ["docs/a.txt", "docs/b/c.txt"]),
        ("./docs/b", ["docs/b/c.txt"]),
        ("docs/a.txt", ["docs/a.txt"]),
        (".", ["docs-old/a.txt", "docs.txt", "docs/a.txt", "docs/b/c.txt"]),
        ("docs/ignored", []),
    ],
)
def test_a_narrow_run_sees_that_file_or_folder_only(
    folder: Files, narrow: str, found: list[str]
) -> None:
    files = ["docs/a.txt", "docs/b/c.txt", "docs-old/a.txt", "docs.txt", "docs/ignored/a.txt"]
    root = folder(dict.fromkeys(files, "x"))
    reader = FilesReader(source(root, exclude=["ignored/"]), narrow=narrow)
    assert list(read(reader)) == found


@pytest.mark.parametrize("narrow", ["gone", "../corpus", "/etc", "a.txt/b"])
def test_a_narrow_path_that_is_not_below_the_source_is_refused(folder: Files, narrow: str) -> None:
    with pytest.raises(SettingsError, match="narrow: "):
        FilesReader(source(folder({"a.txt": "x"})), narrow=narrow).chunks(ReadNotes())


def test_a_narrow_path_of_a_single_file_is_its_name(folder: Files) -> None:
    root = folder({"a.txt": "x"})
    assert list(read(FilesReader(source(root / "a.txt"), narrow="a.txt"))) == ["a.txt"]
    with pytest.raises(SettingsError, match=r"narrow: there is no 'b\.txt'"):
        FilesReader(source(root / "a.txt"), narrow="b.txt").chunks(ReadNotes())


@pytest.mark.skipif(not Path("/proc/self/mem").exists(), reason="needs /proc")
def test_a_file_that_fails_to_be_read_is_noted_and_its_rows_kept(folder: Files) -> None:
    root = folder({"a.txt": "x"})
    (root / "mem").symlink_to("/proc/self/mem")
    (root / "loop.txt").symlink_to("loop.txt")
    notes = notes_of(root)
    assert notes.skipped == {"unreadable": 2}
    assert sorted(notes.unread) == ["loop.txt", "mem"]
    assert notes.documents == 1


def test_a_folder_that_fails_to_be_listed_is_noted_and_its_rows_kept(folder: Files) -> None:
    # A loop where the ignore file should be: what is ignored there cannot be known.
    root = folder({"a.txt": "x", "sub/b.txt": "x"})
    (root / "sub/.gitignore").symlink_to(".gitignore")
    notes = notes_of(root)
    assert notes.unread == ["sub/"]
    assert notes.examples == {"unreadable": ["sub/"]}
    assert notes.documents == 1


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can become somebody else")
def test_what_permissions_forbid_is_noted_and_its_rows_kept(folder: Files) -> None:
    root = folder({"a.txt": "x", "shut.txt": "x", "shut/b.txt": "x"})
    (root / "shut.txt").chmod(0)
    (root / "shut").chmod(0)
    closed = [each for each in (root, *root.parents) if not each.stat().st_mode & 0o001]
    modes = [each.stat().st_mode for each in closed]
    for each in closed:
        each.chmod(0o755)
    child = os.fork()
    if child == 0:
        unread = None
        try:
            os.setuid(65534)
            unread = sorted(notes_of(root).unread)
        finally:  # whatever happens: these tests are the parent's
            os._exit(0 if unread == ["shut.txt", "shut/"] else 1)
    code = os.waitpid(child, 0)[1]
    for each, mode in zip(closed, modes, strict=True):
        each.chmod(mode)
    assert code == 0


def test_links_to_files_are_read_and_links_to_folders_are_not(folder: Files) -> None:
    root = folder({"a.txt": "alpha", "sub/b.txt": "x"})
    (root / "link.txt").symlink_to("a.txt")
    (root / "sub/up").symlink_to("..")
    (root / "broken.txt").symlink_to("gone.txt")
    notes = notes_of(root)
    assert names(root) == ["a.txt", "link.txt", "sub/b.txt"]
    assert notes.skipped == {"link to a folder": 1, "broken link": 1}
    assert (notes.unread, notes.failed) == (["broken.txt"], 0)


def test_pipes_and_sockets_are_never_opened(folder: Files, monkeypatch: pytest.MonkeyPatch) -> None:
    root = folder({"a.txt": "x"})
    monkeypatch.chdir(root)  # the name of a socket must be short
    os.mkfifo("pipe.txt")
    os.mkfifo(".gitignore")
    (root / "device.txt").symlink_to("/dev/zero")
    with socket.socket(socket.AF_UNIX) as server:
        server.bind("socket.txt")
        notes = notes_of(root)
    assert notes.skipped == {"special file": 4}
    assert notes.documents == 1


def test_a_name_that_is_not_utf8_is_left_out(folder: Files) -> None:
    root = folder({"a.txt": "x"})
    if sys.platform != "linux":
        pytest.skip("this file system refuses such names")
    Path(os.fsdecode(os.fsencode(root) + b"/\xff.txt")).write_text("x")
    Path(os.fsdecode(os.fsencode(root) + b"/\xfe")).mkdir()
    notes = notes_of(root)
    assert notes.skipped == {"name is not UTF-8": 2}
    assert notes.examples == {"name is not UTF-8": ["\ufffd/", "\ufffd.txt"]}


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        (b"", "empty file"),
        (b"\xef\xbb\xbf", "blank text"),
        (b" \n\t\r\n", "blank text"),
        (b"abc\0def", "binary file"),
        (b"Gr\xf6\xdfe\0und Ma\xdf", "binary file"),
        (b"\xff\xfe\x00\xd8\x00\xd8", "binary file"),
        (b"\xff\xfea\0\0\0", "binary file"),
    ],
)
def test_a_file_without_text_is_left_out_with_its_reason(
    folder: Files, content: bytes, reason: str
) -> None:
    notes = notes_of(folder({"a.txt": content, "b.txt": "x"}))
    assert notes.examples == {reason: ["a.txt"]}
    assert (notes.documents, notes.unread) == (1, [])


def test_a_file_in_no_known_encoding_counts_as_unread(folder: Files) -> None:
    notes = notes_of(folder({"a.txt": bytes(range(1, 256)) * 9, "b.txt": "x"}))
    assert notes.examples == {"unknown encoding": ["a.txt"]}
    assert (notes.documents, notes.unread, notes.failed) == (1, ["a.txt"], 1)


GERMAN = "Größe und Maße: für Bücher gäbe es hier schöne, übliche Wörter."
RUSSIAN = "Привет, мир! Это обычный русский текст, написанный для проверки."
JAPANESE = "吾輩は猫である。名前はまだ無い。どこで生れたかとんと見当がつかぬ。"


@pytest.mark.parametrize(
    ("text", "encoding"),
    [
        (GERMAN, "utf-8"),
        (GERMAN, "utf-8-sig"),
        (GERMAN, "utf-16"),
        (GERMAN, "utf-32"),
        (GERMAN, "latin-1"),
        ("naïve café", "cp1252"),
        ("He said “ok” and it costs 5 €", "cp1252"),
        (RUSSIAN, "cp1251"),
        (RUSSIAN, "koi8_r"),
        (JAPANESE, "shift_jis"),
        (JAPANESE, "euc_jp"),
        ("我们都是中国人,今天天气很好。这是一个测试文件。", "gb18030"),
        ("# plain\n" * 20_000 + JAPANESE, "shift_jis"),
    ],
)
def test_text_is_read_in_its_encoding(folder: Files, text: str, encoding: str) -> None:
    root = folder({"a.txt": text.encode(encoding)})
    notes = ReadNotes()
    found = read(FilesReader(source(root, split=Split(max_tokens=32_000))), notes)
    assert found["a.txt"].replace("\n", "").endswith(text.replace("\n", "")[-40:])
    assert not notes.skipped


def test_marks_of_big_endian_text_are_read_too(folder: Files) -> None:
    root = folder({"a.txt": b"\xfe\xff" + GERMAN.encode("utf-16-be")})
    assert read(FilesReader(source(root))) == {"a.txt": GERMAN}


def test_unwanted_documents_are_not_opened(folder: Files) -> None:
    root = folder({"a.txt": "x", "b.txt": b"\0", "c.txt": ""})
    notes = ReadNotes()
    batches = list(FilesReader(source(root)).chunks(notes, lambda document: document == "a.txt"))
    assert [batch.num_rows for batch in batches] == [1]
    assert not notes.skipped


def test_what_is_left_out_by_choice_is_not_noted(folder: Files) -> None:
    root = folder({".gitignore": "*.bin", "a.bin": b"\0", "b.dat": b"\0", "c/d.txt": ""})
    assert not notes_of(root, include=["*.txt", "*.bin"], exclude=["c"]).skipped


def test_a_second_pass_brings_the_same_rows_and_notes(folder: Files) -> None:
    root = folder({"a.txt": "alpha " * 999, "b.bin": b"\0", "sub/c.py": "x = 1", "d.txt": ""})
    reader = FilesReader(source(root))
    first, second = ReadNotes(), ReadNotes()
    assert list(reader.chunks(first)) == list(reader.chunks(second))
    assert first == second
    assert first.skipped == {"binary file": 1, "empty file": 1}


def test_batches_are_bounded_and_documents_contiguous(folder: Files) -> None:
    line = "A sentence that fills a chunk well enough, all of it to the end.\n"
    root = folder({"a.txt": line * 1500, "b.txt": line * 3000, "c.txt": line})
    small = source(root, split=Split(max_tokens=17, overlap_tokens=0))
    batches = list(FilesReader(small).chunks(ReadNotes()))
    assert [batch.num_rows for batch in batches] == [ROWS, ROWS, 501]
    documents = [row["document"] for batch in batches for row in batch.to_pylist()]
    assert documents == sorted(documents)


def test_the_reader_tells_its_splitter_and_no_metadata(tmp_path: Path) -> None:
    reader = FilesReader(source(tmp_path))
    assert reader.splitter.startswith("1/semantic-text-splitter-")
    assert reader.metadata == []
