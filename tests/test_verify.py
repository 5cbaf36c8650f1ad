"""Verify finds what was done to index, cache and journal by hand, and nothing else."""

import json
import re
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import lancedb
import numpy as np
import pyarrow as pa
import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st
from lancedb.index import IvfFlat, IvfPq
from lancedb.table import Table
from pyarrow import parquet

from flows.cli import main
from tasks.cache import Cache
from tasks.errors import EmbedOnceError, IndexHeld, SettingsError
from tasks.examine import Entries, Rows
from tasks.findings import RECALL_BOUND, ToPay, Verified
from tasks.form import Overrides
from tasks.index import Generation, generations, held, open_index, tag_generation
from tasks.keys import text_hash
from tasks.lance import read_located
from tasks.ledger import Ledger
from tasks.notes import Refused
from tasks.params import Config
from tasks.plan import make_plan
from tasks.providers import UNIT_TOLERANCE, Space
from tasks.providers.opening import open_provider
from tasks.quarantine import Quarantine
from tasks.repair import repair
from tasks.simulator import Settings, Simulator
from tasks.soundness import Fault, faults_of
from tasks.tidy import drop_old_versions
from tasks.verify import verify

Reindex = Callable[..., Any]

PARAGRAPHS = [
    " ".join(f"{word}{number}" for word in ("river", "stone", "candle", "harbour", "meadow"))
    for number in ("one", "two", "three", "four", "five", "six", "seven", "eight")
]
DIMENSION = 256


@dataclass
class Place:
    """A corpus, the index of it, and hands that write to both past all of our code."""

    folder: Path
    run: Reindex
    kind: str = "table"
    embedding: str = "lexical"
    base_url: str | None = None
    prepend: tuple[str, ...] = ()

    def config(self, index: str = "index", state: str = "state", **more: Any) -> Config:
        source: dict[str, Any] = {"kind": "files", "path": str(self.folder / "corpus")}
        if self.kind == "files":
            source["split"] = {"max_tokens": 16, "overlap_tokens": 0}
        else:
            source |= {"kind": "table", "path": str(self.folder / "t.parquet"), "document": "doc"}
        embedding: dict[str, Any] = {"provider": "lexical", "dimension": DIMENSION}
        if self.embedding != "lexical":
            embedding = {"provider": "voyage", "model": "voyage-4", "dimension": DIMENSION}
            embedding |= {"output_dtype": self.embedding, "base_url": self.base_url}
        embedding["prepend"] = self.prepend
        return Config.model_validate(
            {
                "name": "place",
                "source": source,
                "embedding": embedding,
                "limits": {"texts_per_request": 2},
                "index": {
                    "uri": str(self.folder / index), "table": "t", "max_deleted_fraction": 1.0,
                    **more.get("in_index", {}),
                },
                "state": {"uri": str(self.folder / state)},
            }
        )  # fmt: skip

    def write(self, texts: list[str], documents: int = 2) -> None:
        """Make these texts the corpus, one a row, or one a paragraph of a few files."""
        if self.kind == "table":
            rows = [
                {"id": f"it's {n}", "text": text, "doc": f"d{n % documents}", "lang": f"l{n % 3}"}
                for n, text in enumerate(texts)
            ]
            parquet.write_table(pa.Table.from_pylist(rows), self.folder / "t.parquet")
            return
        root = self.folder / "corpus"
        shutil.rmtree(root, ignore_errors=True)
        root.mkdir()
        for number in range(documents):
            body = "\n\n".join(texts[number::documents])
            (root / f"{number}.md").write_text(body + "\n", encoding="utf-8")

    def reindex(self, **how: Any) -> Any:
        return self.run(self.config(), **how)

    def table(self) -> Table:
        return lancedb.connect(self.config().index.uri).open_table("t")

    def cache(self) -> Table:
        config = self.config()
        name = f"vectors-{open_provider(config).space.id}"
        return lancedb.connect(config.state.uri).open_table(name)

    def rows(self) -> dict[str, dict[str, Any]]:
        """All rows of the index by id, vectors included, without the run that wrote them."""
        table = open_index(self.config().index)
        assert table is not None
        rows = table.to_arrow().drop_columns("run_id").to_pylist()
        found = {row["id"]: row for row in rows}
        assert len(found) == len(rows)
        return found

    def ids(self) -> list[str]:
        """Ids of the index in an order that does not depend on where rows lie."""
        return sorted(self.table().to_arrow().column("id").to_pylist())

    def row(self, id_: str) -> pa.Table:
        return self.table().search().where(is_(id_)).to_arrow()

    def built_anew(self) -> dict[str, dict[str, Any]]:
        """Rows of an index made from nothing."""
        config = self.config("new-index", "new-state")
        self.run(config)
        table = open_index(config.index)
        assert table is not None
        rows = table.to_arrow().drop_columns("run_id").to_pylist()
        for name in ("new-index", "new-state"):
            shutil.rmtree(self.folder / name)
        return {row["id"]: row for row in rows}

    def hash_of(self, id_: str) -> bytes:
        found: bytes = self.row(id_).column("text_hash")[0].as_py()
        return found


def is_(id_: str) -> str:
    return "id = '" + id_.replace("'", "''") + "'"


def has(text_digest: bytes) -> str:
    return f"text_hash = X'{text_digest.hex()}'"


def overwrite_vector(table: Table, where: str, vector: Sequence[float]) -> None:
    """Write a vector that LanceDB's own checks would not let pass."""
    kind = table.schema.field("vector").type
    word = "Float32" if pa.types.is_floating(kind.value_type) else "UInt8"
    numbers = ", ".join(f"arrow_cast('{number}', '{word}')" for number in vector)
    cast = f"arrow_cast([{numbers}], 'FixedSizeList({kind.list_size}, {word})')"
    table.update(where=where, values_sql={"vector": cast})


def repeat_row(table: Table, where: str, id_: str | None = None) -> None:
    """Write a row once more, under this id or its own; LanceDB would not take NaN as it is."""
    row = table.search().where(where).limit(1).to_arrow().to_pylist()[0]
    vector, row["vector"] = row["vector"], [0] * len(row["vector"])
    if id_ is not None:
        row["id"], where = id_, is_(id_)
    table.add(pa.Table.from_pylist([row], table.schema))
    overwrite_vector(table, where, vector)


def found_in(seen: Verified) -> dict[str, int]:
    return {each.kind: each.count for each in seen.findings}


@pytest.fixture(scope="module")
def place(fresh: Callable[[], Path], reindex: Reindex) -> Callable[..., Place]:
    """An indexed corpus of one's own; copied, as building it takes longer."""
    built: dict[tuple[Any, ...], Path] = {}

    def make(kind: str = "table", texts: list[str] = PARAGRAPHS, **more: Any) -> Place:
        key = (kind, *texts, *more.items())
        if key not in built:
            first = Place(fresh(), reindex, kind, **more)
            first.write(texts)
            first.reindex()
            built[key] = first.folder
        folder = fresh()
        shutil.copytree(built[key], folder, dirs_exist_ok=True)
        return Place(folder, reindex, kind, **more)

    return make


@pytest.fixture(scope="module")
def voyage(place: Callable[..., Place]) -> Iterator[Callable[..., Place]]:
    """The same by a provider that has a price."""
    with Simulator(Settings()) as simulator, pytest.MonkeyPatch.context() as patch:
        patch.setenv("VOYAGE_API_KEY", "any")

        def make(dtype: str = "float", **more: Any) -> Place:
            return place(embedding=dtype, base_url=simulator.base_url, **more)

        yield make


# What hands can do to an index and its state. Each takes ids of rows it may harm.

BAD = {
    "not_finite": [float("nan"), *[0.1] * (DIMENSION - 1)],
    "zero": [0.0] * DIMENSION,
    "constant": [1 / DIMENSION**0.5] * DIMENSION,
    "norm": [2.0, *[0.0] * (DIMENSION - 1)],
    "wrong_vector": [*[0.0] * (DIMENSION - 1), 1.0],
}


def lose(at: Place, ids: list[str]) -> None:
    for id_ in ids:
        at.table().delete(is_(id_))


def age(at: Place, ids: list[str]) -> None:
    for id_ in ids:
        at.table().update(where=is_(id_), values={"document": "elsewhere"})


def stray(at: Place, ids: list[str]) -> None:
    for id_ in ids:
        repeat_row(at.table(), is_(id_), f"stray {id_}")


def repeat(at: Place, ids: list[str]) -> None:
    for id_ in ids:
        repeat_row(at.table(), is_(id_))


def rewrite(at: Place, ids: list[str]) -> None:
    for id_ in ids:
        at.table().update(where=is_(id_), values={"text": "something else"})


def spoil(kind: str) -> Callable[[Place, list[str]], None]:
    def harm(at: Place, ids: list[str]) -> None:
        for id_ in ids:
            overwrite_vector(at.table(), is_(id_), BAD[kind])

    return harm


def spoil_entry(kind: str) -> Callable[[Place, list[str]], None]:
    def harm(at: Place, ids: list[str]) -> None:
        for id_ in ids:
            overwrite_vector(at.cache(), has(at.hash_of(id_)), BAD[kind])

    return harm


def repeat_entry(at: Place, ids: list[str]) -> None:
    for id_ in ids:
        repeat_row(at.cache(), has(at.hash_of(id_)))


HARMS: dict[str, Callable[[Place, list[str]], None]] = {
    "missing": lose,
    "stale": age,
    "orphan": stray,
    "duplicate": repeat,
    "hash": rewrite,
    **{kind: spoil(kind) for kind in BAD},
    **{f"cache_{kind}": spoil_entry(kind) for kind in BAD},
    "cache_duplicate": repeat_entry,
}


@pytest.mark.slow
@pytest.mark.parametrize(
    ("kind", "prepend"),
    [("table", ()), ("files", ()), ("table", ("lang",)), ("files", ("title",))],
)
def test_all_harms_at_once_are_found_and_mended_for_free(
    place: Callable[..., Place], kind: str, prepend: tuple[str, ...]
) -> None:
    texts = [f"# alpha{n}\n\nbeta{n} gamma{n} delta{n}" for n in range(24)]
    at = place(kind, texts, prepend=prepend)
    whole, versions = at.rows(), len(at.table().list_versions())
    ids = at.ids()
    for number, harm in enumerate(HARMS.values()):
        harm(at, [ids[number]])
    each_once = dict.fromkeys(HARMS, 1)
    assert found_in(verify(at.config())) == each_once
    harmed = at.table().version
    done = repair(at.config())
    assert done.repair is not None
    assert {each.kind: each.count for each in done.repair.found} == each_once
    assert (done.clean, done.to_pay.texts, done.repair.generation) == (True, 0, 2)
    assert at.rows() == whole == at.built_anew()
    assert at.table().version == harmed + 1 > versions
    assert at.reindex().sent == []
    assert verify(at.config()).clean
    row = Ledger(at.config().state.uri).runs().to_dict("records")[-1]
    assert (row["published"], row["generation"], row["tokens.billed"]) == ("repair", 2, 0)


@pytest.mark.slow
@pytest.mark.parametrize("kind", HARMS)
def test_each_harm_alone_is_found_and_mended_for_free(
    place: Callable[..., Place], kind: str
) -> None:
    at = place()
    whole = at.rows()
    HARMS[kind](at, at.ids()[1:3])
    assert found_in(verify(at.config())) == {kind: 2}
    done = repair(at.config())
    assert done.clean
    assert done.repair is not None
    assert {each.kind: each.count for each in done.repair.found} == {kind: 2}
    assert at.rows() == whole
    again = repair(at.config())
    assert again.repair is None
    assert at.reindex().sent == []


harms = st.lists(
    st.tuples(st.sampled_from(sorted(HARMS)), st.integers(0, len(PARAGRAPHS) + 1)),
    min_size=1,
    max_size=6,
)


@pytest.mark.slow
@given(st.sampled_from(["table", "files"]), harms)
@settings(max_examples=60, deadline=None)
def test_whatever_is_done_only_what_is_nowhere_is_paid_for(
    place: Callable[..., Place], kind: str, harms: list[tuple[str, int]]
) -> None:
    texts = [*PARAGRAPHS, *PARAGRAPHS[:2]]  # two texts stand twice
    at = place(kind, texts)
    whole, ids = at.rows(), at.ids()
    nowhere = nowhere_after(at, [(harm, ids[number]) for harm, number in harms])
    done = repair(at.config())
    if not done.clean:  # an entry was wrong, and had no row to be seen by
        done = repair(at.config())
    assert set(found_in(done)) <= {"missing", "stale"}
    assert done.to_pay.texts <= len(nowhere)
    rows = at.rows()
    assert {id_: row for id_, row in rows.items() if id_ in whole and row == whole[id_]} == rows
    sent = at.reindex().sent
    assert len(sent) == done.to_pay.texts
    assert set(sent) <= nowhere
    assert at.rows() == whole
    assert verify(at.config()).clean


def nowhere_after(at: Place, harms: list[tuple[str, str]]) -> set[str]:
    """Do all this; the texts that then have no vector left that could be relied on."""
    texts = {id_: row["text"] for id_, row in at.rows().items()}
    rows, entries = set[str](), set[str]()
    for harm, id_ in harms:
        if id_ not in at.table().to_arrow().column("id").to_pylist():
            continue  # it was lost by an earlier harm
        if at.row(id_).column("text")[0].as_py() != texts[id_] and harm.startswith("cache"):
            continue
        HARMS[harm](at, [id_])
        if harm.startswith("cache") and harm != "cache_duplicate":
            entries.add(texts[id_])
        elif harm not in {"stale", "orphan", "duplicate", "cache_duplicate"}:
            rows.add(id_)
    unharmed = {text for id_, text in texts.items() if id_ not in rows}
    return entries - unharmed


def test_nothing_is_found_whatever_a_corpus_of_files_goes_through(
    place: Callable[..., Place], died: type[Exception]
) -> None:
    at = place("files", [*PARAGRAPHS[:6], PARAGRAPHS[0]])
    assert verify(at.config()).clean
    corpus = at.folder / "corpus"
    text = (corpus / "0.md").read_text(encoding="utf-8")
    (corpus / "0.md").write_text(f"{PARAGRAPHS[6]}\n\n{text}", encoding="utf-8")  # all relined
    (corpus / "1.md").rename(corpus / "2.md")
    (corpus / "3.md").write_text(f"{PARAGRAPHS[7]}\n\nalpha beta gamma\n", encoding="utf-8")
    assert set(found_in(verify(at.config()))) == {"missing", "stale", "orphan"}
    with pytest.raises(died):
        at.reindex(die_after=1)
    seen = verify(at.config())
    assert set(found_in(seen)) == {"missing", "stale", "orphan"}
    assert seen.answers_waiting == 2
    at.reindex()
    assert verify(at.config()).clean
    (corpus / "3.md").unlink()
    at.reindex()
    assert verify(at.config()).clean


@pytest.mark.slow
@pytest.mark.parametrize("heavy", [True, False])
def test_nothing_is_found_however_a_table_was_published(
    place: Callable[..., Place], monkeypatch: pytest.MonkeyPatch, heavy: bool
) -> None:
    if heavy:
        monkeypatch.setattr("tasks.publish.MERGE_ROWS", 0)
    at = place()
    for texts in (
        [*PARAGRAPHS, "one more"],  # an addition
        [*PARAGRAPHS[:3], "another", "", PARAGRAPHS[0]],  # changes, deletions, a blank, a duplicate
        [],
        PARAGRAPHS,
    ):
        at.write([*texts, "the last"])
        at.reindex()
        seen = verify(at.config())
        assert found_in(seen) == {}
        assert repair(at.config()).repair is None


@pytest.mark.parametrize("dtype", ["float", "ubinary"])
def test_a_provider_with_a_price_is_not_asked(voyage: Callable[..., Place], dtype: str) -> None:
    at = voyage(dtype)
    seen = verify(at.config())
    assert (found_in(seen), seen.embedded_again, seen.usd) == ({}, 0, 0.0)
    ids = at.ids()
    zeros = [0] * (DIMENSION // 8 if dtype == "ubinary" else DIMENSION)
    ones = [255] * (DIMENSION // 8) if dtype == "ubinary" else BAD["constant"]
    overwrite_vector(at.table(), is_(ids[0]), zeros)
    overwrite_vector(at.cache(), has(at.hash_of(ids[1])), ones)
    overwrite_vector(at.table(), is_(ids[2]), [*zeros[:-1], 1])
    assert found_in(verify(at.config())) == {"zero": 1, "cache_constant": 1, "wrong_vector": 1}
    calls = len(Ledger(at.config().state.uri).calls())
    done = repair(at.config())
    assert done.clean
    assert found_in(verify(at.config())) == {}
    assert len(Ledger(at.config().state.uri).calls()) == calls


def test_a_sample_is_asked_for_with_what_stands_in_front(voyage: Callable[..., Place]) -> None:
    at = voyage(prepend=("document", "lang"))
    seen = verify(at.config(), sample=len(PARAGRAPHS))
    assert (seen.clean, seen.embedded_again) == (True, len(PARAGRAPHS))


def test_a_sample_that_is_paid_for_tells_who_is_right(voyage: Callable[..., Place]) -> None:
    at = voyage()
    whole, wrong = at.rows(), at.ids()[0]
    overwrite_vector(at.cache(), has(at.hash_of(wrong)), BAD["wrong_vector"])
    assert found_in(verify(at.config())) == {"wrong_vector": 1}  # the cache is believed
    seen = verify(at.config(), sample=3)
    assert (found_in(seen), seen.embedded_again) == ({"cache_wrong_vector": 1}, 3)
    calls = Ledger(at.config().state.uri).calls()
    mine = calls[calls["cause"] == "verify"]
    assert (len(mine), mine["texts"].sum(), mine["status"].unique().tolist()) == (2, 3, ["ok"])
    assert seen.usd == mine["usd"].sum() > 0
    done = repair(at.config(), sample=1)
    assert (done.clean, done.embedded_again) == (True, 1)
    assert done.usd > 0
    assert at.rows() == whole
    assert at.reindex().sent == []


def test_what_a_sample_has_paid_for_mends_what_is_wrong_everywhere(
    voyage: Callable[..., Place],
) -> None:
    at = voyage()
    whole, wrong = at.rows(), at.ids()[0]
    overwrite_vector(at.cache(), has(at.hash_of(wrong)), BAD["wrong_vector"])
    overwrite_vector(at.table(), is_(wrong), BAD["wrong_vector"])
    assert found_in(verify(at.config())) == {}  # they agree
    done = repair(at.config(), sample=len(whole))
    assert done.repair is not None
    assert {each.kind for each in done.repair.found} == {"wrong_vector", "cache_wrong_vector"}
    assert done.clean
    assert at.rows() == whole


@pytest.mark.parametrize("spoilt", ["index", "cache"])
def test_a_vector_that_the_cache_of_another_space_has_is_of_that_space(
    voyage: Callable[..., Place], spoilt: str
) -> None:
    at = voyage()
    whole, wrong = at.rows(), at.ids()[0]
    space = open_provider(at.config()).space
    theirs = pa.FixedSizeListArray.from_arrays(
        pa.array(BAD["wrong_vector"], pa.float32()), DIMENSION
    )
    other = Cache(at.config().state.uri, replace(space, model="voyage-3.5"))
    names = ["text_hash", "vector"]
    hashes = pa.array([at.hash_of(wrong)], pa.binary(16))
    other.remember([pa.Table.from_arrays([hashes, theirs], names=names)])
    if spoilt == "index":
        overwrite_vector(at.table(), is_(wrong), BAD["wrong_vector"])
    else:
        overwrite_vector(at.cache(), has(at.hash_of(wrong)), BAD["wrong_vector"])
    kind = {"index": "other_space", "cache": "cache_other_space"}[spoilt]
    assert found_in(verify(at.config())) == {kind: 1}
    assert repair(at.config()).clean
    assert at.rows() == whole


def test_a_text_without_a_vector_anywhere_is_all_that_is_paid_for(
    place: Callable[..., Place],
) -> None:
    at = place()
    whole, lost = at.rows(), at.ids()[3]
    digest = at.hash_of(lost)
    overwrite_vector(at.table(), is_(lost), BAD["not_finite"])
    at.cache().delete(has(digest))
    seen = verify(at.config())
    assert found_in(seen) == {"not_finite": 1}
    assert seen.to_pay.texts == 1
    done = repair(at.config())
    assert found_in(done) == {"missing": 1}
    assert done.findings[0].examples == (whole[lost]["document"],)
    assert done.to_pay == seen.to_pay == ToPay(texts=1, tokens=seen.to_pay.tokens, usd=0.0)
    assert seen.to_pay.tokens == make_plan(at.config(), Overrides()).tokens > 0
    assert lost not in at.rows()
    assert at.reindex().sent == [whole[lost]["text"]]
    assert at.rows() == whole


def test_a_lost_cache_is_no_harm_and_the_index_mends_what_of_it_is_needed(
    place: Callable[..., Place],
) -> None:
    at = place()
    whole = at.rows()
    at.cache().delete("true")
    assert verify(at.config()).clean
    repeat(at, at.ids()[:2])
    assert repair(at.config()).clean
    assert at.rows() == whole
    assert at.cache().count_rows() == 2


def test_of_two_entries_the_good_one_stays(place: Callable[..., Place]) -> None:
    at = place()
    whole, lost = at.rows(), at.ids()[0]
    good = at.cache().search().where(has(at.hash_of(lost))).to_arrow()
    spoil_entry("zero")(at, [lost])
    at.cache().add(good)
    lose(at, [lost])
    seen = verify(at.config())
    assert found_in(seen) == {"missing": 1, "cache_zero": 1, "cache_duplicate": 1}
    assert seen.to_pay.texts == 0
    assert repair(at.config()).clean
    assert at.rows() == whole


def test_a_quarantined_text_is_neither_missing_nor_may_it_come_back(
    place: Callable[..., Place],
) -> None:
    at = place()
    refused, paid = "a text that is refused", PARAGRAPHS[0]
    space = open_provider(at.config()).space
    quarantine = Quarantine(at.config().state.uri, space.id)
    quarantine.add([Refused(text_hash(refused), "bad")], "run", "2026-01-01")
    at.write([*PARAGRAPHS, refused])
    assert verify(at.config()).clean
    whole = at.rows()
    row = at.row("it's 1").to_pylist()[0]
    came = row | {"id": "it's 8", "text": refused, "text_hash": text_hash(refused)}
    vector = open_provider(at.config()).embed([refused]).vectors[0].tolist()
    at.table().add(pa.Table.from_pylist([came | {"vector": vector}], schema=at.table().schema))
    Quarantine(at.config().state.uri, space.id).add(
        [Refused(text_hash(paid), "bad")], "run", "2026-01-01"
    )
    assert found_in(verify(at.config())) == {"quarantined": 2, "stale": 1}
    done = repair(at.config())
    assert done.clean
    assert done.repair is not None
    assert (done.repair.deleted, done.repair.released) == (1, 1)
    assert at.rows() == whole  # what the cache has, the provider has taken
    assert Quarantine(at.config().state.uri, space.id).hashes.to_pylist() == [text_hash(refused)]


def test_what_could_not_be_read_is_no_orphan(place: Callable[..., Place]) -> None:
    at = place("files")
    whole = at.rows()
    (at.folder / "corpus" / "1.md").unlink()
    (at.folder / "corpus" / "1.md").symlink_to("1.md")
    assert verify(at.config()).unread == 4
    held = sorted(id_ for id_, row in whole.items() if row["document"] == "1.md")
    overwrite_vector(at.table(), is_(held[0]), BAD["zero"])
    repeat(at, [held[1]])
    rewrite(at, [held[2]])
    assert found_in(verify(at.config())) == {"zero": 1, "duplicate": 1, "hash": 1}
    done = repair(at.config())
    assert found_in(done) == {"hash": 1}  # of hash and text nobody knows which is wrong
    rewritten = whole | {held[2]: whole[held[2]] | {"text": "something else"}}
    assert at.rows() == rewritten


def test_rows_cut_by_another_splitter_are_not_held_against_the_corpus(
    place: Callable[..., Place],
) -> None:
    at = place("files")
    whole = at.rows()
    schema = at.table().schema
    older = schema.with_metadata({**schema.metadata, b"embed_once.splitter": b"older"})
    rows = at.table().to_arrow().replace_schema_metadata(older.metadata)
    lancedb.connect(at.config().index.uri).create_table("t", data=rows, mode="overwrite")
    overwrite_vector(at.table(), is_(at.ids()[0]), BAD["zero"])
    shutil.copy(at.folder / "corpus" / "0.md", at.folder / "corpus" / "new.md")  # all cached
    assert found_in(verify(at.config())) == {"splitter": len(whole), "zero": 1}
    done = repair(at.config())
    assert found_in(done) == {"splitter": len(whole)}
    assert at.rows() == whole
    assert at.table().schema.metadata[b"embed_once.splitter"] == b"older"


def test_vectors_of_another_type_are_taken_from_the_cache(place: Callable[..., Place]) -> None:
    at = place()
    whole = at.rows()
    rows = at.table().to_arrow()
    short = pa.array(
        [row[:128] for row in rows.column("vector").to_pylist()], pa.list_(pa.float32(), 128)
    )
    at_vector = rows.schema.get_field_index("vector")
    narrow = rows.set_column(at_vector, pa.field("vector", short.type, nullable=False), short)
    lancedb.connect(at.config().index.uri).create_table("t", data=narrow, mode="overwrite")
    assert found_in(verify(at.config())) == {"type": len(whole)}
    assert repair(at.config()).clean
    assert at.rows() == whole


@pytest.mark.parametrize("what", ["type", "space"])
def test_a_cache_of_another_kind_is_filled_from_the_index(
    place: Callable[..., Place], what: str
) -> None:
    at = place()
    rows, name = at.cache().to_arrow(), at.cache().name
    if what == "type":
        short = pa.array([[1.0] * 128] * rows.num_rows, pa.list_(pa.float32(), 128))
        rows = rows.set_column(1, pa.field("vector", short.type, nullable=False), short)
    else:
        rows = rows.replace_schema_metadata({b"embed_once.space": b"{}"})
    lancedb.connect(at.config().state.uri).create_table(name, data=rows, mode="overwrite")
    assert found_in(verify(at.config())) == {"cache_type": rows.num_rows}
    assert repair(at.config()).clean
    assert at.cache().count_rows() == rows.num_rows
    assert at.reindex().sent == []


def test_an_index_of_another_space_or_without_our_columns_is_left_alone(
    place: Callable[..., Place],
) -> None:
    at = place()
    other = at.config().model_copy(
        update={"embedding": at.config().embedding.model_copy(update={"dimension": 128})}
    )
    assert found_in(verify(other)) == {"space": len(PARAGRAPHS)}
    assert repair(other).repair is not None
    at.table().drop_columns(["document"])
    before = at.table().version
    assert found_in(verify(at.config())) == {"columns": 1}
    assert found_in(repair(at.config())) == {"columns": 1}
    assert at.table().version == before


def test_journal_files_tags_and_a_commit_without_a_name_are_found_and_mended(
    place: Callable[..., Place], died: type[Exception]
) -> None:
    at = place()
    config = at.config()
    at.write([*PARAGRAPHS, "one more", "two more", "three more"])
    with pytest.raises(died):
        at.run(config, die_after=1)
    (answers,) = Path(config.state.uri).glob("runs/*/answers")
    whole = next(answers.glob("*.arrow"))
    (answers / "00000009-01-00001.arrow").write_bytes(whole.read_bytes()[:-100])
    at.table().tags.create("gen-2", 1)
    tag = Path(config.index.uri) / "t.lance" / "_refs" / "tags" / "gen-2.json"
    tag.write_text(json.dumps(json.loads(tag.read_text()) | {"version": 777}))
    (Path(config.index.uri) / "t.committing").write_text(str(at.table().version))
    repeat(at, at.ids()[:1])
    seen = verify(config)
    assert found_in(seen) == {"journal": 1, "tag": 1, "commit": 1, "missing": 3, "duplicate": 1}
    assert (seen.answers_waiting, seen.to_pay.texts) == (2, 1)
    done = repair(config)
    assert found_in(done) == {"missing": 1}
    assert done.repair is not None
    assert {each.kind: each.count for each in done.repair.found} == found_in(seen)
    assert (done.repair.set_aside, done.repair.tags_removed, done.repair.added) == (1, 1, 2)
    built = at.built_anew()
    assert len(at.rows()) == len(built) - 1
    assert all(built[id_] == row for id_, row in at.rows().items())
    table = open_index(config.index)
    assert table is not None
    assert generations(table)[-1].version == table.version
    assert len(list((Path(config.state.uri) / "set-aside").iterdir())) == 1


@pytest.mark.parametrize(
    "index",
    [
        pytest.param(IvfFlat(distance_type="cosine", num_partitions=1), id="exact"),
        pytest.param(IvfPq(distance_type="cosine", num_sub_vectors=2, num_bits=4), id="coarse"),
    ],
)
def test_a_vector_index_that_misses_rows_is_found(
    place: Callable[..., Place], index: IvfFlat | IvfPq
) -> None:
    random = np.random.default_rng(0)
    words = [f"word{n}" for n in range(40)]
    at = place(texts=[" ".join(random.choice(words, 8)) for _ in range(60)])
    assert verify(at.config()).recall is None
    at.table().create_index("vector", config=index)
    seen = verify(at.config())
    assert seen.recall is not None
    if isinstance(index, IvfFlat):
        assert (found_in(seen), seen.recall) == ({}, 1.0)
    else:
        assert found_in(seen) == {"recall": 1}
        assert seen.recall < RECALL_BOUND


def test_a_repair_takes_out_no_more_than_the_guard_allows(place: Callable[..., Place]) -> None:
    at = place()
    at.write(PARAGRAPHS[:2])
    few = at.config(in_index={"max_deleted_fraction": 0.5})
    before = at.table().version
    with pytest.raises(SettingsError, match=r"6 of 8 chunks .* index\.max_deleted_fraction=1"):
        repair(few)
    assert at.table().version == before
    assert repair(at.config()).clean
    assert len(at.rows()) == 2
    assert list(Ledger(at.config().state.uri).runs()["state"])[-2:] == ["failed", "completed"]


def test_looking_writes_nothing(place: Callable[..., Place]) -> None:
    at = place()
    lose(at, at.ids()[:1])
    spoil("zero")(at, at.ids()[:1])
    before = files_in(at.folder)
    assert not verify(at.config()).clean
    assert files_in(at.folder) == before


def files_in(folder: Path) -> dict[str, tuple[int, int]]:
    paths = [path for path in folder.rglob("*") if path.is_file()]
    return {str(path): (path.stat().st_size, path.stat().st_mtime_ns) for path in paths}


def test_a_repair_holds_the_index_and_a_look_needs_no_lock(place: Callable[..., Place]) -> None:
    at = place()
    with held(at.config().index, "another"):
        with pytest.raises(IndexHeld, match="another"):
            repair(at.config())
        assert verify(at.config()).clean


@pytest.mark.parametrize("part", ["index", "state"])
def test_a_lost_file_is_told_with_a_way_out_that_pays_for_nothing_known(
    place: Callable[..., Place], part: str
) -> None:
    at = place()
    (table,) = (
        each for each in (at.folder / part).glob("*.lance") if each.name[:2] in {"t.", "ve"}
    )
    for file in (table / "data").iterdir():
        file.unlink()
    told = rf"could not read the (index 't'|cache vectors-\S+) in {table}: .*See that its disk"
    for do in (verify, repair, at.run):
        with pytest.raises(EmbedOnceError, match=told) as caught:
            do(at.config())
        assert not isinstance(caught.value, IndexHeld)
        assert "elete" not in str(caught.value)
    table.rename(at.folder / "aside")
    at.write([*PARAGRAPHS, "one more"])
    assert at.reindex().sent == ["one more"]
    assert verify(at.config()).clean


def test_a_vector_whose_file_is_lost_is_told_in_words(place: Callable[..., Place]) -> None:
    at = place()
    cache = Cache(at.config().state.uri, open_provider(at.config()).space)
    hashes = at.cache().to_arrow().column("text_hash")
    for file in Path(at.config().state.uri).glob("vectors-*.lance/data/*"):
        file.unlink()
    with pytest.raises(EmbedOnceError, match="could not read the cache"):
        cache.vectors(hashes)


def test_a_row_whose_file_is_lost_after_it_was_seen_is_told_in_words(
    place: Callable[..., Place],
) -> None:
    at = place()
    space = open_provider(at.config()).space
    rows = Rows.of(at.table(), space, Entries.of(Cache(at.config().state.uri, space)))
    shutil.rmtree(at.folder / "index" / "t.lance" / "data")
    rows.table = at.table()  # that has no file open yet
    with pytest.raises(EmbedOnceError, match="could not read the index 't'"):
        rows.take(np.arange(2), ["vector"])


@pytest.mark.parametrize(("where", "of"), [("examine", Place.table), ("cache", Place.cache)])
def test_what_is_tidied_away_while_it_is_looked_at_is_looked_at_again_later(
    place: Callable[..., Place],
    monkeypatch: pytest.MonkeyPatch,
    where: str,
    of: Callable[[Place], Table],
) -> None:
    at = place()

    def meanwhile(table: Table, columns: Sequence[str]) -> Iterator[pa.RecordBatch]:
        ours = of(at)
        for tag in ours.tags.list():
            ours.tags.delete(tag)
        ours.add(ours.to_arrow().slice(0, 1))
        ours.optimize()
        drop_old_versions(ours, str(Path(ours.uri).parent))  # type: ignore[attr-defined]
        return read_located(table, columns)

    monkeypatch.setattr(f"tasks.{where}.read_located", meanwhile)
    with pytest.raises(IndexHeld, match=r"changed .* while it was read\. Run again"):
        verify(at.config())


def test_a_commit_that_is_about_to_be_named_is_no_finding(
    place: Callable[..., Place], monkeypatch: pytest.MonkeyPatch
) -> None:
    at, seen = place(), list[Verified]()

    def watched(table: Table) -> Generation:
        seen.append(verify(at.config()))
        return tag_generation(table)

    monkeypatch.setattr("tasks.publish.tag_generation", watched)
    at.write([*PARAGRAPHS, "one more"])
    at.reindex()
    assert [found_in(each) for each in seen] == [{}]


def test_where_there_is_no_index_the_cache_builds_it(place: Callable[..., Place]) -> None:
    at = place()
    whole = at.rows()
    shutil.rmtree(at.folder / "index")
    seen = verify(at.config())
    assert found_in(seen) == {"missing": len(whole)}
    assert len(seen.findings[0].examples) == 5
    assert repair(at.config()).clean
    assert at.rows() == whole


@pytest.fixture
def command(monkeypatch: pytest.MonkeyPatch) -> Callable[..., int]:
    """`embed-once verify` of a place, in this process, as its imports take seconds."""

    def run(at: Place, *arguments: str) -> int:
        file = at.folder / "place.yaml"
        file.write_text(yaml.safe_dump(at.config().model_dump(mode="json")), encoding="utf-8")
        monkeypatch.setattr(sys, "argv", ["embed-once", "verify", str(file), *arguments])
        try:
            main()
        except SystemExit as ended:
            return int(ended.code or 0)
        return 0

    return run


def test_the_command_says_what_it_found_what_to_do_and_what_it_mended(
    place: Callable[..., Place], command: Callable[..., int], capfd: pytest.CaptureFixture[str]
) -> None:
    at, file = place(), place().folder / "seen.json"
    assert command(at, "--json", str(file)) == 0
    said = capfd.readouterr()
    assert said.out.startswith("place: index, cache and corpus agree, 8 rows.\n")
    assert said.err == ""
    assert json.loads(file.read_text(encoding="utf-8"))["findings"] == []
    overwrite_vector(at.table(), is_(at.ids()[3]), BAD["zero"])
    lose(at, at.ids()[:1])
    assert command(at, "--json", str(file)) == 5
    said = capfd.readouterr()
    assert "place: not everything is as it should be, found: 2." in said.out
    assert re.search(r"found +vectors of zeros: 1 \(d1\)", said.out)
    assert "verify --repair" in said.err
    assert "embed-once reindex" in said.err
    assert [(each["kind"], each["count"]) for each in json.loads(file.read_text())["findings"]] == [
        ("missing", 1),
        ("zero", 1),
    ]
    at.cache().delete(has(at.hash_of(at.ids()[0])))  # of a row that is well
    assert command(at, "--repair", "--json", str(file)) == 0
    said = capfd.readouterr()
    assert "place: generation 2 published, found: 2, left: 0, 8 rows." in said.out
    assert re.search(r"mended +2 rows written", said.out)
    assert json.loads(file.read_text(encoding="utf-8"))["repair"]["written"] == 2
    assert command(at, "--set", "index.table=other") == 5
    assert command(at, "--set", "source.path=/nowhere") == 2


def test_an_index_that_changes_while_it_is_looked_at_is_looked_at_again_later(
    place: Callable[..., Place], monkeypatch: pytest.MonkeyPatch
) -> None:
    at = place()

    def write_meanwhile(*_: Any) -> int:
        lose(at, at.ids()[:1])
        return 0

    monkeypatch.setattr("tasks.verify.judge", write_meanwhile)
    with pytest.raises(IndexHeld, match="while it was looked at"):
        verify(at.config())


def test_a_repair_that_ends_early_leaves_the_old_rows_and_the_next_one_mends_them(
    place: Callable[..., Place], monkeypatch: pytest.MonkeyPatch, died: type[Exception]
) -> None:
    at = place()
    whole = at.rows()
    repeat(at, at.ids()[:1])
    spoil_entry("zero")(at, at.ids()[1:3])
    overwrite_vector(at.table(), is_(at.ids()[4]), BAD["norm"])
    harmed = at.table().version

    def die(**_: Any) -> None:
        raise died

    with monkeypatch.context() as patch:
        patch.setattr("tasks.repair.publish", die)
        with pytest.raises(died):
            repair(at.config())
    assert at.table().version == harmed
    assert set(found_in(verify(at.config()))) == {"duplicate", "norm"}  # the cache is well again
    assert repair(at.config()).clean
    assert at.rows() == whole


KILLED = """
import sys
from tasks.params import load_config
from tasks.repair import repair
print("ready", flush=True)
repair(load_config(sys.argv[1]))
"""


@pytest.mark.slow
def test_whenever_a_repair_is_killed_readers_see_the_old_rows_or_the_new_ones(
    place: Callable[..., Place],
) -> None:
    texts = [f"alpha{n} beta{n} gamma{n} delta{n}" for n in range(40)]
    wholly_old, wholly_new = 0, 0
    for pause in (0.0, 0.1, 0.2, 0.4, None):
        at = place(texts=texts)
        whole, ids = at.rows(), at.ids()
        repeat(at, ids[:1])
        overwrite_vector(at.table(), is_(ids[1]), BAD["zero"])
        lose(at, ids[2:3])
        spoil_entry("norm")(at, ids[3:4])
        harmed = at.table().to_arrow().sort_by("id").drop_columns("run_id").to_pylist()
        file = at.folder / "place.yaml"
        file.write_text(yaml.safe_dump(at.config().model_dump(mode="json")), encoding="utf-8")
        process = subprocess.Popen(
            [sys.executable, "-c", KILLED, str(file)], stdout=subprocess.PIPE, text=True
        )
        assert process.stdout is not None
        process.stdout.readline()
        if pause is not None:
            time.sleep(pause)
            process.kill()
        process.communicate()
        found = at.table().to_arrow().sort_by("id").drop_columns("run_id").to_pylist()
        mended = sorted(whole.values(), key=lambda row: str(row["id"]))
        wholly_old += found == harmed
        wholly_new += found == mended
        assert found in (harmed, mended)
        assert repair(at.config()).clean
        assert at.rows() == whole
        assert at.reindex().sent == []
    assert wholly_old
    assert wholly_new


finite = st.floats(-2, 2, width=32)


@given(st.lists(st.lists(finite, min_size=4, max_size=4), min_size=1, max_size=20))
@settings(max_examples=50, deadline=None)
def test_a_vector_is_sound_only_with_length_one_and_numbers_that_differ(
    vectors: list[list[float]],
) -> None:
    space = Space("lexical", "lexical", 4)
    faults = faults_of(pa.array(vectors, space.vector_type), space)
    for fault, vector in zip(faults, vectors, strict=True):
        length = float(np.linalg.norm(np.array(vector, np.float64)))
        if not any(vector):
            assert fault == Fault.ZERO
        elif len(set(vector)) == 1:
            assert fault == Fault.CONSTANT
        else:
            assert (fault == Fault.SOUND) == (abs(length - 1) <= UNIT_TOLERANCE)


def test_a_slice_and_a_null_are_read_row_by_row() -> None:
    space = Space("lexical", "lexical", 2)
    column = pa.array([[9.0, 9.0], [1.0, 0.0], None, [0.0, 1.0]], space.vector_type)
    assert faults_of(column.slice(1), space).tolist() == [
        Fault.SOUND,
        Fault.NOT_FINITE,
        Fault.SOUND,
    ]
