"""What a job asks for: its own arguments, and the lines of its file.

The words of a refusal, and the codes of what fails a job, are guesses.
"""

import json
from dataclasses import dataclass
from typing import Any

from tasks.catalog import ModelFacts
from tasks.simulator import checks
from tasks.simulator.checks import Refused
from tasks.simulator.job import Line
from tasks.simulator.rules import Script, Traits
from tasks.simulator.settings import Settings

ENDPOINT = "/v1/embeddings"
WINDOW = "12h"
_ARGUMENTS = ("endpoint", "input_file_id", "completion_window", "request_params", "metadata")
_MOST_PAIRS, _LONGEST_NAME, _LONGEST_VALUE = 16, 64, 512


@dataclass(frozen=True)
class Wanted:
    """The arguments of a job.

    Attributes:
        input_file: Id of its file.
        params: Arguments that all lines share; the model is one.
        facts: Of the model.
        metadata: To be kept with it.
    """

    input_file: str
    params: dict[str, Any]
    facts: ModelFacts
    metadata: dict[str, str]


def wanted(body: object, settings: Settings, models: dict[str, ModelFacts]) -> Wanted:
    """The arguments in the body of a request for a job.

    Raises:
        Refused: One is missing, unknown or wrong, or the model has no such lane.
    """
    if not isinstance(body, dict) or set(body) - set(_ARGUMENTS):
        raise Refused(400, f"A batch takes {', '.join(_ARGUMENTS)}, and nothing else.")
    given = {name: value for name, value in body.items() if value is not None}
    if given.get("endpoint") != ENDPOINT:
        raise Refused(400, f"endpoint: only {ENDPOINT} is simulated.")
    if given.get("completion_window") != WINDOW:
        raise Refused(400, f"completion_window: must be {WINDOW}.")
    if not isinstance(file := given.get("input_file_id"), str):
        raise Refused(400, "input_file_id: must name a file.")
    params, metadata = given.get("request_params"), given.get("metadata", {})
    if not isinstance(params, dict) or "input" in params:
        raise Refused(400, "request_params: must be the arguments that all lines share.")
    if not isinstance(metadata, dict) or not _is_metadata(metadata):
        raise Refused(400, "metadata: at most 16 pairs of text, of 64 and 512 characters.")
    facts = models.get(str(params.get("model")))
    if facts is None or (settings.strict and not facts.batch_lane):
        raise Refused(400, f"Model {params.get('model')} is not supported in batches.")
    return Wanted(file, params, facts, metadata)


def _is_metadata(pairs: dict[Any, Any]) -> bool:
    def fits(text: object, most: int) -> bool:
        return isinstance(text, str) and len(text) <= most

    names = all(fits(name, _LONGEST_NAME) for name in pairs)
    return (
        len(pairs) <= _MOST_PAIRS
        and names
        and all(fits(value, _LONGEST_VALUE) for value in pairs.values())
    )


@dataclass(frozen=True)
class LineReader:
    """Reads the lines of a job's file.

    Attributes:
        wanted: The job's arguments.
        settings: Of the simulator.
        models: On offer.
        script: Its faults; those of single lines are asked for.
        key: Of the account.
        seconds: Since the last reset, simulated.
    """

    wanted: Wanted
    settings: Settings
    models: dict[str, ModelFacts]
    script: Script
    key: str
    seconds: float

    def read(self, data: bytes) -> tuple[list[Line], list[dict[str, Any]]]:
        """All lines of the file; or none, and why the job fails."""
        rows, most = data.splitlines(), self.settings.jobs.most_lines
        if not rows:
            return [], [_problem(None, "empty_file", "The file holds no request.")]
        if len(rows) > most:
            return [], [_problem(None, "too_many_lines", f"A file holds at most {most:,} lines.")]
        lines, problems, names = list[Line](), list[dict[str, Any]](), set[str]()
        for number, row in enumerate(rows, 1):
            found = _read(row)
            if found is None:
                words = "A line is an object of custom_id, a text, and body, an object."
                problems.append(_problem(number, "invalid_line", words))
                continue
            name, body = found
            if name in names:
                words = "Each line needs a custom_id of its own."
                problems.append(_problem(number, "duplicate_custom_id", words))
            names.add(name)
            lines.append(self._line(number, name, body))
        return ([], problems) if problems else (lines, [])

    def _line(self, number: int, name: str, body: dict[str, Any]) -> Line:
        facts = self.wanted.facts
        try:
            asked = checks.arguments({**self.wanted.params, **body}, self.settings, self.models)
            tokens = checks.count(asked, facts, self.settings)
        except Refused as refused:
            return Line(name, None, 0, 0, _failed(refused.status, refused.detail))
        dimension = asked.output_dimension or facts.default_dimension
        traits = Traits(
            ordinal=number,
            seconds=self.seconds,
            in_flight=1,
            key=self.key,
            model=asked.model,
            texts=asked.texts,
            endpoint="line",
        )
        error, rule = None, self.script.first(traits)
        if rule is not None:
            words = rule.detail if isinstance(rule.detail, str) else "Simulated fault."
            error = _failed(rule.status or 500, words)
        return Line(name, asked, dimension, tokens, error)


def _read(row: bytes) -> tuple[str, dict[str, Any]] | None:
    """Name and body of a line; None where it is none."""
    try:
        found = json.loads(row)
    except (ValueError, RecursionError):
        return None
    if not isinstance(found, dict) or set(found) != {"custom_id", "body"}:
        return None
    name, body = found["custom_id"], found["body"]
    return (name, body) if isinstance(name, str) and isinstance(body, dict) else None


def _problem(line: int | None, code: str, message: str) -> dict[str, Any]:
    return {"code": code, "line": line, "message": message, "param": None}


def _failed(status: int, message: str) -> dict[str, Any]:
    return {"response": {"status_code": status, "message": message}, "error": None}
