"""Maintain says what it did, keeps what is needed, and readers never notice."""

import threading
from collections.abc import Callable
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Self

import pytest
from prefect.client.orchestration import get_client
from prefect.client.schemas.filters import ArtifactFilter, ArtifactFilterKey

import tasks.publish
import tasks.search_indexes
import tasks.tidy
from tasks.cache import REMEMBERED_AT, Cache
from tasks.errors import EmbedOnceError, IndexHeld
from tasks.index import generations, held, open_index
from tasks.journal import RunFolder
from tasks.keys import hash_column, text_hash
from tasks.ledger import Ledger
from tasks.maintain import Maintained, maintain, prune_caches
from tasks.providers.lexical import Lexical
from tasks.rollback import rollback
from tasks.run import Clock, about_run


def numbered(count: int, word: str = "word") -> dict[str, str]:
    return {f"id{number}": f"{word} {number}" for number in range(count)}


def test_the_flow_returns_and_shows_what_was_done(library: Any, prefect_api: str) -> None:
    from flows.maintain import maintain as flow  # noqa: PLC0415 - imports Prefect

    for number in range(4):
        library.reindex(numbered(20, f"text{number}"))
    file = library.folder / "t.yaml"
    file.write_text(library.config.model_dump_json(exclude_none=True), encoding="utf-8")
    done = flow(str(file), settings=["index.keep_generations=2"])
    assert done.kept == (3, 4)
    assert "generations given up: 1, 2" in done.done
    assert done.index_bytes is not None
    assert done.index_bytes[1] < done.index_bytes[0]
    with get_client(sync_client=True) as client:
        (shown,) = client.read_artifacts(
            artifact_filter=ArtifactFilter(key=ArtifactFilterKey(any_=["maintain-t"]))
        )
    assert "| generations kept | 3, 4 |" in str(shown.data)
    assert f"{done.index_bytes[1]:,} bytes, before {done.index_bytes[0]:,}" in str(shown.data)
    assert library.texts() == numbered(20, "text3")


@pytest.mark.slow
def test_maintenance_makes_no_generation(library: Any) -> None:
    texts = numbered(50)
    for number in range(10):
        texts |= {f"new{number}": "added"}
        library.reindex(texts)
    before = library.texts()
    done = maintain(library.config)
    table = open_index(library.config.index)
    assert table is not None
    assert any("written into one" in each for each in done.done)
    assert table.stats()["fragment_stats"]["num_fragments"] == 1  # type: ignore[index]
    assert [each.number for each in generations(table)] == list(done.kept) == [6, 7, 8, 9, 10]
    assert library.texts() == before
    assert library.reindex(texts).published.generation == 10
    assert library.reindex(numbered(50)).published.generation == 11


def test_the_small_tables_of_the_state_are_compacted(
    library: Any, call_of: Callable[..., Any]
) -> None:
    library.reindex(numbered(3))
    ledger = Ledger(library.config.state.uri)
    for batch in range(12):
        ledger.record_calls([call_of(batch=batch)])
    assert "calls compacted" in maintain(library.config).done
    assert sorted(ledger.calls()["batch"]) == list(range(12))


def test_an_index_that_a_run_holds_is_left_alone(library: Any) -> None:
    library.reindex(numbered(3))
    with held(library.config.index, "other"), pytest.raises(IndexHeld, match="other"):
        maintain(library.config)


# The cache


def holds(library: Any, lexical: Lexical, *texts: str) -> list[bool]:
    cache = Cache(library.config.state.uri, lexical.space)
    return [bool(cache.holds(hash_column([text_hash(text)]))[0]) for text in texts]


def recorded(library: Any) -> None:
    """A rollback is the cheapest run that the ledger knows."""
    library.reindex({**library.texts(), "extra": "extra"})
    rollback(library.config)


@pytest.mark.slow
def test_only_what_no_kept_generation_of_any_index_uses_is_forgotten(
    library: Any, lexical: Lexical, library_class: Any
) -> None:
    library.settings = {"keep_generations": 2}
    for texts in ({"a": "gone"}, {"a": "kept"}, {"a": "newest"}):
        library.reindex(texts)
    other = library_class(library.folder, library.run, name="other")
    other.reindex({"a": "theirs"})
    recorded(other)
    rollback(library.config)
    paid_for = ("gone", "kept", "newest", "theirs")
    assert prune_caches(library.config, days=1) == []  # nothing is a day old
    assert holds(library, lexical, *paid_for) == [True] * 4
    (done,) = prune_caches(library.config, days=0)
    assert done.startswith("1 vectors of lexical-256-")
    assert holds(library, lexical, *paid_for) == [False, True, True, True]
    assert library.reindex({"a": "gone"}).sent == ["gone"]  # paid for once more
    assert library.reindex({"a": "newest", "b": "theirs"}).sent == []


def test_nothing_is_forgotten_while_a_run_lives(library: Any, lexical: Lexical) -> None:
    library.reindex({"a": "one"})
    recorded(library)
    with (
        RunFolder(library.config.state.uri, "living").alive(),
        pytest.raises(IndexHeld, match=r"going on.*nothing of the cache was dropped"),
    ):
        prune_caches(library.config, days=0)
    assert holds(library, lexical, "one") == [True]


def test_nothing_is_forgotten_that_an_absent_index_may_need(library: Any, lexical: Lexical) -> None:
    library.reindex({"a": "one"})
    recorded(library)
    index = Path(library.config.index.uri)
    index.rename(index.with_name("elsewhere"))
    with pytest.raises(EmbedOnceError, match="is not there, so nobody can tell"):
        prune_caches(library.config, days=0)
    index.mkdir()
    prune_caches(library.config, days=0)
    assert holds(library, lexical, "one") == [False]


def test_what_came_before_ages_were_kept_stays(
    library: Any, lexical: Lexical, paid: Callable[..., Any]
) -> None:
    library.reindex({"a": "old"})
    table = Cache(library.config.state.uri, lexical.space).table()
    assert table is not None
    table.drop_columns([REMEMBERED_AT.name])
    assert prune_caches(library.config, days=0) == []
    cache = Cache(library.config.state.uri, lexical.space)
    assert cache.remember([paid("new")]) == 1
    prune_caches(library.config, days=0)
    assert holds(library, lexical, "old", "new") == [True, False]
    assert library.reindex({"a": "old", "b": "old"}).sent == []


def test_what_the_own_index_uses_stays_though_no_run_of_it_is_known(
    library: Any, lexical: Lexical
) -> None:
    library.reindex({"a": "one"})
    assert len(Ledger(library.config.state.uri).runs()) == 0
    assert prune_caches(library.config, days=0) == []
    assert holds(library, lexical, "one") == [True]


def test_an_index_that_cannot_be_read_is_named_and_nothing_forgotten(
    library: Any, lexical: Lexical, library_class: Any
) -> None:
    library.reindex({"a": "one"})
    other = library_class(library.folder, library.run, name="other")
    other.reindex({"a": "theirs"})
    recorded(other)
    for manifest in (library.folder / "index" / "other.lance" / "_versions").iterdir():
        manifest.write_bytes(b"")
    with pytest.raises(EmbedOnceError, match=r"could not read the index .*/other.*of the cache"):
        prune_caches(library.config, days=0)
    assert holds(library, lexical, "one", "theirs") == [True, True]


def test_runs_that_died_are_told_of_and_their_answers_kept(
    library: Any, lexical: Lexical, died: type[Exception], call_of: Callable[..., Any]
) -> None:
    library.reindex({"a": "one"})
    folder = RunFolder(library.config.state.uri, "dead")
    about = about_run(library.config, lexical.space, "dead", Clock(datetime.now(tz=UTC)))

    def die() -> None:
        answer = hash_column([text_hash("two")]), lexical.embed(["two"]).vectors
        with folder.alive(about):
            folder.write_answer(*answer, lexical.space, call_of("dead"))
            raise died

    with pytest.raises(died):
        die()
    maintain(library.config)
    runs = Ledger(library.config.state.uri).runs()
    assert [(row["run_id"], row["state"]) for _, row in runs.iterrows()] == [("dead", "died")]
    assert holds(library, lexical, "two") == [True]


def test_sizes_that_nobody_knows_are_not_told() -> None:
    done = Maintained("t", (), (1,), index_bytes=None, state_bytes=(7_000, 5_000))
    assert done.rows() == [
        ("done", "nothing was due"),
        ("generations kept", "1"),
        ("state", "5,000 bytes, before 7,000"),
    ]


# Readers


class Polling:
    """A reader that opens the index again and again, and one that holds what it has opened."""

    def __init__(self, library: Any) -> None:
        self._library, self._ended = library, threading.Event()
        self.seen: list[dict[str, str]] = []
        self.failed: list[BaseException] = []
        self._holder = open_index(library.config.index)

    def __enter__(self) -> Self:
        self._thread = threading.Thread(target=self._poll)
        self._thread.start()
        return self

    def _poll(self) -> None:
        try:
            while not self._ended.is_set():
                texts = self._library.texts()
                if texts not in self.seen:
                    self.seen.append(texts)
        except BaseException as error:  # noqa: BLE001 - told by the test
            self.failed.append(error)

    def __exit__(self, *_: object) -> None:
        self._ended.set()
        self._thread.join()

    def held(self) -> dict[str, str]:
        assert self._holder is not None
        rows = self._holder.search().select(["id", "text"]).limit(10**6).to_list()
        return {row["id"]: row["text"] for row in rows}


@pytest.mark.parametrize("way", ["add", "merge", "overwrite", "rollback", "maintain"])
def test_readers_see_whole_generations_whatever_happens(
    library: Any, way: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tasks.tidy, "FLOOR", 0)
    monkeypatch.setattr(tasks.search_indexes, "TEXT_ROWS", 10)
    first, second = numbered(100), {**numbered(100), "id3": "changed"}
    library.reindex(first)
    library.reindex(second)
    after = {
        "add": {**second, "new": "added"},
        "merge": {**second, "id4": "changed", "new": "added"},
        "overwrite": numbered(90, "other"),
        "rollback": first,
        "maintain": second,
    }[way]
    with Polling(library) as reader:
        if way == "rollback":
            rollback(library.config)
        elif way == "maintain":
            maintain(library.config)
        else:
            monkeypatch.setattr(tasks.publish, "MERGE_ROWS", 0 if way == "overwrite" else 2**30)
            assert library.reindex(after).published.way == way
            maintain(library.config)
    assert reader.failed == []
    assert library.texts() == after
    assert all(seen in (second, after) for seen in reader.seen)
    assert reader.held() == second
