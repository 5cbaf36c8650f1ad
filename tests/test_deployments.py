"""The deployments of prefect.yaml, on a real Prefect server, run by a real worker."""

import contextlib
import json
import os
import signal
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Hashable, Iterator
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pytest

from tasks.history import history
from tasks.index import is_held
from tasks.params import load_config
from tasks.simulator import Latency, Settings, Simulator

pytestmark = [pytest.mark.slow, pytest.mark.timeout(600)]

POOL = "embed-once"
TEXTS = 120
Api = Callable[..., Any]


@pytest.fixture(scope="module")
def environment(tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, str]]:
    """A running server with an empty database, as the environment of its clients."""
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    home = tmp_path_factory.mktemp("prefect")
    env = {
        **os.environ,
        "PREFECT_HOME": str(home),
        "PREFECT_API_URL": f"http://127.0.0.1:{port}/api",
        "PREFECT_SERVER_ANALYTICS_ENABLED": "false",
        "NO_COLOR": "1",
        "COLUMNS": "200",
        "VOYAGE_API_KEY": "pa-any",
    }
    with (home / "server.log").open("w") as log:
        server = subprocess.Popen(
            [sys.executable, "-m", "prefect", "server", "start", "--port", str(port)],
            env=env, stdout=log, stderr=log,
        )  # fmt: skip
    try:
        wait_for(lambda: answers(f"{env['PREFECT_API_URL']}/health"), seconds=300)
        yield env
    finally:
        server.terminate()
        server.wait(timeout=30)


@pytest.fixture(scope="module")
def api(environment: dict[str, str], project: Path) -> Iterator[Api]:
    """Calls to the server, once the deployments are there and a worker runs elsewhere."""
    prefect("work-pool", "create", "--type", "process", POOL, cwd=project, env=environment)
    prefect("--no-prompt", "deploy", "--all", cwd=project, env=environment)
    worker = started_worker(POOL, environment)

    def call(path: str, method: str = "POST", /, **body: Any) -> Any:
        request = urllib.request.Request(  # noqa: S310
            f"{environment['PREFECT_API_URL']}/{path}",
            method=method,
            data=json.dumps(body).encode() if method == "POST" else None,
            headers={"content-type": "application/json"},
        )
        with urllib.request.urlopen(request, timeout=30) as answer:  # noqa: S310
            return json.load(answer)

    def patient(path: str, method: str = "POST", /, **body: Any) -> Any:
        for _ in range(10):
            try:
                return call(path, method, **body)
            except urllib.error.HTTPError as busy:
                if busy.code != 503:  # SQLite was locked: clients ask again
                    raise
                time.sleep(1)
        return call(path, method, **body)

    try:
        yield patient
    finally:
        worker.terminate()
        try:
            worker.wait(timeout=30)
        except subprocess.TimeoutExpired:  # it ends by Ctrl-C, which a background job ignores
            worker.kill()
            worker.wait()


def started_worker(pool: str, env: dict[str, str]) -> "subprocess.Popen[bytes]":
    return subprocess.Popen(
        [sys.executable, "-m", "prefect", "worker", "start", "--pool", pool],
        cwd="/",
        env=env,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )


def prefect(*arguments: str, cwd: Path, env: dict[str, str]) -> str:
    done = subprocess.run(
        [sys.executable, "-m", "prefect", *arguments],
        cwd=cwd, env=env, capture_output=True, text=True, check=False, timeout=180,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def answers(url: str) -> bool:
    try:
        with urllib.request.urlopen(url, timeout=5):  # noqa: S310
            return True
    except OSError:
        return False


def wait_for(condition: Callable[[], Any], seconds: float) -> Any:
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        if found := condition():
            return found
        time.sleep(0.5)
    raise TimeoutError(f"nothing came within {seconds} s")


def ended(api: Api, name: str, **parameters: Any) -> dict[str, Any]:
    """The flow run of deployment `name`, once it has ended."""
    return end_of(api, begun(api, name, **parameters))


def begun(api: Api, name: str, **parameters: Any) -> str:
    """The id of a new flow run of deployment `name`."""
    deployment = api(f"deployments/name/{name}", "GET")
    run = api(f"deployments/{deployment['id']}/create_flow_run", parameters=parameters)
    return str(run["id"])


def end_of(api: Api, run_id: str) -> dict[str, Any]:
    """The flow run, once it has ended."""
    ends = {"COMPLETED", "FAILED", "CRASHED", "CANCELLED"}

    def finished() -> Any:
        found = api(f"flow_runs/{run_id}", "GET")
        return found if found["state_type"] in ends else None

    found: dict[str, Any] = wait_for(finished, seconds=180)
    return found


def artifact(api: Api, key: str) -> str:
    return str(api(f"artifacts/{key}/latest", "GET")["data"])


def test_the_form_of_an_ad_hoc_run_says_what_each_field_means(api: Api) -> None:
    schema = api("deployments/name/reindex/ad-hoc", "GET")["parameter_openapi_schema"]
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


def test_the_nightly_run_is_scheduled_and_never_overlaps_itself(api: Api) -> None:
    nightly = api("deployments/name/reindex/nightly", "GET")
    assert nightly["schedules"][0]["schedule"]["cron"] == "0 3 * * *"
    assert nightly["schedules"][0]["active"]
    assert nightly["global_concurrency_limit"]["limit"] == 1
    assert nightly["concurrency_options"]["collision_strategy"] == "CANCEL_NEW"


def test_an_ad_hoc_run_indexes_and_the_nightly_one_then_has_nothing_to_do(
    api: Api, project: Path
) -> None:
    first = ended(api, "reindex/ad-hoc", overrides={"narrow": "README.md"})
    assert first["state_name"] == "Completed", first["state"]
    assert (project / "data" / "index" / "demo.lance").is_dir()
    assert "generation 1 published" in artifact(api, "report-demo")
    assert float(artifact(api, "progress-demo")) == 100.0
    assert ended(api, "reindex/nightly")["state_name"] == "Completed"
    assert "generation 2 published" in artifact(api, "report-demo")
    assert ended(api, "reindex/nightly")["state_name"] == "Completed"
    assert "nothing changed, nothing embedded" in artifact(api, "report-demo")


def test_the_weekly_runs_find_a_healthy_index_and_keep_it_so(api: Api) -> None:
    assert ended(api, "reindex/nightly")["state_name"] == "Completed"
    assert ended(api, "maintain/weekly")["state_name"] == "Completed"
    assert "generations kept" in artifact(api, "maintain-demo")
    found = ended(api, "verify/weekly")
    assert found["state_name"] == "Completed", artifact(api, "verify-demo")
    assert ended(api, "verify/weekly", repair=True)["state_name"] == "Completed"


def test_a_wrong_override_fails_the_run_in_plain_words(api: Api) -> None:
    run = ended(api, "reindex/ad-hoc", overrides={"settings": ["index.tabel=x"]})
    assert run["state_name"] == "Failed"
    assert "index.tabel: unknown key. Did you mean 'table'?" in run["state"]["message"]


def test_the_smoke_deployment_passes(api: Api) -> None:
    assert ended(api, "smoke/ci")["state_name"] == "Completed"


class Birds:
    """A table of texts, and a provider that answers each of them after a second."""

    def __init__(self, folder: Path, simulator: Simulator) -> None:
        self.simulator = simulator
        self.config = folder / "birds.yaml"
        self.config.write_text(
            f"""\
name: birds
source: {{kind: table, path: birds.jsonl}}
embedding: {{provider: voyage, model: voyage-4, dimension: 256, base_url: {simulator.base_url}}}
limits: {{texts_per_request: 1}}
index: {{uri: ./index, table: birds}}
state: {{uri: ./state}}
""",
            encoding="utf-8",
        )
        self.write(TEXTS)

    def write(self, texts: int) -> None:
        """The corpus."""
        rows = [{"id": str(number), "text": f"bird number {number}"} for number in range(texts)]
        (self.config.parent / "birds.jsonl").write_text("\n".join(map(json.dumps, rows)))

    def totals(self, name: str) -> int:
        return int(self.simulator.ledger.totals()[name])

    @property
    def arrived(self) -> int:
        """Calls that arrived, answered or not."""
        return self.simulator.ledger._arrivals  # noqa: SLF001 - the totals are of calls answered

    def runs(self) -> list[dict[Hashable, Any]]:
        """The runs by the ledger, oldest first."""
        return history(load_config(self.config)).to_dict("records")

    def flow_process(self) -> int:
        """The process of the flow run that holds the index."""
        holder = json.loads((self.config.parent / "index" / "birds.lock.holder").read_text())
        for folder in Path("/proc").glob("[0-9]*"):
            with contextlib.suppress(OSError):  # it has just ended
                environ = (folder / "environ").read_bytes()
                if f"PREFECT__FLOW_RUN_ID={holder['run_id']}".encode() in environ:
                    return int(folder.name)
        raise LookupError(holder)


@pytest.fixture
def birds(tmp_path: Path) -> Iterator[Birds]:
    with Simulator(Settings(latency=Latency(base_s=1))) as simulator:
        yield Birds(tmp_path, simulator)


def test_a_cancel_in_the_ui_keeps_what_is_paid_for(api: Api, birds: Birds) -> None:
    run_id = begun(api, "reindex/ad-hoc", config=str(birds.config))
    wait_for(lambda: birds.totals("ok") >= 12, seconds=180)
    process = birds.flow_process()
    api(f"flow_runs/{run_id}/set_state", state={"type": "CANCELLING", "name": "Cancelling"})
    wait_for(birds.runs, seconds=15)
    sent = birds.arrived
    wait_for(lambda: not Path(f"/proc/{process}").exists(), seconds=15)
    run = end_of(api, run_id)
    assert (run["state_type"], run["state_name"]) == ("CANCELLED", "Cancelled")
    assert birds.arrived == sent
    (told,) = birds.runs()
    assert told["state"] == "cancelled"
    assert told["texts.embedded"] == birds.totals("ok") == sent < TEXTS
    assert told["tokens.billed"] == birds.totals("billed_tokens")
    assert "birds: cancelled; the index is as it was" in artifact(api, "report-birds")
    birds.simulator.change(latency=Latency())
    assert ended(api, "reindex/ad-hoc", config=str(birds.config))["state_name"] == "Completed"
    assert birds.runs()[-1]["texts.embedded"] == TEXTS - told["texts.embedded"]
    assert birds.totals("texts_billed_again") == 0


def scheduled_run(api: Api, deployment_id: str) -> str | None:
    """The id of the first run that a schedule of the deployment has started."""
    found = api(
        "flow_runs/filter",
        deployments={"id": {"any_": [deployment_id]}},
        flow_runs={"state": {"type": {"not_any_": ["SCHEDULED"]}}},
        sort="START_TIME_ASC",
    )
    return next((str(run["id"]) for run in found if run["auto_scheduled"]), None)


def test_schedules_fire_and_two_of_one_index_do_not_overlap(
    api: Api, birds: Birds, environment: dict[str, str]
) -> None:
    birds.simulator.change(latency=Latency(base_s=0.3))
    flow_id = api("flows/name/reindex", "GET")["id"]
    entry = api("deployments/name/reindex/ad-hoc", "GET")
    soon = datetime.now(tz=UTC) + timedelta(seconds=15)
    ids = [
        api(
            "deployments/",
            name=f"birds-{number}",
            flow_id=flow_id,
            entrypoint=entry["entrypoint"],
            path=entry["path"],
            pull_steps=entry["pull_steps"],
            work_pool_name=POOL,
            parameters={
                "config": str(birds.config),
                "overrides": {"settings": ["index.max_wait=120", "limits.concurrency=2"]},
            },
            enforce_parameter_schema=False,
            schedules=[
                {"schedule": {"interval": 60, "anchor_date": soon.isoformat()}, "active": True}
            ],
        )["id"]
        for number in range(2)
    ]
    try:
        runs = [wait_for(lambda id_=id_: scheduled_run(api, id_), seconds=180) for id_ in ids]  # type: ignore[misc]
        assert [end_of(api, run)["state_name"] for run in runs] == ["Completed"] * 2
    finally:
        for id_ in ids:
            urllib.request.urlopen(  # noqa: S310
                urllib.request.Request(  # noqa: S310
                    f"{environment['PREFECT_API_URL']}/deployments/{id_}", method="DELETE"
                )
            ).close()
    # Side by side they would both have published.
    first, *others = [run["state"] for run in birds.runs()]
    assert (first, set(others)) == ("completed", {"unchanged"})
    assert birds.totals("texts_billed_again") == 0
    assert birds.totals("max_concurrency") <= 2


def paused(api: Api, config: Path, *settings: str) -> str:
    """The id of a run that waits for a person."""
    overrides = {"approve_above_usd": 1e-6, "settings": settings}
    run_id = begun(api, "reindex/ad-hoc", config=str(config), overrides=overrides)
    wait_for(lambda: api(f"flow_runs/{run_id}/input/filter", prefix="paused"), seconds=180)
    return run_id


def answered(api: Api, run_id: str, **answer: Any) -> Any:
    return api(f"flow_runs/{run_id}/resume", run_input=answer)


def test_a_paused_run_lets_others_use_the_index_and_goes_on_from_what_it_finds(
    api: Api, birds: Birds
) -> None:
    birds.simulator.change(latency=Latency())
    run_id = paused(api, birds.config)
    assert "| approval | needed, " in artifact(api, "plan-birds")
    assert birds.arrived == 0
    assert not is_held(load_config(birds.config).index)
    birds.write(TEXTS + 5)
    little = ["budget.max_usd=0.000012", "limits.texts_per_request=10"]
    ended(api, "reindex/ad-hoc", config=str(birds.config), overrides={"settings": little})
    paid = birds.totals("distinct_texts")
    assert 0 < paid < TEXTS
    wrong = answered(api, run_id, decision="approve", max_usd=-1)
    assert (wrong["status"], birds.totals("distinct_texts")) == ("REJECT", paid)
    assert answered(api, run_id, decision="approve", max_usd=0.01)["status"] == "ACCEPT"
    assert end_of(api, run_id)["state_name"] == "Completed"
    assert [run["state"] for run in birds.runs()] == ["over budget", "completed"]
    assert birds.runs()[-1]["texts.embedded"] == TEXTS + 5 - paid


@pytest.mark.parametrize("way", ["rejected", "unanswered", "cancelled"])
def test_a_run_that_nobody_approves_ends_and_has_spent_nothing(
    api: Api, birds: Birds, way: str
) -> None:
    run_id = paused(
        api, birds.config, *(["budget.approval_timeout=3"] if way == "unanswered" else [])
    )
    if way == "rejected":
        answered(api, run_id, decision="reject", max_usd=1)
    if way == "cancelled":
        api(f"flow_runs/{run_id}/set_state", state={"type": "CANCELLING", "name": "Cancelling"})
    run = end_of(api, run_id)
    name = "Cancelled" if way == "cancelled" else "NotApproved"
    assert (run["state_type"], run["state_name"]) == ("CANCELLED", name)
    said = {"rejected": "It was rejected.", "unanswered": "Nobody answered within 3.0 s."}
    assert said.get(way, "") in (run["state"]["message"] or "")
    (told,) = birds.runs()
    assert told["state"] == ("cancelled" if way == "cancelled" else "not approved")
    assert birds.arrived == 0


def test_a_run_that_may_only_spend_so_much_stops_there(api: Api, birds: Birds) -> None:
    birds.simulator.change(latency=Latency())
    run_id = paused(api, birds.config, "limits.texts_per_request=10")
    answered(api, run_id, decision="approve", max_usd=0.00002)
    assert end_of(api, run_id)["state_name"] == "BudgetReached"
    assert 0 < birds.simulator.ledger.totals()["usd"] <= 0.00002


@pytest.fixture
def doomed(environment: dict[str, str], project: Path) -> Iterator["subprocess.Popen[bytes]"]:
    """A worker to kill, of a pool and a deployment of its own."""
    prefect(
        "work-pool", "create", "--type", "process", "--overwrite", "doomed",
        cwd=project, env=environment,
    )  # fmt: skip
    deploy = ["deploy", "flows/reindex.py:reindex", "--name", "doomed", "--pool", "doomed"]
    prefect("--no-prompt", *deploy, cwd=project, env=environment)
    worker = started_worker("doomed", environment)
    yield worker
    worker.kill()
    worker.wait()


def test_a_run_whose_worker_is_killed_ends_and_says_so(
    api: Api, birds: Birds, doomed: "subprocess.Popen[bytes]"
) -> None:
    run_id = begun(api, "reindex/doomed", config=str(birds.config))
    wait_for(lambda: birds.totals("ok") >= 6, seconds=180)
    process = birds.flow_process()
    doomed.kill()
    wait_for(lambda: not Path(f"/proc/{process}").exists(), seconds=30)
    assert birds.arrived < TEXTS
    assert end_of(api, run_id)["state_type"] in {"CRASHED", "FAILED"}
    (told,) = birds.runs()
    assert told["state"] in {"died", "failed"}
    assert told["texts.embedded"] == birds.totals("ok") == birds.arrived
    birds.simulator.change(latency=Latency())
    assert ended(api, "reindex/ad-hoc", config=str(birds.config))["state_name"] == "Completed"
    assert birds.totals("texts_billed_again") == 0


def test_after_worker_and_run_are_killed_the_next_run_takes_up_their_answers(
    api: Api, birds: Birds, doomed: "subprocess.Popen[bytes]"
) -> None:
    run_id = begun(api, "reindex/doomed", config=str(birds.config))
    wait_for(lambda: birds.totals("ok") >= 6, seconds=180)
    process = birds.flow_process()
    doomed.kill()
    os.kill(process, signal.SIGKILL)
    wait_for(lambda: birds.totals("calls") == birds.arrived, seconds=10)
    answers = list((birds.config.parent / "state" / "runs").glob("*/answers/*.arrow"))
    birds.simulator.change(latency=Latency())
    # No wait for anything: the lock went with the process.
    assert ended(api, "reindex/ad-hoc", config=str(birds.config))["state_name"] == "Completed"
    assert [run["state"] for run in birds.runs()] == ["died", "completed"]
    assert birds.runs()[-1]["recovered_vectors"] == len(answers) >= 6
    assert birds.totals("texts_billed_again") <= birds.arrived - TEXTS
    # Nobody was left to tell Prefect.
    assert api(f"flow_runs/{run_id}", "GET")["state_name"] == "Running"
