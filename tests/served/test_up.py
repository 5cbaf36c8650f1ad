"""`embed-once up`: server, deployments and worker come, serve a newcomer, and go together."""

import os
import re
import signal
import socket
import sqlite3
import subprocess
import threading
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager
from pathlib import Path
from typing import Any

import pytest

from tasks.history import history
from tasks.params import load_config

pytestmark = [pytest.mark.slow, pytest.mark.timeout(600)]


class Up:
    """The command as a process, with a home of its own.

    Attributes:
        process: The command.
        home: Of Prefect: database and logs.
        said: Its lines so far.
    """

    def __init__(self, python: list[str], folder: Path, home: Path, *arguments: str) -> None:
        kept = {key: value for key, value in os.environ.items() if key != "PREFECT_API_URL"}
        self.home, self.said = home, list[str]()
        self.environment = {**kept, "PREFECT_HOME": str(home), "VOYAGE_API_KEY": "pa-any"}
        self.process = subprocess.Popen(
            [*python, "-m", "flows.cli", "up", *arguments],
            cwd=folder, env=self.environment, text=True,
            stdout=subprocess.PIPE, stderr=subprocess.STDOUT, start_new_session=True,
        )  # fmt: skip
        self._reading = threading.Thread(target=self._read, daemon=True)
        self._reading.start()

    def _read(self) -> None:
        assert self.process.stdout is not None
        with self.process.stdout as lines:
            self.said.extend(lines)

    @property
    def log(self) -> bool:
        """Whether it has told all it tells at the start."""
        assert self.process.poll() is None, self.said
        return any(line.startswith("Log: ") for line in self.said)

    def end(self, by: signal.Signals = signal.SIGINT) -> int:
        """Ctrl-C, or another signal, and the exit code."""
        self.process.send_signal(by)
        return self.ended()

    def ended(self, within_s: float = 300) -> int:
        """The exit code, once it has ended."""
        code = self.process.wait(within_s)
        self._reading.join(10)
        return code

    def processes(self) -> list[str]:
        """The command lines of all processes of this home."""
        found = []
        for folder in Path("/proc").glob("[0-9]*"):
            try:
                if f"PREFECT_HOME={self.home}\0".encode() in (folder / "environ").read_bytes():
                    found.append((folder / "cmdline").read_text().replace("\0", " "))
            except OSError:
                continue  # it has just ended
        return [command for command in found if command]

    def states(self) -> list[str]:
        """The names of the states of all flow runs that were started, with no server running."""
        with closing(sqlite3.connect(self.home / "prefect.db")) as database:
            query = "select state_name from flow_run where start_time is not null"
            return [name for (name,) in database.execute(query)]


def a_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as free:
        return int(free.getsockname()[1])


@contextmanager
def served_by(up: Up, port: int, project: Path, served_class: Any) -> Iterator[Any]:
    """The server of `up`, once it is ready."""
    api = {"PREFECT_API_URL": f"http://127.0.0.1:{port}/api"}
    try:
        served_class.wait_for(lambda: up.log)
        yield served_class({**up.environment, **api}, project)
    finally:
        if up.process.poll() is None:
            up.end()


@pytest.fixture(scope="module")
def start(python: list[str], project: Path, tmp_path_factory: pytest.TempPathFactory) -> Any:
    """Starts the command in a folder of the project, with a fresh home if none is named."""

    def start(*arguments: str, home: Path | None = None, folder: Path | None = None) -> Up:
        home = home or tmp_path_factory.mktemp("home")
        return Up(python, folder or project / "configs", home, *arguments)

    return start


@pytest.fixture(scope="module")
def up(start: Callable[..., Up], project: Path, served_class: Any) -> Iterator[Any]:
    """The server of one command that all tests of this module look at."""
    port = a_port()
    running = start("--port", str(port))
    with served_by(running, port, project, served_class) as served:
        served.up = running
        yield served
        assert running.end(signal.SIGTERM) == 0
    assert running.processes() == []
    assert running.said[-2:] == [
        "Ending. Runs are cancelled and keep what was paid for.\n",
        "Ended.\n",
    ]


def test_it_tells_where_to_look_and_what_to_do(up: Any) -> None:
    assert [line.split()[0] for line in up.up.said[1:4]] == ["server", "deployments", "worker"]
    told = "".join(up.up.said)
    assert f"Prefect's UI: {up.url}\n" in told
    assert f"open {up.url}/deployments, choose ad-hoc of reindex" in told
    log = re.search(r"^Log: (.+)$", told, re.MULTILINE)
    assert log
    assert "smoke/ci" in Path(log[1]).read_text(encoding="utf-8")


def test_a_newcomer_starts_a_run_in_the_browser_and_reads_its_report(up: Any, page: Any) -> None:
    page.goto(f"{up.url}/deployments")
    page.get_by_role("link", name="ad-hoc").first.click()
    page.get_by_role("button", name="Run", exact=True).first.click()
    page.get_by_text("Custom run").first.click()
    for told in ("Path of the YAML file that describes", "Look only at this file or folder"):
        page.get_by_text(told).first.wait_for()
    up.fill(page, 1, "README.md")
    up.submit(page)

    def started() -> Any:
        runs = up("flow_runs/filter")
        return [each for each in runs if "README.md" in str(each["parameters"].get("overrides"))]

    (newest,) = up.wait_for(started)
    ended = up.end_of(newest["id"])
    assert ended["state_name"] == "Completed", ended["state"]
    page.goto(f"{up.url}/runs/flow-run/{newest['id']}")
    page.get_by_text("Completed").first.wait_for()
    page.goto(f"{up.url}/artifacts/key/report-demo")
    page.get_by_role("link", name=re.compile(r"^[0-9a-f]{8}$")).first.click()  # the newest
    page.get_by_text("demo: generation 1 published").first.wait_for()


def test_a_second_one_uses_the_server_that_is_there_and_leaves_it(
    up: Any, start: Callable[..., Up]
) -> None:
    second = start("--port", str(port_of(up)), home=up.up.home)
    up.wait_for(lambda: second.log)
    assert second.said[1].startswith(f"server       one answers at {up.url}/api already")
    assert second.end() == 0
    assert up("health", "GET") is True
    assert up.up.process.poll() is None


def port_of(up: Any) -> int:
    return int(up.url.rpartition(":")[2])


@pytest.mark.parametrize("way", ["ctrl-c", "killed"])
def test_runs_are_cancelled_and_nothing_stays_behind(
    start: Callable[..., Up], project: Path, served_class: Any, birds: Any, way: str
) -> None:
    port = a_port()
    running = start("--port", str(port))
    with served_by(running, port, project, served_class) as served:
        served.paused(birds.config)
        second = birds.config.with_name("others.yaml")
        text = birds.config.read_text(encoding="utf-8")
        second.write_text(text.replace("table: birds}", "table: others}"), encoding="utf-8")
        served.begun("reindex/ad-hoc", config=str(second))
        served.wait_for(lambda: birds.totals("ok") >= 6)
        if way == "killed":
            running.process.kill()
            assert running.ended() == -signal.SIGKILL
        else:
            assert running.end() == 0
            assert running.processes() == []
        served.wait_for(lambda: not running.processes())
    assert running.states() == ["Cancelled", "Cancelled"]
    (told,) = history(load_config(second)).to_dict("records")
    assert (told["state"], told["texts.embedded"]) == ("cancelled", birds.totals("ok"))
    assert birds.arrived < birds.texts
    with socket.create_server(("127.0.0.1", port)):
        pass


def test_when_a_part_of_it_dies_the_rest_ends_and_it_says_so(
    start: Callable[..., Up], project: Path, served_class: Any
) -> None:
    port = a_port()
    running = start("--port", str(port))
    with served_by(running, port, project, served_class):
        (server,) = [
            int(folder.name)
            for folder in Path("/proc").glob("[0-9]*")
            if serves(folder, str(running.home))
        ]
        os.kill(server, signal.SIGKILL)
        assert running.ended() == 1
    assert "The Prefect server has ended by itself (exit -9). Log: " in running.said[-1]
    served_class.wait_for(lambda: not running.processes())


def serves(folder: Path, home: str) -> bool:
    try:
        ours = f"PREFECT_HOME={home}\0".encode() in (folder / "environ").read_bytes()
        return ours and b"flows.prefect_server" in (folder / "cmdline").read_bytes()
    except OSError:
        return False


def test_a_port_that_is_taken_is_told(start: Callable[..., Up]) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        running = start("--port", str(port))
        assert running.ended() == 2
    assert running.said[-1] == (
        f"embed-once: Port {port} of 127.0.0.1 cannot be used (Address already in use), and no "
        "Prefect server answers there. Name another one with --port.\n"
    )
    assert running.processes() == []


def test_it_needs_a_project(start: Callable[..., Up], tmp_path: Path) -> None:
    running = start(folder=tmp_path)
    assert running.ended() == 2
    told = f"Neither {tmp_path} nor a folder above it holds a prefect.yaml. Start this in the"
    assert running.said == [f"embed-once: {told} folder of your project.\n"]


def test_deployments_that_cannot_be_made_are_told(start: Callable[..., Up], tmp_path: Path) -> None:
    (tmp_path / "prefect.yaml").write_text("deployments: [{name: broken}]", encoding="utf-8")
    running = start("--port", str(a_port()), folder=tmp_path)
    assert running.ended() == 1
    assert "could not be made. Log: " in running.said[-1]
    assert running.processes() == []
