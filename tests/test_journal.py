"""What was paid for outlives whatever happens next, and is taken up exactly once."""

import json
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import lancedb
import numpy as np
import pyarrow as pa
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tasks.cache import Cache
from tasks.errors import EmbedOnceError, IndexHeld
from tasks.journal import (
    RunFolder,
    StoredAnswer,
    fold,
    read_answer,
    unfolded_answers,
    unfolded_hashes,
)
from tasks.keys import hash_column, text_hash
from tasks.notes import Call, Refused
from tasks.providers import Space
from tasks.providers.lexical import Lexical
from tasks.recover import Recovered, recover

ROOT = Path(__file__).parents[1]
WORDS = ["alpha", "beta", "gamma"]
Write = Callable[..., str]
Paid = Callable[..., pa.Table]
Folder = Callable[..., RunFolder]
CallOf = Callable[..., Call]


@pytest.fixture(scope="session")
def write(lexical: Lexical, call_of: CallOf) -> Write:
    """Writes the answer for some texts to a run's journal."""

    def answer(folder: RunFolder, *texts: str, batch: int = 1, provider: Lexical = lexical) -> str:
        vectors = provider.embed(texts).vectors
        call = call_of(folder.run_id, batch)
        return folder.write_answer(hashes(*texts), vectors, provider.space, call).name

    return answer


@pytest.fixture
def cache(tmp_path: Path, lexical: Lexical) -> Cache:
    return Cache(str(tmp_path), lexical.space)


def hashes(*texts: str) -> pa.Array:
    return hash_column([text_hash(text) for text in texts])


def file_of(folder: RunFolder, name: str = "") -> Path:
    """The file of that name in a state that is a folder; the run's own folder without a name."""
    return Path(folder.state_uri) / (name or f"runs/{folder.run_id}")


def vectors_in(cache: Cache, *texts: str) -> Any:
    return cache.vectors(hashes(*texts)).to_pylist()


def expected(provider: Lexical, *texts: str) -> Any:
    return provider.embed(texts).vectors.tolist()


def test_an_answer_comes_back_as_it_was_written(
    tmp_path: Path, write: Write, run_folder: Folder, call_of: CallOf, lexical: Lexical
) -> None:
    folder = run_folder(tmp_path)
    found = read_answer(folder, write(folder, *WORDS, batch=7))
    assert found is not None
    assert found.call == call_of("run", 7)
    assert found.space == lexical.space
    assert found.table.column("text_hash").to_pylist() == hashes(*WORDS).to_pylist()
    assert found.table.column("vector").to_pylist() == expected(lexical, *WORDS)


def test_a_slice_of_vectors_is_written_as_the_slice(
    tmp_path: Path, run_folder: Folder, call_of: CallOf, lexical: Lexical
) -> None:
    vectors = lexical.embed(WORDS).vectors[::-1][:2]
    folder = run_folder(tmp_path)
    answer = folder.write_answer(hashes(*WORDS).slice(1), vectors, lexical.space, call_of())
    found = read_answer(folder, answer.name)
    assert found is not None
    assert found.table.column("vector").to_pylist() == expected(lexical, "gamma", "beta")


def test_answers_come_in_the_order_of_their_batches(
    tmp_path: Path, write: Write, run_folder: Folder
) -> None:
    folder = run_folder(tmp_path)
    names = [write(folder, "alpha", batch=batch) for batch in (10, 2, 1)]
    assert folder.answers == names[::-1]


def test_answers_fold_into_the_cache_in_one_version(
    tmp_path: Path, write: Write, run_folder: Folder, cache: Cache, lexical: Lexical
) -> None:
    folder = run_folder(tmp_path)
    write(folder, "alpha", "beta", batch=1)
    fold(folder, cache)
    before = versions(tmp_path, cache)
    write(folder, "beta", "gamma", batch=2)
    write(folder, "delta", batch=3)
    assert fold(folder, cache) == 2
    assert versions(tmp_path, cache) == before + 1
    assert folder.answers == []
    every = [*WORDS, "delta"]
    assert vectors_in(cache, *every) == expected(lexical, *every)


def at_hand(folder: RunFolder, *names: str) -> list[StoredAnswer]:
    return [answer for name in names if (answer := read_answer(folder, name)) is not None]


def versions(state: Path, cache: Cache) -> int:
    return len(lancedb.connect(str(state)).open_table(cache.name).list_versions())


def test_only_the_chosen_answers_are_folded(
    tmp_path: Path, write: Write, run_folder: Folder, cache: Cache
) -> None:
    folder = run_folder(tmp_path)
    first, second = write(folder, "alpha"), write(folder, "beta", batch=2)
    assert fold(folder, cache, at_hand(folder, first)) == 1
    assert folder.answers == [second]
    assert fold(folder, cache, []) == 0


def test_an_answer_of_another_space_is_not_folded_here(
    tmp_path: Path, write: Write, run_folder: Folder, cache: Cache, lexical: Lexical
) -> None:
    folder = run_folder(tmp_path)
    other = write(folder, "alpha", provider=Lexical(64, lexical.limits))
    assert fold(folder, cache) == 0
    assert folder.answers == [other]


# The cache


def test_remembering_the_same_again_makes_no_version(
    tmp_path: Path, cache: Cache, paid: Paid
) -> None:
    assert cache.remember([paid(*WORDS)]) == 3
    before = versions(tmp_path, cache)
    assert cache.remember([paid("beta"), paid(*WORDS)]) == 0
    assert cache.remember([]) == 0
    assert versions(tmp_path, cache) == before
    assert len(cache) == 3


def test_a_text_that_comes_twice_at_once_is_kept_once(cache: Cache, paid: Paid) -> None:
    assert cache.remember([paid("alpha", "beta"), paid("beta", "alpha"), paid("gamma")]) == 3
    assert len(cache) == 3


@pytest.mark.slow
def test_runs_that_remember_the_same_at_once_keep_it_once(
    tmp_path: Path, lexical: Lexical, paid: Paid
) -> None:
    words = [f"word {number}" for number in range(200)]
    runs, together = 4, threading.Barrier(4)

    def remember(run: int) -> int:
        cache = Cache(str(tmp_path), lexical.space)
        added = 0
        for start in range(0, len(words), 40):
            together.wait()
            added += cache.remember([paid(*words[start : start + 40 + 10 * run])])
        return added

    with ThreadPoolExecutor(runs) as pool:
        assert sum(pool.map(remember, range(runs))) == len(words)
    cache = Cache(str(tmp_path), lexical.space)
    found = pa.concat_arrays([batch.column("text_hash") for batch in cache.entries()])
    assert sorted(found.to_pylist()) == sorted(hashes(*words).to_pylist())


@given(st.lists(st.sampled_from([*WORDS, "delta", "epsilon"]), max_size=12))
@settings(max_examples=30, deadline=None)
def test_vectors_come_in_the_order_asked_for_repeats_included(
    state_of_five: Path, lexical: Lexical, asked: list[str]
) -> None:
    cache = Cache(str(state_of_five), lexical.space)
    assert vectors_in(cache, *asked) == expected(lexical, *asked)


@pytest.fixture(scope="session")
def state_of_five(fresh: Callable[[], Path], lexical: Lexical, paid: Paid) -> Path:
    """A state whose cache knows five texts, remembered in several versions."""
    state = fresh()
    for texts in (["gamma", "alpha"], ["epsilon"], ["delta", "beta"]):
        Cache(str(state), lexical.space).remember([paid(*texts)])
    return state


def test_a_vector_that_nobody_remembered_is_an_error(cache: Cache, paid: Paid) -> None:
    with pytest.raises(EmbedOnceError, match="1 vectors are missing"):
        cache.vectors(hashes("alpha"))
    cache.remember([paid("alpha")])
    with pytest.raises(EmbedOnceError, match="2 vectors are missing"):
        cache.vectors(hashes("beta", "alpha", "beta"))


def test_no_vectors_are_asked_of_an_empty_cache_without_an_error(cache: Cache, paid: Paid) -> None:
    assert vectors_in(cache) == []
    cache.remember([paid("alpha")])
    assert vectors_in(cache) == []


def test_a_cache_takes_up_what_another_one_added(
    tmp_path: Path, cache: Cache, paid: Paid, lexical: Lexical
) -> None:
    assert cache.holds(hashes("alpha")).tolist() == [False]
    Cache(str(tmp_path), lexical.space).remember([paid("alpha")])
    assert cache.holds(hashes("alpha")).tolist() == [False]
    cache.refresh()
    assert cache.holds(hashes("alpha", "beta")).tolist() == [True, False]
    Cache(str(tmp_path), lexical.space).remember([paid("beta")])
    assert cache.remember([paid("beta", "gamma")]) == 1
    assert vectors_in(cache, *WORDS) == expected(lexical, *WORDS)


def test_vectors_that_another_run_remembered_meanwhile_are_found(
    tmp_path: Path, cache: Cache, paid: Paid, lexical: Lexical
) -> None:
    Cache(str(tmp_path), lexical.space).remember([paid("alpha")])
    assert vectors_in(cache, "alpha") == expected(lexical, "alpha")


def test_vectors_survive_that_the_cache_is_compacted(
    tmp_path: Path, paid: Paid, lexical: Lexical
) -> None:
    cache = Cache(str(tmp_path), lexical.space)
    for word in WORDS:
        cache.remember([paid(word)])
    assert len(cache) == len(WORDS)  # read, and then no longer where it was
    lancedb.connect(str(tmp_path)).open_table(cache.name).optimize()
    assert vectors_in(cache, *WORDS[::-1]) == expected(lexical, *WORDS[::-1])
    cache.refresh()
    assert len(cache) == len(WORDS)
    assert vectors_in(cache, *WORDS) == expected(lexical, *WORDS)


def test_a_cache_that_was_read_forgets_what_another_one_drops(
    tmp_path: Path, cache: Cache, paid: Paid, lexical: Lexical
) -> None:
    cache.remember([paid(*WORDS)])
    assert len(cache) == len(WORDS)
    table = lancedb.connect(str(tmp_path)).open_table(cache.name)
    table.delete(f"text_hash = X'{text_hash('alpha').hex()}'")
    Cache(str(tmp_path), lexical.space).remember([paid("delta", "epsilon")])
    cache.refresh()
    held = cache.holds(hashes("alpha", "beta", "gamma", "delta", "epsilon"))
    assert held.tolist() == [False, True, True, True, True]
    assert len(cache) == 4


def test_a_vector_that_leaves_while_it_is_read_is_an_error(
    tmp_path: Path, cache: Cache, paid: Paid
) -> None:
    cache.remember([paid(*WORDS)])
    assert len(cache) == len(WORDS)
    table = lancedb.connect(str(tmp_path)).open_table(cache.name)
    table.delete(f"text_hash = X'{text_hash('alpha').hex()}'")
    assert cache._table is not None  # noqa: SLF001
    cache._table.checkout_latest()  # type: ignore[no-untyped-call]  # noqa: SLF001 - as a thread does
    with pytest.raises(IndexHeld, match="1 vectors left the cache"):
        cache.vectors(hashes("beta", "alpha"))


def test_what_a_cache_knows_already_is_not_read_again(
    tmp_path: Path, paid: Paid, lexical: Lexical, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("tasks.key_rows.LEVEL_KEYS", 1)  # no two lots are merged
    cache = Cache(str(tmp_path), lexical.space)
    cache.remember([paid("alpha", "beta")])
    assert len(cache) == 2
    (first,) = cache._entries._levels  # noqa: SLF001 - what was read is not seen otherwise
    cache.remember([paid("gamma")])
    assert len(cache) == 3
    assert cache._entries._levels[0] is first  # noqa: SLF001


def test_each_space_has_a_cache_of_its_own(
    tmp_path: Path, cache: Cache, paid: Paid, lexical: Lexical
) -> None:
    cache.remember([paid("alpha")])
    other = Cache(str(tmp_path), Lexical(64, lexical.limits).space)
    assert len(other) == 0
    assert other.name != cache.name


# Recovery


class Records:
    """A ledger that remembers what it was told."""

    def __init__(self) -> None:
        self.calls: list[Call] = []

    def __call__(self, _folder: RunFolder, calls: list[Call]) -> None:
        self.calls += calls


def test_a_dead_run_is_taken_up_exactly_once(
    tmp_path: Path, write: Write, run_folder: Folder, call_of: CallOf, lexical: Lexical
) -> None:
    folder, records = run_folder(tmp_path, "dead"), Records()
    folder.note(call_of("dead", 1, 1, "ProviderBusy"))
    write(folder, "alpha", "beta")
    write(folder, "gamma", batch=2)
    assert recover(str(tmp_path), records) == Recovered(3)
    assert recover(str(tmp_path), records) == Recovered(0)
    assert [(call.batch, call.attempt, call.status) for call in records.calls] == [
        (1, 1, "ok"),
        (2, 1, "ok"),
    ]
    assert not file_of(folder).exists()
    cache = Cache(str(tmp_path), lexical.space)
    assert vectors_in(cache, *WORDS) == expected(lexical, *WORDS)


def test_several_dead_runs_are_taken_up_at_once(
    tmp_path: Path, write: Write, run_folder: Folder
) -> None:
    write(run_folder(tmp_path, "one"), "alpha", "beta")
    write(run_folder(tmp_path, "two"), "beta", "gamma")
    records = Records()
    assert recover(str(tmp_path), records) == Recovered(3)
    assert {call.run_id for call in records.calls} == {"one", "two"}


def test_a_state_without_runs_has_nothing_to_take_up(tmp_path: Path) -> None:
    records = Records()
    assert recover(str(tmp_path / "none"), records) == Recovered()
    assert records.calls == []


def test_answers_of_other_spaces_go_to_their_own_caches(
    tmp_path: Path, write: Write, run_folder: Folder, lexical: Lexical
) -> None:
    folder, short = run_folder(tmp_path), Lexical(64, lexical.limits)
    write(folder, "alpha")
    write(folder, "alpha", "beta", batch=2, provider=short)
    assert recover(str(tmp_path), Records()) == Recovered(3)
    for provider, texts in ((lexical, ["alpha"]), (short, ["alpha", "beta"])):
        cache = Cache(str(tmp_path), provider.space)
        assert vectors_in(cache, *texts) == expected(provider, *texts)


@contextmanager
def process(script: str, *arguments: str) -> Iterator["subprocess.Popen[str]"]:
    """A Python process that has printed its first line; killed at the end."""
    command = [sys.executable, "-c", script, *arguments]
    started = subprocess.Popen(command, stdout=subprocess.PIPE, text=True, cwd=ROOT)
    try:
        assert started.stdout is not None
        assert started.stdout.readline().strip() == "ready"
        yield started
    finally:
        started.kill()
        started.communicate()


LIVE = """
import sys, time
from tasks.journal import RunFolder
with RunFolder(sys.argv[1], "living").alive():
    print("ready", flush=True)
    time.sleep(60)
"""


def test_a_living_run_is_left_alone_until_it_dies(tmp_path: Path, write: Write) -> None:
    folder = RunFolder(str(tmp_path), "living")
    with process(LIVE, str(tmp_path)) as living:
        answer = write(folder, "alpha")
        assert recover(str(tmp_path), Records()) == Recovered()
        assert folder.answers == [answer]
        living.send_signal(signal.SIGKILL)
        living.wait()
        records = Records()
        assert recover(str(tmp_path), records) == Recovered(1)
    assert [call.run_id for call in records.calls] == ["living"]


PAY = """
import os, signal, sys
from tasks.journal import Call, RunFolder
from tasks.keys import hash_column, text_hash
from tasks.limits import Limits
from tasks.providers.lexical import Lexical
folder, provider = RunFolder(sys.argv[1], "killed"), Lexical(256, Limits(None, None, 9, None, 1))
words = ["alpha", "beta", "gamma"]
call = Call("killed", 1, 1, 1, "first", "ok", "2026-01-01", 0.0, 0.5, 3, 3, 3, 0.0, "")
hashes = hash_column([text_hash(word) for word in words])
with folder.alive():
    print("ready", flush=True)
    folder.write_answer(hashes, provider.embed(words).vectors, provider.space, call)
    os.kill(os.getpid(), signal.SIGKILL)
"""


def test_a_run_killed_right_after_its_answer_loses_nothing(
    tmp_path: Path, lexical: Lexical
) -> None:
    with process(PAY, str(tmp_path)) as run:
        assert run.wait() == -signal.SIGKILL
    records = Records()
    assert recover(str(tmp_path), records) == Recovered(3)
    assert [(call.run_id, call.tokens_billed) for call in records.calls] == [("killed", 3)]
    cache = Cache(str(tmp_path), lexical.space)
    assert vectors_in(cache, *WORDS) == expected(lexical, *WORDS)


def test_a_run_that_died_while_it_folded_is_folded_again(
    tmp_path: Path, write: Write, run_folder: Folder, cache: Cache, paid: Paid
) -> None:
    write(run_folder(tmp_path), *WORDS)
    cache.remember([paid(*WORDS)])
    records = Records()
    assert recover(str(tmp_path), records) == Recovered(0)
    assert len(records.calls) == 1
    assert len(Cache(str(tmp_path), cache.space)) == 3


def test_an_answer_that_was_not_finished_is_ignored(
    tmp_path: Path, write: Write, run_folder: Folder
) -> None:
    folder = run_folder(tmp_path)
    write(folder, "alpha")
    beta = file_of(folder, write(folder, "beta", batch=2))
    beta.rename(beta.with_name(beta.name + ".tmp"))
    assert len(folder.answers) == 1
    assert recover(str(tmp_path), Records()) == Recovered(1)


def test_an_unreadable_answer_is_set_aside_and_counted(
    tmp_path: Path, write: Write, run_folder: Folder
) -> None:
    folder = run_folder(tmp_path)
    write(folder, "alpha")
    bad = file_of(folder, write(folder, "beta", batch=2))
    bad.write_bytes(bad.read_bytes()[:-20])
    found = recover(str(tmp_path), Records())
    assert found.vectors == 1
    assert found.set_aside == (f"{tmp_path}/set-aside/run-answers-00000002-01-00001.arrow",)
    assert Path(found.set_aside[0]).stat().st_size > 1000


@pytest.fixture(scope="session")
def whole_answer(fresh: Callable[[], Path], write: Write, run_folder: Folder) -> bytes:
    folder = run_folder(fresh())
    return file_of(folder, write(folder, *WORDS)).read_bytes()


def stored(state: Path, data: bytes | bytearray) -> StoredAnswer | None:
    """What the journal makes of these bytes as an answer."""
    folder, name = RunFolder(str(state), "run"), "runs/run/answers/1.arrow"
    folder.files.write(name, bytes(data))
    return read_answer(folder, name)


@given(st.data())
@settings(max_examples=100, deadline=None)
def test_a_cut_off_answer_is_never_trusted(
    fresh: Callable[[], Path], whole_answer: bytes, data: st.DataObject
) -> None:
    end = data.draw(st.integers(0, len(whole_answer) - 1))
    assert stored(fresh(), whole_answer[:end]) is None


@given(st.binary(max_size=40), st.booleans(), st.booleans())
@settings(max_examples=50, deadline=None)
def test_garbage_is_never_trusted(
    fresh: Callable[[], Path], garbage: bytes, head: bool, tail: bool
) -> None:
    data = (b"ARROW1\0\0" if head else b"") + garbage + (b"ARROW1" if tail else b"")
    assert stored(fresh(), data) is None


@given(st.data())
@settings(max_examples=100, deadline=None)
def test_an_answer_with_broken_bytes_is_whole_or_set_aside_but_no_crash(
    fresh: Callable[[], Path], whole_answer: bytes, data: st.DataObject
) -> None:
    broken = bytearray(whole_answer)
    at = data.draw(st.integers(0, len(broken) - 1))
    broken[at : at + 4] = data.draw(st.binary(min_size=4, max_size=4))
    found = stored(fresh(), broken)
    assert found is None or found.table.num_rows <= len(WORDS)


@pytest.mark.parametrize("lacking", [b"embed_once.space", b"embed_once.call"])
def test_a_table_without_its_space_or_call_is_no_answer(
    tmp_path: Path, whole_answer: bytes, lacking: bytes
) -> None:
    table = pa.ipc.open_file(whole_answer).read_all()
    metadata = {key: value for key, value in table.schema.metadata.items() if key != lacking}
    assert stored(tmp_path, rewritten(table, metadata)) is None


def test_an_answer_of_another_dimension_than_its_space_is_no_answer(
    tmp_path: Path, whole_answer: bytes
) -> None:
    table = pa.ipc.open_file(whole_answer).read_all()
    space = json.loads(table.schema.metadata[b"embed_once.space"]) | {"dimension": 64}
    metadata = {**table.schema.metadata, b"embed_once.space": json.dumps(space).encode()}
    assert stored(tmp_path, rewritten(table, metadata)) is None


def rewritten(table: pa.Table, metadata: dict[bytes, bytes]) -> bytes:
    """The table as a file again, with other metadata."""
    table, sink = table.replace_schema_metadata(metadata), pa.BufferOutputStream()
    with pa.ipc.new_file(sink, table.schema) as writer:
        writer.write_table(table)
    return bytes(sink.getvalue().to_pybytes())


# Calls


def test_a_note_cut_off_hides_no_other_call_and_is_set_aside(
    tmp_path: Path, write: Write, run_folder: Folder, call_of: CallOf
) -> None:
    folder = run_folder(tmp_path)
    folder.note(call_of(batch=1, status="ProviderBusy"))
    (first,) = notes(folder, "calls")
    folder.note(call_of(batch=2, status="ProviderBusy"))
    folder.refuse(folder_space := Space("voyage", "voyage-4", 64), Refused(b"1" * 16, "bad"))
    write(folder, "alpha", batch=3)
    (torn,) = set(notes(folder, "calls")) - {first}
    (refused,) = notes(folder, "refused")
    whole = {note: note.read_bytes() for note in (torn, refused)}
    for note, text in whole.items():
        for end in (0, 1, len(text) // 2, len(text) - 1):
            note.write_bytes(text[:end])
            expected = [1, 2, 3] if note == refused else [1, 3]
            assert sorted(call.batch for call in folder.calls()) == expected
            assert (folder_space.id in folder.refused()) == (note == torn)
        note.write_bytes(text)
    for note, text in whole.items():
        note.write_bytes(text[:-1])
    (file_of(folder) / "run.json").write_bytes(b'{"run_id": "ru')
    folder.forget_notes()
    assert len(folder.names()) == 3  # the answer, and what cannot be read
    found = recover(str(tmp_path), Records())
    assert {Path(each).name.split("-")[1] for each in found.set_aside} == {
        "calls",
        "refused",
        "run.json",
    }
    assert all(Path(each).is_file() for each in found.set_aside)


def notes(folder: RunFolder, kind: str) -> list[Path]:
    return sorted((file_of(folder) / kind).iterdir())


def test_the_calls_of_what_was_folded_are_still_known_if_the_run_dies_then(
    tmp_path: Path, write: Write, run_folder: Folder, cache: Cache
) -> None:
    folder = run_folder(tmp_path)
    names = [write(folder, word, batch=batch) for batch, word in enumerate(WORDS, 1)]
    last = file_of(folder, names[2]).read_bytes()
    fold(folder, cache, at_hand(folder, *names[1:]))
    assert folder.answers == names[:1]
    assert sorted(call.batch for call in folder.calls()) == [1, 2, 3]
    file_of(folder, names[2]).write_bytes(last)  # as if it had died before that one went
    fold(folder, cache)
    assert sorted(call.batch for call in folder.calls()) == [1, 2, 3]
    records = Records()
    assert recover(str(tmp_path), records) == Recovered(0)
    assert sorted(call.batch for call in records.calls) == [1, 2, 3]


def test_calls_in_their_answer_and_in_the_notes_count_once(
    tmp_path: Path, write: Write, run_folder: Folder, call_of: CallOf
) -> None:
    folder = run_folder(tmp_path)
    write(folder, "alpha", batch=1)
    folder.note(call_of(batch=2, attempt=1, status="ProviderBusy"))
    folder.note(call_of(batch=2, attempt=2, status="ProviderBusy"))
    assert [(call.batch, call.attempt) for call in folder.calls()] == [(1, 1), (2, 1), (2, 2)]
    folder.forget_notes()
    assert [call.batch for call in folder.calls()] == [1]
    folder.forget_notes()


def test_a_folder_stays_only_while_it_holds_something(
    tmp_path: Path, write: Write, cache: Cache
) -> None:
    folder = RunFolder(str(tmp_path), "run")
    with folder.alive():
        (folder.staging / "t.arrow").touch()
    assert not list((tmp_path / "runs").iterdir())
    with folder.alive():
        write(folder, "alpha")
    assert folder.answers
    assert not folder.staging.exists()
    with folder.alive():
        fold(folder, cache)
    assert folder.calls()
    with folder.alive():
        folder.forget_notes()
    assert not list((tmp_path / "runs").iterdir())


def test_a_plan_sees_the_answers_that_nobody_folded(
    tmp_path: Path, write: Write, run_folder: Folder, lexical: Lexical
) -> None:
    write(run_folder(tmp_path, "one"), "alpha", "beta")
    two = run_folder(tmp_path, "two")
    write(two, "gamma", provider=Lexical(64, lexical.limits))
    file_of(two, write(two, "gamma", batch=2)).write_bytes(b"torn")
    found = unfolded_hashes(str(tmp_path), lexical.space)
    assert [column.to_pylist() for column in found] == [hashes("alpha", "beta").to_pylist()]


def test_answers_of_a_living_run_can_be_remembered_while_it_keeps_them(
    tmp_path: Path, write: Write, cache: Cache, lexical: Lexical
) -> None:
    folder = RunFolder(str(tmp_path), "living")
    with folder.alive():
        answer = file_of(folder, write(folder, *WORDS))
        found = unfolded_answers(str(tmp_path), lexical.space)
        assert cache.remember(one.table for one in found) == 3
        assert answer.exists()
    assert vectors_in(cache, *WORDS) == expected(lexical, *WORDS)


def test_an_answer_with_a_flipped_bit_is_never_trusted(tmp_path: Path, whole_answer: bytes) -> None:
    whole = bytearray(whole_answer)
    assert stored(tmp_path, whole) is not None
    middle = whole.index(hash_column([text_hash(WORDS[0])]).buffers()[1].to_pybytes()[:16])
    whole[middle + 2000] ^= 1
    assert stored(tmp_path, whole) is None


def test_many_vectors_keep_their_texts(tmp_path: Path, lexical: Lexical) -> None:
    texts = [f"word{number} other{number * 7}" for number in range(3000)]
    vectors = lexical.embed(texts).vectors
    column = pa.FixedSizeListArray.from_arrays(pa.array(vectors.reshape(-1)), lexical.dimension)
    table = pa.table({"text_hash": hashes(*texts), "vector": column})
    cache = Cache(str(tmp_path), lexical.space)
    started = time.perf_counter()
    assert cache.remember([table.slice(0, 1000), table.slice(1000)]) == 3000
    order = np.random.default_rng(3).permutation(3000)
    found = cache.vectors(hashes(*[texts[at] for at in order]))
    assert np.array_equal(found.values.to_numpy().reshape(3000, -1), vectors[order])
    assert time.perf_counter() - started < 60
