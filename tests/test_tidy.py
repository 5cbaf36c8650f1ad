"""Index and cache stay within twice their live bytes, and the newest generations readable."""

import itertools
import os
import random
import shutil
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import lancedb
import pytest
from lancedb.table import LanceTable, Table

import tasks.publish
import tasks.storage
import tasks.tidy
from tasks.cache import Cache
from tasks.errors import LockLost
from tasks.index import generations, open_index
from tasks.journal import RunFolder, none_starts
from tasks.keys import hash_column, text_hash
from tasks.ledger import Ledger
from tasks.maintain import maintain
from tasks.params import Config
from tasks.providers.lexical import Lexical
from tasks.rollback import rollback
from tasks.search_indexes import build_search_indexes, text_index
from tasks.shape import bytes_of_folder, shape_of
from tasks.tidy import prune, tidy, tidy_cache

WORDS = [f"word{number:x}" for number in range(5000)]


class Corpus:
    """Texts by id that change day by day, a share of them changed, added and deleted each."""

    def __init__(self, rows: int, words: int = 60) -> None:
        self._random, self._words, self._ids = random.Random(7), words, itertools.count()
        self.texts: dict[str, str] = {}
        self.add(rows)

    def add(self, rows: int) -> None:
        for number in itertools.islice(self._ids, rows):
            self.texts[f"id{number:06}"] = self._text()

    def age(self, rows: int) -> None:
        """Change and delete so many, and add as many."""
        for id_ in self._random.sample(sorted(self.texts), rows):
            self.texts[id_] = self._text()
        for id_ in self._random.sample(sorted(self.texts), rows):
            del self.texts[id_]
        self.add(rows)

    def _text(self) -> str:
        return " ".join(self._random.choices(WORDS, k=self._words))


def index_of(library: Any) -> Table:
    table = open_index(library.config.index)
    assert table is not None
    return table


def cache_of(library: Any, lexical: Lexical) -> Cache:
    return Cache(library.config.state.uri, lexical.space)


def on_disk(config: Config) -> int:
    """Bytes of the index and of its cache."""
    caches = Path(config.state.uri).glob("vectors-*.lance")
    index = Path(config.index.uri) / f"{config.index.table}.lance"
    return sum(bytes_of_folder(str(each)) for each in (index, *caches))


def live(config: Config, folder: Path) -> int:
    """Bytes of the newest generation and the cache, each freshly written."""
    shutil.rmtree(folder, ignore_errors=True)
    fresh, state = lancedb.connect(folder), lancedb.connect(config.state.uri)
    table = open_index(config.index)
    assert table is not None
    written = fresh.create_table("index", table.to_arrow())
    if text_index(table) is not None:
        build_search_indexes(written, config.metric)
    for name in state.list_tables().tables:
        if name.startswith("vectors-"):
            fresh.create_table(name, state.open_table(name).to_arrow())
    return bytes_of_folder(str(folder))


@contextmanager
def watched(config: Config) -> Iterator[list[int]]:
    """The most bytes that index and cache took at any time of the block."""
    most, ended = [0], threading.Event()

    def look() -> None:
        while not ended.wait(0.03):
            most[0] = max(most[0], on_disk(config))

    watcher = threading.Thread(target=look)
    watcher.start()
    try:
        yield most
    finally:
        ended.set()
        watcher.join()
        most[0] = max(most[0], on_disk(config))


@pytest.mark.slow
def test_daily_changes_never_take_more_than_twice_the_live_bytes(
    library: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    corpus, copies = Corpus(600), []
    library.reindex(corpus.texts)
    for day in range(1, 12):
        corpus.age(24)
        way = {4: 0}.get(day, tasks.publish.MERGE_ROWS)
        with monkeypatch.context() as patched, watched(library.config) as most:
            patched.setattr(tasks.publish, "MERGE_ROWS", way)
            library.reindex(corpus.texts)
        bytes_live = live(library.config, tmp_path / "fresh")
        print(f"day {day}: {most[0]:,} bytes at most, {bytes_live:,} live")
        assert most[0] <= 2 * bytes_live
        copies.append(len(shape_of(index_of(library)).copies))
    assert library.texts() == corpus.texts
    assert {1, 2} == set(copies)  # it was written anew, and the old copy went
    kept = [each.number for each in generations(index_of(library))]
    assert kept == list(range(13 - len(kept), 13))
    assert len(kept) >= 2


@pytest.mark.slow
@pytest.mark.timeout(900)
@pytest.mark.parametrize(
    ("days", "maintained"), [(200, False), (60, True)], ids=["left alone", "maintained"]
)
def test_many_daily_runs_never_take_more_than_twice_the_live_bytes(
    library: Any, tmp_path: Path, days: int, maintained: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    corpus = Corpus(2000)
    library.reindex(corpus.texts)
    worst, fewest, merge_rows = 0.0, 5, tasks.publish.MERGE_ROWS
    ways, bytes_live = set(), 0
    for day in range(1, days + 1):
        if day % 7:
            corpus.age(20)
        else:
            corpus.add(20)
        monkeypatch.setattr(tasks.publish, "MERGE_ROWS", merge_rows if day % 10 else 0)
        with watched(library.config) as most:
            ways.add(library.reindex(corpus.texts).published.way)
            if maintained and day % 5 == 0:
                maintain(library.config)
        if day % 5 == 1 or most[0] > 1.95 * bytes_live:  # it grows from day to day
            bytes_live = live(library.config, tmp_path / "fresh")
        worst = max(worst, most[0] / bytes_live)
        kept = generations(index_of(library))
        fewest = min(fewest, len(kept)) if day > 5 else fewest
        for each in kept if day % 10 == 0 else ():
            table = index_of(library)
            table.checkout(each.version)
            assert table.count_rows() > 1900
        if day % 20 == 0:
            print(f"day {day}: {most[0]:,} bytes at most, {bytes_live:,} live, worst {worst:.3f}")
    print(f"worst {worst:.3f} times the live bytes, {fewest} generations kept at least")
    assert library.texts() == corpus.texts
    assert ways == {"add", "merge", "overwrite"}
    assert worst <= 2
    assert fewest >= 2


@pytest.fixture
def no_floor(monkeypatch: pytest.MonkeyPatch) -> None:
    """The small tables of these tests are worth tidying."""
    monkeypatch.setattr(tasks.tidy, "FLOOR", 0)


def numbered(count: int, word: str = "word") -> dict[str, str]:
    return {f"id{number}": f"{word} {number}" for number in range(count)}


def test_a_run_that_changes_nothing_makes_no_version(library: Any, no_floor: None) -> None:
    library.reindex(numbered(20))
    library.reindex(numbered(20, "other"))
    before = index_of(library).list_versions()
    assert library.reindex(numbered(20, "other")).published.way == "none"
    assert index_of(library).list_versions() == before


def test_the_newest_generations_stay_readable_as_they_were(library: Any) -> None:
    library.settings = {"keep_generations": 3}
    for generation in range(1, 6):
        library.reindex(numbered(20, f"text{generation}"))
    table = index_of(library)
    assert [each.number for each in generations(table)] == [3, 4, 5]
    for each in generations(table):
        table.checkout(each.version)
        words = {text.split()[0] for text in table.to_arrow().column("text").to_pylist()}
        assert words == {f"text{each.number}"}


def test_pruning_drops_what_is_older_and_nothing_else(library: Any) -> None:
    for generation in range(1, 5):
        library.reindex(numbered(20, f"text{generation}"))
    table = index_of(library)
    known = generations(table)
    for gone in known[:2]:
        table.tags.delete(f"gen-{gone.number}")
    prune(table, known[2].version, library.config.index, "mine")
    versions = {each["version"] for each in table.list_versions()}
    assert versions >= {known[2].version, known[3].version}
    assert versions.isdisjoint({known[0].version, known[1].version})
    table.checkout(known[2].version)
    assert table.to_arrow().column("text").to_pylist()[0].startswith("text3")


def test_a_prune_leaves_the_fragment_of_the_last_rewrite_alone(
    library: Any, no_floor: None
) -> None:
    library.reindex(numbered(200))
    table = index_of(library)
    tasks.tidy.rewrite(table, library.config.index, "mine")
    base = table.search().with_row_id(True).select(["id"]).limit(1).to_list()[0]
    texts = numbered(200)
    for number in range(4):
        texts |= {f"id{number}": "changed", f"new{number}": "added"}
        library.reindex(texts)
    table = index_of(library)
    assert shape_of(table).fragments == 5
    prune(table, generations(table)[-1].version, library.config.index, "mine")
    assert shape_of(table).fragments == 2
    first = table.search().with_row_id(True).select(["id"]).limit(1).to_list()[0]
    assert first["_rowid"] >> 32 == base["_rowid"] >> 32
    assert library.texts() == texts


def test_a_tidying_that_fails_does_not_fail_the_run(
    library: Any, no_floor: None, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def fail(_: object) -> None:
        raise RuntimeError("no disk")

    monkeypatch.setattr(tasks.tidy, "shape_of", fail)
    library.reindex(numbered(20))
    library.reindex(numbered(20, "other"))
    assert library.texts() == numbered(20, "other")
    assert "left for the next run: no disk" in caplog.text


def test_a_cache_that_another_run_has_open_is_left_alone(library: Any, lexical: Lexical) -> None:
    for generation in range(3):
        library.reindex(numbered(20, f"text{generation}"))
    theirs = cache_of(library, lexical)
    with RunFolder(library.config.state.uri, "other").alive():
        assert tidy_cache(cache_of(library, lexical), "mine", room=10**9, thorough=True) == []
        vectors = theirs.vectors(hash_column([text_hash("text0 7")]))
        assert vectors[0].as_py() == lexical.embed(["text0 7"]).vectors[0].tolist()
    (done,) = tidy_cache(cache_of(library, lexical), "mine", room=10**9, thorough=True)
    assert "cache compacted, 3 fragments" in done
    table = cache_of(library, lexical).table()
    assert table is not None
    assert len(table.list_versions()) == 1


def test_no_run_starts_while_none_may(library: Any) -> None:
    state, order = library.config.state.uri, []

    def start() -> None:
        with RunFolder(state, "other").alive():
            order.append("started")

    other = threading.Thread(target=start)
    with none_starts(state) as alone:
        assert alone
        other.start()
        time.sleep(0.2)
        order.append("ended")
    other.join()
    assert order == ["ended", "started"]
    with RunFolder(state, "other").alive(), none_starts(state) as alone:
        assert not alone
    with RunFolder(state, "mine").alive(), none_starts(state, "mine") as alone:
        assert alone


@pytest.mark.slow
def test_tidying_thoroughly_twice_does_nothing_the_second_time(
    library: Any, lexical: Lexical
) -> None:
    texts: Mapping[str, str] = numbered(50)
    for number in range(9):
        texts = {**texts, f"new{number}": f"added {number}"}
        library.reindex(texts)
    first = tidy(library.config.index, cache_of(library, lexical), "mine", thorough=True)
    version = index_of(library).version
    assert any("written into one" in each for each in first)
    assert tidy(library.config.index, cache_of(library, lexical), "mine", thorough=True) == []
    assert index_of(library).version == version
    assert library.texts() == texts


# What a power cut, a lost lease and a reader find


def unsynced(folder: Path, synced: set[tuple[int, int]]) -> list[str]:
    """Files below `folder` that no fsync has put on disk as they are."""
    files = {each: each.stat() for each in folder.rglob("*") if each.is_file()}
    return [str(each) for each, s in files.items() if (s.st_ino, s.st_mtime_ns) not in synced]


@pytest.mark.slow
def test_nothing_goes_before_what_stays_is_on_disk(
    library: Any, no_floor: None, call_of: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    synced, lost, pruned = set(), list[str](), set[str]()
    fsync, optimize = os.fsync, LanceTable.optimize

    def seen_fsync(file: int) -> None:
        fsync(file)
        synced.add((os.fstat(file).st_ino, os.fstat(file).st_mtime_ns))

    def seen_optimize(table: LanceTable, **options: Any) -> Any:
        if options["cleanup_older_than"] < tasks.tidy.FOREVER:
            pruned.add(table.name.split("-")[0])
            lost.extend(unsynced(Path(table.uri), synced))
        return optimize(table, **options)

    monkeypatch.setattr(os, "fsync", seen_fsync)
    monkeypatch.setattr(LanceTable, "optimize", seen_optimize)
    library.settings = {"keep_generations": 2}
    ledger = Ledger(library.config.state.uri)
    for number in range(12):
        library.reindex(numbered(20 + number, f"text{number // 4}"))
        ledger.record_calls([call_of(batch=number)])
    done = maintain(library.config, prune_cache=0).done
    assert any("forgotten" in each for each in done)
    tasks.tidy.rewrite(index_of(library), library.config.index, "mine")
    assert pruned == {"t", "vectors", "calls"}
    assert lost == []
    index = Path(library.config.index.uri) / "t.lance"
    assert unsynced(index, synced) == []


STEPS: dict[str, Callable[[Any, Table], object]] = {
    "give up": lambda config, table: tasks.tidy.keep_newest(table, config.index, "mine"),
    "prune": lambda config, table: prune(table, table.version, config.index, "mine"),
    "rewrite": lambda config, table: tasks.tidy.rewrite(table, config.index, "mine"),
    "cover": lambda config, _: tasks.tidy.cover(config.index, "mine"),
    "roll back": lambda config, _: rollback(config),
    "maintain": lambda config, _: maintain(config),
}


@pytest.mark.parametrize("step", STEPS)
def test_who_has_lost_the_index_leaves_it_alone(
    library: Any, no_floor: None, step: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    for number in range(3):
        library.reindex(numbered(20, f"text{number}"))
    library.settings = {"keep_generations": 1}
    table = index_of(library)

    def lost(*_: object) -> None:
        raise LockLost("another run has taken it over")

    monkeypatch.setattr(tasks.storage.Storage, "require_held", lost)
    before = table.list_versions(), generations(table)
    with pytest.raises(LockLost):
        STEPS[step](library.config, table)
    table = index_of(library)
    assert (table.list_versions(), generations(table)) == before


@pytest.mark.parametrize("local", [True, False], ids=["folder", "object store"])
def test_what_a_living_writer_may_own_goes_only_where_none_can_live(
    library: Any, local: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    library.reindex(numbered(20))
    table = index_of(library)
    written = Path(library.config.index.uri) / "t.lance" / "data" / f"{'0' * 50}.lance"
    shutil.copy(next(written.parent.iterdir()), written)
    os.utime(written, (time.time() - 3600,) * 2)
    monkeypatch.setattr(tasks.tidy, "is_local", lambda _: local)
    prune(table, table.version, library.config.index, "mine")
    assert written.exists() != local


def test_who_reads_the_newest_generation_goes_on_through_the_next_publish(
    library: Any, lexical: Lexical, no_floor: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    library.reindex(numbered(200))
    texts = {**numbered(200), **numbered(50, "changed")}
    library.reindex(texts)
    reader = index_of(library)
    tasks.tidy.rewrite(index_of(library), library.config.index, "mine")
    assert len(shape_of(index_of(library)).copies) == 2
    monkeypatch.setattr(tasks.tidy, "DISK_FACTOR", 0.0)  # there is no room at all
    cache = cache_of(library, lexical)
    tasks.tidy.make_room(library.config.index, cache, "mine", writes=None, leaves=200)
    rows = reader.search().select(["id", "text"]).limit(500).to_list()
    assert {row["id"]: row["text"] for row in rows} == texts
    assert generations(index_of(library))[-1].version == reader.version
