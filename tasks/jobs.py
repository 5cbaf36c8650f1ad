"""Jobs: texts go into a provider's Batch lane, and what comes of them is taken in.

The notes of a job are written before it is created and go last, so whatever a kill cuts off is
done again, and nothing is submitted or counted twice.
"""

import functools
import json
import uuid
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import suppress
from dataclasses import replace
from datetime import UTC, datetime
from pathlib import Path
from time import monotonic, sleep
from typing import NamedTuple

import numpy as np
import pyarrow as pa

from tasks.budget import may_be_charged
from tasks.cache import Cache
from tasks.errors import JobLost, ProviderDenied, ProviderError
from tasks.harvest import KEPT_S, Harvest, Settled
from tasks.job_notes import JOB_TEXTS, JobNotes, Submission
from tasks.progress import tell_waiting
from tasks.providers.voyage import Voyage
from tasks.providers.voyage_jobs import Job, VoyageJobs
from tasks.schemas import BATCH, Batch, writing_file

NAME = "embed_once"
"""Of the pair of a job's metadata that says which of ours it is."""
SURE_S = 600.0
"""So long after it was written down a job that nobody has heard of may still turn up."""
CANCELS_S, LOOK_S = 900.0, 5.0
"""A job that is cancelled takes up to 10 minutes to end, by the documentation."""
LINE_BYTES = 100
"""What a line has beside its texts, at most."""


class Most(NamedTuple):
    """What one job may hold: Voyage's limits, with room below them."""

    texts: int = 100_000
    bytes: int = 90 << 20
    tokens: int = 400_000_000


MOST = Most()


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
        submission = Submission(file.stem, _now(), index, usd_per_million_tokens, texts)
        notes.write(submission)
        try:
            uploaded = jobs.upload(file)
            # An upload may take long, and from now on it may be there without our knowing.
            submission = replace(submission, made_at=_now())
            notes.write(submission)
            created = jobs.create(uploaded, {NAME: submission.name})
        except ProviderError as error:
            if not may_be_charged(error):  # then there is no job, and its texts are free
                notes.write_done(submission)
                _clear(submission, jobs, notes)
            raise
        finally:
            file.unlink()
        yield notes.write_id(submission, created.id)


def _now() -> str:
    return datetime.now(tz=UTC).isoformat(timespec="milliseconds")


def _files(batches: Iterable[Batch], folder: Path, most: Most) -> Iterator[tuple[Path, pa.Table]]:
    """Files of requests in the staging folder, with their JOB_TEXTS."""
    current: _Requests | None = None
    try:
        for batch in batches:
            rows = batch.table.load(BATCH)
            texts = json.dumps(rows.column("text").to_pylist()).encode()
            if current is not None and current.is_full_with(batch, rows, texts, most):
                yield current.close()
                current = None
            if current is None:
                current = _Requests(folder)
            current.add(batch, rows, texts)
        if current is not None:
            yield current.close()
    finally:
        if current is not None:
            current.file.close()


class _Requests:
    """A file of requests that is being written, a batch a line."""

    def __init__(self, folder: Path) -> None:
        self.path = folder / f"job-{uuid.uuid4().hex}.jsonl"
        with writing_file(self.path):
            self.file = self.path.open("wb")
        self._parts = list[pa.Table]()
        self._texts = self._tokens = 0

    def is_full_with(self, batch: Batch, rows: pa.Table, texts: bytes, most: Most) -> bool:
        """Whether this batch belongs into the next one."""
        return (
            self._texts + rows.num_rows > most.texts
            or self.file.tell() + len(texts) + LINE_BYTES > most.bytes
            or self._tokens + batch.tokens > most.tokens
        )

    def add(self, batch: Batch, rows: pa.Table, texts: bytes) -> None:
        line = len(self._parts) + 1
        with writing_file(self.path):
            self.file.write(b'{"custom_id": "%d", "body": {"input": %s}}\n' % (line, texts))
        number = pa.array(np.full(rows.num_rows, line, np.int32))
        columns = [number, rows.column("text_hash"), rows.column("tokens")]
        self._parts.append(pa.Table.from_arrays(columns, schema=JOB_TEXTS))
        self._texts, self._tokens = self._texts + rows.num_rows, self._tokens + batch.tokens

    def close(self) -> tuple[Path, pa.Table]:
        with writing_file(self.path):
            self.file.close()
        return self.path, pa.concat_tables(self._parts)


def settle(
    provider: Voyage, jobs: VoyageJobs, notes: JobNotes, cache: Cache, settled: Settled
) -> None:
    """See what has become of all jobs of a space, and take in what they bring.

    Args:
        provider: Who made them.
        jobs: Its calls.
        notes: Held by the caller.
        cache: Of the space.
        settled: What the run has seen before; this goes on in it. Jobs that the provider does
            not tell of are its troubles.

    Raises:
        StorageFailed: The state cannot be read or written.
    """
    settled.waiting, settled.troubles = [], []
    listed = functools.cache(lambda: {job.metadata.get(NAME): job.id for job in jobs.jobs()})
    trouble: ProviderError | None = None
    for found in notes.all():
        try:
            if trouble is not None and not found.done:
                raise trouble
            is_settled = _settle_one(provider, jobs, notes, cache, settled, found, listed)
        except ProviderError as error:
            settled.troubles.append((found, error))
            trouble = trouble if isinstance(error, JobLost) else error  # of all of them
            is_settled = False
        if not is_settled:
            settled.waiting.append(found)


def _settle_one(  # noqa: PLR0917 - as `settle`
    provider: Voyage,
    jobs: VoyageJobs,
    notes: JobNotes,
    cache: Cache,
    settled: Settled,
    submission: Submission,
    listed: Callable[[], Mapping[str | None, str]],
) -> bool:
    """Take in a job if it has ended; whether nothing of it is to come any more."""
    if submission.done:
        _clear(submission, jobs, notes)
        return True
    if submission.id is None:
        job_id = listed().get(submission.name)
        if job_id is None:
            if submission.age_s < SURE_S:
                return False
            _clear(submission, jobs, notes)
            return True
        submission = notes.write_id(submission, job_id)
    job = jobs.job(str(submission.id))
    if job is None:
        _require_old(submission, provider)
        settled.failed["Voyage no longer knows the job"] += submission.texts.num_rows
        notes.forget(submission)
        return True
    if not job.ended:
        return False
    harvest = Harvest(provider, jobs, cache, submission=submission, job=job, settled=settled)
    harvest.run()
    if harvest.refused:
        notes.refuse(harvest.refused, cache)
    notes.write_done(submission)
    _clear(submission, jobs, notes, job)
    return True


def _require_old(submission: Submission, provider: Voyage) -> None:
    """A job that is not there was dropped, or is another account's, which will be billed for it."""
    if submission.age_s < KEPT_S:
        raise JobLost(
            f"The account of {provider.key_source} does not know the job {submission.id} of "
            f"{submission.made_at[:16]}. Use the key that it was made with. If it is lost, remove "
            f"the folder jobs/{provider.space.id}/{submission.name} in state.uri; its "
            f"{submission.texts.num_rows:,} texts are then paid for again."
        )


def settle_at_once(  # noqa: PLR0917 - as `settle`
    provider: Voyage,
    jobs: VoyageJobs,
    notes: JobNotes,
    cache: Cache,
    settled: Settled,
    index: str,
) -> None:
    """The same where an index can wait no longer: its jobs are cancelled, what they have is taken.

    What has not ended after CANCELS_S stays under way. Args as in `settle`.

    Raises:
        ProviderError: The provider does not take that they are cancelled.
        StorageFailed: As in `settle`.
    """
    settle(provider, jobs, notes, cache, settled)
    heard = {each.name: str(each.id) for each in settled.waiting if each.index == index and each.id}
    for job_id in heard.values():
        try:
            jobs.cancel(job_id)
        except ProviderDenied:  # it has ended just now, or is about to
            continue
    until = monotonic() + CANCELS_S
    while heard.keys() & {each.name for each in settled.waiting} and monotonic() < until:
        tell_waiting(f"{len(heard):,} jobs of the Batch lane are cancelled, which takes minutes")
        sleep(LOOK_S)
        settle(provider, jobs, notes, cache, settled)


def _clear(
    submission: Submission, jobs: VoyageJobs, notes: JobNotes, job: Job | None = None
) -> None:
    """Remove what the provider keeps of a job, then what we know of it; the former may wait."""
    files = [] if job is None else [job.input_file, job.output_file, job.error_file]
    with suppress(ProviderError):  # then the next run does
        if job is None:
            ours = {f"{submission.name}.jsonl", f"batch_{submission.id}_output"}
            files = [file for file, name in jobs.files() if name in ours]
        for file in files:
            if file is not None:
                jobs.delete(file)
        notes.forget(submission)
