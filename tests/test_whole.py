"""Whatever a corpus went through, its index equals one built anew, and no text was paid twice."""

import shutil
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pyarrow import parquet

from tasks.errors import CorpusError, SettingsError
from tasks.form import Overrides
from tasks.index import generations, open_index
from tasks.journal import RunFolder
from tasks.keys import text_hash
from tasks.params import Config
from tasks.plan import make_plan
from tasks.providers.lexical import Lexical

Reindex = Callable[..., Any]
Documents = dict[str, list[str]]
"""Paragraphs by path."""
Rows = list[dict[str, Any]]

PARAGRAPHS = [
    " ".join(f"{word}{number}" for word in ("river", "stone", "candle", "harbour", "meadow"))
    for number in ("one", "two", "three", "four", "five", "six", "seven", "eight")
]
SCHEMA = pa.schema(
    [
        pa.field("id", pa.utf8()),
        pa.field("text", pa.utf8()),
        pa.field("doc", pa.utf8()),
        pa.field("start_line", pa.int32()),
        pa.field("lang", pa.utf8()),
        pa.field("n", pa.float64()),
    ]
)


@dataclass
class World:
    """A corpus that changes, an index that follows it, and all texts there ever were."""

    folder: Path
    run: Reindex
    kind: str
    prepend: tuple[str, ...] = ()
    settings: dict[str, Any] = field(default_factory=dict)
    seen: set[str] = field(default_factory=set)
    sent: list[str] = field(default_factory=list)

    def config(self, index: str = "index", state: str = "state", **embedding: Any) -> Config:
        source: dict[str, Any] = {"kind": "files", "path": str(self.folder / "corpus")}
        if self.kind == "files":
            source["split"] = {"max_tokens": 16, "overlap_tokens": 0}
        else:
            source |= {"kind": "table", "path": str(self.folder / "t.parquet"), "document": "doc"}
        return Config.model_validate(
            {
                "name": "world",
                "source": source,
                "embedding": {
                    "provider": "lexical", "dimension": 256, "prepend": self.prepend, **embedding
                },
                "limits": {"texts_per_request": 3},
                "index": {
                    "uri": str(self.folder / index),
                    "table": "t",
                    "max_deleted_fraction": 1.0,
                },
                "state": {"uri": str(self.folder / state)},
            }
        )  # fmt: skip

    def write(self, corpus: Any) -> None:
        """Make the corpus this one, whatever it was."""
        if self.kind == "table":
            table = pa.Table.from_pylist(corpus, schema=SCHEMA)
            parquet.write_table(table, self.folder / "t.parquet", row_group_size=2)
            return
        root = self.folder / "corpus"
        shutil.rmtree(root, ignore_errors=True)
        root.mkdir()
        for name, paragraphs in corpus.items():
            (root / name).parent.mkdir(parents=True, exist_ok=True)
            (root / name).write_text("\n\n".join(paragraphs) + "\n", encoding="utf-8")

    def follow(self, **how: Any) -> Any:
        """A run that must leave the index like one built anew."""
        ran = self.run(self.config(), **how)
        self.sent += ran.sent
        built = self.built_anew()
        for row in built.values():
            sent = self.sent_for(row)
            assert row["text_hash"] == text_hash(sent)
            self.seen.add(sent)
        assert rows_of(self.config()) == built
        assert ran.published.rows == len(built)
        return ran

    def sent_for(self, row: dict[str, Any]) -> str:
        """What is embedded for a row: what stands in front, a blank line, its text."""
        lines = [f"{name}: {row[name]}" for name in self.prepend if row[name]]
        return "\n".join([*lines, "", row["text"]]) if lines else str(row["text"])

    def built_anew(self) -> dict[str, dict[str, Any]]:
        """Rows of an index made from nothing; the state of this one is not touched."""
        config = self.config("new-index", "new-state")
        try:
            self.run(config)
        except SettingsError as error:
            assert "there is nothing to index" in str(error)  # noqa: PT017
            return {}
        rows = rows_of(config)
        for name in ("new-index", "new-state"):
            shutil.rmtree(self.folder / name)
        return rows


def rows_of(config: Config) -> dict[str, dict[str, Any]]:
    """All rows of an index by id, vectors included, without the run that wrote them."""
    table = open_index(config.index)
    rows = [] if table is None else table.to_arrow().drop_columns("run_id").to_pylist()
    found = {row["id"]: row for row in rows}
    assert len(found) == len(rows)
    return found


def versions(config: Config) -> int:
    table = open_index(config.index)
    return 0 if table is None else len(table.list_versions())


@pytest.fixture(scope="session")
def world(fresh: Callable[[], Path], reindex: Reindex) -> Callable[..., World]:
    def make(kind: str = "files", prepend: tuple[str, ...] = ()) -> World:
        return World(fresh(), reindex, kind, prepend)

    return make


def test_the_texts_of_these_tests_have_vectors_of_their_own(lexical: Lexical) -> None:
    found = {tuple(vector) for vector in lexical.embed(PARAGRAPHS).vectors.tolist()}
    assert len(found) == len(PARAGRAPHS)


documents = st.dictionaries(
    st.sampled_from(["a.md", "b.txt", "d/c.md", "d/e.md"]),
    st.lists(st.sampled_from([*PARAGRAPHS, "# Alpha", "## Beta"]), min_size=1, max_size=4),
    min_size=1,
)
rows = st.lists(
    st.fixed_dictionaries(
        {
            "id": st.sampled_from(["1", "2", "3", "it's", "ü\n"]),
            "text": st.sampled_from(PARAGRAPHS),
            "doc": st.sampled_from(["x", "y", None]),
            "start_line": st.sampled_from([1, None]),
            "lang": st.sampled_from(["de", "en", None]),
            "n": st.sampled_from([0.5, None]),
        }
    ),
    unique_by=lambda row: str(row["id"]),
    min_size=1,
    max_size=5,
)
histories = st.one_of(
    st.tuples(
        st.just("files"),
        st.sampled_from([(), ("document",), ("title",), ("title", "document")]),
        st.lists(documents, min_size=2, max_size=3),
    ),
    st.tuples(
        st.just("table"),
        st.sampled_from([(), ("lang",), ("document", "lang")]),
        st.lists(rows, min_size=2, max_size=3),
    ),
)


@pytest.mark.slow
@given(histories)
@settings(max_examples=15, deadline=None)
def test_an_index_that_followed_equals_one_built_anew(
    world: Callable[..., World], history: tuple[str, tuple[str, ...], list[Any]]
) -> None:
    kind, prepend, states = history
    here = world(kind, prepend)
    for state in states:
        here.write(state)
        before = versions(here.config())
        ran = here.follow()
        assert versions(here.config()) - before == (ran.published.way != "none")
        again = here.run(here.config())
        assert (again.sent, again.published.way) == ([], "none")
    assert sorted(here.sent) == sorted(here.seen)
    table = open_index(here.config().index)
    assert table is not None
    numbers = [one.number for one in generations(table)]
    assert numbers == list(range(1, versions(here.config()) + 1))


@pytest.mark.slow
@given(histories, st.lists(st.integers(0, 2), min_size=4, max_size=4))
@settings(max_examples=10, deadline=None)
def test_runs_that_die_at_any_batch_pay_for_nothing_twice(
    world: Callable[..., World],
    died: type[Exception],
    history: tuple[str, tuple[str, ...], list[Any]],
    deaths: list[int],
) -> None:
    kind, prepend, states = history
    here, billed = world(kind, prepend), list[Any]()
    for state, die_after in zip(states, deaths, strict=False):
        here.write(state)
        before = rows_of(here.config())
        try:
            here.sent += here.run(here.config(), die_after=die_after).sent
        except died:
            assert rows_of(here.config()) == before
        ran = here.follow()
        billed += ran.calls
    assert len(here.sent) + sum(call.texts for call in billed) == len(here.seen)


def test_a_plan_says_what_a_run_does_and_leaves_no_trace(world: Callable[..., World]) -> None:
    here = world()
    here.write({"a.md": PARAGRAPHS[:3], "b.md": PARAGRAPHS[2:4]})
    before = sorted(here.folder.rglob("*"))
    planned = make_plan(here.config(), Overrides())
    assert sorted(here.folder.rglob("*")) == before
    ran = here.follow()
    assert planned.texts.embedded == len(ran.sent)
    assert (planned.calls, planned.tokens) == (ran.survey.packed.batches, ran.survey.packed.tokens)
    assert planned.chunks.total == ran.published.rows


def test_two_indexes_that_share_a_state_pay_once(world: Callable[..., World]) -> None:
    here = world()
    here.write({"a.md": PARAGRAPHS[:4]})
    first = here.run(here.config("one"))
    second = here.run(here.config("two"))
    assert len(first.sent) == 4
    assert second.sent == []
    assert rows_of(here.config("one")) == rows_of(here.config("two"))


def test_answers_of_a_run_that_still_lives_are_used_and_left_to_it(
    world: Callable[..., World], died: type[Exception]
) -> None:
    here = world()
    here.write({"a.md": PARAGRAPHS[:6]})
    with pytest.raises(died):
        here.run(here.config("one"), die_after=1)
    (folder,) = (here.folder / "state" / "runs").glob("*/")
    living = RunFolder(str(here.folder / "state"), folder.name)
    with living.alive():
        assert here.run(here.config("two")).sent == PARAGRAPHS[3:6]
        assert len(living.answers) == 1
    assert here.run(here.config("one")).sent == []
    assert rows_of(here.config("one")) == rows_of(here.config("two"))


def test_a_state_that_was_lost_is_filled_from_the_index(world: Callable[..., World]) -> None:
    here = world()
    here.write({"a.md": PARAGRAPHS[:4]})
    here.follow()
    shutil.rmtree(here.folder / "state")
    here.write({"b.md": PARAGRAPHS[:5]})
    assert here.follow().sent == PARAGRAPHS[4:5]


def test_going_to_another_model_and_back_pays_once_for_each(world: Callable[..., World]) -> None:
    here = world()
    here.write({"a.md": PARAGRAPHS[:4]})
    runs = [
        here.run(here.config(f"index-{dimension}", dimension=dimension))
        for dimension in (256, 128, 256, 128)
    ]
    assert [len(ran.sent) for ran in runs] == [4, 4, 0, 0]
    with pytest.raises(SettingsError, match="Vectors of two spaces"):
        here.run(here.config("index-256", dimension=128))


@pytest.mark.parametrize("narrow", ["d", "d/", "./d", "d//"])
def test_a_narrow_run_looks_only_at_its_part(world: Callable[..., World], narrow: str) -> None:
    here = world()
    here.write({"a.md": PARAGRAPHS[:2], "d/b.md": PARAGRAPHS[2:4], "d/c.md": PARAGRAPHS[4:5]})
    here.follow()
    here.write({"e.md": PARAGRAPHS[5:6], "d/b.md": [PARAGRAPHS[2], PARAGRAPHS[6]]})
    ran = here.run(here.config(), Overrides(narrow=narrow))
    here.sent += ran.sent
    assert ran.sent == [PARAGRAPHS[6]]
    found = {(row["document"], row["text"]) for row in rows_of(here.config()).values()}
    assert found == {
        ("a.md", PARAGRAPHS[0]),
        ("a.md", PARAGRAPHS[1]),
        ("d/b.md", PARAGRAPHS[2]),
        ("d/b.md", PARAGRAPHS[6]),
    }
    here.follow()
    assert sorted(here.sent) == sorted(here.seen)


def test_a_file_that_changes_between_the_passes_is_up_to_date_after_the_next_run(
    world: Callable[..., World],
) -> None:
    here = world()
    first = {"a.md": PARAGRAPHS[:2], "b.md": PARAGRAPHS[2:3], "c.md": PARAGRAPHS[3:4]}
    here.write(first)
    here.follow()
    here.write({**first, "a.md": PARAGRAPHS[4:5], "c.md": PARAGRAPHS[5:6]})
    later = {"a.md": PARAGRAPHS[6:7], "b.md": PARAGRAPHS[2:3], "c.md": PARAGRAPHS[5:6]}
    ran = here.run(here.config(), before_second_pass=lambda: here.write(later))
    here.sent += ran.sent
    texts = {row["document"]: row["text"] for row in rows_of(here.config()).values()}
    assert texts == {"a.md": PARAGRAPHS[1], "b.md": PARAGRAPHS[2], "c.md": PARAGRAPHS[5]}
    here.follow()
    assert len(here.sent) == len(set(here.sent))


def test_a_first_run_of_files_that_all_change_meanwhile_publishes_nothing(
    world: Callable[..., World],
) -> None:
    here = world()
    here.write({"a.md": PARAGRAPHS[:1]})
    ran = here.run(here.config(), before_second_pass=lambda: here.write({"a.md": PARAGRAPHS[1:2]}))
    assert ran.published.way == "none"
    assert here.follow().sent == PARAGRAPHS[1:2]


def test_a_deletion_holds_although_all_that_was_to_be_written_changed_meanwhile(
    world: Callable[..., World],
) -> None:
    here = world()
    here.write({"a.md": PARAGRAPHS[:1], "b.md": PARAGRAPHS[1:2]})
    here.follow()
    here.write({"a.md": PARAGRAPHS[2:3]})
    ran = here.run(here.config(), before_second_pass=lambda: here.write({"a.md": PARAGRAPHS[3:4]}))
    assert ran.published.way == "merge"
    assert [row["text"] for row in rows_of(here.config()).values()] == PARAGRAPHS[:1]


@pytest.mark.parametrize("kind", ["files", "table"])
def test_a_corpus_that_became_empty_empties_its_index(
    world: Callable[..., World], kind: str
) -> None:
    here = world(kind)
    row = {"id": "1", "text": PARAGRAPHS[0]}
    here.write({"a.md": PARAGRAPHS[:1]} if kind == "files" else [row])
    here.follow()
    here.write({} if kind == "files" else [])
    here.follow()
    here.write({"a.md": PARAGRAPHS[:1]} if kind == "files" else [row])
    assert here.follow().sent == []


def test_a_corpus_that_shrank_too_far_touches_nothing(world: Callable[..., World]) -> None:
    here = world()
    here.write({"a.md": PARAGRAPHS[:4]})
    here.follow()
    before = rows_of(here.config())
    here.write({"a.md": PARAGRAPHS[:1]})
    config = here.config()
    careful = config.model_copy(
        update={"index": config.index.model_copy(update={"max_deleted_fraction": 0.7})}
    )
    with pytest.raises(SettingsError, match="would delete 3 of 4 chunks"):
        here.run(careful)
    assert rows_of(here.config()) == before
    assert versions(config) == 1


def test_an_id_that_stands_twice_is_named_before_anything_is_sent(
    world: Callable[..., World],
) -> None:
    here = world("table")
    here.write([{"id": "1", "text": PARAGRAPHS[0]}])
    here.follow()
    before = rows_of(here.config())
    twice = [{"id": id_, "text": text} for id_, text in zip("7878", PARAGRAPHS[:4], strict=True)]
    here.write([*twice, {"id": "9", "text": PARAGRAPHS[4]}])
    with pytest.raises(CorpusError, match="2 ids stand more than once in the corpus: '7', '8'"):
        here.run(here.config())
    assert rows_of(here.config()) == before


def test_new_columns_of_a_table_reach_every_row_and_cost_nothing(
    world: Callable[..., World],
) -> None:
    here = world("table")
    every = [{"id": str(number), "text": text} for number, text in enumerate(PARAGRAPHS)]
    parquet.write_table(pa.Table.from_pylist(every), here.folder / "t.parquet")
    source = here.config().source.model_copy(update={"document": None})
    plain = here.config().model_copy(update={"source": source})
    assert len(here.run(plain).sent) == len(PARAGRAPHS)
    more = [{**row, "lang": f"l{row['id']}"} for row in every]
    parquet.write_table(pa.Table.from_pylist(more), here.folder / "t.parquet")
    ran = here.run(plain)
    assert (ran.sent, ran.published.way) == ([], "overwrite")
    assert {row["id"]: row["lang"] for row in rows_of(plain).values()} == {
        row["id"]: row["lang"] for row in more
    }
    assert here.run(plain).published.way == "none"
