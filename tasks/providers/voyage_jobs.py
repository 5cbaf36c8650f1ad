"""Voyage's Batch API: files of requests that are done within hours, for a third less.

What the API calls a batch is a job here. The SDK knows no such calls (0.5), so they are made over
HTTP, as the documentation has them (docs.voyageai.com, Batch Inference, 2026).
"""

import functools
import json
import ssl
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx
from pydantic import SecretStr

from tasks.errors import (
    ProviderBusy,
    ProviderDenied,
    ProviderError,
    ProviderThrottled,
    ProviderUnreachable,
)
from tasks.providers.deadline import host_of
from tasks.providers.failures import LATER, SERVER, Asked, Case
from tasks.providers.reply import Reply
from tasks.providers.voyage import Voyage

ENDPOINT, WINDOW = "/v1/embeddings", "12h"
WINDOW_S = 12 * 3600.0
FULL_S = 30 * 60.0
"""So long to wait where the account has too much under way, by the documentation."""
_PAGE = 100
_CONNECT_S, _ANSWER_S = 10.0, 120.0
_AGAIN_S = (1.0, 4.0)
"""Pauses before a question is asked again that nobody answered."""
_THROTTLED, _MISSING = 429, 404


@dataclass(frozen=True)
class Job:
    """A job as the API shows it.

    Attributes:
        id: Its name.
        status: validating, in_progress, finalizing or cancelling; else it has ended, as
            completed, failed or cancelled.
        input_file: Id of the file of its requests.
        output_file: Id of the file of its answers; None before it has ended, or without any.
        error_file: The same of what failed.
        metadata: As it was given.
        created_at: ISO 8601, UTC.
        lines: In all, completed, failed.
        problems: Why it failed, in the API's words.
    """

    id: str
    status: str
    input_file: str
    output_file: str | None
    error_file: str | None
    metadata: Mapping[str, str]
    created_at: str
    lines: tuple[int, int, int]
    problems: tuple[str, ...] = field(default=(), repr=False)

    @property
    def ended(self) -> bool:
        """Whether nothing more becomes of it."""
        return self.status not in {"validating", "in_progress", "finalizing", "cancelling"}

    @classmethod
    def read(cls, said: Any) -> "Job":
        """What the API said of it.

        Raises:
            AttributeError, KeyError, TypeError, ValueError: It is no job.
        """
        counts, errors = said.get("request_counts") or {}, said.get("errors") or {}
        problems = [
            f"line {one.get('line')}: {one.get('message')}" for one in errors.get("data") or ()
        ]
        return cls(
            id=str(said["id"]),
            status=str(said["status"]),
            input_file=str(said["input_file_id"]),
            output_file=said.get("output_file_id"),
            error_file=said.get("error_file_id"),
            metadata=dict(said.get("metadata") or {}),
            created_at=str(said["created_at"]),
            lines=tuple(int(counts.get(each) or 0) for each in ("total", "completed", "failed")),  # type: ignore[arg-type]
            problems=tuple(problems),
        )


@functools.cache
def _trusted() -> ssl.SSLContext:
    """Whose certificates are taken; reading them takes a tenth of a second."""
    return httpx.create_ssl_context()


class VoyageJobs:
    """The calls, with the key and at the address of a provider.

    All of them raise `ProviderBusy` for what may work later, `ProviderThrottled` where the account
    has too much under way, and `ProviderDenied` where none can work.
    """

    def __init__(self, provider: Voyage) -> None:
        self._provider = provider
        self._url = (provider.base_url or "https://api.voyageai.com/v1").rstrip("/")

    def upload(self, file: Path) -> str:
        """Bring a file of requests there; its id."""
        with file.open("rb") as lines:
            said = self._ask(
                "POST", "files", data={"purpose": "batch"}, files={"file": (file.name, lines)}
            )
        return str(self._of(said, "id"))

    def create(self, input_file: str, metadata: Mapping[str, str], **more: str) -> Job:
        """Have the requests of a file done, with `more` said of them. It alone costs money."""
        params = {
            "model": self._provider.model,
            "input_type": self._provider.input_type,
            "truncation": False,
            "output_dtype": self._provider.dtype,
            "output_dimension": self._provider.dimension,
            **more,
        }
        wanted = {
            "endpoint": ENDPOINT,
            "input_file_id": input_file,
            "completion_window": WINDOW,
            "request_params": {name: value for name, value in params.items() if value is not None},
            "metadata": dict(metadata),
        }
        return self._job(self._ask("POST", "batches", json=wanted))

    def job(self, name: str) -> Job | None:
        """A job as it is now; None where the account has none of that name."""
        said = self._ask("GET", f"batches/{name}", missing_is_fine=True)
        return None if said is None else self._job(said)

    def jobs(self) -> Iterator[Job]:
        """All jobs of the account."""
        return map(self._job, self._pages("batches"))

    def cancel(self, name: str) -> Job:
        """Have no further line of it done; what is done stays and is billed."""
        return self._job(self._ask("POST", f"batches/{name}/cancel"))

    def files(self) -> Iterator[tuple[str, str]]:
        """Id and name of all files of the account."""
        found = self._pages("files")
        return ((str(self._of(each, "id")), str(self._of(each, "filename"))) for each in found)

    def rows(self, file: str) -> Iterator[dict[str, Any]]:
        """The lines of a file, in no order; none where it is not there any more.

        A line that is no JSON is left out: had it broken off on its way, HTTP would tell.
        """
        with self._answer("GET", f"files/{file}/content", missing_is_fine=True) as answer:
            for line in _lines(answer) if answer.is_success else ():
                with suppress(ValueError):
                    row = json.loads(line)
                    yield row if isinstance(row, dict) else {}

    def delete(self, file: str) -> None:
        """Remove a file; one that is not there is no error."""
        with self._answer("DELETE", f"files/{file}", missing_is_fine=True):
            pass

    def _pages(self, path: str) -> Iterator[dict[str, Any]]:
        after: dict[str, str] = {}
        while True:
            said = self._ask("GET", path, params={"limit": str(_PAGE), **after})
            yield from self._of(said, "data")
            if not self._of(said, "has_more"):
                return
            after = {"after": self._of(said, "last_id")}

    def _job(self, said: Any) -> Job:
        try:
            return Job.read(said)
        except (AttributeError, KeyError, TypeError, ValueError) as error:
            raise self._odd("what is no job") from error

    def _of(self, said: Any, name: str) -> Any:
        if not isinstance(said, dict) or name not in said:
            raise self._odd(f"without {name!r}")
        return said[name]

    def _odd(self, what: str) -> ProviderBusy:
        return ProviderBusy(
            f"{host_of(self._url)} answered {what}. It may work later.", retry_after=None
        )

    def _ask(self, method: str, path: str, **more: Any) -> Any:
        for delay_s in _AGAIN_S if method == "GET" else ():
            try:
                return self._asked(method, path, **more)
            except ProviderBusy:
                time.sleep(delay_s)
        return self._asked(method, path, **more)

    def _asked(self, method: str, path: str, **more: Any) -> Any:
        with self._answer(method, path, **more) as answer:
            body = answer.read()
        if not answer.is_success:
            return None
        try:
            return json.loads(body)
        except ValueError as error:
            raise self._odd("what is no JSON") from error

    @contextmanager
    def _answer(
        self, method: str, path: str, *, missing_is_fine: bool = False, **more: Any
    ) -> Iterator[httpx.Response]:
        """The answer to a request, its body not yet read."""
        key = self._provider.key_source.read_for_call()
        if key is None:
            raise ProviderDenied(self._provider.key_source.missing)
        timeout = httpx.Timeout(_ANSWER_S, connect=_CONNECT_S)
        headers = {"authorization": f"Bearer {key.get_secret_value()}"}
        try:
            with (
                httpx.Client(verify=_trusted(), timeout=timeout, headers=headers) as client,
                client.stream(method, f"{self._url}/{path}", **more) as answer,
            ):
                if not (answer.is_success or (missing_is_fine and answer.status_code == _MISSING)):
                    answer.read()
                    raise self._refusal(answer, key)
                yield answer
        except httpx.ConnectError as error:
            raise ProviderUnreachable(
                f"{host_of(self._url)} is not there ({type(error).__name__}).", retry_after=None
            ) from error
        except httpx.TransportError as error:
            raise ProviderBusy(
                f"The connection to {host_of(self._url)} broke ({type(error).__name__}).",
                retry_after=None,
            ) from error

    def _refusal(self, answer: httpx.Response, key: SecretStr) -> ProviderError:
        source = str(self._provider.key_source)
        headers = {name.lower(): value for name, value in answer.headers.items()}
        reply = Reply(answer.status_code, headers, answer.content)
        case = Case(host_of(self._url), Asked(self._provider.model, (), key, source), reply)
        if reply.status == _THROTTLED:
            return case.error(ProviderThrottled, "takes no more jobs just now", streams=False)
        if reply.status >= SERVER or reply.status in LATER:
            return case.error(ProviderBusy, f"answered {reply.status}. It may work later")
        return case.error(ProviderDenied, case.denied(reply.status))


def _lines(answer: httpx.Response) -> Iterator[bytes]:
    """The lines of an answer; httpx would cut at every character that Unicode calls a break."""
    parts = list[bytes]()
    for chunk in answer.iter_bytes():
        first, *more = chunk.split(b"\n")
        parts.append(first)
        for each in more:
            yield b"".join(parts)
            parts = [each]
    yield b"".join(parts)
