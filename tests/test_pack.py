"""Batches hold every text once, in order, and no more than one call takes."""

from collections.abc import Callable
from dataclasses import replace
from itertools import groupby, pairwise
from pathlib import Path

import pyarrow as pa
import pytest
from hypothesis import given
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st

from tasks.keys import digest
from tasks.limits import Limits
from tasks.pack import Packed, cut, pack
from tasks.schemas import BATCH, MISSES, PACKED, TableRef

ONE = Limits(
    requests_per_minute=None,
    tokens_per_minute=None,
    texts_per_request=1,
    tokens_per_request=None,
    concurrency=1,
)
Packing = Callable[[list[int], int, int | None], tuple[Packed, list[list[int]]]]


@pytest.fixture(scope="session")
def packing(ref: Callable[..., TableRef], fresh: Callable[[], Path]) -> Packing:
    """The tokens of each batch, for texts of so many tokens."""

    def run(tokens: list[int], texts: int, most: int | None) -> tuple[Packed, list[list[int]]]:
        rows = [
            {"text_hash": digest(str(number).encode()), "tokens": count}
            for number, count in enumerate(tokens)
        ]
        limits = replace(ONE, texts_per_request=texts, tokens_per_request=most)
        packed = pack(ref(MISSES, rows), limits, fresh() / "packed.arrow")
        found = packed.table.load(PACKED).to_pylist()
        assert [(row["text_hash"], row["tokens"]) for row in found] == [
            (row["text_hash"], row["tokens"]) for row in rows
        ]
        batches = groupby(found, key=lambda row: int(row["batch"]))
        numbered = [(number, [row["tokens"] for row in group]) for number, group in batches]
        assert [number for number, _ in numbered] == list(range(1, len(numbered) + 1))
        return packed, [group for _, group in numbered]

    return run


@given(
    st.lists(st.integers(1, 12), max_size=30),
    st.integers(1, 6),
    st.one_of(st.none(), st.integers(1, 20)),
)
@hypothesis_settings(max_examples=100, deadline=None)
def test_no_batch_passes_the_limits_but_one_text_that_is_too_long_alone(
    packing: Packing, tokens: list[int], texts: int, most: int | None
) -> None:
    packed, batches = packing(tokens, texts, most)
    assert [count for batch in batches for count in batch] == tokens
    assert (packed.batches, packed.texts, packed.tokens) == (
        len(batches),
        len(tokens),
        sum(tokens),
    )
    for batch in batches:
        assert len(batch) <= texts
        assert most is None or sum(batch) <= most or len(batch) == 1


@given(st.lists(st.integers(1, 12), max_size=30), st.integers(1, 6), st.integers(1, 20))
@hypothesis_settings(max_examples=50, deadline=None)
def test_a_batch_ends_only_where_the_next_text_does_not_fit(
    packing: Packing, tokens: list[int], texts: int, most: int
) -> None:
    _, batches = packing(tokens, texts, most)
    for batch, following in pairwise(batches):
        assert len(batch) == texts or sum(batch) + following[0] > most


def test_batches_fill_to_the_last_token(packing: Packing) -> None:
    assert packing([5, 5, 5, 1], 10, 10)[1] == [[5, 5], [5, 1]]
    assert packing([5, 99, 5], 10, 10)[1] == [[5], [99], [5]]
    assert packing([1, 1, 1], 2, None)[1] == [[1, 1], [1]]
    assert packing([], 2, None)[1] == []


def test_the_time_a_run_takes_follows_from_its_tightest_limit() -> None:
    limits = replace(ONE, requests_per_minute=10, tokens_per_minute=1000)
    # 10 now, 10 after 61 s, and then one.
    assert limits.wait([50] * 21) == (122, "requests per minute")
    assert limits.wait([600] * 5) == (244, "tokens per minute")
    assert limits.wait([600, 600, 400]) == (61, "tokens per minute")
    assert limits.wait([500, 500]) == (0, "")
    assert limits.wait([5000]) == (0, "")  # no minute can hold it: it goes alone
    assert limits.wait([]) == (0, "")
    assert ONE.wait([9] * 9) == (0, "")


def test_texts_are_cut_like_a_plan_and_no_texts_are_no_batch() -> None:
    rows = [{"text_hash": digest(bytes([n])), "text": f"t{n}", "tokens": 3} for n in range(7)]
    table = pa.Table.from_pylist(rows, schema=BATCH)
    limits = replace(ONE, texts_per_request=5, tokens_per_request=9)
    assert [part.column("text").to_pylist() for part in cut(table, limits)] == [
        ["t0", "t1", "t2"],
        ["t3", "t4", "t5"],
        ["t6"],
    ]
    assert cut(table.slice(0, 0), limits) == []
