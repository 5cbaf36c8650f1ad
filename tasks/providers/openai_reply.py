"""What a reply of OpenAI's API says beyond what any reply says: limits, waits and error codes."""

import re
from dataclasses import dataclass

from tasks.limits import Learned
from tasks.providers import reply
from tasks.providers.reply import number, sensible_wait

_LIMIT = re.compile(r"\((RPM|TPM)\)\D{0,20}?[Ll]imit:? ([\d,]+)")
_WAIT = re.compile(
    r"try again in (?:(?P<h>\d+)h)?(?:(?P<m>\d+)m(?!s))?(?:(?P<s>[\d.]+)s)?(?:(?P<ms>[\d.]+)ms)?"
)
_UNITS = {"h": 3600.0, "m": 60.0, "s": 1.0, "ms": 0.001}


@dataclass(frozen=True)
class Reply(reply.Reply):
    """What came over the wire from OpenAI, or from a server that speaks like it."""

    @property
    def learned(self) -> Learned:
        """The account's limits a minute, as headers or words name them."""
        found = {name: round(number(digits)) for name, digits in _LIMIT.findall(self.failed_words)}
        return Learned(
            requests_per_minute=_least(self._header("x-ratelimit-limit-requests"), found, "RPM"),
            tokens_per_minute=_least(self._header("x-ratelimit-limit-tokens"), found, "TPM"),
        )

    @property
    def codes(self) -> frozenset[str]:
        """The names of what is wrong; none where the body has none."""
        body = self.said
        inner = body.get("error") if isinstance(body, dict) else None
        error = inner if isinstance(inner, dict) else body
        named = [error.get(name) for name in ("code", "type")] if isinstance(error, dict) else []
        return frozenset(name for name in named if isinstance(name, str))

    @property
    def failed_words(self) -> str:
        """Its words, if it is a failure; a good answer has none to people."""
        return "" if self.good else self.words

    @property
    def retry_after(self) -> float | None:
        """Seconds to wait by header, else by its words; None where there is none."""
        by_header = super().retry_after
        if by_header is not None:
            return by_header
        found = _WAIT.search(self.failed_words)
        parts = found.groupdict() if found else {}
        named = [number(parts[unit]) * size for unit, size in _UNITS.items() if parts.get(unit)]
        return sensible_wait(sum(named)) if named else None

    def _header(self, name: str) -> int | None:
        value = self.headers.get(name, "").strip()
        return int(value) if re.fullmatch(r"[0-9]{1,15}", value) else None


def _least(by_header: int | None, by_words: dict[str, int], name: str) -> int | None:
    """The smaller of the limits that are named; None where there is none."""
    named = [limit for limit in (by_header, by_words.get(name)) if limit]
    return min(named, default=None)
