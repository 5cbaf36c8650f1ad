"""Answers of APIs: what is read fast is what JSON says."""

import base64
import json
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tasks.providers.answers import numbers_in_base64, parsed_answer

NAMES = st.sampled_from(["embedding", "data", "index", 'x"embedding']) | st.text(max_size=4)
NUMBERS = st.integers(-(2**53), 2**53) | st.floats(allow_nan=False, allow_infinity=False)
VALUES = st.recursive(
    st.none() | st.booleans() | NUMBERS | st.text(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(NAMES, inner, max_size=3),
    max_leaves=6,
)
VECTORS = st.binary(max_size=24).map(lambda data: base64.b64encode(data).decode())
ITEMS = st.fixed_dictionaries({"object": st.just("embedding"), "embedding": VECTORS})
ODD_ITEMS = st.fixed_dictionaries({"embedding": VALUES}) | st.dictionaries(NAMES, VALUES) | VALUES
ANSWERS = st.builds(
    lambda more, items: {**more, "data": items, "usage": {"total_tokens": len(items)}},
    st.dictionaries(NAMES, VALUES, max_size=2),
    st.lists(ITEMS, max_size=4) | st.lists(ITEMS | ODD_ITEMS, max_size=4),
)


def plain(value: Any) -> Any:
    """`value` with strings where it has views of bytes."""
    if isinstance(value, memoryview):
        return bytes(value).decode()
    if isinstance(value, dict):
        return {name: plain(each) for name, each in value.items()}
    return [plain(each) for each in value] if isinstance(value, list) else value


@given(ANSWERS, st.sampled_from([None, 2]), st.sampled_from([":", ": ", " : "]), st.booleans())
def test_an_answer_says_what_its_json_says(
    answer: dict[str, Any], indent: int | None, colon: str, ascii_only: bool
) -> None:
    text = json.dumps(answer, indent=indent, separators=(",", colon), ensure_ascii=ascii_only)
    assert plain(parsed_answer(text.encode())) == answer


def test_no_string_is_made_of_a_vector() -> None:
    vector = base64.b64encode(bytes(range(16))).decode()
    for colon in (":", ":\n  "):
        items = [{"embedding": vector, "index": at} for at in range(3)]
        body = json.dumps({"data": items}, separators=(",", colon)).encode()
        answer: Any = parsed_answer(body)
        read = [item["embedding"] for item in answer["data"]]
        assert all(isinstance(each, memoryview) and each.obj is body for each in read)
        assert [numbers_in_base64(each) for each in read] == [bytes(range(16))] * 3


def test_a_vector_with_escapes_is_what_they_mean() -> None:
    body = b'{"data":[{"embedding":"AA\\/\\u002f"},{"embedding":"AAAA"}]}'
    assert plain(parsed_answer(body)) == {"data": [{"embedding": "AA//"}, {"embedding": "AAAA"}]}


def test_a_word_that_looks_like_one_of_ours_is_somebody_elses() -> None:
    for word in ("0", "*0"):
        said = {"data": [{"embedding": word, "x": {"embedding": "AAAA"}}, {"embedding": "AAAB"}]}
        body = json.dumps(said, separators=(",", ":")).replace(f':"{word}"', f' : "{word}"')
        assert plain(parsed_answer(body.encode())) == said


@pytest.mark.parametrize(
    "body",
    [b"", b"null", b"[]", b'"a"', b"<html>", b'{"data":[{"embedding":"AAAA', b'{"a":"\xff"}'],
)
def test_what_is_no_object_is_nothing(body: bytes) -> None:
    assert parsed_answer(body) is None
