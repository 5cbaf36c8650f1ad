"""State and index in an object store: a real S3 server in a process of its own."""

import json
import os
import socket
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
import obstore
import pyarrow as pa
import pytest

from tasks.cache import Cache
from tasks.errors import IndexHeld, LockLost, SettingsError, StorageFailed
from tasks.form import Overrides
from tasks.index import Identity, held, open_index
from tasks.journal import RunFolder
from tasks.keys import hash_column, text_hash
from tasks.notes import Call
from tasks.params import Config, Index, load_config
from tasks.plan import make_plan
from tasks.providers import Space
from tasks.providers.lexical import Lexical
from tasks.publish import publish
from tasks.recover import Recovered, recover
from tasks.schemas import DELETIONS, TableRef, rows_schema
from tasks.simulator import Latency, Settings, Simulator
from tasks.storage import Holder, Taken, local_folder, objects, storage_at
from tasks.survey import require_runnable
from tests.waiting import until

pytestmark = pytest.mark.slow

ROOT = Path(__file__).parents[1]


def names_in(uri: str) -> list[str]:
    return storage_at(uri).names("")


def test_an_object_is_read_as_it_was_written(bucket: str) -> None:
    storage = storage_at(f"{bucket}/deep/down")
    large = bytes(range(256)) * 40_000
    storage.write("a/one", pa.py_buffer(large))
    storage.write("a/two", b"")
    storage.write("ab/three", b"3")
    storage.write("ab/three", b"three")
    assert [storage.read(name) for name in ("a/one", "a/two", "ab/three")] == [
        large,
        b"",
        b"three",
    ]
    assert storage.read("a/none") is None
    assert storage.names("a") == ["a/one", "a/two"]
    assert names_in(bucket) == ["deep/down/a/one", "deep/down/a/two", "deep/down/ab/three"]
    storage.delete(["a/two", "a/none"])
    assert storage.names("a") == ["a/one"]
    storage.delete_all("a")
    assert storage.names("") == ["ab/three"]


def test_a_bucket_that_is_not_there_is_said(s3: str, tmp_path: Path) -> None:
    storage = storage_at("s3://no-such-bucket/x")
    with pytest.raises(StorageFailed, match=r"s3://no-such-bucket/x cannot be written.*bucket"):
        storage.write("a", b"1")
    (tmp_path / "corpus").mkdir()
    config = config_in(tmp_path, "s3://no-such-bucket")
    with pytest.raises(SettingsError, match=r"index.uri: s3://no-such-bucket/index"):
        require_runnable(config, Overrides())


# Leases


@pytest.fixture
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    """Leases of this process last three seconds, not fifteen."""
    monkeypatch.setattr(objects, "BEAT_S", 0.2)
    monkeypatch.setattr(objects, "LASTS_S", 3.0)
    monkeypatch.setattr(objects, "LOOK_S", 0.1)


def test_who_finds_a_lease_taken_is_told_by_whom(bucket: str, quick: None) -> None:
    storage, told = storage_at(bucket), list[Holder | None]()
    with storage.held("docs.lock", "first"):
        started = time.monotonic()
        with pytest.raises(Taken) as caught, storage.held("docs.lock", "second"):
            pass
        assert time.monotonic() - started < objects.LASTS_S  # it was seen to live
        assert caught.value.holder is not None
        assert caught.value.holder.run_id == "first"
        assert caught.value.holder.host == socket.gethostname()
        with pytest.raises(Taken), storage.held("docs.lock", "third", 1.5, told.append):
            pass
        assert time.monotonic() - started > 1.5
        assert [holder.run_id for holder in told if holder] == ["first"]
        with storage.held("other.lock", "fourth"):
            pass
    started = time.monotonic()
    with storage.held("docs.lock", "fifth"):
        assert (
            time.monotonic() - started < objects.LASTS_S
        )  # a lease that was given back is free at once


def test_who_waits_gets_the_lease_when_it_is_given_back(bucket: str, quick: None) -> None:
    storage, order = storage_at(bucket), list[str]()

    def second() -> None:
        with storage.held("docs.lock", "second", wait_s=30):
            order.append("second")

    waiting = threading.Thread(target=second)
    with storage.held("docs.lock", "first"):
        waiting.start()
        time.sleep(4)  # longer than a lease lasts
        order.append("first")
    waiting.join()
    assert order == ["first", "second"]


def test_of_many_that_want_a_lease_one_at_a_time_has_it(bucket: str, quick: None) -> None:
    storage, inside, most = storage_at(bucket), list[int](), list[int]()

    def work(number: int) -> None:
        with storage.held("docs.lock", f"run-{number}", wait_s=60):
            inside.append(number)
            most.append(len(inside))
            time.sleep(0.05)
            inside.remove(number)

    threads = [threading.Thread(target=work, args=(number,)) for number in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert most == [1] * 8


def test_a_holder_that_stood_still_learns_that_its_lease_was_taken_over(
    bucket: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    storage = storage_at(bucket)
    monkeypatch.setattr(objects, "BEAT_S", 3600.0)  # as a process that is stopped
    monkeypatch.setattr(objects, "LASTS_S", 0.5)
    with storage.held("docs.lock", "first") as hold:
        hold.require()
        with storage.held("docs.lock", "second") as other:
            for _ in range(2):
                with pytest.raises(LockLost, match="another run has taken it over"):
                    hold.require()
            other.require()
    with storage.held("docs.lock", "third"):
        pass


def test_a_holder_whose_beats_were_lost_keeps_a_lease_that_nobody_wanted(
    bucket: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    storage = storage_at(bucket)
    monkeypatch.setattr(objects, "BEAT_S", 3600.0)
    monkeypatch.setattr(objects, "LASTS_S", 0.1)
    with storage.held("docs.lock", "first") as hold:
        time.sleep(0.3)
        hold.require()
        # The answer to a PUT that went through is lost: the condition of the next one fails.
        lease = json.loads(bytes(storage.read("docs.lock") or b""))
        storage.write("docs.lock", json.dumps(lease | {"beat": 99}).encode())
        hold.require()
        hold.require()


def test_a_store_that_overwrites_whatever_it_is_told_cannot_lock(
    bucket: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    put = obstore.put

    def deaf(*args: Any, mode: object) -> Any:
        assert mode == "create"
        return put(*args)

    monkeypatch.setattr(obstore, "put", deaf)
    with (
        pytest.raises(StorageFailed, match="knows conditional writes"),
        storage_at(bucket).held("docs.lock", "first"),
    ):
        pass


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


HOLD = """
import sys, time
from tasks.index import held
from tasks.params import Index
with held(Index.model_validate({"uri": sys.argv[1], "table": "t"}), "other-process"):
    print("ready", flush=True)
    time.sleep(90)
"""


def test_the_lease_of_a_killed_process_is_taken_over_when_its_time_has_passed(bucket: str) -> None:
    index = Index.model_validate({"uri": f"{bucket}/index", "table": "t"})
    with process(HOLD, index.uri) as holder:
        started = time.monotonic()
        with pytest.raises(IndexHeld, match=r"other-process.*process \d+"), held(index, "mine"):
            pass
        assert time.monotonic() - started < 10
        holder.kill()
        holder.wait()
        started = time.monotonic()
        with held(index, "mine"):
            assert 10 < time.monotonic() - started < 25


# Runs


def config_in(folder: Path, bucket: str, table: str = "t") -> Config:
    return Config.model_validate(
        {
            "name": "stored",
            "source": {"kind": "files", "path": str(folder / "corpus")},
            "embedding": {"provider": "lexical", "dimension": 64},
            "limits": {"texts_per_request": 1},
            "index": {"uri": f"{bucket}/index", "table": table},
            "state": {"uri": f"{bucket}/state"},
        }
    )


def write_corpus(folder: Path, *words: str) -> None:
    (folder / "corpus").mkdir(exist_ok=True)
    for word in words:
        (folder / f"corpus/{word}.md").write_text(f"# {word}\n\nA {word} lives here.\n")


def documents_in(index: Index) -> list[str]:
    table = open_index(index)
    assert table is not None
    return sorted(table.to_arrow().column("document").to_pylist())


def test_a_run_with_state_and_index_in_a_bucket_pays_once(
    bucket: str, tmp_path: Path, reindex: Callable[..., Any]
) -> None:
    config = config_in(tmp_path, bucket)
    write_corpus(tmp_path, "owl", "stork", "crane")
    assert make_plan(config, Overrides()).texts.embedded == 3
    assert names_in(bucket) == []  # a plan leaves no trace
    require_runnable(config, Overrides())
    first = reindex(config)
    assert (len(first.sent), first.published.way) == (3, "create")
    again = reindex(config)
    assert (again.sent, again.published.way) == ([], "none")
    (tmp_path / "corpus/owl.md").unlink()
    write_corpus(tmp_path, "heron")
    third = reindex(config)
    assert (len(third.sent), third.published.way) == (1, "merge")
    assert documents_in(config.index) == ["crane.md", "heron.md", "stork.md"]
    other = reindex(config_in(tmp_path, bucket, "other"))
    assert other.sent == []
    assert [name for name in names_in(bucket) if "/runs/" in name] == []
    assert not list(local_folder(config.state.uri, "runs").glob("*"))


def test_answers_of_a_dead_run_in_a_bucket_are_taken_up(
    bucket: str, tmp_path: Path, reindex: Callable[..., Any], died: type[Exception]
) -> None:
    config = config_in(tmp_path, bucket)
    write_corpus(tmp_path, "owl", "stork", "crane", "heron")
    with pytest.raises(died):
        reindex(config, die_after=2)
    ran = reindex(config)
    assert (ran.recovered.vectors, len(ran.sent)) == (2, 2)
    assert len(ran.calls) == 2
    assert len(documents_in(config.index)) == 4


PAY = """
import sys, time
from tasks.journal import Call, RunFolder
from tasks.keys import hash_column, text_hash
from tasks.limits import Limits
from tasks.providers.lexical import Lexical
folder, provider = RunFolder(sys.argv[1], "killed"), Lexical(64, Limits(None, None, 9, None, 1))
call = Call("killed", 1, 1, 1, "first", "ok", "2026-01-01", 0.0, 0.5, 1, 3, 3, 0.0, "")
with folder.alive():
    vectors = provider.embed(["alpha"]).vectors
    folder.write_answer(hash_column([text_hash("alpha")]), vectors, provider.space, call)
    folder.note(Call("killed", 2, 1, 1, "first", "ProviderBusy", "2026-01-02", *[0] * 6, ""))
    print("ready", flush=True)
    time.sleep(90)
"""


def test_a_killed_process_loses_no_answer_in_a_bucket_and_a_living_one_is_left_alone(
    bucket: str, lexical: Lexical
) -> None:
    calls = list[Call]()
    with process(PAY, bucket) as run:
        assert recover(bucket, lambda _, found: calls.extend(found)) == Recovered()
        assert len(RunFolder(bucket, "killed").answers) == 1
        run.kill()
        run.wait()
        found = recover(bucket, lambda _, found: calls.extend(found))
    assert found == Recovered(1)
    assert [(call.batch, call.status) for call in calls] == [(1, "ok"), (2, "ProviderBusy")]
    space = Lexical(64, lexical.limits).space
    assert Cache(bucket, space).holds(hash_column([text_hash("alpha")])).tolist() == [True]
    assert [name for name in names_in(bucket) if name.startswith("runs")] == []


def test_a_torn_object_is_set_aside(bucket: str, call_of: Callable[..., Call]) -> None:
    folder = RunFolder(bucket, "dead")
    folder.note(call_of("dead"))
    storage_at(bucket).write("runs/dead/answers/00000001-01-00001.arrow", b"ARROW1\0\0torn")
    found = recover(bucket, lambda *_: None)
    assert found.set_aside == (f"{bucket}/set-aside/dead-answers-00000001-01-00001.arrow",)
    assert storage_at(bucket).read("set-aside/dead-answers-00000001-01-00001.arrow")


def test_a_run_whose_lease_was_taken_over_publishes_nothing(
    bucket: str, tmp_path: Path, reindex: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    config = config_in(tmp_path, bucket)
    write_corpus(tmp_path, "owl")
    reindex(config)
    write_corpus(tmp_path, "stork")
    monkeypatch.setattr(objects, "BEAT_S", 3600.0)
    monkeypatch.setattr(objects, "LASTS_S", 0.5)

    def another_run_comes() -> None:
        with held(config.index, "the other"):
            pass

    with pytest.raises(LockLost):
        reindex(config, before_second_pass=another_run_comes)
    assert documents_in(config.index) == ["owl.md"]
    assert reindex(config).sent == []  # what was paid for is kept
    assert documents_in(config.index) == ["owl.md", "stork.md"]
    versions = lancedb.connect(config.index.uri).open_table("t").list_versions()
    assert len(versions) == 2


class TakenOver(Cache):
    """While a commit reads its vectors, another run takes the index over."""

    def __init__(self, state_uri: str, space: Space, index: Index) -> None:
        super().__init__(state_uri, space)
        self._index = index

    def vectors(self, hashes: pa.Array | pa.ChunkedArray) -> pa.FixedSizeListArray:
        with held(self._index, "the other"):
            return super().vectors(hashes)


@pytest.fixture
def standing_still(monkeypatch: pytest.MonkeyPatch) -> None:
    """This process renews no lease, and one that was not renewed for a moment is taken over."""
    monkeypatch.setattr(objects, "BEAT_S", 3600.0)
    monkeypatch.setattr(objects, "LASTS_S", 0.3)


@pytest.mark.usefixtures("standing_still")
@pytest.mark.parametrize("way", ["create", "add", "merge", "overwrite"])
def test_a_commit_whose_lease_goes_meanwhile_does_not_happen(
    bucket: str,
    paid: Callable[..., pa.Table],
    lexical: Lexical,
    ref: Callable[..., TableRef],
    way: str,
) -> None:
    index = Index.model_validate({"uri": f"{bucket}/index", "table": "t"})
    Cache(bucket, lexical.space).remember([paid("alpha", "beta")])
    texts = {"a": "alpha", "b": "beta"}

    def publish_with(cache: Cache, *ids: str, updates: int = 0, splitter: str = "1") -> None:
        rows = [{"id": id_, "text": texts[id_], "text_hash": text_hash(texts[id_])} for id_ in ids]
        with held(index, "ours"):
            publish(
                rows=ref(rows_schema([]), rows),
                deletions=ref(DELETIONS, []),
                updates=updates,
                index=index,
                identity=Identity(lexical.space, splitter),
                cache=cache,
                run_id="ours",
            )

    if way != "create":
        publish_with(Cache(bucket, lexical.space), "a")
    table = open_index(index)
    versions = len(table.list_versions()) if table is not None else 0
    ids = {"create": ["a"], "add": ["b"], "merge": ["a", "b"], "overwrite": ["b"]}[way]
    with pytest.raises(LockLost):
        publish_with(
            TakenOver(bucket, lexical.space, index),
            *ids,
            updates=int(way == "merge"),
            splitter="2" if way == "overwrite" else "1",
        )
    after = open_index(index)
    if way == "create":
        assert after is None or after.count_rows() == 0
    else:
        assert after is not None
        assert len(after.list_versions()) == versions
        assert after.to_arrow().column("id").to_pylist() == ["a"]


def test_the_command_keeps_only_logs_and_staging_on_this_machine(
    bucket: str, tmp_path: Path
) -> None:
    write_corpus(tmp_path, "owl", "stork")
    (tmp_path / "birds.yaml").write_text(
        "name: birds\n"
        "source: {kind: files, path: ./corpus}\n"
        "embedding: {provider: lexical, dimension: 64}\n"
        f"index: {{uri: '{bucket}/index', table: birds}}\n"
        f"state: {{uri: '{bucket}/state'}}\n"
    )
    temporary = tmp_path / "temporary"
    temporary.mkdir()
    for arguments in (["reindex", "birds.yaml"], ["search", "birds.yaml", "an owl"]):
        done = subprocess.run(
            [sys.executable, "-m", "flows.cli", *arguments],
            check=False,
            capture_output=True,
            text=True,
            cwd=tmp_path,
            timeout=200,
            env={**os.environ, "TMPDIR": str(temporary), "PYTHONPATH": str(ROOT)},
        )
        assert (done.returncode, done.stderr) == (0, "")
    assert "owl.md" in done.stdout
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        "birds.yaml",
        "corpus",
        "temporary",
    ]
    kept = [path for path in (temporary / f"embed-once-{os.getuid()}").rglob("*") if path.is_file()]
    assert [path.parent.name for path in kept] == ["logs"]


def test_a_lease_is_seen_to_live_until_its_time_has_passed(bucket: str, quick: None) -> None:
    storage = storage_at(bucket)
    assert not storage.lives("runs/a.alive")
    with storage.held("runs/a.alive", "a"):
        for _ in range(16):  # longer than a lease lasts that nobody renews
            assert storage.lives("runs/a.alive")
            time.sleep(0.25)
    assert not storage.lives("runs/a.alive")
    storage.write("runs/b.alive", b"left by a dead one")
    assert storage.lives("runs/b.alive")
    time.sleep(3.5)
    assert not storage.lives("runs/b.alive")


def test_two_runs_that_share_a_bucket_pay_once(
    bucket: str, tmp_path: Path, reindex: Callable[..., Any]
) -> None:
    (tmp_path / "corpus").mkdir()
    texts = [f"wolf{number} fox{number}" for number in range(12)]
    for number, text in enumerate(texts):
        (tmp_path / "corpus" / f"{number}.txt").write_text(text + "\n")
    start = threading.Barrier(2)

    def run(table: str) -> tuple[Config, Any]:
        config = config_in(tmp_path, bucket, table)
        return config, reindex(config, before_second_pass=start.wait)

    with ThreadPoolExecutor() as threads:
        (one_config, one), (two_config, two) = threads.map(run, ["one", "two"])
    assert sorted([*one.sent, *two.sent]) == sorted(texts)
    for config in (one_config, two_config):
        table = open_index(config.index)
        assert table is not None
        assert table.count_rows() == len(texts)
    assert not storage_at(f"{bucket}/state").folders("runs")


def test_two_processes_that_share_a_bucket_pay_once_and_one_at_a_time_has_an_index(
    bucket: str, tmp_path: Path, prefect_api: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("VOYAGE_API_KEY", "pa-any")
    monkeypatch.setenv("PREFECT_API_URL", prefect_api)
    texts = [f"The story of animal number {number}." for number in range(200)]
    lines = [json.dumps({"id": str(n), "text": text}) for n, text in enumerate(texts)]
    (tmp_path / "animals.jsonl").write_text("\n".join(lines))
    state, config = storage_at(f"{bucket}/state"), tmp_path / "animals.yaml"

    def start(table: str, *settings: str) -> "subprocess.Popen[str]":
        chosen = [part for each in (f"index.table={table}", *settings) for part in ("--set", each)]
        return subprocess.Popen(
            [sys.executable, "-m", "flows.cli", "reindex", str(config), *chosen],
            stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True,
        )  # fmt: skip

    with Simulator(Settings(latency=Latency(base_s=10))) as simulator:
        config.write_text(
            f"""\
name: animals
source: {{kind: table, path: animals.jsonl}}
embedding: {{provider: voyage, model: voyage-4, dimension: 256, base_url: {simulator.base_url}}}
limits: {{texts_per_request: 5, concurrency: 2}}
index: {{uri: '{bucket}/index', table: t}}
state: {{uri: '{bucket}/state'}}
""",
            encoding="utf-8",
        )
        running = [start("threads"), start("dask", "runner.kind=dask", "runner.processes=2")]
        until(lambda: len(state.folders("runs")) == 2)
        second = start("threads")
        said = second.communicate(timeout=200)[1]
        assert (second.returncode, "Another run holds the index 'threads'" in said) == (6, True), (
            said
        )
        simulator.change(latency=Latency(base_s=0.1))
        for process in running:
            assert (process.wait(300), process.communicate()[1]) == (0, "")
        totals = simulator.ledger.totals()
    assert (totals["distinct_texts"], totals["texts_billed_again"]) == (len(texts), 0)
    threads, dask = (
        open_index(load_config(config, [f"index.table={table}"]).index)
        for table in ("threads", "dask")
    )
    assert threads is not None
    assert dask is not None
    columns = ["id", "text", "vector"]
    rows = [t.search().select(columns).to_arrow().sort_by("id") for t in (threads, dask)]
    assert rows[0] == rows[1]
    assert sorted(rows[0].column("text").to_pylist()) == sorted(texts)
    assert not state.folders("runs")
