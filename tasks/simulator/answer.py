"""The body of an answer with status 200, good or with a fault in it."""

import binascii

import numpy as np

from tasks.simulator import wire
from tasks.simulator.checks import Asked
from tasks.simulator.rules import Rule
from tasks.simulator.vectors import Floats, normalised, quantised

_TOO_LONG = np.float32(3)
_OTHER_MODEL = "voyage-2"


def body(asked: Asked, vectors: Floats, tokens: int, rule: Rule | None, ordinal: int) -> bytes:
    """The answer to `asked` as JSON.

    Args:
        asked: What was asked for; row i of `vectors` is of its text i.
        vectors: Of length 1, float32, shape (texts, dimension); changed in place by some faults.
        tokens: What `usage` says.
        rule: The fault, if any.
        ordinal: Number of the request, the seed of what a fault draws.
    """
    action = "" if rule is None else rule.action
    if rule is not None:
        vectors = _spoilt_vectors(vectors, asked.dtype, rule, ordinal)
    rows = quantised(vectors, asked.dtype)
    if asked.base64 and action != "float_list_instead":
        items = [binascii.b2a_base64(row, newline=False) for row in rows]
        quote = b'"'
    else:
        items, quote = [wire.in_json(row) for row in rows.tolist()], b""
    indexes: list[int | None] = list(range(len(items)))
    if rule is not None:
        items, indexes = _spoilt_items(items, indexes, rule, ordinal)
    # Large answers are megabytes: one join, for each copy of them takes milliseconds.
    parts = [b'{"object":"list",']
    if action != "no_data":
        parts.append(b'"data":[')
        for place, (item, index) in enumerate(zip(items, indexes, strict=True)):
            mark = b"" if item in _SPOILT.values() else quote
            parts += [b'{"object":"embedding","embedding":', mark, item, mark, _index(index)]
            parts.append(b"}," if place < len(items) - 1 else b"}")
        parts.append(b"],")
    model = _OTHER_MODEL if action == "wrong_model_name" else asked.model
    parts.append(b'"model":' + wire.in_json(model))
    if action != "no_usage":
        parts.append(b',"usage":{"total_tokens":%d}' % tokens)
    return b"".join([*parts, b"}"])


def _index(index: int | None) -> bytes:
    return b"" if index is None else b',"index":%d' % index


def _spoilt_vectors(vectors: Floats, dtype: str, rule: Rule, ordinal: int) -> Floats:
    match rule.action:
        case "nan" | "inf" if dtype == "float":  # other types have no such number
            vectors[0, 0] = float(rule.action)
        case "zero":
            vectors[0] = 0
        case "unnormalised":
            vectors *= _TOO_LONG
        case "wrong_dim":
            vectors = normalised(vectors[:, : vectors.shape[1] // 2].copy())
        case "jitter":
            noise = np.random.default_rng(ordinal).standard_normal(vectors.shape, np.float32)
            vectors = normalised(vectors + np.float32(rule.eps) * noise)
    return vectors


def _spoilt_items(
    items: list[bytes], indexes: list[int | None], rule: Rule, ordinal: int
) -> tuple[list[bytes], list[int | None]]:
    match rule.action:
        case "bad_b64" | "odd_b64" | "empty_b64" | "null_embedding":
            items[0] = _SPOILT[rule.action]
        case "fewer":
            items = items[: -rule.count]
            indexes = indexes[: len(items)]
        case "more":
            items += items[:1] * rule.count
            indexes = list(range(len(items)))
        case "dup":  # in place of the last one; a single one is doubled
            place = max(1, len(items) - 1)
            items[place:], indexes[place:] = items[:1], [0]
        case "shuffle":
            order = _shuffled(len(items), ordinal)
            items, indexes = [items[place] for place in order], [*order]
        case "no_index":
            indexes = [None] * len(items)
        case "index_gap":
            indexes[-1] = len(items)
    return items, indexes


_SPOILT = {
    "bad_b64": b'"!not base64!"',  # nine of its characters: no number of bytes has so many
    "odd_b64": b'"%b"' % binascii.b2a_base64(b"5byte", newline=False),
    "empty_b64": b'""',
    "null_embedding": b"null",
}


def _shuffled(count: int, seed: int) -> list[int]:
    """A random order that is never the right one, but for a single item."""
    order: list[int] = np.random.default_rng(seed).permutation(count).tolist()
    return order[1:] + order[:1] if order == sorted(order) else order
