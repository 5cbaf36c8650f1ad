"""Whole runs against the simulated Voyage API: what it bills, refuses and breaks."""

import json
import logging
import threading
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any
from uuid import UUID

import numpy as np
import pandas as pd
import pyarrow as pa
import pytest
from prefect.artifacts import update_progress_artifact

from flows.reindex import reindex, run
from tasks.budget import usd_text
from tasks.cache import Cache
from tasks.errors import BudgetReached, EmbedOnceError, SettingsError
from tasks.form import Overrides
from tasks.index import open_index
from tasks.keys import hash_column, text_hash
from tasks.ledger import Ledger
from tasks.params import load_config
from tasks.plan import make_plan, plan_rows
from tasks.quarantine import quarantined
from tasks.schemas import vectors_schema
from tasks.search import search
from tasks.simulator import Latency, Rule, Settings, Simulator
from tasks.survey import Survey, require_safe

pytestmark = pytest.mark.usefixtures("prefect_api")

KEY = "pa-a-secret-key"
POISON = Rule(marker="POISON", status=400, detail="The request cannot be processed.")


class Home:
    """A table of chunks, its config, and the simulator it is embedded by."""

    def __init__(self, folder: Path, simulator: Simulator) -> None:
        self.folder = folder
        self.simulator = simulator
        self.config = folder / "chunks.yaml"
        self.config.write_text(
            f"""\
name: rehearsal
source: {{kind: table, path: chunks.parquet}}
embedding: {{provider: voyage, model: voyage-4, dimension: 256, base_url: {simulator.base_url}}}
limits: {{texts_per_request: 20}}
index: {{uri: ./index, table: chunks}}
state: {{uri: ./state}}
""",
            encoding="utf-8",
        )

    def write(self, texts: Sequence[str]) -> None:
        """The corpus: a chunk a text, its place is its id."""
        frame = pd.DataFrame({"id": [str(n) for n in range(len(texts))], "text": texts})
        frame.to_parquet(self.folder / "chunks.parquet")

    def reindex(self, *settings: str, **overrides: Any) -> Any:
        return run(str(self.config), Overrides(settings=list(settings), **overrides))

    def index(self) -> dict[str, str]:
        """Texts in the index by id."""
        table = open_index(load_config(self.config).index)
        rows = [] if table is None else table.search().select(["id", "text"]).to_list()
        return {row["id"]: row["text"] for row in rows}

    @property
    def billed(self) -> int:
        return int(self.simulator.ledger.totals()["billed_tokens"])

    @property
    def calls(self) -> int:
        return int(self.simulator.ledger.totals()["calls"])

    @property
    def ledger_tokens(self) -> int:
        return int(Ledger(str(self.folder / "state")).calls()["tokens_billed"].sum())


@pytest.fixture
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Home]:
    monkeypatch.setenv("VOYAGE_API_KEY", KEY)
    with Simulator(Settings(keys=frozenset([KEY]))) as simulator:
        yield Home(tmp_path, simulator)


@pytest.fixture
def at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """Retries without their delay."""
    monkeypatch.setattr("tasks.sender.RETRY_S", 0.0)


def words(count: int) -> list[str]:
    return [f"The story of animal number {number} and its house." for number in range(count)]


def by_id(texts: Sequence[str]) -> dict[str, str]:
    return {str(number): text for number, text in enumerate(texts)}


def test_a_run_bills_each_text_once_and_the_ledger_says_so_to_the_token(home: Home) -> None:
    home.write([*words(100), *words(30)])
    report = home.reindex()
    assert (report.state, report.texts.embedded, report.calls.ok) == ("completed", 100, 5)
    assert home.index() == by_id([*words(100), *words(30)])
    totals = home.simulator.ledger.totals()
    assert (totals["distinct_texts"], totals["texts_billed_again"]) == (100, 0)
    assert report.tokens.billed == home.ledger_tokens == home.billed
    assert report.cost.usd == pytest.approx(totals["usd"])
    again = home.reindex()
    assert (again.published, again.texts.embedded, home.calls) == ("none", 0, 5)


@pytest.mark.slow
def test_a_run_takes_the_tokens_price_and_time_of_its_plan(home: Home) -> None:
    texts = [f"{number} " + "sings of houses, " * (number % 40 + 1) for number in range(860)]
    home.write(texts[:200])
    home.reindex()  # whose bills teach how many tokens a text has
    home.write(texts)
    settings = ["limits.texts_per_request=1000", "limits.tokens_per_minute=30000"]
    planned = make_plan(load_config(home.config, settings), Overrides())
    report = home.reindex(*settings)
    assert planned.texts.embedded == report.texts.embedded == 660
    assert planned.tokens == pytest.approx(report.tokens.billed, rel=0.03)
    assert planned.cost.usd == pytest.approx(report.cost.usd, rel=0.03)
    assert planned.calls == report.calls.ok
    assert planned.bound_by == "tokens per minute"
    assert planned.seconds_at_limits == pytest.approx(report.seconds.embed, rel=0.15)
    assert "first guess" not in dict(plan_rows(planned))["to embed"]


@pytest.mark.usefixtures("at_once")
def test_answers_that_are_lost_count_for_the_budget(home: Home) -> None:
    home.write(words(40))
    home.simulator.add(Rule(action="process_then_reset"))
    most = 1.6 * make_plan(load_config(home.config), Overrides()).cost.usd
    with pytest.raises(BudgetReached, match="0 texts of 40 are paid for"):
        home.reindex(max_usd=most)
    assert 0 < home.simulator.ledger.totals()["usd"] <= most
    assert home.ledger_tokens == 0  # nobody has told us what they cost


def test_a_plan_says_that_no_bill_has_taught_it(home: Home) -> None:
    home.write(words(20))
    first = make_plan(load_config(home.config), Overrides())
    assert "a first guess on the high side" in dict(plan_rows(first))["to embed"]


@pytest.mark.slow
def test_a_run_stops_at_its_budget_and_the_next_one_pays_for_the_rest(home: Home) -> None:
    home.write(words(200))
    planned = make_plan(load_config(home.config), Overrides())
    most = planned.cost.usd * 0.4
    assert ("budget", f"{usd_text(most)}: a run would stop at it") in plan_rows(
        planned.model_copy(update={"max_usd": most})
    )
    billed = list[float]()
    for _ in range(2):
        with pytest.raises(
            BudgetReached, match=r"budget of \$0\.0\d+ is reached.* paid for and kept"
        ):
            home.reindex(max_usd=most)
        billed.append(home.simulator.ledger.totals()["usd"] - sum(billed))
        assert home.index() == {}
    assert all(0.9 * most < usd <= 1.03 * most for usd in billed)
    report = home.reindex(f"budget.max_usd={most}")
    assert (report.state, home.index()) == ("completed", by_id(words(200)))
    assert home.simulator.ledger.totals()["texts_billed_again"] == 0
    runs = Ledger(str(home.folder / "state")).runs()
    assert runs["state"].tolist() == ["over budget", "over budget", "completed"]
    assert runs["tokens.billed"].sum() == home.ledger_tokens == home.billed


def test_a_run_that_stops_at_its_budget_has_a_state_that_says_so(home: Home) -> None:
    home.write(words(60))
    state: Any = reindex(str(home.config), Overrides(max_usd=2e-5), return_state=True)
    assert (state.name, state.type.value) == ("BudgetReached", "CANCELLED")
    assert "Run again to go on, or raise budget.max_usd." in str(state.message)


def test_a_budget_below_a_single_text_spends_nothing_and_says_so(home: Home) -> None:
    home.write(words(3))
    with pytest.raises(BudgetReached, match="0 texts of 3 are paid for"):
        home.reindex(max_usd=1e-9)
    assert home.calls == 0


@pytest.mark.slow
def test_a_flow_run_that_is_retried_is_two_runs_in_the_ledger(home: Home) -> None:
    from prefect.client.orchestration import get_client  # noqa: PLC0415
    from prefect.flow_engine import run_flow  # noqa: PLC0415
    from prefect.states import Scheduled  # noqa: PLC0415

    home.write(words(60))
    home.simulator.add(Rule(requests=frozenset([2]), status=401))
    parameters = {"config": str(home.config), "overrides": Overrides()}
    with get_client(sync_client=True) as client:
        flow_run = client.create_flow_run(reindex, parameters=parameters)
        with pytest.raises(EmbedOnceError):
            run_flow(reindex, flow_run=flow_run, parameters=parameters)
        client.set_flow_run_state(flow_run.id, Scheduled(name="AwaitingRetry"))
        flow_run = client.read_flow_run(flow_run.id)
    run_flow(reindex, flow_run=flow_run, parameters=parameters)
    runs = Ledger(str(home.folder / "state")).runs()
    assert list(runs["state"]) == ["failed", "completed"]
    assert list(runs["run_id"]) == [str(flow_run.id), f"{flow_run.id}-2"]
    assert list(runs["texts.embedded"]) == [20, 40]
    assert home.ledger_tokens == home.billed


@pytest.mark.slow
def test_a_plan_after_a_run_knows_how_long_tokens_are(home: Home) -> None:
    home.write(words(60))
    home.reindex()
    before = home.billed
    home.write(words(200))
    plan = make_plan(load_config(home.config), Overrides())
    home.reindex()
    assert plan.texts.embedded == 140
    assert plan.tokens == pytest.approx(home.billed - before, rel=0.03)


@pytest.mark.slow
def test_bad_texts_are_quarantined_and_all_others_indexed(home: Home) -> None:
    texts = words(100)
    for number in (3, 44, 45, 99):
        texts[number] = f"POISON {number}"
    home.write(texts)
    home.simulator.add(POISON)
    state: Any = reindex(str(home.config), Overrides(), return_state=True)
    report = state.result()
    assert (state.name, report.state) == ("Quarantined", "quarantined")
    assert state.is_completed()
    assert report.chunks.quarantined == 4
    assert report.chunks.added == 96
    assert {each.chunk for each in report.refused} == {"3", "44", "45", "99"}
    assert all("cannot be processed" in each.reason for each in report.refused)
    assert home.index() == {id_: text for id_, text in by_id(texts).items() if "POISON" not in text}
    frame = quarantined(str(home.folder / "state"))
    assert len(frame) == 4
    assert set(frame["run_id"]) == {report.run_id}
    assert "POISON" not in json.dumps(report.model_dump())

    before = home.calls
    again = home.reindex()
    assert (home.calls, again.state, again.chunks.quarantined) == (before, "quarantined", 4)
    assert (again.published, again.chunks.added) == ("none", 0)
    later = quarantined(str(home.folder / "state"))
    assert set(later["run_id"]) == {again.run_id}
    assert list(later["first_seen"]) == list(frame["first_seen"])
    assert (later["last_seen"] > frame["last_seen"]).all()


@pytest.mark.slow
def test_a_quarantined_text_is_sent_again_when_it_changes_or_on_request(home: Home) -> None:
    texts = [*words(10), "POISON one", "POISON two"]
    home.write(texts)
    home.simulator.add(POISON)
    home.reindex()
    texts[10] = "no harm in this"
    home.write(texts)
    plan = make_plan(load_config(home.config), Overrides())
    assert (plan.texts.embedded, plan.chunks.added, plan.chunks.quarantined) == (1, 1, 1)
    assert home.reindex().chunks.quarantined == 1
    home.simulator.reset()
    assert home.reindex().chunks.quarantined == 1
    assert home.calls == 0
    released = home.reindex(retry_quarantined=True)
    assert (released.state, released.chunks.added) == ("completed", 1)
    assert home.index() == by_id(texts)
    # The row of the text that changed stays: it says nothing of the corpus as it is now.
    assert len(quarantined(str(home.folder / "state"))) == 1


def test_a_row_whose_new_text_is_refused_leaves_the_index(home: Home) -> None:
    home.write(words(10))
    home.reindex()
    texts = words(10)
    texts[4] = "POISON"
    home.write(texts)
    home.simulator.add(POISON)
    report = home.reindex()
    assert (report.published, report.chunks.quarantined, report.chunks.changed) == ("merge", 1, 0)
    assert report.chunks.deleted == 1
    assert home.index() == {id_: text for id_, text in by_id(texts).items() if id_ != "4"}


@pytest.mark.slow
def test_fail_fast_ends_the_run_and_leaves_the_index_as_it_was(home: Home) -> None:
    home.write(words(10))
    home.reindex()
    home.write([*words(60), "POISON"])
    home.simulator.add(POISON)
    with pytest.raises(EmbedOnceError, match="on_error is fail_fast"):
        home.reindex(on_error="fail_fast")
    assert home.index() == by_id(words(10))
    assert len(quarantined(str(home.folder / "state"))) == 0
    before = home.billed
    assert home.reindex("on_error=collect").chunks.quarantined == 1
    assert home.simulator.ledger.totals()["texts_billed_again"] == 0
    assert home.billed >= before
    assert len(quarantined(str(home.folder / "state"))) == 0


@pytest.mark.slow
def test_an_api_that_refuses_everything_for_a_while_blames_no_text(home: Home) -> None:
    home.write(words(200))
    home.reindex()
    home.write([f"{text} Once more." for text in words(200)])
    home.simulator.reset()
    home.simulator.add(Rule(status=400, detail="Bad Request", requests=frozenset(range(2, 900))))
    with pytest.raises(EmbedOnceError, match="refuses every text"):
        home.reindex()
    assert home.calls < 150  # of 400 to find each text; several batches are in flight
    assert len(quarantined(str(home.folder / "state"))) <= 8
    assert home.index() == by_id(words(200))
    home.simulator.reset()
    assert home.reindex(retry_quarantined=True).state == "completed"
    assert len(home.index()) == 200


@pytest.mark.slow
def test_rows_do_not_leave_in_masses_because_their_texts_are_refused(home: Home) -> None:
    home.write(words(10))
    home.reindex()
    home.write([*words(2), *[f"POISON {number}" for number in range(8)]])
    home.simulator.add(POISON)
    with pytest.raises(SettingsError, match="8 of 10 chunks would leave"):
        home.reindex()
    assert home.index() == by_id(words(10))
    assert home.reindex("index.max_deleted_fraction=1").chunks.deleted == 8


def test_a_wrong_key_costs_one_call_and_is_not_shown(
    home: Home, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("VOYAGE_API_KEY", "pa-another-secret")
    home.write(words(400))
    with pytest.raises(EmbedOnceError, match="VOYAGE_API_KEY") as caught:
        home.reindex()
    assert home.calls == 1
    assert "another-secret" not in str(caught.value)
    assert home.index() == {}


@pytest.mark.slow
@pytest.mark.usefixtures("at_once")
def test_faults_of_all_kinds_lose_nothing_and_bill_nothing_twice(home: Home) -> None:
    for number, rule in enumerate(
        (
            Rule(status=500),
            Rule(status=503, kind="html"),
            Rule(action="reset_before"),
            Rule(action="slow", seconds=0.05),
            Rule(status=529),
            Rule(status=429, retry_after=0.05, times=2),
        )
    ):
        home.simulator.add(rule.model_copy(update={"probability": 0.08, "seed": number}))
    home.write(words(600))
    report = home.reindex("limits.texts_per_request=5")
    assert report.state == "completed"
    assert home.index() == by_id(words(600))
    assert home.simulator.ledger.totals()["texts_billed_again"] == 0
    assert report.tokens.billed == home.ledger_tokens == home.billed
    assert report.calls.failed > 0
    assert report.calls.throttled > 0
    assert report.calls.ok == 120


@pytest.mark.slow
@pytest.mark.usefixtures("at_once")
def test_an_outage_ends_the_run_cleanly_and_the_next_one_goes_on(home: Home) -> None:
    home.simulator.add(Rule(status=503, requests=frozenset(range(6, 500))))
    home.write(words(400))
    with pytest.raises(EmbedOnceError, match=r"texts of 400 are paid for and kept. Run again"):
        home.reindex()
    assert home.index() == {}
    paid = int(home.simulator.ledger.totals()["distinct_texts"])
    assert 0 < paid < 400
    home.simulator.reset()
    report = home.reindex()
    assert report.texts.embedded == 400 - paid
    assert home.index() == by_id(words(400))


@pytest.mark.usefixtures("at_once")
@pytest.mark.parametrize(
    "action",
    [
        "shuffle",
        "nan",
        *[
            pytest.param(action, marks=pytest.mark.slow)
            for action in ("fewer", "dup", "wrong_dim", "null_embedding")
        ],
    ],
)
def test_a_wrong_answer_is_never_stored(home: Home, action: Any) -> None:
    home.write(words(40))
    home.reindex("embedding.dimension=512", "index.table=truth")
    truth = vectors(home, "truth")
    home.simulator.add(Rule(action=action, times=1))
    home.reindex("embedding.dimension=512", "state.uri=other")
    found = vectors(home, "chunks")
    assert found.keys() == truth.keys()
    assert all(np.array_equal(found[id_], truth[id_]) for id_ in truth)


def vectors(home: Home, table: str) -> dict[str, Any]:
    config = load_config(home.config, [f"index.table={table}"])
    opened = open_index(config.index)
    assert opened is not None
    return {row["id"]: row["vector"] for row in opened.search().to_list()}


@pytest.mark.slow
@pytest.mark.parametrize("surprise", [0.5, 3.0])
def test_a_wrong_estimate_costs_a_split_and_never_a_run(home: Home, surprise: float) -> None:
    home.simulator.change(surprise=surprise, models={"voyage-4": {"tokens_per_request": 400}})
    home.write(words(300))
    report = home.reindex("limits.texts_per_request=1000", "limits.tokens_per_request=400")
    assert (report.state, len(home.index())) == ("completed", 300)
    assert home.simulator.ledger.totals()["texts_billed_again"] == 0
    calls = Ledger(str(home.folder / "state")).calls()
    assert report.calls.split == (calls["status"] == "BatchTooLarge").sum()
    late = calls[calls["status"] == "ok"].sort_values("started_at").tail(5)
    off = abs(late["tokens_estimated"] / late["tokens_billed"] - 1)
    assert off.max() < 0.1


@pytest.mark.slow
def test_bits_are_indexed_and_found_by_hamming_distance(home: Home) -> None:
    home.simulator.change(vectors="words")
    home.write(["a wolf in the woods", "foxes at night", "cities and trains"])
    settings = ["embedding.output_dtype=ubinary", "embedding.dimension=1024"]
    report = home.reindex(*settings)
    assert report.chunks.added == 3
    config = load_config(home.config, settings)
    before = home.ledger_tokens
    hits = search(config, "trains in cities", 1)
    assert hits[0].text == "cities and trains"
    assert hits[0].distance == int(hits[0].distance)
    # The query was paid for, is in the ledger, and is asked anew each time.
    assert home.ledger_tokens == home.billed > before
    assert home.simulator.ledger.requests[-1].input_type == "query"
    search(config, "trains in cities", 1)
    assert home.ledger_tokens == home.billed > before + 1
    assert home.reindex(*settings).published == "none"


@pytest.mark.slow
def test_progress_never_goes_back_and_ends_where_the_run_does(
    home: Home, monkeypatch: pytest.MonkeyPatch
) -> None:
    texts = ["POISON", *words(200)]
    home.simulator.add(POISON)
    home.write(texts)
    home.simulator.change(latency=Latency(base_s=0.5))
    shown, update = list[float](), update_progress_artifact

    def meanwhile(found: Survey, overrides: Overrides) -> None:
        """One text leaves the corpus, and another run pays for twenty."""
        require_safe(found, overrides)
        home.write(texts[:-1])
        flat = pa.array(np.full(20 * 256, 1 / 16, np.float32))
        columns = [
            hash_column([text_hash(each) for each in texts[30:50]]),
            pa.FixedSizeListArray.from_arrays(flat, 256),
        ]
        space = found.provider.space
        schema = vectors_schema(space.vector_type)
        Cache(found.config.state.uri, space).remember(
            [pa.Table.from_arrays(columns, schema=schema)]
        )

    def seen(artifact_id: UUID, progress: float) -> None:
        shown.append(progress)
        update(artifact_id, progress)

    monkeypatch.setattr("flows.reindex.require_safe", meanwhile)
    monkeypatch.setattr("tasks.artifacts.update_progress_artifact", seen)
    monkeypatch.setattr("tasks.artifacts.UPDATE_S", 0.01)
    report = home.reindex()
    assert (report.texts.embedded, report.known_texts, report.refused_texts) == (179, 20, 1)
    assert shown == sorted(set(shown))
    assert len(shown) > 5
    assert shown[-1] == 100


def test_progress_of_a_run_that_fails_stays_where_it_was(
    home: Home, at_once: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    home.write(words(100))
    home.simulator.add(Rule(marker="number 70 ", status=403))
    shown = list[float]()
    monkeypatch.setattr(
        "tasks.artifacts.update_progress_artifact", lambda _, progress: shown.append(progress)
    )
    with pytest.raises(EmbedOnceError):
        home.reindex()
    assert shown
    assert 20 <= shown[-1] < 100
    assert shown == sorted(set(shown))


@pytest.mark.slow
def test_a_prefect_server_that_is_stuck_holds_up_no_batch(
    home: Home, monkeypatch: pytest.MonkeyPatch
) -> None:
    home.write(words(200))
    stuck, asked = threading.Event(), list[float]()

    def update(_: UUID, progress: float) -> None:
        asked.append(progress)
        stuck.wait(100)

    monkeypatch.setattr("tasks.artifacts.update_progress_artifact", update)
    monkeypatch.setattr("tasks.artifacts.UPDATE_S", 0.01)
    monkeypatch.setattr("tasks.artifacts.SETTLE_S", 0.1)
    report = home.reindex()
    stuck.set()
    assert (report.state, report.texts.embedded) == ("completed", 200)
    assert len(asked) == 1
    assert asked[0] < 100


def test_a_prefect_server_that_takes_no_progress_fails_no_run(
    home: Home, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    home.write(words(200))

    def update(_: UUID, progress: float) -> None:
        raise OSError(f"no room for {progress}")

    monkeypatch.setattr("tasks.artifacts.update_progress_artifact", update)
    with caplog.at_level(logging.WARNING, "prefect"):
        assert home.reindex().state == "completed"
    said = [each.getMessage() for each in caplog.records if "progress artifact" in each.message]
    assert said
    assert said[-1].startswith("The progress artifact stays at 0 %: the Prefect server did not")
    assert said[-1].endswith("(OSError: no room for 100.0).")
