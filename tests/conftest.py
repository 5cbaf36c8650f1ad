"""What several tests share: fresh folders, tables by reference, a corpus in memory, a whole run."""

import itertools
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
import uuid
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest
import requests

from tasks.claims import Shared, take_up
from tasks.embed import embed_batch
from tasks.fill import Filled
from tasks.form import Overrides
from tasks.index import adopt, held, open_index, vectors_of
from tasks.journal import RunFolder, fold, unfolded_answers
from tasks.keys import KeySet, hash_column, text_hash
from tasks.limits import Limits
from tasks.notes import Call
from tasks.params import Config, Index
from tasks.prepare import PLAIN, Preparation
from tasks.providers.lexical import Lexical
from tasks.publish import Published, tidy_published
from tasks.read import ReadNotes, Wanted
from tasks.recover import Recovered, recover
from tasks.run import keep_found, keep_scanned, publish_found
from tasks.schemas import BATCH, CHUNKS, TableRef, vectors_schema
from tasks.sender import Terms, forget_sender, sender_of
from tasks.simulator import Latency, Simulator
from tasks.survey import Survey, require_safe, survey

ANY = Limits(
    requests_per_minute=None,
    tokens_per_minute=None,
    texts_per_request=1000,
    tokens_per_request=None,
    concurrency=2,
)


@pytest.fixture(scope="session")
def fresh(tmp_path_factory: pytest.TempPathFactory) -> Callable[[], Path]:
    """A new empty folder for each call, so that each example of a property starts anew."""
    base, numbers = tmp_path_factory.mktemp("fresh"), itertools.count()

    def folder() -> Path:
        path = base / str(next(numbers))
        path.mkdir()
        return path

    return folder


@pytest.fixture(scope="session")
def lexical() -> Lexical:
    return Lexical(256, ANY)


@pytest.fixture(scope="session")
def paid(lexical: Lexical) -> Callable[..., pa.Table]:
    """Texts with their vectors, as an answer brings them."""

    def embed(*texts: str) -> pa.Table:
        vectors = pa.array(lexical.embed(texts).vectors.reshape(-1))
        columns = [
            hash_column([text_hash(text) for text in texts]),
            pa.FixedSizeListArray.from_arrays(vectors, lexical.dimension),
        ]
        return pa.Table.from_arrays(columns, schema=vectors_schema(lexical.space.vector_type))

    return embed


@pytest.fixture(scope="session")
def ref(fresh: Callable[[], Path]) -> Callable[..., TableRef]:
    """A table by reference, from rows as dictionaries."""

    def write(
        schema: pa.Schema, rows: Sequence[Mapping[str, Any]], batch_rows: int = 3
    ) -> TableRef:
        table = pa.Table.from_pylist([dict(row) for row in rows], schema=schema)
        return TableRef.write(fresh() / "t.arrow", schema, table.to_batches(batch_rows))

    return write


@pytest.fixture(scope="session")
def index_in() -> Callable[..., Index]:
    """An index in a folder."""

    def make(folder: Path, table: str = "t") -> Index:
        return Index.model_validate({"uri": str(folder / "index"), "table": table})

    return make


@pytest.fixture(scope="session")
def call_of() -> Callable[..., Call]:
    """A call to a provider that ended well."""

    def make(
        run_id: str = "run", batch: int = 1, attempt: int = 1, status: str = "ok", call: int = 1
    ) -> Call:
        return Call(
            run_id=run_id,
            batch=batch,
            attempt=attempt,
            call=call,
            cause="first",
            status=status,
            started_at="2026-01-01T00:00:00+00:00",
            waited=0.0,
            seconds=0.5,
            texts=1,
            tokens_estimated=3,
            tokens_billed=3,
            usd=0.0,
            request_id="",
        )

    return make


@pytest.fixture(scope="session")
def run_folder() -> Callable[..., RunFolder]:
    """The folder of a run, made as a living run makes it, but not held."""

    def make(state: Path, run_id: str = "run") -> RunFolder:
        folder = RunFolder(str(state), run_id)
        folder.staging.mkdir(parents=True)
        return folder

    return make


@dataclass
class MemoryReader:
    """A corpus in memory, one chunk a row; each reading takes the next of `states`.

    A state is a list of rows: (id or None, document, text, metadata value).
    """

    states: Sequence[Sequence[tuple[str | None, str | None, str, str | None]]]
    metadata: list[pa.Field] = field(default_factory=lambda: [pa.field("lang", pa.utf8())])
    splitter: str = ""
    preparation: Preparation = PLAIN
    batch_rows: int = 3
    readings: int = 0

    def chunks(self, notes: ReadNotes, wanted: Wanted | None = None) -> Iterator[pa.RecordBatch]:
        state = self.states[min(self.readings, len(self.states) - 1)]
        self.readings += 1
        rows = [row for row in state if wanted is None or wanted(row[1])]
        notes.documents += len({row[1] for row in rows})
        lines: Counter[str | None] = Counter()
        records = []
        for id_, document, text, value in rows:
            record: dict[str, Any] = {"id": id_, "document": document, "text": text}
            if id_ is None:  # a file, a line a chunk
                lines[document] += 1
                record |= {"start_line": lines[document], "end_line": lines[document]}
            records.append({**record, **{own.name: value for own in self.metadata}})
        schema = pa.schema([*CHUNKS, *self.metadata])
        yield from pa.Table.from_pylist(records, schema=schema).to_batches(self.batch_rows)


@pytest.fixture(scope="session")
def memory_reader() -> type[MemoryReader]:
    return MemoryReader


@dataclass
class Library:
    """A table of chunks in a folder, and the config of an index of it."""

    folder: Path
    run: Callable[..., "Ran"]
    settings: dict[str, Any] = field(default_factory=dict)
    name: str = "t"

    @property
    def config(self) -> Config:
        place = {"uri": str(self.folder / "index"), "table": self.name}
        values: dict[str, Any] = {
            "name": self.name,
            "source": {"kind": "table", "path": str(self.folder / f"{self.name}.arrow")},
            "embedding": {"provider": "lexical", "dimension": 256},
            "index": {**place, "max_deleted_fraction": 1.0, **self.settings},
            "state": {"uri": str(self.folder / "state")},
        }
        return Config.model_validate(values)

    def reindex(self, texts: Mapping[str, str], **options: Any) -> "Ran":
        """Make the corpus `texts`, by id, and the index follow it."""
        table = pa.table({"id": pa.array(texts, pa.utf8()), "text": list(texts.values())})
        with pa.ipc.new_file(self.folder / f"{self.name}.arrow", table.schema) as writer:
            writer.write_table(table)
        return self.run(self.config, **options)

    def texts(self) -> dict[str, str]:
        """The rows that readers see, by id."""
        table = open_index(self.config.index)
        assert table is not None
        rows = table.search().select(["id", "text"]).to_list()
        return {row["id"]: row["text"] for row in rows}


@pytest.fixture(scope="session")
def library_class() -> type[Library]:
    return Library


@pytest.fixture
def library(tmp_path: Path, reindex: Callable[..., "Ran"]) -> Library:
    return Library(tmp_path, reindex)


@pytest.fixture(scope="session")
def python() -> list[str]:
    """The start of a command that heeds Ctrl-C, also where a script runs it in the background."""
    code = (
        "import os, signal, sys; signal.signal(signal.SIGINT, signal.SIG_DFL); os.execv({0}, {1})"
    )
    return [sys.executable, "-c", code.format("sys.executable", "[sys.executable, *sys.argv[1:]]")]


@pytest.fixture
def slowed() -> Callable[[Simulator], int]:
    """Has each call from now on take 8 s; returns how many have arrived once no slot is free."""

    def slow(simulator: Simulator) -> int:
        simulator.change(latency=Latency(base_s=8))
        arrived, since = -1, time.monotonic()
        while time.monotonic() - since < 1.5:  # longer than a call took before
            now = simulator.ledger.arrivals
            if now != arrived:
                arrived, since = now, time.monotonic()
            time.sleep(0.02)
        return arrived

    return slow


@pytest.fixture
def heeded() -> Iterator[None]:
    """Ctrl-C is heeded in this process, also where a script started it in the background."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


class Died(Exception):
    """A run that ends here leaves behind what a killed one leaves."""


@dataclass
class Ran:
    """What one run did.

    Attributes:
        survey: What it knew before anything was sent.
        published: What it committed.
        sent: The texts it paid for, in the order they were sent.
        recovered: Vectors that it took up from runs that had died.
        calls: The calls of those runs.
    """

    survey: Survey
    published: Published
    sent: list[str]
    recovered: Recovered
    calls: list[Call]


@pytest.fixture(scope="session")
def reindex() -> Callable[..., Ran]:
    """One run as the flow composes it, by plain calls and without Prefect.

    `die_after` ends the run after so many answers, with nothing folded or cleaned up.
    """
    numbers = itertools.count(1)

    def run(
        config: Config,
        overrides: Overrides | None = None,
        *,
        die_after: int | None = None,
        before_second_pass: Callable[[], None] = lambda: None,
    ) -> Ran:
        overrides = overrides or Overrides()
        folder, calls = RunFolder(config.state.uri, f"run-{next(numbers):04d}"), list[Call]()
        with held(config.index, folder.run_id), folder.alive():
            recovered = recover(
                config.state.uri, lambda _, found: calls.extend(found), besides=folder.run_id
            )
            adopt(config.index)
            found = survey(config, overrides, folder.staging)
            require_safe(found, overrides)
            for known in vectors_of(config.index, found.looked_up.in_index):
                found.cache.remember([known])
            living = unfolded_answers(config.state.uri, found.cache.space)
            found.cache.remember(answer.table for answer in living)
            before_second_pass()
            filled, sent = embed_all(found, folder, die_after)
            published = publish_found(found, filled, folder.run_id)
            folder.forget_notes()
            keep_found(found, filled, published)
            tidy_published(published, filled.rows.rows, config.index, found.cache, folder.run_id)
            keep_scanned(found, filled)
        return Ran(found, published, sent, recovered, calls)

    return run


def embed_all(found: Survey, folder: RunFolder, die_after: int | None) -> tuple[Filled, list[str]]:
    terms = Terms(found.provider, folder, 0.0)
    filling = found.filling(sender_of(terms), folder.staging)
    sent, shared = list[str](), Shared()
    for number, batch in enumerate(filling.batches()):
        if number == die_after:
            raise Died
        embedded = embed_batch(batch, terms, attempt=1)
        shared.add(embedded.found, embedded.found_tokens)
        rows = batch.table.load(BATCH)
        ours = ~KeySet(embedded.found).holds(rows.column("text_hash"))
        sent += rows.filter(pa.array(ours)).column("text").to_pylist()
    fold(folder, found.cache)
    take_up(found.cache, folder.state_uri, shared.hashes)
    forget_sender(folder)
    return filling.finish(found.refused([])), sent


@pytest.fixture(scope="session")
def died() -> type[Died]:
    return Died


@pytest.fixture(scope="module")
def project(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A copy of the project's committed files, with nothing installed or built."""
    original = Path(__file__).parents[1]
    folder = tmp_path_factory.mktemp("project")
    listed = subprocess.run(
        ["git", "ls-files"], cwd=original, check=True, capture_output=True, text=True
    )
    for name in listed.stdout.splitlines():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(original / name, folder / name)
    return folder


@pytest.fixture(scope="session")
def prefect_api() -> Iterator[str]:
    """The address of a Prefect server with an empty database, shared by all tests of a session."""
    from prefect.settings import (  # noqa: PLC0415 - most tests need no Prefect
        PREFECT_API_URL,
        PREFECT_FLOWS_HEARTBEAT_FREQUENCY,
        temporary_settings,
    )
    from prefect.testing.utilities import prefect_test_harness  # noqa: PLC0415

    # A run waits for the thread of its heartbeats to wake up, up to a second.
    quick = temporary_settings({PREFECT_FLOWS_HEARTBEAT_FREQUENCY: None})
    with prefect_test_harness(server_startup_timeout=120), quick:
        yield str(PREFECT_API_URL.value())


@pytest.fixture(scope="module")
def s3() -> Iterator[str]:
    """The address of an S3 server, which all processes find by the usual variables."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [sys.executable, "-m", "moto.server", "-p", str(port)]
    moto = subprocess.Popen(
        command,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        env={**os.environ, "MOTO_S3_DEFAULT_MAX_KEYS": "10"},  # objects of a page
    )
    address = f"http://127.0.0.1:{port}"
    variables = {
        "AWS_ACCESS_KEY_ID": "test",
        "AWS_SECRET_ACCESS_KEY": "test",
        "AWS_REGION": "us-east-1",
        "AWS_ENDPOINT_URL": address,
        "AWS_ALLOW_HTTP": "true",
    }
    with pytest.MonkeyPatch.context() as patch:
        for name, value in variables.items():
            patch.setenv(name, value)
        try:
            for _ in range(1200):
                with suppress(OSError):
                    socket.create_connection(("127.0.0.1", port)).close()
                    break
                time.sleep(0.05)
            yield address
        finally:
            moto.kill()
            moto.wait()


@pytest.fixture
def bucket(s3: str) -> str:
    """An empty bucket, of a name of its own also where tests run side by side."""
    name = f"bucket-{uuid.uuid4()}"
    requests.put(f"{s3}/{name}", timeout=10).raise_for_status()
    return f"s3://{name}"
