"""What lies under Voyage's SDK: shared connections, one deadline a call, what the SDK forgets.

The SDK's sessions belong to one thread each, and it drops the headers of an answer. So each
call has a session of its own, over connections that all calls share, in the thread of its own
that the deadline needs. A good answer is read here, where it comes in: what the SDK makes of
1,000 vectors of 1,024 numbers takes 20 ms, in which all other threads wait, and this 4.
"""

import functools
import io
import os
import threading
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import requests
import voyageai
from pydantic import SecretStr
from requests.adapters import HTTPAdapter
from voyageai.api_resources.embedding import Embedding
from voyageai.util import get_default_base_url

from tasks.limits import Learned
from tasks.providers.answers import parsed_answer
from tasks.providers.deadline import TooLate, TooLong, finished, host_of
from tasks.providers.voyage_reply import Reply

CONNECTIONS = 256
"""Most idle connections kept; as many as calls can be in flight."""

RENEWED_S = 180
"""So often the connections are made anew: a silent one may be cut off without a word."""

LONGEST_BODY = 64 << 20
"""Bytes; 1,000 vectors of 2,048 numbers are 11 million."""

_PIECE = 1 << 18


@dataclass(frozen=True)
class Outcome:
    """How one call ended.

    Attributes:
        host: Whom it asked, with the port where one is named.
        reply: Status, headers and, of a failure, the body; None where no status came.
        result: The answer; what the SDK made of it where it is no object of JSON, and None where
            that raised.
        error: What the SDK raised.
        broken: What ended the transport; None where it went well.
    """

    host: str
    reply: Reply | None = None
    result: object = field(default=None, repr=False)
    error: Exception | None = field(default=None, repr=False)
    broken: Exception | None = field(default=None, repr=False)

    @property
    def answered(self) -> bool:
        """Whether the SDK returned something, under a status that means success."""
        done = self.error is None and self.broken is None
        return done and (self.reply is None or self.reply.good)

    @property
    def request_id(self) -> str:
        """The server's name for the call, "" where it gave none."""
        return self.reply.request_id if self.reply else ""

    @property
    def learned(self) -> Learned:
        """Limits that a good answer warns of."""
        return self.reply.learned if self.reply else Learned()


def exchange(key: SecretStr, base_url: str | None, deadline_s: float, **fields: object) -> Outcome:
    """Send `fields` through the SDK as one request for embeddings.

    Args:
        key: Signs the request; goes to `base_url` and nowhere else.
        base_url: Without a slash at its end; None is the SDK's choice for such a key.
        deadline_s: Seconds for all of it.
        fields: Of the request's body.

    Returns:
        How it ended, well or not.
    """
    url = base_url or get_default_base_url(key.get_secret_value())
    host, session, ended = host_of(url), _Session(key, deadline_s), list[Outcome]()

    def send() -> None:
        _hook.enter(session)
        result, error = None, None
        try:
            result = Embedding.create(  # type: ignore[no-untyped-call]
                api_key=key.get_secret_value(),
                base_url=url,
                request_timeout=deadline_s,
                **fields,
            )
        except Exception as raised:  # noqa: BLE001 - the SDK lets errors of any class through
            error = raised
        answer = result if session.answer is None else session.answer
        ended.append(Outcome(host, session.reply, answer, error, session.broken))

    _hook.install()
    if finished(send, deadline_s, "voyage-call"):
        return ended[0]
    return Outcome(host, session.reply, broken=TooLate(f"{deadline_s:g} s"))


class _Session(requests.Session):
    """The session of one call: it notes what passes and keeps to the deadline."""

    def __init__(self, key: SecretStr, deadline_s: float) -> None:
        super().__init__()
        self.reply: Reply | None = None
        self.answer: dict[str, object] | None = None
        self.broken: Exception | None = None
        self._key = key
        self._ends = time.monotonic() + deadline_s
        # A netrc entry for the host would replace the key; `auth` goes before it.
        self.auth = _as_it_is
        self._pool = _pool()
        for scheme in ("https://", "http://"):
            self.mount(scheme, self._pool)

    def request(self, *args: Any, **kwargs: Any) -> requests.Response:
        """The response, its whole body read; of a good answer the SDK need know nothing more."""
        kwargs |= {"stream": True, "timeout": max(0.001, self._ends - time.monotonic())}
        try:
            response = super().request(*args, **kwargs)
            self.reply = Reply(response.status_code, self._clean(response.headers))
            body = self._body(response)
        except Exception as error:
            self.broken = error
            raise
        if not self.reply.good:
            # Before the SDK puts it into a message or a log.
            body = body.replace(self._key.get_secret_value().encode(), b"[key]")
            self.reply = Reply(response.status_code, self.reply.headers, body)
        else:
            self.answer = parsed_answer(body)
            body = body if self.answer is None else b"{}"
        response.headers.update(self.reply.headers)
        response.raw = io.BytesIO(body)
        return response

    def get_redirect_target(self, resp: requests.Response) -> str | None:  # noqa: ARG002
        """None: the key and the texts go where they were sent and nowhere else."""
        return None

    def close(self) -> None:
        """Nothing: the connections belong to all calls."""

    def _body(self, response: requests.Response) -> bytes:
        pieces, size = list[bytes](), 0
        # read1 comes back with whatever there is, so that a trickle meets the deadline too.
        while piece := response.raw.read1(_PIECE, decode_content=True):
            pieces.append(piece)
            size += len(piece)
            if size > LONGEST_BODY:
                response.close()
                raise TooLong(f"{LONGEST_BODY} bytes")
            if time.monotonic() > self._ends:
                response.close()
                raise TooLate("the body came too slowly")
        return b"".join(pieces)

    def _clean(self, headers: Mapping[str, str]) -> dict[str, str]:
        key = self._key.get_secret_value()
        return {name.lower(): value.replace(key, "[key]") for name, value in headers.items()}


def _as_it_is(request: requests.PreparedRequest) -> requests.PreparedRequest:
    return request


class _Hook:
    """What `voyageai.requestssession` holds: our sessions for our calls, the user's for theirs.

    The SDK asks it once in each new thread, and our calls have a new thread each.
    """

    def __init__(self) -> None:
        self._own = threading.local()
        self._lock = threading.Lock()
        self._users: requests.Session | Callable[[], requests.Session] | None = None

    def install(self) -> None:
        """Stand in for what the user has set, if anything; again if it is set anew."""
        with self._lock:
            if voyageai.requestssession is not self:
                self._users = voyageai.requestssession
                voyageai.requestssession = self

    def enter(self, session: requests.Session) -> None:
        """Serve this thread with `session`."""
        self._own.session = session

    def __bool__(self) -> bool:
        # False is as good as unset: the SDK then makes a session in its own way.
        return hasattr(self._own, "session") or bool(self._users)

    def __call__(self) -> requests.Session:
        if hasattr(self._own, "session"):
            own: requests.Session = self._own.session
            return own
        if isinstance(self._users, requests.Session):
            return self._users
        return self._users() if self._users else requests.Session()


_hook = _Hook()
_pool_lock = threading.Lock()


def _pool() -> HTTPAdapter:
    """The connections of all calls; another process has its own."""
    with _pool_lock:
        return _made_pool(os.getpid(), int(time.monotonic() / RENEWED_S))


@functools.lru_cache(maxsize=1)
def _made_pool(_pid: int, _period: int) -> HTTPAdapter:
    # An older pool lives on as long as a call uses it.
    return HTTPAdapter(pool_maxsize=CONNECTIONS, max_retries=0)
