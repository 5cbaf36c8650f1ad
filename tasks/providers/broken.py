"""What it means when the wire breaks before a reply is there.

HTTP libraries wrap what happened once or twice, so that the classes are looked for in
everything that lies behind an error.
"""

import re
import socket
import ssl
from collections.abc import Iterator, Mapping
from dataclasses import dataclass

from tasks.errors import (
    AnswerRejected,
    ProviderBusy,
    ProviderDenied,
    ProviderError,
    ProviderUnreachable,
)
from tasks.providers.deadline import TooLate, TooLong

Meaning = tuple[type[ProviderError], str]
"""What happens next, and why: the end of a sentence that starts with the host."""

_NO_TLS = frozenset({"WRONG_VERSION_NUMBER", "UNKNOWN_PROTOCOL", "RECORD_LAYER_FAILURE"})

NO_ADDRESS: Meaning = (
    ProviderDenied,
    "cannot be asked: no address. See base_url and HTTPS_PROXY; one starts with https://",
)
NO_HEADER: Meaning = (
    ProviderDenied,
    "cannot be asked: the key holds letters that no header takes. Copy the key again",
)
NOBODY: Meaning = (
    ProviderUnreachable,
    "takes no connection. If that is lasting, see base_url and the network",
)
DEADLINE: Meaning = (
    ProviderBusy,
    "gave no whole answer within the deadline. The same call may work later, or a smaller one",
)
UNPACKED: Meaning = (
    AnswerRejected,
    "sent an answer that cannot be unpacked. Nothing of it was stored",
)
TOO_LONG: Meaning = (
    AnswerRejected,
    "sends more than any answer holds. Nothing of it was stored; see that base_url is right",
)
NO_NAME: Meaning = (
    ProviderUnreachable,
    "has no address that this machine can find. If that is lasting, see base_url and the network",
)


@dataclass(frozen=True)
class Wire:
    """What can break in one HTTP library.

    Attributes:
        first: What its errors mean, by class; the first class wins that anything behind an
            error is of. These go before what Python's own mean.
        last: The same, after those.
        tunnel: Finds the status with which a proxy refuses the way.
        certificates: The variable that names whose certificates are trusted.
    """

    first: Mapping[type[BaseException], Meaning]
    last: Mapping[type[BaseException], Meaning]
    tunnel: re.Pattern[str]
    certificates: str

    def meaning(self, error: BaseException) -> Meaning | None:
        """What happens next after `error`; None where it tells nothing but that it broke."""
        causes = list(_behind(error))
        meanings = {**self.first, **self._of_python(), **self.last}
        for kind, found in meanings.items():
            if any(isinstance(cause, kind) for cause in causes):
                return found
        if any(getattr(cause, "reason", None) in _NO_TLS for cause in causes):
            return ProviderDenied, "does not speak TLS there. See that base_url has the right port"
        for cause in causes:
            if tunnel := self.tunnel.search(str(cause)):
                return (
                    ProviderDenied if tunnel[1].startswith("4") else ProviderBusy,
                    f"is behind a proxy that opens no way to it ({tunnel[1]}). See HTTPS_PROXY",
                )
        return None

    def _of_python(self) -> dict[type[BaseException], Meaning]:
        trust = f"See base_url, or set {self.certificates}"
        return {
            TooLong: TOO_LONG,
            ssl.SSLCertVerificationError: (
                ProviderDenied,
                f"shows a certificate that nobody here trusts. {trust}",
            ),
            socket.gaierror: NO_NAME,
            ConnectionRefusedError: NOBODY,
            TooLate: DEADLINE,
            TimeoutError: DEADLINE,
        }


def broken_off(error: BaseException) -> Meaning:
    """What happens next after an error that tells nothing else."""
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
