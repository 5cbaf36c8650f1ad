"""Files: a folder of text, Markdown and code becomes chunks, one document at a time."""

import os
import stat
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any

import pyarrow as pa

from tasks.errors import SettingsError
from tasks.params import FilesSource
from tasks.read import ReadNotes, Wanted
from tasks.read.decode import decode
from tasks.read.split import Piece, Splitter
from tasks.read.tree import Tree
from tasks.schemas import CHUNKS

ROWS = 2000
"""Most rows of a batch."""


@dataclass(frozen=True)
class FilesReader:
    """Reads the corpus that `source` describes.

    Attributes:
        source: Section `source` of a config.
        skip_paths: Our own files and folders; never read, even inside the source.
        narrow: Only this file or folder below `source.path`, a POSIX path.
    """

    source: FilesSource
    skip_paths: Sequence[Path] = ()
    narrow: str | None = None

    @property
    def splitter(self) -> str:
        """Version of what cuts documents into chunks."""
        return Splitter(self.source.split).version

    @property
    def metadata(self) -> "list[pa.Field[Any]]":
        """Files have no columns of their own."""
        return []

    def chunks(self, notes: ReadNotes, wanted: Wanted | None = None) -> Iterator[pa.RecordBatch]:
        """The chunks of all documents, or of those that are `wanted`, in the order of names.

        A document that cannot be read is no error: it is noted, and the rest goes on.

        Yields:
            Batches of CHUNKS without ids, at most ROWS rows each.

        Raises:
            SettingsError: The source or what it is narrowed to does not exist.
        """
        root, documents = self._listing(notes)
        return _batches(self._pieces(root, documents, notes, wanted))

    def _listing(self, notes: ReadNotes) -> tuple[Path, Iterable[str]]:
        """The folder that documents are named from, and their names."""
        path = Path(self.source.path).absolute()
        try:
            mode = path.stat().st_mode
            path = path.resolve()
        except (FileNotFoundError, NotADirectoryError):
            raise SettingsError(f"source.path: there is nothing at {path}.") from None
        except OSError as error:
            raise SettingsError(f"source.path: {path} cannot be read: {error.strerror}.") from None
        skip_paths = frozenset(skipped.resolve() for skipped in self.skip_paths)
        if path in skip_paths:
            raise SettingsError(
                f"source.path: {path} is where the index or its state is kept; name another one."
            )
        narrow = _narrow(path, self.narrow, is_folder=stat.S_ISDIR(mode))
        if stat.S_ISREG(mode):
            return path.parent, [path.name]
        if not stat.S_ISDIR(mode):
            raise SettingsError(f"source.path: {path} is neither a folder nor a file.")
        tree = Tree(
            path,
            self.source.include,
            self.source.exclude,
            self.source.respect_gitignore,
            skip_paths,
            narrow,
        )
        return path, tree.documents(notes)

    def _pieces(
        self, root: Path, documents: Iterable[str], notes: ReadNotes, wanted: Wanted | None
    ) -> Iterator[tuple[str, Piece]]:
        splitter = Splitter(self.source.split)
        for document in documents:
            if wanted is not None and not wanted(document):
                continue
            text = _text(root / document, document, notes)
            if text is None:
                continue
            notes.documents += 1
            for piece in splitter.pieces(document, text):
                yield document, piece


def _narrow(path: Path, narrow: str | None, *, is_folder: bool) -> str | None:
    """`narrow` without a slash too many; None where it takes nothing away."""
    if narrow is None:
        return None
    asked = PurePosixPath(narrow)
    if asked.is_absolute() or ".." in asked.parts:
        raise SettingsError(f"narrow: {narrow!r} must be a path below source.path ({path}).")
    if asked == PurePosixPath():
        return None
    if not (os.path.lexists(path / asked) if is_folder else asked.as_posix() == path.name):
        raise SettingsError(f"narrow: there is no {narrow!r} below source.path ({path}).")
    return asked.as_posix()


def _text(path: Path, document: str, notes: ReadNotes) -> str | None:
    """The document's text; None, with a note, where there is none to embed."""
    try:
        data = path.read_bytes()
    except OSError:
        notes.fail("unreadable", document)
        return None
    text = decode(data)
    if not data:
        notes.skip("empty file", document)
    elif text is None and b"\0" in data:
        notes.skip("binary file", document)
    elif text is None:
        notes.fail("unknown encoding", document)
    elif not text.strip():
        notes.skip("blank text", document)
    else:
        return text
    return None


def _batches(pieces: Iterable[tuple[str, Piece]]) -> Iterator[pa.RecordBatch]:
    rows: list[tuple[str, Piece]] = []
    for row in pieces:
        rows.append(row)
        if len(rows) == ROWS:
            yield _batch(rows)
            rows = []
    if rows:
        yield _batch(rows)


def _batch(rows: Sequence[tuple[str, Piece]]) -> pa.RecordBatch:
    columns: list[pa.Array[Any]] = [
        pa.nulls(len(rows), pa.utf8()),
        pa.array([document for document, _ in rows], pa.utf8()),
        pa.array([piece.text for _, piece in rows], pa.utf8()),
        pa.array([piece.start_line for _, piece in rows], pa.int32()),
        pa.array([piece.end_line for _, piece in rows], pa.int32()),
    ]
    return pa.RecordBatch.from_arrays(columns, schema=CHUNKS)
