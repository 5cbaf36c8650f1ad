"""Up: a Prefect server, the deployments of `prefect.yaml` and a worker, until Ctrl-C."""

import contextlib
import os
import socket
import subprocess
import sys
import time
from contextlib import ExitStack
from pathlib import Path
from typing import IO
from urllib.parse import urlsplit

from flows import tethered
from flows.prefect_server import (
    HOST,
    STOP_S,
    address,
    answers,
    comes_up,
    start_server,
    use_server,
)
from flows.terminal import new_log
from tasks.errors import EmbedOnceError, SettingsError
from tasks.params import PROJECT, nearest_project

LOCAL = {HOST, "localhost", "0.0.0.0"}  # noqa: S104 - as people write it; we serve at HOST
PROBE_S = 5.0
"""So long a server that is there already may take to answer."""
READY_S = 180.0
"""So long the worker may take until it says that it is there, on a slow machine."""
LOOK_S = 0.5
COMFORT = {
    "PREFECT_SERVER_ANALYTICS_ENABLED": "false",
    "PREFECT_SERVER_UI_SHOW_PROMOTIONAL_CONTENT": "false",
    "PREFECT_WORKER_QUERY_SECONDS": "2",  # a person who has started a run waits for it
}
"""Settings of Prefect, where the environment says nothing else."""


def project() -> Path:
    """The nearest parent of the working directory that holds a `prefect.yaml`.

    Raises:
        SettingsError: There is none.
    """
    folder = nearest_project(Path.cwd())
    if folder is None:
        raise SettingsError(
            f"Neither {Path.cwd()} nor a folder above it holds a {PROJECT}. Start this in the "
            "folder of your project."
        )
    return folder


def up(folder: Path, port: int | None) -> None:
    """Serve until Ctrl-C, SIGTERM or SIGHUP; then runs are cancelled, and nothing stays behind.

    Args:
        folder: It holds `prefect.yaml`.
        port: Of a server on this machine; None: the one that Prefect's settings name, else 4200.

    Raises:
        SettingsError: The port is not free, or the server that is named does not answer.
        EmbedOnceError: Server, deployments or worker failed; the message names their log.
    """
    _say("Starting. It takes about half a minute.")
    for name, value in COMFORT.items():
        os.environ.setdefault(name, value)
    from prefect.settings import get_current_settings  # noqa: PLC0415

    settings = get_current_settings()
    url = address(port) if port else settings.api.url or address(settings.server.api.port)
    log = new_log(settings.home / "logs", "up")
    with ExitStack() as stack, log.open("ab") as output:
        service = _Service(log, output, stack)
        try:
            service.serve(url)
            service.work(folder)
            _say(_welcome(url.removesuffix("/api"), log))
            service.watch()
        except KeyboardInterrupt:
            _say("Ending. Runs are cancelled and keep what was paid for.")
    _say("Ended.")


def _welcome(base: str, log: Path) -> str:
    return f"""
Prefect's UI: {base}
To index something, open {base}/deployments, choose ad-hoc of reindex, then Run > Custom run.
Ctrl-C ends all of it: runs are cancelled and keep what was paid for, the history stays.
Log: {log}"""


class _Service:
    """The processes, each with a name for people; they end with `stack`, the worker first."""

    def __init__(self, log: Path, output: IO[bytes], stack: ExitStack) -> None:
        self._log = log
        self._output = output
        self._stack = stack
        self._processes = dict[str, subprocess.Popen[bytes]]()

    def serve(self, url: str) -> None:
        """See that a server answers at `url`: the one that is there, or one of our own."""
        parts = urlsplit(url)
        use_server(url)
        if answers(url, PROBE_S):
            _say(f"server       one answers at {url} already; it is used, and goes on afterwards")
        elif parts.hostname not in LOCAL:
            raise SettingsError(
                f"PREFECT_API_URL names {url}, where no Prefect server answers. Start that one, "
                "or unset it for a server on this machine."
            )
        else:
            process = start_server(_free(parts.port or 80), "lasting", self._output)
            self._keep("Prefect server", process, STOP_S + LOOK_S)
            if not comes_up(process, url):
                raise self._failed("The Prefect server did not start.")
            _say("server       ready")

    def work(self, folder: Path) -> None:
        """Make the work pool, the deployments, and a worker that is ready."""
        from prefect.client.orchestration import get_client  # noqa: PLC0415

        from flows.prefect_worker import POOL, make_pool  # noqa: PLC0415
        from flows.prefect_worker import STOP_S as END_S  # noqa: PLC0415

        name = f"embed-once up {os.getpid()}"
        with get_client(sync_client=True) as client:
            make_pool(client)
            # The worker holds the tether of the server too, which so outlives it.
            held = [process.stdin.fileno() for process in self._processes.values() if process.stdin]
            worker = tethered.start("flows.prefect_worker", name, passed=held, output=self._output)
            self._keep("worker", worker, END_S + LOOK_S)
            self._deploy(folder)
            _say(f"deployments  those of {folder / PROJECT}")
            deadline = time.monotonic() + READY_S
            while all(each.name != name for each in client.read_workers_for_work_pool(POOL)):
                self._require_alive()
                if time.monotonic() > deadline:
                    raise self._failed("The worker did not start.")
                time.sleep(LOOK_S)
        _say("worker       ready")

    def watch(self) -> None:
        """Wait until one of the processes ends, which none should."""
        while True:
            self._require_alive()
            time.sleep(LOOK_S)

    def _keep(self, name: str, process: "subprocess.Popen[bytes]", within_s: float) -> None:
        self._processes[name] = process
        self._stack.callback(tethered.release, process, within_s)

    def _deploy(self, folder: Path) -> None:
        done = subprocess.run(
            [sys.executable, "-m", "prefect", "--no-prompt", "deploy", "--all"],
            cwd=folder,
            stdin=subprocess.DEVNULL,
            stdout=self._output,
            stderr=self._output,
            start_new_session=True,
            check=False,
        )
        if done.returncode:
            raise self._failed(f"The deployments of {folder / PROJECT} could not be made.")

    def _require_alive(self) -> None:
        for name, process in self._processes.items():
            if process.poll() is not None:
                raise self._failed(f"The {name} has ended by itself (exit {process.returncode}).")

    def _failed(self, what: str) -> EmbedOnceError:
        return EmbedOnceError(f"{what} Log: {self._log}")


def _free(port: int) -> socket.socket:
    """A socket that listens at that port of this machine."""
    try:
        return socket.create_server((HOST, port))
    except OSError as error:
        why = os.strerror(error.errno or 0)  # Python adds the address to its own words
        raise SettingsError(
            f"Port {port} of {HOST} cannot be used ({why}), and no Prefect server answers there. "
            "Name another one with --port."
        ) from None


def _say(text: str) -> None:
    with contextlib.suppress(OSError):  # the terminal may be gone
        print(text, flush=True)  # noqa: T201
