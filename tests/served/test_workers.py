"""Calls made by workers of Dask: the same index, the same bill, and nothing lost with a worker."""

import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
from prefect.events.worker import EventsWorker
from prefect.settings import PREFECT_API_URL, temporary_settings

import tasks.workers
from flows.reindex import run
from tasks.errors import BudgetReached, EmbedOnceError, SettingsError
from tasks.form import Overrides
from tasks.index import open_index
from tasks.params import load_config
from tasks.report import RunReport
from tasks.simulator import Latency, Rule, Settings, Simulator

pytestmark = [pytest.mark.slow, pytest.mark.timeout(600)]

TEXTS, TEXTS_PER_REQUEST, CONCURRENCY = 240, 4, 6
A_MINUTE = 60
"""Requests of an account that runs share."""
LATENCY = Latency(base_s=0.3)


class Cluster:
    """A scheduler of Dask and two workers, each a process of its own.

    Attributes:
        address: Of the scheduler.
        workers: The processes.
    """

    def __init__(self, folder: Path) -> None:
        with socket.create_server(("127.0.0.1", 0)) as free:
            port = free.getsockname()[1]
        self._folder = folder
        self.address = f"tcp://127.0.0.1:{port}"
        self._scheduler = self._start(
            "dask_scheduler", "--host", "127.0.0.1", "--port", str(port), "--no-dashboard"
        )
        deadline = time.monotonic() + 120
        while True:  # a run asks it for ten seconds only
            with suppress(OSError), socket.create_connection(("127.0.0.1", port)):
                break
            assert self._scheduler.poll() is None
            assert time.monotonic() < deadline
            time.sleep(0.1)
        self.workers = [self.join(), self.join()]

    def join(self) -> "subprocess.Popen[bytes]":
        """One more worker."""
        return self._start(
            "dask_worker", self.address, "--no-nanny", "--nthreads", str(CONCURRENCY),
            "--no-dashboard", "--local-directory", str(self._folder), "--memory-limit", "0",
        )  # fmt: skip

    def _start(self, what: str, *arguments: str) -> "subprocess.Popen[bytes]":
        return subprocess.Popen(
            [sys.executable, "-m", f"distributed.cli.{what}", *arguments],
            env={**os.environ, "VOYAGE_API_KEY": "pa-any"},
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )

    def end(self) -> None:
        for process in [*self.workers, self._scheduler]:
            process.kill()
            process.wait()


@pytest.fixture(scope="module")
def database() -> Iterator[dict[str, str]]:
    """A PostgreSQL server with an empty database, for the Prefect server."""
    places = [*Path("/usr/lib/postgresql").glob("*/bin"), *map(Path, os.get_exec_path())]
    programs = next((place for place in places if (place / "initdb").exists()), None)
    if programs is None:
        pytest.skip("needs PostgreSQL: apt-get install postgresql")
    # It runs as nobody's root.
    as_user = ["runuser", "-u", "postgres", "--"] if os.geteuid() == 0 else []
    folder = Path(tempfile.mkdtemp(prefix="embed-once-postgres-"))
    if as_user:
        shutil.chown(folder, "postgres")
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    subprocess.run(
        [*as_user, programs / "initdb", "-D", folder / "data", "-U", "prefect", "-A", "trust"],
        check=True,
        capture_output=True,
        cwd="/",
    )
    server = subprocess.Popen(
        [*as_user, programs / "postgres", "-D", folder / "data", "-k", folder, "-p", str(port)],
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        cwd="/",
    )
    url = f"postgresql+asyncpg://prefect@127.0.0.1:{port}/postgres"
    yield {"PREFECT_API_DATABASE_CONNECTION_URL": url}
    server.terminate()
    server.wait(timeout=60)
    shutil.rmtree(folder)


@pytest.fixture(scope="module", autouse=True)
def prefect_on_postgres(environment: dict[str, str]) -> Iterator[None]:
    """Runs of this process report to the server on PostgreSQL.

    Prefect's thread that sends a process's events keeps to the server it first found, and tries
    for seconds each to send them to one that is gone.
    """
    EventsWorker.drain_all()
    with temporary_settings({PREFECT_API_URL: environment["PREFECT_API_URL"]}):
        yield
        EventsWorker.drain_all()


@pytest.fixture(scope="module")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    started = Cluster(tmp_path_factory.mktemp("dask"))
    yield started
    started.end()


@pytest.fixture
def simulator(monkeypatch: pytest.MonkeyPatch) -> Iterator[Simulator]:
    monkeypatch.setenv("VOYAGE_API_KEY", "pa-any")
    with Simulator(Settings(latency=LATENCY)) as started:
        yield started


@pytest.fixture
def config(tmp_path: Path, simulator: Simulator) -> Path:
    rows = [{"id": str(number), "text": f"bird number {number}"} for number in range(TEXTS)]
    (tmp_path / "birds.jsonl").write_text("\n".join(map(json.dumps, rows)))
    file = tmp_path / "birds.yaml"
    file.write_text(
        f"""\
name: birds
source: {{kind: table, path: birds.jsonl}}
embedding: {{provider: voyage, model: voyage-4, dimension: 256, base_url: {simulator.base_url}}}
limits: {{texts_per_request: {TEXTS_PER_REQUEST}, concurrency: {CONCURRENCY}}}
index: {{uri: ./index, table: birds}}
state: {{uri: ./state}}
""",
        encoding="utf-8",
    )
    return file


def reindex(config: Path, *settings: str) -> RunReport:
    return run(str(config), Overrides(settings=list(settings)))


def on(cluster: Cluster) -> str:
    return f'runner={{"kind": "dask", "address": "{cluster.address}"}}'


def rows(config: Path, *settings: str) -> dict[str, Any]:
    """What readers see of the index: texts and vectors by id."""
    table = open_index(load_config(config, settings).index)
    assert table is not None
    found = table.search().select(["id", "text", "vector"]).to_arrow().to_pylist()
    return {row["id"]: (row["text"], row["vector"]) for row in found}


def test_a_worker_that_is_killed_costs_what_it_had_in_flight_and_no_more(
    config: Path, cluster: Cluster, simulator: Simulator
) -> None:
    victim = cluster.workers[0]

    def kill() -> None:
        while simulator.ledger.totals()["ok"] < TEXTS / TEXTS_PER_REQUEST / 4:
            time.sleep(0.02)
        victim.send_signal(signal.SIGKILL)

    killing = threading.Thread(target=kill, daemon=True)
    killing.start()
    report = reindex(config, on(cluster))
    killing.join()
    cluster.workers[0] = cluster.join()

    totals = simulator.ledger.totals()
    assert victim.wait() == -signal.SIGKILL
    assert report.texts.embedded == totals["distinct_texts"] == TEXTS
    assert totals["texts_billed_again"] <= CONCURRENCY * TEXTS_PER_REQUEST
    assert 2 <= totals["max_concurrency"] <= CONCURRENCY * 2  # the dead one's calls go on there

    elsewhere = ["index.uri=./threads", "state.uri=./threads-state"]
    reindex(config, *elsewhere)
    assert rows(config) == rows(config, *elsewhere)


def test_runs_on_one_cluster_keep_to_a_shared_account_and_cost_what_threads_cost(
    config: Path,
    cluster: Cluster,
    simulator: Simulator,
    environment: dict[str, str],
    python: list[str],
) -> None:
    def settings(place: str, *more: str) -> list[str]:
        return [f"index.uri=./{place}", f"state.uri=./{place}-state", *more]

    def start(place: str) -> "subprocess.Popen[str]":
        account = ["limits.shared=true", f"limits.requests_per_minute={A_MINUTE}"]
        chosen = settings(place, on(cluster), "limits.texts_per_request=6", *account)
        options = [part for each in chosen for part in ("--set", each)]
        report = ["--report", str(config.with_name(f"{place}.json"))]
        return subprocess.Popen(
            [*python, "-m", "flows.cli", "reindex", str(config), *options, *report],
            env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True,
        )  # fmt: skip

    simulator.change(requests_per_minute=A_MINUTE)
    running = {place: start(place) for place in ("one", "two")}
    for process in running.values():
        assert (process.wait(300), process.communicate()[1]) == (0, "")
    totals = simulator.ledger.totals()
    print(totals)
    assert totals["statuses"] == {"200": 2 * TEXTS / 6}  # more than a minute's, and none refused
    assert A_MINUTE / 2 < totals["peak_requests_per_minute"] <= A_MINUTE

    simulator.change(requests_per_minute=None)
    by_threads = reindex(config, *settings("threads", "limits.texts_per_request=6"))
    for place in running:
        report = RunReport.model_validate_json(config.with_name(f"{place}.json").read_text())
        assert report.tokens.billed == by_threads.tokens.billed
        assert report.cost.usd == pytest.approx(by_threads.cost.usd)
        assert rows(config, *settings(place)) == rows(config, *settings("threads"))


def test_processes_of_a_run_share_its_limits_and_its_budget(
    config: Path, simulator: Simulator
) -> None:
    ours = ["runner.kind=dask", "runner.processes=2"]
    most = 0.06 * 16 * 30 / 1e6  # thirty calls of four texts of four tokens each
    with pytest.raises(BudgetReached):
        reindex(config, *ours, f"budget.max_usd={most:.12f}")
    totals = simulator.ledger.totals()
    assert 0 < totals["usd"] <= most
    assert totals["max_concurrency"] <= CONCURRENCY

    report = reindex(config, *ours)
    totals = simulator.ledger.totals()
    assert report.texts.embedded < TEXTS
    assert (totals["distinct_texts"], totals["texts_billed_again"]) == (TEXTS, 0)


@pytest.mark.parametrize("answer", ["comes", "hangs"])
def test_a_cancel_waits_for_what_workers_have_in_flight_and_no_longer_than_it_may(
    config: Path, simulator: Simulator, environment: dict[str, str], python: list[str], answer: str
) -> None:
    if answer == "hangs":
        simulator.add(Rule(action="hang", seconds=300, requests=frozenset({20})))
    command = ["reindex", str(config), "--set", "runner.kind=dask", "--set", "runner.processes=2"]
    running = subprocess.Popen(
        [*python, "-m", "flows.cli", *command],
        env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True,
    )  # fmt: skip
    ledger = simulator.ledger
    while ledger.arrivals < 24:
        assert running.poll() is None, running.communicate()[1]
        time.sleep(0.05)
    simulator.change(latency=Latency(base_s=3))  # it cannot end before it is told
    running.send_signal(signal.SIGINT)
    said = running.communicate(timeout=200)[1]
    simulator.change(latency=LATENCY)
    assert (running.returncode, said.splitlines()[-1]) == (
        130,
        "embed-once: cancelled; what was paid for is kept, run again.",
    )
    sent = ledger.arrivals
    assert sent < TEXTS / TEXTS_PER_REQUEST
    report = reindex(config)
    lost = TEXTS_PER_REQUEST * (answer == "hangs")
    assert report.texts.embedded == TEXTS - sent * TEXTS_PER_REQUEST + lost
    assert ledger.totals()["texts_billed_again"] <= lost


def test_a_worker_of_another_release_is_refused_before_anything_is_sent(
    config: Path, simulator: Simulator, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tasks.workers, "RELEASE", "0.0.9")
    with pytest.raises(SettingsError, match=r"a worker of Dask has embed-once .*, the run 0\.0\.9"):
        reindex(config, "runner.kind=dask", "runner.processes=1")
    assert simulator.ledger.totals()["calls"] == 0


def test_a_scheduler_that_ends_ends_the_run_and_the_next_one_pays_for_the_rest(
    config: Path, simulator: Simulator, tmp_path: Path
) -> None:
    doomed = Cluster(tmp_path)

    def kill() -> None:
        while simulator.ledger.totals()["ok"] < TEXTS / TEXTS_PER_REQUEST / 4:
            time.sleep(0.02)
        simulator.change(latency=Latency(base_s=5))  # it cannot end before it is told
        doomed.end()

    killing = threading.Thread(target=kill, daemon=True)
    killing.start()
    with pytest.raises(EmbedOnceError, match=r"The scheduler of Dask is gone|gave the call up"):
        reindex(config, on(doomed))
    killing.join()
    simulator.change(latency=LATENCY)
    reindex(config)
    totals = simulator.ledger.totals()
    assert totals["distinct_texts"] == TEXTS
    assert totals["texts_billed_again"] <= CONCURRENCY * TEXTS_PER_REQUEST
