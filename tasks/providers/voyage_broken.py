"""What it means when the wire breaks before a reply of Voyage is there.

requests and urllib3 wrap what happened once or twice, so that the classes are looked for
in everything that lies behind an error.
"""

import re
import socket
import ssl
from collections.abc import Iterator

from requests import exceptions as requested
from urllib3.exceptions import DecodeError, LocationParseError, NameResolutionError
from urllib3.exceptions import TimeoutError as TimedOut

from tasks.errors import (
    AnswerRejected,
    ProviderBusy,
    ProviderDenied,
    ProviderError,
    ProviderUnreachable,
)
from tasks.providers.voyage_transport import TooLate, TooLong

Meaning = tuple[type[ProviderError], str]
"""What happens next, and why: the end of a sentence that starts with the host."""

_NO_TLS = frozenset({"WRONG_VERSION_NUMBER", "UNKNOWN_PROTOCOL", "RECORD_LAYER_FAILURE"})
_TUNNEL = re.compile(r"Tunnel connection failed: (\d{3})")

_ADDRESS: Meaning = (
    ProviderDenied,
    "cannot be asked: no address. See base_url and HTTPS_PROXY; one starts with https://",
)
_NAME: Meaning = (
    ProviderUnreachable,
    "has no address that this machine can find. If that is lasting, see base_url and the network",
)
_DEADLINE: Meaning = (
    ProviderBusy,
    "gave no whole answer within the deadline. The same call may work later, or a smaller one",
)
_UNPACKED: Meaning = (
    AnswerRejected,
    "sent an answer that cannot be unpacked. Nothing of it was stored",
)
_MEANINGS: dict[type[BaseException], Meaning] = {
    TooLong: (
        AnswerRejected,
        "sends more than any answer holds. Nothing of it was stored; see that base_url is right",
    ),
    requested.InvalidURL: _ADDRESS,
    requested.InvalidSchema: _ADDRESS,
    requested.MissingSchema: _ADDRESS,
    LocationParseError: _ADDRESS,
    requested.InvalidHeader: (
        ProviderDenied,
        "cannot be asked: the key holds letters that no header takes. Copy the key again",
    ),
    ssl.SSLCertVerificationError: (
        ProviderDenied,
        "shows a certificate that nobody here trusts. See base_url, or set REQUESTS_CA_BUNDLE",
    ),
    socket.gaierror: _NAME,
    NameResolutionError: _NAME,
    ConnectionRefusedError: (
        ProviderUnreachable,
        "takes no connection. If that is lasting, see base_url and the network",
    ),
    TooLate: _DEADLINE,
    TimeoutError: _DEADLINE,
    requested.Timeout: _DEADLINE,
    TimedOut: _DEADLINE,
    DecodeError: _UNPACKED,
    requested.ContentDecodingError: _UNPACKED,
}
"""The first class wins that anything behind an error is of."""


def meaning(error: Exception) -> Meaning:
    """What happens next after `error`, which came from the transport."""
    causes = list(_behind(error))
    for kind, found in _MEANINGS.items():
        if any(isinstance(cause, kind) for cause in causes):
            return found
    if type(error) is OSError:  # requests raises it itself, and for this alone
        return (
            ProviderDenied,
            "cannot be asked: trusted certificates are missing. See REQUESTS_CA_BUNDLE",
        )
    if any(getattr(cause, "reason", None) in _NO_TLS for cause in causes):
        return ProviderDenied, "does not speak TLS there. See that base_url has the right port"
    for cause in causes:
        if tunnel := _TUNNEL.search(str(cause)):
            return (
                ProviderDenied if tunnel[1].startswith("4") else ProviderBusy,
                f"is behind a proxy that opens no way to it ({tunnel[1]}). See HTTPS_PROXY",
            )
    return (
        ProviderBusy,
        f"broke the connection off ({type(error).__name__}). The same call may work later",
    )


def _behind(error: BaseException) -> Iterator[BaseException]:
    """`error` and all that it wraps; libraries keep that in four different places."""
    todo: list[object] = [error]
    seen = set[int]()
    while todo:
        one = todo.pop(0)
        if isinstance(one, BaseException) and id(one) not in seen:
            seen.add(id(one))
            yield one
            todo += [*one.args, getattr(one, "reason", None), one.__cause__, one.__context__]
