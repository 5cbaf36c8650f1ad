"""The engine as a library: one path for one text and for many, each paid for once."""

import asyncio
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pyarrow as pa
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pyarrow import parquet

from tasks.budget import usd_text
from tasks.embedder import BatchEmbedder
from tasks.embeddings import Embeddings, StreamProgress
from tasks.errors import (
    BatchRefused,
    BudgetReached,
    CorpusError,
    EmbedOnceError,
    ProviderBusy,
    ProviderDenied,
    SettingsError,
    StorageFailed,
)
from tasks.journal import fold
from tasks.keys import text_hash
from tasks.ledger import Ledger
from tasks.memory import COPIES, OVERHEAD, estimated_bytes
from tasks.providers.lexical import Lexical
from tasks.quarantine import quarantined
from tasks.simulator import Rule, Settings, Simulator
from tasks.stream import StreamPart
from tests.waiting import until

DIMENSION = 256
BAD = "a text with the poison in it"


def texts(count: int, word: str = "animal") -> list[str]:
    return [f"The story of {word} number {number} and its house." for number in range(count)]


@pytest.fixture
def simulator(monkeypatch: pytest.MonkeyPatch) -> Iterator[Simulator]:
    monkeypatch.setenv("VOYAGE_API_KEY", "pa-a-secret-key")
    with Simulator(Settings(vectors="words")) as running:
        yield running


Values = Callable[..., dict[str, Any]]


@pytest.fixture
def values(simulator: Simulator, tmp_path: Path) -> Values:
    """What an embedder is made of, by the simulator."""

    def make(**more: Any) -> dict[str, Any]:
        embedding = {"provider": "voyage", "model": "voyage-4", "dimension": DIMENSION}
        return {
            "embedding": embedding | {"base_url": simulator.base_url},
            "state": {"uri": str(tmp_path / "state")},
            **more,
        }

    return make


def billed(simulator: Simulator) -> list[int]:
    """How many texts each paid call held."""
    return [each.n_texts for each in simulator.ledger.requests if each.billed_tokens]


def local(state: Path, **more: Any) -> dict[str, Any]:
    """An embedder that needs no network."""
    embedding = {"provider": "lexical", "dimension": DIMENSION}
    return {"embedding": embedding, "state": {"uri": str(state)}, **more}


def expected(some: list[str], lexical: Lexical) -> Any:
    return lexical.embed(some).vectors


# One path


def test_many_texts_are_one_call_and_each_vector_stands_where_its_text_does(
    values: Values, simulator: Simulator
) -> None:
    with BatchEmbedder(values()) as embedder:
        found = embedder.embed_batch(texts(100))
        again = [embedder.embed(text) for text in texts(100)]
    assert billed(simulator) == [100]
    assert found.vectors.shape == (100, DIMENSION)
    assert found.vectors.dtype == np.float32
    assert np.array_equal(found.vectors, np.stack(again))
    assert np.allclose(np.linalg.norm(found.vectors, axis=1), 1, atol=1e-3)
    assert (found.api_calls, found.cache_hits, found.errors) == (1, 0, {})


def test_a_text_alone_is_a_batch_of_one(values: Values, simulator: Simulator) -> None:
    with BatchEmbedder(values()) as embedder:
        vector = embedder.embed("a wolf")
        assert vector.shape == (DIMENSION,)
        assert np.array_equal(embedder.embed_batch(["two foxes", "a wolf"]).vectors[1], vector)
    assert billed(simulator) == [1, 1]


def test_what_was_paid_for_is_known_whoever_paid_and_whenever(
    values: Values, simulator: Simulator
) -> None:
    with BatchEmbedder(values()) as first:
        vectors = first.embed_batch(texts(75)).vectors
    with BatchEmbedder(values()) as second:
        found = second.embed_batch(texts(100))
    assert billed(simulator) == [75, 25]
    assert found.cached.tolist() == [True] * 75 + [False] * 25
    assert (found.total_count, found.cache_hits, found.cache_hit_rate) == (100, 75, 0.75)
    assert found.processing_time_seconds > 0
    assert np.array_equal(found.vectors[:75], vectors)


def test_a_text_that_stands_twice_is_sent_once(values: Values, simulator: Simulator) -> None:
    with BatchEmbedder(values()) as embedder:
        found = embedder.embed_batch(["same"] * 50)
    assert billed(simulator) == [1]
    assert (found.vectors == found.vectors[0]).all()


lists = st.lists(
    st.sampled_from(["alpha", "beta", "gamma delta", "epsilon", " ", "", "\n", 7, None]),
    min_size=1,
    max_size=30,
)


@given(st.lists(lists, min_size=1, max_size=4), st.integers(1, 5))
@settings(max_examples=15, deadline=None)
def test_whatever_is_asked_for_each_row_belongs_to_its_text(
    fresh: Callable[[], Path], lexical: Lexical, questions: list[list[Any]], most: int
) -> None:
    with BatchEmbedder(local(fresh(), limits={"texts_per_request": most})) as embedder:
        seen = set[str]()
        for question in questions:
            found = embedder.embed_batch(question)
            assert len(found) == len(question) == len(found.vectors) == len(found.cached)
            for at, text in enumerate(question):
                if isinstance(text, str) and text.strip():
                    assert np.array_equal(found.vectors[at], expected([text], lexical)[0])
                    assert found.cached[at] == (text in seen)
                    assert at not in found.errors
                else:
                    assert np.isnan(found.vectors[at]).all()
                    kind = "blank" if isinstance(text, str) else "not text"
                    assert found.errors[at].kind == kind
                    assert not found.cached[at]
            seen |= {text for text in question if isinstance(text, str) and text.strip()}


def test_the_result_is_arrow_and_pandas_without_a_copy_of_its_numbers(tmp_path: Path) -> None:
    with BatchEmbedder(local(tmp_path)) as embedder:
        whole = embedder.embed_batch(["alpha", "beta"])
        holed = embedder.embed_batch(["alpha", " "])
    table = whole.to_arrow()
    numbers = table.column("vector").chunk(0).flatten().to_numpy()
    assert np.shares_memory(numbers, whole.vectors)
    assert table.column("text").to_pylist() == ["alpha", "beta"]
    assert table.column("text_hash").to_pylist() == [text_hash("alpha"), text_hash("beta")]
    frame = whole.to_pandas()
    assert np.shares_memory(frame["vector"][1], whole.vectors)
    assert isinstance(frame, pd.DataFrame)
    table = holed.to_arrow()
    assert table.column("vector").null_count == 1
    assert table.column("cached").to_pylist() == [True, False]
    assert table.column("error").to_pylist()[1].startswith("This text is blank")
    assert pa.types.is_fixed_size_list(table.schema.field("vector").type)


@pytest.mark.parametrize(
    ("count", "calls"), [(1, 1), (10, 1), (25, 1), (100, 1), (999, 1), (1000, 1), (2500, 3)]
)
def test_texts_go_out_in_as_few_calls_as_the_provider_takes(
    values: Values, simulator: Simulator, count: int, calls: int
) -> None:
    simulator.change(vectors="fast")
    with BatchEmbedder(values()) as embedder:
        assert embedder.submit(texts(count)).result().errors == {}
    assert len(billed(simulator)) == calls
    assert (sum(billed(simulator)), max(billed(simulator)) <= 1000) == (count, True)


def test_texts_and_vectors_can_be_kept_as_parquet(tmp_path: Path, lexical: Lexical) -> None:
    many, file = texts(1000), tmp_path / "vectors.parquet"
    with BatchEmbedder(local(tmp_path / "state")) as embedder:
        parquet.write_table(embedder.embed_batch(many).to_arrow(), file)
    table = parquet.read_table(file)
    assert table.column("text").to_pylist() == many
    assert table.column("text_hash").to_pylist() == [text_hash(text) for text in many]
    assert np.array_equal(np.stack(table.to_pandas()["vector"]), expected(many, lexical))


def test_bits_come_as_bytes(values: Values) -> None:
    made = values()
    made["embedding"] |= {"output_dtype": "ubinary"}
    with BatchEmbedder(made) as embedder:
        found = embedder.embed_batch(["alpha", " "])
    assert found.vectors.shape == (2, DIMENSION // 8)
    assert found.vectors.dtype == np.uint8
    assert not found.vectors[1].any()
    assert found.to_arrow().column("vector").null_count == 1


# What fails


def test_a_bad_text_costs_only_its_own_row_and_is_not_sent_again(
    values: Values, simulator: Simulator
) -> None:
    simulator.add(Rule(marker="poison", status=400))
    some = [*texts(10), BAD, *texts(10, "plant")]
    with BatchEmbedder(values()) as embedder:
        found = embedder.embed_batch(some)
        calls = len(simulator.ledger.requests)
        again = embedder.embed_batch([BAD, "new"])
    assert [(at, error.kind) for at, error in found.errors.items()] == [(10, "refused")]
    assert np.isnan(found.vectors[10]).all()
    assert not np.isnan(np.delete(found.vectors, 10, axis=0)).any()
    assert again.errors[0].kind == "quarantined"
    assert len(simulator.ledger.requests) == calls + 1
    assert quarantined(values()["state"]["uri"])["text_hash"].tolist() == [text_hash(BAD)]
    with BatchEmbedder(values()) as later:
        assert later.embed_batch([BAD]).errors[0].kind == "quarantined"
    assert len(simulator.ledger.requests) == calls + 1


def test_collect_names_a_bad_text_and_asks_again_another_time(
    values: Values, simulator: Simulator
) -> None:
    simulator.add(Rule(marker="poison", status=400))
    with BatchEmbedder(values(on_error="collect")) as embedder:
        embedder.embed("good")
        assert embedder.embed_batch([BAD]).errors[0].kind == "refused"
        calls = len(simulator.ledger.requests)
        assert embedder.embed_batch([BAD]).errors[0].kind == "refused"
    assert len(simulator.ledger.requests) > calls
    assert len(quarantined(values()["state"]["uri"])) == 0


def test_fail_fast_checks_all_texts_before_anything_is_sent(
    values: Values, simulator: Simulator
) -> None:
    with BatchEmbedder(values(on_error="fail_fast")) as embedder:
        with pytest.raises(CorpusError, match=r"^Text 3: This text is blank"):
            embedder.embed_batch(["alpha", "beta", " ", "gamma"])
        assert len(simulator.ledger.requests) == 0
        assert embedder.embed("alpha").shape == (DIMENSION,)


def test_fail_fast_raises_at_the_first_refusal_and_others_go_on(
    values: Values, simulator: Simulator
) -> None:
    simulator.add(Rule(marker="poison", status=400))
    with BatchEmbedder(values(on_error="fail_fast")) as embedder:
        embedder.embed("good")
        with pytest.raises(BatchRefused, match="set on_error to quarantine"):
            embedder.embed_batch(["alpha", BAD])
        found = embedder.embed_batch(["alpha", "beta"])
    assert found.errors == {}
    assert found.cached[0]  # it was paid for while the bad one was looked for


def test_a_single_text_that_fails_raises(values: Values, simulator: Simulator) -> None:
    simulator.add(Rule(marker="poison", status=400))
    with BatchEmbedder(values()) as embedder:
        embedder.embed("good")
        with pytest.raises(EmbedOnceError):
            embedder.embed(BAD)
        with pytest.raises(EmbedOnceError, match="blank"):
            embedder.embed("  ")


def test_what_passes_is_tried_again_as_one_batch(values: Values, simulator: Simulator) -> None:
    simulator.add(Rule(requests=frozenset({1}), status=503))
    with BatchEmbedder(values()) as embedder:
        found = embedder.embed_batch(texts(20))
    assert found.errors == {}
    assert [each.n_texts for each in simulator.ledger.requests] == [20, 20]
    assert [call.status for call in found.calls] == ["ProviderBusy", "ok"]


@pytest.mark.parametrize("on_error", ["quarantine", "fail_fast"])
def test_what_does_not_pass_fails_what_it_was_asked_for(
    values: Values, simulator: Simulator, on_error: str
) -> None:
    simulator.add(Rule(marker="plant", status=503))
    with BatchEmbedder(values(on_error=on_error), retries=1) as embedder:
        embedder.embed("good")
        if on_error == "fail_fast":
            with pytest.raises(ProviderBusy):
                embedder.embed_batch(texts(2, "plant"))
        else:
            found = embedder.embed_batch([*texts(2, "plant"), "good"])
            assert {at: error.kind for at, error in found.errors.items()} == {
                0: "failed",
                1: "failed",
            }
            assert found.cached[2]
        assert embedder.embed_batch(texts(2)).errors == {}  # others go on


def test_a_wrong_key_ends_it_in_words(values: Values, simulator: Simulator) -> None:
    simulator.add(Rule(status=401))
    with BatchEmbedder(values()) as embedder:
        for _ in range(2):
            with pytest.raises(ProviderDenied, match="VOYAGE_API_KEY"):
                embedder.embed_batch(texts(3))
    assert len(simulator.ledger.requests) == 1


def test_wrong_use_is_told_at_once(tmp_path: Path) -> None:
    embedder = BatchEmbedder(local(tmp_path))
    with pytest.raises(RuntimeError, match="not open"):
        embedder.submit(["alpha"])
    with embedder:
        for ask in (embedder.embed_batch, embedder.submit):
            with pytest.raises(ValueError, match="no texts"):
                ask([])
            with pytest.raises(TypeError, match="list of texts"):
                ask("alpha")
    with pytest.raises(RuntimeError, match="not open"):
        embedder.embed("alpha")
    with pytest.raises(SettingsError, match=r"embedding.modle: unknown key. Did you mean 'model'"):
        BatchEmbedder(local(tmp_path, embedding={"provider": "lexical", "modle": "x"}))
    with pytest.raises(SettingsError, match="state: missing"):
        BatchEmbedder({"embedding": {"provider": "lexical"}})


def test_a_config_file_serves_an_embedder_and_its_index_from_one_cache(
    library: Any, lexical: Lexical, tmp_path: Path
) -> None:
    library.reindex({"a": "alpha", "b": "beta"})
    with BatchEmbedder(library.config) as embedder:
        found = embedder.embed_batch(["beta", "gamma"])
        assert found.cached.tolist() == [True, False]
        assert np.array_equal(found.vectors, expected(["beta", "gamma"], lexical))
    assert library.reindex({"a": "alpha", "c": "gamma"}).sent == []
    file = tmp_path / "docs.yaml"
    file.write_text(
        "name: docs\nsource: {kind: files, path: .}\nembedding: {provider: lexical}\n"
        "index: {uri: ./index, table: docs}\nstate: {uri: ./other}\n"
    )
    with BatchEmbedder(file) as embedder:
        assert embedder.embed("alpha").shape == (1024,)
    assert (tmp_path / "other").is_dir()


def test_a_text_is_what_it_was_when_it_was_asked_for(values: Values, simulator: Simulator) -> None:
    simulator.change(latency={"base_s": 0.2})
    given = ["a wolf in the snow", "a bear"]
    with BatchEmbedder(values(limits={"concurrency": 1})) as embedder:
        busy = [embedder.submit([f"busy {number}"]) for number in range(3)]
        asked = embedder.submit(given)
        given[0] = "two foxes"
        found = asked.result()
        assert all(not each.result().errors for each in busy)
        assert found.texts == ["a wolf in the snow", "a bear"]
        assert not np.array_equal(embedder.embed("two foxes"), found.vectors[0])
    with BatchEmbedder(values()) as again:
        assert np.array_equal(again.embed("a wolf in the snow"), found.vectors[0])


@pytest.mark.parametrize(
    "given",
    [
        pd.Series(["alpha", "beta", "gamma"], index=[2, 1, 0]),
        pd.DataFrame({"text": ["x", "alpha", "beta", "gamma"]})["text"][1:],
        np.array(["alpha", "beta", "gamma"]),
        (text for text in ["alpha", "beta", "gamma"]),
        {"alpha": 1, "beta": 2, "gamma": 3},
    ],
    ids=["series", "filtered", "array", "generator", "keys"],
)
def test_any_iterable_of_texts_is_taken_in_its_order(
    tmp_path: Path, lexical: Lexical, given: Any
) -> None:
    with BatchEmbedder(local(tmp_path)) as embedder:
        found = embedder.embed_batch(given)
    assert found.errors == {}
    assert np.array_equal(found.vectors, expected(["alpha", "beta", "gamma"], lexical))


def test_half_of_a_character_is_no_text_and_harms_no_other(tmp_path: Path) -> None:
    with BatchEmbedder(local(tmp_path)) as embedder:
        given: list[Any] = ["good", "\ud800bad", 3, b"bytes"]
        found = embedder.embed_batch(given)
        with pytest.raises(EmbedOnceError, match="half of a character"):
            embedder.embed("\ud800bad")
    assert {at: error.kind for at, error in found.errors.items()} == dict.fromkeys(
        [1, 2, 3], "not text"
    )
    assert found.to_arrow().column("text").to_pylist() == ["good", None, None, None]


def test_fail_fast_in_a_stream_names_the_text_by_its_place_in_it(tmp_path: Path) -> None:
    many = [*texts(95), " ", *texts(50, "plant")]
    limits = {"texts_per_request": 10, "concurrency": 2}
    made = local(tmp_path, limits=limits, on_error="fail_fast")
    with BatchEmbedder(made) as embedder, pytest.raises(CorpusError, match=r"^Text 96: "):
        list(embedder.stream(many))


def test_what_was_found_out_before_a_failure_is_kept(values: Values, simulator: Simulator) -> None:
    simulator.add(Rule(marker="poison", status=400), Rule(marker="plant", status=503))
    with BatchEmbedder(values(), retries=0) as embedder:
        embedder.embed("good")
        found = embedder.embed_batch([BAD, *texts(1, "plant"), *texts(3)])
        calls = len(simulator.ledger.requests)
        again = embedder.embed_batch([BAD])
    assert found.errors[1].kind == "failed"
    assert found.errors[0].kind in {"refused", "failed"}
    if found.errors[0].kind == "refused":
        assert again.errors[0].kind == "quarantined"
        assert len(simulator.ledger.requests) == calls


# Many at once


def test_two_threads_that_want_a_text_at_once_pay_for_it_once(
    values: Values, simulator: Simulator
) -> None:
    simulator.change(latency={"base_s": 0.3})
    with BatchEmbedder(values()) as embedder, ThreadPoolExecutor(4) as threads:
        together = [threads.submit(embedder.embed_batch, texts(50)) for _ in range(4)]
        found = [each.result() for each in together]
    assert sum(billed(simulator)) == 50
    assert all(np.array_equal(each.vectors, found[0].vectors) for each in found)
    assert sum(each.cache_hits for each in found) == 150  # three of four paid nothing
    assert sum(each.api_calls for each in found) == 1


@pytest.mark.slow
def test_one_that_gives_up_does_not_take_the_texts_of_another_along(
    values: Values, simulator: Simulator
) -> None:
    simulator.add(Rule(marker="poison", status=400))
    simulator.change(latency={"base_s": 0.2})
    limits = {"concurrency": 1, "texts_per_request": 5}
    with (
        BatchEmbedder(values(on_error="fail_fast", limits=limits)) as embedder,
        ThreadPoolExecutor(2) as threads,
    ):
        embedder.embed("good")
        gives_up = threads.submit(embedder.embed_batch, [BAD, *texts(40)])
        time.sleep(0.1)
        goes_on = threads.submit(embedder.embed_batch, texts(40))
        with pytest.raises(BatchRefused):
            gives_up.result()
        assert goes_on.result().errors == {}


def test_what_another_embedder_pays_for_counts_as_known(
    values: Values, simulator: Simulator
) -> None:
    simulator.change(latency={"base_s": 0.5})
    with (
        BatchEmbedder(values()) as one,
        BatchEmbedder(values()) as two,
        ThreadPoolExecutor(2) as threads,
    ):
        for embedder in (one, two):
            embedder.embed("ready")
        simulator.reset()
        first = threads.submit(one.embed_batch, texts(10))
        while not simulator.ledger.totals()["max_concurrency"]:
            time.sleep(0.01)
        second = threads.submit(two.embed_batch, texts(10)).result()
        assert np.array_equal(second.vectors, first.result().vectors)
    assert (second.cache_hits, second.api_calls, second.usd) == (10, 0, 0)
    assert sum(billed(simulator)) == 10


def test_a_cancelled_embedder_leaves_the_calls_of_another_alone(
    values: Values, simulator: Simulator
) -> None:
    simulator.change(latency={"base_s": 0.5})
    with BatchEmbedder(values()) as idle, BatchEmbedder(values()) as busy:
        asked = busy.submit(texts(20))
        while not simulator.ledger.totals()["max_concurrency"]:
            time.sleep(0.01)
        idle.cancel()
        assert asked.result().errors == {}
    assert [each.n_texts for each in simulator.ledger.requests] == [20]


def test_one_text_does_not_wait_for_a_whole_import(values: Values, simulator: Simulator) -> None:
    simulator.change(latency={"base_s": 0.1})
    limits = {"texts_per_request": 5, "concurrency": 2}
    with BatchEmbedder(values(limits=limits)) as embedder:
        embedder.embed("ready")
        load = embedder.submit(texts(400))
        while len(simulator.ledger.requests) < 4:
            time.sleep(0.01)
        before = len(simulator.ledger.requests)
        embedder.embed("somebody waits")
        assert len(simulator.ledger.requests) - before < 20
        assert not load.done()
        embedder.cancel()


def test_submit_gives_a_future_and_keeps_to_the_limit_of_calls(
    values: Values, simulator: Simulator
) -> None:
    simulator.change(latency={"base_s": 0.05})
    limits = {"concurrency": 3, "texts_per_request": 4}
    with BatchEmbedder(values(limits=limits)) as embedder:
        futures = [embedder.submit(texts(8, f"kind{kind}")) for kind in range(12)]
        found = [future.result() for future in futures]
    assert [each.errors for each in found] == [{}] * 12
    assert sum(billed(simulator)) == 96
    assert 1 < simulator.ledger.totals()["max_concurrency"] <= 3


def test_async_code_waits_without_blocking_its_loop(values: Values, simulator: Simulator) -> None:
    simulator.change(latency={"base_s": 1})

    async def ask(embedder: BatchEmbedder) -> tuple[Embeddings, int]:
        beats, asked = 0, asyncio.wrap_future(embedder.submit(texts(5)))
        while not asked.done():
            await asyncio.sleep(0.02)
            beats += 1
        return await asked, beats

    with BatchEmbedder(values()) as embedder:
        found, beats = asyncio.run(ask(embedder))
    assert len(found) == 5
    assert beats >= 10


def test_what_is_queued_when_it_is_cancelled_is_not_sent_and_says_so(
    values: Values, simulator: Simulator
) -> None:
    simulator.change(latency={"base_s": 0.5})
    limits = {"concurrency": 2, "texts_per_request": 5}
    with BatchEmbedder(values(limits=limits)) as embedder:
        known = embedder.embed("known")
        sent = len(simulator.ledger.requests)
        futures = [embedder.submit(texts(20, f"kind{kind}")) for kind in range(6)]
        while len(simulator.ledger.requests) == sent:
            time.sleep(0.01)
        embedder.cancel()
        answered = sum(billed(simulator))
        found = [future.result(timeout=5) for future in futures]
        after = embedder.embed_batch(["known", "unknown"])
    assert sum(billed(simulator)) == answered
    kinds = {error.kind for each in found for error in each.errors.values()}
    assert kinds == {"cancelled"}
    assert sum(len(each) - len(each.errors) for each in found) == answered - 1  # all kept
    assert np.array_equal(after.vectors[0], known)
    assert after.errors[1].kind == "cancelled"
    runs = Ledger(values()["state"]["uri"]).runs()
    assert runs["state"].tolist() == ["cancelled"]
    simulator.change(latency={"base_s": 0})
    with BatchEmbedder(values()) as again:
        for kind in range(6):
            again.embed_batch(texts(20, f"kind{kind}"))
    assert sum(billed(simulator)) == 6 * 20 + 1


# Streams


def test_a_stream_gives_all_in_order_and_its_last_progress_is_complete(
    tmp_path: Path, lexical: Lexical
) -> None:
    many, told = texts(1000), list[StreamProgress]()
    limits = {"texts_per_request": 16, "concurrency": 4}
    with BatchEmbedder(local(tmp_path, limits=limits)) as embedder:
        parts = list(embedder.stream(iter(many), told.append))
    assert [part.start for part in parts] == list(range(0, 1000, 32))
    vectors = np.concatenate([part.found.vectors for part in parts])
    assert np.array_equal(vectors, expected(many, lexical))
    assert [part.progress for part in parts] == told
    assert [each.batches_processed for each in told] == list(range(1, len(parts) + 1))
    assert [each.completed for each in told] == [*range(32, 1000, 32), 1000]
    assert {each.total for each in told[:-1]} == {None}
    assert (told[-1].completed, told[-1].total, told[-1].eta) == (1000, 1000, 0)
    assert told[-1].api_calls == 63


def test_a_stream_of_known_length_says_how_long_it_will_take(tmp_path: Path) -> None:
    with BatchEmbedder(local(tmp_path, limits={"texts_per_request": 16})) as embedder:
        told = [part.progress for part in embedder.stream(texts(200))]
    assert {each.total for each in told} == {200}
    for each in told:
        assert each.rate == pytest.approx(each.completed / each.seconds)
        assert each.eta == pytest.approx((200 - each.completed) / each.rate)


def test_a_file_is_a_text_a_line_and_what_is_no_text_is_counted(
    tmp_path: Path, lexical: Lexical
) -> None:
    file = tmp_path / "lines.txt"
    file.write_bytes(b"alpha\n\nbeta\r\n\xff\xfe\n   \ngamma")
    with BatchEmbedder(local(tmp_path / "state")) as embedder:
        (part,) = embedder.stream(file)
        report = embedder.report()
    assert part.found.texts == ["alpha", "", "beta", None, "   ", "gamma"]
    assert part.found.to_arrow().column("text").null_count == 1
    kinds = {at: error.kind for at, error in part.found.errors.items()}
    assert kinds == {1: "blank", 3: "not text", 4: "blank"}
    assert np.array_equal(
        part.found.vectors[[0, 2, 5]], expected(["alpha", "beta", "gamma"], lexical)
    )
    progress = part.progress
    assert (progress.completed, progress.total, progress.failed) == (6, 6, 3)
    assert report.error_categories == {"blank": 2, "not text": 1}


def test_a_folder_is_the_chunks_of_its_documents(tmp_path: Path) -> None:
    folder = tmp_path / "code"
    folder.mkdir()
    (folder / "a.py").write_text("def wolf():\n    return 1\n")
    (folder / "b.md").write_text("# Foxes\n\nTwo of them.\n")
    (folder / "c.bin").write_bytes(bytes(range(256)))
    with BatchEmbedder(local(tmp_path / "state")) as embedder:
        stream = embedder.stream(folder)
        found = [text for part in stream for text in part.found.texts]
    assert [str(text).strip() for text in found] == [
        "def wolf():\n    return 1",
        "# Foxes\n\nTwo of them.",
    ]
    assert sum(stream.notes.skipped.values()) == 1


def test_the_chunks_of_a_folder_get_what_stands_in_front_of_texts(
    tmp_path: Path, lexical: Lexical
) -> None:
    folder = tmp_path / "docs"
    folder.mkdir()
    (folder / "b.md").write_text("# Foxes\n\nTwo of them.\n")
    made = local(tmp_path / "state")
    made["embedding"] |= {"prepend": ["document", "title"]}
    with BatchEmbedder(made) as embedder:
        (part,) = embedder.stream(folder)
        given = embedder.embed("Two of them.")
    (text,) = part.found.texts
    assert str(text).startswith("document: b.md\ntitle: Foxes\n\n# Foxes")
    assert np.array_equal(part.found.vectors, expected([str(text)], lexical))
    assert np.array_equal(given, expected(["Two of them."], lexical)[0])  # as it was given


def test_a_path_where_nothing_is_is_told(tmp_path: Path) -> None:
    with (
        BatchEmbedder(local(tmp_path)) as embedder,
        pytest.raises(SettingsError, match=r"nowhere\.txt cannot be read: No such file"),
    ):
        embedder.stream(tmp_path / "nowhere.txt")


def test_a_stream_may_be_read_by_async_code(values: Values, simulator: Simulator) -> None:
    simulator.change(latency={"base_s": 0.3})

    async def read(embedder: BatchEmbedder) -> tuple[list[StreamPart], int]:
        parts, beats, done = list[StreamPart](), 0, asyncio.Event()

        async def beat() -> None:
            nonlocal beats
            while not done.is_set():
                await asyncio.sleep(0.02)
                beats += 1

        beating = asyncio.create_task(beat())
        async for part in embedder.stream(texts(60)):
            parts.append(part)
        done.set()
        await beating
        return parts, beats

    with BatchEmbedder(values(limits={"texts_per_request": 5, "concurrency": 2})) as embedder:
        parts, beats = asyncio.run(read(embedder))
    assert sum(len(part.found) for part in parts) == 60
    assert beats >= 30


def test_who_stops_reading_a_stream_stops_its_calls(values: Values, simulator: Simulator) -> None:
    limits = {"texts_per_request": 5, "concurrency": 2}
    with BatchEmbedder(values(limits=limits)) as embedder:
        for part in embedder.stream(texts(10_000)):
            assert len(part.found) == 10
            break
    assert sum(billed(simulator)) <= 30


def test_a_stream_reads_no_further_than_it_embeds(tmp_path: Path) -> None:
    taken = 0

    def many() -> Iterator[str]:
        nonlocal taken
        for text in texts(2000):
            taken += 1
            yield text

    with BatchEmbedder(local(tmp_path, limits={"texts_per_request": 10})) as embedder:
        for part in embedder.stream(many()):
            assert taken <= part.progress.completed + 3 * 40


# Memory, report, ledger


@given(st.integers(1, 2000), st.integers(1, 4000), st.sampled_from([64, 1024, 8192]))
def test_the_estimate_is_texts_and_vectors_and_a_quarter(
    count: int, characters: int, vector_bytes: int
) -> None:
    whole = COPIES * (count * vector_bytes + 2 * characters)
    assert estimated_bytes(count, characters, vector_bytes) == int(OVERHEAD * whole)
    assert OVERHEAD == 1.25


def test_a_memory_limit_makes_calls_smaller_instead_of_failing(
    values: Values, simulator: Simulator
) -> None:
    many = [text * 200 for text in texts(200)]  # about 10 kB each
    with BatchEmbedder(values(limits={"concurrency": 2}), memory_mb=4) as embedder:
        found = embedder.embed_batch(many)
        report = embedder.report()
    assert found.errors == {}
    assert sum(billed(simulator)) == 200
    one = estimated_bytes(1, len(many[0]), 4 * DIMENSION)
    assert max(billed(simulator)) == pytest.approx(2 * 2**20 / 2 / one, abs=1.01)
    assert report.memory_limit_bytes == 4 * 2**20
    assert report.memory_estimate_bytes > 4 * 2**20
    assert report.peak_memory_bytes > 4 * 2**20


def test_the_report_has_all_its_figures(values: Values, simulator: Simulator) -> None:
    simulator.add(Rule(marker="poison", status=400))
    simulator.change(latency={"base_s": 0.05})
    some = [*texts(20), " ", BAD]
    with BatchEmbedder(values()) as embedder:
        embedder.embed_batch(some)
        embedder.embed_batch(texts(30))
        report, summary = embedder.report(), embedder.report().summary()
    requests = simulator.ledger.requests
    tokens = sum(each.billed_tokens for each in requests)
    assert (report.total_texts, report.successful_texts, report.failed_texts) == (52, 50, 2)
    assert report.success_rate == pytest.approx(50 / 52)
    assert report.error_categories == {"blank": 1, "refused": 1}
    assert report.total_characters == sum(map(len, [*some, *texts(30)]))
    assert report.tokens_billed == tokens > 0
    assert report.tokens_estimated == pytest.approx(tokens, rel=0.5)
    assert report.usd == pytest.approx(tokens * 0.06 / 1e6)
    assert (report.batches_processed, report.average_batch_texts) == (2, 26)
    seconds = report.processing_time_seconds
    assert report.average_batch_seconds == pytest.approx(seconds / 2, rel=0.1)
    assert report.texts_per_second == pytest.approx(52 / seconds)
    assert report.tokens_per_second == pytest.approx(tokens / seconds)
    assert (report.batch_size, report.errors) == (52, 2)
    assert report.cache_hits == 20
    assert report.cache_hit_rate == pytest.approx(20 / 52)
    assert (report.api_calls, report.calls_saved) == (len(requests), 52 - len(requests))
    assert report.avg_latency_ms >= 50
    assert report.concurrent_workers == 8
    assert 0 < report.worker_utilization <= 1
    assert (report.memory_limit_bytes, report.peak_memory_bytes > 2**20) == (None, True)
    assert report.memory_estimate_bytes == estimated_bytes(30, len("".join(texts(30))), 1024)
    lines = summary.splitlines()
    assert lines[0] == "52 texts: 50 embedded (96.2%), 2 failed (1 blank, 1 refused)"
    assert lines[1].startswith(f"20 from the cache (38.5%), {len(requests)} calls, ")
    assert lines[2] == f"{tokens:,} tokens billed, {usd_text(tokens * 0.06 / 1e6)}"


def test_the_ledger_holds_the_run_and_each_of_its_calls(
    values: Values, simulator: Simulator
) -> None:
    with BatchEmbedder(values()) as embedder:
        embedder.embed_batch(texts(30))
        embedder.embed("a wolf")
    ledger = Ledger(values()["state"]["uri"])
    (run,) = ledger.runs().to_dict("records")
    tokens = sum(each.billed_tokens for each in simulator.ledger.requests)
    assert (run["name"], run["state"], run["texts.embedded"]) == ("embedder", "completed", 31)
    assert run["tokens.billed"] == ledger.calls()["tokens_billed"].sum() == tokens
    assert list((Path(values()["state"]["uri"]) / "runs").iterdir()) == []


def test_vectors_are_folded_as_they_come_and_stay_at_hand(
    tmp_path: Path, lexical: Lexical, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("tasks.flights.FOLD_BYTES", 100 * 4 * DIMENSION)
    many = texts(1000)
    with BatchEmbedder(local(tmp_path, limits={"texts_per_request": 20})) as embedder:
        first = embedder.embed_batch(many)
        assert len(list((tmp_path / "runs").glob("*/answers/*"))) < 20
        again = embedder.embed_batch(many)
    assert again.cached.all()
    assert np.array_equal(first.vectors, expected(many, lexical))
    assert np.array_equal(again.vectors, first.vectors)


class FailingFold:
    """The disk does not take the cache for a while."""

    def __init__(self, real: Callable[..., int]) -> None:
        self.real, self.fails, self.failed = real, False, threading.Event()
        self.kept = 0

    def __call__(self, *args: Any) -> int:
        if self.fails:
            self.failed.set()
            raise StorageFailed("The disk is full.")
        kept = self.real(*args)
        self.kept += kept
        return kept


def test_where_the_cache_takes_nothing_no_more_is_paid_and_what_was_is_kept(
    values: Values, simulator: Simulator, monkeypatch: pytest.MonkeyPatch
) -> None:
    disk = FailingFold(fold)
    monkeypatch.setattr("tasks.flights.fold", disk)
    monkeypatch.setattr("tasks.flights.FOLD_BYTES", 1)
    with BatchEmbedder(values()) as embedder:
        embedder.embed_batch(texts(6))
        until(lambda: disk.kept >= 6)  # its folds are done behind its back
        disk.fails = True
        with suppress(StorageFailed):  # its fold fails behind its back, mostly when all is told
            embedder.embed_batch(texts(6, "kind0"))
        assert disk.failed.wait(20)
        time.sleep(0.3)
        for _ in range(2):
            with pytest.raises(StorageFailed, match="The disk is full"):
                embedder.embed_batch(texts(6, "other"))
        sent = sum(billed(simulator))
        assert sent == 12
        disk.fails = False
    with BatchEmbedder(values()) as again:
        assert again.embed_batch(texts(6)).cached.all()
        assert again.embed_batch(texts(6, "kind0")).cached.all()
    assert sum(billed(simulator)) == sent


@pytest.mark.usefixtures("heeded")
def test_ctrl_c_while_it_ends_sends_nothing_more_and_is_in_the_ledger(
    values: Values, simulator: Simulator
) -> None:
    simulator.change(latency={"base_s": 0.3})
    limits = {"concurrency": 1, "texts_per_request": 5}

    def press() -> None:
        while len(simulator.ledger.requests) < 2:
            time.sleep(0.01)
        os.kill(os.getpid(), signal.SIGINT)

    def end() -> None:
        with BatchEmbedder(values(limits=limits)) as embedder:
            embedder.submit(texts(100))
            threading.Thread(target=press).start()

    with pytest.raises(KeyboardInterrupt):
        end()
    sent = len(simulator.ledger.requests)
    assert sent <= 10  # of 20
    time.sleep(0.5)
    assert len(simulator.ledger.requests) == sent
    state = values()["state"]["uri"]
    assert Ledger(state).runs()["state"].tolist() == ["cancelled"]
    assert list((Path(state) / "runs").iterdir()) == []


def test_ctrl_c_cannot_hit_a_lock_that_an_answer_waits_for(
    values: Values, simulator: Simulator
) -> None:
    simulator.change(latency={"base_s": 0.2})
    main, seen, asking = threading.main_thread().ident, set[str](), list[bool]()
    assert main is not None

    def look(until: threading.Event) -> None:
        while not until.wait(0.005):
            before = bool(asking)
            where = sys._current_frames()[main].f_code.co_qualname  # noqa: SLF001
            if before and asking:
                seen.add(where)

    with BatchEmbedder(values(limits={"texts_per_request": 5})) as embedder:
        for ask in (embedder.embed_batch, lambda some: list(embedder.stream(some))):
            over = threading.Event()
            looking = threading.Thread(target=look, args=(over,))
            seen.clear()
            looking.start()
            asking.append(True)
            ask(texts(20, f"{ask}"))
            asking.clear()
            over.set()
            looking.join()
            assert "Aside.wait" in seen
            assert not [name for name in seen if name.startswith(("Condition", "Future", "Event"))]


def test_an_embedder_stops_at_its_budget_and_the_next_one_goes_on(
    values: Values, simulator: Simulator
) -> None:
    some = texts(40)
    made = values(limits={"texts_per_request": 5}) | {"budget": {"max_usd": 6e-6}}
    with BatchEmbedder(made) as embedder, pytest.raises(BudgetReached, match=r"budget.max_usd"):
        embedder.embed_batch(some)
    assert 0 < simulator.ledger.totals()["usd"] <= 6.2e-6
    with BatchEmbedder(values(limits={"texts_per_request": 5})) as embedder:
        found = embedder.embed_batch(some)
    assert not found.errors
    assert found.cached.any()
    assert simulator.ledger.totals()["texts_billed_again"] == 0


def test_wrong_ends_and_beginnings_are_told(tmp_path: Path) -> None:
    for wrong in ({"memory_mb": 0}, {"retries": -1}):
        with pytest.raises(ValueError, match="memory_mb must be at least 1"):
            BatchEmbedder(local(tmp_path), **wrong)
    embedder = BatchEmbedder(local(tmp_path))
    with embedder:
        with pytest.raises(RuntimeError, match="open already"):
            embedder.__enter__()
        stream = iter(embedder.stream(texts(10_000)))
        next(stream)
    with pytest.raises(RuntimeError, match="not open"):
        list(stream)
    with pytest.raises(SettingsError, match=r"index: unknown key. Known here: budget, embedding"):
        BatchEmbedder(local(tmp_path, index={"uri": "x", "table": "y"}))


@pytest.mark.slow
def test_many_small_calls_take_time_in_proportion_to_their_number(tmp_path: Path) -> None:
    def seconds(count: int) -> float:
        limits = {"texts_per_request": 10}
        with BatchEmbedder(local(tmp_path / str(count), limits=limits)) as embedder:
            started = time.process_time()
            embedder.embed_batch(texts(count))
            return time.process_time() - started

    seconds(200)
    assert seconds(4000) < 12 * seconds(800)


DIES = """
import os, signal, sys, threading, time
from pathlib import Path
from tasks.embedder import BatchEmbedder
state, base_url = sys.argv[1:]
embedding = {"provider": "voyage", "model": "voyage-4", "dimension": 256, "base_url": base_url}
limits = {"texts_per_request": 10, "concurrency": 2}
def watch():
    while len(list(Path(state).glob("runs/*/answers/*.arrow"))) < 5:
        time.sleep(0.005)
    os.kill(os.getpid(), signal.SIGKILL)
threading.Thread(target=watch, daemon=True).start()
with BatchEmbedder({"embedding": embedding, "limits": limits, "state": {"uri": state}}) as embedder:
    embedder.embed_batch([f"The story of animal number {n} and its house." for n in range(400)])
"""


@pytest.mark.slow
def test_after_a_kill_the_next_one_pays_for_what_is_missing_only(
    values: Values, simulator: Simulator
) -> None:
    simulator.change(latency={"base_s": 0.02})
    state = values()["state"]["uri"]
    command = [sys.executable, "-c", DIES, state, simulator.base_url]
    killed = subprocess.run(command, check=False, env=dict(os.environ))
    assert killed.returncode == -signal.SIGKILL
    time.sleep(0.3)
    with BatchEmbedder(values()) as embedder:
        found = embedder.embed_batch(texts(400))
    assert found.cache_hits >= 50
    assert 400 <= sum(billed(simulator)) <= 400 + 2 * 10
    runs = Ledger(state).runs()
    assert runs["state"].tolist() == ["died", "completed"]


def test_it_serves_many_threads_that_ask_for_all_kinds_of_things(
    tmp_path: Path, lexical: Lexical, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("tasks.flights.FOLD_BYTES", 50 * 4 * DIMENSION)
    failures = list[BaseException]()

    def ask(number: int, embedder: BatchEmbedder) -> None:
        try:
            for turn in range(15):
                some = texts(1 + (7 * number + turn) % 23, f"kind{(number + turn) % 5}")
                assert np.array_equal(embedder.embed_batch(some).vectors, expected(some, lexical))
        except BaseException as error:
            failures.append(error)
            raise

    with BatchEmbedder(local(tmp_path, limits={"texts_per_request": 7})) as embedder:
        threads = [threading.Thread(target=ask, args=(n, embedder)) for n in range(8)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        report = embedder.report()
    assert failures == []
    unique = {text for kind in range(5) for text in texts(23, f"kind{kind}")}
    embedded = Ledger(str(tmp_path)).runs()["texts.embedded"].tolist()
    assert embedded[0] <= len(unique)
    assert report.errors == 0


def test_an_error_inside_the_block_ends_it_and_nothing_more_is_sent(
    values: Values, simulator: Simulator
) -> None:
    simulator.change(latency={"base_s": 0.3})
    limits = {"concurrency": 1, "texts_per_request": 5}
    futures = list[Future[Embeddings]]()

    def fail() -> None:
        with BatchEmbedder(values(limits=limits)) as embedder:
            futures.append(embedder.submit(texts(50)))
            while not simulator.ledger.totals()["max_concurrency"]:
                time.sleep(0.01)
            raise KeyError("mine")

    with pytest.raises(KeyError):
        fail()
    assert sum(billed(simulator)) == 5
    assert len(futures[0].result().errors) == 45
    assert Ledger(values()["state"]["uri"]).runs()["state"].tolist() == ["failed"]
