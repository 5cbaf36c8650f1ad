"""What lies under OpenAI's SDK: shared connections, one deadline a call, its answers as sent.

The SDK would make a list of each vector and follow the server wherever it points. So its
answers are taken raw, and its HTTP client is one of ours, which all calls share.
"""

import atexit
import functools
import logging
import os
import sys
import threading
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import httpx2
import openai
from pydantic import SecretStr

from tasks.limits import Learned
from tasks.providers.deadline import TooLate, TooLong, finished, host_of
from tasks.providers.openai import at_openai
from tasks.providers.openai_reply import Reply

CONNECTIONS = 256
"""Most idle connections kept; as many as calls can be in flight."""

LONGEST_BODY = 256 << 20
"""Bytes; 2,048 vectors of 4,096 numbers are 45 million in base64, and some 180 in digits."""

IDLE_S = 60.0
"""So long an idle connection is kept: a silent one may be cut off without a word."""

_SURROUNDINGS = ("HTTP_PROXY", "HTTPS_PROXY", "ALL_PROXY", "NO_PROXY", "SSL_CERT_FILE")
_PRIVATE = ("openai-organization", "openai-project")
"""Headers that the SDK makes of its environment, for OpenAI and nobody else."""

_WRAPPING = frozenset({"content-encoding", "content-length", "transfer-encoding"})


@dataclass(frozen=True)
class Outcome:
    """How one call ended.

    Attributes:
        host: Whom it asked, with the port where one is named.
        reply: Status, headers and body; None where none came whole.
        broken: What ended the call instead.
    """

    host: str
    reply: Reply | None = None
    broken: Exception | None = field(default=None, repr=False)

    @property
    def answered(self) -> bool:
        """Whether there is an answer, under a status that means success."""
        return self.reply is not None and self.reply.good

    @functools.cached_property
    def result(self) -> object:
        """The answer, read from JSON; None where it is none."""
        return self.reply.said if self.reply else None

    @property
    def request_id(self) -> str:
        """The server's name for the call, "" where it gave none."""
        return self.reply.request_id if self.reply else ""

    @property
    def learned(self) -> Learned:
        """Limits of the account that came with the answer."""
        return self.reply.learned if self.reply else Learned()


def exchange(
    key: SecretStr,
    base_url: str,
    deadline_s: float,
    *,
    model: str,
    texts: Sequence[str],
    dimensions: int | None,
) -> Outcome:
    """Send `texts` through the SDK as one request for embeddings.

    Args:
        key: Signs the request; goes to `base_url` and nowhere else.
        base_url: Where the API is.
        deadline_s: Seconds for all of it.
        model: Name of the model.
        texts: What to embed.
        dimensions: Length of the vectors; None does not ask for any.

    Returns:
        How it ended, well or not.
    """
    host, ended = host_of(base_url), list[Outcome]()

    def send() -> None:
        try:
            client = openai.OpenAI(
                api_key=key.get_secret_value(),
                base_url=base_url,
                timeout=deadline_s,
                max_retries=0,
                http_client=_client(),
            )
            response = client.embeddings.with_raw_response.create(
                input=list(texts),
                model=model,
                encoding_format="base64",
                dimensions=openai.omit if dimensions is None else dimensions,
            ).http_response
            ended.append(Outcome(host, _reply(response)))
        except openai.APIStatusError as error:
            ended.append(Outcome(host, _reply(error.response)))
        except Exception as error:  # noqa: BLE001 - the SDK lets errors of any class through
            ended.append(Outcome(host, broken=error))

    if finished(send, deadline_s, "openai-call"):
        return ended[0]
    return Outcome(host, broken=TooLate(f"{deadline_s:g} s"))


def _reply(response: httpx2.Response) -> Reply:
    return Reply(response.status_code, dict(response.headers.items()), response.content)


class _Client(httpx2.Client):
    """Keeps to the deadline and to a length, goes nowhere else, and lets no key come back."""

    def send(self, request: httpx2.Request, **kwargs: Any) -> httpx2.Response:
        """The response, its body read."""
        if not at_openai(str(request.url)):
            for name in _PRIVATE:
                request.headers.pop(name, None)
        ends = time.monotonic() + request.extensions["timeout"]["read"]
        kwargs |= {"stream": True, "follow_redirects": False}
        response = super().send(request, **kwargs)
        try:
            body = _body(response, ends)
        finally:
            response.close()
        # Before the SDK puts it into a log.
        key = request.headers["authorization"].removeprefix("Bearer ")
        headers = [
            (name.lower(), value.replace(key, "[key]"))
            for name, value in response.headers.items()
            if name.lower() not in _WRAPPING
        ]
        return httpx2.Response(response.status_code, headers=headers, content=body, request=request)

    def __del__(self) -> None:
        if not sys.is_finalizing():
            self.close()


def _body(response: httpx2.Response, ends: float) -> bytes:
    pieces, size = list[bytes](), 0
    for piece in response.iter_bytes():
        pieces.append(piece)
        size += len(piece)
        if size > LONGEST_BODY:
            raise TooLong(f"{LONGEST_BODY} bytes")
        if time.monotonic() > ends:
            raise TooLate("the body came too slowly")
    return b"".join(pieces)


_client_lock = threading.Lock()


def _client() -> _Client:
    """The client of all calls; another process, or another proxy, has its own."""
    names = [*_SURROUNDINGS, *map(str.lower, _SURROUNDINGS)]
    with _client_lock:
        return _made_client(os.getpid(), tuple(map(os.environ.get, names)))


@functools.lru_cache(maxsize=1)
def _made_client(_pid: int, _surroundings: tuple[str | None, ...]) -> _Client:
    # An older client lives on as long as a call uses it.
    logging.getLogger("httpcore2").setLevel(logging.INFO)  # below, it shows headers as they come
    limits = httpx2.Limits(
        max_connections=None, max_keepalive_connections=CONNECTIONS, keepalive_expiry=IDLE_S
    )
    return _Client(limits=limits, verify=httpx2.create_ssl_context())


atexit.register(_made_client.cache_clear)  # so that its connections are closed
