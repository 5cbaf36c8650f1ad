"""What a failed call to OpenAI, or to a server that speaks like it, means.

The servers agree on little more than the address: the same thing comes as 400, 413, 422 or
500. So words go before the status where they say that a call, or a text, is too large.
"""

import re
from collections.abc import Sequence

import httpx2
from pydantic import SecretStr

from tasks.errors import ProviderBusy, ProviderDenied, ProviderError, ProviderThrottled
from tasks.limits import Learned
from tasks.providers.broken import (
    DEADLINE,
    NO_ADDRESS,
    NO_HEADER,
    UNPACKED,
    Meaning,
    Wire,
    broken_off,
)
from tasks.providers.failures import (
    CLIENT,
    DENIED_OTHERWISE,
    LATER,
    SERVER,
    Asked,
    Case,
    whole,
)
from tasks.providers.openai_reply import Reply
from tasks.providers.openai_transport import Outcome

_UNAUTHORIZED, _PAYMENT, _NOT_FOUND, _TOO_LARGE, _UNPROCESSABLE = 401, 402, 404, 413, 422
_BACKEND_FAILED, _THROTTLED = 424, 429

_NO_MONEY = frozenset({"insufficient_quota", "billing_hard_limit_reached", "billing_not_active"})

_TOKENS = re.compile(r"max(?:imum request size is)? ([\d,]+) tokens per request")
_COUNTED = re.compile(r"[Rr]equested ([\d,]+) tokens, max")
_TEXTS = re.compile(
    r"maximum allowed batch size (?:of )?(?P<tei>\d+)"
    r"|array with maximum length (?P<openai>\d+)"
    r"|at most (?P<pydantic>\d+) items"
    r"|batch size\D{0,60}(?:larger than|at most|exceeds?|limit(?: is)?) (?P<others>\d+)",
    re.IGNORECASE,
)
_LONG = re.compile(
    r"context (?:length|size|window)|max(?:imum)? (?:input|sequence|model) length"
    r"|must have less than \d+ tokens|is too large to process|too long to fit",
    re.IGNORECASE,
)
_LENGTH = re.compile(
    r"(?:requested|given:?|input \(|request \(|contains at least|resulted in|has) ?"
    r"([\d,]+) (?:input )?tokens|[Gg]iven: ([\d,]+)",
    re.IGNORECASE,
)
_NUMBERED = re.compile(r"\binput\[(\d+)\]")
_MODEL = re.compile(
    r"\bmodel\b.{0,80}?(?:does not exist|not found)|invalid model", re.IGNORECASE | re.DOTALL
)
_ARGUMENT = re.compile(
    r"matryoshka|\bdimensions\b|encoding_format|unrecognized request argument|unknown parameter"
    r"|extra inputs are not permitted",
    re.IGNORECASE,
)
_STREAMS = re.compile(r"too many concurrent|overloaded|no permits|queue is full", re.IGNORECASE)

_WIRE = Wire(
    first={
        httpx2.InvalidURL: NO_ADDRESS,
        httpx2.UnsupportedProtocol: NO_ADDRESS,
        httpx2.LocalProtocolError: NO_HEADER,
        FileNotFoundError: (
            ProviderDenied,
            "cannot be asked: trusted certificates are missing. See SSL_CERT_FILE",
        ),
    },
    last={httpx2.TimeoutException: DEADLINE, httpx2.DecodingError: UNPACKED},
    tunnel=re.compile(r"^(\d{3})\b"),
    certificates="SSL_CERT_FILE",
)


def failure(
    outcome: Outcome, model: str, texts: Sequence[str], key: SecretStr, source: str
) -> ProviderError:
    """What happens next after a call that brought no vectors; `source` is "" without a key."""
    case = _Case(outcome.host, Asked(model, texts, key, source), outcome.reply)
    if outcome.reply is not None:
        return case.by_status(outcome.reply)
    return case.error(*_meaning(outcome.broken))


def _meaning(error: Exception | None) -> Meaning:
    """What happens next after `error`, which came instead of a reply."""
    error = error or ConnectionError()
    if (found := _WIRE.meaning(error)) is not None:
        return found
    if isinstance(error.__cause__ or error, httpx2.HTTPError | OSError):
        return broken_off(error.__cause__ or error)
    stopped = f"the SDK stopped before it sent anything ({type(error).__name__})"
    return (
        ProviderDenied,
        f"was not asked: {stopped}. See that the installed openai is of a version in range",
    )


class _Case(Case):
    def by_status(self, reply: Reply) -> ProviderError:
        """What a reply means that is not a success."""
        status = reply.status
        if status == _THROTTLED:
            return self.throttled(reply)
        if (too_much := self.by_size(reply)) is not None:
            return too_much
        if status >= SERVER or status in LATER or status == _BACKEND_FAILED:
            return self.error(ProviderBusy, f"answered {status}. The same call may work later")
        if status in {CLIENT, _UNPROCESSABLE} and not self.knows_no_model(reply):
            return self.by_words(reply)
        return self.error(ProviderDenied, self.no_way(reply))

    def knows_no_model(self, reply: Reply) -> bool:
        """Whether it says that there is no such model."""
        said = reply.status in {CLIENT, _NOT_FOUND} and _MODEL.search(reply.words)
        return bool(said) or "model_not_found" in reply.codes

    def no_way(self, reply: Reply) -> str:
        """Why no such call can work."""
        if self.knows_no_model(reply):
            return f"has no model {self.asked.model!r}. Set embedding.model to one of its own"
        if reply.status == _UNAUTHORIZED and not self.asked.source:
            return (
                "wants a key, and there is none. Set OPENAI_API_KEY to a key of this server, or "
                "embedding.api_key_block to a Secret block with one"
            )
        return self.denied(reply.status, " See its rights in the dashboard of the account")

    def throttled(self, reply: Reply) -> ProviderError:
        """What 429 means: a pause, or that the account has no money."""
        if reply.codes & _NO_MONEY:
            return self.error(ProviderDenied, self.denied(_PAYMENT))
        streams = _STREAMS.search(reply.words) is not None
        if streams:
            do = "It comes less often with a lower limits.concurrency"
        else:
            do = "All calls wait; it comes less often with limits that the account has"
        return self.error(
            ProviderThrottled,
            f"lets {self.asked.model} do no more just now. {do}",
            learned=reply.learned,
            streams=streams,
        )

    def by_size(self, reply: Reply) -> ProviderError | None:
        """That the call, or a text in it, is too large; None where that is not what it says."""
        if reply.status < CLIENT:
            return None
        words = reply.words
        tokens, texts = _TOKENS.search(words), _TEXTS.search(words)
        if tokens or "max_tokens_per_request" in reply.codes:
            learned = Learned(tokens_per_request=whole(tokens))
            return self.too_large(learned, whole(_COUNTED.search(words)))
        if texts:
            most = next(int(digits) for digits in texts.groups() if digits)
            return self.too_large(Learned(texts_per_request=most or None), None)
        if _LONG.search(words):
            return self.too_long(words)
        return self.too_large(Learned(), None) if reply.status == _TOO_LARGE else None

    def too_long(self, words: str) -> ProviderError:
        """What it means that one of the texts is longer than the model reads."""
        numbered = [int(at) for at in _NUMBERED.findall(words)]
        alone = len(self.asked.texts) == 1
        if numbered and not alone:
            return self.refused(numbered)
        if not alone:  # any of them: fewer at once will tell
            return self.too_large(Learned(), None)
        counted = _LENGTH.search(words)
        if counted is None:
            return self.refused([0])
        digits = (counted[1] or counted[2]).replace(",", "")
        return self.too_large(Learned(), int(digits or 0) or None)

    def by_words(self, reply: Reply) -> ProviderError:
        """What statuses 400 and 422 mean where nothing is too large."""
        words = reply.words
        if _ARGUMENT.search(words):
            return self.error(ProviderDenied, DENIED_OTHERWISE.format(model=self.asked.model))
        numbered = [int(at) for at in _NUMBERED.findall(words)]
        return self.refused(numbered or reply.blamed or self.suspects(words))
