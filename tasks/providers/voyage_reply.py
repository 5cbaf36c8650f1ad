"""What a reply of Voyage says beyond what any reply says: the limits and the error it names."""

import re
from dataclasses import dataclass

from tasks.limits import Learned
from tasks.providers import reply
from tasks.providers.reply import LONGEST_QUOTE, number, quoted

__all__ = ["LONGEST_QUOTE", "Reply", "learned_from", "quoted"]

_SHORT = re.compile(r"([\d,.]+)\s*([KM]?)\s*(RPM|TPM)\b")
_LONG = re.compile(r"\((RPM|TPM)\) rate limit of ([\d,]+)")


@dataclass(frozen=True)
class Reply(reply.Reply):
    """What came over the wire from Voyage."""

    @property
    def learned(self) -> Learned:
        """Limits that even a good answer may warn of."""
        return learned_from(self.headers.get("x-api-warning", ""))

    @property
    def error_code(self) -> str:
        """The name of what is wrong, "" where the body has none."""
        body = self.said
        code = body.get("error_code") if isinstance(body, dict) else None
        return code if isinstance(code, str) else ""


def learned_from(words: str) -> Learned:
    """The limits a minute that a notice of the API names."""
    found: dict[str, int] = {}
    for digits, unit, name in _SHORT.findall(words):
        found[name] = round(number(digits) * {"": 1, "K": 1000, "M": 1_000_000}[unit])
    for name, digits in _LONG.findall(words):
        found[name] = round(number(digits))
    return Learned(
        requests_per_minute=found.get("RPM") or None, tokens_per_minute=found.get("TPM") or None
    )
