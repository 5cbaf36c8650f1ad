"""Search: exact without an index of words, hybrid with one, right beside any index."""

import subprocess
import sys
from pathlib import Path
from typing import Any

import lancedb
import numpy as np
import pyarrow as pa
import pytest

import tasks.publish
import tasks.search
import tasks.search_indexes
from tasks.errors import EmbedOnceError
from tasks.index import open_index
from tasks.ledger import Ledger
from tasks.maintain import maintain
from tasks.params import Config
from tasks.providers import checked_vectors
from tasks.search import search
from tasks.search_indexes import build_search_indexes, text_index, vector_index
from tasks.simulator import Settings, Simulator
from tasks.tidy import drop_old_versions

ROOT = Path(__file__).parents[1]
COUNT = 300


def numbered() -> dict[str, str]:
    return {f"id{number}": f"common text{number} word{number % 7}" for number in range(COUNT)}


@pytest.fixture
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    """The small tables of these tests get both indexes."""
    monkeypatch.setattr(tasks.search_indexes, "TEXT_ROWS", COUNT)
    monkeypatch.setattr(tasks.search_indexes, "VECTOR_BYTES", COUNT * 32)


def table_of(library: Any) -> Any:
    table = open_index(library.config.index)
    assert table is not None
    return table


def test_small_indexes_are_searched_exactly(library: Any) -> None:
    library.reindex(numbered())
    maintain(library.config)
    assert text_index(table_of(library)) is vector_index(table_of(library)) is None
    hits = search(library.config, "common text9 word2", 300)
    assert hits[0].id == "id9"
    assert [hit.distance for hit in hits] == sorted(hit.distance for hit in hits)


def test_a_fused_hit_has_its_exact_distance_whatever_found_it(library: Any, small: None) -> None:
    library.reindex({**numbered(), "long": "zebra " + " ".join(f"w{n}" for n in range(300))})
    exact = {hit.id: hit.distance for hit in search(library.config, "zebra common", 400)}
    maintain(library.config)
    assert text_index(table_of(library)) is not None
    hits = search(library.config, "zebra common", 7)
    assert len({hit.id for hit in hits}) == 7
    assert "long" in {hit.id for hit in hits}  # by its word alone: its vector is far away
    for hit in hits:
        assert hit.distance == pytest.approx(exact[hit.id], abs=1e-6)


@pytest.mark.parametrize(
    "text",
    [
        'say "text7', "text7'", "text7 AND (NOT", "+text7 -word0", "text7^2~ *", "text: text7",
        "text7 🦓", "🦓", "the and of", "ein 日本語 text7", "text7\0", "a" * 5000, "text7\n\nOR",
    ],
)  # fmt: skip
def test_any_text_can_be_searched_for(searched: Any, text: str) -> None:
    hits = search(searched.config, text, 5)
    assert len(hits) == 5
    assert not np.isnan([hit.distance for hit in hits]).any()
    if "text7" in text:
        assert "id7" in {hit.id for hit in hits}


@pytest.fixture(scope="module")
def searched(tmp_path_factory: pytest.TempPathFactory, reindex: Any, library_class: Any) -> Any:
    """An index with an index of words."""
    library = library_class(tmp_path_factory.mktemp("searched"), reindex)
    library.reindex(numbered())
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(tasks.search_indexes, "TEXT_ROWS", COUNT)
        maintain(library.config)
    return library


def test_rows_younger_than_the_indexes_are_found_and_old_ones_are_not(
    library: Any, small: None
) -> None:
    library.reindex(numbered())
    maintain(library.config)
    assert vector_index(table_of(library)) is not None
    library.reindex({**numbered(), "id7": "zebra", "new": "fresh quagga"})
    assert search(library.config, "quagga", 1)[0].id == "new"
    assert search(library.config, "zebra", 1)[0].id == "id7"
    assert "id7" not in {hit.id for hit in search(library.config, "text7", 5) if "7" in hit.text}
    done = maintain(library.config).done
    assert [each for each in done if "index built" in each] == [
        "full-text index built (301 rows)", "vector index built (301 rows)",
    ]  # fmt: skip
    assert search(library.config, "quagga", 1)[0].id == "new"
    assert not [each for each in maintain(library.config).done if "index built" in each]


def test_a_search_reads_what_is_published_while_its_text_is_embedded(
    library: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    library.reindex(numbered())

    def meanwhile(*given: Any) -> Any:
        library.reindex({**numbered(), "id7": "quagga"})
        table = table_of(library)
        for tag in table.tags.list():
            table.tags.delete(tag)
        table.optimize()
        drop_old_versions(table, library.config.index.uri)
        return checked_vectors(*given)

    monkeypatch.setattr(tasks.search, "checked_vectors", meanwhile)
    assert search(library.config, "quagga", 1)[0].id == "id7"


def test_a_search_tells_of_a_lost_file_in_words(library: Any) -> None:
    library.reindex(numbered())
    for file in Path(library.config.index.uri).glob("t.lance/data/*"):
        file.unlink()
    with pytest.raises(EmbedOnceError, match="could not read the index 't'"):
        search(library.config, "text7")


def test_an_interrupted_search_is_in_the_ledger_as_what_it_was(
    library: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("VOYAGE_API_KEY", "any")
    with Simulator(Settings()) as simulator:
        address = {"model": "voyage-4", "dimension": 256, "base_url": simulator.base_url}
        values = library.config.model_dump(exclude_none=True)
        values["embedding"] = {"provider": "voyage", **address}
        values["index"]["table"] = "v"
        config = Config.model_validate(values)
        library.reindex({"a": "alpha"})
        library.run(config)
        search(config, "alpha", 1)

        def interrupt(*_: Any) -> None:
            raise KeyboardInterrupt

        monkeypatch.setattr(tasks.search, "checked_vectors", interrupt)
        with pytest.raises(KeyboardInterrupt):
            search(config, "alpha", 1)
    calls = Ledger(config.state.uri).calls()
    assert calls["status"].tolist() == ["ok", "unforeseen"]
    assert calls["tokens_billed"].nunique() == 1


def test_an_overwrite_drops_the_indexes_and_search_goes_on(
    library: Any, small: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    library.reindex(numbered())
    maintain(library.config)
    monkeypatch.setattr(tasks.publish, "MERGE_ROWS", 0)
    assert library.reindex({**numbered(), "id1": "quagga"}).published.way == "overwrite"
    assert text_index(table_of(library)) is vector_index(table_of(library)) is None
    assert search(library.config, "quagga", 1)[0].id == "id1"
    maintain(library.config)
    assert text_index(table_of(library)) is not None
    assert search(library.config, "quagga", 1)[0].id == "id1"


@pytest.mark.parametrize("metric", ["cosine", "l2", "dot"])
def test_the_vector_index_follows_the_metric(library: Any, small: None, metric: str) -> None:
    library.reindex(numbered())
    library.settings = {"metric": metric}
    maintain(library.config)
    table = table_of(library)
    stats = table.index_stats(vector_index(table))
    assert (stats.distance_type, stats.index_type) == (metric, "IVF_SQ")
    exact = table.search(table.to_arrow().column("vector")[5].as_py(), vector_column_name="vector")
    want = {
        row["id"] for row in exact.distance_type(metric).bypass_vector_index().limit(1).to_list()
    }
    assert {search(library.config, "common text5 word5", 1)[0].id} == want == {"id5"}


def test_bits_get_lists_of_bits(library: Any, small: None) -> None:
    bits = np.random.default_rng(1).integers(0, 256, (COUNT, 32), dtype=np.uint8)
    column = pa.FixedSizeListArray.from_arrays(pa.array(bits.reshape(-1)), 32)
    table: Any = lancedb.connect(library.folder / "bits").create_table(
        "t", pa.table({"vector": column, "text": ["word"] * COUNT})
    )
    assert len(build_search_indexes(table, "hamming")) == 2
    stats = table.index_stats("vector_idx")
    assert (stats.index_type, stats.distance_type) == ("IVF_FLAT", "hamming")
    near = table.search(bits[9].tolist(), vector_column_name="vector").distance_type("hamming")
    assert near.limit(1).to_list()[0]["_distance"] == 0


def test_a_hybrid_search_imports_neither_pandas_nor_prefect(searched: Any, tmp_path: Path) -> None:
    file = tmp_path / "c.yaml"
    file.write_text(searched.config.model_dump_json(exclude_none=True), encoding="utf-8")
    code = (
        "import sys; from flows.cli import search\n"
        f"search({str(file)!r}, 'text7 quagga', 3, [], False)\n"
        "sys.exit('prefect' in sys.modules or 'pandas' in sys.modules)"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], check=False, cwd=ROOT, capture_output=True, text=True
    )
    assert (done.returncode, done.stderr) == (0, "")
    assert "distance" in done.stdout
