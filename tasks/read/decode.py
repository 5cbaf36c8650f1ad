"""Decoding: a file's bytes become text, or are no text."""

import codecs

from charset_normalizer import CharsetMatch, from_bytes

_MARKS = {  # the longer ones first: UTF-32's begins with UTF-16's
    codecs.BOM_UTF32_LE: "utf-32",
    codecs.BOM_UTF32_BE: "utf-32",
    codecs.BOM_UTF16_LE: "utf-16",
    codecs.BOM_UTF16_BE: "utf-16",
    codecs.BOM_UTF8: "utf-8-sig",
}

_GUESSES = [  # where two fit alike, the one named first
    "cp1252",
    "cp932",
    "euc_jp",
    "gb18030",
    "cp949",
    "big5",
    "cp1251",
    "koi8_r",
    "cp1250",
    "cp1253",
    "cp1254",
]

SAMPLE = 64 * 1024
"""Bytes that are looked at to guess an encoding."""

MESSIEST = 0.1
"""Share of odd characters from which on a guess is not believed."""


def decode(data: bytes) -> str | None:
    """The text in `data` without its byte order mark; None where it is no text.

    UTF-8, UTF-16 and UTF-32 with a mark, UTF-8 without, else the likeliest of a few encodings
    of one and two bytes.
    """
    encoding = next((name for mark, name in _MARKS.items() if data.startswith(mark)), "utf-8")
    try:
        text = data.decode(encoding)
    except UnicodeDecodeError:
        if encoding != "utf-8" or b"\0" in data:
            return None
        return _guessed(data)
    return None if "\0" in text else text


def _guessed(data: bytes) -> str | None:
    """`data` in the likeliest encoding, judged by lines that are not plain ASCII."""
    sample = bytearray()
    for line in data.splitlines(keepends=True):
        if not line.isascii():
            sample += line
        if len(sample) > SAMPLE:
            break
    found = list(from_bytes(bytes(sample), cp_isolation=_GUESSES, enable_fallback=False))
    if not found or found[0].chaos > MESSIEST:
        return None

    def rank(match: CharsetMatch) -> tuple[float, float, int]:
        return match.chaos, -match.coherence, _first(match)

    try:
        text = data.decode(_GUESSES[_first(min(found, key=rank))])
        text.encode()
    except UnicodeError:
        return None
    return text


def _first(match: CharsetMatch) -> int:
    """Place in _GUESSES of the first encoding that reads the sample as `match` does."""
    return min(map(_GUESSES.index, match.could_be_from_charset))
