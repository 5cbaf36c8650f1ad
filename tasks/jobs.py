"""Jobs: texts that wait in a provider's Batch lane, and what the state knows of them.

    jobs/<space>/<job>/texts.arrow   before it is created: what it holds
    jobs/<space>/<job>/id            right after: what the provider calls it

The first is durable before anything is sent, so a run that dies in between leaves a job that may
or may not be there; who comes next looks for it among all that the provider holds. Its answers
are written to a journal of its own and from there on go the way of all answers. The notes go last,
so whatever a kill cuts off is done again, and nothing is submitted or counted twice.
"""

import json
import uuid
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from contextlib import AbstractContextManager, suppress
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc

from tasks.budget import may_be_charged
from tasks.cache import Cache
from tasks.errors import AnswerRejected, ProviderError
from tasks.journal import RunFolder, fold
from tasks.ledger import Ledger
from tasks.notes import Call
from tasks.providers import Space, checked_vectors
from tasks.providers.voyage import Voyage
from tasks.providers.voyage_jobs import Job, VoyageJobs
from tasks.schemas import BATCH, HASH, Batch
from tasks.storage import Hold, Storage, storage_at

JOB_TEXTS = pa.schema(
    [
        pa.field("line", pa.int32(), nullable=False),
        pa.field("text_hash", HASH, nullable=False),
        pa.field("tokens", pa.int32(), nullable=False),
    ]
)
"""The texts of a job, in the order of its file; `line` counts from 1."""

ABOUT = b"embed_once.job"
NAME = "embed_once"
"""Of the pair of a job's metadata that says which of ours it is."""
SURE_S = 600.0
"""So long after it was written down a job that nobody has heard of may still turn up."""
PROBLEMS = 3
"""Of a job that failed, so many are told."""
_OK, _REFUSED, _SERVER = 200, 400, 500


class Most(NamedTuple):
    """What one job may hold: Voyage's limits, with room below them."""

    texts: int = 100_000
    bytes: int = 90 << 20
    tokens: int = 400_000_000


MOST = Most()


@dataclass(frozen=True)
class Submission:
    """A job as the state knows it.

    Attributes:
        name: Ours.
        made_at: When it was written down; ISO 8601, UTC.
        index: Folder and table it was made for.
        usd_per_million_tokens: Its price.
        texts: JOB_TEXTS.
        id: The provider's; None where nobody has heard it.
    """

    name: str
    made_at: str
    index: str
    usd_per_million_tokens: float
    texts: pa.Table = field(repr=False)
    id: str | None = None

    @property
    def tokens(self) -> int:
        """Estimated."""
        return pc.sum(self.texts.column("tokens")).as_py() or 0

    @property
    def age_s(self) -> float:
        """Seconds since it was written down."""
        return (datetime.now(tz=UTC) - datetime.fromisoformat(self.made_at)).total_seconds()


@dataclass
class Settled:
    """What has become of the jobs of a space.

    Attributes:
        waiting: Those under way.
        texts: Whose vectors have come.
        tokens: What they were billed.
        usd: What they cost.
        failed: Texts without a vector, by what the provider says.
        refused: text_hash of those that it refuses; another job would refuse them again.
    """

    waiting: list[Submission] = field(default_factory=list)
    texts: int = 0
    tokens: int = 0
    usd: float = 0.0
    failed: Counter[str] = field(default_factory=Counter)
    refused: list[bytes] = field(default_factory=list)


class JobNotes:
    """The notes of all jobs of a space, in a state."""

    def __init__(self, state_uri: str, space: Space) -> None:
        self._state_uri = state_uri
        self._space = space
        self._folder = f"jobs/{space.id}"

    @property
    def _storage(self) -> Storage:
        return storage_at(self._state_uri)

    def held(self, run_id: str, wait_s: float) -> AbstractContextManager[Hold]:
        """Keep other runs from settling and submitting; raises `Taken` after `wait_s` seconds."""
        return self._storage.held(f"jobs/{self._space.id}.lock", run_id, wait_s)

    def all(self) -> list[Submission]:
        """Every job that is not settled, the oldest first."""
        found = [self._read(name) for name in self._storage.folders(self._folder)]
        return sorted((each for each in found if each is not None), key=lambda each: each.made_at)

    def waiting(self) -> pa.Array:
        """text_hash of every text that is in one of them."""
        columns = [each.texts.column("text_hash").combine_chunks() for each in self.all()]
        return pa.concat_arrays([pa.array([], HASH), *columns])

    def write(self, submission: Submission) -> None:
        """Write down what is about to be submitted; durable when this returns."""
        about = {
            "made_at": submission.made_at,
            "index": submission.index,
            "usd_per_million_tokens": submission.usd_per_million_tokens,
        }
        table = submission.texts.replace_schema_metadata({ABOUT: json.dumps(about)})
        written = pa.BufferOutputStream()
        with pa.ipc.new_file(written, table.schema) as writer:
            writer.write_table(table)
        self._storage.write(self._path(submission.name, "texts.arrow"), written.getvalue())

    def write_id(self, submission: Submission, job_id: str) -> Submission:
        """Write down what the provider calls it."""
        self._storage.write(self._path(submission.name, "id"), job_id.encode())
        return replace(submission, id=job_id)

    def forget(self, submission: Submission) -> None:
        """It is settled."""
        # Its texts last: without them an id is nothing, and the other way round it is looked up.
        for file in ("id", "texts.arrow"):
            self._storage.delete([self._path(submission.name, file)])
        self._storage.delete_all(self._path(submission.name))

    def _read(self, name: str) -> Submission | None:
        data = self._storage.read(self._path(name, "texts.arrow"))
        if data is None:
            return None
        table = pa.ipc.open_file(data).read_all()
        about = json.loads(table.schema.metadata[ABOUT])
        job_id = self._storage.read(self._path(name, "id"))
        return Submission(
            name=name,
            texts=table.replace_schema_metadata(None),
            id=None if job_id is None else job_id.to_pybytes().decode(),
            **about,
        )

    def _path(self, name: str, file: str = "") -> str:
        return f"{self._folder}/{name}/{file}".rstrip("/")


def submit(
    batches: Iterable[Batch],
    *,
    jobs: VoyageJobs,
    notes: JobNotes,
    folder: Path,
    index: str,
    usd_per_million_tokens: float,
    most: Most = MOST,
) -> Iterator[Submission]:
    """Have texts embedded by the Batch lane, a batch a line, in as few jobs as the limits allow.

    Args:
        batches: Texts, each of them once.
        jobs: The provider's calls.
        notes: Held by the caller.
        folder: Staging folder.
        index: Folder and table that they are for.
        usd_per_million_tokens: Price in this lane.
        most: What one job may hold.

    Yields:
        Each job once it is created.

    Raises:
        ProviderError: One could not be created; nothing is lost, and none is created twice.
    """
    for file, texts in _files(batches, folder, most):
        made_at = datetime.now(tz=UTC).isoformat(timespec="milliseconds")
        submission = Submission(file.stem, made_at, index, usd_per_million_tokens, texts)
        notes.write(submission)
        try:
            created = jobs.create(jobs.upload(file), {NAME: submission.name})
        except ProviderError as error:
            if not may_be_charged(error):  # then there is no job, and its texts are free
                with suppress(ProviderError):  # else the next run looks for it
                    _forget(submission, jobs, notes)
            raise
        finally:
            file.unlink()
        yield notes.write_id(submission, created.id)


def _files(batches: Iterable[Batch], folder: Path, most: Most) -> Iterator[tuple[Path, pa.Table]]:
    """Files of requests in the staging folder, with their JOB_TEXTS."""
    lines, size, parts, texts, tokens = list[bytes](), 0, list[pa.Table](), 0, 0

    def file() -> tuple[Path, pa.Table]:
        path = folder / f"job-{uuid.uuid4().hex}.jsonl"
        path.write_bytes(b"".join(lines))
        return path, pa.concat_tables(parts)

    for batch in batches:
        rows = batch.table.load(BATCH)
        body = {"input": rows.column("text").to_pylist()}
        line = json.dumps({"custom_id": str(len(lines) + 1), "body": body}).encode() + b"\n"
        full = (
            texts + rows.num_rows > most.texts
            or size + len(line) > most.bytes
            or tokens + batch.tokens > most.tokens
        )
        if full and lines:
            yield file()
            lines, size, parts, texts, tokens = [], 0, [], 0, 0
            line = json.dumps({"custom_id": "1", "body": body}).encode() + b"\n"
        lines.append(line)
        number = pa.array(np.full(rows.num_rows, len(lines), np.int32))
        columns = [number, rows.column("text_hash"), rows.column("tokens")]
        parts.append(pa.Table.from_arrays(columns, schema=JOB_TEXTS))
        size, texts, tokens = size + len(line), texts + rows.num_rows, tokens + batch.tokens
    if lines:
        yield file()


def settle(provider: Voyage, jobs: VoyageJobs, notes: JobNotes, cache: Cache) -> Settled:
    """See what has become of all jobs of a space, and take in what they bring.

    Args:
        provider: Who made them.
        jobs: Its calls.
        notes: Held by the caller.
        cache: Of the space.

    Raises:
        ProviderError: The provider does not tell; what it brought so far is kept.
        StorageFailed: The state takes it not.
    """
    settled = Settled()
    submissions = notes.all()
    unheard = [each for each in submissions if each.id is None]
    ours = {job.metadata.get(NAME): job for job in jobs.jobs()} if unheard else {}
    for submission in submissions:
        found = submission
        if found.id is None:
            job = ours.get(found.name)
            if job is None:
                if found.age_s < SURE_S:
                    settled.waiting.append(found)
                else:
                    _forget(found, jobs, notes)
                continue
            found = notes.write_id(found, job.id)
        job = jobs.job(str(found.id))
        if not job.ended:
            settled.waiting.append(found)
            continue
        _Harvest(provider, jobs, cache, submission=found, job=job, settled=settled).run()
        _forget(found, jobs, notes, job)
    return settled


def _forget(
    submission: Submission, jobs: VoyageJobs, notes: JobNotes, job: Job | None = None
) -> None:
    """Remove what the provider keeps of a job, then what we know of it."""
    files = [] if job is None else [job.input_file, job.output_file, job.error_file]
    if job is None:
        files = [file for file, name in jobs.files() if name == f"{submission.name}.jsonl"]
    for file in files:
        if file is not None:
            jobs.delete(file)
    notes.forget(submission)


class _Harvest:
    """Takes in one job that has ended."""

    def __init__(
        self,
        provider: Voyage,
        jobs: VoyageJobs,
        cache: Cache,
        *,
        submission: Submission,
        job: Job,
        settled: Settled,
    ) -> None:
        self._provider, self._jobs, self._cache = provider, jobs, cache
        self._submission, self._job, self._settled = submission, job, settled
        self._folder = RunFolder(cache.state_uri, submission.name)
        numbers = submission.texts.column("line").to_numpy()
        ends = np.flatnonzero(np.diff(numbers, append=-1)) + 1
        self._ends: npt.NDArray[np.int64] = ends
        self._seen = set[int]()

    def run(self) -> None:
        """Store its answers, then count them; done again, it changes nothing."""
        with self._folder.alive():
            for file in (self._job.output_file, self._job.error_file):
                if file is not None:
                    for row in self._jobs.rows(file):
                        self._take(row)
            calls = self._folder.calls()
            fold(self._folder, self._cache)
            Ledger(self._cache.state_uri).record_calls(calls)
            self._folder.forget_notes()
        self._count_missing()

    def _count_missing(self) -> None:
        """Texts of which no file told: of a job that failed, was cancelled, or was taken before."""
        told = pa.array(sorted(self._seen), pa.int32())
        texts = self._submission.texts
        rest = texts.filter(pc.invert(pc.is_in(texts.column("line"), told)))
        missing = int(np.sum(~self._cache.holds(rest.column("text_hash"))))
        if missing:
            words = "; ".join(self._job.problems[:PROBLEMS]) or f"the job is {self._job.status}"
            self._settled.failed[words] += missing

    def _texts(self, line: int) -> pa.Table:
        start = 0 if line == 1 else int(self._ends[line - 2])
        return self._submission.texts.slice(start, int(self._ends[line - 1]) - start)

    def _take(self, row: Mapping[str, Any]) -> None:
        name = row.get("custom_id")
        if not isinstance(name, str) or not name.isdecimal():
            return
        line = int(name)
        if not 1 <= line <= len(self._ends) or line in self._seen:
            return
        self._seen.add(line)
        texts = self._texts(line)
        response = row.get("response") or {}
        status, body = response.get("status_code"), response.get("body")
        if status == _OK and isinstance(body, dict):
            self._answer(line, texts, body)
            return
        error = row.get("error") or {}
        words = str(error.get("code") or response.get("message") or status)
        self._settled.failed[words] += len(texts)
        if isinstance(status, int) and _REFUSED <= status < _SERVER:
            self._settled.refused += texts.column("text_hash").to_pylist()

    def _answer(self, line: int, texts: pa.Table, body: dict[str, Any]) -> None:
        hashes = texts.column("text_hash").combine_chunks()
        try:
            answer = self._provider.answer_of(body, len(texts), self._job.id)
            vectors = checked_vectors(answer, len(texts), self._provider)
        except AnswerRejected as error:
            billed = error.facts.get("billed_tokens", 0)
            self._folder.note(self._call(line, texts, billed, type(error).__name__))
            self._settled.failed["an answer that is not what was asked for"] += len(texts)
            return
        call = self._call(line, texts, answer.billed_tokens, "ok")
        self._folder.write_answer(hashes, vectors, self._provider.space, call)
        self._settled.texts += len(texts)
        self._settled.tokens += call.tokens_billed
        self._settled.usd += call.usd

    def _call(self, line: int, texts: pa.Table, billed: int, status: str) -> Call:
        return Call(
            run_id=self._submission.name,
            batch=line,
            attempt=1,
            call=1,
            cause="first",
            status=status,
            started_at=self._job.created_at,
            waited=0.0,
            seconds=0.0,
            texts=len(texts),
            tokens_estimated=pc.sum(texts.column("tokens")).as_py() or 0,
            tokens_billed=billed,
            usd=billed * self._submission.usd_per_million_tokens / 1e6,
            request_id=self._job.id,
            model=self._provider.space.model_name,
            index=self._submission.index,
        )
