"""The deployments of prefect.yaml, on a real Prefect server, run by a real worker."""

import json
import os
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

pytestmark = [pytest.mark.slow, pytest.mark.timeout(600)]

POOL = "embed-once"
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
    }
    with (home / "server.log").open("w") as log:
        server = subprocess.Popen(
            [sys.executable, "-m", "prefect", "server", "start", "--port", str(port)],
            env=env, stdout=log, stderr=log,
        )  # fmt: skip
    try:
        wait_for(lambda: answers(f"{env['PREFECT_API_URL']}/health"), seconds=120)
        yield env
    finally:
        server.terminate()
        server.wait(timeout=30)


@pytest.fixture(scope="module")
def api(environment: dict[str, str], project: Path) -> Iterator[Api]:
    """Calls to the server, once the deployments are there and a worker runs elsewhere."""
    prefect("work-pool", "create", "--type", "process", POOL, cwd=project, env=environment)
    prefect("--no-prompt", "deploy", "--all", cwd=project, env=environment)
    worker = subprocess.Popen(
        [sys.executable, "-m", "prefect", "worker", "start", "--pool", POOL],
        cwd="/",
        env=environment,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )

    def call(path: str, method: str = "POST", **body: Any) -> Any:
        request = urllib.request.Request(  # noqa: S310
            f"{environment['PREFECT_API_URL']}/{path}",
            method=method,
            data=json.dumps(body).encode() if method == "POST" else None,
            headers={"content-type": "application/json"},
        )
        with urllib.request.urlopen(request, timeout=30) as answer:  # noqa: S310
            return json.load(answer)

    try:
        yield call
    finally:
        worker.terminate()
        try:
            worker.wait(timeout=30)
        except subprocess.TimeoutExpired:  # it ends by Ctrl-C, which a background job ignores
            worker.kill()
            worker.wait()


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
    deployment = api(f"deployments/name/{name}", "GET")
    run = api(f"deployments/{deployment['id']}/create_flow_run", parameters=parameters)

    def finished() -> Any:
        found = api(f"flow_runs/{run['id']}", "GET")
        return found if found["state_type"] in {"COMPLETED", "FAILED", "CRASHED"} else None

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
        "Accept another splitter",
        "Retry what is quarantined",
        "Texts that are refused",
        "Further settings",
    ]
    assert all(field["description"] for field in overrides.values())
    assert [field["position"] for field in overrides.values()] == [0, 1, 2, 3, 4]


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


def test_a_wrong_override_fails_the_run_in_plain_words(api: Api) -> None:
    run = ended(api, "reindex/ad-hoc", overrides={"settings": ["index.tabel=x"]})
    assert run["state_name"] == "Failed"
    assert "index.tabel: unknown key. Did you mean 'table'?" in run["state"]["message"]


def test_the_smoke_deployment_passes(api: Api) -> None:
    assert ended(api, "smoke/ci")["state_name"] == "Completed"
