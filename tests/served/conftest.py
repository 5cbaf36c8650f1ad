"""What tests of a real Prefect server share: its deployments, a worker, a corpus."""

import contextlib
import json
import os
import re
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Hashable, Iterator
from pathlib import Path
from typing import Any

import pytest

from tasks.history import history
from tasks.params import load_config
from tasks.simulator import Latency, Settings, Simulator
from tests.waiting import until

CHROMIUM = Path(os.environ.get("CHROMIUM", "/usr/bin/chromium"))
QUIET = ["--no-first-run", "--disable-background-networking", "--disable-component-update"]
"""Chromium would call home, which not every machine lets it."""
PATIENCE_S = 300
"""A server whose SQLite is locked answers after a minute, and may have to be asked again."""
ENDS = {"COMPLETED", "FAILED", "CRASHED", "CANCELLED"}


class Served:
    """A Prefect server with the project's deployments, and a worker that runs them.

    Attributes:
        environment: That of its clients.
        project: The copy of the project that was deployed.
        pool: The work pool of the deployments.
        url: Where its pages are.
    """

    pool = "embed-once"

    def __init__(self, environment: dict[str, str], project: Path) -> None:
        self.environment = environment
        self.project = project
        self.url = environment["PREFECT_API_URL"].removesuffix("/api")

    def __call__(self, path: str, method: str = "POST", /, **body: Any) -> Any:
        """What its API answers."""
        deadline = time.monotonic() + PATIENCE_S
        while True:
            try:
                return self._asked(path, method, body)
            except urllib.error.HTTPError as busy:
                # SQLite was locked: clients ask again.
                if busy.code != 503 or time.monotonic() > deadline:
                    raise
                time.sleep(1)

    def _asked(self, path: str, method: str, body: dict[str, Any]) -> Any:
        request = urllib.request.Request(  # noqa: S310
            f"{self.url}/api/{path}",
            method=method,
            data=json.dumps(body).encode() if method == "POST" else None,
            headers={"content-type": "application/json"},
        )
        with urllib.request.urlopen(request, timeout=120) as answer:  # noqa: S310
            said = answer.read()
        return json.loads(said) if said else None

    def prefect(self, *arguments: str) -> str:
        """What the command `prefect` prints."""
        done = subprocess.run(
            [sys.executable, "-m", "prefect", *arguments],
            cwd=self.project, env=self.environment,
            capture_output=True, text=True, check=False, timeout=PATIENCE_S,
        )  # fmt: skip
        assert done.returncode == 0, done.stdout + done.stderr
        return done.stdout

    def worker(self, pool: str) -> "subprocess.Popen[bytes]":
        """A worker, started."""
        return subprocess.Popen(
            [sys.executable, "-m", "prefect", "worker", "start", "--pool", pool],
            cwd="/",
            env=self.environment,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )

    def begun(self, name: str, **parameters: Any) -> str:
        """The id of a new flow run of deployment `name`."""
        deployment = self(f"deployments/name/{name}", "GET")
        run = self(f"deployments/{deployment['id']}/create_flow_run", parameters=parameters)
        return str(run["id"])

    def run(self, run_id: str) -> dict[str, Any]:
        """The flow run as it is now."""
        found: dict[str, Any] = self(f"flow_runs/{run_id}", "GET")
        return found

    def end_of(self, run_id: str) -> dict[str, Any]:
        """The flow run, once it has ended."""

        def finished() -> Any:
            found = self.run(run_id)
            return found if found["state_type"] in ENDS else None

        found: dict[str, Any] = self.wait_for(finished)
        return found

    def ended(self, name: str, **parameters: Any) -> dict[str, Any]:
        """A new flow run of deployment `name`, once it has ended."""
        return self.end_of(self.begun(name, **parameters))

    def paused(self, config: Path, *settings: str) -> str:
        """The id of a run that waits for a person."""
        overrides = {"approve_above_usd": 1e-6, "settings": settings}
        run_id = self.begun("reindex/ad-hoc", config=str(config), overrides=overrides)
        self.wait_for(lambda: self(f"flow_runs/{run_id}/input/filter", prefix="paused"))
        return run_id

    def answered(self, run_id: str, **answer: Any) -> Any:
        """What is said to a person's answer."""
        return self(f"flow_runs/{run_id}/resume", run_input=answer)

    def artifact(self, key: str) -> str:
        """The newest artifact under `key`."""
        return str(self(f"artifacts/{key}/latest", "GET")["data"])

    @staticmethod
    def fill(page: Any, number: int, text: str) -> None:
        """Fill a text field of a form, again where the page has drawn it anew meanwhile."""
        page.get_by_text("Further settings").first.wait_for()  # the last of the form
        field = page.locator("textarea").nth(number)
        for _ in range(10):
            field.fill(text)
            page.wait_for_timeout(1000)
            if field.input_value() == text:
                return
        raise AssertionError(page.inner_text("body"))

    @staticmethod
    def submit(page: Any) -> None:
        """Send the form of a run; once more where SQLite was locked, and the page says "Oops"."""
        for _ in range(5):
            page.get_by_role("button", name="Submit").click()
            with contextlib.suppress(Exception):
                page.wait_for_url(lambda url: not url.endswith("/run"), timeout=120_000)
                return
        raise AssertionError(page.inner_text("body"))

    @staticmethod
    def wait_for(condition: Callable[[], Any]) -> Any:
        """What `condition` returns once it holds."""
        return until(condition, PATIENCE_S, every=0.5)


def answers(url: str) -> bool:
    try:
        with urllib.request.urlopen(url, timeout=5):  # noqa: S310
            return True
    except OSError:
        return False


@pytest.fixture(scope="module")
def database() -> dict[str, str]:
    """What tells a server its database; nothing: SQLite in its home."""
    return {}


@pytest.fixture(scope="module")
def environment(
    tmp_path_factory: pytest.TempPathFactory, database: dict[str, str]
) -> Iterator[dict[str, str]]:
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
            env={**env, **database}, stdout=log, stderr=log,
        )  # fmt: skip
    try:
        Served.wait_for(lambda: answers(f"{env['PREFECT_API_URL']}/health"))
        yield env
    finally:
        end(server)


@pytest.fixture(scope="module")
def served(environment: dict[str, str], project: Path) -> Iterator[Served]:
    """The server, once the deployments are there and a worker runs elsewhere."""
    started = Served(environment, project)
    started.prefect("work-pool", "create", "--type", "process", started.pool)
    started.prefect("--no-prompt", "deploy", "--all")
    worker = started.worker(started.pool)
    try:
        yield started
    finally:
        end(worker)


def end(process: "subprocess.Popen[bytes]") -> None:
    """End it, by force where it takes long or, as a background job, ignores Ctrl-C."""
    process.terminate()
    try:
        process.wait(timeout=30)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()


class Birds:
    """A table of texts, and a provider that answers each of them after a second.

    Attributes:
        texts: How many there are.
    """

    texts = 120

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
        self.write(self.texts)

    def write(self, texts: int) -> None:
        """The corpus."""
        rows = [{"id": str(number), "text": f"bird number {number}"} for number in range(texts)]
        (self.config.parent / "birds.jsonl").write_text("\n".join(map(json.dumps, rows)))

    def totals(self, name: str) -> int:
        return int(self.simulator.ledger.totals()[name])

    @property
    def arrived(self) -> int:
        """Calls that arrived, answered or not."""
        return self.simulator.ledger.arrivals

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


@pytest.fixture(scope="module")
def chromium() -> Iterator[Any]:
    """A browser without a window."""
    playwright = pytest.importorskip("playwright.sync_api", reason="needs the group `browser`")
    if not CHROMIUM.exists():
        pytest.skip(f"needs Chromium at {CHROMIUM}, or its path in CHROMIUM")
    with playwright.sync_playwright() as started:
        browser = started.chromium.launch(
            executable_path=str(CHROMIUM),
            args=["--no-sandbox", "--disable-gpu", "--disable-quic", "--disable-sync", *QUIET],
        )
        yield browser
        browser.close()


@pytest.fixture
def page(chromium: Any, request: pytest.FixtureRequest) -> Iterator[Any]:
    """A fresh page; what it shows at the end is kept in two pictures where SCREENSHOTS names."""
    opened = chromium.new_page(viewport={"width": 1400, "height": 1400})
    opened.set_default_timeout(120_000)
    yield opened
    if folder := os.environ.get("SCREENSHOTS"):
        name = re.sub(r"\W+", "-", request.node.name).strip("-")
        for scheme in ("light", "dark"):
            opened.emulate_media(color_scheme=scheme)
            opened.screenshot(path=Path(folder) / f"{name}-{scheme}.png", full_page=True)
    opened.close()


@pytest.fixture(scope="session")
def served_class() -> type[Served]:
    """For a server that was started in another way."""
    return Served
