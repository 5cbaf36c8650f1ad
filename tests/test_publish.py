"""Publish leaves exactly the corpus, each row with its own vector, in one version or in none."""

import random
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import lancedb
import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from lancedb.table import Table

import tasks.lance
import tasks.publish
from tasks.cache import Cache
from tasks.errors import CorpusError, EmbedOnceError, LockLost
from tasks.index import Identity, generations, open_index, require_held
from tasks.keys import NO_DOCUMENT, text_hash
from tasks.lance import read_where, replace_rows
from tasks.memory import MOST, Sizes
from tasks.params import Index
from tasks.providers.lexical import Lexical
from tasks.publish import Published, publish
from tasks.schemas import DELETIONS, TableRef, rows_schema

LANG = pa.field("lang", pa.utf8())
Row = tuple[str, str, str | None, str | None]
"""id, text, document, lang."""


def row(id_: str, text: str, document: str | None = "d", lang: str | None = "en") -> Row:
    return id_, text, document, lang


@dataclass
class Shelf:
    """An index in a folder of its own, and what publishes to it."""

    index: Index
    provider: Lexical
    cache: Cache
    ref: Callable[..., TableRef]
    paid: Callable[..., pa.Table]
    metadata: list[pa.Field] = field(default_factory=lambda: [LANG])
    splitter: str = "s1"
    run_id: str = "run"

    def publish(
        self,
        *rows: Row,
        delete: tuple[str, ...] = (),
        known: bool = True,
        batch_rows: int = 2,
        sizes: Sizes = MOST,
    ) -> Published:
        if known and rows:
            self.cache.remember([self.paid(*[one[1] for one in rows])])
        records = [
            {
                "id": id_,
                "document": document,
                "text": text,
                "text_hash": text_hash(text),
                "start_line": len(text),
                "end_line": None,
                **{own.name: lang for own in self.metadata},
            }
            for id_, text, document, lang in rows
        ]
        gone = [{"id": id_, "document_key": NO_DOCUMENT, "change": "deleted"} for id_ in delete]
        before = set(self.ids())
        return publish(
            rows=self.ref(rows_schema(self.metadata), records, batch_rows),
            deletions=self.ref(DELETIONS, gone),
            updates=len(before & {one[0] for one in rows}),
            index=self.index,
            identity=Identity(self.provider.space, self.splitter),
            cache=self.cache,
            run_id=self.run_id,
            sizes=sizes,
        )

    def table(self) -> Table:
        found = open_index(self.index)
        assert found is not None
        return found

    def ids(self) -> list[str]:
        found = open_index(self.index)
        return [] if found is None else sorted(found.to_arrow().column("id").to_pylist())

    def holds(self, *rows: Row) -> None:
        """The index holds exactly `rows`, in every column."""
        found = {one["id"]: one for one in self.table().to_arrow().to_pylist()}
        assert len(found) == self.table().count_rows() == len(rows)
        for id_, text, document, lang in rows:
            one = found[id_]
            assert (one["text"], one["document"]) == (text, document)
            assert one["text_hash"] == text_hash(text)
            assert (one["start_line"], one["end_line"]) == (len(text), None)
            assert one["vector"] == self.provider.embed([text]).vectors[0].tolist()
            for own in self.metadata:
                assert one[own.name] == lang

    def versions(self) -> int:
        return len(self.table().list_versions())


@pytest.fixture(scope="session")
def shelves(
    fresh: Callable[[], Path],
    index_in: Callable[..., Index],
    lexical: Lexical,
    ref: Callable[..., TableRef],
    paid: Callable[..., pa.Table],
) -> Callable[[], Shelf]:
    def make() -> Shelf:
        folder = fresh()
        return Shelf(index_in(folder), lexical, Cache(str(folder), lexical.space), ref, paid)

    return make


@pytest.fixture
def shelf(shelves: Callable[[], Shelf]) -> Shelf:
    return shelves()


@pytest.fixture
def always_overwrite(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tasks.publish, "MERGE_ROWS", 0)


def every(values: pa.Array) -> npt.NDArray[np.bool_]:
    return np.ones(len(values), np.bool_)


A, B, C = row("a", "alpha"), row("b", "beta"), row("c", "gamma", None, None)


def test_a_first_run_creates_the_table(shelf: Shelf) -> None:
    assert shelf.publish(A, B, C) == Published("create", 1, 1, 3)
    shelf.holds(A, B, C)


def test_nothing_to_index_creates_nothing(shelf: Shelf) -> None:
    assert shelf.publish() == Published("none", 0, 0, 0)
    assert open_index(shelf.index) is None


def test_additions_alone_are_added(shelf: Shelf) -> None:
    shelf.publish(A)
    assert shelf.publish(B, C) == Published("add", 2, 2, 3)
    shelf.holds(A, B, C)


def test_updates_additions_and_deletions_are_merged_in_one_version(shelf: Shelf) -> None:
    shelf.publish(A, B, C)
    changed, new = row("a", "delta", "e", "de"), row("d", "epsilon")
    assert shelf.publish(changed, new, delete=("b",)) == Published("merge", 2, 2, 3)
    shelf.holds(changed, C, new)


def test_deletions_alone_are_merged(shelf: Shelf) -> None:
    shelf.publish(A, B, C)
    assert shelf.publish(delete=("a", "c")).way == "merge"
    shelf.holds(B)
    assert shelf.versions() == 2


def test_an_index_may_become_empty_and_fill_again(shelf: Shelf) -> None:
    shelf.publish(A, B)
    assert shelf.publish(delete=("a", "b")) == Published("merge", 2, 2, 0)
    assert shelf.publish(C) == Published("add", 3, 3, 1)
    shelf.holds(C)


def test_much_at_once_is_written_anew_in_one_version(shelf: Shelf, always_overwrite: None) -> None:
    shelf.publish(A, B, C)
    changed, new = row("a", "delta", "e", "de"), row("d", "epsilon")
    assert shelf.publish(changed, new, delete=("b",)) == Published("overwrite", 2, 2, 3)
    shelf.holds(changed, C, new)


def test_deletions_alone_take_ids_of_any_characters(shelf: Shelf) -> None:
    odd = [
        row("it's", "one"),
        row('a "b" \\ c', "two"),
        row("line\nfeed", "three"),
        row("ü%_", "x"),
    ]
    shelf.publish(A, *odd)
    assert shelf.publish(delete=tuple(each[0] for each in odd)).way == "merge"
    shelf.holds(A)


def test_rows_leave_fragments_whole_or_in_part(shelf: Shelf) -> None:
    d, e = row("d", "delta"), row("e", "epsilon")
    for rows in ((A,), (B, C), (d, e)):
        assert shelf.publish(*rows).way in {"create", "add"}
    changed = row("e", "eta")
    assert shelf.publish(changed, delete=("a", "b")).way == "merge"
    shelf.holds(C, d, changed)
    assert shelf.publish(delete=("c", "d", "e")).way == "merge"
    shelf.holds()


def bytes_read() -> int:
    """By this process, until now."""
    told = Path("/proc/self/io").read_text(encoding="ascii")
    return int(told.partition("rchar:")[2].split()[0])


@pytest.mark.skipif(not Path("/proc/self/io").exists(), reason="only Linux counts what is read")
def test_rows_that_stay_are_not_read_with_their_vectors(shelf: Shelf) -> None:
    count = 9000
    shelf.publish(*(row(f"id{n}", f"word{n}") for n in range(count)), batch_rows=4000)
    table, before = shelf.table(), bytes_read()
    replace_rows(
        table, "id", lambda ids: np.isin(ids.to_numpy(False), ["id7", "id9"]), None, lambda: None
    )
    assert bytes_read() - before < count * 4 * shelf.provider.dimension / 10
    assert table.count_rows() == count - 2


def test_a_lock_that_is_lost_before_the_commit_of_a_merge_prevents_it(shelf: Shelf) -> None:
    shelf.publish(A, B)

    def lost() -> None:
        raise LockLost("Another run has taken it over.")

    with pytest.raises(LockLost):
        replace_rows(shelf.table(), "id", every, None, lost)
    assert shelf.versions() == 1
    shelf.holds(A, B)


@pytest.mark.parametrize("name", ["a?b", "a#b", "a%20b", "a;b", "ä b"])
def test_a_merge_finds_its_table_in_a_folder_of_any_name(shelf: Shelf, name: str) -> None:
    shelf.index = shelf.index.model_copy(update={"uri": f"{shelf.index.uri}/{name}"})
    shelf.publish(A, B)
    changed = row("a", "delta")
    assert shelf.publish(changed, delete=("b",)).way == "merge"
    shelf.holds(changed)


@pytest.mark.parametrize("way", ["add", "merge", "overwrite"])
def test_a_vector_that_is_no_number_is_never_published(
    shelf: Shelf, way: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    shelf.publish(A)
    monkeypatch.setattr(tasks.publish, "MERGE_ROWS", 0 if way == "overwrite" else 10)
    shelf.cache.remember([shelf.paid("broken")])
    stored = shelf.cache.table()
    assert stored is not None
    rows = stored.to_arrow()
    nothing = [[float("nan")] * shelf.provider.dimension] * rows.num_rows
    at, vector = rows.schema.get_field_index("vector"), rows.schema.field("vector")
    spoiled = rows.set_column(at, vector, pa.array(nothing, vector.type)).to_reader()
    replace_rows(stored, "text_hash", every, spoiled, lambda: None)
    with pytest.raises(EmbedOnceError, match=r"not finite|NaN"):
        shelf.publish(row("b" if way == "add" else "a", "broken"), known=False)
    assert shelf.versions() == 1
    shelf.holds(A)


def test_a_merge_that_another_writer_crossed_leaves_no_id_twice(
    shelf: Shelf, monkeypatch: pytest.MonkeyPatch
) -> None:
    d = row("d", "delta")
    shelf.publish(A)
    shelf.publish(B)
    shelf.publish(C)
    other = shelf.table()
    theirs = other.to_arrow().slice(0, 1).set_column(0, other.schema.field("id"), pa.array(["d"]))

    def meanwhile(*lock: Any) -> None:
        require_held(*lock)
        if other.version == 3:  # the counts are as they should be
            other.delete("id = 'a'")
            other.add(theirs)

    shelf.cache.remember([shelf.paid("delta")])
    with monkeypatch.context() as patch:
        patch.setattr(tasks.publish, "require_held", meanwhile)
        with pytest.raises(EmbedOnceError, match="an id twice"):
            shelf.publish(d, delete=("b",))
    shelf.holds(A, B, C)


def test_how_many_rows_leave_or_change_decides_between_merge_and_overwrite(
    shelf: Shelf, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tasks.publish, "MERGE_ROWS", 2)
    shelf.publish(A, B, C)
    assert shelf.publish(row("a", "one"), row("d", "four"), delete=("b",)).way == "merge"
    assert shelf.publish(row("a", "six"), row("d", "ten"), delete=("c",)).way == "overwrite"
    shelf.holds(row("a", "six"), row("d", "ten"))


def test_a_table_of_long_texts_is_copied_a_few_rows_at_a_time(
    shelf: Shelf, always_overwrite: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    long = [
        row(f"{number:02}", random.Random(number).randbytes(20_000).hex()) for number in range(40)
    ]
    shelf.publish(*long)
    monkeypatch.setattr(tasks.lance, "WINDOW_BYTES", 12 * 20_000)  # they compress to that
    read = list(read_where(shelf.table(), "id", every))
    assert sum(batch.num_rows for batch in read) == 40
    assert max(batch.num_rows for batch in read) <= 12
    assert shelf.publish(row("00", "short"), delete=("07",)).way == "overwrite"
    shelf.holds(row("00", "short"), *long[1:7], *long[8:])


@pytest.mark.parametrize("way", ["merge", "overwrite"])
def test_nothing_to_do_makes_no_version(
    shelf: Shelf, way: str, request: pytest.FixtureRequest
) -> None:
    if way == "overwrite":
        request.getfixturevalue("always_overwrite")
    shelf.publish(A, B)
    assert shelf.publish(row("a", "delta")).way == way
    assert shelf.publish() == Published("none", 2, 2, 2)
    assert shelf.versions() == 2


STRANGE = [
    "plain",
    "it's",
    "''",
    "';--",
    '"quoted"',
    "a;b",
    "a\nb",
    "a\r\nb",
    "tab\tand\0nul",
    "back\\slash",
    "\\'",
    "100%_like",
    "ünïcödé",
    "日本語 🙂",
    "id IN ('x')",
    "/* no comment */ -- neither",
    "{curly} ${dollar} :1 ?",
    " ",
    "x" * 3000,
]


@pytest.mark.parametrize("way", ["merge", "overwrite"])
def test_ids_of_any_characters_are_deleted_and_only_they(
    shelf: Shelf, way: str, request: pytest.FixtureRequest
) -> None:
    if way == "overwrite":
        request.getfixturevalue("always_overwrite")
    rows = [row(id_, f"word{number}") for number, id_ in enumerate(STRANGE)]
    shelf.publish(*rows)
    assert shelf.publish(rows[0], delete=tuple(STRANGE[1::2])).way == way
    shelf.holds(*rows[::2])
    assert shelf.publish(rows[0], delete=tuple(STRANGE[2::2])).way == way
    shelf.holds(rows[0])


ids = st.text(min_size=1, max_size=4) | st.text("'\"\\;%\n", min_size=1, max_size=4)


@pytest.mark.slow
@given(st.sets(ids, min_size=2, max_size=6).map(sorted), st.data())
@settings(max_examples=25, deadline=None)
def test_any_ids_may_be_deleted_and_rewritten(
    shelves: Callable[[], Shelf], names: list[str], data: st.DataObject
) -> None:
    shelf = shelves()
    rows = {id_: row(id_, f"word{number}") for number, id_ in enumerate(names)}
    shelf.publish(*rows.values())
    gone = data.draw(st.sets(st.sampled_from(names)))
    changed = data.draw(st.sets(st.sampled_from(names))) - gone
    rows |= {id_: row(id_, rows[id_][1] + " changed") for id_ in changed}
    shelf.publish(*[rows[id_] for id_ in sorted(changed)], delete=tuple(sorted(gone)))
    shelf.holds(*[one for id_, one in rows.items() if id_ not in gone])


words = st.sampled_from(["alpha", "beta", "gamma", "delta", "epsilon"])
corpora = st.dictionaries(
    st.sampled_from("abcdef"), st.tuples(words, st.sampled_from(["d", None]), st.just("en"))
).map(lambda found: [row(id_, *rest) for id_, rest in found.items()])


@pytest.mark.slow
@given(st.lists(corpora, min_size=2, max_size=4), st.sampled_from([0, 2, 10**6]))
@settings(max_examples=25, deadline=None)
def test_any_way_through_any_corpora_leaves_the_last_one(
    shelves: Callable[[], Shelf], states: list[list[Row]], merge_rows: int
) -> None:
    shelf, now = shelves(), dict[str, Row]()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(tasks.publish, "MERGE_ROWS", merge_rows)
        for state in states:
            then = {one[0]: one for one in state}
            differ = [one for id_, one in then.items() if now.get(id_) != one]
            gone = tuple(id_ for id_ in now if id_ not in then)
            before = shelf.versions() if open_index(shelf.index) is not None else 0
            found = shelf.publish(*differ, delete=gone)
            now = then
            if open_index(shelf.index) is None:
                assert not now
                continue
            shelf.holds(*now.values())
            assert found.rows == len(now)
            assert shelf.versions() - before == (1 if differ or gone else 0)
            assert found.generation == found.version == shelf.versions()


@pytest.mark.parametrize("again", ["create", "merge"])
def test_an_id_that_stands_twice_is_refused_and_nothing_published(shelf: Shelf, again: str) -> None:
    if again == "merge":
        shelf.publish(A)
    with pytest.raises(CorpusError, match="1 rows to publish repeat an id"):
        shelf.publish(row("x", "beta"), row("y", "beta"), row("x", "gamma"))
    assert shelf.ids() == (["a"] if again == "merge" else [])
    if again == "merge":
        assert shelf.versions() == 1


def test_rows_without_a_vector_are_refused_and_nothing_is_published(shelf: Shelf) -> None:
    shelf.publish(A, B)
    for rows in ((C,), (row("a", "delta"),)):
        with pytest.raises(EmbedOnceError, match="vectors are missing"):
            shelf.publish(*rows, known=False)
    shelf.holds(A, B)
    assert shelf.versions() == 1


def test_a_first_run_without_its_vectors_leaves_no_table_behind(shelf: Shelf) -> None:
    with pytest.raises(EmbedOnceError, match="vectors are missing"):
        shelf.publish(A, known=False)
    assert open_index(shelf.index) is None


def test_an_overwrite_that_fails_leaves_the_old_rows(shelf: Shelf, always_overwrite: None) -> None:
    shelf.publish(A, B)
    with pytest.raises(EmbedOnceError, match="vectors are missing"):
        shelf.publish(row("a", "delta"), row("b", "omega"), C, known=False)
    shelf.holds(A, B)
    assert shelf.versions() == 1


def test_a_commit_that_brought_something_else_is_undone(shelf: Shelf) -> None:
    shelf.publish(A, B)
    with pytest.raises(EmbedOnceError, match="version 1 was restored"):
        shelf.publish(C, delete=("not there",))
    shelf.holds(A, B)


def test_other_metadata_columns_are_taken_up_by_writing_anew(shelf: Shelf) -> None:
    shelf.publish(A, B)
    shelf.metadata = [pa.field("topic", pa.utf8())]
    every = [row("a", "alpha", "d", "new"), row("b", "beta", "d", None)]
    assert shelf.publish(*every) == Published("overwrite", 2, 2, 2)
    shelf.holds(*every)
    assert "lang" not in shelf.table().schema.names


def test_rows_that_are_held_lose_no_column_but_those_that_are_gone(shelf: Shelf) -> None:
    shelf.publish(A, B)
    shelf.metadata = [LANG, pa.field("topic", pa.utf8())]
    shelf.publish(row("a", "alpha", "d", "de"))
    found = {one["id"]: one for one in shelf.table().to_arrow().to_pylist()}
    assert (found["a"]["lang"], found["a"]["topic"]) == ("de", "de")
    assert (found["b"]["lang"], found["b"]["topic"]) == ("en", None)
    assert found["b"]["vector"] == shelf.provider.embed(["beta"]).vectors[0].tolist()


def test_another_splitter_is_written_down_even_where_no_row_changed(shelf: Shelf) -> None:
    shelf.publish(A, B)
    shelf.splitter = "s2"
    assert shelf.publish() == Published("overwrite", 2, 2, 2)
    assert shelf.publish() == Published("none", 2, 2, 2)
    shelf.holds(A, B)


TYPES: list[Any] = [
    pa.int64(),
    pa.float32(),
    pa.bool_(),
    pa.binary(),
    pa.timestamp("us", "UTC"),
    pa.timestamp("ns"),
    pa.date32(),
    pa.decimal128(9, 2),
    pa.list_(pa.utf8()),
    pa.struct([("a", pa.int64()), ("b", pa.list_(pa.float64()))]),
]


@pytest.mark.parametrize("type_", TYPES, ids=str)
def test_metadata_of_any_type_makes_no_second_version(shelf: Shelf, type_: pa.DataType) -> None:
    shelf.metadata = [pa.field("m", type_)]
    shelf.publish(row("a", "alpha", "d", None))
    assert shelf.table().schema.field("m").type == type_
    assert shelf.publish().way == "none"
    assert shelf.publish(row("b", "beta", "d", None)).way == "add"


def test_a_reader_of_an_old_version_still_reads_it(shelf: Shelf, always_overwrite: None) -> None:
    shelf.publish(A, B)
    pinned = shelf.table()
    pinned.checkout("gen-1")
    shelf.publish(row("a", "delta"), delete=("b",))
    shelf.publish(C)
    assert sorted(pinned.to_arrow().column("text").to_pylist()) == ["alpha", "beta"]
    assert [one.number for one in generations(shelf.table())] == [1, 2, 3]


def test_each_row_says_which_run_wrote_it(shelf: Shelf) -> None:
    shelf.publish(A, B)
    shelf.run_id = "later"
    shelf.publish(row("a", "delta"), C)
    found = shelf.table().to_arrow().select(["id", "run_id"]).to_pylist()
    assert {one["id"]: one["run_id"] for one in found} == {"a": "later", "b": "run", "c": "later"}


def test_the_table_is_an_ordinary_one_that_finds_its_rows(shelf: Shelf) -> None:
    shelf.publish(A, B, C)
    table = lancedb.connect(shelf.index.uri).open_table(shelf.index.table)
    query = shelf.provider.embed(["gamma"]).vectors[0]
    (nearest,) = table.search(query).limit(1).to_list()
    assert nearest["id"] == "c"
    assert table.search().where("lang = 'en' AND document = 'd'").to_arrow().num_rows == 2


def test_thousands_of_rows_keep_their_vectors_in_every_way(shelf: Shelf) -> None:
    count = 9000
    rows = [row(f"id{number}", f"word{number}") for number in range(count)]
    shelf.publish(*rows, batch_rows=4000)
    with pytest.MonkeyPatch.context() as patch:
        for merge_rows in (10**6, 0):
            patch.setattr(tasks.publish, "MERGE_ROWS", merge_rows)
            changed = [row(one[0], f"{one[1]} again{merge_rows}") for one in rows[::100]]
            shelf.publish(*changed)
            rows[::100] = changed
    table = shelf.table().to_arrow()
    texts = table.column("text").to_pylist()
    assert sorted(texts) == sorted(one[1] for one in rows)
    found = table.column("vector").combine_chunks().values.to_numpy()
    assert (found == shelf.provider.embed(texts).vectors.reshape(-1)).all()


@pytest.mark.parametrize("width", range(1, 17))
def test_decimals_reach_the_index_wherever_they_lie_in_the_file(shelf: Shelf, width: int) -> None:
    """LanceDB leaves a table empty, with no error, where they lie at no multiple of 16 bytes."""
    shelf.metadata = [LANG, pa.field("price", pa.decimal128(10, 2))]
    rows = [row(f"{'i' * width}{n}", f"{'w' * width}{n}", lang=None) for n in range(width)]
    assert shelf.publish(*rows, batch_rows=20).rows == shelf.table().count_rows() == width


def test_what_a_killed_first_publish_leaves_is_no_table(shelf: Shelf) -> None:
    folder = Path(shelf.index.uri) / f"{shelf.index.table}.lance" / "data"
    folder.mkdir(parents=True)
    (folder / ".tmp-half-written").write_bytes(b"half")
    assert open_index(shelf.index) is None
    assert shelf.publish(row("1", "alpha")).way == "create"
    shelf.holds(row("1", "alpha"))


def test_columns_in_another_order_change_nothing(shelf: Shelf) -> None:
    url = pa.field("url", pa.utf8())
    shelf.metadata = [LANG, url]
    shelf.publish(row("1", "alpha"))
    before = shelf.versions()
    shelf.metadata = [url, LANG]
    assert shelf.publish().way == "none"
    assert shelf.publish(row("2", "beta")).way == "add"
    assert shelf.versions() == before + 1
    shelf.holds(row("1", "alpha"), row("2", "beta"))
