"""Verify finds what was done to index, cache and journal by hand, and nothing else."""

import json
import os
import shutil
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import lancedb
import numpy as np
import pyarrow as pa
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from lancedb.table import Table
from pyarrow import parquet

from tasks.cache import Cache
from tasks.errors import EmbedOnceError, IndexHeld, SettingsError
from tasks.findings import KINDS, Verified
from tasks.index import generations, held, open_index
from tasks.journal import Refused, RunFolder
from tasks.keys import text_hash
from tasks.ledger import Ledger
from tasks.params import Config
from tasks.plan import make_plan
from tasks.params import Overrides
from tasks.providers.opening import open_provider
from tasks.publish import publish
from tasks.quarantine import Quarantine
from tasks.repair import repair
from tasks.simulator import Settings, Simulator
from tasks.soundness import Fault, faults_of
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
        return Config.model_validate(
            {
                "name": "place",
                "source": source,
                "embedding": embedding,
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


def overwrite_vector(table: Table, where: str, vector: list[float]) -> None:
    """Write a vector that LanceDB's own checks would not let pass."""
    kind = table.schema.field("vector").type
    word = "Float32" if pa.types.is_floating(kind.value_type) else "UInt8"
    numbers = ", ".join(f"arrow_cast('{number}', '{word}')" for number in vector)
    cast = f"arrow_cast([{numbers}], 'FixedSizeList({kind.list_size}, {word})')"
    table.update(where=where, values_sql={"vector": cast})


def found_in(seen: Verified) -> dict[str, int]:
    return {each.kind: each.count for each in seen.findings}


@pytest.fixture(scope="module")
def place(fresh: Callable[[], Path], reindex: Reindex) -> Callable[..., Place]:
    def make(kind: str = "table", texts: list[str] = PARAGRAPHS, **more: Any) -> Place:
        made = Place(fresh(), reindex, kind, **more)
        made.write(texts)
        made.reindex()
        return made

    return make


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
        row = at.row(id_)
        at.table().add(row.set_column(0, row.schema.field("id"), pa.array([f"stray {id_}"])))


def repeat(at: Place, ids: list[str]) -> None:
    for id_ in ids:
        at.table().add(at.row(id_))


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
        at.cache().add(at.cache().search().where(has(at.hash_of(id_))).to_arrow())


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


@pytest.mark.parametrize("kind", HARMS)
def test_each_harm_is_found_and_mended_for_free(
    place: Callable[..., Place], kind: str
) -> None:
    at = place()
    whole = at.rows()
    ids = at.ids()[1:3]
    HARMS[kind](at, ids)
    assert found_in(verify(at.config())) == {kind: 2}
    done = repair(at.config())
    assert done.clean
    assert done.repair is not None
    assert {each.kind: each.count for each in done.repair.found} == {kind: 2}
    assert at.rows() == whole
    assert at.reindex().sent == []
    assert verify(at.config()).clean
