"""How many tokens a text has, without any model's vocabulary.

The counts are wrong in the way that counts are wrong: near the truth for prose, and free
to be off by a factor, so that a client which trusts its own estimate is found out.
"""

import math
from collections.abc import Callable

import numpy as np

from tasks.simulator.settings import Settings

PROMPTS = {
    "query": "Represent the query for retrieving supporting documents: ",
    "document": "Represent the document for retrieval: ",
}
"""What the API puts before a text of this input_type."""

_PROSE, _DIGIT, _SIGN = 1 / 4.6, 1 / 2.5, 1 / 1.4
_FIRST_OF_BLOCK = np.array([0x80, 0x370, 0x530, 0x2E80, 0xD7B0], dtype=np.uint32)
# Tokens for each character from these blocks on: ASCII (by its own table), accented Latin,
# Greek and Cyrillic, the rest of the low scripts, CJK with Hangul, and all above.
_PER_BLOCK = np.array([0.0, 0.55, 0.5, 0.8, 0.85, 1.3])
_PER_ASCII = np.full(0x80, _SIGN)
_PER_ASCII[[code for code in range(0x80) if chr(code).isdigit()]] = _DIGIT
_PER_ASCII[[code for code in range(0x80) if chr(code).isalpha() or chr(code).isspace()]] = _PROSE


def utf8(text: str) -> bytes:
    """`text` in bytes, lone surrogates too: JSON can carry them."""
    return text.encode("utf-8", "surrogatepass")


def counter(settings: Settings, input_type: str | None) -> Callable[[str], int]:
    """Counts the tokens of a text, at least 1, as the settings ask."""
    raw = {"bytes": _by_bytes(settings.bytes_per_token), "scripts": by_script}[settings.token_rule]
    prompt = PROMPTS.get(input_type or "", "") if settings.bill_prompt_tokens else ""
    extra = math.ceil(raw(prompt) * settings.surprise) if prompt else 0
    return lambda text: max(1, math.ceil(raw(text) * settings.surprise)) + extra


def by_script(text: str) -> float:
    """Tokens by kind of character: signs and digits are dear, and so is all but English."""
    codes = np.frombuffer(text.encode("utf-32-le", "surrogatepass"), dtype="<u4")
    ascii_only = codes[codes < len(_PER_ASCII)]
    others = _PER_BLOCK[np.searchsorted(_FIRST_OF_BLOCK, codes, side="right")]
    return float(_PER_ASCII[ascii_only].sum() + others.sum())


def _by_bytes(bytes_per_token: float) -> Callable[[str], float]:
    return lambda text: (len(text) if text.isascii() else len(utf8(text))) / bytes_per_token
