"""Files: a folder of text, Markdown and code becomes chunks, one document at a time."""

import os
import stat
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow as pa

from tasks.errors import SettingsError
from tasks.params import FilesSource
from tasks.prepare import PLAIN, Preparation
from tasks.read import ReadNotes, Wanted
from tasks.read.decode import decode
from tasks.read.patterns import Sieve
from tasks.read.split import Piece, Splitter, kind_of
from tasks.read.stamp import stamp_of
from tasks.read.titles import ALGORITHM, outline
from tasks.read.tree import CHANGED, Tree, contents
from tasks.schemas import CHUNKS
from tasks.storage import is_local

ROWS = 2000
"""Most rows of a batch."""
TITLE = pa.field("title", pa.utf8())
"""Headings above a chunk of Markdown, "Guide > Install"; a column only where it is asked for."""
KNOWN = {"document": pa.utf8(), TITLE.name: TITLE.type}
"""What may stand in front of a text."""


_Row = tuple[str, Piece, str | None]
"""Document, chunk and its title."""


@dataclass(frozen=True)
class FilesReader:
    """Reads the corpus that `source` describes.

    Attributes:
        source: Section `source` of a config.
        skip_paths: Our own files and folders, paths or addresses; never read, even inside the
            source.
        narrow: Only this file or folder below `source.path`, a POSIX path.
        preparation: What stands in front of the texts, of KNOWN.
    """

    source: FilesSource
    skip_paths: Sequence[str | Path] = ()
    narrow: str | None = None
    preparation: Preparation = PLAIN

    def __post_init__(self) -> None:
        """Refuse to put in front of a text what files do not have."""
        self.preparation.require(KNOWN, "a source of files")

    @property
    def splitter(self) -> str:
        """Version of what cuts documents into chunks, and of what names their places if asked."""
        version = Splitter(self.source.split).version
        return f"{version}/titles-{ALGORITHM}" if self.metadata else version

    @property
    def metadata(self) -> "list[pa.Field[Any]]":
        """Files have no columns of their own, but TITLE where it stands in front of texts."""
        return [TITLE] if TITLE.name in self.preparation.names else []

    def chunks(self, notes: ReadNotes, wanted: Wanted | None = None) -> Iterator[pa.RecordBatch]:
        """The chunks of all documents, or of those that are `wanted`, in the order of names.

        A document that cannot be read is no error: it is noted, and the rest goes on.

        Yields:
            Batches of CHUNKS without ids and `metadata`, at most ROWS rows each.

        Raises:
            SettingsError: The source or what it is narrowed to does not exist.
            StorageFailed: The bucket of the source does not answer any more.
        """
        if is_local(self.source.path):
            root, documents = self._listing(notes)
            read = _contents(root, documents, notes, wanted)
        else:
            from tasks.read.stored_tree import documents_at  # noqa: PLC0415 - only who uses it loads it

            read = documents_at(self.source.path, self._sieve, self.skip_paths, notes, wanted)
        schema = pa.schema([*CHUNKS, *self.metadata])
        return _batches(self._pieces(read, notes), schema)

    @property
    def _sieve(self) -> Sieve:
        source = self.source
        return Sieve(source.include, source.exclude, source.respect_gitignore, self.narrow)

    @property
    def stamp(self) -> Callable[[str], bytes | None]:
        """By a document's name the stamp of its file; see `stamp_of`."""
        path = Path(self.source.path).resolve()
        root = str(path.parent if path.is_file() else path)
        return lambda document: stamp_of(f"{root}/{document}")

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
        own = (Path(skipped) for skipped in self.skip_paths if is_local(str(skipped)))
        skip_paths = frozenset(skipped.resolve() for skipped in own)
        if path in skip_paths:
            raise SettingsError(
                f"source.path: {path} is where the index or its state is kept; name another one."
            )
        is_folder = stat.S_ISDIR(mode)
        sieve = self._sieve.narrowed(
            path, lambda name: os.path.lexists(path / name) if is_folder else name == path.name
        )
        if stat.S_ISREG(mode):
            return path.parent, [path.name]
        if not is_folder:
            raise SettingsError(f"source.path: {path} is neither a folder nor a file.")
        return path, Tree(path, sieve, skip_paths).documents(notes)

    def _pieces(self, read: Iterable[tuple[str, bytes]], notes: ReadNotes) -> Iterator[_Row]:
        splitter = Splitter(self.source.split)
        for document, data in read:
            text = _text(data, document, notes)
            if text is None:
                continue
            notes.documents += 1
            titles = outline(kind_of(document) if self.metadata else "", text)
            for piece in splitter.pieces(document, text):
                yield document, piece, titles.title(piece.start_line)


def _contents(
    root: Path, documents: Iterable[str], notes: ReadNotes, wanted: Wanted | None
) -> Iterator[tuple[str, bytes]]:
    """Each document that is wanted and can be read, with what stands in it."""
    for document in documents:
        if wanted is not None and not wanted(document):
            continue
        try:
            data = contents(root / document)
        except OSError:
            notes.fail("unreadable", document)
            continue
        if data is None:
            notes.fail(CHANGED, document)
        else:
            yield document, data


def _text(data: bytes, document: str, notes: ReadNotes) -> str | None:
    """The document's text; None, with a note, where there is none to embed."""
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


def _batches(pieces: Iterable[_Row], schema: pa.Schema) -> Iterator[pa.RecordBatch]:
    rows: list[_Row] = []
    for row in pieces:
        rows.append(row)
        if len(rows) == ROWS:
            yield _batch(rows, schema)
            rows = []
    if rows:
        yield _batch(rows, schema)


def _batch(rows: Sequence[_Row], schema: pa.Schema) -> pa.RecordBatch:
    columns: list[pa.Array[Any]] = [
        pa.nulls(len(rows), pa.utf8()),
        pa.array([document for document, _, _ in rows], pa.utf8()),
        pa.array([piece.text for _, piece, _ in rows], pa.utf8()),
        pa.array([piece.start_line for _, piece, _ in rows], pa.int32()),
        pa.array([piece.end_line for _, piece, _ in rows], pa.int32()),
        pa.array([title for _, _, title in rows], pa.utf8()),
    ]
    return pa.RecordBatch.from_arrays(columns[: len(schema)], schema=schema)
