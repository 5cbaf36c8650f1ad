"""Totals: whatever failed in between, the ledger is the provider's bill to the token."""

import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pandas as pd
import pytest

from flows.reindex import run
from tasks.catalog import catalog
from tasks.embedder import BatchEmbedder
from tasks.errors import EmbedOnceError, ProviderError
from tasks.form import Overrides
from tasks.history import totals
from tasks.ledger import Ledger
from tasks.params import load_config
from tasks.search import search
from tasks.simulator import Rule, Settings, Simulator
from tasks.verify import verify
from tests.waiting import until

pytestmark = pytest.mark.usefixtures("prefect_api")


class Household:
    """Indexes of several models that share a state, and the simulator that bills them all."""

    def __init__(self, folder: Path, simulator: Simulator) -> None:
        self.folder = folder
        self.simulator = simulator

    def config(self, name: str, model: str = "voyage-4") -> Path:
        file = self.folder / f"{name}.yaml"
        file.write_text(
            f"""\
name: {name}
source: {{kind: table, path: {name}.parquet}}
embedding:
  {{provider: voyage, model: {model}, dimension: 256, base_url: {self.simulator.base_url}}}
limits: {{texts_per_request: 10, concurrency: 3}}
index: {{uri: ./index, table: {name}, max_deleted_fraction: 1}}
state: {{uri: ./state}}
""",
            encoding="utf-8",
        )
        return file

    def reindex(self, config: Path, texts: Sequence[str], *settings: str) -> Any:
        """A run on this corpus."""
        frame = pd.DataFrame({"id": [str(n) for n in range(len(texts))], "text": texts})
        frame.to_parquet(config.with_suffix(".parquet"))
        return run(str(config), Overrides(settings=list(settings)))

    @property
    def ledger(self) -> Ledger:
        return Ledger(str(self.folder / "state"))

    def check(self) -> pd.DataFrame:
        """The bill, the calls, the reports and the totals say the same; the totals."""
        billed = self.simulator.ledger.totals()
        calls = self.ledger.calls()
        by_model = calls.groupby("model")["tokens_billed"].sum()
        assert {f"voyage/{name}": tokens for name, tokens in billed["billed_by_model"].items()} == {
            name: tokens for name, tokens in by_model.items() if tokens
        }
        assert calls["tokens_billed"].sum() == billed["billed_tokens"]
        assert calls["usd"].sum() == pytest.approx(billed["usd"])
        assert len(calls) == billed["calls"]
        assert (calls["status"] == "ok").sum() == billed["ok"]
        return self.agree()

    def agree(self) -> pd.DataFrame:
        """The calls, the reports and the totals say the same; the totals."""
        calls, runs = self.ledger.calls(), self.ledger.runs()
        summed = totals(load_config(self.folder / "birds.yaml"))
        good = calls[calls["status"] == "ok"]
        assert summed["calls"].sum() == len(calls)
        assert summed["ok"].sum() == len(good)
        assert summed["waited_seconds"].sum() == pytest.approx(calls["waited"].sum())
        assert summed["texts"].sum() == good["texts"].sum()
        assert summed["tokens_estimated"].sum() == good["tokens_estimated"].sum()
        assert summed["tokens_billed"].sum() == calls["tokens_billed"].sum()
        assert summed["usd"].sum() == pytest.approx(calls["usd"].sum())
        ended = summed["ok"] + summed["failed"] + summed["throttled"] + summed["split"]
        assert ended.tolist() == summed["calls"].tolist()
        for row in summed.to_dict("records"):
            price = catalog()[row["model"].removeprefix("voyage/")].usd_per_million_tokens
            assert row["usd"] == pytest.approx(row["tokens_billed"] * price / 1e6)
        for of_run in runs.to_dict("records"):
            mine = calls[calls["run_id"] == of_run["run_id"]]
            assert {*mine["model"], of_run["model"]} == {of_run["model"]}
            assert {*mine["index"], of_run["index"]} == {of_run["index"]}
            assert of_run["tokens.billed"] == mine["tokens_billed"].sum()
            assert of_run["cost.usd"] == pytest.approx(mine["usd"].sum())
            assert of_run["calls.ok"] == (mine["status"] == "ok").sum()
            assert of_run["calls.throttled"] == (mine["status"] == "ProviderThrottled").sum()
            assert of_run["calls.split"] == (mine["status"] == "BatchTooLarge").sum()
            assert of_run["calls.retried"] == (mine["cause"] == "retry").sum()
            counts = [of_run[f"calls.{name}"] for name in ("ok", "failed", "throttled", "split")]
            assert sum(counts) == len(mine)
        for cause in ("unchanged", "duplicates", "cache"):
            saved = summed[f"saved_usd.{cause}"].sum()
            assert saved == pytest.approx(runs[f"cost.saved_usd.{cause}"].sum())
        return summed


@pytest.fixture
def household(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Household]:
    monkeypatch.setenv("VOYAGE_API_KEY", "pa-a-secret-key")
    monkeypatch.setattr("tasks.sender.RETRY_S", 0.0)  # retries without their delay
    with Simulator(Settings()) as simulator:
        yield Household(tmp_path, simulator)


def texts(count: int, of: str = "bird") -> list[str]:
    return [f"The story of {of} number {number} and its house." for number in range(count)]


@pytest.mark.slow
def test_the_ledger_is_the_bill_whatever_failed(household: Household) -> None:
    birds, fish = household.config("birds"), household.config("fish", "voyage-4-lite")
    simulator = household.simulator
    simulator.change(models={"voyage-4": {"tokens_per_request": 200}})
    simulator.add(
        Rule(marker="POISON", status=400, detail="The request cannot be processed."),
        Rule(marker="DENIED", status=401),
        Rule(requests=frozenset({2, 3, 31}), status=429, retry_after=0),
        Rule(requests=frozenset({5, 6, 7, 33}), status=500),
        Rule(requests=frozenset({9, 35}), action="nan"),
        Rule(requests=frozenset({10}), action="fewer"),
        Rule(requests=frozenset({11}), action="bad_b64"),
        Rule(requests=frozenset({12}), action="reset_before"),
        Rule(requests=frozenset({13}), action="wrong_dim"),
    )
    story = [*texts(120), *texts(20), "POISON"]
    first = household.reindex(birds, story, "limits.texts_per_request=40")
    assert (first.state, first.model) == ("quarantined", "voyage/voyage-4")
    assert min(first.calls.model_dump().values()) > 0, first.calls
    household.check()

    second = household.reindex(birds, texts(130))
    assert (second.chunks.unchanged, second.texts.embedded) == (120, 10)
    swimmers = [*texts(60, "fish"), *texts(10, "fish")]
    assert household.reindex(fish, swimmers).texts.embedded == 60
    with pytest.raises(EmbedOnceError):
        household.reindex(fish, [*texts(90, "fish"), "DENIED"])
    assert search(load_config(birds), "who builds a house?", 1)
    simulator.add(Rule(marker="UNHEARD", status=500, times=1))
    with pytest.raises(ProviderError):
        search(load_config(birds), "UNHEARD", 1)
    seen = verify(load_config(fish), sample=25)
    assert (seen.embedded_again, seen.clean) == (25, False)  # the corpus is ahead of the index
    with BatchEmbedder(birds) as embedder:
        found = embedder.embed_batch([*texts(5), *texts(25, "cat"), "POISON"])
        assert len(found.errors) == 1

    summed = household.check()
    calls = household.ledger.calls()
    assert {*calls["cause"]} >= {"first", "retry", "wait", "split", "isolate", "query", "verify"}
    index = str(household.folder / "index")
    assert {*calls[calls["cause"] == "query"]["index"]} == {f"{index}/birds"}
    where = summed.set_index(["model", "index"])
    assert set(where.index) == {
        ("voyage/voyage-4", f"{index}/birds"),
        ("voyage/voyage-4", ""),
        ("voyage/voyage-4-lite", f"{index}/fish"),
    }


@pytest.mark.slow
def test_each_saving_is_told_with_its_own_cause(household: Household) -> None:
    birds, others = household.config("birds"), household.config("others")
    household.simulator.add(Rule(marker="POISON", status=400, detail="It cannot be processed."))
    price = catalog()["voyage-4"].usd_per_million_tokens / 1e6

    def saved(report: Any) -> list[float]:
        """Texts saved by cause; each text of these costs about the same."""
        by_cause = report.cost.saved_usd
        tokens = report.tokens.billed / report.texts.embedded
        return [
            round(usd / price / tokens, 1)
            for usd in (by_cause.unchanged, by_cause.duplicates, by_cause.cache)
        ]

    household.reindex(birds, texts(50))  # whose bills teach how many tokens a text has
    # A text that is refused saves nothing, however often it stands there.
    first = household.reindex(
        birds, [*texts(50), *texts(90)[60:], *texts(65)[60:], *["POISON"] * 30]
    )
    assert saved(first) == pytest.approx([50, 5, 0], rel=0.1)
    # What another index has paid for comes from the cache, once; the rest repeats it.
    other = household.reindex(others, [*texts(40), *texts(10), *texts(20, "bear")])
    assert saved(other) == pytest.approx([0, 10, 40], rel=0.1)
    moved = ["A bear of its own, number 7, and its house.", *texts(50)]  # each under another id
    again = household.reindex(birds, moved)
    assert (again.chunks.changed, again.texts.from_cache) == (51, 50)
    assert saved(again) == pytest.approx([0, 0, 50], rel=0.1)
    household.check()


@pytest.mark.slow
def test_of_a_run_that_was_killed_only_calls_in_flight_are_unknown(
    household: Household, prefect_api: str
) -> None:
    birds = household.config("birds")
    household.simulator.change(latency={"base_s": 0.3})
    corpus = texts(300)
    pd.DataFrame({"id": [str(n) for n in range(300)], "text": corpus}).to_parquet(
        birds.with_suffix(".parquet")
    )
    killed = subprocess.Popen(
        [sys.executable, "-m", "flows.cli", "reindex", str(birds)],
        env={**os.environ, "PREFECT_API_URL": prefect_api},
        start_new_session=True,
    )
    until(lambda: household.simulator.ledger.totals()["ok"] >= 9)
    os.killpg(killed.pid, signal.SIGKILL)
    killed.wait()
    time.sleep(1)  # until the simulator has answered what was in flight
    assert household.reindex(birds, corpus).state == "completed"

    calls, runs = household.ledger.calls(), household.ledger.runs()
    died = runs[runs["state"] == "died"]
    assert died["model"].tolist() == ["voyage/voyage-4"]
    assert died["tokens.billed"].sum() > 0
    asked = {each.request_id: each.billed_tokens for each in household.simulator.ledger.requests}
    known = dict(zip(calls["request_id"], calls["tokens_billed"], strict=True))
    assert known.items() <= asked.items()
    assert len(asked) - len(known) <= 3
    household.agree()


@pytest.mark.slow
def test_a_run_that_was_cancelled_is_billed_as_the_ledger_says(
    household: Household, prefect_api: str, python: list[str]
) -> None:
    birds = household.config("birds")
    household.simulator.change(latency={"base_s": 0.3})
    frame = pd.DataFrame({"id": [str(n) for n in range(300)], "text": texts(300)})
    frame.to_parquet(birds.with_suffix(".parquet"))
    process = subprocess.Popen(
        [*python, "-m", "flows.cli", "reindex", str(birds)],
        env={**os.environ, "PREFECT_API_URL": prefect_api},
        start_new_session=True,
    )
    until(lambda: household.simulator.ledger.totals()["ok"] >= 9)
    household.simulator.change(latency={"base_s": 5})  # it cannot end before it is told
    process.send_signal(signal.SIGINT)
    assert process.wait(120) == 130
    assert household.ledger.runs()["state"].tolist() == ["cancelled"]
    household.check()  # answers in flight were waited for
    household.simulator.change(latency={"base_s": 0.3})
    assert household.reindex(birds, texts(300)).state == "completed"
    household.check()


@pytest.mark.slow
def test_what_the_bill_has_more_are_answers_lost_on_their_way(household: Household) -> None:
    birds = household.config("birds")
    simulator = household.simulator
    lost = {3: "process_then_reset", 5: "reset_mid", 7: "bad_json", 9: "no_usage"}
    for number, action in lost.items():
        simulator.add(Rule.model_validate({"requests": [number], "action": action}))
    assert household.reindex(birds, texts(150)).state == "completed"
    calls = household.ledger.calls()
    asked = simulator.ledger.requests
    known = dict(zip(calls["request_id"], calls["tokens_billed"], strict=True))
    unknown = [each for each in asked if known.get(each.request_id, 0) != each.billed_tokens]
    assert {each.ordinal for each in unknown} == set(lost)
    assert len(calls) == len(asked)
    missing = sum(each.billed_tokens for each in unknown)
    assert calls["tokens_billed"].sum() + missing == simulator.ledger.totals()["billed_tokens"]
    household.agree()
