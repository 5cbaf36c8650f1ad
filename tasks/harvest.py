"""Harvest: the answers of a job that has ended are taken in, line by line.

They are written to a journal of its own and from there on go the way of all answers, so what a
kill cuts off is done again and changes nothing.
"""

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc

from tasks.cache import Cache
from tasks.errors import AnswerRejected, JobLost, ProviderError
from tasks.job_notes import Submission
from tasks.journal import RunFolder, StoredAnswer, fold
from tasks.ledger import Ledger
from tasks.memory import MOST
from tasks.notes import Call
from tasks.providers import checked_vectors
from tasks.providers.failures import LATER
from tasks.providers.voyage import Voyage
from tasks.providers.voyage_jobs import Job, VoyageJobs
from tasks.schemas import HASH

KEPT_S = 30 * 86_400.0
"""So long files are kept, by the documentation; who is gone by then has gone for good."""
LONGEST_NAME = 9
"""Digits of a line's number, at most."""
PROBLEMS = 3
"""Of a job that failed, so many are told."""
_OK, _REFUSED, _SERVER = 200, 400, 500
_PASSES = LATER | {429}
"""Refusals that another job may not meet."""


@dataclass
class Settled:
    """What a run has seen become of the jobs of a space.

    Attributes:
        waiting: Those under way.
        calls: A line of theirs as a call each, of all whose answers have come.
        came: text_hash of the texts whose vectors have come, with the index they were for.
        failed: Texts without a vector, by what the provider says.
        troubles: Jobs that could not be settled, and why; they are among the waiting ones.
    """

    waiting: list[Submission] = field(default_factory=list)
    calls: list[Call] = field(default_factory=list)
    came: list[tuple[str, pa.Array]] = field(default_factory=list)
    failed: Counter[str] = field(default_factory=Counter)
    troubles: list[tuple[Submission, ProviderError]] = field(default_factory=list)

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


class Harvest:
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
        self._seen, self._rejected = set[int](), set[int]()
        self._unfolded, self._held = list[StoredAnswer](), 0
        self.refused = list[bytes]()

    def run(self) -> None:
        """Store its answers, then count them; done again, it changes nothing.

        Raises:
            JobLost: Its files lack answers that it is said to have; the others are stored.
        """
        with self._folder.alive():
            for file in (self._job.output_file, self._job.error_file):
                if file is not None:
                    for row in self._jobs.rows(file):
                        self._take(row)
            calls = self._folder.calls()
            fold(self._folder, self._cache, self._unfolded)
            fold(self._folder, self._cache)  # and what a run that died left there
            Ledger(self._cache.state_uri).record_calls(calls)
            self._folder.forget_notes()
        self._require_whole()
        self._settled.calls += calls
        self._count_missing()

    def _require_whole(self) -> None:
        """What was paid for must not be paid for again because a file was cut or is gone."""
        if self._submission.age_s >= KEPT_S:
            return
        held = self._cache.holds(self._submission.texts.column("text_hash"))
        stored = np.logical_and.reduceat(held, [0, *self._ends[:-1]])
        stored[[line - 1 for line in self._rejected]] = True
        if (lacking := self._job.lines[1] - int(stored.sum())) > 0:
            raise JobLost(
                f"The files of job {self._job.id} lack {lacking:,} of its "
                f"{self._job.lines[1]:,} answers. They may come later. If they are lost, remove "
                f"the folder jobs/{self._cache.space.id}/{self._submission.name} in state.uri; "
                "what is missing is then paid for again."
            )

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
        if not isinstance(name, str) or not name.isdecimal() or len(name) > LONGEST_NAME:
            return
        line = int(name)
        if not 1 <= line <= len(self._ends) or line in self._seen:
            return
        self._seen.add(line)
        texts = self._texts(line)
        response, error = (_named(row.get(each)) for each in ("response", "error"))
        status, body = response.get("status_code"), response.get("body")
        if status == _OK and isinstance(body, dict):
            self._answer(line, texts, body)
            return
        words = str(error.get("code") or response.get("message") or status)
        self._settled.failed[words] += len(texts)
        lasts = isinstance(status, int) and _REFUSED <= status < _SERVER
        if lasts and status not in _PASSES:
            self.refused += texts.column("text_hash").to_pylist()

    def _answer(self, line: int, texts: pa.Table, body: dict[str, Any]) -> None:
        hashes, answer = texts.column("text_hash").combine_chunks(), None
        try:
            answer = self._provider.answer_of(body, len(texts), self._job.id)
            vectors = checked_vectors(answer, len(texts), self._provider)
        except AnswerRejected as error:
            billed = answer.billed_tokens if answer else error.facts.get("billed_tokens", 0)
            self.refused += hashes.to_pylist()
            self._folder.note(self._call(line, texts, billed, type(error).__name__))
            self._rejected.add(line)
            self._settled.failed["an answer that is not what was asked for"] += len(texts)
            return
        call = self._call(line, texts, answer.billed_tokens, "ok")
        stored = self._folder.write_answer(hashes, vectors, self._provider.space, call)
        self._unfolded.append(stored)
        self._held += vectors.nbytes
        if self._held > MOST.folded:
            fold(self._folder, self._cache, self._unfolded)
            self._unfolded, self._held = [], 0
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


def _named(said: object) -> dict[str, Any]:
    """What was said, if it has names at all."""
    return said if isinstance(said, dict) else {}
