"""What stands in front of a text is part of it: sent, hashed, paid for, and of another space."""

import pickle
import shutil
import sys
from collections.abc import Callable
from dataclasses import dataclass
from datetime import date
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from lancedb.table import Table
from pydantic import ValidationError

from flows.cli import main
from tasks.errors import SettingsError
from tasks.findings import Verified
from tasks.form import Overrides
from tasks.index import open_index
from tasks.keys import text_hash
from tasks.params import Config, Embedding
from tasks.plan import make_plan, plan_rows
from tasks.prepare import PLAIN, Preparation, taken_apart
from tasks.providers.opening import open_provider
from tasks.read.split import Splitter
from tasks.read.titles import LONGEST, outline
from tasks.repair import repair
from tasks.search import search
from tasks.verify import verify

Reindex = Callable[..., Any]
GUIDE = "# Guide\n\nAlpha river stone.\n\n## Install\n\nBeta candle harbour.\n"
RECORDS: list[dict[str, Any]] = [
    {"id": "1", "text": "alpha river", "title": "One", "files": ["a.py", "b.py"], "year": 2020},
    {"id": "2", "text": "beta stone", "title": " \n", "files": [], "year": None},
    {"id": "3", "text": "gamma candle", "title": "Two\nlines", "files": None, "year": 2021},
]
FIELDS = pa.schema(
    [
        *[pa.field(name, pa.utf8()) for name in ("id", "text", "title")],
        pa.field("files", pa.list_(pa.utf8())),
        pa.field("year", pa.int64()),
    ]
)


def sent_for(row: dict[str, Any], *names: str) -> str:
    found: list[str] = Preparation(names).texts(pa.Table.from_pylist([row])).to_pylist()
    return found[0]


# The text.


def test_a_text_has_a_line_for_each_field_that_says_something_and_a_blank_line() -> None:
    row = {"text": "Copy\nthe files.", "document": "a/b.md", "title": None, "tags": ["x", "", "y"]}
    assert sent_for(row, "document", "title", "tags") == (
        "document: a/b.md\ntags: x, y\n\nCopy\nthe files."
    )
    assert sent_for(row, "tags", "document") == "tags: x, y\ndocument: a/b.md\n\nCopy\nthe files."


@pytest.mark.parametrize("nothing", [None, "", " \n\t", [], [None, " "]])
def test_a_text_stands_alone_where_no_field_says_anything(nothing: Any) -> None:
    assert sent_for({"text": "alpha", "title": nothing}, "title") == "alpha"


def test_by_default_a_text_is_sent_as_it_is() -> None:
    column = pa.array(["alpha", " \nbeta "])
    rows = pa.record_batch({"text": column})
    assert PLAIN.texts(rows).equals(column)
    assert PLAIN.texts(pa.Table.from_batches([rows, rows])).to_pylist() == column.to_pylist() * 2
    assert PLAIN.recipe("words-1") == "words-1"


@pytest.mark.parametrize(
    ("value", "said"),
    [
        (7, "7"),
        (True, "true"),
        (date(2026, 1, 2), "2026-01-02"),
        ([3, 4], "3, 4"),
        ("two\r\n\nlines\u2028more", "two lines more"),
        ("a\n\ntitle: b", "a title: b"),
    ],
)
def test_a_value_is_said_on_one_line(value: Any, said: str) -> None:
    assert sent_for({"text": "x", "of": value}, "of") == f"of: {said}\n\nx"


values = st.one_of(
    st.none(),
    st.sampled_from(["", " ", "x", "y: x", "\n\n", "x\n\ny: x", "b: x\n\nx", "a", "\u2028x"]),
    st.text(max_size=5),
)
chunks = st.tuples(values, values, st.sampled_from(["x", "\n\nx", "y: x", "a: x\n\nx", "b: x"]))


@given(chunks, chunks)
@settings(max_examples=500, deadline=None)
def test_what_is_sent_tells_fields_and_text_apart(
    one: tuple[str | None, str | None, str], other: tuple[str | None, str | None, str]
) -> None:
    def sent(chunk: tuple[str | None, str | None, str]) -> str:
        row = pa.table({name: pa.array([chunk[i]], pa.utf8()) for i, name in enumerate("ab")})
        row = row.append_column("text", pa.array([chunk[2]]))
        return str(Preparation(("a", "b")).texts(row).to_pylist()[0])

    def meant(chunk: tuple[str | None, str | None, str]) -> tuple[list[list[str]], str]:
        return [(value or "").split() for value in chunk[:2]], chunk[2]

    (fields, _), (other_fields, _) = meant(one), meant(other)
    if any(fields) == any(other_fields):
        assert (text_hash(sent(one)) == text_hash(sent(other))) == (meant(one) == meant(other))
    elif any(fields):  # a text alone may read like another one with its fields, and is the same
        assert sent(other) == other[2]


# The recipe and the config.


@pytest.mark.parametrize("own", ["1", "words-1", "a+b(c)"])
@pytest.mark.parametrize("names", [(), ("document",), ("title (en)", "a+prepend-1(b", ")")])
def test_a_recipe_can_be_taken_apart(own: str, names: tuple[str, ...]) -> None:
    assert taken_apart(Preparation(names).recipe(own)) == (own, names)


def config_of(tmp_path: Path, source: dict[str, Any], *prepend: str, **index: Any) -> Config:
    return Config.model_validate(
        {
            "name": "prepared",
            "source": {"path": str(tmp_path / "corpus"), **source},
            "embedding": {"provider": "lexical", "dimension": 256, "prepend": list(prepend)},
            "index": {
                "uri": str(tmp_path / "index"), "table": "t", "max_deleted_fraction": 1.0, **index
            },
            "state": {"uri": str(tmp_path / "state")},
        }
    )  # fmt: skip


def test_what_stands_in_front_is_part_of_the_space_and_nothing_is_as_ever(tmp_path: Path) -> None:
    def preparation(provider: dict[str, Any], *prepend: str) -> str:
        config = config_of(tmp_path, {"kind": "files"}, *prepend)
        embedding = Embedding.model_validate({**provider, "prepend": list(prepend)})
        opened = open_provider(config.model_copy(update={"embedding": embedding}))
        assert pickle.loads(pickle.dumps(opened)) == opened  # noqa: S301 - our own
        return opened.space.preparation

    lexical = {"provider": "lexical", "dimension": 256}
    voyage = {"provider": "voyage", "model": "voyage-4"}
    assert (preparation(lexical), preparation(voyage)) == ("words-1", "1")
    assert preparation(lexical, "title") == "words-1+prepend-1(title)"
    assert preparation(voyage, "document", "title") == "1+prepend-1(document,title)"
    assert preparation(voyage, "title", "document") == "1+prepend-1(title,document)"
    openai = {"provider": "openai", "model": "any", "dimension": 8}
    assert preparation(openai) == "unit-1"
    assert preparation(openai, "title") == "unit-1+prepend-1(title)"


@pytest.mark.parametrize("names", [["a,b"], ["a:b"], ["a\nb"], [" "], ["a", "a"]])
def test_a_name_that_could_be_taken_for_another_is_refused(names: list[str]) -> None:
    with pytest.raises(ValidationError, match="prepend"):
        Embedding.model_validate({"provider": "lexical", "prepend": names})


# Titles.


def titles_of(text: str) -> list[str | None]:
    found, lines = outline("markdown", text), text.count("\n") + 1
    return [found.title(line) for line in range(1, lines + 1)]


def test_a_title_is_the_headings_above_a_line_its_own_included() -> None:
    text = "intro\n# Guide\na\n## Install\nb\n### On\tLinux ##\n## Use\n# Other\n"
    assert titles_of(text) == [
        *(None, "Guide", "Guide", "Guide > Install", "Guide > Install"),
        *("Guide > Install > On Linux", "Guide > Use", "Other", "Other"),
    ]


@pytest.mark.parametrize(
    ("text", "last"),
    [
        ("# A\n```\n# no\n```\nx", "A"),
        ("# A\n````\n```\n# no\n```\n# no\n````\n## B\nx", "A > B"),
        ("# A\n~~~ sh\n# no\n```\n# no\n~~~\n## B\nx", "A > B"),
        ("# A\n``` `a` ```\n## B\nx", "A > B"),
        ("# A\n    # code\n#no\n####### no\nx", "A"),
        ("# A\n## B\n#\nx", None),
        ("# A\n##\n### C\nx", "A > C"),
        ("# A #b\r\nx", "A #b"),
        ("### C\n# A\nx", "A"),
        (f"# {'a' * 300}\nx", "a" * LONGEST),
        ("", None),
    ],
)
def test_only_headings_count(text: str, last: str | None) -> None:
    assert titles_of(text)[-1] == last


def test_only_markdown_has_titles() -> None:
    assert outline("python", "# A\nx").title(2) is None


# End to end.


def index_of(config: Config) -> Table:
    table = open_index(config.index)
    assert table is not None
    return table


def rows_of(config: Config) -> list[dict[str, Any]]:
    rows: list[dict[str, Any]] = index_of(config).to_arrow().drop_columns("vector").to_pylist()
    return sorted(rows, key=lambda row: str(row["text"]))


def kinds(seen: Verified) -> dict[str, int]:
    return {each.kind: each.count for each in seen.findings}


@dataclass
class Folder:
    """A corpus of files."""

    path: Path

    def write(self, **texts: str) -> None:
        shutil.rmtree(self.path / "corpus", ignore_errors=True)
        (self.path / "corpus").mkdir()
        for name, text in texts.items():
            (self.path / "corpus" / f"{name}.md").write_text(text, encoding="utf-8")

    def config(self, *prepend: str, **index: Any) -> Config:
        split = {"max_tokens": 16, "overlap_tokens": 0}
        return config_of(self.path, {"kind": "files", "split": split}, *prepend, **index)


@pytest.fixture
def folder(tmp_path: Path) -> Folder:
    return Folder(tmp_path)


ALPHA = "document: a.md\ntitle: Guide\n\n# Guide\n\nAlpha river stone."
BETA = "document: a.md\ntitle: Guide > Install\n\n## Install\n\nBeta candle harbour."


def test_files_are_sent_with_their_path_and_headings(folder: Folder, reindex: Reindex) -> None:
    folder.write(a=GUIDE)
    config = folder.config("document", "title")
    planned = make_plan(config, Overrides())
    first = reindex(config)
    assert first.sent == [ALPHA, BETA]
    assert planned.tokens == sum(-(-len(text) // 4) for text in first.sent)
    assert reindex(config).sent == []
    rows = rows_of(config)
    assert [row["text"] for row in rows] == [
        "# Guide\n\nAlpha river stone.",
        "## Install\n\nBeta candle harbour.",
    ]
    assert [row["title"] for row in rows] == ["Guide", "Guide > Install"]
    assert [row["text_hash"] for row in rows] == [text_hash(ALPHA), text_hash(BETA)]
    assert ("in front of texts", "document, title (a rename makes a new text)") in plan_rows(
        planned
    )
    found = search(config, "candle harbour")
    assert found[0].text == "## Install\n\nBeta candle harbour."


def test_without_a_title_in_front_files_have_no_such_column(
    folder: Folder, reindex: Reindex
) -> None:
    folder.write(a=GUIDE)
    reindex(folder.config("document"))
    assert "title" not in index_of(folder.config()).schema.names
    plain = folder.config(table="plain")
    reindex(plain)
    assert make_plan(plain, Overrides()).prepend == ()
    titled = plan_rows(make_plan(folder.config("title", table="titled"), Overrides()))
    assert ("in front of texts", "title (another value makes a new text)") in titled
    assert not [row for row in plan_rows(make_plan(plain, Overrides())) if "front" in row[0]]


def test_how_titles_are_found_is_part_of_the_splitter_where_they_are_asked_for(
    folder: Folder, reindex: Reindex
) -> None:
    folder.write(a=GUIDE)
    split = folder.config().source.split  # type: ignore[union-attr]
    for prepend, ending in ((), ""), (("document",), ""), (("title",), "/titles-1"):
        ran = reindex(folder.config(*prepend, table=f"t{len(ending)}{len(prepend)}"))
        assert ran.survey.identity.splitter == Splitter(split).version + ending


def test_a_rename_costs_only_where_the_path_stands_in_front(
    folder: Folder, reindex: Reindex
) -> None:
    named, titled, plain = (
        folder.config("document", table="named"),
        folder.config("title", table="titled"),
        folder.config(table="plain"),
    )
    folder.write(a=GUIDE)
    assert [len(reindex(config).sent) for config in (named, titled, plain)] == [2, 2, 2]
    folder.write(b=GUIDE)
    planned = [make_plan(config, Overrides()).chunks for config in (named, titled, plain)]
    assert [(one.added, one.deleted, one.moved, one.changed) for one in planned] == [
        *((2, 2, 0, 0), (0, 0, 2, 0), (0, 0, 2, 0)),
    ]
    runs = [reindex(config) for config in (named, titled, plain)]
    assert [len(ran.sent) for ran in runs] == [2, 0, 0]
    for config in (named, titled, plain):
        assert {row["document"] for row in rows_of(config)} == {"b.md"}
        assert verify(config).clean
    folder.write(a=GUIDE)
    assert reindex(named).sent == []  # the cache knows the first name


def test_a_refused_rename_of_most_documents_is_said_to_be_one(
    folder: Folder, reindex: Reindex
) -> None:
    config = folder.config("document", max_deleted_fraction=0.5)
    folder.write(a=GUIDE)
    reindex(config)
    folder.write(b=GUIDE)
    with pytest.raises(SettingsError, match="A renamed document counts as deleted here"):
        reindex(config)


def test_another_heading_changes_the_chunks_below_it(folder: Folder, reindex: Reindex) -> None:
    config = folder.config("title")
    folder.write(a=GUIDE)
    reindex(config)
    folder.write(a=GUIDE.replace("# Guide", "# Manual"))
    chunks = make_plan(config, Overrides()).chunks
    assert (chunks.changed, chunks.unchanged) == (2, 0)
    assert [text.splitlines()[0] for text in reindex(config).sent] == [
        "title: Manual",
        "title: Manual > Install",
    ]
    assert verify(config).clean


def test_the_same_chunk_under_the_same_heading_twice_is_paid_for_once(
    folder: Folder, reindex: Reindex
) -> None:
    config = folder.config("title")
    folder.write(a=GUIDE, b=GUIDE)
    ran = reindex(config)
    assert (len(ran.sent), ran.published.rows) == (2, 4)


def write_records(path: Path, records: list[dict[str, Any]], **columns: Any) -> dict[str, Any]:
    """Make `records` the corpus, and say what of it is what."""
    with pa.ipc.new_file(path / "t.arrow", FIELDS) as writer:
        writer.write_table(pa.Table.from_pylist(records, FIELDS))
    return {"kind": "table", "path": str(path / "t.arrow"), **columns}


SENT = [
    "title: One\nfiles: a.py, b.py\nyear: 2020\n\nalpha river",
    "beta stone",
    "title: Two lines\nyear: 2021\n\ngamma candle",
]


def test_rows_of_a_table_are_sent_with_their_columns(tmp_path: Path, reindex: Reindex) -> None:
    source = write_records(tmp_path, RECORDS)
    config = config_of(tmp_path, source, "title", "files", "year")
    assert reindex(config).sent == SENT
    assert reindex(config).sent == []
    assert [row["text"] for row in rows_of(config)] == ["alpha river", "beta stone", "gamma candle"]
    assert verify(config).clean
    assert [hit.text for hit in search(config, "candle", k=1)] == ["gamma candle"]


def test_another_value_in_front_is_a_changed_text_and_another_spacing_is_none(
    tmp_path: Path, reindex: Reindex
) -> None:
    config = config_of(tmp_path, write_records(tmp_path, RECORDS), "title")
    reindex(config)
    write_records(
        tmp_path,
        [
            {**RECORDS[0], "title": "Eins"},
            {**RECORDS[1], "year": 1999},
            {**RECORDS[2], "title": "Two  lines"},
        ],
    )
    chunks = make_plan(config, Overrides()).chunks
    assert (chunks.changed, chunks.moved, chunks.added, chunks.deleted) == (1, 2, 0, 0)
    assert reindex(config).sent == ["title: Eins\n\nalpha river"]
    assert verify(config).clean
    assert make_plan(config, Overrides()).chunks.unchanged == 3


def test_indexes_with_other_texts_share_a_state_and_pay_for_their_own(
    tmp_path: Path, reindex: Reindex
) -> None:
    source = write_records(tmp_path, RECORDS)
    plain = config_of(tmp_path, source, table="plain")
    titled = config_of(tmp_path, source, "title", table="titled")
    again = config_of(tmp_path, source, "title", table="again")
    assert [len(reindex(config).sent) for config in (plain, titled, again)] == [3, 3, 0]
    assert [len(reindex(config).sent) for config in (plain, titled, again)] == [0, 0, 0]


def test_another_choice_is_refused_in_words_with_the_way_out(
    tmp_path: Path,
    reindex: Reindex,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    source = write_records(tmp_path, RECORDS)
    config = config_of(tmp_path, source, "title")
    reindex(config)
    before = rows_of(config)
    for names, stands in ((), "nothing"), (("year", "title"), "year and title"):
        other = config_of(tmp_path, source, *names)
        said = f"in front of its texts stands title, embedding.prepend asks for {stands}"
        for refused in (reindex, lambda it: make_plan(it, Overrides()), lambda it: search(it, "x")):
            with pytest.raises(SettingsError, match=f"{said}.*name another table in index.table"):
                refused(other)
        (found,) = verify(other).findings
        assert (found.kind, found.count) == ("space", 3)
        assert said in found.examples[0]
    assert rows_of(config) == before
    file = tmp_path / "config.yaml"
    file.write_text(other.model_dump_json(), encoding="utf-8")
    monkeypatch.setattr(sys, "argv", ["embed-once", "plan", str(file)])
    with pytest.raises(SystemExit) as ended:
        main()
    assert ended.value.code == 2
    assert said in " ".join(capsys.readouterr().err.split())


@pytest.mark.parametrize(
    ("source", "names", "said"),
    [
        ({}, ["titel"], "no 'titel' .* Did you mean 'title'\\? Known here: title, files, year"),
        ({}, ["document"], "no 'document' .* Known here: title, files, year"),
        ({"document": "id"}, ["text"], "Known here: document, title, files, year"),
        ({"metadata": ["year"]}, ["title"], "no 'title' .* Known here: year"),
    ],
)
def test_a_column_that_is_not_kept_cannot_stand_in_front(
    tmp_path: Path, source: dict[str, Any], names: list[str], said: str
) -> None:
    config = config_of(tmp_path, write_records(tmp_path, RECORDS, **source), *names)
    with pytest.raises(SettingsError, match=said):
        make_plan(config, Overrides())


def test_a_column_with_several_spellings_cannot_stand_in_front(tmp_path: Path) -> None:
    with pa.ipc.new_file(tmp_path / "t.arrow", schema := pa.schema(
        [("id", pa.utf8()), ("text", pa.utf8()), ("score", pa.float64())]
    )) as writer:  # fmt: skip
        writer.write_table(pa.table([["1"], ["alpha"], [0.1]], schema=schema))
    source = {"kind": "table", "path": str(tmp_path / "t.arrow")}
    with pytest.raises(SettingsError, match=r"'score' holds double.*convert it to text"):
        make_plan(config_of(tmp_path, source, "score"), Overrides())


def test_files_have_only_a_path_and_a_title(folder: Folder) -> None:
    folder.write(a=GUIDE)
    with pytest.raises(SettingsError, match=r"source of files has no 'lang'.*document, title"):
        make_plan(folder.config("lang"), Overrides())


@pytest.mark.parametrize(
    "change", [{"text": "something else"}, {"title": "Another"}, {"document": "c.md"}], ids=str
)
def test_a_row_changed_by_hand_is_found_and_mended_for_free(
    folder: Folder, reindex: Reindex, change: dict[str, str]
) -> None:
    folder.write(a=GUIDE, b="# Other\n\nGamma meadow.\n")
    config = folder.config("document", "title")
    reindex(config)
    whole = [{**row, "run_id": ""} for row in rows_of(config)]
    index_of(config).update(where="text LIKE '%Beta%'", values=change)
    assert kinds(verify(config)) == {"hash": 1}
    done = repair(config)
    assert done.clean
    assert [{**row, "run_id": ""} for row in rows_of(config)] == whole
    assert reindex(config).sent == []


def test_a_column_in_front_that_was_dropped_by_hand_is_found_and_comes_back(
    folder: Folder, reindex: Reindex
) -> None:
    folder.write(a=GUIDE)
    config = folder.config("title")
    reindex(config)
    index_of(config).drop_columns(["title"])
    (found,) = verify(config).findings
    assert (found.kind, found.examples) == ("columns", ("title",))
    assert reindex(config).sent == []
    assert [row["title"] for row in rows_of(config)] == ["Guide", "Guide > Install"]
    assert verify(config).clean


def test_a_row_that_is_missing_is_named_and_comes_back_for_free(
    folder: Folder, reindex: Reindex
) -> None:
    folder.write(a=GUIDE)
    config = folder.config("document", "title")
    reindex(config)
    index_of(config).delete("text LIKE '%Beta%'")
    (found,) = verify(config).findings
    assert (found.kind, found.examples) == ("missing", ("a.md:5-7",))
    assert repair(config).clean
    assert reindex(config).sent == []
