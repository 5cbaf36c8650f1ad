"""Vectors that follow from model space, input_type and text alone.

The same text has the same vector in every process; a shorter vector is the normalised
beginning of a longer one, as with the real models.
"""

import re
from collections import Counter
from collections.abc import Sequence
from functools import lru_cache
from hashlib import blake2b
from typing import Any, Literal

import numpy as np
import numpy.typing as npt

from tasks.simulator.tokens import utf8

Floats = npt.NDArray[np.float32]
Mode = Literal["exact", "fast", "words"]

_SERIES_4 = {"voyage-4-large", "voyage-4", "voyage-4-lite"}
# A third of a text's own length, at a right angle: query and document of one text are at
# a cosine of about 0.9.
_OFFSET = 1 / 3
# Beside the words, so that two texts with the same words in another order differ.
_OWN_SHARE = 0.1
_UNIFORM_STD = np.float32(73.9)  # of one byte, -128 to 127
_INT8 = 127 / 3  # three standard deviations fill an int8
_GOLDEN = np.uint64(0x9E3779B97F4A7C15)
_MIX_1, _MIX_2 = np.uint64(0xBF58476D1CE4E5B9), np.uint64(0x94D049BB133111EB)
_WORD = re.compile(r"\w+")


def space_of(model: str) -> str:
    """Models that share a space embed a text alike. That code-4 is in it is not documented."""
    return "voyage-4 series" if model in _SERIES_4 else model


def embed(
    mode: Mode, space: str, input_type: str | None, texts: Sequence[str], dimension: int
) -> Floats:
    """Vectors of length 1, one for each text in order: float32, shape (texts, dimension)."""
    seeds = _seeds(space, texts)
    match mode:
        case "exact":
            found = _normal(seeds, dimension)
        case "fast":
            found = _mixed(seeds, dimension)
        case "words":
            found = _by_words(space, texts, dimension)
            found += np.float32(_OWN_SHARE) * _mixed(seeds, dimension)
    if input_type is not None:
        found += _offset(space, input_type, dimension)
    return normalised(found)


def normalised(vectors: Floats) -> Floats:
    """`vectors` at length 1, in place."""
    vectors /= np.sqrt(np.einsum("ij,ij->i", vectors, vectors))[:, np.newaxis]
    return vectors


def quantised(vectors: Floats, dtype: str) -> npt.NDArray[Any]:
    """`vectors` as the API gives them for an output_dtype, one row each, little endian."""
    if dtype in {"binary", "ubinary"}:
        bits: npt.NDArray[np.uint8] = np.packbits(vectors > 0, axis=1)
        return bits if dtype == "ubinary" else _offset_by_128(bits).view(np.int8)
    if dtype in {"int8", "uint8"}:
        scaled = np.rint(vectors * np.float32(_INT8 * vectors.shape[1] ** 0.5))
        signed = np.clip(scaled, -128, 127).astype(np.int8)
        return signed if dtype == "int8" else _offset_by_128(signed.view(np.uint8))
    return vectors.astype("<f4", copy=False)


def _offset_by_128(values: npt.NDArray[np.uint8]) -> npt.NDArray[np.uint8]:
    return values ^ np.uint8(0x80)


def _seeds(space: str, texts: Sequence[str]) -> npt.NDArray[np.uint64]:
    start = blake2b(utf8(space) + b"\0", digest_size=8)
    digests = []
    for text in texts:
        digest = start.copy()
        digest.update(utf8(text))
        digests.append(digest.digest())
    return np.frombuffer(b"".join(digests), dtype="<u8")


def _normal(seeds: npt.NDArray[np.uint64], dimension: int) -> Floats:
    found = np.empty((len(seeds), dimension), dtype=np.float32)
    for row, seed in zip(found, seeds.tolist(), strict=True):
        np.random.default_rng(seed).standard_normal(out=row, dtype=np.float32)
    return found


def _mixed(seeds: npt.NDArray[np.uint64], dimension: int) -> Floats:
    """Uniform bytes from a counter for each seed (splitmix64), at a standard deviation of 1."""
    counters = np.arange(1, -(-dimension // 8) + 1, dtype=np.uint64) * _GOLDEN
    mixed = seeds[:, np.newaxis] + counters
    mixed ^= mixed >> np.uint64(30)
    mixed *= _MIX_1
    mixed ^= mixed >> np.uint64(27)
    mixed *= _MIX_2
    mixed ^= mixed >> np.uint64(31)
    found = mixed.astype("<u8", copy=False).view(np.int8)[:, :dimension].astype(np.float32)
    found += np.float32(0.5)
    found /= _UNIFORM_STD
    return found


def _by_words(space: str, texts: Sequence[str], dimension: int) -> Floats:
    """Sums of a vector for each word, a repeated word weighing less and less."""
    found = np.empty((len(texts), dimension), dtype=np.float32)
    for row, text in zip(found, texts, strict=True):
        counts = Counter(_WORD.findall(text.lower())) or Counter([text])
        words = _mixed(_seeds(f"{space} word", list(counts)), dimension)
        weights = np.sqrt(np.array(list(counts.values()), dtype=np.float32))
        weights /= np.linalg.norm(weights)
        row[:] = weights @ words
    return found


@lru_cache(maxsize=64)
def _offset(space: str, input_type: str, dimension: int) -> Floats:
    offset = _mixed(_seeds(f"{space} input_type", [input_type]), dimension)
    offset *= np.float32(_OFFSET)
    return offset
