"""The journal: an answer is durable before anything else can fail.

Each run has a folder under `state.uri`:

    starting.lock                held while a run starts, or none may
    runs/<run id>.alive          locked as long as the run lives
    runs/<run id>/answers/*.arrow    one file an answer: vectors, and the call in its metadata
    runs/<run id>/calls.jsonl    one line a provider call, whatever became of it
    runs/<run id>/refused.jsonl  one line a text that the provider refuses for good
    runs/<run id>/run.json       what the run is, for the ledger if it dies
    runs/<run id>/staging/       tables between the stages

An answer is written to a temporary file, synced and renamed, so a file with its final
name is whole. Answers are folded into the cache in groups, as a LanceDB commit for each
would make thousands of versions. A folder whose run is dead is folded by the next run.
"""

import json
import os
import shutil
from collections.abc import Iterable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass
from hashlib import blake2b
from pathlib import Path
from typing import Any

import pyarrow as pa
from filelock import FileLock, Timeout

from tasks.cache import SPACE, Cache
from tasks.providers import Space, Vectors
from tasks.schemas import require, vectors_schema

CALL = b"embed_once.call"
CHECKSUM = b"embed_once.checksum"
STARTING = "starting.lock"
"""Held while a run marks itself as living, or while none may start."""


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
    """The folder of one run. A value: tasks in other processes use it too."""

    state_uri: str
    run_id: str

    @property
    def path(self) -> Path:
        """The folder."""
        return Path(self.state_uri) / "runs" / self.run_id

    @property
    def lock(self) -> Path:
        """Locked as long as the run lives; beside the folder, so that it can be taken first."""
        return self.path.with_name(f"{self.run_id}.alive")

    @property
    def staging(self) -> Path:
        """Where tables between the stages lie."""
        return self.path / "staging"

    @property
    def answers(self) -> list[Path]:
        """Files of all answers not yet folded, oldest batch first."""
        return sorted((self.path / "answers").glob("*.arrow"))

    @contextmanager
    def alive(self, about: About | None = None) -> Iterator[None]:
        """Mark the run as living until the block ends, then remove what is spent.

        The folder stays if it still holds answers or calls: the next run takes them up.

        Args:
            about: What the ledger says of the run if it dies.
        """
        self.path.parent.mkdir(parents=True, exist_ok=True)
        with ExitStack() as stack:
            with FileLock(Path(self.state_uri) / STARTING):
                # Before there is a folder that another run could take up.
                stack.enter_context(FileLock(self.lock))
            self.staging.mkdir(parents=True, exist_ok=True)
            if about is not None:
                self._about.write_text(json.dumps(asdict(about)), encoding="utf-8")
            try:
                yield
            finally:
                shutil.rmtree(self.staging, ignore_errors=True)
                if not self.answers and not (self.path / "calls.jsonl").exists():
                    shutil.rmtree(self.path, ignore_errors=True)
                    self.lock.unlink(missing_ok=True)

    def write_answer(self, hashes: pa.Array, vectors: Vectors, space: Space, call: Call) -> Path:
        """Make an answer durable; it survives a kill from the moment this returns.

        Args:
            hashes: text_hash of each row.
            vectors: A row for each of `hashes`, of the space's `vector_type`.
            space: Where the vectors live.
            call: The call that brought them.
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
        target = self.path / "answers" / "{:08d}-{:02d}-{:05d}.arrow".format(*call.key)
        target.parent.mkdir(exist_ok=True)
        temporary = target.with_suffix(".tmp")
        with temporary.open("wb") as file:
            with pa.ipc.new_file(file, answer.schema) as writer:
                writer.write_batch(answer)
            file.flush()
            os.fsync(file.fileno())
        temporary.rename(target)
        _sync_folder(target.parent)
        self.note(call)
        return target

    def answers_of(self, batch: int) -> list[Path]:
        """Files of this batch's answers; a batch that was split has several."""
        return sorted((self.path / "answers").glob(f"{batch:08d}-*.arrow"))

    def note(self, call: Call) -> None:
        """Write the call down, whatever became of it."""
        line = json.dumps(asdict(call)) + "\n"
        with (self.path / "calls.jsonl").open("a", encoding="utf-8") as file:
            file.write(line)

    def refuse(self, space: Space, refused: Refused) -> None:
        """Write down a text that the provider refuses."""
        row = {"space": space.id, **asdict(refused), "text_hash": refused.text_hash.hex()}
        with (self.path / "refused.jsonl").open("a", encoding="utf-8") as file:
            file.write(json.dumps(row) + "\n")

    def refused(self) -> dict[str, dict[bytes, Refused]]:
        """All texts written down as refused, by the id of their space and their hash."""
        found: dict[str, dict[bytes, Refused]] = {}
        for row in _json_lines(self.path / "refused.jsonl"):
            try:
                space = row.pop("space")
                refused = Refused(**{**row, "text_hash": bytes.fromhex(row["text_hash"])})
            except (KeyError, TypeError, ValueError):
                continue  # damaged: the text is sent once more
            found.setdefault(space, {})[refused.text_hash] = refused
        return found

    def calls(self) -> list[Call]:
        """All calls noted, and those that only their answer knows of."""
        calls = {}
        for row in _json_lines(self.path / "calls.jsonl"):
            try:
                call = Call(**row)
            except TypeError:
                continue  # its answer, if it has one, knows the call
            calls[call.key] = call
        for path in self.answers:
            answer = read_answer(path)
            if answer is not None:
                calls.setdefault(answer.call.key, answer.call)
        return list(calls.values())

    @property
    def _about(self) -> Path:
        return self.path / "run.json"

    def about(self) -> About | None:
        """What the run is, if it lived long enough to write it down."""
        try:
            return About(**json.loads(self._about.read_text(encoding="utf-8")))
        except (OSError, ValueError, TypeError):
            return None

    def forget_notes(self) -> None:
        """Drop the notes once ledger and quarantine have them."""
        (self.path / "calls.jsonl").unlink(missing_ok=True)
        (self.path / "refused.jsonl").unlink(missing_ok=True)


@contextmanager
def none_starts(state_uri: str, run_id: str = "") -> Iterator[bool]:
    """Keep runs of this state from starting until the block ends; they wait.

    Args:
        state_uri: Where the runs' folders are.
        run_id: The caller's own run, if it is one.

    Yields:
        Whether no other run lives.
    """
    runs = Path(state_uri) / "runs"
    Path(state_uri).mkdir(parents=True, exist_ok=True)
    with FileLock(Path(state_uri) / STARTING):
        yield not any(_locked(lock) for lock in runs.glob("*.alive") if lock.stem != run_id)


def _locked(lock: Path) -> bool:
    try:
        with FileLock(lock, timeout=0):
            return False
    except Timeout:
        return True


@dataclass(frozen=True)
class StoredAnswer:
    """An answer as the journal keeps it: vectors_schema rows, their space and their call."""

    table: pa.Table
    space: Space
    call: Call


def read_answer(path: Path) -> StoredAnswer | None:
    """The answer in the file at `path`; None where the file is not whole."""
    try:
        table = pa.ipc.open_file(pa.memory_map(str(path))).read_all()
        metadata = table.schema.metadata or {}
        space = Space.from_json(metadata[SPACE].decode())
        call = Call(**json.loads(metadata[CALL]))
        table = table.replace_schema_metadata(None)
        require(table.schema, vectors_schema(space.vector_type), str(path))
        table.validate(full=True)  # else Arrow ends the process over a damaged length
        if metadata[CHECKSUM] != _checksum(*table.to_batches()):
            return None
    except (OSError, pa.ArrowInvalid, KeyError, ValueError, TypeError):
        return None
    return StoredAnswer(table, space, call)


def fold(folder: RunFolder, cache: Cache, paths: Iterable[Path] | None = None) -> int:
    """Move answers of the cache's space into it, in one commit; the files go.

    Returns:
        Vectors added to the cache.
    """
    chosen = list(folder.answers if paths is None else paths)
    answers = [(path, read_answer(path)) for path in chosen]
    mine = [(path, answer) for path, answer in answers if answer and answer.space == cache.space]
    added = cache.remember(answer.table for _, answer in mine)
    for path, _ in mine:
        path.unlink()
    return added


def unfolded_answers(state_uri: str, space: Space) -> Iterator[StoredAnswer]:
    """Whole answers in `space` that no run has folded yet, whether it lives or died."""
    for file in sorted((Path(state_uri) / "runs").glob("*/answers/*.arrow")):
        answer = read_answer(file)
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


def _json_lines(file: Path) -> Iterator[dict[str, Any]]:
    """The objects in `file`, a line each; lines cut off by a kill are left out."""
    lines = file.read_text(encoding="utf-8", errors="replace").splitlines() if file.exists() else []
    for line in lines:
        try:
            row = json.loads(line)
        except ValueError:
            continue
        if isinstance(row, dict):
            yield row


def _sync_folder(folder: Path) -> None:
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
