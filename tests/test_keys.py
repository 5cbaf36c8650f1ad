"""Two chunks share an identity only where they are the same, and no key is ever missed."""

import itertools
from collections.abc import Iterator
from datetime import UTC, datetime
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import tasks.key_rows
import tasks.keys
from tasks.key_rows import KeyRows
from tasks.keys import (
    NO_DOCUMENT,
    KeySet,
    chunk_id,
    document_key,
    first_of_each,
    hash_column,
    identified,
    key_columns,
    paired,
    text_hash,
)
from tasks.schemas import CHUNKS, HASH, rows_schema

halves = st.sampled_from([bytes(8), b"\0" * 7 + b"\1", b"\1" + b"\0" * 7, b"\xff" * 8, b"abcdefgh"])
keys = st.one_of(st.tuples(halves, halves).map(b"".join), st.binary(min_size=16, max_size=16))
"""Many of them share their first or their second half."""


@pytest.fixture(autouse=True, scope="module")
def small_lots() -> Iterator[None]:
    """Some keys are enough for several look-ups, and for levels that are not merged any more."""
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(tasks.keys, "AT_ONCE", 3)
        patched.setattr(tasks.key_rows, "LEVEL_KEYS", 4)
        yield


def column(digests: list[bytes], cuts: list[int] | None = None) -> pa.ChunkedArray:
    """`digests` in several chunks, each of them a slice of a longer array."""
    starts = sorted({0, len(digests), *(cut for cut in cuts or () if cut < len(digests))})
    padded = hash_column([b"p" * 16, *digests, b"q" * 16])
    chunks = [padded.slice(start + 1, end - start) for start, end in itertools.pairwise(starts)]
    return pa.chunked_array(chunks, HASH)


@given(st.lists(keys, unique=True), st.lists(keys), st.lists(st.integers(1, 9)), st.booleans())
@settings(deadline=None)
def test_a_key_set_finds_each_key_at_its_place(
    members: list[bytes], asked: list[bytes], cuts: list[int], sliced: bool
) -> None:
    wanted = [*asked, *members]
    found = KeySet(column(members, cuts) if sliced else hash_column(members))
    expected = [members.index(key) if key in members else -1 for key in wanted]
    assert len(found) == len(members)
    assert found.positions(column(wanted, cuts)).tolist() == expected
    assert found.positions(column(wanted).combine_chunks()).tolist() == expected
    assert found.holds(column(wanted, cuts)).tolist() == [key in members for key in wanted]


@given(st.lists(keys, min_size=1), st.integers(0, 5), st.integers(0, 5))
@settings(deadline=None)
def test_a_slice_of_keys_is_only_the_slice(digests: list[bytes], start: int, stop: int) -> None:
    part = hash_column(digests).slice(start, stop)
    inside = digests[start : start + stop]
    assert KeySet(part).holds(hash_column(digests)).tolist() == [key in inside for key in digests]
    assert first_of_each(part).tolist() == sorted({inside.index(key) for key in inside})


def test_a_key_set_with_a_repeated_key_still_finds_one_of_its_places() -> None:
    found = KeySet(hash_column([b"a" * 16, b"b" * 16, b"a" * 16])).positions(
        hash_column([b"a" * 16, b"b" * 16, b"c" * 16])
    )
    assert found[0] in {0, 2}
    assert found[1:].tolist() == [1, -1]


@given(st.lists(keys), st.lists(st.integers(1, 9)))
@settings(deadline=None)
def test_the_first_of_each_key_is_where_it_first_stands(
    digests: list[bytes], cuts: list[int]
) -> None:
    expected = [at for at, key in enumerate(digests) if key not in digests[:at]]
    assert first_of_each(column(digests, cuts)).tolist() == expected


@given(st.lists(keys), st.lists(keys), st.lists(st.integers(1, 9)))
@settings(deadline=None)
def test_equal_keys_pair_in_their_order(
    left: list[bytes], right: list[bytes], cuts: list[int]
) -> None:
    right = [*right, *left[::2], *left[:3]]
    waiting = list(enumerate(left))
    expected = set()
    for at_right, key in enumerate(right):
        if found := next((item for item in waiting if item[1] == key), None):
            waiting.remove(found)
            expected.add((found[0], at_right))
    pairs = paired(column(left, cuts), hash_column(right))
    assert set(zip(*(side.tolist() for side in pairs), strict=True)) == expected
    assert len(pairs[0]) == len(expected)


def rows(*, document: list[str | None] | None = None, **metadata: Any) -> pa.RecordBatch:
    """Rows of the corpus, which differ in what is given only."""
    arrays = {name: pa.array(values) for name, values in metadata.items()}
    count = max([len(array) for array in arrays.values()] or [len(document or [])])
    schema = rows_schema([pa.field(name, array.type) for name, array in arrays.items()])
    own: dict[str, Any] = {
        "id": pa.array([str(row) for row in range(count)]),
        "document": pa.array(document or ["d"] * count, pa.utf8()),
        "text": pa.array(["alpha"] * count),
        "text_hash": hash_column([text_hash("alpha")] * count),
        "start_line": pa.nulls(count, pa.int32()),
        "end_line": pa.nulls(count, pa.int32()),
        **arrays,
    }
    return pa.record_batch([own[name] for name in schema.names], schema=schema)


def distinct(batch: pa.RecordBatch) -> int:
    return len(set(key_columns(batch)["row_hash"].to_pylist()))


texts = st.one_of(st.none(), st.text(alphabet="a1:-\0é", max_size=4))
values: dict[str, tuple[pa.DataType, st.SearchStrategy[Any]]] = {
    "utf8": (pa.utf8(), texts),
    "int64": (pa.int64(), st.one_of(st.none(), st.integers(-20, 20))),
    "uint64": (pa.uint64(), st.integers(2**64 - 3, 2**64 - 1)),
    "float64": (pa.float64(), st.floats(allow_nan=False).filter(bool)),
    "float32": (pa.float32(), st.floats(allow_nan=False, width=32).filter(bool)),
    "bool": (pa.bool_(), st.one_of(st.none(), st.booleans())),
    "binary": (pa.binary(), st.binary(max_size=2)),
    "timestamp": (pa.timestamp("ns", "UTC"), st.integers(-(2**63) + 1, 2**63 - 1)),
    "microseconds": (pa.timestamp("us"), st.integers(-(2**60), 2**60)),
    "time": (pa.time64("ns"), st.integers(0, 3000)),
    "date": (pa.date32(), st.integers(-(2**20), 2**20)),
    "duration": (pa.duration("ns"), st.integers(0, 3000)),
    "list": (pa.list_(pa.utf8()), st.one_of(st.none(), st.lists(texts, max_size=2))),
    "struct": (
        pa.struct([("a", pa.utf8()), ("b", pa.utf8())]),
        st.fixed_dictionaries({"a": texts, "b": texts}),
    ),
}


@pytest.mark.parametrize("kind", values)
@given(data=st.data())
@settings(max_examples=30, deadline=None)
def test_row_hashes_are_equal_where_the_metadata_is(kind: str, data: st.DataObject) -> None:
    type_, strategy = values[kind]
    found = data.draw(st.lists(strategy, min_size=1, max_size=6))
    hashes = key_columns(rows(value=pa.array(found, type_)))["row_hash"].to_pylist()
    for value, other in zip(found, hashes, strict=True):
        same = [hashes[at] for at, one in enumerate(found) if one == value]
        assert set(same) == {other}
        assert hashes.count(other) == len(same)


@given(st.lists(st.tuples(texts, texts, texts), min_size=1, unique=True))
@settings(deadline=None)
def test_no_two_rows_read_alike(found: list[tuple[str | None, str | None, str | None]]) -> None:
    documents, left, right = (list(part) for part in zip(*found, strict=True))
    batch = rows(document=documents, a=pa.array(left, pa.utf8()), b=pa.array(right, pa.utf8()))
    assert distinct(batch) == len(found)


def test_null_empty_and_a_dash_are_three_values() -> None:
    assert distinct(rows(value=pa.array([None, "", "-", "0:"], pa.utf8()))) == 4


def test_a_text_does_not_flow_over_into_the_next_column() -> None:
    batch = rows(left=["a", "ab", "1:a"], right=["b", "", "b"])
    assert distinct(batch) == 3


def test_moments_beyond_the_calendar_of_python_have_a_hash() -> None:
    far = pa.array([253_402_300_800_000_000, 253_402_300_800_000_001], pa.timestamp("us"))
    assert distinct(rows(value=far)) == 2


def test_a_moment_is_the_same_however_it_came() -> None:
    moment = datetime(2026, 1, 2, 3, 4, 5, tzinfo=UTC)
    found = key_columns(rows(value=pa.array([moment] * 2, pa.timestamp("us", "UTC"))))
    assert len(set(found["row_hash"].to_pylist())) == 1


def test_rows_of_other_documents_differ_although_their_metadata_is_the_same() -> None:
    batch = rows(document=["a", "b", None, ""], lang=["de"] * 4)
    assert distinct(batch) == 4
    assert key_columns(batch)["document_key"][2].as_py() == NO_DOCUMENT
    assert document_key(None) == NO_DOCUMENT != document_key("")


def test_without_metadata_a_row_is_told_by_its_document() -> None:
    found = key_columns(rows(document=["a", "b", "a", None]))
    assert found["row_hash"].to_pylist() == [document_key(name) for name in ["a", "b", "a", None]]


def test_the_hash_of_a_text_is_of_exactly_its_bytes() -> None:
    variants = ["alpha", "alpha ", "Alpha", "alpha\n", "alpha\r\n", "", "alphá", "alpha\u0301"]
    assert len({text_hash(text) for text in variants}) == len(variants)


def ids_of(
    chunks: list[tuple[str, str]], batch_rows: int = 2, ids: list[str] | None = None
) -> list[str]:
    records = [
        {"id": ids[row] if ids else None, "document": document, "text": text}
        for row, (document, text) in enumerate(chunks)
    ]
    batches = pa.Table.from_pylist(records, schema=CHUNKS).to_batches(batch_rows)
    return [id_ for batch in identified(batches, []) for id_ in batch.column("id").to_pylist()]


documents = st.lists(st.lists(st.sampled_from("abc"), min_size=1, max_size=5), max_size=3)


@given(documents, st.integers(1, 4))
@settings(deadline=None)
def test_ids_are_distinct_and_do_not_depend_on_batches(
    corpus: list[list[str]], batch_rows: int
) -> None:
    chunks = [(str(name), text) for name, texts in enumerate(corpus) for text in texts]
    found = ids_of(chunks, batch_rows)
    assert len(set(found)) == len(chunks)
    assert found == ids_of(chunks, 100)


@given(st.lists(st.sampled_from("abc"), max_size=6))
@settings(deadline=None)
def test_an_insertion_at_the_top_moves_no_other_id(texts: list[str]) -> None:
    before = ids_of([("d", text) for text in texts])
    after = ids_of([("d", "new"), *[("d", text) for text in texts]])
    assert after[1:] == before


def test_a_repeated_text_is_counted_within_its_document() -> None:
    found = ids_of([("d", "a"), ("d", "b"), ("d", "a"), ("e", "a"), ("e", "a")])
    hashed = text_hash("a")
    assert found[0] == chunk_id("d", hashed, 0)
    assert found[2] == chunk_id("d", hashed, 1)
    assert found[3:] == [chunk_id("e", hashed, 0), chunk_id("e", hashed, 1)]


def test_ids_of_a_table_stay_as_they_are() -> None:
    assert ids_of([("d", "a"), ("e", "a")], ids=["7", "x'y"]) == ["7", "x'y"]


def test_metadata_and_lines_pass_through_unchanged() -> None:
    schema = pa.schema([*CHUNKS, pa.field("n", pa.int64())])
    row = {"id": "1", "document": "d", "text": "a", "start_line": 3, "end_line": 4, "n": 9}
    (batch,) = identified(
        pa.Table.from_pylist([row], schema=schema).to_batches(), [pa.field("n", pa.int64())]
    )
    assert batch.to_pylist() == [{**row, "text_hash": text_hash("a")}]


def test_a_large_set_is_searched_without_mistakes() -> None:
    random = np.random.default_rng(7)
    digests = [random.bytes(16) for _ in range(5000)]
    found = KeySet(hash_column(digests[:4000]))
    assert found.positions(hash_column(digests)).tolist() == [*range(4000), *([-1] * 1000)]


def test_metadata_columns_in_another_order_are_the_same_row() -> None:
    columns = {"id": ["1"], "document": ["d"], "lang": ["en"], "url": ["x"]}
    there = pa.RecordBatch.from_pydict(columns)
    here = pa.RecordBatch.from_pydict(dict(reversed(columns.items())))
    assert key_columns(there)["row_hash"] == key_columns(here)["row_hash"]


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
