"""The journal: an answer is durable before anything else can fail.

Each run has a folder under `state.uri`:

    starting.lock                     held while a run starts, or none may
    runs/<run id>.alive               locked as long as the run lives
    runs/<run id>/answers/*.arrow     one file an answer: vectors, and the call in its metadata
    runs/<run id>/calls/*.json        calls that have no answer here: they failed, or were folded
    runs/<run id>/refused/*.json      one file a text that the provider refuses for good
    runs/<run id>/run.json            what the run is, for the ledger if it dies
    runs/<run id>/claims/*            texts in flight, see tasks/claims.py; they last no longer

Each file is written whole, synced, and never changed. Answers are folded into the cache in
groups, as a LanceDB commit for each would make thousands of versions; the calls of a group
are written down before its answers go. A folder whose run is dead is folded by the next run.

What cannot be written there is rescued: written to a temporary folder of this machine, where
the next run on it finds it as if it stood in its place.
"""

import json
import shutil
from collections.abc import Iterable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import asdict, dataclass
from datetime import datetime
from hashlib import blake2b
from pathlib import Path
from typing import Any

import pyarrow as pa

from tasks.cache import SPACE, Cache
from tasks.errors import IndexHeld, StorageFailed
from tasks.notes import About, Call, Refused
from tasks.providers import Space, Vectors
from tasks.schemas import require, vectors_schema
from tasks.storage import Taken, local_folder, storage_at
from tasks.storage.rescue import Rescuing

CALL = b"embed_once.call"
CHECKSUM = b"embed_once.checksum"
STARTING = "starting.lock"
"""Held while a run marks itself as living, or while none may start."""
STARTING_S = 600.0
"""So long a run waits to start while the cache is pruned."""
LOOK_S = 10.0
"""So long another run may take to see whether this one lives."""


@dataclass(frozen=True)
class RunFolder:
    """The folder of one run. A value: tasks in other processes use it too.

    Attributes:
        state_uri: Folder or address of the state.
        run_id: The run.
    """

    state_uri: str
    run_id: str

    @property
    def files(self) -> Rescuing:
        """Where the files lie whose names this gives."""
        return Rescuing(self.state_uri)

    @property
    def lock(self) -> str:
        """Held as long as the run lives; beside the folder, so that it can be taken first."""
        return f"runs/{self.run_id}.alive"

    @property
    def staging(self) -> Path:
        """Where tables between the stages lie, on this machine."""
        return local_folder(self.state_uri, f"runs/{self.run_id}/staging")

    @property
    def answers(self) -> list[str]:
        """Names of all answers not yet folded, oldest batch first."""
        return self._names("answers")

    @contextmanager
    def alive(self, about: About | None = None) -> Iterator[None]:
        """Mark the run as living until the block ends, then remove what is spent.

        The folder stays if it still holds answers or notes: the next run takes them up.

        Args:
            about: What the ledger says of the run if it dies.
        """
        storage = storage_at(self.state_uri)
        with ExitStack() as stack:
            with _starting(self.state_uri, self.run_id):
                # First, so that no other run takes us up; one may be looking just now.
                stack.enter_context(storage.held(self.lock, self.run_id, LOOK_S))
            if about is not None:
                storage.write(self._path("run.json"), json.dumps(asdict(about)).encode())
            try:
                self.staging.mkdir(parents=True, exist_ok=True)
                yield
            finally:
                self._clear_staging()
                with suppress(StorageFailed):
                    if not self.names():
                        self.remove()

    def remove(self) -> None:
        """Remove the folder and its lock, which the caller holds."""
        self._clear_staging()
        self.files.delete_all(self._path())
        storage_at(self.state_uri).delete([self.lock])

    def write_answer(
        self, hashes: pa.Array, vectors: Vectors, space: Space, call: Call
    ) -> "StoredAnswer":
        """Make an answer durable; it survives a kill from the moment this returns.

        Args:
            hashes: text_hash of each row.
            vectors: A row for each of `hashes`, of the space's `vector_type`.
            space: Where the vectors live.
            call: The call that brought them.

        Returns:
            What is stored, over the memory of `vectors`.

        Raises:
            StorageFailed: The state takes it not; the message says what became of it.
        """
        column = pa.FixedSizeListArray.from_arrays(
            pa.array(vectors.reshape(-1)), type=space.vector_type
        )
        answer = pa.record_batch([hashes, column], schema=vectors_schema(space.vector_type))
        metadata = {
            SPACE: space.to_json().encode(),
            CALL: json.dumps(asdict(call)).encode(),
            CHECKSUM: _checksum(answer),
        }
        written = pa.BufferOutputStream()
        with pa.ipc.new_file(written, answer.schema.with_metadata(metadata)) as writer:
            writer.write_batch(answer.replace_schema_metadata(metadata))
        name = self._path("answers", "{:08d}-{:02d}-{:05d}.arrow".format(*call.key))
        self.files.write(name, written.getvalue(), call.texts)
        return StoredAnswer(name, pa.Table.from_batches([answer]), space, call)

    def answers_of(self, batch: int) -> list[str]:
        """Names of this batch's answers; a batch that was split has several."""
        start = self._path("answers", f"{batch:08d}-")
        return [name for name in self.answers if name.startswith(start)]

    def note(self, *calls: Call) -> None:
        """Write down calls that no answer here tells of.

        Raises:
            StorageFailed: The state takes it not.
        """
        self._write_json("calls", [asdict(call) for call in calls])

    def refuse(self, space: Space, refused: Refused) -> None:
        """Write down a text that the provider refuses; errors as in `note`."""
        row = {"space": space.id, **asdict(refused), "text_hash": refused.text_hash.hex()}
        self._write_json("refused", [row])

    def refused(self) -> dict[str, dict[bytes, Refused]]:
        """All texts written down as refused, by the id of their space and their hash."""
        found: dict[str, dict[bytes, Refused]] = {}
        for name in self._names("refused"):
            for space, refused in _refused(self.files.read(name)) or ():
                found.setdefault(space, {})[refused.text_hash] = refused
        return found

    def calls(self) -> list[Call]:
        """All calls, oldest first: those noted, and those that their answer tells of."""
        noted = [_calls(self.files.read(name)) or () for name in self._names("calls")]
        calls = {call.key: call for some in noted for call in some}
        for name in self.answers:
            answer = read_answer(self, name)
            if answer is not None:
                calls[answer.call.key] = answer.call
        return sorted(calls.values(), key=lambda call: (call.started_at, call.key))

    def about(self) -> About | None:
        """What the run is, if it lived long enough to write it down."""
        try:
            return About(**_json(self.files.read(self._path("run.json"))))
        except (ValueError, TypeError):
            return None

    def forget_notes(self) -> None:
        """Drop the notes once ledger and quarantine have them; what cannot be read stays."""
        unreadable = self.unreadable()
        noted = [*self._names("calls"), *self._names("refused")]
        self.files.delete(name for name in noted if name not in unreadable)

    def unreadable(self) -> list[str]:
        """Names of all files that are not whole."""
        found: list[tuple[str, object]] = [(name, read_answer(self, name)) for name in self.answers]
        found += [(name, _calls(self.files.read(name))) for name in self._names("calls")]
        found += [(name, _refused(self.files.read(name))) for name in self._names("refused")]
        if self.files.read(run := self._path("run.json")) is not None:
            found.append((run, self.about()))
        return [name for name, rows in found if rows is None]

    def names(self) -> list[str]:
        """Names of all answers and notes."""
        return [name for kind in ("answers", "calls", "refused") for name in self._names(kind)]

    def _clear_staging(self) -> None:
        shutil.rmtree(self.staging, ignore_errors=True)
        with suppress(OSError):  # where it holds more, it is the journal
            self.staging.parent.rmdir()

    def _path(self, *parts: str) -> str:
        return "/".join(("runs", self.run_id, *parts))

    def _names(self, kind: str) -> list[str]:
        return self.files.names(self._path(kind))

    def _write_json(self, kind: str, rows: list[dict[str, Any]]) -> None:
        """Write rows to a file named by what it holds, so that none takes the place of another."""
        text = json.dumps(rows).encode()
        digest = blake2b(text, digest_size=16).hexdigest()
        self.files.write(self._path(kind, f"{digest}.json"), text)


@contextmanager
def none_starts(state_uri: str, run_id: str = "") -> Iterator[bool]:
    """Keep runs of this state from starting until the block ends; they wait.

    Args:
        state_uri: Where the runs' folders are.
        run_id: The caller's own run, if it is one.

    Yields:
        Whether no other run lives.
    """
    storage = storage_at(state_uri)
    with _starting(state_uri, run_id):
        others = (RunFolder(state_uri, each) for each in run_ids(state_uri) if each != run_id)
        yield not any(storage.lives(other.lock) for other in others)


@contextmanager
def _starting(state_uri: str, run_id: str) -> Iterator[None]:
    with ExitStack() as stack:
        try:
            stack.enter_context(storage_at(state_uri).held(STARTING, run_id, STARTING_S))
        except Taken as taken:  # only of this lock
            raise IndexHeld(
                f"No run can start on the state in {state_uri} while its cache is pruned, by "
                f"{taken}. Run again when that has ended."
            ) from None
        yield


@dataclass(frozen=True)
class StoredAnswer:
    """An answer as the journal keeps it: vectors_schema rows, their space and their call."""

    name: str
    table: pa.Table
    space: Space
    call: Call


def read_answer(folder: RunFolder, name: str) -> StoredAnswer | None:
    """The answer of that name; None where it is not whole, or folded by now.

    Raises:
        StorageFailed: It cannot be read.
    """
    try:
        table = pa.ipc.open_file(folder.files.read(name) or b"").read_all()
        metadata = table.schema.metadata or {}
        space = Space.from_json(metadata[SPACE].decode())
        call = Call(**json.loads(metadata[CALL]))
        table = table.replace_schema_metadata(None)
        require(table.schema, vectors_schema(space.vector_type), "answer")
        table.validate(full=True)  # else Arrow ends the process over a damaged length
        if metadata[CHECKSUM] != _checksum(*table.to_batches()):
            return None
    except (OSError, pa.ArrowInvalid, KeyError, ValueError, TypeError):
        return None
    return StoredAnswer(name, table, space, call)


def fold(folder: RunFolder, cache: Cache, answers: Iterable[StoredAnswer] | None = None) -> int:
    """Move answers of the cache's space into it, in one commit; then the files go.

    Their calls are written down first. Killed between any two steps, a run leaves nothing
    uncounted, and nothing that is counted twice.

    Args:
        folder: Of the run, with its journal.
        cache: Where to.
        answers: Those of the journal that are at hand; None: all, read from there.

    Returns:
        Vectors added to the cache.

    Raises:
        EmbedOnceError: Cache or journal cannot be written; the answers stay.
    """
    found = (read_answer(folder, name) for name in folder.answers) if answers is None else answers
    mine = [answer for answer in found if answer and answer.space == cache.space]
    if not mine:
        return 0
    calls = [answer.call for answer in mine]
    folder.note(*calls)
    added = cache.remember(answer.table for answer in mine)
    # Whoever committed them, it was after the first of these calls.
    cache.sync(min(datetime.fromisoformat(call.started_at).timestamp() for call in calls))
    folder.files.delete(answer.name for answer in mine)
    return added


def run_ids(state_uri: str) -> list[str]:
    """All runs that have a folder or a lock in the journal, rescued ones too."""
    found = {name.split("/")[1] for name in Rescuing(state_uri).names("runs")}
    return sorted({name.removesuffix(".holder").removesuffix(".alive") for name in found})


def unreadable(state_uri: str) -> list[str]:
    """Names of all files in the journal that are not whole."""
    folders = [RunFolder(state_uri, run_id) for run_id in run_ids(state_uri)]
    names = [(folder, name) for folder in folders for name in folder.unreadable()]
    # What a living run has folded or forgotten meanwhile is gone.
    return [name for folder, name in names if folder.files.read(name) is not None]


def unfolded_answers(state_uri: str, space: Space) -> Iterator[StoredAnswer]:
    """Whole answers in `space` that no run has folded yet, whether it lives or died."""
    for run_id in run_ids(state_uri):
        folder = RunFolder(state_uri, run_id)
        for name in folder.answers:
            answer = read_answer(folder, name)
            if answer is not None and answer.space == space:
                yield answer


def unfolded_hashes(state_uri: str, space: Space) -> list[pa.Array]:
    """text_hash columns of answers that no run has folded yet; for a plan, which writes nothing."""
    answers = (answer.table for answer in unfolded_answers(state_uri, space))
    return [table.column("text_hash").combine_chunks() for table in answers]


def _checksum(*batches: pa.RecordBatch) -> bytes:
    """Digest of text hashes and numbers; Arrow itself does not notice a flipped bit."""
    state = blake2b(digest_size=16)
    for batch in batches:
        state.update(b"".join(batch.column("text_hash").to_pylist()))
        state.update(batch.column("vector").flatten().to_numpy())
    return state.hexdigest().encode()


def _calls(data: pa.Buffer | None) -> list[Call] | None:
    """The calls in a note; None where it is not whole."""
    try:
        return [Call(**row) for row in _json(data)]
    except (ValueError, TypeError):
        return None


def _refused(data: pa.Buffer | None) -> list[tuple[str, Refused]] | None:
    """The refused texts in a note, each with the id of its space; None where it is not whole."""
    try:
        return [
            (row.pop("space"), Refused(**{**row, "text_hash": bytes.fromhex(row["text_hash"])}))
            for row in _json(data)
        ]
    except (ValueError, TypeError, KeyError, AttributeError):
        return None


def _json(data: pa.Buffer | None) -> Any:
    return json.loads((data or pa.py_buffer(b"")).to_pybytes())
