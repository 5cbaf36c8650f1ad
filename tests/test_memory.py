"""A run keeps to its memory: what it holds at once follows from the limit, not from the corpus."""

import itertools
import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
from hypothesis import given
from hypothesis import strategies as st

import tasks.memory
from tasks.cache import caches
from tasks.errors import SettingsError
from tasks.form import Overrides
from tasks.limits import Limits
from tasks.memory import (
    BASE_MB,
    FEWEST_MB,
    FLYING_MB,
    LEAST_MB,
    MOST,
    OTHERS_MB,
    default_mb,
    estimated_bytes,
    in_flight_mb,
    sizes_for,
    within,
)
from tasks.params import Config
from tasks.providers.lexical import Lexical
from tasks.survey import survey

CORPUS = 12_000
ENOUGH_MB = BASE_MB + FLYING_MB + OTHERS_MB


def lexical(texts: int, concurrency: int = 8) -> Lexical:
    return Lexical(1024, Limits(None, None, texts, None, concurrency))


def test_more_memory_than_makes_a_run_faster_makes_no_piece_larger() -> None:
    assert sizes_for(ENOUGH_MB, 0) == MOST
    more = sizes_for(100_000, 1_000_000)
    assert (more.flying, more.folded, more.written) == (MOST.flying, MOST.folded, MOST.written)
    assert (more.kept, more.grown) == (MOST.kept, MOST.grown)


def test_less_memory_or_more_chunks_make_all_pieces_smaller() -> None:
    whole, half = sizes_for(ENOUGH_MB, 0), sizes_for((BASE_MB + ENOUGH_MB) // 2, 0)
    assert whole.share == 1
    assert half.share == pytest.approx(1 / 2)
    assert half.flying == pytest.approx(whole.flying / 2, rel=0.01)
    assert half.folded == pytest.approx(whole.folded / 2, rel=0.01)
    assert half.written == pytest.approx(whole.written / 2, rel=0.01)
    assert sizes_for(ENOUGH_MB, 1_000_000).share < whole.share


def test_calls_that_take_little_leave_more_to_all_else() -> None:
    limit = BASE_MB + 200
    few, many = (
        sizes_for(limit, 0, in_flight_mb(lexical(1000, calls), 100, 100 * 800)) for calls in (1, 64)
    )
    assert many == sizes_for(limit, 0)
    assert few.share == 1 > many.share
    assert few.flying < many.flying
    for sizes in (few, many):
        assert sizes.flying / 2**20 + sizes.share * OTHERS_MB == pytest.approx(200, abs=25)


def test_a_corpus_whose_keys_do_not_fit_is_refused_with_what_it_takes() -> None:
    with pytest.raises(SettingsError) as refused:
        sizes_for(800, 3_000_000)
    said = str(refused.value)
    assert said.startswith("limits.memory_mb: 800 MiB are too little for 3,000,000 chunks: ")
    assert "Nothing was sent." in said
    least = int(said.rpartition("Allow at least ")[2].rstrip(".").replace(",", ""))
    assert sizes_for(least + 1, 3_000_000).share == pytest.approx(
        LEAST_MB / (FLYING_MB + OTHERS_MB), 0.02
    )


def test_without_a_limit_it_is_half_of_the_machine() -> None:
    pages = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") // 2**20
    assert FEWEST_MB <= default_mb() <= max(FEWEST_MB, pages // 2)


def test_the_peak_is_that_of_the_process_and_not_of_who_started_it() -> None:
    held = b"x" * 1_000_000_000
    code = "from tasks.memory import peak_bytes; print(peak_bytes())"
    peak = int(
        subprocess.run([sys.executable, "-c", code], check=True, stdout=subprocess.PIPE).stdout
    )
    assert 10_000_000 < peak < len(held)


def test_rows_of_the_index_count_too_and_a_verify_knows_no_limit(
    tmp_path: Path, reindex: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "docs").mkdir()
    for name in ("a", "b", "c"):
        (tmp_path / "docs" / f"{name}.md").write_text(f"a text of {name}")
    config = Config.model_validate(
        {
            "name": "docs",
            "source": {"kind": "files", "path": str(tmp_path / "docs")},
            "embedding": {"provider": "lexical", "dimension": 64},
            "limits": {"memory_mb": ENOUGH_MB},
            "index": {"uri": str(tmp_path / "index"), "table": "t"},
            "state": {"uri": str(tmp_path / "state")},
        }
    )
    reindex(config)
    monkeypatch.setattr(tasks.memory, "KEY_BYTES", 50 * 2**20)
    narrow = survey(config, Overrides(narrow="a.md"), tmp_path / "narrow")
    assert (narrow.keyed.table.rows, narrow.indexed.rows) == (1, 3)
    flying = narrow.sizes.flying_mb
    assert narrow.sizes == sizes_for(ENOUGH_MB, 3, flying) != sizes_for(ENOUGH_MB, 1, flying)
    monkeypatch.setattr(tasks.memory, "KEY_BYTES", 2**40)
    with pytest.raises(SettingsError, match=r"limits\.memory_mb"):
        survey(config, Overrides(), tmp_path / "run")
    assert survey(config, Overrides(), tmp_path / "verify", anew=True).sizes == MOST


@given(
    chunks=st.integers(0, 10**6),
    per_chunk=st.floats(1, 4000),
    texts=st.integers(1, 1000),
    calls=st.integers(1, 8),
)
def test_where_there_is_room_calls_are_as_large_as_they_may_be(
    chunks: int, per_chunk: float, texts: int, calls: int
) -> None:
    provider, size = lexical(texts, calls), int(chunks * per_chunk)
    most = in_flight_mb(provider, chunks, size)
    sizes = sizes_for(100_000, chunks, most)
    assert sizes.share == 1
    if most <= FLYING_MB:
        assert within(sizes, provider, chunks, size) is provider


@pytest.mark.parametrize("concurrency", [1, 8, 64])
def test_calls_in_flight_fit_together(concurrency: int) -> None:
    sizes = sizes_for(700, 10_000)
    provider = within(sizes, lexical(100_000, concurrency), 10_000, 10_000 * 800)
    texts = provider.limits.texts_per_request
    all_calls = concurrency * estimated_bytes(texts, 800 * texts, provider.space.vector_bytes)
    assert 0.7 * sizes.flying < all_calls <= sizes.flying
    assert within(MOST, lexical(10), 10_000, 10_000 * 800).limits.texts_per_request == 10
    assert within(sizes, lexical(10), 0, 0).limits.texts_per_request == 10


def test_a_plan_knows_the_smaller_calls(config: Callable[..., Config], tmp_path: Path) -> None:
    small, large = (
        survey(config(memory_mb), Overrides(), tmp_path / str(memory_mb))
        for memory_mb in (640, None)
    )
    assert small.packed.texts == large.packed.texts
    assert small.packed.batches > large.packed.batches


@pytest.fixture
def config(tmp_path: Path) -> Callable[..., Config]:
    """A corpus of many vectors, most of what a run of it holds."""
    words = np.array([f"word{number}" for number in range(2000)])
    drawn = np.random.default_rng(7).choice(words, (CORPUS, 30))
    frame = pd.DataFrame(
        {"id": [str(n) for n in range(CORPUS)], "text": [" ".join(d) for d in drawn]}
    )
    frame.to_parquet(tmp_path / "c.parquet")

    def make(memory_mb: int | None, concurrency: int = 32) -> Config:
        return Config.model_validate(
            {
                "name": "memory",
                "source": {"kind": "table", "path": str(tmp_path / "c.parquet")},
                "embedding": {"provider": "lexical", "dimension": 2048},
                "limits": {"concurrency": concurrency, "memory_mb": memory_mb},
                "index": {"uri": str(tmp_path / f"index-{memory_mb}-{concurrency}"), "table": "t"},
                "state": {"uri": str(tmp_path / f"state-{memory_mb}-{concurrency}")},
            }
        )

    return make


@pytest.mark.slow
def test_a_run_keeps_to_its_limit(
    config: Callable[..., Config], prefect_api: str, tmp_path: Path
) -> None:
    peaks, commits = dict[tuple[int, int], float](), dict[tuple[int, int], int]()
    for memory_mb, concurrency in ((640, 32), (640, 2), (1536, 32)):
        made = config(memory_mb, concurrency)
        file, report = tmp_path / "config.json", tmp_path / "report.json"
        file.write_text(made.model_dump_json(exclude_none=True))
        command = [sys.executable, "-m", "flows.cli", "reindex", str(file), "--report", str(report)]
        environment = {**os.environ, "PREFECT_API_URL": prefect_api}
        subprocess.run(command, env=environment, check=True, capture_output=True)
        peak = json.loads(report.read_text())["memory"]["peak_bytes"] / 2**20
        (cache,) = caches(made.state.uri)
        table = cache.table()
        assert table is not None
        peaks[memory_mb, concurrency] = peak
        commits[memory_mb, concurrency] = table.version
    print(peaks, commits)
    assert max(peaks[640, 32], peaks[640, 2]) < 640
    assert peaks[640, 32] < peaks[1536, 32]
    assert commits[640, 32] > 2 * commits[1536, 32]


@pytest.mark.skipif(sys.platform != "linux", reason="needs glibc's malloc_trim")
def test_what_is_free_between_pieces_in_use_is_given_back_once_there_is_much_of_it() -> None:
    script = """
import time
import numpy as np
from tasks import memory
memory.spare()
pieces = [np.ones(2**17) for _ in range(600)][::8]
for room_mb in (1000, 20):
    print(memory._resident_bytes())
    with memory.giving_back(memory.Sizes(room_mb=room_mb)):
        time.sleep(4 * memory.LOOK_S)
print(memory._resident_bytes())
"""
    command = [sys.executable, "-c", script]
    done = subprocess.run(command, check=True, capture_output=True, text=True)
    free, enough, given_back = map(int, done.stdout.split())
    assert free == pytest.approx(enough, abs=10e6)
    assert given_back < free - 500e6


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="needs glibc's malloc_trim")
def test_a_cache_that_grows_by_many_commits_holds_no_list_of_each(tmp_path: Path) -> None:
    script = """
import sys
import numpy as np
import pyarrow as pa
from tasks import memory
from tasks.cache import Cache
from tasks.keys import text_hash
from tasks.limits import Limits
from tasks.providers.lexical import Lexical
from tasks.schemas import vectors_schema
memory.spare()
cache = Cache(sys.argv[1], Lexical(64, Limits(None, None, 1, None, 1)).space)
schema = vectors_schema(cache.space.vector_type)
for commit in range(400):
    vector = pa.array([np.ones(64, np.float32)], cache.space.vector_type)
    cache.remember([pa.table([[text_hash(str(commit))], vector], schema=schema)])
    assert len(cache) == commit + 1
    if commit in (99, 399):
        memory.give_back_all()
        print(memory._resident_bytes())
"""
    command = [sys.executable, "-c", script, str(tmp_path)]
    done = subprocess.run(command, check=True, capture_output=True, text=True)
    few, many = map(int, done.stdout.split())
    print(few / 2**20, many / 2**20)
    assert many - few < 40e6


def test_where_no_file_may_be_opened_a_run_goes_on_without_looking() -> None:
    script = """
import resource, time
from tasks import memory
resource.setrlimit(resource.RLIMIT_NOFILE, (0, 0))
memory.give_back_all()
with memory.giving_back(memory.MOST):
    time.sleep(2 * memory.LOOK_S)
print("goes on")
"""
    command = [sys.executable, "-c", script]
    done = subprocess.run(command, check=True, capture_output=True, text=True)
    assert done.stdout == "goes on\n"


LEAVING = """
import gc, json, sys, time
import numpy as np
from flows.reindex import run
from tasks import memory
from tasks.journal import StoredAnswer
from tasks.progress import Progress, listening
config, memory.LOOK_S, patience_s = sys.argv[1], float(sys.argv[2]), float(sys.argv[3])
memory.Sizes.folded = property(lambda sizes: 2 * 4 * 64)  # two of the three answers
stages = {}
def leave_pieces(progress):
    if progress.stage not in stages:
        came = memory._resident_bytes()
        pieces = [np.ones(2**17) for _ in range(600)][::8]
        left = memory._resident_bytes()
        until = time.monotonic() + patience_s * (progress.stage in ("embedding", "publishing"))
        while memory._resident_bytes() > left - 400e6 and time.monotonic() < until:
            pieces.append(np.ones(2**20))  # what free pieces have no room for: it grows
            time.sleep(0.05)
        answers = sum(type(each) is StoredAnswer for each in gc.get_objects())
        stages[progress.stage] = came, left, memory._resident_bytes(), answers, pieces
with listening(leave_pieces):
    run(config)
leave_pieces(Progress("end"))
print(json.dumps({stage: told[:4] for stage, told in stages.items()}))
"""
"""Runs, and at the begin of each stage leaves 525 MB free between pieces in use.

Of each stage it prints what the process held when it began, with those pieces, and once it had
grown for some seconds or what is free was given back; then how many answers there were.
"""


@pytest.fixture
def leaving(prefect_api: str, tmp_path: Path) -> Callable[[float, float], dict[str, list[int]]]:
    """Run LEAVING with a look each so many seconds, growing for so many at most."""
    (tmp_path / "chunks.csv").write_text("id,text\na,a wolf\nb,a bear\nc,a lynx\n")
    (tmp_path / "config.yaml").write_text(
        "{name: free, source: {kind: table, path: chunks.csv},"
        " embedding: {provider: lexical, dimension: 64}, limits: {texts_per_request: 1},"
        " index: {uri: index, table: t}, state: {uri: state}}"
    )

    def run(look_s: float, patience_s: float) -> dict[str, list[int]]:
        config = str(tmp_path / "config.yaml")
        command = [sys.executable, "-c", LEAVING, config, str(look_s), str(patience_s)]
        environment = {**os.environ, "PREFECT_API_URL": prefect_api}
        done = subprocess.run(command, env=environment, check=True, capture_output=True, text=True)
        told: dict[str, list[int]] = json.loads(done.stdout.splitlines()[-1])
        assert list(told) == ["reading", "embedding", "publishing", "end"]
        return told

    return run


@pytest.mark.skipif(sys.platform != "linux", reason="needs glibc's malloc_trim")
def test_what_a_stage_leaves_free_is_given_back_before_the_next(
    leaving: Callable[[float, float], dict[str, list[int]]],
) -> None:
    told = leaving(3600, 0)
    for before, after in itertools.pairwise(told):
        assert told[after][0] < told[before][1] - 400e6, told
    assert told["publishing"][3] == 0 < told["embedding"][3]


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="needs glibc's malloc_trim")
def test_what_is_free_is_given_back_while_a_stage_runs(
    leaving: Callable[[float, float], dict[str, list[int]]],
) -> None:
    told = leaving(0.05, 5)
    for stage in ("embedding", "publishing"):
        assert told[stage][2] < told[stage][1] - 400e6, told
