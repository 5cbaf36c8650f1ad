"""What a failed call means, as far as all APIs agree on it.

It goes by status and body of the reply rather than by an SDK's classes, which lose much of
both. A message quotes at most a line of the server's words, without the key and without
anything that stands in the texts.
"""

import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from pydantic import SecretStr

from tasks.errors import (
    BatchRefused,
    BatchTooLarge,
    ProviderBusy,
    ProviderError,
    ProviderThrottled,
)
from tasks.limits import Learned
from tasks.providers.reply import Reply, number, quoted

CLIENT, SERVER = 400, 500  # where the classes of HTTP status begin
LATER = frozenset({408, 409, 425, 499})
"""Statuses beside those of a server's failure after which the same call may work."""

NAMED = 5
"""So many texts and models a message names at most."""

DENIED = {
    401: "does not accept the key in {source}. Put a key there that is valid at this host.{other}",
    402: "asks for payment first. See the billing page of the account",
    403: "denies the key in {source}.{other}",
    404: "has no embeddings at this address. See that base_url ends in /v1",
    405: "has no embeddings at this address. See that base_url ends in /v1",
    407: "is behind a proxy that wants a password. See HTTPS_PROXY",
    410: "no longer serves {model}. Set embedding.model to one that is still served",
}
DENIED_OTHERWISE = "takes no such request for {model}. See embedding and base_url in the config"

_ELSEWHERE = re.compile(r"https?://(?:[^/@\s]*@)?([\w.:-]{1,100})")


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


@dataclass(frozen=True)
class Case:
    """A call that brought no vectors.

    Attributes:
        host: Whom it asked.
        asked: What for.
        reply: What came; None where no status did.
    """

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
        """What must stand in no message."""
        return self.asked.key.get_secret_value()

    def too_large(self, learned: Learned, tokens: int | None) -> ProviderError:
        """A call with less may work; `tokens` is the server's own count of this one."""
        count = len(self.asked.texts)
        holds = f"{count} texts" + (f" with {tokens} tokens" if tokens else "")
        return self.error(
            BatchTooLarge,
            f"does not take {holds} in one call for {self.asked.model}. Send fewer at once",
            learned=learned,
            tokens=tokens,
        )

    def refused(self, positions: Sequence[int]) -> ProviderError:
        """A text is bad, at one of `positions` if there are any."""
        lengths = [len(text) for text in self.asked.texts]
        named = sorted({at for at in positions if 0 <= at < len(lengths)})
        which = ", ".join(f"number {at} of {lengths[at]} characters" for at in named[:NAMED])
        more = f" and {len(named) - NAMED} more" if len(named) > NAMED else ""
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

    def denied(self, status: int, other: str = "") -> str:
        """Why no such call can work, after a reply with `status`."""
        if self.reply is not None and status < CLIENT:
            to = _ELSEWHERE.match(self.reply.headers.get("location", ""))
            return (
                f"sends the call on to {to[1] if to else 'another address'}. Key and texts go "
                "nowhere else: set base_url to where the API really is"
            )
        return (
            DENIED.get(status, DENIED_OTHERWISE)
            .format(model=self.asked.model, source=self.asked.source, other=other)
            .rstrip(".")
        )


def whole(found: re.Match[str] | None) -> int | None:
    """The number that a pattern found, None where it found none that makes sense."""
    return (round(number(found[1])) or None) if found else None
