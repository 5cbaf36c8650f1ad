"""The journal: an answer is durable before anything else can fail.

Each run has a folder under `state.uri`:

    runs/<run id>.alive               locked as long as the run lives
    runs/<run id>/answers/*.arrow     one file an answer: vectors, and the call in its metadata
    runs/<run id>/calls/*.json        calls that have no answer here: they failed, or were folded
    runs/<run id>/refused/*.json      one file a text that the provider refuses for good
    runs/<run id>/run.json            what the run is, for the ledger if it dies

Each file is written whole, synced, and never changed. Answers are folded into the cache in
groups, as a LanceDB commit for each would make thousands of versions; the calls of a group
are written down before its answers go. A folder whose run is dead is folded by the next run.

What cannot be written there is rescued: written to a temporary folder of this machine, where
the next run on it finds it as if it stood in its place.
"""

import json
import shutil
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass
from datetime import datetime
from hashlib import blake2b
from pathlib import Path
from typing import Any

import pyarrow as pa

from tasks.cache import SPACE, Cache
from tasks.errors import StorageFailed
from tasks.providers import Space, Vectors
from tasks.schemas import require, vectors_schema
from tasks.storage import local_folder, storage_at
from tasks.storage.rescue import Rescuing

CALL = b"embed_once.call"
CHECKSUM = b"embed_once.checksum"


@dataclass(frozen=True)
class Call:
    """One call to a provider, as the ledger keeps it.

    Attributes:
        run_id: The run that made it.
        batch: Number of its batch, from 1; 0 for a call that belongs to none.
        attempt: Of the batch, from 1.
        call: Of the attempt, from 1.
        cause: Why it was made: "first", "retry" after a failure, "wait" after the account's
            limit was reached, "split" of a batch too large, "isolate" to find a text that is
            refused, "proof" that the provider takes any text, "query" of a search.
        status: "ok", or the class of the error; "unforeseen" where it was none of ours.
        started_at: ISO 8601, UTC.
        waited: Seconds it waited for its turn before it was sent.
        seconds: From sending to the end of the answer.
        texts: Texts in it.
        tokens_estimated: By our own count.
        tokens_billed: By the provider's word; 0 where it failed.
        usd: tokens_billed at list price.
        request_id: The provider's name for it.
    """

    run_id: str
    batch: int
    attempt: int
    call: int
    cause: str
    status: str
    started_at: str
    waited: float
    seconds: float
    texts: int
    tokens_estimated: int
    tokens_billed: int
    usd: float
    request_id: str

    @property
    def key(self) -> tuple[int, int, int]:
        """What tells it from all other calls of its run."""
        return self.batch, self.attempt, self.call


@dataclass(frozen=True)
class Refused:
    """A text that no call will embed.

    Attributes:
        text_hash: Which.
        reason: In the provider's words, cut, without the text.
        lasting: Whether it is the text's fault, so that it is not worth sending again.
    """

    text_hash: bytes
    reason: str
    lasting: bool = True


@dataclass(frozen=True)
class About:
    """What a run is.

    Attributes:
        run_id: Also the id of the Prefect flow run.
        name: The config's name.
        index: Folder and table.
        started_at: ISO 8601, UTC.
        concurrency: Most calls in flight.
    """

    run_id: str
    name: str
    index: str
    started_at: str
    concurrency: int


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
        with storage.held(self.lock, self.run_id):  # first, so that no other run takes us up
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

    def write_answer(self, hashes: pa.Array, vectors: Vectors, space: Space, call: Call) -> str:
        """Make an answer durable; it survives a kill from the moment this returns.

        Args:
            hashes: text_hash of each row.
            vectors: A row for each of `hashes`, of the space's `vector_type`.
            space: Where the vectors live.
            call: The call that brought them.

        Returns:
            Its name.

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
        answer = answer.replace_schema_metadata(metadata)
        written = pa.BufferOutputStream()
        with pa.ipc.new_file(written, answer.schema) as writer:
            writer.write_batch(answer)
        name = self._path("answers", "{:08d}-{:02d}-{:05d}.arrow".format(*call.key))
        self.files.write(name, written.getvalue(), call.texts)
        return name

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
        whole: dict[str, Callable[[str], object]] = {
            "answers": lambda name: read_answer(self, name),
            "calls": lambda name: _calls(self.files.read(name)),
            "refused": lambda name: _refused(self.files.read(name)),
            "run.json": lambda _: self.about(),
        }
        names = self.names()
        if self.files.read(run := self._path("run.json")) is not None:
            names.append(run)
        return [name for name in names if whole[name.split("/")[2]](name) is None]

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
        name = blake2b(text, digest_size=16).hexdigest()
        self.files.write(self._path(kind, f"{name}.json"), text)


@dataclass(frozen=True)
class StoredAnswer:
    """An answer as the journal keeps it: vectors_schema rows, their space and their call."""

    table: pa.Table
    space: Space
    call: Call


def read_answer(folder: RunFolder, name: str) -> StoredAnswer | None:
    """The answer of that name; None where it is not whole, or folded by now.

    Raises:
        StorageFailed: It cannot be read.
    """
    data = folder.files.read(name)
    try:
        table = pa.ipc.open_file(data or b"").read_all()
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
    return StoredAnswer(table, space, call)


def fold(folder: RunFolder, cache: Cache, names: Iterable[str] | None = None) -> int:
    """Move answers of the cache's space into it, in one commit; then the files go.

    Their calls are written down first. Killed between any two steps, a run leaves nothing
    uncounted, and nothing that is counted twice.

    Returns:
        Vectors added to the cache.

    Raises:
        EmbedOnceError: Cache or journal cannot be written; the answers stay.
    """
    chosen = list(folder.answers if names is None else names)
    answers = [(name, read_answer(folder, name)) for name in chosen]
    mine = [(name, answer) for name, answer in answers if answer and answer.space == cache.space]
    if not mine:
        return 0
    calls = [answer.call for _, answer in mine]
    folder.note(*calls)
    added = cache.remember(answer.table for _, answer in mine)
    # Whoever committed them, it was after the first of these calls.
    cache.sync(min(datetime.fromisoformat(call.started_at).timestamp() for call in calls))
    folder.files.delete(name for name, _ in mine)
    return added


def run_ids(state_uri: str) -> list[str]:
    """All runs that have a folder or a lock in the journal, rescued ones too."""
    found = {name.split("/")[1] for name in Rescuing(state_uri).names("runs")}
    return sorted({name.removesuffix(".holder").removesuffix(".alive") for name in found})


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
    answers = unfolded_answers(state_uri, space)
    return [answer.table.column("text_hash").combine_chunks() for answer in answers]


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
    return json.loads(data.to_pybytes() if data else b"")
