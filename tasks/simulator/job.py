"""One job, which the Batch API calls a batch: a file of requests that is done within hours.

What becomes of it follows from when it was created, how long what takes, and what time it is.
"""

import random
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

from tasks.catalog import ModelFacts
from tasks.simulator import answer, vectors, wire
from tasks.simulator.checks import Asked
from tasks.simulator.settings import JobSettings

ENDED = frozenset({"completed", "failed", "cancelled"})
EXPIRED = {
    "code": "batch_expired",
    "message": "This request could not be executed before the completion window expired.",
}
_HAIR = 1e-9
"""Of a line: times are sums, and one may end that much before its moment."""


@dataclass(frozen=True)
class File:
    """A file of an account.

    Attributes:
        id: Its name.
        purpose: batch, or batch-output.
        filename: For people.
        created: Simulated seconds.
        read: Its bytes; those of an output are made when asked for.
    """

    id: str
    purpose: str
    filename: str
    created: float
    read: Callable[[], bytes] = field(repr=False)


@dataclass(frozen=True)
class Line:
    """One request of a job.

    Attributes:
        custom_id: Its name.
        asked: What it asks for; None where that is wrong.
        dimension: Of its vectors.
        tokens: What it counts.
        error: The line that tells why it has no answer; None where it gets one.
    """

    custom_id: str
    asked: Asked | None
    dimension: int
    tokens: int
    error: dict[str, Any] | None


@dataclass
class Job:
    """A file of requests on its way.

    Attributes:
        id: Its name.
        input_file: Id of the file.
        facts: Of the model of all its lines.
        metadata: As it was given.
        created: Simulated seconds.
        times: How long what takes.
        mode: How its vectors are made.
        lines: In the order of the file.
        problems: Why it fails when it is validated.
        cancelled: When that was asked for.
        billed: So many of its lines, from the first, are in the ledger.
        brought: Ids of those of its files that the account has, or has deleted.
    """

    id: str
    input_file: str
    facts: ModelFacts
    metadata: dict[str, str]
    created: float
    times: JobSettings
    mode: vectors.Mode
    lines: list[Line]
    problems: list[dict[str, Any]]
    cancelled: float | None = None
    billed: int = 0
    brought: set[str] = field(default_factory=set)

    @property
    def begins(self) -> float:
        """When it is validated, and its first line begun."""
        return min(self.created + self.times.validating_s, self.expires)

    @property
    def expires(self) -> float:
        """When what is not done is given up."""
        return self.created + self.times.window_s

    @property
    def worked(self) -> float:
        """When all is done, or given up."""
        if self.cancelled is not None:
            return self.cancelled
        return min(self.begins + len(self.lines) * self.times.line_s, self.expires)

    @property
    def ends(self) -> float:
        """When it is in its last state."""
        if self.problems:
            return self.begins
        times = self.times
        return self.worked + (times.finalizing_s if self.cancelled is None else times.cancelling_s)

    def status(self, now: float) -> str:
        """Its state by then."""
        if self.cancelled is not None:
            return "cancelling" if now < self.ends else "cancelled"
        if now < self.begins:
            return "validating"
        if self.problems:
            return "failed"
        if now < self.worked:
            return "in_progress"
        return "finalizing" if now < self.ends else "completed"

    def done(self, now: float) -> int:
        """How many of its lines, from the first, have been worked on by then."""
        passed = min(now, self.worked) - self.begins
        if self.problems or passed < 0:
            return 0
        if not self.times.line_s:
            return len(self.lines)
        return min(len(self.lines), int(passed / self.times.line_s + _HAIR))

    def usd(self, tokens: int) -> float:
        """What so many of its tokens cost."""
        usd = self.facts.batch_usd(tokens)
        return self.facts.usd(tokens) if usd is None else usd

    def output_id(self, *, good: bool) -> str:
        """The id that the file of its answers, or of its errors, has once it has ended."""
        return f"file-{'output' if good else 'error'}-{self.id.removeprefix('batch-')}"

    def outcomes(self, *, good: bool) -> Iterator[tuple[Line, dict[str, Any] | None]]:
        """Once it has ended: the lines with an answer, or those without and what tells of them.

        Of a job that was cancelled, lines that were not begun stand in neither.
        """
        done = self.done(self.ends)
        for number, line in enumerate(self.lines):
            if number < done and (line.error is None) == good:
                yield line, line.error
            elif number >= done and self.cancelled is None and not good:
                yield line, {"response": None, "error": EXPIRED}

    def output(self, *, good: bool) -> bytes:
        """The file of its answers, or of its errors: a line each, in no order."""
        rows = list(self.outcomes(good=good))
        random.Random(self.id).shuffle(rows)  # noqa: S311
        return b"".join(self._row(line, error) for line, error in rows)

    def _row(self, line: Line, error: dict[str, Any] | None) -> bytes:
        names = {"batch_id": self.id, "custom_id": line.custom_id}
        if error is not None or line.asked is None:
            return wire.in_json({**names, **(error or {})}) + b"\n"
        asked = line.asked
        space = vectors.space_of(asked.model)
        found = vectors.embed(self.mode, space, asked.input_type, asked.texts, line.dimension)
        body = answer.body(asked, found, line.tokens, None, 0)
        head = wire.in_json(names)[:-1]
        return head + b',"response":{"status_code":200,"body":' + body + b'},"error":null}\n'
