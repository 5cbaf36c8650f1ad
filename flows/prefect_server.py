"""A Prefect server of our own: a temporary one for a command, or a lasting one for `up`.

Prefect would start a temporary one where none is named in PREFECT_API_URL. That one gets the
Ctrl-C of our terminal, so that a run could not tell it how it ended, and stays behind after a
`kill -9`. This one is on a tether.
"""

import atexit
import concurrent.futures
import contextlib
import gc
import importlib
import os
import socket
import subprocess
import sys
import time
import urllib.request
from typing import IO, Any, NoReturn

from flows import tethered
from flows.terminal import unheard
from tasks.errors import EmbedOnceError
from tasks.quick import nothing_collected

HOST = "127.0.0.1"
START_S = 120.0
"""So long it may take to start, on a slow machine."""
STOP_S = 5.0
"""So long it may take to end."""
LOOK_S = 0.2
TELL_S = 10.0
"""So long a server may take in events of a run that has ended before it is asked if it is there."""
IN_GROUPS = {
    "PREFECT_SERVER_SERVICES_TASK_RUN_RECORDER_BATCH_SIZE": "50",
    "PREFECT_SERVER_SERVICES_TASK_RUN_RECORDER_FLUSH_INTERVAL": "1",
}
"""Settings by which the states of tasks enter the database together, at most a second later.

By Prefect's own each has a commit of its own: for 87 tasks its server took 8 s of processor, and
3.5 s with these.
"""


def have_server(runs: str) -> None:
    """See that Prefect has a server in this process: the one it is told of, or a temporary one.

    Args:
        runs: A module to import: what runs on it. A temporary one takes seconds to start meanwhile.

    Raises:
        EmbedOnceError: The temporary one does not start.
    """
    with nothing_collected():
        from prefect.settings import (  # noqa: PLC0415
            PREFECT_FLOWS_HEARTBEAT_FREQUENCY,
            get_current_settings,
            temporary_settings,
        )

        settings = get_current_settings()
    if settings.api.url or not settings.server.ephemeral.enabled:
        _import(runs)
        return
    listening = socket.create_server((HOST, 0))
    url = address(listening.getsockname()[1])
    process = start_server(listening, "temporary")
    atexit.register(tethered.release, process, STOP_S)
    _import(runs)
    if not comes_up(process, url):
        raise EmbedOnceError(
            "The temporary Prefect server did not start. Name one that runs in "
            "PREFECT_API_URL, or see the log under logs/ in state.uri."
        )
    use_server(url)
    # Nobody looks for them there, and at its end a run waits up to a second for their thread.
    without_heartbeats = contextlib.ExitStack()
    without_heartbeats.enter_context(temporary_settings({PREFECT_FLOWS_HEARTBEAT_FREQUENCY: None}))
    atexit.register(without_heartbeats.close)


def _import(module: str) -> None:
    with nothing_collected():
        importlib.import_module(module)


def leave(code: int) -> NoReturn:
    """Exit with `code` once the server has taken in all events of this process, or is gone.

    Prefect waits for that too when Python exits, but tries for seconds to send each event, three
    a task, to a server that is gone: hours for a large run.
    """
    if "prefect.events.worker" in sys.modules:
        with unheard():  # its threads tell of each event that is not taken
            try:
                told = _all_told()
            except KeyboardInterrupt:
                told = False
            if not told:
                os._exit(code)
    gc.freeze()  # else Python looks for garbage among all there is before it ends: 1 s
    sys.exit(code)


def _all_told() -> bool:
    """Wait until the server has taken in all events; False where it is gone."""
    from prefect.client.orchestration import get_client  # noqa: PLC0415
    from prefect.events.worker import EventsWorker  # noqa: PLC0415

    waited: Any = EventsWorker.drain_all(timeout=TELL_S)
    while waited[1]:
        with get_client(sync_client=True) as client:
            if client.api_healthcheck() is not None:
                return False
        waited = concurrent.futures.wait(waited[1], timeout=TELL_S)
    return True


def address(port: int) -> str:
    """The address of the API of a server of our own."""
    return f"http://{HOST}:{port}/api"


def use_server(url: str) -> None:
    """Have Prefect in this process, and in those it starts, use the server at `url`."""
    from prefect.context import refresh_global_settings_context  # noqa: PLC0415

    os.environ["PREFECT_API_URL"] = url
    refresh_global_settings_context()


def start_server(
    listening: socket.socket, kind: str, output: IO[bytes] | None = None
) -> "subprocess.Popen[bytes]":
    """Start a server that serves at a socket of ours, which is closed here.

    Args:
        listening: A socket that listens.
        kind: `temporary`, or `lasting`: with schedules and UI.
        output: Where stdout and stderr of it go; None: where ours go.
    """
    with listening:
        number = listening.fileno()
        return tethered.start(
            "flows.prefect_server", str(number), kind, passed=[number], output=output
        )


def comes_up(process: "subprocess.Popen[bytes]", url: str) -> bool:
    """Wait until the server answers at `url`; False where it ends or takes too long."""
    deadline = time.monotonic() + START_S
    while process.poll() is None and time.monotonic() < deadline:
        if answers(url, within_s=START_S):
            return True
        time.sleep(LOOK_S)
    return False


def answers(url: str, within_s: float) -> bool:
    """Whether a Prefect server answers at `url`."""
    try:
        with urllib.request.urlopen(f"{url}/health", timeout=within_s) as answer:  # noqa: S310
            return bool(answer.read() == b"true")
    except (OSError, ValueError):
        return False


def main() -> None:
    """Serve at the socket of the first argument until released."""
    listening, temporary = socket.socket(fileno=int(sys.argv[1])), sys.argv[2] == "temporary"
    if temporary:
        os.environ["PREFECT_UI_ENABLED"] = "0"
    for name, value in IN_GROUPS.items():
        os.environ.setdefault(name, value)
    # What comes before uvicorn has started waits in the socket's queue.
    import uvicorn  # noqa: PLC0415
    from prefect.server.api.server import create_app  # noqa: PLC0415

    app = create_app(ephemeral=temporary, final=True)
    server = uvicorn.Server(uvicorn.Config(app, log_level="error", lifespan="on"))

    def end() -> None:
        server.should_exit = True

    tethered.on_release(end, within_s=STOP_S)
    with contextlib.suppress(KeyboardInterrupt):
        server.run(sockets=[listening])


if __name__ == "__main__":
    main()
