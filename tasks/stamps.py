"""Stamps: a file that was not touched since the published generation is not read again.

What the first pass finds in each file is kept in the state with the file's stamp, by generation
of the index. The next run takes from there what it would only find again. These are facts on
files: the index is compared all the same, and what is embedded is read.
"""

import json
import logging
from array import array
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from functools import cached_property
from importlib.metadata import version

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from tasks.errors import StorageFailed
from tasks.index import Generation
from tasks.keys import KeySet, digest, document_key
from tasks.params import Config, FilesSource, Index
from tasks.read import ReadNotes
from tasks.schemas import HASH, TableRef
from tasks.storage import storage_at

FORMAT = 1
"""Counts up whenever the same file is kept in another way, or decoded to another text."""
MADE_BY = b"embed_once.made_by"
STEP = 4096
"""Files that are put in order at once."""

Numbers = npt.NDArray[np.int64]

logger = logging.getLogger(__name__)


def made_by(source: FilesSource, splitter: str, prepend: Iterable[str], measure: str) -> bytes:
    """All that decides what is found in a file, but the file."""
    facts = {
        "format": FORMAT,
        "guesses": version("charset-normalizer"),
        "splitter": splitter,
        "split": source.split.model_dump(),
        "prepend": list(prepend),
        "measure": measure,
    }
    return json.dumps(facts).encode()


class Kept:
    """What was found in files before, a document after the other.

    Attributes:
        schema: STAMPED.
        documents: How many there are; they have numbers from 0.
    """

    def __init__(self, data: pa.Buffer) -> None:
        """Read `data`, an Arrow file; raises ArrowException or ValueError where it is none."""
        self._file = pa.ipc.open_file(pa.BufferReader(data))
        self.schema = self._file.schema
        batches = [self._file.get_batch(at) for at in range(self._file.num_record_batches)]
        self._ends = np.cumsum([batch.num_rows for batch in batches], dtype=np.int64)
        table = pa.Table.from_batches(batches, self.schema)
        keys = _bytes_of(table.column("document_key"))
        new = np.ones(len(keys), dtype=bool)
        new[1:] = keys[1:] != keys[:-1]
        first = np.flatnonzero(new)
        self.documents = len(first)
        self._starts = np.append(first, len(keys))
        self._keys = keys[first].tobytes()
        self._stamps = _bytes_of(table.column("stamp"))[first].tobytes()
        self._skipped = table.column("skipped").take(pa.array(first)).combine_chunks()
        self._next = 0

    @cached_property
    def _by_key(self) -> KeySet:
        return KeySet(_hashes(self._keys))

    def find(self, key: bytes) -> int:
        """The number of the document of this key; -1 where there is none."""
        if self._keys[16 * self._next : 16 * self._next + 16] == key:  # mostly, as they are listed
            found = self._next
        else:
            found = int(self._by_key.positions(_hashes(key))[0])
        if found >= 0:
            self._next = found + 1
        return found

    def stamp(self, document: int) -> bytes:
        """The stamp of the file it was found in; zeros where that cannot be trusted."""
        return self._stamps[16 * document : 16 * document + 16]

    def skipped(self, document: int) -> str | None:
        """Why it has no chunks, if it has none."""
        reason: str | None = self._skipped[document].as_py()
        return reason

    def counts(self, documents: Numbers) -> Numbers:
        """How many rows each of these documents has."""
        counts: Numbers = self._starts[documents + 1] - self._starts[documents]
        return counts

    def rows(self, documents: Numbers) -> pa.Table:
        """The rows of these documents, STAMPED."""
        counts = self.counts(documents)
        within = np.arange(counts.sum()) - np.repeat(np.cumsum(counts) - counts, counts)
        at = np.repeat(self._starts[documents], counts) + within
        batch_of = np.searchsorted(self._ends, at, side="right")
        parts = []
        for rows in np.split(np.arange(len(at)), np.flatnonzero(np.diff(batch_of)) + 1):
            number = int(batch_of[rows[0]])
            batch = self._file.get_batch(number)
            first = self._ends[number] - batch.num_rows
            parts.append(batch.take(pa.array(at[rows] - first)))
        return pa.Table.from_batches(parts, self.schema)


@dataclass
class _Heard(ReadNotes):
    """Notes that remember, by document, why the newest ones have no text."""

    reasons: dict[str, str] = field(default_factory=dict)

    def skip(self, reason: str, what: str) -> None:
        super().skip(reason, what)
        self.reasons[what] = reason

    def fail(self, reason: str, document: str) -> None:
        super().fail(reason, document)
        self.reasons.pop(document, None)


@dataclass(frozen=True)
class _Reading:
    """A document that is read: where it stands in the corpus, and the stamp it had before."""

    place: int
    document: str
    stamp: bytes | None


class FirstPass:
    """One first pass over files, of which only those are read that were touched.

    Have a reader take `wanted` and `notes`, and put what is found there through `merged`.

    Attributes:
        notes: What the reader leaves out.
        made: All that decides what is found in a file.
        narrow: Whether it looks at a part of the corpus.
        fresh: Whether anything is worth keeping that is not kept yet.
    """

    def __init__(
        self,
        stamp: Callable[[str], bytes | None],
        made: bytes,
        kept: Kept | None,
        *,
        narrow: bool = False,
    ) -> None:
        """Begin.

        Args:
            stamp: Of a document's file; None where it cannot be trusted.
            made: By `made_by`.
            kept: What was found before.
            narrow: Keep what is known of documents that are not looked at.
        """
        self.notes = _Heard()
        self.made = made
        self.fresh = kept is None
        self.narrow = narrow
        self._kept = kept
        self._stamp = stamp
        self._looked_at = 0
        self._reading: deque[_Reading] = deque()
        self._known, self._known_places = array("q"), array("q")
        self._met = np.zeros(kept.documents if kept else 0, dtype=bool)

    def wanted(self, document: str | None) -> bool:
        """Whether the next document of the corpus must be read."""
        name = document or ""
        stamp, place = self._stamp(name), self._looked_at
        self._looked_at += 1
        number = self._kept.find(document_key(name)) if self._kept else -1
        if number >= 0:
            self._met[number] = True
        if self._kept and number >= 0 and stamp == self._kept.stamp(number):
            self._note_known(name, self._kept.skipped(number))
            self._known.append(number)
            self._known_places.append(place)
            return False
        self._reading.append(_Reading(place, name, stamp))
        self.fresh = self.fresh or stamp is not None
        return True

    def _note_known(self, document: str, reason: str | None) -> None:
        if reason is None:
            self.notes.documents += 1
            self.notes.untouched += 1
        else:
            self.notes.skip(reason, document)
            del self.notes.reasons[document]

    def merged(self, found: Iterator[pa.RecordBatch], schema: pa.Schema) -> Iterator[pa.Table]:
        """What is found in the files that are read, and what is known of the others.

        Args:
            found: FOUND, in corpus order.
            schema: STAMPED.

        Yields:
            STAMPED, in corpus order.
        """
        for batch in found:
            places, rows = self._placed(batch, schema)
            yield from self._in_order(places, rows)
        rest = self._with_skipped(np.empty(0, np.int64), schema.empty_table(), self._reading)
        yield from self._in_order(*rest)
        self.fresh = self.fresh or not (self.narrow or self._met.all())

    def not_looked_at(self) -> Iterator[pa.Table]:
        """STAMPED of the documents that a narrowed pass leaves alone."""
        if self._kept and self.narrow:
            left = np.flatnonzero(~self._met)
            for start in range(0, len(left), STEP):
                yield self._kept.rows(left[start : start + STEP])

    def _placed(self, batch: pa.RecordBatch, schema: pa.Schema) -> tuple[Numbers, pa.Table]:
        """The rows of documents that are read, with the place of each, and those before them."""
        keys = _bytes_of(pa.chunked_array([batch.column("document_key")]))
        starts = np.flatnonzero(np.append(True, keys[1:] != keys[:-1]))
        counts = np.diff(np.append(starts, len(keys)))
        places, stamps, ended = [], [], []
        for start in starts.tolist():
            while document_key(self._reading[0].document) != keys[start].tobytes():
                ended.append(self._reading.popleft())
            places.append(self._reading[0].place)
            stamps.append(self._reading[0].stamp)
        of_row = pa.array(np.repeat(np.arange(len(starts)), counts))
        columns = [
            *batch.columns,
            pa.array(stamps, HASH).take(of_row),
            pa.nulls(batch.num_rows, pa.utf8()),
        ]
        return self._with_skipped(
            np.repeat(np.array(places, np.int64), counts),
            pa.Table.from_arrays(columns, schema=schema),
            ended,
        )

    def _with_skipped(
        self, places: Numbers, rows: pa.Table, ended: Iterable[_Reading]
    ) -> tuple[Numbers, pa.Table]:
        """The same with a row for each document of `ended` that was read and has no text."""
        empty = [
            (each.place, document_key(each.document), each.stamp, reason)
            for each in ended
            if (reason := self.notes.reasons.pop(each.document, None)) and each.stamp
        ]
        if not empty:
            return places, rows
        records = [
            {"document_key": key, "stamp": stamp, "skipped": reason}
            for _, key, stamp, reason in empty
        ]
        both = pa.concat_tables([rows, pa.Table.from_pylist(records, rows.schema)])
        places = np.append(places, [place for place, *_ in empty])
        order = np.argsort(places, kind="stable")
        return places[order], both.take(pa.array(order))

    def _in_order(self, places: Numbers, rows: pa.Table) -> Iterator[pa.Table]:
        """`rows`, and in between those of the documents before and among them that are known."""
        known, known_places = np.array(self._known), np.array(self._known_places)
        self._known, self._known_places = array("q"), array("q")
        done = 0
        for start in range(0, len(known), STEP):
            numbers, theirs = known[start : start + STEP], known_places[start : start + STEP]
            until = int(np.searchsorted(places, theirs[-1]))
            yield self._together(numbers, theirs, places[done:until], rows[done:until])
            done = until
        if done < len(rows):
            yield rows[done:]

    def _together(
        self, numbers: Numbers, theirs: Numbers, places: Numbers, rows: pa.Table
    ) -> pa.Table:
        assert self._kept is not None  # noqa: S101 - else no document is known
        known = self._kept.rows(numbers)
        if not len(rows):
            return known
        order = np.argsort(
            np.append(np.repeat(theirs, self._kept.counts(numbers)), places), kind="stable"
        )
        return pa.concat_tables([known, rows]).take(pa.array(order))


def kept_stamps(config: Config, generation: Generation | None, made: bytes) -> Kept | None:
    """What was kept of files for the published generation; None where there is nothing of use."""
    if generation is None:
        return None
    try:
        name = _name(config.index, generation.number, generation.version)
        data = storage_at(config.state.uri).read(name)
        kept = Kept(data) if data else None
    except (StorageFailed, pa.ArrowException, OSError, ValueError, KeyError) as error:
        logger.warning("All files are read, since what was kept of them cannot be: %s", error)
        return None
    same = kept is not None and (kept.schema.metadata or {}).get(MADE_BY) == made
    return kept if same else None


def keep_stamps(config: Config, stamped: TableRef | None, generation: int, version: int) -> None:
    """Keep for the next run what was found in files, and forget what was kept before.

    That it cannot be kept harms nobody: then the next run reads all files.

    Args:
        config: Whose index; the caller holds it.
        stamped: STAMPED; None where it cannot be trusted.
        generation: The one that was published with it.
        version: Its LanceDB version.
    """
    name = _name(config.index, generation, version)
    try:
        storage = storage_at(config.state.uri)
        others = set(storage.names(_folder(config.index)))
        if stamped is not None:
            storage.write(name, pa.memory_map(stamped.path).read_buffer())
            others -= {name}
        storage.delete(others)
    except (StorageFailed, OSError) as error:
        logger.warning("The next run reads all files: what was found is not kept: %s", error)


def _folder(index: Index) -> str:
    return f"stamps/{digest(index.place.encode()).hex()}"


def _name(index: Index, generation: int, version: int) -> str:
    return f"{_folder(index)}/{generation}-{version}.arrow"


def _bytes_of(hashes: pa.ChunkedArray) -> npt.NDArray[np.void]:
    """`hashes` as 16 bytes each; of a null they mean nothing."""
    whole = hashes.combine_chunks()
    if isinstance(whole, pa.ChunkedArray):  # of no chunks
        return np.empty(0, "V16")
    data = np.frombuffer(whole.buffers()[1] or b"", "V16")
    return data[whole.offset : whole.offset + len(whole)]


def _hashes(data: bytes) -> pa.Array:
    return pa.FixedSizeBinaryArray.from_buffers(HASH, len(data) // 16, [None, pa.py_buffer(data)])
