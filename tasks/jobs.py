"""Jobs: texts go into a provider's Batch lane, and what comes of them is taken in.

The answers of a job are written to a journal of its own and from there on go the way of all
answers. Its notes go last, so whatever a kill cuts off is done again, and nothing is submitted or
counted twice.
"""

import json
import time
import uuid
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass, field
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
from tasks.job_notes import JOB_TEXTS, JobNotes, Submission
from tasks.journal import RunFolder, fold
from tasks.ledger import Ledger
from tasks.notes import Call
from tasks.progress import tell_waiting
from tasks.providers import checked_vectors
from tasks.providers.voyage import Voyage
from tasks.providers.voyage_jobs import Job, VoyageJobs
from tasks.schemas import BATCH, HASH, Batch

NAME = "embed_once"
"""Of the pair of a job's metadata that says which of ours it is."""
SURE_S = 600.0
"""So long after it was written down a job that nobody has heard of may still turn up."""
CANCELS_S, LOOK_S = 900.0, 5.0
"""A job that is cancelled takes up to 10 minutes to end, by the documentation."""
PROBLEMS = 3
"""Of a job that failed, so many are told."""
_OK, _REFUSED, _SERVER = 200, 400, 500


class Most(NamedTuple):
    """What one job may hold: Voyage's limits, with room below them."""

    texts: int = 100_000
    bytes: int = 90 << 20
    tokens: int = 400_000_000


MOST = Most()


@dataclass
class Settled:
    """What a run has seen become of the jobs of a space.

    Attributes:
        waiting: Those under way.
        calls: A line of theirs as a call each, of all whose answers have come.
        came: text_hash of the texts whose vectors have come, with the index they were for.
        failed: Texts without a vector, by what the provider says.
    """

    waiting: list[Submission] = field(default_factory=list)
    calls: list[Call] = field(default_factory=list)
    came: list[tuple[str, pa.Array]] = field(default_factory=list)
    failed: Counter[str] = field(default_factory=Counter)

    @property
    def texts(self) -> int:
        """How many vectors have come."""
        return sum(call.texts for call in self.calls if call.status == "ok")

    @property
    def tokens(self) -> int:
        """What they were billed."""
        return sum(call.tokens_billed for call in self.calls)

    @property
    def usd(self) -> float:
        """What they cost."""
        return sum(call.usd for call in self.calls)

    def hashes(self, index: str | None = None) -> pa.Array:
        """text_hash of the texts whose vectors have come, of all or of one index."""
        columns = [hashes for place, hashes in self.came if index in {None, place}]
        return pa.concat_arrays([pa.array([], HASH), *columns])


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


def settle(
    provider: Voyage, jobs: VoyageJobs, notes: JobNotes, cache: Cache, settled: Settled
) -> None:
    """See what has become of all jobs of a space, and take in what they bring.

    Args:
        provider: Who made them.
        jobs: Its calls.
        notes: Held by the caller.
        cache: Of the space.
        settled: What the run has seen before; this goes on in it.

    Raises:
        ProviderError: The provider does not tell; what it brought so far is kept.
        StorageFailed: The state takes it not.
    """
    settled.waiting = []
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
        harvest = _Harvest(provider, jobs, cache, submission=found, job=job, settled=settled)
        harvest.run()
        if harvest.refused:
            notes.refuse(harvest.refused, cache)
        _forget(found, jobs, notes, job)


def settle_at_once(  # noqa: PLR0917 - as `settle`
    provider: Voyage,
    jobs: VoyageJobs,
    notes: JobNotes,
    cache: Cache,
    settled: Settled,
    index: str,
) -> None:
    """The same where an index can wait no longer: its jobs are cancelled, what they have is taken.

    What has not ended after CANCELS_S stays under way. Args and errors as in `settle`.
    """
    settle(provider, jobs, notes, cache, settled)
    heard = {each.name: str(each.id) for each in settled.waiting if each.index == index and each.id}
    for job_id in heard.values():
        try:
            jobs.cancel(job_id)
        except ProviderError:
            if not jobs.job(job_id).ended:  # else it has ended just now
                raise
    until = time.monotonic() + CANCELS_S
    while heard.keys() & {each.name for each in settled.waiting} and time.monotonic() < until:
        tell_waiting(f"{len(heard):,} jobs of the Batch lane are cancelled, which takes minutes")
        time.sleep(LOOK_S)
        settle(provider, jobs, notes, cache, settled)


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
    """Takes in one job that has ended.

    Attributes:
        refused: text_hash of what another job would refuse again.
    """

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
        self.refused = list[bytes]()

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
        self._settled.calls += calls
        self._count_missing()

    def _count_missing(self) -> None:
        """Texts of which no file told: of a job that failed, was cancelled, or was taken before."""
        told = pa.array(sorted(self._seen), pa.int32())
        texts = self._submission.texts
        rest = texts.filter(pc.invert(pc.is_in(texts.column("line"), told)))
        missing = rest.filter(pa.array(~self._cache.holds(rest.column("text_hash"))))
        if missing.num_rows:
            words = "; ".join(self._job.problems[:PROBLEMS]) or f"the job is {self._job.status}"
            self._settled.failed[words] += missing.num_rows
            if self._job.status == "failed":
                self.refused += missing.column("text_hash").to_pylist()

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
            self.refused += texts.column("text_hash").to_pylist()

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
        self._settled.came.append((self._submission.index, hashes))

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
            lane="batch",
        )
