"""`/v1/files` and `/v1/batches`: the Batch API's requests, from their arrival to their answer."""

import re
import threading
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any, TypeVar
from urllib.parse import parse_qs

from tasks.catalog import ModelFacts
from tasks.simulator import checks, wire
from tasks.simulator.checks import Refused
from tasks.simulator.job import File, Job
from tasks.simulator.job_lines import LineReader, wanted
from tasks.simulator.jobs import Jobs
from tasks.simulator.rules import Endpoint, Rule, Script, Traits
from tasks.simulator.settings import Settings
from tasks.simulator.wire import Reply

PATHS = ("/v1/files", "/v1/batches")
Item = TypeVar("Item", File, Job)
_PAGE, _MOST = 20, 100
_BOUNDARY = re.compile(r'multipart/form-data;.*boundary="?([^";]+)"?')
_NAME = re.compile(rb'[; ]name="([^"]*)"')
_FILENAME = re.compile(rb'filename="([^"]*)"')


@dataclass(frozen=True)
class Request:
    """A request as it came."""

    method: str
    path: str
    query: str
    authorization: str
    content_type: str
    body: bytes


class Lane:
    """Answers requests for files and jobs.

    Args:
        jobs: All there are.
        script: Faults.
    """

    def __init__(self, jobs: Jobs, script: Script) -> None:
        self._jobs = jobs
        self._script = script
        self._lock = threading.Lock()
        self._asked: Counter[str] = Counter()

    def reset(self) -> None:
        """Count requests from 1 again."""
        with self._lock:
            self._asked.clear()

    def answer(
        self, request: Request, settings: Settings, models: dict[str, ModelFacts], seconds: float
    ) -> Reply:
        """What `request` is answered with.

        Args:
            request: Below one of PATHS.
            settings: Of the simulator.
            models: On offer.
            seconds: Since the last reset, simulated.
        """
        key = checks.bearer(request.authorization)
        asking = _Asking(self._jobs, self._script, request, key, settings, models, seconds)
        try:
            endpoint, name = _route(request.method, request.path)
            rule = self._rule(endpoint, key, seconds)
            if rule is not None and rule.early:
                reply = wire.scripted(rule)
            else:
                checks.check_key(key, settings)
                reply = wire.answered(_ACTS[endpoint](asking, name), rule)
        except Refused as refused:
            reply = Reply(refused.status, wire.error(refused.detail, refused.code))
        return replace(reply, request_id=wire.new_request_id())

    def _rule(self, endpoint: Endpoint, key: str, seconds: float) -> Rule | None:
        with self._lock:
            self._asked[endpoint] += 1
            ordinal = self._asked[endpoint]
        return self._script.first(
            Traits(ordinal, seconds, 1, key, model="", texts=(), endpoint=endpoint)
        )


@dataclass(frozen=True)
class _Asking:
    """A request whose key is good, and what it needs to be answered."""

    jobs: Jobs
    script: Script
    request: Request
    key: str
    settings: Settings
    models: dict[str, ModelFacts]
    seconds: float

    def upload(self, _: str) -> bytes:
        filename, data = _uploaded(self.request)
        if len(data) > self.settings.jobs.most_bytes:
            raise Refused(413, "The file is too large.")  # a guess
        return wire.in_json(self.jobs.upload(self.key, filename, data))

    def files(self, _: str) -> bytes:
        return _listed(self.jobs.files(self.key), self.jobs.shown, self.request.query)

    def file(self, name: str) -> bytes:
        return wire.in_json(self.jobs.shown(self.jobs.file(self.key, name)))

    def content(self, name: str) -> bytes:
        return self.jobs.file(self.key, name).read()

    def delete(self, name: str) -> bytes:
        return wire.in_json(self.jobs.delete(self.key, name))

    def create(self, _: str) -> bytes:
        found = wanted(checks.read(self.request.body), self.settings, self.models)
        data = self.jobs.file(self.key, found.input_file).read()
        reader = LineReader(found, self.settings, self.models, self.script, self.key, self.seconds)
        job = self.jobs.create(self.key, found, *reader.read(data), self.settings)
        return wire.in_json(self.jobs.shown_job(job))

    def all_jobs(self, _: str) -> bytes:
        return _listed(self.jobs.jobs(self.key), self.jobs.shown_job, self.request.query)

    def job(self, name: str) -> bytes:
        return wire.in_json(self.jobs.shown_job(self.jobs.job(self.key, name)))

    def cancel(self, name: str) -> bytes:
        return wire.in_json(self.jobs.shown_job(self.jobs.cancel(self.key, name)))


_ACTS: dict[Endpoint, Callable[[_Asking, str], bytes]] = {
    "upload": _Asking.upload,
    "files": _Asking.files,
    "file": _Asking.file,
    "content": _Asking.content,
    "delete": _Asking.delete,
    "create": _Asking.create,
    "jobs": _Asking.all_jobs,
    "job": _Asking.job,
    "cancel": _Asking.cancel,
}
_ROUTES: tuple[tuple[str, str, Endpoint], ...] = (
    ("POST", "/v1/files", "upload"),
    ("GET", "/v1/files", "files"),
    ("GET", "/v1/files/([^/]+)", "file"),
    ("GET", "/v1/files/([^/]+)/content", "content"),
    ("DELETE", "/v1/files/([^/]+)", "delete"),
    ("POST", "/v1/batches", "create"),
    ("GET", "/v1/batches", "jobs"),
    ("GET", "/v1/batches/([^/]+)", "job"),
    ("POST", "/v1/batches/([^/]+)/cancel", "cancel"),
)


def _route(method: str, path: str) -> tuple[Endpoint, str]:
    """What is asked for, and the id in the path; "" without one.

    Raises:
        Refused: There is nothing of that path and method.
    """
    for each, pattern, endpoint in _ROUTES:
        if each == method and (found := re.fullmatch(pattern, path)):
            return endpoint, found[1] if found.groups() else ""
    raise Refused(404, "Not Found")


def _uploaded(request: Request) -> tuple[str, bytes]:
    """Name and bytes of the file in a form.

    Raises:
        Refused: The form has no file, or another purpose.
    """
    found = _BOUNDARY.match(request.content_type)
    parts = request.body.split(b"--" + found[1].encode()) if found else []
    fields: dict[bytes, tuple[bytes, bytes]] = {}
    for part in parts[1:-1]:
        head, _, value = part.partition(b"\r\n\r\n")
        if name := _NAME.search(head):
            fields[name[1]] = (head, value.removesuffix(b"\r\n"))
    if fields.get(b"purpose", (b"", b""))[1] != b"batch" or b"file" not in fields:
        raise Refused(400, "A form with purpose=batch and a file is needed.")  # a guess
    head, data = fields[b"file"]
    filename = _FILENAME.search(head)
    return filename[1].decode("utf-8", "replace") if filename else "file", data


def _listed(items: Sequence[Item], show: Callable[[Item], dict[str, Any]], query: str) -> bytes:
    """A page of a list, of which no other item is shown: to show a file is to make it.

    Raises:
        Refused: The page asked for is none.
    """
    asked = {name: values[-1] for name, values in parse_qs(query).items()}
    limit, after = asked.get("limit", str(_PAGE)), asked.get("after")
    if not limit.isdecimal() or not 1 <= int(limit) <= _MOST:
        raise Refused(400, f"limit: must be 1 to {_MOST}.")  # a guess
    names = [item.id for item in items]
    if after is not None and after not in names:
        raise Refused(400, f"after: there is no {after}.")  # a guess
    start = 0 if after is None else names.index(after) + 1
    page = [show(item) for item in items[start : start + int(limit)]]
    return wire.in_json(
        {
            "object": "list",
            "data": page,
            "first_id": page[0]["id"] if page else None,
            "last_id": page[-1]["id"] if page else None,
            "has_more": start + len(page) < len(items),
        }
    )
