"""What a reply of an API says: its status, the wait it names, its words.

Words are the server's, so they may hold anything: the key, a text, a page of HTML. `quoted`
makes them fit for a message.
"""

import html
import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime
from email.utils import parsedate_to_datetime
from math import isfinite

LONGEST_WAIT_S = 300.0
LONGEST_QUOTE = 200

_NESTED = 2
"""So deep the words lie in the body: {"error": {"message": "..."}}."""

_READ = 20_000
"""Characters of a reply that are read at all."""

_KEY_PIECE, _TEXT_PIECE, _SHORTEST_TEXT = 8, 12, 4
"""So many characters in a row that also stand in the key or a text are taken out."""

_ESCAPE = re.compile(r"\\(u[0-9a-fA-F]{4}|.)")
_TAGS = re.compile(r"<(script|style)\b.*?</\1\s*>|<[^>]*>", re.IGNORECASE | re.DOTALL)


@dataclass(frozen=True)
class Reply:
    """What came over the wire.

    Attributes:
        status: Of HTTP.
        headers: By lower-case name.
        body: Of a failure; of a good answer too, where it is not left to an SDK.
    """

    status: int
    headers: Mapping[str, str] = field(repr=False)
    body: bytes = field(default=b"", repr=False)

    @property
    def good(self) -> bool:
        """Whether the status means success."""
        return 200 <= self.status < 300  # noqa: PLR2004 - the words of HTTP

    @property
    def request_id(self) -> str:
        """The server's name for the call, "" where it gave none."""
        name = self.headers.get("x-request-id", "")
        return name if re.fullmatch(r"[\w.:-]{1,100}", name) else ""

    @property
    def words(self) -> str:
        """What it says to people, as it stands there."""
        said = self.said
        for _ in range(_NESTED):
            if not isinstance(said, dict):
                break
            said = next((said[name] for name in ("detail", "message", "error") if name in said), "")
        if isinstance(said, list):  # a validator's list; its `input` repeats what was sent
            said = "; ".join(str(one.get("msg", "")) for one in said if isinstance(one, dict))
        if isinstance(said, str):
            return said
        return html.unescape(_TAGS.sub(" ", self.body[:_READ].decode("utf-8", "replace")))

    @property
    def blamed(self) -> list[int]:
        """Positions of texts that a validator's list names."""
        said = self.said
        listed = said.get("detail") if isinstance(said, dict) else None
        found = list[int]()
        for one in listed if isinstance(listed, list) else ():
            where = one.get("loc") if isinstance(one, dict) else None
            if isinstance(where, list) and "input" in where:
                found += [at for at in where if type(at) is int]
        return found

    @property
    def retry_after(self) -> float | None:
        """Seconds to wait by its own word, None where it gives none that makes sense."""
        value = self.headers.get("retry-after", "").strip()
        seconds = _seconds(self.headers.get("retry-after-ms", ""), 1000)
        if seconds is None:
            seconds = _seconds(value)
        if seconds is None:
            until = _date(value)
            if until is None:
                return None
            # By the server's own clock, where it shows it.
            now = _date(self.headers.get("date", "")) or datetime.now(UTC)
            seconds = (until - now).total_seconds()
        return sensible_wait(seconds)

    @property
    def said(self) -> object:
        """The body; itself where it is a JSON string, None where it is no JSON."""
        try:
            said: object = json.loads(self.body)
        except (ValueError, RecursionError):
            return None
        return said


def sensible_wait(seconds: float) -> float | None:
    """`seconds` to wait, no longer than anyone should; None where they make no sense."""
    return min(seconds, LONGEST_WAIT_S) if isfinite(seconds) and seconds >= 0 else None


def number(digits: str) -> float:
    """A number with commas between its thousands; 0 where it is none."""
    try:
        return float(digits.rstrip(".,").replace(",", ""))
    except ValueError:
        return 0.0


def quoted(words: str, key: str, texts: Sequence[str], longest: int = LONGEST_QUOTE) -> str:
    """A line of `words` without anything of the key or the texts, "" where none is left."""
    halves = _ESCAPE.sub(_unescaped, words[:_READ])  # characters beyond 16 bits come as two
    words = halves.encode("utf-16", "surrogatepass").decode("utf-16", "replace")
    words = " ".join("".join(c if c.isprintable() else " " for c in words).split())
    words = _without_pieces(words, key, _KEY_PIECE)[: 2 * longest]  # to look for texts takes long
    for text in {" ".join(text.split()) for text in texts if len(text) < 4 * _TEXT_PIECE}:
        if len(text) >= _SHORTEST_TEXT and text in words:
            words = re.sub(rf"(?<!\w){re.escape(text)}(?!\w)", "[text]", words)
    joined = "\0".join(" ".join(text.split()) for text in texts)
    words = _without_pieces(words, joined, _TEXT_PIECE)
    if len(words) > longest:
        words = f"{words[: longest - 3]}..."
    return words.strip(" .")


def _unescaped(found: re.Match[str]) -> str:
    """The character that an escape in JSON stands for: a server may echo the request as sent."""
    name = found[1]
    if len(name) > 1:
        return chr(int(name[1:], 16))
    return " " if name in "nrtbf" else name


def _without_pieces(words: str, known: str, length: int) -> str:
    """`words` with each run of `length` characters or more that stands in `known` left out."""
    kept, taken_to = list[str](), 0
    for at, letter in enumerate(words):
        piece = words[at : at + length]
        if len(piece) == length and piece in known:
            if taken_to < at or not at:
                kept.append("[...]")
            taken_to = at + length
        elif at >= taken_to:
            kept.append(letter)
    return "".join(kept)


def _seconds(value: str, parts: int = 1) -> float | None:
    try:
        return float(value) / parts
    except ValueError:
        return None


def _date(value: str) -> datetime | None:
    try:
        date = parsedate_to_datetime(value)
    except (ValueError, TypeError, IndexError, OverflowError):
        return None
    return date if date.tzinfo else date.replace(tzinfo=UTC)
