"""Runs through the Batch lane: submitted, waited for without a process, taken in, published."""

import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pytest

from flows.reindex import reindex, run
from tasks.cache import Cache
from tasks.catalog import catalog
from tasks.claims import Claims
from tasks.errors import BudgetReached, EmbedOnceError, SettingsError
from tasks.form import Overrides
from tasks.history import history, totals
from tasks.index import open_index
from tasks.journal import RunFolder
from tasks.keys import hash_column, text_hash
from tasks.lanes import WINDOW_S, WORTH_USD, lane_of, require_lane
from tasks.ledger import Ledger
from tasks.params import Embedding, load_config
from tasks.plan import make_plan, plan_rows
from tasks.providers.opening import open_provider
from tasks.report import RunReport
from tasks.sections import sections
from tasks.simulator import Rule, Settings, Simulator
from tasks.simulator.settings import JobSettings
from tasks.summary import as_text

pytestmark = pytest.mark.usefixtures("prefect_api")

USD = 0.06 / 1e6
TIMES = JobSettings(validating_s=10, line_s=1, finalizing_s=10, window_s=1000, cancelling_s=5)

CONFIG = """\
name: Birds
source: {{kind: table, path: ./birds.csv}}
embedding: {{provider: voyage, model: voyage-4, dimension: 256, base_url: "{url}", lane: batch}}
limits: {{texts_per_request: 2}}
index: {{uri: ./index, table: birds, max_deleted_fraction: 1}}
state: {{uri: ./state}}
"""


@pytest.fixture
def simulator(monkeypatch: pytest.MonkeyPatch) -> Iterator[Simulator]:
    monkeypatch.setenv("VOYAGE_API_KEY", "pa-any")
    with Simulator(Settings(clock="manual", jobs=TIMES)) as started:
        yield started


class Home:
    """One index, on an account of the simulator."""

    def __init__(self, folder: Path, simulator: Simulator) -> None:
        self.folder, self.simulator = folder, simulator
        self.file = folder / "birds.yaml"
        self.file.write_text(CONFIG.format(url=simulator.base_url), encoding="utf-8")
        (folder / "prefect.yaml").touch()

    def write(self, *texts: str) -> None:
        """The corpus, a row a text."""
        rows = [f'{number},"{text}"' for number, text in enumerate(texts)]
        lines = "\n".join(["id,text", *rows])
        (self.folder / "birds.csv").write_text(lines, encoding="utf-8")

    def reindex(self, *settings: str) -> RunReport:
        return run(str(self.file), Overrides(settings=list(settings)))

    def plan(self, *settings: str) -> Any:
        return make_plan(load_config(self.file, settings), Overrides())

    def published(self) -> list[str]:
        table = open_index(load_config(self.file).index)
        return [] if table is None else sorted(table.to_arrow().column("text").to_pylist())

    def billed(self) -> tuple[int, float]:
        """Tokens and price by our ledger, once they are those of the simulator."""
        calls, said = Ledger(str(self.folder / "state")).calls(), self.simulator.ledger.totals()
        tokens, usd = int(calls["tokens_billed"].sum()), float(calls["usd"].sum())
        assert tokens == said["billed_tokens"]
        assert usd == pytest.approx(said["usd"], rel=1e-12)
        assert said["texts_billed_again"] == 0
        return tokens, usd


@pytest.fixture
def home(tmp_path: Path, simulator: Simulator) -> Home:
    return Home(tmp_path, simulator)


def birds(count: int, start: int = 0) -> list[str]:
    return [f"bird number {number} sings" for number in range(start, start + count)]


def told(report: RunReport) -> str:
    return as_text(*(section.rows for section in sections(report)))


def test_texts_go_in_wait_come_and_are_published_at_a_third_less(
    simulator: Simulator, home: Home
) -> None:
    home.write(*birds(5))
    planned = home.plan()
    assert (planned.lane, planned.usd_realtime) == ("batch", pytest.approx(planned.tokens * USD))
    assert planned.cost.usd == pytest.approx(0.67 * planned.usd_realtime)
    first = home.reindex()
    assert (first.state, first.cost.usd, home.published()) == ("waiting", 0.0, [])
    lane = first.batch_lane
    assert (lane.submitted_texts, lane.waiting_texts, lane.waiting_jobs) == (5, 5, 1)
    assert lane.submitted_usd == pytest.approx(0.67 * USD * lane.submitted_tokens)
    assert "submitted" in told(first)

    again = home.reindex()
    assert (again.state, again.batch_lane.submitted_texts) == ("waiting", 0)
    assert again.batch_lane.waiting_texts == 5
    planned = home.plan()
    assert (planned.waiting, planned.texts.embedded, planned.texts.from_cache) == (5, 0, 0)
    assert "in the Batch lane now" in as_text(plan_rows(planned))

    simulator.advance(100)
    last = home.reindex()
    assert (last.state, last.published, home.published()) == ("completed", "create", birds(5))
    assert (last.texts.embedded, last.texts.from_cache) == (5, 0)
    tokens, usd = home.billed()
    assert last.tokens.billed == tokens
    assert last.cost.usd == pytest.approx(usd)
    assert usd == pytest.approx(0.67 * USD * tokens)
    assert last.cost.saved_usd.batch_lane == pytest.approx(0.33 * USD * tokens)
    assert last.cost.usd_without_reuse == pytest.approx(USD * tokens)
    assert simulator.ledger.totals()["batch_jobs"] == 1
    assert (last.latency_ms.p50, last.throughput.chunks_per_second) == (0, 0)

    assert home.reindex().state == "unchanged"
    config = load_config(home.file)
    assert history(config)["state"].tolist() == ["waiting", "waiting", "completed", "unchanged"]
    (total,) = totals(config).to_dict("records")
    assert total["tokens_batch_lane"] == total["tokens_billed"] == tokens


def test_a_newer_corpus_supersedes_what_waits(simulator: Simulator, home: Home) -> None:
    home.write(*birds(4))
    home.reindex()
    home.write(*birds(3), "a heron")
    second = home.reindex()
    assert (second.batch_lane.submitted_texts, second.batch_lane.waiting_texts) == (1, 4)
    assert second.batch_lane.superseded_texts == 1
    assert "the corpus no longer has; paid for, and kept in the cache" in told(second)
    simulator.advance(100)
    last = home.reindex()
    assert home.published() == ["a heron", *birds(3)]
    assert (last.batch_lane.came_texts, last.batch_lane.superseded_texts) == (5, 1)
    home.billed()
    home.write(*birds(4), "a heron")  # what was superseded is known
    assert home.reindex().texts.embedded == 0
    assert simulator.ledger.totals()["batch_jobs"] == 2


@pytest.mark.slow
def test_an_index_that_stands_is_read_as_it_was_while_texts_wait(
    simulator: Simulator, home: Home
) -> None:
    home.write(*birds(4))
    home.reindex("embedding.lane=realtime")
    home.write(*birds(3), *birds(2, 10))
    assert home.reindex().state == "waiting"
    assert home.published() == birds(4)
    simulator.advance(100)
    report = home.reindex()
    assert home.published() == sorted([*birds(3), *birds(2, 10)])
    assert (report.generation, report.chunks.changed, report.chunks.added) == (2, 1, 1)
    home.billed()


@pytest.mark.slow
def test_texts_that_wait_for_one_index_are_not_submitted_for_another(
    simulator: Simulator, home: Home
) -> None:
    home.write(*birds(4))
    home.reindex()
    home.write(*birds(5))
    other = ["index.table=other"]
    second = home.reindex(*other)
    assert (second.batch_lane.submitted_texts, second.batch_lane.waiting_texts) == (1, 5)
    simulator.advance(100)
    taken = home.reindex(*other)
    assert (taken.state, taken.batch_lane.came_texts, taken.chunks.added) == ("completed", 5, 5)
    assert taken.batch_lane.superseded_texts == 0
    first = home.reindex()
    assert (first.state, first.texts.embedded, first.texts.from_cache) == ("completed", 0, 5)
    home.billed()


@pytest.mark.slow
def test_a_state_in_object_storage_waits_as_well(
    simulator: Simulator, home: Home, bucket: str
) -> None:
    home.write(*birds(4))
    stored = [f"state.uri={bucket}/state", f"index.uri={bucket}/index"]
    assert [home.reindex(*stored).state for _ in range(2)] == ["waiting", "waiting"]
    simulator.advance(100)
    report = home.reindex(*stored)
    assert (report.state, report.batch_lane.came_texts, report.chunks.added) == ("completed", 4, 4)
    assert home.reindex(*stored).state == "unchanged"
    totals = simulator.ledger.totals()
    assert (totals["batch_jobs"], totals["texts_billed_again"]) == (1, 0)


def test_the_flow_run_ends_in_a_state_called_waiting(home: Home) -> None:
    home.write(*birds(2))
    state: Any = reindex(str(home.file), return_state=True)
    assert (state.is_completed(), state.name) == (True, "Waiting")
    assert "waits for the Batch lane" in str(state.message)


@pytest.mark.slow
def test_what_an_index_can_wait_for_no_longer_goes_the_realtime_lane(
    simulator: Simulator, home: Home, monkeypatch: pytest.MonkeyPatch
) -> None:
    home.write(*birds(8))
    home.reindex()
    simulator.advance(12.5)  # two of its four lines are done
    monkeypatch.setattr("tasks.jobs.sleep", simulator.advance)
    late = home.reindex("embedding.lane_deadline=0.001")
    assert (late.state, home.published()) == ("completed", birds(8))
    assert (late.batch_lane.came_texts, late.texts.embedded) == (4, 8)
    assert late.batch_lane.failed == {"the job is cancelled": 4}
    assert late.calls.ok == 4  # two lines, two calls
    home.billed()


@pytest.mark.slow
def test_a_job_that_is_about_to_end_is_not_cancelled_but_taken_in(
    simulator: Simulator, home: Home, monkeypatch: pytest.MonkeyPatch
) -> None:
    home.write(*birds(4))
    home.reindex()
    simulator.advance(15)  # finalizing
    monkeypatch.setattr("tasks.jobs.sleep", simulator.advance)
    report = home.reindex("embedding.lane_deadline=0.001")
    assert (report.state, report.batch_lane.came_texts, report.calls.ok) == ("completed", 4, 2)
    home.billed()


@pytest.mark.slow
def test_a_job_of_another_index_harms_only_that_one(
    simulator: Simulator, home: Home, monkeypatch: pytest.MonkeyPatch
) -> None:
    home.write(*birds(4))
    home.reindex()
    home.write(*birds(4, 10))
    other = ["index.table=other"]
    home.reindex(*other)
    ids = (home.folder / "state" / "jobs").glob("*/*/id")
    first = min(ids, key=lambda id_: id_.stat().st_mtime)
    first.write_text("batch-of-nobody", encoding="utf-8")
    simulator.advance(100)
    assert home.reindex(*other).state == "completed"
    assert home.reindex("index.table=third", "embedding.lane=realtime").state == "completed"
    with pytest.raises(EmbedOnceError, match=r"does not know the job batch-of-nobody.*Use the key"):
        home.reindex()


@pytest.mark.slow
def test_an_index_that_has_caught_up_starts_to_wait_anew(home: Home) -> None:
    home.write(*birds(2))
    home.reindex()
    (behind,) = (home.folder / "state" / "lanes").glob("*/behind-*")
    for file in (home.folder / "state" / "jobs").glob("*/*/*"):
        file.unlink()
    home.reindex("embedding.lane=realtime")
    assert not behind.exists()


@pytest.mark.slow
def test_nobody_is_asked_about_a_run_that_sends_nothing(simulator: Simulator, home: Home) -> None:
    home.write(*birds(2))
    home.reindex()
    home.write(*birds(4))
    (behind,) = (home.folder / "state" / "lanes").glob("*/behind-*")
    behind.write_text((datetime.now(tz=UTC) - timedelta(hours=13)).isoformat(), encoding="utf-8")
    planned = home.plan("budget.approve_above_usd=0")
    assert (planned.waiting, planned.texts.embedded, planned.needs_approval) == (2, 2, False)
    assert "goes at once when they have come" in as_text(plan_rows(planned))
    report = home.reindex("budget.approve_above_usd=0")
    assert (report.state, report.batch_lane.left_texts) == ("waiting", 2)
    assert "not sent yet" in told(report)
    assert simulator.ledger.totals()["batch_jobs"] == 1


@pytest.mark.slow
def test_what_a_run_takes_in_while_others_wait_is_in_its_report(
    simulator: Simulator, home: Home
) -> None:
    home.write(*birds(2))
    home.reindex()
    simulator.advance(100)
    home.write(*birds(4))
    second = home.reindex()
    assert (second.state, second.batch_lane.came_texts) == ("waiting", 2)
    assert second.cost.saved_usd.batch_lane == pytest.approx(0.33 / 0.67 * second.cost.usd)
    simulator.advance(100)
    third = home.reindex()
    tokens, usd = home.billed()
    assert second.cost.usd + third.cost.usd == pytest.approx(usd)
    (total,) = totals(load_config(home.file)).to_dict("records")
    assert total["saved_usd.batch_lane"] == pytest.approx(0.33 * USD * tokens)


@pytest.mark.slow
def test_a_text_that_another_run_is_sending_is_not_submitted(
    home: Home, monkeypatch: pytest.MonkeyPatch
) -> None:
    home.write(*birds(4))
    config = load_config(home.file)
    other = RunFolder(config.state.uri, "another")
    cache = Cache(config.state.uri, open_provider(config).space)
    with other.alive():
        Claims(other, cache).claim(1, hash_column([text_hash("bird number 1 sings")]))
        report = home.reindex()
    assert (report.batch_lane.submitted_texts, report.batch_lane.left_texts) == (3, 1)


@pytest.mark.slow
def test_a_run_of_the_realtime_lane_does_not_wait(
    simulator: Simulator, home: Home, monkeypatch: pytest.MonkeyPatch
) -> None:
    home.write(*birds(4))
    home.reindex()
    monkeypatch.setattr("tasks.jobs.sleep", simulator.advance)
    report = home.reindex("embedding.lane=realtime")
    assert (report.state, report.texts.embedded, home.published()) == ("completed", 4, birds(4))
    home.billed()


@pytest.mark.slow
def test_a_text_that_the_lane_refuses_is_asked_at_once_and_quarantined(
    simulator: Simulator, home: Home
) -> None:
    for endpoint in ("line", "embeddings"):
        simulator.add(Rule(endpoint=endpoint, marker="number 2 ", status=400, detail="Bad text."))
    simulator.add(Rule(endpoint="line", marker="number 5 ", status=429, detail="Down.", times=1))
    home.write(*birds(8))
    home.reindex()
    simulator.advance(100)
    second = home.reindex()  # a line that failed may work in another job
    assert (second.state, second.batch_lane.failed) == ("waiting", {"Bad text.": 2, "Down.": 2})
    assert second.batch_lane.submitted_texts == 2
    simulator.advance(100)
    last = home.reindex()
    assert (last.state, last.chunks.quarantined) == ("quarantined", 1)
    assert home.published() == [text for text in birds(8) if "number 2 " not in text]
    home.billed()


@pytest.mark.slow
def test_a_job_that_fails_as_a_whole_is_not_made_again(simulator: Simulator, home: Home) -> None:
    simulator.change(jobs=TIMES.model_copy(update={"most_lines": 1}).model_dump())
    home.write(*birds(4))
    home.reindex()
    simulator.advance(100)
    report = home.reindex()
    assert (report.state, report.texts.embedded, report.calls.ok) == ("completed", 4, 2)
    home.billed()


@pytest.mark.slow
def test_an_account_that_is_full_is_asked_again_half_an_hour_later(
    simulator: Simulator, home: Home
) -> None:
    home.write(*birds(4))
    simulator.add(Rule(endpoint="create", status=429, times=1))
    full = home.reindex()
    assert (full.state, full.batch_lane.waiting_texts) == ("waiting", 0)
    assert home.reindex().batch_lane.submitted_texts == 0
    assert simulator.ledger.totals()["batch_jobs"] == 0
    (noted,) = (home.folder / "state" / "lanes").glob("*/full")
    noted.write_text("2026-01-01T00:00:00+00:00", encoding="utf-8")
    assert home.reindex().batch_lane.submitted_texts == 4


@pytest.mark.slow
def test_a_run_submits_what_its_budget_is_enough_for(simulator: Simulator, home: Home) -> None:
    home.write(*birds(6))
    tokens = home.plan().tokens
    half = f"budget.max_usd={0.67 * USD * tokens * 0.8:.12f}"
    first = home.reindex(half)
    sent = first.batch_lane.submitted_texts
    assert 0 < sent < 6
    assert first.batch_lane.submitted_usd <= float(half.partition("=")[2])
    with pytest.raises(BudgetReached, match="not enough for a single text"):
        home.reindex("budget.max_usd=0.0000000001", "state.uri=./poor", "index.table=poor")
    assert home.reindex().batch_lane.submitted_texts == 6 - sent
    simulator.advance(100)
    home.reindex()
    assert home.published() == birds(6)
    home.billed()


@pytest.mark.slow
def test_a_lane_that_does_not_answer_ends_the_run_and_loses_nothing(
    simulator: Simulator, home: Home, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("tasks.providers.voyage_jobs._AGAIN_S", (0.0, 0.0))
    home.write(*birds(3))
    simulator.add(Rule(endpoint="upload", status=503, times=1))
    with pytest.raises(EmbedOnceError, match=r"the Batch lane takes no texts: .*503"):
        home.reindex()
    home.reindex()
    simulator.advance(100)
    simulator.add(Rule(endpoint="job", status=502, times=3))
    with pytest.raises(EmbedOnceError, match=r"does not say what became of its jobs: .*502"):
        home.reindex()
    simulator.add(Rule(endpoint="job", status=502, times=2))
    assert home.reindex().state == "completed"
    home.billed()


@pytest.mark.slow
def test_a_first_run_costs_less_than_half_and_a_second_an_eighth(
    simulator: Simulator, home: Home
) -> None:
    known, rest = birds(20), birds(65, 100)
    home.write(*known)
    home.reindex("embedding.lane=realtime", "index.table=other")
    corpus = [*known, *rest, *rest[:15]]  # 15 % duplicates, 20 % known
    home.write(*corpus)
    home.reindex()
    simulator.advance(1000)
    first = home.reindex().cost
    shares = {cause: usd / first.usd_without_reuse for cause, usd in first.saved_usd}
    assert shares == {
        "unchanged": 0,
        "duplicates": pytest.approx(0.15, abs=0.01),
        "cache": pytest.approx(0.2, abs=0.01),
        "batch_lane": pytest.approx(0.65 * 0.33, abs=0.01),
    }
    assert sum(shares.values()) >= 0.54
    changed = birds(17, 300)
    home.write(*corpus[:80], *changed, *changed[:3])  # 80 % unchanged
    home.reindex()
    simulator.advance(1000)
    second = home.reindex().cost
    assert 1 - second.usd / second.usd_without_reuse >= 0.88
    home.billed()


def embedding(**more: Any) -> Embedding:
    return Embedding.model_validate({"provider": "voyage", "model": "voyage-4", **more})


@pytest.mark.parametrize(
    ("more", "why"),
    [
        ({"model": "voyage-code-4"}, "does not take the model 'voyage-code-4'"),
        ({"model": "voyage-law-2"}, "does not take the model 'voyage-law-2'"),
        ({"provider": "openai", "model": "text-embedding-3-small"}, "'openai' has no Batch lane"),
        ({"provider": "lexical", "model": None}, "'lexical' has no Batch lane here"),
        ({"base_url": "https://ai.mongodb.com/v1"}, "ai.mongodb.com has no Batch API"),
    ],
)
def test_a_lane_that_cannot_be_had_is_refused_with_the_reason(
    more: dict[str, Any], why: str
) -> None:
    with pytest.raises(SettingsError, match=f"embedding.lane: .*{why}"):
        require_lane(embedding(lane="batch", **more))
    auto = embedding(lane="auto", **more)
    require_lane(auto)
    chosen = lane_of(auto, 10**9, None)
    assert (chosen.name, why in chosen.why) == ("realtime", True)


@pytest.mark.parametrize("model", [name for name, facts in catalog().items() if facts.batch_lane])
def test_auto_waits_for_what_is_worth_it_and_may_wait(model: str) -> None:
    facts = catalog()[model]
    if facts.provider != "voyage":
        return
    worth = int(WORTH_USD / 0.33 / facts.usd_per_million_tokens * 1e6) + 1
    for lane, deadline, tokens, behind_s, name, why in (
        ("auto", 2 * WINDOW_S, worth, None, "batch", "it saves $0.1000"),
        ("auto", 2 * WINDOW_S, worth // 2, None, "realtime", "is not worth the wait"),
        ("auto", WINDOW_S - 1, worth, None, "realtime", "is shorter than the 12 h"),
        ("auto", 2 * WINDOW_S, worth, 0.9 * WINDOW_S, "batch", ""),
        ("auto", 2 * WINDOW_S, worth, 1.1 * WINDOW_S, "realtime", "has waited for 13 h"),
        ("batch", 60.0, 1, None, "batch", "as embedding.lane says"),
        ("batch", 60.0, 1, 30.0, "realtime", "may wait for 60.0 s"),
        ("batch", 60.0, 0, None, "realtime", ""),
        ("realtime", 2 * WINDOW_S, worth, None, "realtime", ""),
    ):
        asked = embedding(model=model, lane=lane, lane_deadline=float(deadline))
        chosen = lane_of(asked, tokens, behind_s)
        assert (chosen.name, why in chosen.why) == (name, True), chosen
        share = 0.67 if name == "batch" else 1
        assert chosen.usd(tokens) == pytest.approx(share * facts.usd(tokens))


KILLED = """\
import os, signal, sys
from tasks import jobs
from tasks.providers.voyage_jobs import VoyageJobs
from tasks.storage.folder import Folder

left, jobs.SURE_S = int(sys.argv[3]), 0.0

def killing(verb):
    def wrapped(*arguments, **more):
        global left
        at_storage = isinstance(arguments[0], Folder)
        left -= not at_storage or "job" in str(arguments[1]) or "lanes" in str(arguments[1])
        if not left:
            os.kill(os.getpid(), signal.SIGKILL)
        return verb(*arguments, **more)
    return wrapped

for owner, name in (Folder, "write"), (Folder, "delete"), (VoyageJobs, "_answer"):
    setattr(owner, name, killing(getattr(owner, name)))

import httpx
from flows.reindex import run

assert run(sys.argv[1]).state == "waiting"
httpx.post(sys.argv[2], json={"seconds": 100}).raise_for_status()
run(sys.argv[1])
"""
"""A run that submits and one that takes in, killed at the n-th write, removal or request."""


@pytest.mark.slow
def test_a_run_that_is_killed_at_any_step_submits_nothing_twice_and_loses_no_line(
    simulator: Simulator, home: Home, prefect_api: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("tasks.jobs.SURE_S", 0.0)
    advance = simulator.base_url.replace("/v1", "/_sim/advance")
    moment, runs, killed = -1, 0, True
    while killed:
        moment, runs = moment + 2, runs + 1
        texts = birds(4, 10 * moment)
        home.write(*texts)
        done = subprocess.run(
            [sys.executable, "-c", KILLED, str(home.file), advance, str(moment)],
            env={**os.environ, "PREFECT_API_URL": prefect_api},
            capture_output=True, text=True, check=False, timeout=120,
        )  # fmt: skip
        assert done.returncode in {0, -signal.SIGKILL}, done.stderr
        killed = done.returncode != 0
        while home.reindex().state == "waiting":
            simulator.advance(100)
        assert home.published() == texts
        assert not list((home.folder / "state" / "jobs").glob("*/*/*"))
        home.billed()
        totals = simulator.ledger.totals()
        assert (totals["batch_jobs"], totals["batch_lines"]) == (runs, 2 * runs)
    assert runs > 10
    assert Ledger(str(home.folder / "state")).calls()["texts"].sum() == 4 * runs
