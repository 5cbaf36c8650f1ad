"""Compare tells exactly what must happen to the index, and counts it by its definitions."""

from collections import Counter
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import pyarrow as pa
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tasks.compare import Compared, Held, compare, tally
from tasks.keys import chunk_id, digest, key_columns, text_hash
from tasks.schemas import CHANGES, DELETIONS, INDEXED, KEYED, TableRef, rows_schema

Kind = Literal["files", "table"]
LANG = [pa.field("lang", pa.utf8())]
ALL_READ = Held()


@dataclass(frozen=True)
class Row:
    """A chunk of the corpus or of the index."""

    id: str
    document: str | None
    text: str
    lang: str | None = None
    line: int | None = None


def files(documents: dict[str, list[str]]) -> list[Row]:
    """The chunks of files, a text a line."""
    rows = []
    for document, texts in documents.items():
        seen: Counter[str] = Counter()
        for line, text in enumerate(texts):
            id_ = chunk_id(document, text_hash(text), seen[text])
            rows.append(Row(id_, document, text, None, line))
            seen[text] += 1
    return rows


def with_names(documents: dict[str, list[str]]) -> list[Row]:
    """The same with the document's name in front of each text, as a config may ask for."""
    return files({name: [f"{name} {text}" for text in own] for name, own in documents.items()})


def tokens_of(text: str) -> int:
    return {"a": 1, "b": 10, "c": 100, "d": 1000, "e": 10_000}[text[-1]]


def keyed_columns(rows: Iterable[Row]) -> pa.Table:
    records = [
        {
            "id": row.id,
            "document": row.document,
            "text": row.text,
            "text_hash": text_hash(row.text),
            "start_line": row.line,
            "end_line": row.line,
            "lang": row.lang,
        }
        for row in rows
    ]
    table = pa.Table.from_pylist(records, schema=rows_schema(LANG))
    for name, column in key_columns(table.combine_chunks().to_batches()[0]).items():
        table = table.append_column(pa.field(name, column.type), column)
    return table.append_column(
        "tokens", pa.array([tokens_of(row.text) for row in rows], pa.int32())
    )


@dataclass
class Result:
    """What compare found, and what the index is like when that was done to it."""

    compared: Compared
    changes: dict[bytes, str]
    deletions: dict[str, str]
    applied: list[Row]
    counts: Counter[str]


Compare = Callable[..., Result]


@pytest.fixture(scope="session")
def comparing(fresh: Callable[[], Path]) -> Compare:
    def run(
        corpus: list[Row], index: list[Row], kind: Kind, held: Held = ALL_READ, **settings: Any
    ) -> Result:
        folder = fresh()
        refs = []
        for name, schema, rows in (("keyed", KEYED, corpus), ("indexed", INDEXED, index)):
            table = keyed_columns(rows).select(schema.names).cast(schema) if rows else None
            batches = table.to_batches(max_chunksize=3) if table is not None else []
            refs.append(TableRef.write(folder / name, schema, batches))
        compared = compare(refs[0], refs[1], kind, held, folder, **settings)
        changes = compared.changes.load(CHANGES)
        deletions = compared.deletions.load(DELETIONS)
        after = {row.id: row for row in index}
        known = {digest(id_.encode()) for id_ in after}
        for id_ in deletions.column("id").to_pylist():
            del after[id_]
        by_key = {digest(row.id.encode()): row for row in corpus}
        for change in changes.to_pylist():
            row = by_key[change["key"]]
            assert change["text_hash"] == text_hash(row.text)
            assert change["tokens"] == tokens_of(row.text)
            assert change["in_index"] == (change["key"] in known)
            after[row.id] = row
        return Result(
            compared,
            dict(
                zip(*(changes.column(name).to_pylist() for name in ("key", "change")), strict=True)
            ),
            dict(zip(*(deletions.column(n).to_pylist() for n in ("id", "change")), strict=True)),
            sorted(after.values(), key=lambda row: row.id),
            tally(changes, deletions),
        )

    return run


def expected_counts(corpus: list[Row], index: list[Row], kind: Kind) -> Counter[str]:
    """The definitions, read slowly."""
    old, new = {row.id: row for row in index}, {row.id: row for row in corpus}
    counts: Counter[str] = Counter(deleted=0)
    for row in corpus:
        if row.id in old:
            was = old[row.id]
            if was.text != row.text:
                counts["changed"] += 1
            elif (was.document, was.lang) != (row.document, row.lang):
                counts["moved"] += 1
            elif was.line != row.line:
                counts["relined"] += 1
    left = [row for row in index if row.id not in new]
    joined = [row for row in corpus if row.id not in old]
    if kind == "files":
        for name, member in (("moved", "text"), ("changed", "document")):
            for row in list(joined):
                same = [one for one in left if getattr(one, member) == getattr(row, member)]
                if same:
                    left.remove(same[0])
                    joined.remove(row)
                    counts[name] += 1
    counts["added"] += len(joined)
    counts["deleted"] += len(left)
    return counts


texts = st.sampled_from("abcde")
texts_of_files = st.dictionaries(
    st.sampled_from(["x", "y", "d/x", "d/z"]), st.lists(texts, min_size=1, max_size=4)
)
corpora_of_files = texts_of_files.map(files)
corpora_with_names = texts_of_files.map(with_names)
table_rows = st.builds(
    Row,
    st.sampled_from("123456"),
    st.sampled_from(["x", "y", None]),
    texts,
    st.sampled_from(["de", "en", None]),
    st.sampled_from([1, 2, None]),
)
corpora_of_tables = st.lists(table_rows, unique_by=lambda row: row.id, max_size=6)
both_kinds = st.one_of(
    st.tuples(corpora_of_files, corpora_of_files.flatmap(st.permutations), st.just("files")),
    st.tuples(corpora_with_names, corpora_with_names, st.just("files")),
    st.tuples(corpora_of_tables, corpora_of_tables, st.just("table")),
)


@given(both_kinds)
@settings(max_examples=100, deadline=None)
def test_what_differs_turns_the_index_into_the_corpus(
    comparing: Compare, case: tuple[list[Row], list[Row], Kind]
) -> None:
    corpus, index, kind = case
    assert comparing(corpus, index, kind).applied == sorted(corpus, key=lambda row: row.id)


@given(both_kinds)
@settings(max_examples=100, deadline=None)
def test_counts_are_those_of_the_definitions(
    comparing: Compare, case: tuple[list[Row], list[Row], Kind]
) -> None:
    corpus, index, kind = case
    found = comparing(corpus, index, kind)
    counts, compared = found.counts, found.compared
    assert +counts == +expected_counts(corpus, index, kind)
    written = counts["added"] + counts["changed"] + counts["moved"]
    assert compared.unchanged + written == len(corpus)
    assert len(index) + counts["added"] - counts["deleted"] == len(corpus)
    assert compared.indexed == len(index)
    assert compared.held == 0


@given(both_kinds)
@settings(max_examples=50, deadline=None)
def test_texts_and_tokens_are_counted_once(
    comparing: Compare, case: tuple[list[Row], list[Row], Kind]
) -> None:
    corpus, index, kind = case
    found = comparing(corpus, index, kind)
    written = [
        row.text
        for row in corpus
        if found.changes.get(digest(row.id.encode()), "relined") != "relined"
    ]
    every = sum(tokens_of(row.text) for row in corpus)
    first = sum(tokens_of(text) for text in set(written))
    compared = found.compared
    assert compared.unique_texts == len({row.text for row in corpus})
    assert compared.duplicate == len(corpus) - compared.unique_texts
    assert compared.unchanged_tokens == every - sum(map(tokens_of, written))
    assert compared.duplicate_tokens == sum(map(tokens_of, written)) - first


@given(both_kinds)
@settings(max_examples=25, deadline=None)
def test_the_same_corpus_changes_nothing(
    comparing: Compare, case: tuple[list[Row], list[Row], Kind]
) -> None:
    corpus, _, kind = case
    found = comparing(corpus, corpus[::-1], kind)
    assert (found.changes, found.deletions) == ({}, {})


def test_a_first_run_adds_all_and_an_empty_corpus_deletes_all(comparing: Compare) -> None:
    rows = files({"x": ["a", "b"]})
    assert comparing(rows, [], "files").counts == Counter(added=2, deleted=0)
    assert comparing([], rows, "files").counts == Counter(deleted=2)
    assert comparing([], [], "files").counts == Counter(deleted=0)


def test_changes_come_in_corpus_order(comparing: Compare) -> None:
    rows = files({"x": ["a", "b"], "y": ["c"], "d/x": ["d", "a"]})
    found = comparing(rows, rows[1:2], "files")
    assert list(found.changes) == [digest(row.id.encode()) for row in rows if row != rows[1]]


def test_a_renamed_file_is_moved(comparing: Compare) -> None:
    found = comparing(files({"y": ["a", "b"]}), files({"x": ["a", "b"]}), "files")
    assert found.counts == Counter(moved=2, deleted=0)
    assert set(found.deletions.values()) == {"moved"}


def test_a_renamed_file_is_a_new_one_where_its_name_is_embedded(comparing: Compare) -> None:
    found = comparing(with_names({"y": ["a", "b"]}), with_names({"x": ["a", "b"]}), "files")
    assert found.counts == Counter(added=2, deleted=2)


def test_a_rewritten_chunk_of_a_file_is_changed(comparing: Compare) -> None:
    found = comparing(files({"x": ["a", "c"]}), files({"x": ["a", "b"]}), "files")
    assert found.counts == Counter(changed=1, deleted=0)
    assert list(found.deletions.values()) == ["changed"]


def test_an_insertion_at_the_top_of_a_file_relines_the_rest(comparing: Compare) -> None:
    found = comparing(files({"x": ["c", "a", "b"]}), files({"x": ["a", "b"]}), "files")
    assert found.counts == Counter(added=1, relined=2, deleted=0)
    assert found.compared.unchanged == 2


def test_a_copy_is_added_where_its_original_stays(comparing: Compare) -> None:
    found = comparing(files({"x": ["a"], "y": ["a"]}), files({"x": ["a"]}), "files")
    assert found.counts == Counter(added=1, deleted=0)
    assert found.compared.duplicate == 1


def test_a_row_of_a_table_under_another_id_is_no_move(comparing: Compare) -> None:
    found = comparing([Row("2", "x", "a")], [Row("1", "x", "a")], "table")
    assert found.counts == Counter(added=1, deleted=1)


def test_metadata_alone_moves_a_row_and_lines_alone_do_not(comparing: Compare) -> None:
    index = [Row("1", "x", "a", "de", 1), Row("2", "x", "b", "de", 1)]
    corpus = [Row("1", "x", "a", "en", 1), Row("2", "x", "b", "de", None)]
    assert comparing(corpus, index, "table").counts == Counter(moved=1, relined=1, deleted=0)


def test_other_columns_move_every_row_that_was_there(comparing: Compare) -> None:
    index = [Row("1", "x", "a"), Row("2", "x", "b")]
    corpus = [Row("1", "x", "a"), Row("2", "x", "c"), Row("3", "x", "d")]
    found = comparing(corpus, index, "table", same_columns=False)
    assert found.counts == Counter(moved=1, changed=1, added=1, deleted=0)
    assert found.compared.unchanged == 0


@given(
    corpora_of_files,
    corpora_of_files,
    st.lists(st.sampled_from(["x", "d/", "d/z", "dd/"]), max_size=2),
    st.sampled_from([None, "d", "d/", "d/x", "x"]),
)
@settings(max_examples=100, deadline=None)
def test_rows_of_held_documents_are_never_deleted(
    comparing: Compare,
    corpus: list[Row],
    index: list[Row],
    unread: list[str],
    narrow: str | None,
) -> None:
    held = Held(tuple(unread), narrow)
    looked_at = [row for row in corpus if not held.covers(row.document)]
    stay = [row for row in index if held.covers(row.document)]
    found = comparing(looked_at, index, "files", held)
    assert found.applied == sorted([*looked_at, *stay], key=lambda row: row.id)
    unreadable = [row for row in index if Held(tuple(unread)).covers(row.document)]
    here = {row.id for row in looked_at}
    assert found.compared.held == sum(row.id not in here for row in unreadable)


def test_a_row_that_cannot_be_read_stays_as_it_was(comparing: Compare) -> None:
    index = [Row("1", "d", "a"), Row("2", "d", "b")]
    found = comparing(index[:1], index, "table", Held(unread_ids=("2",)))
    assert found.applied == index
    assert found.compared.held == 1


@pytest.mark.parametrize(
    ("held", "document", "covered"),
    [
        (Held(("a.md",)), "a.md", True),
        (Held(("a.md",)), "a.md.bak", False),
        (Held(("d/",)), "d/a.md", True),
        (Held(("d/",)), "d/e/a.md", True),
        (Held(("d/",)), "dd/a.md", False),
        (Held(("d/",)), "d", False),
        (Held(("d",)), "d/a.md", False),
        (Held(narrow="d"), "d/a.md", False),
        (Held(narrow="d"), "d", False),
        (Held(narrow="d"), "dd/a.md", True),
        (Held(narrow="d/"), "d/a.md", False),
        (Held(narrow="./d//"), "d/a.md", False),
        (Held(narrow="./d"), "dd/a.md", True),
        (Held(narrow="."), "a.md", False),
        (Held(narrow="./"), "d/a.md", False),
        (Held(narrow="d/a.md"), "d/b.md", True),
        (Held(("d/a.md",), narrow="d"), "d/a.md", True),
        (Held(), "a.md", False),
        (Held(("d/",), narrow="d"), None, False),
    ],
)
def test_a_hold_covers_a_folder_by_its_slash_and_all_outside_the_narrow_path(
    held: Held, document: str | None, covered: bool
) -> None:
    assert held.covers(document) is covered


def test_a_row_without_document_is_not_held_with_those_that_could_not_be_read(
    comparing: Compare,
) -> None:
    index = [Row("1", None, "a"), Row("2", "x", "b")]
    found = comparing([], index, "table", Held(("x",)))
    assert found.applied == index[1:]
    assert comparing([], index[:1], "table", Held(("x",))).applied == []
