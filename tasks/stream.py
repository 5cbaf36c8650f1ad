"""Stream: more texts than memory holds, read and embedded a window at a time."""

import asyncio
import time
from collections import deque
from collections.abc import AsyncIterator, Callable, Iterable, Iterator, Sequence, Sized
from concurrent.futures import Future
from dataclasses import dataclass
from pathlib import Path

from tasks.aside import out_of_reach
from tasks.embeddings import Embeddings, StreamProgress
from tasks.errors import SettingsError
from tasks.params import FilesSource
from tasks.prepare import Preparation
from tasks.read import ReadNotes
from tasks.read.files import FilesReader

Source = Iterable[str] | str | Path
"""Texts, or the path of a file with a text a line, or of a folder of documents."""

WINDOWS = 2
"""Windows in flight: while one is embedded, the next is read."""

Window = Sequence[str | bytes]


@dataclass(frozen=True)
class StreamPart:
    """Some of the texts of a stream, in a row.

    Attributes:
        start: Position of the first of them in the stream.
        found: Their vectors.
        progress: How far the stream is with them.
    """

    start: int
    found: Embeddings
    progress: StreamProgress


class Stream:
    """The parts of a stream, in order; one pass, by `for` or by `async for`.

    Attributes:
        notes: What was left out of a folder, and why.

    Args:
        source: The texts.
        submit: Embeds a window, whose first text is of this number in the stream.
        full: Whether a window of so many texts with so many characters is large enough.
        preparation: What stands in front of the texts of a folder's chunks.
        progress: Is told how far it is, after each part.
    """

    def __init__(
        self,
        source: Source,
        submit: Callable[[Window, int], "Future[Embeddings]"],
        full: Callable[[int, int], bool],
        preparation: Preparation,
        progress: Callable[[StreamProgress], None] | None,
    ) -> None:
        self.notes = ReadNotes()
        self._texts, self._total = _texts_of(source, preparation, self.notes)
        self._submit, self._full = submit, full
        self._progress = progress

    def __iter__(self) -> Iterator[StreamPart]:
        started = time.perf_counter()
        flying: deque[Future[Embeddings]] = deque()
        windows, read = self._windows(), 0
        completed = failed = parts = calls = 0
        try:
            while True:
                while len(flying) < WINDOWS and (window := next(windows, None)) is not None:
                    flying.append(self._submit(window, read))
                    read += len(window)
                if not flying:
                    return
                found = out_of_reach(flying.popleft().result)
                start, completed = completed, completed + len(found)
                failed, parts, calls = (
                    failed + len(found.errors),
                    parts + 1,
                    calls + len(found.calls),
                )
                if not flying and (window := next(windows, None)) is not None:
                    flying.append(self._submit(window, read))
                    read += len(window)
                told = StreamProgress(
                    completed=completed,
                    total=self._total if flying else completed,
                    failed=failed,
                    batches_processed=parts,
                    api_calls=calls,
                    seconds=time.perf_counter() - started,
                )
                if self._progress is not None:
                    self._progress(told)
                yield StreamPart(start, found, told)
        finally:
            for each in flying:
                each.cancel()

    async def __aiter__(self) -> AsyncIterator[StreamPart]:
        parts = iter(self)
        while (part := await asyncio.to_thread(next, parts, None)) is not None:
            yield part

    def _windows(self) -> Iterator[Window]:
        window: list[str | bytes] = []
        characters = 0
        for text in self._texts:
            window.append(text)
            characters += len(text) if isinstance(text, str) else 0
            if self._full(len(window), characters):
                yield window
                window, characters = [], 0
        if window:
            yield window


def _texts_of(
    source: Source, preparation: Preparation, notes: ReadNotes
) -> tuple[Iterator[str | bytes], int | None]:
    """The texts, and how many there are, where that is known before they are read."""
    if not isinstance(source, str | Path):
        return iter(source), len(source) if isinstance(source, Sized) else None
    path = Path(source).expanduser()
    if path.is_dir():
        return _chunks(path, preparation, notes), None
    try:
        with path.open("rb") as file:
            total = sum(1 for _ in file)
    except OSError as error:
        raise SettingsError(f"{path} cannot be read: {error.strerror}.") from None
    return _lines(path), total


def _lines(path: Path) -> Iterator[str | bytes]:
    """The lines of a file, as bytes where one is not UTF-8."""
    with path.open("rb") as file:
        for line in file:
            try:
                yield line.decode().rstrip("\r\n")
            except UnicodeDecodeError:
                yield line


def _chunks(folder: Path, preparation: Preparation, notes: ReadNotes) -> Iterator[str | bytes]:
    """The texts of the chunks of all documents in a folder, as they are sent."""
    source = FilesSource.model_validate({"kind": "files", "path": str(folder)})
    for batch in FilesReader(source, preparation=preparation).chunks(notes):
        yield from preparation.texts(batch).to_pylist()
