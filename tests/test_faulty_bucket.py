"""A bucket that fails half-way: what a disk promises, it promises too."""

import http.client
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from datetime import timedelta
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Thread
from typing import Any

import pytest

from tasks.errors import CorpusError, EmbedOnceError, SettingsError, StorageFailed
from tasks.form import Overrides
from tasks.index import generations, open_index, published_index
from tasks.lance import data_bytes, tags_of, versions_of
from tasks.params import Config, TableSource
from tasks.plan import make_plan
from tasks.providers import Answer
from tasks.providers.lexical import Lexical
from tasks.read import ReadNotes, formats
from tasks.read import bucket as buckets
from tasks.read.tables import TableReader
from tasks.shape import shape_of
from tasks.storage import objects, storage_at
from tasks.survey import require_runnable

pytestmark = pytest.mark.slow

Fault = Callable[[str, str], str | None]
"""For method and path of a request: a status, "reset" or "cut"; None to let it pass."""


class Road:
    """What stands between us and the store: it passes requests on, or fails them.

    Attributes:
        fault: What becomes of a request.
        requests: Method and path of each of them.
    """

    def __init__(self) -> None:
        self.fault: Fault = lambda _method, _path: None
        self.requests: list[tuple[str, str]] = []


class Passing(BaseHTTPRequestHandler):
    """A request on its way to the store at `host`, over `road`."""

    road: Road
    host: str
    protocol_version = "HTTP/1.1"

    def handle_one_request(self) -> None:
        self.raw_requestline = self.rfile.readline(65537)
        if not self.parse_request():
            return
        body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
        self.road.requests.append((self.command, self.path))
        fault = self.road.fault(self.command, self.path)
        self.close_connection = True
        if fault == "reset":
            return
        if fault is not None and fault.isdigit():
            code = f"<Error><Code>Code{fault}</Code><Message>As asked for</Message></Error>"
            self._answer(int(fault), {}, code.encode())
            return
        upstream = http.client.HTTPConnection(self.host, timeout=60)
        upstream.putrequest(self.command, self.path, skip_host=True, skip_accept_encoding=True)
        for name, value in self.headers.items():
            upstream.putheader(name, value)
        upstream.endheaders(body)
        found = upstream.getresponse()
        data = found.read()
        self._answer(found.status, dict(found.getheaders()), data, cut=fault == "cut")
        upstream.close()

    def _answer(
        self, status: int, headers: dict[str, str], data: bytes, *, cut: bool = False
    ) -> None:
        self.send_response_only(status)
        left_out = {"connection", "transfer-encoding", "content-length"}
        for name, value in headers.items():
            if name.lower() not in left_out:
                self.send_header(name, value)
        length = headers.get("Content-Length", str(len(data)))
        self.send_header("Content-Length", length)
        self.send_header("Connection", "close")
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(data[: len(data) // 2] if cut else data)


@pytest.fixture
def road(s3: str, monkeypatch: pytest.MonkeyPatch) -> Iterator[Road]:
    """All requests of this process to the store go over it, with few and quick retries."""
    road = Road()
    fields = {"road": road, "host": s3.removeprefix("http://")}
    server = ThreadingHTTPServer(("127.0.0.1", 0), type("Handler", (Passing,), fields))
    thread = Thread(target=server.serve_forever)
    thread.start()
    monkeypatch.setenv("AWS_ENDPOINT_URL", f"http://127.0.0.1:{server.server_port}")
    quick = {"max_retries": 2, "backoff": {"init_backoff": timedelta(milliseconds=5)}}
    monkeypatch.setattr(objects, "RETRY", quick)
    monkeypatch.setenv("OBJECT_STORE_CLIENT_MAX_RETRIES", "1")  # LanceDB's own
    for name, seconds in (("BEAT_S", 0.2), ("LASTS_S", 1.0), ("LOOK_S", 0.1)):
        monkeypatch.setattr(objects, name, seconds)
    yield road
    server.shutdown()
    thread.join()
    server.server_close()


def config_in(bucket: str, home: str | Path, **source: Any) -> Config:
    return Config.model_validate(
        {
            "name": "stored",
            "source": {"kind": "files", "path": f"{bucket}/corpus", **source},
            "embedding": {"provider": "lexical", "dimension": 64},
            "limits": {"texts_per_request": 1 if home == bucket else None},
            "index": {"uri": f"{home}/index", "table": "t"},
            "state": {"uri": f"{home}/state"},
        }
    )


def write(bucket: str, *words: str) -> None:
    for word in words:
        storage_at(bucket).write(f"corpus/{word}.md", f"# {word}\n\nA {word}.\n".encode())


def documents_in(config: Config) -> list[str]:
    table = open_index(config.index)
    return [] if table is None else sorted(table.to_arrow().column("document").to_pylist())


def times(most: int, fault: str, part: str) -> Fault:
    """`fault` for so many requests with `part` in their path, but for those of the index."""
    left = [most]

    def decide(_method: str, path: str) -> str | None:
        if part in path and left[0]:
            left[0] -= 1
            return fault
        return None

    return decide


def from_now(road: Road, after: int, fault: str) -> Fault:
    """`fault` for all requests, after so many more."""
    first = len(road.requests) + after
    return lambda _method, _path: fault if len(road.requests) > first else None


# Reading


@pytest.mark.parametrize("fault", ["503", "500", "reset", "cut"])
def test_a_fault_that_passes_is_not_noticed(
    road: Road, bucket: str, tmp_path: Path, reindex: Callable[..., Any], fault: str
) -> None:
    write(bucket, "owl", "stork")
    road.fault = times(2, fault, "corpus/owl.md")
    ran = reindex(config_in(bucket, tmp_path))
    assert documents_in(config_in(bucket, tmp_path)) == ["owl.md", "stork.md"]
    assert not ran.survey.keyed.notes.unread
    assert road.requests.count(("GET", f"/{bucket.removeprefix('s3://')}/corpus/owl.md")) >= 3


@pytest.mark.parametrize("fault", ["403", "404", "400"])
def test_an_object_that_is_not_given_keeps_its_rows(
    road: Road, bucket: str, tmp_path: Path, reindex: Callable[..., Any], fault: str
) -> None:
    config = config_in(bucket, tmp_path)
    write(bucket, "owl", "stork", "crane")
    reindex(config)
    write(bucket, "heron")
    storage_at(bucket).delete(["corpus/crane.md"])
    road.fault = times(99, fault, "corpus/owl.md")
    ran = reindex(config)
    assert ran.survey.keyed.notes.unread == ["owl.md"]
    assert ran.survey.keyed.notes.skipped == {"unreadable": 1}
    assert documents_in(config) == ["heron.md", "owl.md", "stork.md"]


@pytest.mark.parametrize(
    "fault",
    [
        (fault, part)
        for fault in ("503", "429", "401", "reset", "cut")
        for part in ("owl.md", "continuation")
    ],
    ids="-".join,
)
def test_a_store_that_fails_while_the_corpus_is_read_deletes_nothing(
    road: Road,
    bucket: str,
    tmp_path: Path,
    reindex: Callable[..., Any],
    fault: tuple[str, str],
) -> None:
    config = config_in(bucket, tmp_path)
    write(bucket, "owl", "stork", *(f"bird{number}" for number in range(10)))
    reindex(config)
    before = documents_in(config)
    assert len(before) == 12
    storage_at(bucket).delete(["corpus/stork.md"])
    road.fault = times(999, *fault)
    with pytest.raises(StorageFailed, match=rf"{bucket}/corpus.* cannot be (read|listed): .+ run"):
        reindex(config)
    road.fault = times(0, "", "")
    assert documents_in(config) == before
    assert reindex(config).published.way == "merge"
    assert documents_in(config) == [name for name in before if name != "stork.md"]


@pytest.mark.parametrize("fault", ["503", "reset", "403"])
def test_a_table_that_is_read_in_part_is_no_corpus(
    road: Road, bucket: str, monkeypatch: pytest.MonkeyPatch, fault: str
) -> None:
    monkeypatch.setattr(buckets, "RANGE_BYTES", 1 << 14)
    monkeypatch.setattr(formats, "BLOCK_BYTES", 1 << 14)
    lines = (f"{number},text of {number}\n" for number in range(20_000))
    storage_at(bucket).write("t.csv", f"id,text\n{''.join(lines)}".encode())
    source = TableSource.model_validate({"kind": "table", "path": f"{bucket}/t.csv"})
    chunks = TableReader(source).chunks(ReadNotes())
    next(chunks)
    road.fault = times(999, fault, "t.csv")
    expected = CorpusError if fault == "403" else StorageFailed
    with pytest.raises(expected, match=rf"{bucket}/t\.csv cannot be read"):
        list(chunks)


def test_what_is_wrong_from_the_start_is_a_setting(road: Road, bucket: str, tmp_path: Path) -> None:
    write(bucket, "owl")
    for fault, said in (
        ("403", "Code403: As asked for"),
        ("503", "Code503: As asked for"),
        ("reset", "error sending request"),
    ):
        road.fault = times(99, fault, "corpus")
        for act in (make_plan, require_runnable):
            with pytest.raises(SettingsError, match=rf"source\.path: {bucket}/corpus.*{said}"):
                act(config_in(bucket, tmp_path), Overrides())
    road.fault = times(0, "", "")
    with pytest.raises(SettingsError, match=rf"source\.path: there is nothing at {bucket}/none"):
        make_plan(config_in(bucket, tmp_path, path=f"{bucket}/none"), Overrides())
    with pytest.raises(SettingsError, match=r"source\.path: s3://no-such-bucket.*NoSuchBucket"):
        make_plan(config_in(bucket, tmp_path, path="s3://no-such-bucket/x"), Overrides())


# Whole runs


@pytest.mark.parametrize("fault", ["503", "reset", "403"])
def test_a_store_that_lancedb_does_not_reach_is_told_of_in_words(
    road: Road, bucket: str, fault: str
) -> None:
    road.fault = times(999, fault, "__manifest")
    with pytest.raises(StorageFailed, match=r"The table t in s3://.*cannot be opened: .+ run aga"):
        open_index(config_in(bucket, bucket).index)
    road.fault = times(0, "", "")
    assert open_index(config_in(bucket, bucket).index) is None


@pytest.mark.parametrize("fault", ["503", "reset", "403"])
def test_versions_and_tags_that_cannot_be_listed_are_told_of_in_words(
    road: Road, bucket: str, reindex: Callable[..., Any], fault: str
) -> None:
    write(bucket, "owl")
    config = config_in(bucket, bucket)
    reindex(config)
    table = published_index(config.index)
    for look in (versions_of, tags_of, data_bytes, shape_of, generations):
        road.fault = times(999, fault, "index")
        with pytest.raises(StorageFailed, match=r"The table t in s3://.*cannot be opened"):
            look(table)
        road.fault = times(0, "", "")
        assert look(table)


def test_a_commit_whose_tag_the_store_refuses_is_taken_up_by_the_next_run(
    road: Road, bucket: str, reindex: Callable[..., Any], paid_for: Counter[str]
) -> None:
    config = config_in(bucket, bucket)
    write(bucket, "owl")
    reindex(config)
    write(bucket, "stork")
    road.fault = times(999, "503", "_refs")
    with pytest.raises(EmbedOnceError, match=r"cannot be opened|could not write"):
        reindex(config)
    road.fault = times(0, "", "")
    table = published_index(config.index)
    assert [each.number for each in generations(table)] == [1]
    assert generations(table)[0].version < table.version
    reindex(config)
    assert [each.number for each in generations(published_index(config.index))] == [1, 2]
    assert set(paid_for.values()) == {1}


@pytest.fixture
def paid_for(monkeypatch: pytest.MonkeyPatch) -> Counter[str]:
    """How often each text was sent to the provider."""
    counted, embed = Counter[str](), Lexical.embed

    def counting(self: Lexical, texts: Sequence[str]) -> Answer:
        counted.update(texts)
        return embed(self, texts)

    monkeypatch.setattr(Lexical, "embed", counting)
    return counted


@pytest.mark.parametrize("fault", ["503", "reset"])
def test_a_run_whose_store_fails_at_any_request_loses_nothing_and_pays_once(
    road: Road,
    bucket: str,
    reindex: Callable[..., Any],
    paid_for: Counter[str],
    fault: str,
) -> None:
    config = config_in(bucket, bucket)
    write(bucket, "owl", "stork", "crane")
    reindex(config)
    old = documents_in(config)
    new = sorted({*old, "heron.md", "ibis.md"} - {"owl.md"})
    storage_at(bucket).delete(["corpus/owl.md"])
    write(bucket, "heron", "ibis")

    ended = 0
    for after in range(0, 4000, 53):
        road.fault = from_now(road, after, fault)
        try:
            reindex(config)
        except EmbedOnceError:
            ended += 1
        else:
            road.fault = times(0, "", "")
            break
        road.fault = times(0, "", "")
        assert documents_in(config) in (old, new)
    assert ended > 2
    assert documents_in(config) == new
    assert set(paid_for.values()) == {1}
