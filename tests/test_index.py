"""The index says of itself what it is, belongs to one run at a time, and keeps its generations."""

import os
import re
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from datetime import UTC, datetime, timedelta
from pathlib import Path

import lancedb
import pyarrow as pa
import pytest
from filelock import Timeout
from lancedb.table import Table

from tasks.errors import EmbedOnceError, IndexConflict, IndexHeld
from tasks.index import (
    Identity,
    adopt,
    committing,
    generations,
    held,
    identity_of,
    open_index,
    require_space,
    tag_generation,
    unadopted,
    vectors_of,
)
from tasks.keys import hash_column, text_hash
from tasks.params import Index
from tasks.progress import listening
from tasks.providers import Space
from tasks.providers.lexical import Lexical

ROOT = Path(__file__).parents[1]
LANG = pa.field("lang", pa.utf8())
Add = Callable[..., Table]


@pytest.fixture
def index(tmp_path: Path, index_in: Callable[..., Index]) -> Index:
    return index_in(tmp_path)


@pytest.fixture
def identity(lexical: Lexical) -> Identity:
    return Identity(lexical.space, "s1")


@pytest.fixture
def add(index: Index, identity: Identity, lexical: Lexical) -> Add:
    """Adds rows to the index as LanceDB's users would, with the text as id."""

    def write(*texts: str, document: str | None = "d") -> Table:
        schema = identity.schema([LANG])
        vectors = lexical.embed(texts).vectors.tolist()
        rows = [
            {
                "id": text,
                "document": document,
                "text": text,
                "text_hash": text_hash(text),
                "vector": vector,
                "start_line": 1,
                "lang": "en",
                "run_id": "run",
            }
            for text, vector in zip(texts, vectors, strict=True)
        ]
        table = lancedb.connect(index.uri).create_table(index.table, schema=schema, exist_ok=True)
        if texts:
            table.add(pa.Table.from_pylist(rows, schema=schema))
        return table

    return write


def test_where_nothing_was_published_there_is_no_index(index: Index) -> None:
    assert open_index(index) is None
    assert not Path(index.uri).exists()
    adopt(index)


def test_an_index_names_its_space_and_splitter(index: Index, add: Add, identity: Identity) -> None:
    add("alpha")
    table = open_index(index)
    assert table is not None
    assert identity_of(table) == identity


@pytest.mark.parametrize("splitter", ["", "semantic-text-splitter 0.33", "ünï\ncode"])
def test_any_splitter_comes_back(index: Index, lexical: Lexical, splitter: str) -> None:
    written = Identity(lexical.space, splitter)
    lancedb.connect(index.uri).create_table(index.table, schema=written.schema([]))
    table = open_index(index)
    assert table is not None
    assert identity_of(table) == written


def test_the_id_is_the_primary_key(index: Index, add: Add) -> None:
    field = add("alpha").schema.field("id")
    assert field.metadata == {b"lance-schema:unenforced-primary-key": b"true"}
    assert not field.nullable


def test_a_row_has_the_documented_columns(add: Add, lexical: Lexical) -> None:
    schema = add().schema
    assert schema.names == [
        "id",
        "document",
        "text",
        "text_hash",
        "vector",
        "start_line",
        "end_line",
        "lang",
        "run_id",
    ]
    assert schema.field("vector").type == pa.list_(pa.float32(), lexical.dimension)
    assert schema.field("text_hash").type == pa.binary(16)


def test_a_table_of_somebody_else_is_left_alone(index: Index) -> None:
    foreign = lancedb.connect(index.uri).create_table(index.table, [{"id": "a", "vector": [1.0]}])
    for touch in (open_index, adopt):
        with pytest.raises(IndexConflict, match="was not made by embed-once"):
            touch(index)
    assert foreign.count_rows() == 1
    assert foreign.tags.list() == {}


def test_vectors_of_another_space_are_refused(index: Index, add: Add, lexical: Lexical) -> None:
    table = add("alpha")
    require_space(table, index, lexical.space)
    for other in (
        Lexical(64, lexical.limits).space,
        Space("voyage", "voyage-4", 256),
        Space("lexical", "lexical", 256, input_type="query", preparation="words-1"),
        Space("lexical", "lexical", 256, preparation="words-2"),
    ):
        with pytest.raises(IndexConflict, match="name another table"):
            require_space(table, index, other)


def test_the_index_gives_back_the_vectors_it_holds(
    index: Index, add: Add, lexical: Lexical
) -> None:
    wanted = hash_column([text_hash(text) for text in ("gamma", "alpha", "unknown")])
    assert list(vectors_of(index, wanted)) == []
    add("alpha", "beta", "gamma")
    found = pa.concat_tables(vectors_of(index, wanted))
    expected = lexical.embed(["alpha", "gamma"]).vectors.tolist()
    assert found.column("text_hash").to_pylist() == [text_hash("alpha"), text_hash("gamma")]
    assert found.column("vector").to_pylist() == expected
    assert list(vectors_of(index, hash_column([]))) == []


# Generations


def test_generations_are_counted_from_one(add: Add) -> None:
    for number, text in enumerate(["alpha", "beta", "gamma"], start=1):
        table = add(text)
        assert tag_generation(table).number == number
    assert [one.number for one in generations(table)] == [1, 2, 3]
    versions = [one.version for one in generations(table)]
    assert versions == sorted(set(versions))
    assert table.tags.get_version("gen-3") == table.version


def test_a_version_is_one_generation_only(add: Add) -> None:
    table = add("alpha")
    first, again = tag_generation(table), tag_generation(table)
    assert (first.number, first.version) == (again.number, again.version) == (1, table.version)
    assert len(generations(table)) == 1


@pytest.mark.parametrize("zone", ["UTC", "America/New_York", "Asia/Tokyo"])
def test_the_time_of_a_generation_is_that_of_its_commit_in_any_time_zone(
    add: Add, zone: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TZ", zone)
    time.tzset()
    try:
        before = datetime.now(tz=UTC)
        tag_generation(add("alpha"))
        (found,) = generations(add())
        assert timedelta(0) <= found.published_at - before < timedelta(minutes=1)
    finally:
        monkeypatch.undo()
        time.tzset()


def test_the_tenth_generation_comes_after_the_ninth(add: Add) -> None:
    for number in range(11):
        tag_generation(add(f"word{number}"))
    assert [one.number for one in generations(add())] == list(range(1, 12))


def test_tags_of_other_people_are_no_generations(add: Add) -> None:
    table = add("alpha")
    table.tags.create("mine", table.version)
    assert generations(table) == []
    assert tag_generation(table).number == 1


def test_what_a_dead_run_committed_is_adopted(index: Index, add: Add) -> None:
    tag_generation(table := add("alpha"))

    def commit_and_die() -> None:
        with committing(index, table.version):
            add("beta")
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        commit_and_die()
    table = add()
    adopt(index)
    assert [one.number for one in generations(table)] == [1, 2]
    adopt(index)
    assert len(generations(table)) == 2


def test_a_commit_is_unadopted_from_when_it_is_made_until_it_is_tagged(
    index: Index, add: Add
) -> None:
    tag_generation(table := add("alpha"))
    with committing(index, table.version):
        seen = [unadopted(index)]
        table = add("beta")
        seen.append(unadopted(index))
        tag_generation(table)
        seen.append(unadopted(index))
    assert [*seen, unadopted(index)] == [False, True, False, False]


def test_a_generation_whose_run_died_before_it_was_on_disk_is_synced(
    index: Index, add: Add, monkeypatch: pytest.MonkeyPatch
) -> None:
    tag_generation(table := add("alpha"))

    def commit_and_die() -> None:
        with committing(index, table.version):
            tag_generation(add("beta"))
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        commit_and_die()
    synced = list[str]()
    monkeypatch.setattr("tasks.index.sync_table", lambda _, name, **__: synced.append(name))
    adopt(index)
    assert synced == [index.table]


def test_vectors_whose_file_is_lost_are_told_in_words(index: Index, add: Add) -> None:
    add("alpha")
    for file in Path(index.uri).glob(f"{index.table}.lance/data/*"):
        file.unlink()
    with pytest.raises(EmbedOnceError, match=f"could not read the index '{index.table}'"):
        list(vectors_of(index, hash_column([text_hash("alpha")])))


def test_a_run_that_died_before_its_commit_leaves_no_generation(index: Index, add: Add) -> None:
    tag_generation(table := add("alpha"))
    with pytest.raises(KeyboardInterrupt), committing(index, table.version):
        raise KeyboardInterrupt
    adopt(index)
    assert [one.number for one in generations(table)] == [1]


def test_a_version_that_somebody_else_made_is_no_generation(index: Index, add: Add) -> None:
    tag_generation(add("alpha"))
    table = add("beta")
    adopt(index)
    assert [one.number for one in generations(table)] == [1]


def test_a_reader_pinned_to_a_generation_still_reads_it(index: Index, add: Add) -> None:
    tag_generation(add("alpha"))
    reader = open_index(index)
    assert reader is not None
    reader.checkout("gen-1")
    tag_generation(add("beta"))
    assert reader.to_arrow().column("id").to_pylist() == ["alpha"]


# One run at a time


def test_a_second_run_is_refused_and_told_who_holds_the_index(index: Index) -> None:
    with held(index, "first"):
        with pytest.raises(IndexHeld, match="run first, since 20") as caught, held(index, "second"):
            pass
        assert caught.value.exit_code == 6
        with pytest.raises(IndexHeld, match="run first"), held(index, "third"):
            pass
    with held(index, "second"):
        pass


def test_two_tables_of_one_database_are_held_apart(
    tmp_path: Path, index_in: Callable[..., Index]
) -> None:
    with held(index_in(tmp_path, "one"), "1"), held(index_in(tmp_path, "two"), "2"):
        pass


def test_an_index_is_free_again_after_an_error(index: Index) -> None:
    with pytest.raises(KeyError), held(index, "first"):
        raise KeyError
    with held(index, "second"):
        pass


def test_a_lock_that_times_out_within_the_run_is_not_taken_for_the_index(index: Index) -> None:
    with pytest.raises(Timeout), held(index, "first"):
        raise Timeout("another lock")


def test_holding_leaves_no_table_in_the_database(index: Index, add: Add) -> None:
    with held(index, "first"):
        assert lancedb.connect(index.uri).list_tables().tables == []
        add("alpha")
    assert lancedb.connect(index.uri).list_tables().tables == [index.table]


def test_a_run_waits_for_the_index_and_says_for_whom(index: Index) -> None:
    patient = index.model_copy(update={"max_wait": 30.0})
    heard, order = list[str](), list[str]()

    def wait() -> None:
        with held(patient, "second"):
            order.append("second")

    waiting = threading.Thread(target=wait)
    with listening(lambda progress: heard.append(progress.note)), held(index, "first"):
        waiting.start()
        while not heard:
            time.sleep(0.01)
        order.append("first")
    waiting.join()
    assert order == ["first", "second"]
    who = rf"run first, since 20\S+, on {re.escape(socket.gethostname())} \(process {os.getpid()}\)"
    assert re.search(f"the index t is held by another run: {who}", heard[0])


def test_a_run_that_has_waited_long_enough_is_refused(index: Index) -> None:
    patient = index.model_copy(update={"max_wait": 0.4})
    with held(index, "first"):
        started = time.monotonic()
        with pytest.raises(IndexHeld, match=r"after 0.4 s: run first"), held(patient, "second"):
            pass
        assert 0.4 <= time.monotonic() - started < 5


HOLD = """
import sys, time
from tasks.index import held
from tasks.params import Index
index = Index.model_validate({"uri": sys.argv[1], "table": "t"})
with held(index, "other-process"):
    print("ready", flush=True)
    time.sleep(60)
"""


def test_an_index_is_free_again_when_its_holder_is_killed(index: Index) -> None:
    holder = subprocess.Popen(
        [sys.executable, "-c", HOLD, index.uri], stdout=subprocess.PIPE, text=True, cwd=ROOT
    )
    try:
        assert holder.stdout is not None
        assert holder.stdout.readline().strip() == "ready"
        with pytest.raises(IndexHeld, match="other-process"), held(index, "mine"):
            pass
        holder.send_signal(signal.SIGKILL)
        holder.wait()
        with held(index, "mine"):
            pass
    finally:
        holder.kill()
        holder.communicate()
