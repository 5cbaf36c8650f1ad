"""No key is lost or found in another's row, however they came and whatever was merged."""

from collections.abc import Iterator

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import tasks.key_rows
from tasks.key_rows import KeyRows
from tasks.keys import hash_column

halves = st.sampled_from([bytes(8), b"\0" * 7 + b"\1", b"\1" + b"\0" * 7, b"\xff" * 8, b"abcdefgh"])
keys = st.one_of(st.tuples(halves, halves).map(b"".join), st.binary(min_size=16, max_size=16))
"""Many of them share their first or their second half."""


@pytest.fixture(autouse=True, scope="module")
def small_levels() -> Iterator[None]:
    """Some keys are enough for levels that are not merged any more, and for several look-ups."""
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(tasks.key_rows, "LEVEL_KEYS", 4)
        patched.setattr(tasks.key_rows, "AT_ONCE", 3)
        yield


@given(st.lists(keys, unique=True, max_size=60), st.lists(st.integers(0, 20)), st.lists(keys))
@settings(deadline=None)
def test_each_key_is_found_in_its_row(
    members: list[bytes], lots: list[int], others: list[bytes]
) -> None:
    rows = {key: 7 * place + 1 for place, key in enumerate(members)}
    found, left = KeyRows(), members
    for size in [*lots, len(members)]:
        lot, left = left[:size], left[size:]
        before, len_before = found, len(found)
        found = found.with_more(hash_column(lot), np.array([rows[key] for key in lot], np.uint64))
        assert len(before) == len_before
    assert len(found) == len(members)
    assert found.rows(hash_column(members)).tolist() == [rows[key] for key in members]
    asked = [*others, *members]
    chunks = pa.chunked_array([hash_column(others), hash_column([b"p" * 16, *members]).slice(1)])
    assert found.holds(chunks).tolist() == [key in rows for key in asked]
    assert found.holds(hash_column(asked)).tolist() == [key in rows for key in asked]
    if strangers := [key for key in others if key not in rows]:
        with pytest.raises(KeyError, match=strangers[0].hex()):
            found.rows(hash_column([*members, strangers[0]]))


def test_there_are_few_levels_and_none_is_large(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tasks.key_rows, "LEVEL_KEYS", 100)
    found, random = KeyRows(), np.random.default_rng(7)
    for lot in range(1000):
        keys = pa.FixedSizeBinaryArray.from_buffers(
            pa.binary(16), 10, [None, pa.py_buffer(random.bytes(160))]
        )
        found = found.with_more(keys, np.arange(lot * 10, lot * 10 + 10, dtype=np.uint64))
    sizes = [len(level.rows) for level in found._levels]  # noqa: SLF001 - what it takes is the point
    assert sum(sizes) == 10_000
    assert max(sizes) <= 10_000 / 8
    assert len(sizes) < 60
