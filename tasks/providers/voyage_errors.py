"""What a failed call to Voyage means: everything that can come out of it, named by what is next."""

import re

from tasks.errors import (
    AnswerRejected,
    ProviderBusy,
    ProviderDenied,
    ProviderError,
    ProviderThrottled,
)
from tasks.limits import Learned
from tasks.providers.failures import (
    CLIENT,
    DENIED_OTHERWISE,
    LATER,
    NAMED,
    SERVER,
    Asked,
    Case,
    whole,
)
from tasks.providers.voyage_broken import meaning
from tasks.providers.voyage_reply import Reply, learned_from
from tasks.providers.voyage_transport import Outcome

__all__ = ["Asked", "failure"]

_TOKENS = re.compile(r"max allowed tokens per submitted batch is ([\d,]+)")
_COUNTED = re.compile(r"batch has ([\d,]+) tokens")
_TEXTS = re.compile(r"batch size limit is ([\d,]+)")
_EXAMPLES = re.compile(r"examples? at ind(?:ex|ices)\D{0,3}(\d+(?:\s*(?:,|and|\s)\s*\d+)*)")
_MODEL = re.compile(r"Model\s+\S+\s+is not supported")
_MODEL_NAME = re.compile(r"'(voyage-[\w.-]{1,40})'")
_INPUT = re.compile(r"Error for argument '(?:input|0)'|JSON decode error")
_ARGUMENT = re.compile(r"some arguments were not specified properly|is not supported by our API")
_STREAMS = re.compile(r"too many concurrent", re.IGNORECASE)


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


class _Case(Case):
    def by_status(self, reply: Reply) -> ProviderError:
        """What a reply means that is not a success."""
        status = reply.status
        streams = _STREAMS.search(reply.words) is not None
        if status == 429 or (status >= SERVER and streams):  # noqa: PLR2004 - a row of the table
            return self.throttled(reply, streams=streams)
        if status >= SERVER or status in LATER:
            return self.error(ProviderBusy, f"answered {status}. The same call may work later")
        if status == 413:  # noqa: PLR2004
            return self.too_large(Learned(), None)
        if status == 422 and reply.blamed:  # noqa: PLR2004
            return self.refused(reply.blamed)
        if status == CLIENT:
            return self.by_words(reply)
        return self.error(ProviderDenied, self.denied(status, self.other_host()))

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
            learned = Learned(tokens_per_request=whole(tokens))
            result = self.too_large(learned, whole(counted))
        elif texts := _TEXTS.search(words):
            result = self.too_large(Learned(texts_per_request=whole(texts)), None)
        elif examples := _EXAMPLES.search(words):
            result = self.refused([int(at) for at in re.findall(r"\d+", examples[1])])
        elif _MODEL.search(words):
            names = _MODEL_NAME.findall(words)[: 2 * NAMED]
            offer = f"; it has {', '.join(names)}" if names else ""
            result = self.error(
                ProviderDenied,
                f"has no model {self.asked.model!r}{offer}. Set embedding.model to one of its own",
            )
        elif _ARGUMENT.search(words) and not _INPUT.search(words):
            result = self.error(ProviderDenied, DENIED_OTHERWISE.format(model=self.asked.model))
        else:
            result = self.refused(self.suspects(words))
        return result

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
