"""What the answers of APIs for embeddings have in common."""

import json

import pybase64

_EMBEDDING = b'"embedding":'
_APART = "*"
"""Begins what stands for a vector meanwhile; no base64 has it."""


def parsed_answer(body: bytes) -> dict[str, object] | None:
    """The object that an answer is in JSON, each `embedding` of its `data` as it lies in `body`.

    No string is made of a vector: for 1,000 of 1,024 numbers this takes 4 ms, in which all other
    threads wait, and `json.loads` 17.

    Returns:
        As `json.loads` would, but strings of `embedding` are views of bytes, which nobody has
        looked at; None where it is no object.
    """
    found, rest = list[memoryview](), list[bytes | memoryview]()
    view, done = memoryview(body), 0
    while (name := body.find(_EMBEDDING, done)) >= 0:
        value = name + len(_EMBEDDING)
        start = body.find(b'"', value) + 1
        end = body.find(b'"', start) if start else -1
        if end < 0:
            break
        if body[value : start - 1].strip(b" \t\r\n") or body.find(b"\\", start, end) >= 0:
            rest.append(view[done:value])  # no string, or one that is not what it says
            done = value
            continue
        rest += [view[done:start], f"{_APART}{len(found)}".encode()]
        found.append(view[start:end])
        done = end
    without = b"".join([*rest, view[done:]])
    answer = _object(without)
    items = answer.get("data") if answer else None
    if not isinstance(items, list) or not all(isinstance(item, dict) for item in items):
        return _object(body)
    apart = [f"{_APART}{at}" for at in range(len(found))]
    if [item.get("embedding") for item in items] != apart:
        return _object(body)  # they stand elsewhere too, or some of them are no strings
    if without.count(f'"{_APART}'.encode()) != len(found):
        return _object(body)  # somebody else's word begins like ours
    for item, vector in zip(items, found, strict=True):
        item["embedding"] = vector
    return answer


def _object(body: bytes) -> dict[str, object] | None:
    try:
        read = json.loads(body.decode())
    except ValueError:
        return None
    return read if isinstance(read, dict) else None


def billed_tokens(answer: object) -> int:
    """The tokens of an answer by the provider's word; 0 where it does not say."""
    usage = answer.get("usage") if isinstance(answer, dict) else None
    for name in ("total_tokens", "prompt_tokens"):
        tokens = usage.get(name) if isinstance(usage, dict) else None
        if type(tokens) is int and tokens >= 0:
            return tokens
    return 0


def numbers_in_base64(embedding: object) -> bytes:
    """The bytes of one vector; none where it is no base64."""
    if not isinstance(embedding, str | memoryview):
        return b""
    try:
        return pybase64.b64decode(embedding, validate=True)
    except ValueError:
        return b""
