"""A file is there whole and for good, or not at all; a disk that fails loses nothing paid for."""

import json
import os
import re
import resource
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import lancedb
import pyarrow as pa
import pytest

from tasks.cache import Cache
from tasks.claims import Claims
from tasks.errors import StorageFailed
from tasks.index import Identity, committing
from tasks.journal import RunFolder, fold, unfolded_hashes
from tasks.keys import hash_column, text_hash
from tasks.lance import durable
from tasks.notes import Call
from tasks.params import Index
from tasks.providers.lexical import Lexical
from tasks.recover import Recovered, recover
from tasks.storage import Holder, Taken, local_folder, storage_at
from tests.waiting import until

ROOT = Path(__file__).parents[1]
WORDS = ["alpha", "beta", "gamma"]


@pytest.fixture(autouse=True)
def temporary(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A temporary folder of the system's that holds nothing else."""
    with pytest.MonkeyPatch.context() as patch:
        folder = tmp_path_factory.mktemp("temporary")
        patch.setattr(tempfile, "tempdir", str(folder))
        yield folder


class Disk:
    """What is asked of the disk, in order, by way of the system's own calls.

    Attributes:
        asked: Pairs of what was asked and the name of the file or folder.
        fails: Names whose sync fails.
    """

    def __init__(self, patch: pytest.MonkeyPatch) -> None:
        self.asked: list[tuple[str, str]] = []
        self.sizes: dict[str, int] = {}
        self.fails: set[str] = set()
        self._fsync, self._replace, self._unlink = os.fsync, os.replace, os.unlink
        patch.setattr(os, "fsync", self.fsync)
        patch.setattr(os, "replace", self.replace)
        patch.setattr(os, "unlink", self.unlink)

    def fsync(self, descriptor: int) -> None:
        path = Path(f"/proc/self/fd/{descriptor}").readlink()
        if path.name in self.fails:
            self.asked.append(("failed", path.name))
            raise OSError(5, "Input/output error")
        self._fsync(descriptor)
        self.sizes[path.name] = path.stat().st_size
        self.asked.append(("sync", path.name))

    def replace(self, source: Path, target: Path) -> None:
        self._replace(source, target)
        self.asked.append(("rename", Path(target).name))

    def unlink(self, path: Path) -> None:
        self._unlink(path)
        self.asked.append(("remove", Path(path).name))


@pytest.fixture
def disk(monkeypatch: pytest.MonkeyPatch) -> Disk:
    if not Path("/proc/self/fd").is_dir():
        pytest.skip("the system does not tell which file a descriptor is of")
    return Disk(monkeypatch)


# Files


def test_a_file_is_synced_then_named_then_its_folder_is_synced(tmp_path: Path, disk: Disk) -> None:
    storage_at(str(tmp_path)).write("a/b/one.arrow", b"x" * 100_000)
    assert disk.asked == [
        ("sync", "a"),  # each new folder stands in the one above it
        ("sync", tmp_path.name),
        ("sync", "one.arrow.tmp"),
        ("rename", "one.arrow"),
        ("sync", "b"),
    ]
    assert disk.sizes["one.arrow.tmp"] == 100_000
    disk.asked.clear()
    storage_at(str(tmp_path)).write("a/b/two.arrow", pa.py_buffer(b"2"))
    assert disk.asked == [("sync", "two.arrow.tmp"), ("rename", "two.arrow"), ("sync", "b")]


@pytest.mark.parametrize("failing", ["one.arrow.tmp", "b"])
def test_a_file_that_cannot_be_synced_is_not_written(
    tmp_path: Path, disk: Disk, failing: str
) -> None:
    disk.fails.add(failing)
    with pytest.raises(StorageFailed, match=r"one.arrow cannot be written: Input/output error"):
        storage_at(str(tmp_path)).write("a/b/one.arrow", b"x")
    assert not list(tmp_path.rglob("*.tmp"))


def test_files_are_read_listed_and_removed(tmp_path: Path) -> None:
    storage = storage_at(str(tmp_path / "deep"))
    assert (storage.names(""), storage.names("a"), storage.read("a/one")) == ([], [], None)
    for name, data in {"a/one": b"1", "a/b/two": b"", "ab/three": b"333"}.items():
        storage.write(name, data)
    (tmp_path / "deep/a/half.tmp").touch()  # as a kill leaves it
    assert storage.names("a") == ["a/b/two", "a/one"]
    assert [storage.read(name) for name in ("a/one", "a/b/two")] == [b"1", b""]
    storage.delete(["a/one", "a/none"])
    assert storage.names("") == ["a/b/two", "ab/three"]
    storage.delete_all("a")
    assert storage.names("") == ["ab/three"]


def test_a_folder_that_is_none_is_said_not_taken_for_an_empty_one(tmp_path: Path) -> None:
    (tmp_path / "state").write_text("a file")
    storage = storage_at(str(tmp_path / "state"))
    with pytest.raises(StorageFailed, match=r"state/runs cannot be read"):
        storage.names("runs")
    with pytest.raises(StorageFailed, match=r"state/runs/x cannot be written"):
        storage.write("runs/x", b"")


# Locks


def test_who_waits_for_a_lock_hears_for_whom_and_gets_it(tmp_path: Path) -> None:
    storage, told = storage_at(str(tmp_path)), list[Holder | None]()
    free = threading.Event()

    def hold() -> None:
        with storage.held("docs.lock", "first"):
            told.append(None)
            free.wait(20)

    holder = threading.Thread(target=hold)
    holder.start()
    while not told:
        time.sleep(0.01)
    with pytest.raises(Taken) as caught, storage.held("docs.lock", "second"):
        pass
    assert caught.value.holder is not None
    assert caught.value.holder.run_id == "first"
    assert caught.value.holder.pid == os.getpid()

    def wait() -> None:
        with storage.held("docs.lock", "third", wait_s=20, told=told.append):
            told.append(None)

    waiter = threading.Thread(target=wait)
    waiter.start()
    while len(told) < 2:
        time.sleep(0.01)
    free.set()
    waiter.join()
    holder.join()
    assert [each.run_id if each else None for each in told] == [None, "first", None]


def test_two_ways_to_write_one_folder_meet_at_one_lock(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "real").mkdir()
    (tmp_path / "link").symlink_to("real")
    monkeypatch.chdir(tmp_path)
    with storage_at(str(tmp_path / "real")).held("docs.lock", "first"):
        for uri in ("link", "real/../link", str(tmp_path / "link")):
            with pytest.raises(Taken), storage_at(uri).held("docs.lock", "second"):
                pass


# A disk that fails


@pytest.fixture
def folder(tmp_path: Path) -> RunFolder:
    return RunFolder(str(tmp_path / "state"), "run")


Write = Callable[..., str]


@pytest.fixture
def write(folder: RunFolder, lexical: Lexical, call_of: Callable[..., Call]) -> Write:
    def answer(*texts: str, batch: int) -> str:
        call = call_of("run", batch)
        vectors = lexical.embed(texts).vectors
        return folder.write_answer(hashes(*texts), vectors, lexical.space, call).name

    return answer


def hashes(*texts: str) -> pa.Array:
    return hash_column([text_hash(text) for text in texts])


def nothing(_folder: RunFolder, _calls: list[Call]) -> None:
    pass


def test_an_answer_is_not_counted_before_its_sync(
    folder: RunFolder, write: Write, disk: Disk, lexical: Lexical
) -> None:
    with folder.alive():
        disk.fails.add("00000001-01-00001.arrow.tmp")
        with pytest.raises(StorageFailed) as caught:  # neither here nor where it is rescued
            write("alpha", batch=1)
        assert caught.value.facts["lost"] == 1
        assert folder.answers == []
        assert folder.calls() == []
        write("beta", batch=2)
        assert len(folder.answers) == 1
    found = unfolded_hashes(folder.state_uri, lexical.space)
    assert [column.to_pylist() for column in found] == [hashes("beta").to_pylist()]


@pytest.mark.parametrize("fault", ["removed", "a file", "another disk"])
def test_an_answer_that_the_state_does_not_take_is_taken_up_by_the_next_run(
    folder: RunFolder, write: Write, lexical: Lexical, temporary: Path, fault: str
) -> None:
    state, calls = Path(folder.state_uri), list[Call]()
    with folder.alive():
        write("alpha", batch=1)
        state.rename(state.with_name("gone"))
        if fault == "a file":
            state.touch()
        elif fault == "another disk":
            (state / "runs").mkdir(parents=True)
        with pytest.raises(StorageFailed, match=rf"{state}.* is kept in {temporary}") as caught:
            write("beta", batch=2)
        assert caught.value.facts["lost"] == 0
        with pytest.raises(StorageFailed):
            folder.note(calls_of(folder, 3))
    if state.is_file():
        state.unlink()
    shutil.rmtree(state, ignore_errors=True)
    state.with_name("gone").rename(state)
    assert len(folder.answers) == 2
    assert len(unfolded_hashes(folder.state_uri, lexical.space)) == 2  # a plan knows of it too
    assert recover(folder.state_uri, lambda _, found: calls.extend(found)) == Recovered(2)
    assert [call.batch for call in calls] == [1, 2, 3]
    cache = Cache(folder.state_uri, lexical.space)
    assert cache.holds(hashes("alpha", "beta")).all()
    assert not [path for path in temporary.rglob("*") if path.is_file()]
    assert recover(folder.state_uri, nothing) == Recovered(0)


def calls_of(folder: RunFolder, batch: int) -> Call:
    times = ("2026-01-02T00:00:00+00:00", 0.0, 0.0)
    return Call(folder.run_id, batch, 1, 1, "first", "ProviderBusy", *times, 1, 1, 0, 0.0, "")


def test_a_file_larger_than_the_system_allows_is_said_and_counted_as_lost(
    folder: RunFolder, write: Write
) -> None:
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    ignored = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    with folder.alive():
        try:
            resource.setrlimit(resource.RLIMIT_FSIZE, (2000, hard))
            with pytest.raises(
                StorageFailed, match=r"File too large.*Nor could it be kept"
            ) as caught:
                write(*WORDS, batch=1)
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
            signal.signal(signal.SIGXFSZ, ignored)
        assert caught.value.facts["lost"] == 1  # as its call says
        assert folder.answers == []


def test_nothing_is_taken_up_from_a_temporary_folder_that_others_may_write_to(
    folder: RunFolder, write: Write, temporary: Path, lexical: Lexical
) -> None:
    with folder.alive():
        write("alpha", batch=1)
        Path(folder.state_uri).rename(Path(folder.state_uri).with_name("gone"))
        with pytest.raises(StorageFailed, match="is kept in"):
            write("beta", batch=2)
    (home,) = temporary.iterdir()
    assert home.stat().st_mode & 0o777 == 0o700
    assert len(unfolded_hashes(folder.state_uri, lexical.space)) == 1
    home.chmod(0o777)
    assert unfolded_hashes(folder.state_uri, lexical.space) == []
    with pytest.raises(StorageFailed, match="others may write to it"):
        local_folder("s3://bucket/state", "logs")


def test_what_is_folded_is_on_disk_before_its_answers_go(
    folder: RunFolder, write: Write, lexical: Lexical, disk: Disk
) -> None:
    """LanceDB itself syncs nothing."""
    with folder.alive():
        names = [write(word, batch=batch) for batch, word in enumerate(WORDS)]
        disk.asked.clear()
        fold(folder, Cache(folder.state_uri, lexical.space))
    order = [name for _, name in disk.asked]
    gone = order.index(names[0].rpartition("/")[2])
    table = next(Path(folder.state_uri).glob("vectors-*.lance"))
    made = {path.name for path in (table, *table.rglob("*"))}
    assert len(made) > 6
    assert made <= set(order[:gone])
    (note,) = [name for what, name in disk.asked if what == "rename" and name.endswith(".json")]
    assert order.index(note) < min(order.index(name) for name in made)


def test_answers_stay_when_what_was_folded_cannot_be_synced(
    folder: RunFolder, write: Write, lexical: Lexical, disk: Disk
) -> None:
    with folder.alive():
        write("alpha", batch=1)
        disk.fails.add("data")
        with pytest.raises(Exception, match="could not write the cache"):
            fold(folder, Cache(folder.state_uri, lexical.space))
        assert len(folder.answers) == 1
        disk.fails.clear()
        disk.asked.clear()
        assert fold(folder, Cache(folder.state_uri, lexical.space)) == 0  # it is there already
        assert ("sync", "data") in disk.asked  # but only now for good
        assert folder.answers == []


def test_what_is_committed_to_the_index_is_on_disk_before_its_note_goes(
    tmp_path: Path, lexical: Lexical, index_in: Callable[..., Index], disk: Disk
) -> None:
    index = index_in(tmp_path)
    table = Path(index.uri) / "t.lance"
    with committing(index, 0):
        schema = Identity(lexical.space, "").schema([])
        made = lancedb.connect(index.uri).create_table("t", schema=schema)
        made.tags.create("gen-1", made.version)
    gone = disk.asked.index(("remove", "t.committing"))
    synced = {name for what, name in disk.asked[:gone] if what == "sync"}
    assert {"gen-1.json", "_versions", "t.lance", "index"} <= synced
    assert {path.name for path in table.rglob("*")} <= synced


@pytest.fixture
def half_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr("tasks.lance.ALONG_S", 0.01)
    data = tmp_path / "t.lance" / "data"
    data.mkdir(parents=True)
    return data / "half.lance"


def test_what_a_commit_writes_is_synced_while_it_is_written(
    tmp_path: Path, half_written: Path, disk: Disk
) -> None:
    with durable(str(tmp_path), "t"):
        half_written.write_bytes(b"half")
        until(lambda: ("sync", "half.lance") in disk.asked)


def test_an_error_that_the_system_tells_meanwhile_is_not_lost(
    tmp_path: Path, half_written: Path, disk: Disk
) -> None:
    """Linux tells an error of the disk once; who syncs after that is told that all is well."""

    def commit() -> None:
        with durable(str(tmp_path), "t"):
            half_written.write_bytes(b"half")
            until(lambda: ("failed", "half.lance") in disk.asked)
            disk.fails.clear()

    disk.fails.add("half.lance")
    with pytest.raises(OSError, match="Input/output error"):
        commit()


# Many at once

MANY = """
import sys
import pyarrow as pa
from pathlib import Path
from tasks.cache import Cache
from tasks.claims import Claims
from tasks.index import Identity, held, open_index
from tasks.keys import hash_column, text_hash
from tasks.limits import Limits
from tasks.params import Index
from tasks.providers.lexical import Lexical
from tasks.publish import publish
from tasks.schemas import DELETIONS, TableRef, rows_schema, vectors_schema

home, number = Path(sys.argv[1]), sys.argv[2]
provider = Lexical(64, Limits(None, None, 999, None, 1))
texts = [f"word{n}" for n in range(100)]
hashes = hash_column([text_hash(text) for text in texts])
vectors = pa.FixedSizeListArray.from_arrays(provider.embed(texts).vectors.reshape(-1), 64)
print("ready", flush=True)
sys.stdin.readline()
cache = Cache(str(home / "state"), provider.space)
for part in range(0, 100, 20):
    schema = vectors_schema(provider.space.vector_type)
    some = slice(part, part + 20)
    cache.remember([pa.Table.from_arrays([hashes[some], vectors[some]], schema=schema)])
index = Index.model_validate({"uri": str(home / "index"), "table": "t", "max_wait": 120})
with held(index, f"run-{number}"):
    table = open_index(index)
    known = set() if table is None else set(table.to_arrow().column("id").to_pylist())
    own = [*range(50), *range(50 + 10 * int(number), 60 + 10 * int(number))]
    ids = [f"id{n}" for n in own]
    rows = pa.table([
        ids, pa.nulls(60, pa.utf8()), [texts[n] for n in own], hashes.take(pa.array(own)),
        pa.nulls(60, pa.int32()), pa.nulls(60, pa.int32()),
    ], schema=rows_schema([]))
    staging = home / number
    publish(
        rows=TableRef.write(staging / "rows.arrow", rows.schema, rows.to_batches()),
        deletions=TableRef.write(staging / "gone.arrow", DELETIONS, []),
        updates=len(known & set(ids)),
        index=index,
        identity=Identity(provider.space, ""),
        cache=cache,
        run_id=f"run-{number}",
    )
"""


@pytest.mark.slow
def test_five_processes_at_once_leave_no_row_twice(tmp_path: Path, lexical: Lexical) -> None:
    started = [
        subprocess.Popen(
            [sys.executable, "-c", MANY, str(tmp_path), str(number)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            cwd=ROOT,
        )
        for number in range(5)
    ]
    for process in started:
        assert process.stdout is not None
        assert process.stdout.readline() == "ready\n"
    for process in started:
        process.communicate("go\n")
    assert [process.returncode for process in started] == [0] * 5
    connect = lancedb.connect
    ids = connect(tmp_path / "index").open_table("t").to_arrow().column("id").to_pylist()
    assert sorted(ids) == sorted(f"id{n}" for n in range(100))
    space = Lexical(64, lexical.limits).space
    cached = connect(tmp_path / "state").open_table(Cache(str(tmp_path / "state"), space).name)
    assert cached.count_rows() == 100
    assert len(set(cached.to_arrow().column("text_hash").to_pylist())) == 100


FULL = """
set -eu
cd "$1"
mount -t tmpfs -o size=3m disk state
set +e
"$2" -m flows.cli reindex full.yaml --report first.json; echo $? > first.code
mount -o remount,size=64m state
"$2" -m flows.cli reindex full.yaml --report second.json; echo $? > second.code
"""


@pytest.mark.slow
def test_a_run_on_a_full_disk_says_so_and_the_next_one_pays_only_the_rest(
    tmp_path: Path, temporary: Path
) -> None:
    """A real disk of 3 MB that a run fills up, and that is larger before the next."""
    tried = subprocess.run(["unshare", "-rm", "true"], check=False, capture_output=True)
    if tried.returncode:
        pytest.skip("mounting needs rights that this machine does not give")
    (tmp_path / "state").mkdir()
    (tmp_path / "corpus").mkdir()
    for number in range(40):
        lines = [f"bird{number}x{line} sings" for line in range(100)]
        (tmp_path / f"corpus/{number}.md").write_text("\n\n".join(lines))
    (tmp_path / "full.yaml").write_text(
        "name: full\n"
        "source: {kind: files, path: ./corpus, split: {max_tokens: 16, overlap_tokens: 0}}\n"
        "embedding: {provider: lexical, dimension: 512}\n"
        "limits: {texts_per_request: 50}\n"
        "index: {uri: ./index, table: full}\n"
        "state: {uri: ./state}\n"
    )
    command = ["unshare", "-rm", "sh", "-c", FULL, "sh", str(tmp_path), sys.executable]
    done = subprocess.run(
        command,
        check=False,
        capture_output=True,
        text=True,
        timeout=280,
        env={**os.environ, "TMPDIR": str(temporary), "PYTHONPATH": str(ROOT)},
    )
    assert (tmp_path / "first.code").read_text() == "1\n", done.stderr
    assert (tmp_path / "second.code").read_text() == "0\n", done.stderr
    assert re.search(rf"{tmp_path}/state.*No space left on device", done.stderr)
    assert re.search(r"[\d,]+ texts of [\d,]+ are paid for and kept", done.stderr)
    report = json.loads((tmp_path / "second.json").read_text())
    assert report["recovered_vectors"] > 0
    known = report["texts"]["from_cache"]
    assert known == report["recovered_vectors"] > 500
    assert known + report["texts"]["embedded"] == report["texts"]["unique"]
    assert "lost" not in done.stderr


def test_folders_are_listed_and_locks_are_seen_to_be_held(tmp_path: Path) -> None:
    storage = storage_at(str(tmp_path / "state"))
    assert storage.folders("runs") == []
    assert not storage.lives("runs/a.alive")
    with storage.held("runs/a.alive", "a"):
        storage.write("runs/a/claims/1", b"1", durable=False)
        storage.write("runs/b/answers/deep/1", b"1")
        assert sorted(storage.folders("runs")) == ["a", "b"]
        assert storage.lives("runs/a.alive")
        assert storage.lives("runs/a.alive")
    assert not storage.lives("runs/a.alive")
    with storage.held("runs/a.alive", "a"):  # asking holds nothing
        assert storage.read("runs/a/claims/1") == b"1"


def test_a_lock_that_its_holder_removes_is_no_lost_disk(tmp_path: Path) -> None:
    storage = storage_at(str(tmp_path))
    with storage.held("runs/one.alive", "one"), storage.held("runs/two.alive", "two"):
        storage.delete(["runs/one.alive"])
        storage.write("runs/two/x", b"1")
    assert storage.read("runs/two/x") is not None


def test_a_run_that_others_take_for_dead_claims_nothing(tmp_path: Path, lexical: Lexical) -> None:
    folder = RunFolder(str(tmp_path), "run")
    with folder.alive():
        claims = Claims(folder, Cache(str(tmp_path), lexical.space))
        (tmp_path / folder.lock).unlink()  # as another one does that takes it up
        with pytest.raises(StorageFailed, match="while a run held"):
            claims.claim(1, hash_column([text_hash("alpha")]))
