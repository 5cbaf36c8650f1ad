"""The rows of the index as a run sees them: read, or known from the last run."""

import errno
import json
from collections.abc import Callable
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tasks.errors import IndexHeld
from tasks.form import Overrides
from tasks.index import TAG, open_index
from tasks.keys import NO_DOCUMENT, digest, document_key, text_hash
from tasks.params import Config
from tasks.plan import make_plan
from tasks.scan import scan, scan_unless_known
from tasks.schemas import INDEXED, TableRef
from tasks.survey import survey
from tasks.verify import verify

Rows = dict[str, tuple[str | None, str, int]]
"""By id: document, text, and a number of metadata."""
FIRST: Rows = {"a": ("d", "alpha", 1), "b": ("d", "beta", 2), "c": (None, "gamma", 3)}


@dataclass
class Home:
    """A table of texts, and an index of it."""

    folder: Path
    reindex: Callable[..., Any]

    @property
    def config(self) -> Config:
        return Config.model_validate(
            {
                "name": "home",
                "source": {
                    "kind": "table", "path": str(self.folder / "c.jsonl"),
                    "document": "document", "metadata": ["number"],
                },
                "embedding": {"provider": "lexical", "dimension": 64},
                "index": {
                    "uri": str(self.folder / "index"), "table": "t", "max_deleted_fraction": 1.0
                },
                "state": {"uri": str(self.folder / "state")},
            }
        )  # fmt: skip

    def run(self, rows: Rows) -> str:
        """Reindex once, with `rows` as the corpus; how it was published."""
        names = ("document", "text", "number")
        lines = [
            json.dumps({"id": id_, **dict(zip(names, row, strict=True))})
            for id_, row in rows.items()
        ]
        (self.folder / "c.jsonl").write_text("\n".join(lines))
        way: str = self.reindex(self.config).published.way
        return way

    def readers_see(self) -> Rows:
        table = open_index(self.config.index)
        assert table is not None
        found = table.search().select(["id", "document", "text", "number"]).to_list()
        return {row["id"]: (row["document"], row["text"], row["number"]) for row in found}

    def read(self) -> list[dict[str, Any]]:
        """What a scan of the index finds."""
        target = self.folder / "read.arrow"
        return _sorted(scan(open_index(self.config.index), target).load(INDEXED))

    def kept(self) -> Path | None:
        files = [path for path in (self.folder / "state" / "scans").rglob("*") if path.is_file()]
        assert len(files) <= 1
        return files[0] if files else None

    def known(self) -> list[dict[str, Any]]:
        """What is kept of it."""
        kept = self.kept()
        assert kept is not None
        return _sorted(TableRef.of(kept).load(INDEXED))

    def forge(self) -> None:
        """Have what is kept say that the text of the first row is another one."""
        kept = self.kept()
        assert kept is not None
        rows = self.known()
        rows[0]["text_hash"] = text_hash("another")
        TableRef.write(kept, INDEXED, [pa.Table.from_pylist(rows, INDEXED)])


def _sorted(table: pa.Table) -> list[dict[str, Any]]:
    rows: list[dict[str, Any]] = table.to_pylist()
    return sorted(rows, key=lambda row: row["id"])


@pytest.fixture
def home(tmp_path: Path, reindex: Callable[..., Any]) -> Home:
    return Home(tmp_path, reindex)


def test_a_scan_keys_the_index_like_the_corpus(home: Home) -> None:
    home.run(FIRST)
    found = home.read()
    assert [row["id"] for row in found] == list(FIRST)
    for row in found:
        document, text, _ = FIRST[row["id"]]
        assert row["key"] == digest(row["id"].encode())
        assert row["text_hash"] == text_hash(text)
        assert row["document_key"] == (document_key(document) if document else NO_DOCUMENT)
    assert len({row["row_hash"] for row in found}) == 3


def test_a_scan_leaves_no_row_out(home: Home) -> None:
    home.run({str(number): (None, f"word{number}", number) for number in range(9000)})
    assert len(home.read()) == len({row["id"] for row in home.read()}) == 9000


def test_where_nothing_was_published_there_are_no_rows(tmp_path: Path) -> None:
    assert scan(None, tmp_path / "scan.arrow").load(INDEXED).num_rows == 0


def test_what_is_known_saves_reading_the_index(home: Home) -> None:
    home.run(FIRST)
    home.forge()
    assert home.run(FIRST) == "merge"  # it took the forger's word
    assert home.run(FIRST) == "none"


CORPORA = st.dictionaries(
    st.sampled_from("abcdef"),
    st.tuples(st.sampled_from(["d", "e", None]), st.sampled_from(["x", "y"]), st.integers(0, 1)),
    min_size=1,
)


@pytest.mark.slow
@settings(max_examples=12, deadline=None)
@given(corpora=st.lists(CORPORA, min_size=2, max_size=4))
def test_what_is_kept_is_what_a_scan_finds(
    tmp_path_factory: pytest.TempPathFactory, reindex: Callable[..., Any], corpora: list[Rows]
) -> None:
    home = Home(tmp_path_factory.mktemp("home"), reindex)
    for corpus in corpora:
        home.run(corpus)
        assert home.readers_see() == corpus
        if home.kept() is not None:  # after the table was written anew nothing is
            assert home.known() == home.read()
    home.run(corpora[-1])
    assert home.known() == home.read()


def test_what_somebody_else_changed_is_seen(home: Home) -> None:
    home.run(FIRST)
    table = open_index(home.config.index)
    assert table is not None
    table.update(where="id = 'a'", values={"text": "forged", "text_hash": text_hash("forged")})
    assert home.run(FIRST) == "merge"
    assert home.readers_see() == FIRST


def test_what_somebody_else_changes_meanwhile_is_seen_by_the_next_run(home: Home) -> None:
    home.run(FIRST)

    def change() -> None:
        table = open_index(home.config.index)
        assert table is not None
        table.update(where="id = 'a'", values={"text": "forged", "text_hash": text_hash("forged")})

    more = {**FIRST, "d": (None, "delta", 4)}
    (home.folder / "c.jsonl").write_text(
        "\n".join(
            json.dumps({"id": id_, "document": document, "text": text, "number": number})
            for id_, (document, text, number) in more.items()
        )
    )
    home.reindex(home.config, before_second_pass=change)
    assert home.kept() is None
    home.run(more)
    assert home.readers_see() == more


def test_another_table_with_the_same_version_is_read(home: Home) -> None:
    home.run(FIRST)
    (home.folder / "index").rename(home.folder / "away")
    other: Rows = {**FIRST, "a": ("d", "omega", 1)}
    home.run(other)
    kept = home.kept()
    assert kept is not None
    assert "1-1-" in kept.name
    (home.folder / "index").rename(home.folder / "newer")
    (home.folder / "away").rename(home.folder / "index")
    assert home.readers_see() == FIRST
    home.run(other)
    assert home.readers_see() == other


def test_a_second_look_leaves_what_is_kept_as_it_is(
    home: Home, caplog: pytest.LogCaptureFixture
) -> None:
    home.run(FIRST)
    known = home.known()
    survey(home.config, Overrides(), home.folder / "staging")
    home.run({**FIRST, "d": (None, "delta", 4)})
    survey(home.config, Overrides(), home.folder / "staging")
    assert len(home.known()) == len(known) + 1
    assert home.known() == home.read()
    assert not caplog.records


def test_a_row_that_was_held_while_a_column_got_another_name_is_mended_later(
    home: Home, reindex: Callable[..., Any]
) -> None:
    values = home.config.model_dump()
    del values["source"]["metadata"]
    config = Config.model_validate(values)

    def run(name: str, text: str) -> None:
        rows = [
            {"id": "a", "document": "d", "text": "alpha", name: "x"},
            {"id": "b", "document": "d", "text": text, name: "y"},
        ]
        (home.folder / "c.jsonl").write_text("\n".join(map(json.dumps, rows)))
        reindex(config)

    run("author", "beta")
    run("writer", "half of a character: \ud800")
    run("writer", "beta")
    table = open_index(config.index)
    assert table is not None
    assert {row["id"]: row["writer"] for row in table.search().to_list()} == {"a": "x", "b": "y"}


def test_where_files_have_one_name_only_they_are_copied(
    home: Home, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def refused(*_: Any, **__: Any) -> None:
        raise OSError(errno.EXDEV, "another disk")

    monkeypatch.setattr("os.link", refused)
    home.run(FIRST)
    assert home.known() == home.read()
    home.forge()
    assert home.run(FIRST) == "merge"
    assert not caplog.records


def test_a_version_that_was_tidied_away_meanwhile_is_told_in_words(home: Home) -> None:
    home.run(FIRST)
    opened = open_index(home.config.index)
    home.run({**FIRST, "d": (None, "delta", 4)})
    newest = open_index(home.config.index)
    assert opened is not None
    assert newest is not None
    for number in (1, 2):
        newest.tags.delete(f"{TAG}{number}")
    newest.optimize(cleanup_older_than=timedelta(milliseconds=1), delete_unverified=True)
    assert opened.version not in [each["version"] for each in newest.list_versions()]
    with pytest.raises(IndexHeld, match="Another run changed the index 't'"):
        scan_unless_known(home.config, opened, home.folder / "scan.arrow")


@pytest.mark.parametrize("damage", [b"", b"nonsense", None])
def test_what_cannot_be_read_of_it_costs_a_scan(
    home: Home, damage: bytes | None, caplog: pytest.LogCaptureFixture
) -> None:
    home.run(FIRST)
    kept = home.kept()
    assert kept is not None
    kept.write_bytes(kept.read_bytes()[:-200] if damage is None else damage)
    assert home.run(FIRST) == "none"
    assert "The index is read, since" in caplog.text
    more = {**FIRST, "d": (None, "delta", 4)}
    assert home.run(more) == "add"
    assert home.readers_see() == more


def test_what_cannot_be_kept_harms_no_run(home: Home, caplog: pytest.LogCaptureFixture) -> None:
    (home.folder / "state").mkdir()
    (home.folder / "state" / "scans").write_text("in the way")
    assert home.run(FIRST) == "create"
    assert "The next run reads the index" in caplog.text
    assert home.run(FIRST) == "none"


def test_a_plan_uses_it_and_keeps_none_and_verify_reads_the_index(home: Home) -> None:
    home.run(FIRST)
    home.forge()
    kept = home.kept()
    assert kept is not None
    forged = kept.read_bytes()
    assert make_plan(home.config, Overrides()).chunks.changed == 1
    assert verify(home.config).findings == ()
    assert kept.read_bytes() == forged
