"""The second pass sends what the plan promised, and leaves alone what changed meanwhile."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

import pyarrow as pa
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tasks.cache import Cache
from tasks.compare import Compared, Held, compare
from tasks.fill import Filled, Filling
from tasks.fingerprint import fingerprint
from tasks.keys import digest, hash_column, identified, key_columns, text_hash
from tasks.limits import Limits
from tasks.lookup import lookup
from tasks.pack import Packed, pack
from tasks.providers.lexical import Lexical
from tasks.read import ReadNotes
from tasks.schemas import (
    BATCH,
    CHANGES,
    DELETIONS,
    INDEXED,
    PACKED,
    Batch,
    TableRef,
    rows_schema,
)

Kind = Literal["files", "table"]
State = Sequence[tuple[str | None, str | None, str, str | None]]
"""Rows of a corpus: id, document, text, lang."""


@dataclass
class Result:
    """What the second pass brought, beside what the first one promised."""

    compared: Compared
    packed: Packed
    batches: list[Batch]
    filled: Filled
    rows: list[dict[str, Any]]
    after: dict[str, dict[str, Any]]

    @property
    def sent(self) -> list[list[str]]:
        return [batch.table.load(BATCH).column("text").to_pylist() for batch in self.batches]


@dataclass
class Sizes:
    """Nothing is learned while batches fill."""

    lexical: Lexical
    limits: Limits

    def counts(self, texts: pa.Array) -> Any:
        return self.lexical.counts(texts.to_pylist())

    def request_limits(self) -> Limits:
        return self.limits


Fill = Callable[..., Result]


@pytest.fixture(scope="session")
def fill(fresh: Callable[[], Path], lexical: Lexical, memory_reader: type[Any]) -> Fill:
    """Plans for `first`, then reads `second`; the index holds `index`."""

    def run(
        first: State,
        second: State | None = None,
        index: State = (),
        texts_per_request: int = 2,
        kind: Kind = "table",
        *,
        quarantined: str = "",
        refused: str = "",
    ) -> Result:
        folder = fresh()
        old = rows_of(memory_reader([index]))
        reader = memory_reader([first, first if second is None else second])
        keyed = fingerprint(reader, lexical, folder / "keyed.arrow")
        indexed = TableRef.write(folder / "indexed.arrow", INDEXED, map(as_indexed, old))
        compared = compare(keyed.table, indexed, kind, Held(), folder)
        cache = Cache(str(folder), lexical.space)
        known_bad = hash_column([text_hash(text) for text in quarantined])
        looked_up = lookup(
            compared.changes,
            indexed,
            cache,
            folder / "misses.arrow",
            unfolded=[],
            quarantined=known_bad,
        )
        limits = replace(lexical.limits, texts_per_request=texts_per_request)
        packed = pack(looked_up.misses, limits, folder / "packed.arrow")
        filling = Filling(
            reader=reader,
            changes=compared.changes,
            deletions=compared.deletions,
            packed=packed.table,
            sizes=Sizes(lexical, limits),
            folder=folder,
            table_rows=keyed.table if kind == "table" else None,
        )
        batches = list(filling.batches())
        filled = filling.finish(hash_column([text_hash(text) for text in (*quarantined, *refused)]))
        rows = filled.rows.load(rows_schema(reader.metadata)).to_pylist()
        after = {row["id"]: row for batch in old for row in batch.to_pylist()}
        for id_ in filled.deletions.load(DELETIONS).column("id").to_pylist():
            del after[id_]
        assert filled.updates == sum(row["id"] in after for row in rows)
        assert len(rows) == filled.changes.rows
        after.update({row["id"]: row for row in rows})
        return Result(compared, packed, batches, filled, rows, after)

    return run


def rows_of(reader: Any) -> list[pa.RecordBatch]:
    return list(identified(reader.chunks(ReadNotes()), reader.metadata))


def as_indexed(rows: pa.RecordBatch) -> pa.RecordBatch:
    own = {**key_columns(rows), **{name: rows.column(name) for name in rows.schema.names}}
    return pa.record_batch([own[name] for name in INDEXED.names], schema=INDEXED)


def files(**documents: str) -> State:
    """Files by name, a text a letter."""
    return [(None, name, text, None) for name, texts in documents.items() for text in texts]


def standing(state: State, memory_reader: type[Any]) -> dict[str, dict[str, Any]]:
    return {
        row["id"]: row for batch in rows_of(memory_reader([state])) for row in batch.to_pylist()
    }


texts = st.text(alphabet="abcdefg", min_size=1, max_size=5)
states_of_files = st.dictionaries(st.sampled_from(["x", "y", "z"]), texts).map(
    lambda documents: files(**documents)
)
states_of_tables = st.lists(
    st.tuples(
        st.sampled_from("1234567"),
        st.sampled_from(["x", "y", None]),
        st.sampled_from("abcdefg"),
        st.sampled_from(["de", "en"]),
    ),
    unique_by=lambda row: row[0],
)
cases = st.one_of(
    st.tuples(states_of_files, states_of_files, states_of_files, st.just("files")),
    st.tuples(states_of_tables, states_of_tables, states_of_tables, st.just("table")),
)


@given(cases, st.integers(1, 4))
@settings(max_examples=40, deadline=None)
def test_a_corpus_that_stays_as_it_was_is_sent_as_it_was_planned(
    fill: Fill, memory_reader: Any, case: tuple[State, State, State, Kind], texts_per_request: int
) -> None:
    corpus, index, _, kind = case
    found = fill(corpus, index=index, texts_per_request=texts_per_request, kind=kind)
    packed = found.packed.table.load(PACKED).to_pylist()
    sent = [
        {**row, "batch": batch.number}
        for batch in found.batches
        for row in batch.table.load(BATCH).drop_columns("text").to_pylist()
    ]
    assert sent == packed
    assert sum(batch.tokens for batch in found.batches) == found.packed.tokens
    assert found.after == standing(corpus, memory_reader)
    assert found.filled.unsettled == 0


@given(cases)
@settings(max_examples=60, deadline=None)
def test_a_document_that_changed_meanwhile_keeps_its_old_rows(
    fill: Fill, memory_reader: Any, case: tuple[State, State, State, Kind]
) -> None:
    first, second, index, kind = case
    found = fill(first, second, index, kind=kind)
    changes = {row["key"]: row for row in found.compared.changes.load(CHANGES).to_pylist()}
    was, then = standing(first, memory_reader), standing(second, memory_reader)
    came = {
        id_
        for id_, row in then.items()
        if id_ in was and all(row[name] == was[id_][name] for name in ("text", "document"))
    }
    lost = [row for id_, row in was.items() if digest(id_.encode()) in changes and id_ not in came]
    documents = {row["document"] for row in lost} - {None}
    alone = [row for row in lost if row["document"] is None]
    assert found.filled.unsettled == len(documents) + len(alone)
    old = standing(index, memory_reader)
    for row in was.values():
        id_ = row["id"]
        if row["document"] in documents or row in alone:
            assert found.after.get(id_) == old.get(id_)
        elif digest(id_.encode()) in changes:
            assert found.after[id_] == then[id_]
    for id_, row in old.items():
        if id_ not in was and row["document"] in documents:
            assert found.after[id_] == row
        if id_ not in was and row["document"] not in documents:
            assert id_ not in found.after


@given(cases)
@settings(max_examples=30, deadline=None)
def test_each_missing_text_is_sent_once_and_every_row_has_its_vector(
    fill: Fill, case: tuple[State, State, State, Kind]
) -> None:
    first, second, index, kind = case
    found = fill(first, second, index, kind=kind)
    sent = [text for batch in found.sent for text in batch]
    known = {row[2] for row in index}
    assert len(set(sent)) == len(sent)
    assert {row["text"] for row in found.rows} <= {*sent, *known}
    assert not known & set(sent)
    assert [batch.number for batch in found.batches] == list(range(1, len(found.batches) + 1))


def test_nothing_changed_reads_nothing_again(fill: Fill) -> None:
    state = files(x="abc")
    found = fill(state, [], state, kind="files")
    assert (found.batches, found.rows, found.filled.unsettled) == ([], [], 0)


def test_a_file_that_vanished_keeps_its_rows_until_the_next_run(fill: Fill) -> None:
    old = files(x="ab", y="c")
    found = fill(files(x="ad", y="ce"), files(y="ce"), old, kind="files")
    assert found.filled.unsettled == 1
    assert sorted(row["text"] for row in found.after.values()) == ["a", "b", "c", "e"]
    assert found.sent == [["e"]]


def test_rows_that_stand_elsewhere_by_now_are_found_all_the_same(fill: Fill) -> None:
    first = [("1", "x", "a", "de"), ("2", "x", "b", "de"), ("3", None, "c", "de")]
    for second in ([("9", None, "z", "de"), *first], first[::-1], [*first, ("9", "x", "z", "de")]):
        found = fill(first, second)
        assert sorted(row["id"] for row in found.rows) == ["1", "2", "3"]
        assert found.filled.unsettled == 0


@pytest.mark.parametrize("apart", [0, 3])
def test_an_id_that_stands_twice_by_now_is_written_once(fill: Fill, apart: int) -> None:
    row, between = ("1", "x", "a", None), [(str(n), "x", "b", None) for n in range(2, 2 + apart)]
    found = fill([row, *between], [row, *between, row])
    assert [one["id"] for one in found.rows] == ["1", *[one[0] for one in between]]


def test_a_row_that_joined_another_document_meanwhile_is_left_to_the_next_run(fill: Fill) -> None:
    index = [("1", "x", "a", "de"), ("2", "y", "b", "de")]
    first = [("1", "x", "c", "de"), ("2", "y", "d", "de")]
    second = [("1", "y", "c", "de")]
    found = fill(first, second, index)
    assert found.rows == []
    assert found.filled.unsettled == 2


@given(cases, st.sets(st.sampled_from("abcdefg")).map("".join), st.sets(st.sampled_from("abc")))
@settings(max_examples=60, deadline=None)
def test_what_is_refused_is_in_no_row_and_all_else_is_as_the_corpus(
    fill: Fill,
    memory_reader: Any,
    case: tuple[State, State, State, Kind],
    bad: str,
    before: set[str],
) -> None:
    corpus, _, index, kind = case
    index = [row for row in index if row[2] not in bad]  # nothing refused was ever published
    quarantined = "".join(before & set(bad))
    found = fill(corpus, index=index, kind=kind, quarantined=quarantined, refused=bad)
    wanted = standing(corpus, memory_reader)
    assert found.after == {id_: row for id_, row in wanted.items() if row["text"] not in bad}
    left_out = found.filled.left_out.to_pylist()
    assert {row["id"] for row in left_out} == {
        id_ for id_, row in wanted.items() if row["text"] in bad
    }
    assert not {text for batch in found.sent for text in batch} & set(quarantined)
