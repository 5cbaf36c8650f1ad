"""What a failed call to Voyage means: everything that can come out of it, named by what is next.

It goes by status and body of the reply rather than by the SDK's classes, which lose much
of both. A message quotes at most a line of the server's words, without the key and without
anything that stands in the texts.
"""

import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from pydantic import SecretStr

from tasks.errors import (
    AnswerRejected,
    BatchRefused,
    BatchTooLarge,
    ProviderBusy,
    ProviderDenied,
    ProviderError,
    ProviderThrottled,
)
from tasks.limits import Learned
from tasks.providers.voyage_broken import meaning
from tasks.providers.voyage_reply import Reply, learned_from, number, quoted
from tasks.providers.voyage_transport import Outcome

_CLIENT, _SERVER = 400, 500  # where the classes of HTTP status begin
_LATER = frozenset({408, 409, 425, 499})
_NAMED = 5
"""So many texts and models a message names at most."""

_TOKENS = re.compile(r"max allowed tokens per submitted batch is ([\d,]+)")
_COUNTED = re.compile(r"batch has ([\d,]+) tokens")
_TEXTS = re.compile(r"batch size limit is ([\d,]+)")
_EXAMPLES = re.compile(r"examples? at ind(?:ex|ices)\D{0,3}(\d+(?:\s*(?:,|and|\s)\s*\d+)*)")
_MODEL = re.compile(r"Model\s+\S+\s+is not supported")
_MODEL_NAME = re.compile(r"'(voyage-[\w.-]{1,40})'")
_INPUT = re.compile(r"Error for argument '(?:input|0)'|JSON decode error")
_ARGUMENT = re.compile(r"some arguments were not specified properly|is not supported by our API")
_STREAMS = re.compile(r"too many concurrent", re.IGNORECASE)
_ELSEWHERE = re.compile(r"https?://(?:[^/@\s]*@)?([\w.:-]{1,100})")

_DENIED = {
    401: "does not accept the key in {source}. Put a key there that is valid at this host.{other}",
    402: "asks for payment first. See the billing page of the account",
    403: "denies the key in {source}.{other}",
    404: "has no embeddings at this address. See that base_url ends in /v1",
    405: "has no embeddings at this address. See that base_url ends in /v1",
    407: "is behind a proxy that wants a password. See HTTPS_PROXY",
    410: "no longer serves {model}. Set embedding.model to one that is still served",
}
_DENIED_OTHERWISE = "takes no such request for {model}. See embedding and base_url in the config"


@dataclass(frozen=True)
class Asked:
    """What was asked for, as far as a message may need it.

    Attributes:
        model: Name of the model.
        texts: All texts of the call, in order.
        key: What the call was signed with.
        source: Where the key comes from, in words.
    """

    model: str
    texts: Sequence[str] = field(repr=False)
    key: SecretStr
    source: str


def failure(outcome: Outcome, asked: Asked) -> ProviderError:
    """What happens next after a call that brought no vectors."""
    reply = _reply(outcome)
    case = _Case(outcome.host, asked, reply)
    if reply is not None and not reply.good:
        return case.by_status(reply)
    if outcome.broken is not None:
        return case.error(*meaning(outcome.broken))
    raised = type(outcome.error).__name__
    if reply is not None:
        return case.error(
            AnswerRejected,
            f"answered {reply.status}, but not with what the API promises ({raised} in the SDK). "
            "Nothing of it was stored",
        )
    return case.error(
        ProviderDenied,
        f"was not asked: the SDK stopped before it sent anything ({raised}). See that the "
        "installed voyageai is of a version that this program supports",
    )


def _reply(outcome: Outcome) -> Reply | None:
    """What was seen on the wire, else what the SDK's error says of it."""
    status = getattr(outcome.error, "http_status", None)
    if outcome.reply is not None or not isinstance(status, int):
        return outcome.reply
    headers = getattr(outcome.error, "headers", None) or {}
    body = getattr(outcome.error, "http_body", None) or ""
    return Reply(status, {name.lower(): value for name, value in headers.items()}, body.encode())


@dataclass(frozen=True)
class _Case:
    host: str
    asked: Asked
    reply: Reply | None

    def error(self, kind: type[ProviderError], what: str, **facts: Any) -> ProviderError:
        """An error whose message starts with the host and ends with what the server said."""
        if issubclass(kind, ProviderBusy | ProviderThrottled):
            facts["retry_after"] = self.reply.retry_after if self.reply else None
        said = ""
        if self.reply is not None:
            facts |= {"status": self.reply.status, "request_id": self.reply.request_id}
            said = quoted(self.reply.words, self.key, self.asked.texts)
            said = f' It says ({self.reply.status}): "{said}".' if said else ""
            said = said or f" Its status was {self.reply.status}."
        # Host and model are settings, into which a key can have slipped.
        return kind(f"{self.host} {what}.{said}".replace(self.key, "[key]"), **facts)

    @property
    def key(self) -> str:
        return self.asked.key.get_secret_value()

    def by_status(self, reply: Reply) -> ProviderError:
        """What a reply means that is not a success."""
        status = reply.status
        streams = _STREAMS.search(reply.words) is not None
        if status == 429 or (status >= _SERVER and streams):  # noqa: PLR2004 - a row of the table
            return self.throttled(reply, streams=streams)
        if status >= _SERVER or status in _LATER:
            return self.error(ProviderBusy, f"answered {status}. The same call may work later")
        if status == 413:  # noqa: PLR2004
            return self.too_large(Learned(), None)
        if status == 422 and reply.blamed:  # noqa: PLR2004
            return self.refused(reply.blamed)
        if status == _CLIENT:
            return self.by_words(reply)
        return self.error(ProviderDenied, self.denied(reply))

    def throttled(self, reply: Reply, *, streams: bool) -> ProviderError:
        learned = learned_from(reply.words)
        if streams:
            do = "It comes less often with a lower limits.concurrency"
        elif "payment method" in reply.words:
            do = (
                "The account has no payment method: add one in its billing page, or set "
                f"limits.requests_per_minute to {learned.requests_per_minute or 3} and "
                f"limits.tokens_per_minute to {learned.tokens_per_minute or 10_000}"
            )
        else:
            do = "All calls wait; it comes less often with limits that the account has"
        return self.error(
            ProviderThrottled,
            f"lets {self.asked.model} do no more just now. {do}",
            learned=learned,
            streams=streams,
        )

    def by_words(self, reply: Reply) -> ProviderError:
        """What status 400 means, which stands for six different things."""
        words = reply.words
        tokens, counted = _TOKENS.search(words), _COUNTED.search(words)
        if tokens or reply.error_code == "TOO_MANY_TOKENS_IN_BATCH":
            learned = Learned(tokens_per_request=_whole(tokens))
            result = self.too_large(learned, _whole(counted))
        elif texts := _TEXTS.search(words):
            result = self.too_large(Learned(texts_per_request=_whole(texts)), None)
        elif examples := _EXAMPLES.search(words):
            result = self.refused([int(at) for at in re.findall(r"\d+", examples[1])])
        elif _MODEL.search(words):
            names = _MODEL_NAME.findall(words)[: 2 * _NAMED]
            offer = f"; it has {', '.join(names)}" if names else ""
            result = self.error(
                ProviderDenied,
                f"has no model {self.asked.model!r}{offer}. Set embedding.model to one of its own",
            )
        elif _ARGUMENT.search(words) and not _INPUT.search(words):
            result = self.error(ProviderDenied, _DENIED_OTHERWISE.format(model=self.asked.model))
        else:
            result = self.refused(self.suspects(words))
        return result

    def too_large(self, learned: Learned, tokens: int | None) -> ProviderError:
        count = len(self.asked.texts)
        holds = f"{count} texts" + (f" with {tokens} tokens" if tokens else "")
        return self.error(
            BatchTooLarge,
            f"does not take {holds} in one call for {self.asked.model}. Send fewer at once",
            learned=learned,
            tokens=tokens,
        )

    def refused(self, positions: Sequence[int]) -> ProviderError:
        lengths = [len(text) for text in self.asked.texts]
        named = sorted({at for at in positions if 0 <= at < len(lengths)})
        which = ", ".join(f"number {at} of {lengths[at]} characters" for at in named[:_NAMED])
        more = f" and {len(named) - _NAMED} more" if len(named) > _NAMED else ""
        return self.error(
            BatchRefused,
            f"refuses one or more of {len(lengths)} texts"
            + (f", counted from 0: {which}{more}" if named else " and does not say which"),
            positions=tuple(named),
        )

    def suspects(self, words: str) -> list[int]:
        """The texts that are blamed by a property and not by their position."""
        texts = list(enumerate(self.asked.texts))
        if "empty" in words:
            return [at for at, text in texts if not text] or [
                at for at, text in texts if not text.strip()
            ]
        if "JSON decode" in words:
            # JSON can spell these, but not every reader of it takes them.
            return [at for at, text in texts if re.search("[\0\ud800-\udfff]", text)]
        return []

    def denied(self, reply: Reply) -> str:
        if reply.status < _CLIENT:
            to = _ELSEWHERE.match(reply.headers.get("location", ""))
            return (
                f"sends the call on to {to[1] if to else 'another address'}. Key and texts go "
                "nowhere else: set base_url to where the API really is"
            )
        way_out = _DENIED.get(reply.status, _DENIED_OTHERWISE)
        return way_out.format(
            model=self.asked.model, source=self.asked.source, other=self.other_host()
        ).rstrip(".")

    def other_host(self) -> str:
        """Where a key of this kind belongs, if not at the host that was asked."""
        atlas = self.key.startswith("al-")
        if atlas and "voyageai.com" in self.host:
            return (
                " It is a key of MongoDB Atlas (al-...), which is for ai.mongodb.com: leave "
                "base_url out"
            )
        if not atlas and "mongodb.com" in self.host:
            return (
                " Keys of MongoDB Atlas start with al-; this one is for api.voyageai.com: leave "
                "base_url out"
            )
        return " See its rights in the dashboard, and from which addresses it may be used"


def _whole(found: re.Match[str] | None) -> int | None:
    """The number that a pattern found, None where it found none that makes sense."""
    return (round(number(found[1])) or None) if found else None
