"""Cancelling: nothing more is sent, what is paid for is kept, and no process stays behind."""

import json
import os
import pty
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Hashable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, cast

import pytest

from flows.cancelling import Whole
from flows.embedding import _Collected, _send
from flows.reindex import run
from tasks.errors import RunStopped
from tasks.history import history
from tasks.index import generations, open_index
from tasks.journal import RunFolder
from tasks.limits import Limits
from tasks.notes import Call
from tasks.params import load_config
from tasks.progress import listening
from tasks.providers.lexical import Lexical
from tasks.providers.voyage import Voyage
from tasks.sender import Sender, Terms, forget_sender, sender_of
from tasks.simulator import Latency, Rule, Settings, Simulator
from tests.waiting import until

KEY = "pa-any"
TEXTS = 120
CONFIG = """\
name: birds
source: {{kind: table, path: birds.jsonl}}
embedding: {{provider: voyage, model: voyage-4, dimension: 256, base_url: {base_url}}}
limits: {{texts_per_request: 1}}
index: {{uri: ./index, table: birds}}
state: {{uri: ./state}}
"""


class Home:
    """A table of texts, its config, the simulator, and the command as a process."""

    def __init__(
        self,
        folder: Path,
        simulator: Simulator,
        environment: dict[str, str],
        python: list[str],
    ) -> None:
        self.folder = folder
        self.python = python
        self.simulator = simulator
        self.environment = {**environment, "VOYAGE_API_KEY": KEY}
        self.config = folder / "birds.yaml"
        self.config.write_text(CONFIG.format(base_url=simulator.base_url), encoding="utf-8")
        self.write(TEXTS)

    def write(self, count: int) -> None:
        rows = [{"id": str(number), "text": f"bird number {number}"} for number in range(count)]
        (self.folder / "birds.jsonl").write_text("\n".join(map(json.dumps, rows)))

    def start(self, *settings: str, **options: Any) -> "subprocess.Popen[str]":
        sets = [part for setting in settings for part in ("--set", setting)]
        return subprocess.Popen(
            [*self.python, "-m", "flows.cli", "reindex", str(self.config), *sets],
            env=self.environment,
            stdout=subprocess.DEVNULL,
            text=True,
            **{"stderr": subprocess.PIPE, **options},
        )

    def runs(self) -> list[dict[Hashable, Any]]:
        """The runs by the ledger, oldest first."""
        return history(load_config(self.config)).to_dict("records")

    def noted(self) -> list[Call]:
        """What the living run has written down of its calls."""
        state = self.folder / "state"
        runs = [RunFolder(str(state), run.name) for run in state.glob("runs/*/")]
        return [call for run in runs for call in run.calls()]

    @property
    def calls(self) -> int:
        """Calls that arrived, answered or not."""
        return self.simulator.ledger.arrivals

    @property
    def ok(self) -> int:
        return int(self.simulator.ledger.totals()["ok"])

    @property
    def billed_again(self) -> int:
        return int(self.simulator.ledger.totals()["texts_billed_again"])

    def goes_on(self) -> dict[Hashable, Any]:
        """The next run, to its end."""
        self.simulator.change(latency=Latency())
        done = self.start()
        said = done.communicate(timeout=200)[1]
        assert done.returncode == 0, said
        return self.runs()[-1]


@contextmanager
def simulated(folder: Path, environment: dict[str, str], python: list[str]) -> Iterator[Home]:
    settings = Settings(keys=frozenset([KEY]), latency=Latency(base_s=1))
    with Simulator(settings) as simulator:
        yield Home(folder, simulator, environment, python)


@pytest.fixture
def home(tmp_path: Path, prefect_api: str, python: list[str]) -> Iterator[Home]:
    with simulated(tmp_path, {**os.environ, "PREFECT_API_URL": prefect_api}, python) as home:
        yield home


@pytest.fixture
def no_server(tmp_path: Path, python: list[str]) -> Iterator[Home]:
    """A home where no Prefect server is named."""
    (tmp_path / "prefect").mkdir()
    kept = {name: value for name, value in os.environ.items() if name != "PREFECT_API_URL"}
    environment = {**kept, "PREFECT_HOME": str(tmp_path / "prefect")}
    with simulated(tmp_path, environment, python) as home:
        yield home


@pytest.mark.usefixtures("heeded")
def test_work_that_must_be_whole_ends_before_a_cancel_takes_effect() -> None:
    whole, steps = Whole(), list[str]()

    def work() -> str:
        steps.append("begun")
        time.sleep(0.2)
        os.kill(os.getpid(), signal.SIGINT)
        time.sleep(0.2)
        os.kill(os.getpid(), signal.SIGINT)
        time.sleep(0.2)
        steps.append("ended")
        return "published"

    assert whole.run(work) == "published"
    assert steps == ["begun", "ended"]
    with pytest.raises(KeyboardInterrupt):
        whole.end()


def test_a_call_in_flight_can_be_given_up(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("VOYAGE_API_KEY", KEY)
    ended = list[str]()
    with Simulator(Settings(), [Rule(action="hang", seconds=30)]) as simulator:
        limits = Limits(None, None, texts_per_request=10, tokens_per_request=None, concurrency=1)
        provider = Voyage("voyage-4", 256, limits, base_url=simulator.base_url)

        def call() -> None:
            try:
                provider.embed(["a bird"])
            except Exception as error:  # noqa: BLE001 - its name is looked at
                ended.append(type(error).__name__)

        thread = threading.Thread(target=call)
        thread.start()
        until(lambda: simulator.ledger.arrivals, 20)
        provider.give_up()
        thread.join(5)
        assert ended == ["ProviderBusy"]


def test_a_stopped_sender_lets_no_retry_delay_run_out(tmp_path: Path, lexical: Lexical) -> None:
    sender = Sender(Terms(lexical, RunFolder(str(tmp_path), "run"), 0.0))
    started = time.monotonic()
    threading.Timer(0.2, sender.stop, [RunStopped("enough")]).start()
    sender.pause_before(attempt=8)
    assert 0.2 <= time.monotonic() - started < 5


def test_what_is_read_while_a_cancel_comes_is_not_sent(tmp_path: Path, lexical: Lexical) -> None:
    terms = Terms(lexical, RunFolder(str(tmp_path), "run"), 0.0)
    sender, read = sender_of(terms), list[int]()

    def batches() -> Iterator[Any]:
        for number in range(100):
            sender.stop(RunStopped("enough"))
            read.append(number)
            yield number

    collected = _Collected(terms.folder, cast("Any", None), sender)
    _send(batches(), terms, collected)
    assert (read, collected.flying) == ([0], [])
    forget_sender(terms.folder)


def test_a_sender_rests_when_no_batch_is_at_work(tmp_path: Path, lexical: Lexical) -> None:
    sender = Sender(Terms(lexical, RunFolder(str(tmp_path), "run"), 0.0))
    assert sender.rest(within_s=0)
    with sender.at_work():
        assert not sender.rest(within_s=0.05)
    assert sender.rest(within_s=0)


def test_a_command_that_is_terminated_says_so_in_a_line(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "slow.yaml")
    planning = subprocess.Popen(
        [sys.executable, "-m", "flows.cli", "plan", str(tmp_path / "slow.yaml")],
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
    )  # fmt: skip
    with (tmp_path / "slow.yaml").open("w"):  # opens when the other side reads
        planning.send_signal(signal.SIGTERM)
        out, said = planning.communicate(timeout=120)
    assert (planning.returncode, out) == (130, "")
    assert said == "embed-once: cancelled; what was paid for is kept, run again.\n"


def main_waits_in() -> str:
    """Where the main thread is."""
    ident = threading.main_thread().ident
    assert ident is not None
    code = sys._current_frames()[ident].f_code  # noqa: SLF001 - Python has no other way
    return f"{Path(code.co_filename).name}:{code.co_name}"


def test_no_signal_can_hit_a_lock_that_the_run_waits_for(
    home: Home, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("VOYAGE_API_KEY", KEY)
    home.simulator.change(latency=Latency(base_s=0.05))
    home.write(12)
    seen = list[tuple[str, str]]()
    with listening(lambda progress: seen.append((progress.stage, main_waits_in()))):
        run(str(home.config))
    waits = {where for stage, where in seen if stage in ("embedding", "publishing")}
    assert [stage for stage, _ in seen].count("embedding") == 12
    assert waits == {"aside.py:wait"}


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_a_signal_cancels_and_the_next_run_pays_for_the_rest(
    home: Home, slowed: Callable[[Simulator], int], number: int
) -> None:
    process = home.start()
    until(lambda: home.ok >= 12)
    sent = slowed(home.simulator)
    process.send_signal(number)
    until(lambda: home.ok >= sent)
    answered = time.monotonic()
    said = process.communicate(timeout=120)[1]
    assert said == "embed-once: cancelled; what was paid for is kept, run again.\n"
    assert process.returncode == 130
    assert time.monotonic() - answered < 19  # as long as it would wait for one that does not come
    assert home.calls == sent
    (run,) = home.runs()
    assert (run["state"], run["texts.embedded"], run["published"]) == ("cancelled", sent, "none")
    assert run["tokens.billed"] == home.simulator.ledger.totals()["billed_tokens"]
    assert not list((home.folder / "state" / "runs").iterdir())
    again = home.goes_on()
    assert (again["state"], again["texts.embedded"]) == ("completed", TEXTS - sent)
    assert home.billed_again == 0


@pytest.mark.slow
def test_a_slow_answer_in_flight_is_waited_for(
    home: Home, slowed: Callable[[Simulator], int]
) -> None:
    home.simulator.add(Rule(action="slow", seconds=15, requests=frozenset({20})))
    process = home.start()
    until(lambda: home.calls >= 22)
    sent = slowed(home.simulator)
    process.send_signal(signal.SIGTERM)
    process.communicate(timeout=120)
    assert process.returncode == 130
    assert (home.calls, home.runs()[0]["texts.embedded"]) == (sent, sent)
    home.goes_on()
    assert home.billed_again == 0


@pytest.mark.slow
def test_an_answer_that_does_not_come_holds_nobody_longer_than_prefect_allows(home: Home) -> None:
    home.simulator.add(Rule(action="hang", seconds=100, requests=frozenset({20})))
    process = home.start()
    until(lambda: home.calls >= 24)
    process.send_signal(signal.SIGINT)
    signalled = time.monotonic()
    until(home.runs)
    assert 19 < time.monotonic() - signalled < 30  # then Prefect kills it
    process.communicate(timeout=120)
    assert process.returncode == 130
    (run,) = home.runs()
    assert (run["state"], run["texts.embedded"]) == ("cancelled", home.calls - 1)
    assert (run["calls.ok"], run["calls.failed"]) == (home.calls - 1, 1)
    assert home.goes_on()["texts.embedded"] == TEXTS - run["texts.embedded"]
    assert home.billed_again <= 1


def impatiently(process: "subprocess.Popen[str]") -> str:
    """What a process says that hears Ctrl-C a second time; a third and fourth if it must be.

    Signals that come while Python is busy are heard as one, so that two may be too few.
    """
    for _ in range(3):
        time.sleep(2)
        process.send_signal(signal.SIGINT)
        with suppress(subprocess.TimeoutExpired):
            return process.communicate(timeout=2)[1]
    return process.communicate(timeout=120)[1]


@pytest.mark.slow
def test_a_second_ctrl_c_ends_at_once_and_loses_nothing(home: Home) -> None:
    process = home.start()
    until(lambda: home.ok >= 3)
    home.simulator.change(latency=Latency(base_s=60))
    calls = home.calls
    until(lambda: home.calls >= calls + 2)
    pressed = time.monotonic()
    process.send_signal(signal.SIGINT)
    said = impatiently(process)
    assert said == "embed-once: ended at once; what was paid for is kept, run again.\n"
    assert process.returncode == 130
    assert time.monotonic() - pressed < 15  # the first one alone waits for 20 s
    ok, flown = len(home.noted()), home.calls
    again = home.goes_on()
    assert [run["state"] for run in home.runs()] == ["died", "completed"]
    assert (again["recovered_vectors"], again["texts.embedded"]) == (ok, TEXTS - ok)
    assert home.billed_again <= flown - ok


@pytest.mark.slow
def test_who_waits_for_a_limit_or_a_retry_ends_at_once(home: Home) -> None:
    process = home.start("limits.requests_per_minute=3", "limits.tier=free")
    until(lambda: home.ok >= 2)
    time.sleep(1)
    process.send_signal(signal.SIGINT)
    signalled = time.monotonic()
    process.communicate(timeout=120)
    assert (process.returncode, time.monotonic() - signalled < 15) == (130, True)

    home.simulator.add(Rule(status=503))
    process = home.start()
    until(
        lambda: any(call.attempt == 6 for call in home.noted())
    )  # the next one comes after 16 to 48 s
    process.send_signal(signal.SIGINT)
    signalled = time.monotonic()
    process.communicate(timeout=120)
    assert (process.returncode, time.monotonic() - signalled < 15) == (130, True)


@pytest.mark.slow
def test_what_is_being_published_is_published(home: Home) -> None:
    home.write(60_000)
    lexical = ("embedding={provider: lexical, dimension: 256}", "limits.texts_per_request=1000")
    process = home.start(*lexical, stderr=subprocess.PIPE)
    until((home.folder / "index" / "birds.committing").exists, 250)
    process.send_signal(signal.SIGINT)
    said = process.communicate(timeout=200)[1]
    assert process.returncode == 0, said
    table = open_index(load_config(home.config).index)
    assert table is not None
    assert (table.count_rows(), len(generations(table))) == (60_000, 1)
    assert [run["state"] for run in home.runs()] == ["completed"]
    assert not (home.folder / "index" / "birds.committing").exists()


@pytest.mark.slow
@pytest.mark.timeout(600)
@pytest.mark.parametrize("way", ["ctrl-c", "terminated", "killed", "terminal closes"])
def test_no_process_stays_behind(no_server: Home, way: str) -> None:
    ours, theirs = pty.openpty()
    terminal = {"stderr": theirs, "stdin": theirs, "start_new_session": True}
    process = no_server.start(**terminal)
    os.close(theirs)
    read = threading.Thread(target=drained, args=(ours,), daemon=True)
    read.start()
    until(lambda: no_server.ok >= 6, 200)
    server = servers_of(process.pid)
    assert len(server) == 1
    if way == "ctrl-c":
        os.killpg(process.pid, signal.SIGINT)  # as the terminal does: to all in its foreground
    elif way == "terminated":
        process.terminate()
    elif way == "killed":
        process.kill()
    else:
        os.killpg(process.pid, signal.SIGHUP)
        os.close(ours)
        time.sleep(0.3)
        process.send_signal(signal.SIGHUP)  # the shell sends it as well
    process.wait(120)
    until(lambda: not Path(f"/proc/{server[0]}").exists())
    if way != "killed":
        assert process.returncode == 130
        assert no_server.runs()[0]["state"] == "cancelled"


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_a_run_whose_prefect_server_is_gone_comes_to_its_end(no_server: Home) -> None:
    no_server.environment["PREFECT_CLIENT_MAX_RETRIES"] = "1"  # each takes a minute by default
    process = no_server.start()
    until(lambda: no_server.ok >= 6, 200)
    (server,) = servers_of(process.pid)
    os.kill(server, signal.SIGKILL)
    said = process.communicate(timeout=200)[1]
    assert process.returncode == 1
    assert said.startswith("embed-once: Prefect's server does not answer")
    assert len(said.splitlines()) == 1
    assert [run["state"] for run in no_server.runs()] == ["completed"]
    table = open_index(load_config(no_server.config).index)
    assert table is not None
    assert table.count_rows() == TEXTS
    assert no_server.goes_on()["texts.embedded"] == 0


def drained(terminal: int) -> None:
    try:
        while os.read(terminal, 1 << 16):
            pass
    except OSError:
        return  # its other end, or ours, is closed


def servers_of(pid: int) -> list[int]:
    """Processes that this one has started and that serve Prefect."""
    found = []
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            parent = int((folder / "stat").read_text().rpartition(")")[2].split()[1])
            command = (folder / "cmdline").read_bytes()
        except OSError:
            continue  # it has just ended
        if parent == pid and (b"prefect_server" in command or b"uvicorn" in command):
            found.append(int(folder.name))
    return found
