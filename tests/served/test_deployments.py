"""The deployments of prefect.yaml, on a real Prefect server, run by a real worker."""

import os
import signal
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pytest

from tasks.index import is_held
from tasks.params import load_config
from tasks.simulator import Latency
from tasks.simulator.settings import JobSettings

pytestmark = [pytest.mark.slow, pytest.mark.timeout(600)]


def test_the_form_of_an_ad_hoc_run_says_what_each_field_means(served: Any) -> None:
    schema = served("deployments/name/reindex/ad-hoc", "GET")["parameter_openapi_schema"]
    overrides = schema["definitions"]["Overrides"]["properties"]
    assert schema["properties"]["config"]["description"].startswith("Path of the YAML file")
    assert [field["title"] for field in overrides.values()] == [
        "Narrower source path",
        "Maximum price",
        "Approval threshold",
        "Texts that are refused",
        "Retry what is quarantined",
        "Accept another splitter",
        "Further settings",
    ]
    assert all(field["description"] for field in overrides.values())
    assert [field["position"] for field in overrides.values()] == [0, 1, 2, 3, 4, 5, 6]


@pytest.mark.parametrize("name", ["plan/ad-hoc", "verify/weekly", "maintain/weekly"])
def test_every_field_of_a_form_has_one_type_and_says_what_it_is(served: Any, name: str) -> None:
    schema = served(f"deployments/name/{name}", "GET")["parameter_openapi_schema"]
    fields = schema["properties"] | schema.get("definitions", {}).get("Overrides", {}).get(
        "properties", {}
    )
    assert all(field.get("description") for field in fields.values())
    # Prefect's forms show a union as a choice between the names of Python's types.
    assert not any("anyOf" in field for field in fields.values())


def test_the_nightly_run_is_scheduled(served: Any) -> None:
    nightly = served("deployments/name/reindex/nightly", "GET")
    assert nightly["schedules"][0]["schedule"]["cron"] == "0 3 * * *"
    assert nightly["schedules"][0]["active"]
    weekly = served("deployments/name/verify/weekly", "GET")
    assert weekly["global_concurrency_limit"]["limit"] == 1
    assert weekly["concurrency_options"]["collision_strategy"] == "CANCEL_NEW"


def test_a_run_that_would_lose_its_slot_by_pausing_does_not_pause(served: Any, birds: Any) -> None:
    pool = ["--pool", served.pool, "--concurrency-limit", "1"]
    deploy = ["deploy", "flows/reindex.py:reindex", "--name", "limited", *pool]
    served.prefect("--no-prompt", *deploy)
    run = served.ended(
        "reindex/limited", config=str(birds.config), overrides={"approve_above_usd": 1e-6}
    )
    assert run["state_name"] == "NotApproved"
    assert "its deployment has a concurrency_limit" in run["state"]["message"]
    assert birds.arrived == 0


def test_an_ad_hoc_run_indexes_and_the_nightly_one_then_has_nothing_to_do(
    served: Any, project: Path
) -> None:
    first = served.ended("reindex/ad-hoc", overrides={"narrow": "README.md"})
    assert first["state_name"] == "Completed", first["state"]
    assert (project / "data" / "index" / "demo.lance").is_dir()
    assert "generation 1 published" in served.artifact("report-demo")
    assert float(served.artifact("progress-demo")) == 100.0
    assert served.ended("reindex/nightly")["state_name"] == "Completed"
    assert "generation 2 published" in served.artifact("report-demo")
    assert served.ended("reindex/nightly")["state_name"] == "Completed"
    assert "nothing changed, nothing embedded" in served.artifact("report-demo")


def test_the_weekly_runs_find_a_healthy_index_and_keep_it_so(served: Any) -> None:
    assert served.ended("reindex/nightly")["state_name"] == "Completed"
    assert served.ended("maintain/weekly")["state_name"] == "Completed"
    assert "generations kept" in served.artifact("maintain-demo")
    found = served.ended("verify/weekly")
    assert found["state_name"] == "Completed", served.artifact("verify-demo")
    assert served.ended("verify/weekly", repair=True)["state_name"] == "Completed"


def test_a_wrong_override_fails_the_run_in_plain_words(served: Any) -> None:
    run = served.ended("reindex/ad-hoc", overrides={"settings": ["index.tabel=x"]})
    assert run["state_name"] == "Failed"
    assert "index.tabel: unknown key. Did you mean 'table'?" in run["state"]["message"]


def test_the_smoke_deployment_passes(served: Any) -> None:
    assert served.ended("smoke/ci")["state_name"] == "Completed"


def test_a_cancel_in_the_ui_keeps_what_is_paid_for(served: Any, birds: Any) -> None:
    run_id = served.begun("reindex/ad-hoc", config=str(birds.config))
    served.wait_for(lambda: birds.totals("ok") >= 12)
    birds.simulator.change(latency=Latency(base_s=8))  # it cannot end before it is told
    process = birds.flow_process()
    served(f"flow_runs/{run_id}/set_state", state={"type": "CANCELLING", "name": "Cancelling"})
    served.wait_for(birds.runs)
    sent = birds.arrived
    served.wait_for(lambda: not Path(f"/proc/{process}").exists())
    run = served.end_of(run_id)
    assert (run["state_type"], run["state_name"]) == ("CANCELLED", "Cancelled")
    assert birds.arrived == sent
    (told,) = birds.runs()
    assert told["state"] == "cancelled"
    assert told["texts.embedded"] == birds.totals("ok") == sent < birds.texts
    assert told["tokens.billed"] == birds.totals("billed_tokens")
    assert "birds: cancelled; the index is as it was" in served.artifact("report-birds")
    birds.simulator.change(latency=Latency())
    assert served.ended("reindex/ad-hoc", config=str(birds.config))["state_name"] == "Completed"
    assert birds.runs()[-1]["texts.embedded"] == birds.texts - told["texts.embedded"]
    assert birds.totals("texts_billed_again") == 0


def scheduled_run(served: Any, deployment_id: str) -> str | None:
    """The id of the first run that a schedule of the deployment has started."""
    found = served(
        "flow_runs/filter",
        deployments={"id": {"any_": [deployment_id]}},
        flow_runs={"state": {"type": {"not_any_": ["SCHEDULED"]}}},
        sort="START_TIME_ASC",
    )
    return next((str(run["id"]) for run in found if run["auto_scheduled"]), None)


@contextmanager
def scheduled(served: Any, *names: str, config: Path, settings: list[str]) -> Iterator[list[str]]:
    """Deployments of reindex that run each minute, the first time in 15 s; their ids."""
    entry = served("deployments/name/reindex/ad-hoc", "GET")
    soon = datetime.now(tz=UTC) + timedelta(seconds=15)
    schedule = {"interval": 60, "anchor_date": soon.isoformat()}
    ids = [
        served(
            "deployments/",
            name=name,
            flow_id=entry["flow_id"],
            entrypoint=entry["entrypoint"],
            path=entry["path"],
            pull_steps=entry["pull_steps"],
            work_pool_name=served.pool,
            parameters={"config": str(config), "overrides": {"settings": settings}},
            enforce_parameter_schema=False,
            schedules=[{"schedule": schedule, "active": True}],
        )["id"]
        for name in names
    ]
    try:
        yield ids
    finally:
        for id_ in ids:
            served(f"deployments/{id_}", "DELETE")


def test_schedules_fire_and_two_of_one_index_do_not_overlap(served: Any, birds: Any) -> None:
    birds.simulator.change(latency=Latency(base_s=0.3))
    settings = ["index.max_wait=120", "limits.concurrency=2"]
    with scheduled(served, "birds-0", "birds-1", config=birds.config, settings=settings) as ids:
        runs = [served.wait_for(lambda id_=id_: scheduled_run(served, id_)) for id_ in ids]
        assert [served.end_of(run)["state_name"] for run in runs] == ["Completed"] * 2
    # Side by side they would both have published.
    first, *others = [run["state"] for run in birds.runs()]
    assert (first, set(others)) == ("completed", {"unchanged"})
    assert birds.totals("texts_billed_again") == 0
    assert birds.totals("max_concurrency") <= 2


def test_what_waits_in_the_batch_lane_is_taken_up_by_a_schedule(served: Any, birds: Any) -> None:
    times = JobSettings(validating_s=1, line_s=0.01, finalizing_s=1)
    birds.simulator.change(jobs=times.model_dump())
    lane = ["embedding.lane=batch"]
    config = str(birds.config)
    waiting = served.ended("reindex/ad-hoc", config=config, overrides={"settings": lane})
    assert (waiting["state_type"], waiting["state_name"]) == ("COMPLETED", "Waiting")
    assert "waits for the Batch lane" in waiting["state"]["message"]
    assert "120 texts in 1 job" in served.artifact("report-birds")
    with scheduled(served, "birds-later", config=birds.config, settings=lane) as (later,):
        run = served.wait_for(lambda: scheduled_run(served, later))
        assert served.end_of(run)["state_name"] == "Completed"
    assert [run["state"] for run in birds.runs()] == ["waiting", "completed"]
    assert "generation 1 published" in served.artifact("report-birds")
    assert (birds.totals("batch_jobs"), birds.totals("texts_billed_again")) == (1, 0)


def test_a_paused_run_lets_others_use_the_index_and_goes_on_from_what_it_finds(
    served: Any, birds: Any
) -> None:
    birds.simulator.change(latency=Latency())
    run_id = served.paused(birds.config)
    assert "| approval | needed, " in served.artifact("plan-birds")
    assert birds.arrived == 0
    assert not is_held(load_config(birds.config).index)
    birds.write(birds.texts + 5)
    little = ["budget.max_usd=0.000012", "limits.texts_per_request=10"]
    served.ended("reindex/ad-hoc", config=str(birds.config), overrides={"settings": little})
    paid = birds.totals("distinct_texts")
    assert 0 < paid < birds.texts
    wrong = served.answered(run_id, decision="approve", max_usd=-1)
    assert (wrong["status"], birds.totals("distinct_texts")) == ("REJECT", paid)
    assert served.answered(run_id, decision="approve", max_usd=0.01)["status"] == "ACCEPT"
    assert served.end_of(run_id)["state_name"] == "Completed"
    assert [run["state"] for run in birds.runs()] == ["over budget", "completed"]
    assert birds.runs()[-1]["texts.embedded"] == birds.texts + 5 - paid


@pytest.mark.parametrize("way", ["rejected", "unanswered", "cancelled"])
def test_a_run_that_nobody_approves_ends_and_has_spent_nothing(
    served: Any, birds: Any, way: str
) -> None:
    run_id = served.paused(
        birds.config, *(["budget.approval_timeout=3"] if way == "unanswered" else [])
    )
    if way == "rejected":
        served.answered(run_id, decision="reject", max_usd=1)
    if way == "cancelled":
        served(f"flow_runs/{run_id}/set_state", state={"type": "CANCELLING", "name": "Cancelling"})
    run = served.end_of(run_id)
    name = "Cancelled" if way == "cancelled" else "NotApproved"
    assert (run["state_type"], run["state_name"]) == ("CANCELLED", name)
    said = {"rejected": "It was rejected.", "unanswered": "Nobody answered within 3.0 s."}
    assert said.get(way, "") in (run["state"]["message"] or "")
    (told,) = birds.runs()
    assert told["state"] == ("cancelled" if way == "cancelled" else "not approved")
    assert birds.arrived == 0


def test_a_run_that_may_only_spend_so_much_stops_there(served: Any, birds: Any) -> None:
    birds.simulator.change(latency=Latency())
    run_id = served.paused(birds.config, "limits.texts_per_request=10")
    served.answered(run_id, decision="approve", max_usd=0.00002)
    assert served.end_of(run_id)["state_name"] == "BudgetReached"
    assert 0 < birds.simulator.ledger.totals()["usd"] <= 0.00002


@pytest.fixture
def doomed(served: Any) -> Iterator["subprocess.Popen[bytes]"]:
    """A worker to kill, of a pool and a deployment of its own."""
    served.prefect("work-pool", "create", "--type", "process", "--overwrite", "doomed")
    deploy = ["deploy", "flows/reindex.py:reindex", "--name", "doomed", "--pool", "doomed"]
    served.prefect("--no-prompt", *deploy)
    worker = served.worker("doomed")
    yield worker
    worker.kill()
    worker.wait()


def test_a_run_whose_worker_is_killed_ends_and_says_so(
    served: Any, birds: Any, doomed: "subprocess.Popen[bytes]"
) -> None:
    run_id = served.begun("reindex/doomed", config=str(birds.config))
    served.wait_for(lambda: birds.totals("ok") >= 6)
    process = birds.flow_process()
    doomed.kill()
    served.wait_for(lambda: not Path(f"/proc/{process}").exists())
    assert birds.arrived < birds.texts
    assert served.end_of(run_id)["state_type"] in {"CRASHED", "FAILED"}
    (told,) = birds.runs()
    assert told["state"] in {"died", "failed"}
    assert told["texts.embedded"] == birds.totals("ok") == birds.arrived
    birds.simulator.change(latency=Latency())
    assert served.ended("reindex/ad-hoc", config=str(birds.config))["state_name"] == "Completed"
    assert birds.totals("texts_billed_again") == 0


def test_after_worker_and_run_are_killed_the_next_run_takes_up_their_answers(
    served: Any, birds: Any, doomed: "subprocess.Popen[bytes]"
) -> None:
    run_id = served.begun("reindex/doomed", config=str(birds.config))
    runs = birds.config.parent / "state" / "runs"
    served.wait_for(lambda: len(list(runs.glob("*/answers/*.arrow"))) >= 6)
    process = birds.flow_process()
    doomed.kill()
    os.kill(process, signal.SIGKILL)
    served.wait_for(lambda: birds.totals("calls") == birds.arrived)
    answers = list(runs.glob("*/answers/*.arrow"))
    birds.simulator.change(latency=Latency())
    # No wait for anything: the lock went with the process.
    assert served.ended("reindex/ad-hoc", config=str(birds.config))["state_name"] == "Completed"
    assert [run["state"] for run in birds.runs()] == ["died", "completed"]
    assert birds.runs()[-1]["recovered_vectors"] == len(answers) >= 6
    assert birds.totals("texts_billed_again") <= birds.arrived - birds.texts
    # Nobody was left to tell Prefect.
    assert served(f"flow_runs/{run_id}", "GET")["state_name"] == "Running"
