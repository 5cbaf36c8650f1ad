"""Whole runs in processes of their own that share a state: together they pay once."""

import json
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pandas as pd
import pytest

from tasks.index import open_index
from tasks.ledger import Ledger
from tasks.params import load_config
from tasks.simulator import Latency, Settings, Simulator
from tasks.storage import storage_at
from tests.waiting import until

pytestmark = pytest.mark.slow

TEXTS, A_CALL, CONCURRENCY = 3000, 25, 4
LATENCY = Latency(base_s=0.3, jitter_s=0.1)


class Home:
    """A corpus, a config, the simulator it is embedded by, and runs as processes."""

    def __init__(self, folder: Path, simulator: Simulator, prefect_api: str) -> None:
        self.folder = folder
        self.simulator = simulator
        self.config = folder / "chunks.yaml"
        self._environment = {**os.environ, "PREFECT_API_URL": prefect_api}
        self.config.write_text(
            f"""\
name: shared
source: {{kind: table, path: chunks.parquet}}
embedding: {{provider: voyage, model: voyage-4, dimension: 256, base_url: {simulator.base_url}}}
limits: {{texts_per_request: {A_CALL}, concurrency: {CONCURRENCY}}}
index: {{uri: ./index, table: chunks}}
state: {{uri: ./state}}
""",
            encoding="utf-8",
        )
        texts = [f"The story of animal number {number} and its house." for number in range(TEXTS)]
        frame = pd.DataFrame({"id": [str(n) for n in range(TEXTS)], "text": texts})
        frame.to_parquet(folder / "chunks.parquet")

    def start(self, table: str) -> "subprocess.Popen[bytes]":
        """A run on an index of its own."""
        command = [
            *(sys.executable, "-m", "flows.cli", "reindex", str(self.config)),
            *("--set", f"index.table={table}", "--report", str(self.folder / f"{table}.json")),
        ]
        return subprocess.Popen(command, env=self._environment, start_new_session=True)

    def finished(self, table: str, process: "subprocess.Popen[bytes]") -> dict[str, Any]:
        """The report of a run that ended well."""
        assert process.wait(300) == 0
        report: dict[str, Any] = json.loads((self.folder / f"{table}.json").read_text())
        return report

    def rows(self, table: str) -> dict[str, tuple[str, list[float]]]:
        opened = open_index(load_config(self.config, [f"index.table={table}"]).index)
        assert opened is not None
        return {row["id"]: (row["text"], row["vector"]) for row in opened.search().to_list()}

    def living(self) -> dict[int, Path]:
        """The folders of the runs, by the process that runs them."""
        holders = (self.folder / "state" / "runs").glob("*.alive.holder")
        return {
            json.loads(each.read_text())["pid"]: each.with_name(
                each.name.removesuffix(".alive.holder")
            )
            for each in holders
        }

    def answers(self, process: "subprocess.Popen[bytes]") -> int:
        """Answers in the journal of its run."""
        run = self.living().get(process.pid)
        return 0 if run is None else len(list((run / "answers").glob("*.arrow")))

    @property
    def billed(self) -> int:
        """Texts that the simulator has charged, each as often as it was."""
        good = [each for each in self.simulator.ledger.requests if each.billed_tokens]
        return sum(each.n_texts for each in good)


@pytest.fixture
def home(tmp_path: Path, prefect_api: str, monkeypatch: pytest.MonkeyPatch) -> Iterator[Home]:
    monkeypatch.setenv("VOYAGE_API_KEY", "pa-a-secret-key")
    with Simulator(Settings(latency=LATENCY)) as simulator:
        yield Home(tmp_path, simulator, prefect_api)


def test_two_runs_started_together_pay_for_their_corpus_once_and_share_the_work(
    home: Home,
) -> None:
    home.finished("alone", home.start("alone"))
    assert home.billed == TEXTS
    home.simulator.reset()
    (home.folder / "state").rename(home.folder / "before")

    home.simulator.change(latency=Latency(base_s=10))  # until both are there
    processes = {table: home.start(table) for table in ("one", "two")}
    until(lambda: len(home.living()) == 2)
    home.simulator.change(latency=LATENCY)
    reports = [home.finished(table, process) for table, process in processes.items()]

    print("embedded", [each["texts"]["embedded"] for each in reports])
    assert home.billed == TEXTS
    assert sum(each["texts"]["embedded"] for each in reports) == TEXTS
    assert min(each["texts"]["embedded"] for each in reports) > TEXTS / 5
    for each in reports:
        assert each["texts"]["embedded"] + each["texts"]["from_cache"] == TEXTS
    assert sum(each["tokens"]["billed"] for each in reports) == sum(
        Ledger(str(home.folder / "state")).calls()["tokens_billed"]
    )
    saved = [each["cost"]["saved_usd"]["cache"] + each["cost"]["usd"] for each in reports]
    print("saved and paid", saved)
    # By a state's first guess, up to 28 % high, for the texts that the other has paid for; each
    # pays for at least a fifth.
    assert saved[0] == pytest.approx(saved[1], rel=0.28 * 3 / 5)
    assert len(home.rows("one")) == TEXTS
    assert home.rows("one") == home.rows("two") == home.rows("alone")


def test_a_run_that_is_killed_holds_up_none_of_the_others(home: Home) -> None:
    home.simulator.change(latency=Latency(base_s=10))  # until all are there
    processes = {table: home.start(table) for table in ("one", "two", "killed")}
    killed = processes.pop("killed")
    until(lambda: len(home.living()) == 3)
    home.simulator.change(latency=LATENCY)
    until(lambda: home.answers(killed) >= 3)
    killed.send_signal(signal.SIGKILL)
    killed.wait()
    assert 0 < home.billed < TEXTS

    reports = [home.finished(table, process) for table, process in processes.items()]
    print("billed", home.billed, "embedded", [each["texts"]["embedded"] for each in reports])
    assert home.billed <= TEXTS + CONCURRENCY * A_CALL
    assert len(home.rows("one")) == TEXTS
    assert home.rows("one") == home.rows("two")
    # What it had paid for is in its journal, in the cache, or was in flight.
    assert home.finished("killed", home.start("killed"))["texts"]["embedded"] == 0
    assert home.rows("killed") == home.rows("one")
    assert storage_at(str(home.folder / "state")).folders("runs") == []
