"""The Batch API's files and jobs, as an account sees them.

Its objects are those of the documentation (docs.voyageai.com, Batch Inference, 2026); the order of
lists, the words of refusals, and that errors stand in a file of their own are guesses.
"""

import threading
import uuid
from collections.abc import Callable
from datetime import UTC, datetime, timedelta
from typing import Any

from tasks.simulator.checks import Refused
from tasks.simulator.job import ENDED, File, Job, Line
from tasks.simulator.job_lines import ENDPOINT, WINDOW, Wanted
from tasks.simulator.ledger import Ledger, Record, hash_key, hash_texts
from tasks.simulator.settings import JobSettings, Settings

FILE_S = 30 * 24 * 3600.0
"""So long a file is kept."""

Shown = dict[str, Any]


class Jobs:
    """Files and jobs of all accounts; an account is a key. Safe between threads.

    Args:
        ledger: Takes what is billed.
        now: Simulated seconds.
    """

    def __init__(self, ledger: Ledger, now: Callable[[], float]) -> None:
        self._ledger = ledger
        self._now = now
        self._lock = threading.RLock()
        self._files: dict[str, dict[str, File]] = {}
        self._jobs: dict[str, dict[str, Job]] = {}
        self._epoch = datetime.now(tz=UTC)

    def reset(self) -> None:
        """Forget all files and jobs."""
        with self._lock:
            self._files, self._jobs = {}, {}

    def settle(self) -> None:
        """Bill what was done by now, and bring the files of what has ended."""
        with self._lock:
            now = self._now()
            for key, jobs in self._jobs.items():
                for job in jobs.values():
                    self._bill(key, job, now)
                    if job.status(now) in {"completed", "cancelled"}:
                        self._bring(key, job)

    def upload(self, key: str, filename: str, data: bytes) -> Shown:
        """Keep a file of requests."""
        made = File(f"file-{uuid.uuid4().hex}", "batch", filename, self._now(), lambda: data)
        with self._lock:
            self._files.setdefault(key, {})[made.id] = made
        return self.shown(made)

    def files(self, key: str) -> list[File]:
        """All files of an account, input and output, the newest first."""
        with self._lock:
            self.settle()
            return list(reversed(self._files.get(key, {}).values()))

    def file(self, key: str, name: str) -> File:
        """The file of that id.

        Raises:
            Refused: There is none.
        """
        found = next((file for file in self.files(key) if file.id == name), None)
        if found is None:
            raise Refused(404, f"No such file: {name}.")
        return found

    def delete(self, key: str, name: str) -> Shown:
        """Drop a file; errors as in `file`. A job that reads it goes on."""
        self.file(key, name)
        with self._lock:
            self._files[key].pop(name, None)
        return {"id": name, "object": "file", "deleted": True}

    def create(
        self,
        key: str,
        wanted: Wanted,
        lines: list[Line],
        problems: list[Shown],
        settings: Settings,
    ) -> Job:
        """Take a job in.

        Raises:
            Refused: The account has too much under way.
        """
        now = self._now()
        job = Job(
            id=f"batch-{uuid.uuid4().hex}",
            input_file=wanted.input_file,
            facts=wanted.facts,
            metadata=wanted.metadata,
            created=now,
            times=settings.jobs,
            mode=settings.vectors,
            lines=lines,
            problems=problems,
        )
        with self._lock:
            jobs = self._jobs.setdefault(key, {})
            _require_room([*jobs.values(), job], settings.jobs, now)
            jobs[job.id] = job
        self._ledger.job()
        return job

    def jobs(self, key: str) -> list[Job]:
        """All jobs of an account, the newest first."""
        with self._lock:
            self.settle()
            return list(reversed(self._jobs.get(key, {}).values()))

    def job(self, key: str, name: str) -> Job:
        """The job of that id.

        Raises:
            Refused: There is none.
        """
        found = next((job for job in self.jobs(key) if job.id == name), None)
        if found is None:
            raise Refused(404, f"No such batch: {name}.")
        return found

    def cancel(self, key: str, name: str) -> Job:
        """Have it work on no further line.

        Raises:
            Refused: There is no such job, or it has ended.
        """
        with self._lock:
            job, now = self.job(key, name), self._now()
            if job.status(now) in ENDED | {"finalizing"}:
                raise Refused(400, f"Batch {name} cannot be cancelled any more.")
            if job.cancelled is None:
                job.cancelled = max(now, job.begins)
            return job

    def _bill(self, key: str, job: Job, now: float) -> None:
        done = job.done(now)
        for line in job.lines[job.billed : done]:
            if line.error is None and line.asked is not None:
                self._ledger.line(
                    Record(
                        ordinal=0,
                        t=now,
                        key=hash_key(key),
                        model=line.asked.model,
                        input_type=line.asked.input_type,
                        dimension=line.dimension,
                        dtype=line.asked.dtype,
                        n_texts=len(line.asked.texts),
                        tokens=line.tokens,
                        billed_tokens=line.tokens,
                        status=200,
                        fault=None,
                        request_id="",
                        connection=0,
                        hashes=hash_texts(line.asked.texts),
                        lane="batch",
                    ),
                    usd=job.usd(line.tokens),
                )
        job.billed = max(job.billed, done)

    def _bring(self, key: str, job: Job) -> None:
        for good in (True, False):
            name = job.output_id(good=good)
            if name not in job.brought and any(job.outcomes(good=good)):
                job.brought.add(name)
                filename = f"batch_{job.id}_{'output' if good else 'error'}"
                file = File(name, "batch-output", filename, job.ends, _reader(job, good=good))
                self._files.setdefault(key, {})[name] = file

    def shown(self, file: File) -> Shown:
        """A file as the API shows it."""
        return {
            "object": "file",
            "id": file.id,
            "purpose": file.purpose,
            "filename": file.filename,
            "bytes": len(file.read()),
            "created_at": self._moment(file.created),
            "expires_at": self._moment(file.created + FILE_S),
        }

    def shown_job(self, job: Job) -> Shown:
        """A job as the API shows it."""
        now = self._now()
        status, done = job.status(now), job.lines[: job.done(now)]
        completed = sum(line.error is None for line in done)
        failed = len(done) - completed
        ended = status in {"completed", "cancelled"}
        if status == "completed":
            failed = len(job.lines) - completed
        cancelled, bad = job.cancelled is not None, bool(job.problems)

        def at(moment: float, *, when: bool) -> str | None:
            return self._moment(moment) if when and now >= moment else None

        def output(*, good: bool) -> str | None:
            return job.output_id(good=good) if ended and any(job.outcomes(good=good)) else None

        return {
            "id": job.id,
            "object": "batch",
            "endpoint": ENDPOINT,
            "errors": {"object": "list", "data": job.problems} if status == "failed" else None,
            "input_file_id": job.input_file,
            "completion_window": WINDOW,
            "model": job.facts.name,
            "status": status,
            "output_file_id": output(good=True),
            "error_file_id": output(good=False),
            "request_counts": {
                "total": len(job.lines),
                "completed": completed,
                "failed": failed,
            },
            "metadata": job.metadata,
            "created_at": self._moment(job.created),
            "in_progress_at": at(job.begins, when=not bad),
            "finalizing_at": at(job.worked, when=not (bad or cancelled)),
            "completed_at": at(job.ends, when=not (bad or cancelled)),
            "failed_at": at(job.begins, when=bad),
            "expected_completion_at": self._moment(job.expires),
            "cancelling_at": at(job.worked, when=cancelled),
            "cancelled_at": at(job.ends, when=cancelled),
        }

    def _moment(self, seconds: float) -> str:
        moment = self._epoch + timedelta(seconds=seconds)
        return moment.isoformat(timespec="milliseconds").replace("+00:00", "Z")


def _reader(job: Job, *, good: bool) -> Callable[[], bytes]:
    return lambda: job.output(good=good)


def _require_room(jobs: list[Job], most: JobSettings, now: float) -> None:
    """Of `jobs` the last is the new one."""
    going = [job for job in jobs if job.status(now) not in ENDED]
    if len(going) > most.most_in_flight:
        raise Refused(429, f"At most {most.most_in_flight:,} batches may be in flight.")
    if sum(line.tokens for job in going for line in job.lines) > most.most_enqueued_tokens:
        raise Refused(429, f"At most {most.most_enqueued_tokens:,} tokens may be enqueued.")
