"""A temporary Prefect server, for a command where none is named in PREFECT_API_URL.

Prefect would start one of its own. That one gets the Ctrl-C of our terminal, so that a run
could not tell it how it ended, and stays behind after a `kill -9`. This one has a session of
its own and ends with the process that started it, however that ends: it reads from a pipe
whose other end nobody else holds.
"""

import atexit
import contextlib
import os
import socket
import subprocess
import sys
import threading
import urllib.request

from tasks.errors import EmbedOnceError

START_S = 120.0
"""So long it may take to start, on a slow machine."""
STOP_S = 5.0
"""So long it may take to end."""


def have_server() -> None:
    """See that Prefect has a server in this process: the one it is told of, or a temporary one.

    Raises:
        EmbedOnceError: The temporary one does not start.
    """
    from prefect.context import refresh_global_settings_context  # noqa: PLC0415
    from prefect.settings import get_current_settings  # noqa: PLC0415

    settings = get_current_settings()
    if settings.api.url or not settings.server.ephemeral.enabled:
        return
    process = subprocess.Popen(
        [sys.executable, "-m", "flows.temporary_server"],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        start_new_session=True,
        env={**os.environ, "PREFECT_UI_ENABLED": "0"},
    )
    atexit.register(_stop, process)
    url = _address(process)
    try:
        urllib.request.urlopen(f"{url}/health", timeout=START_S).close()  # noqa: S310
    except OSError as error:
        raise EmbedOnceError(
            f"The temporary Prefect server did not start ({error}). Name one that runs in "
            "PREFECT_API_URL, or see the log under logs/ in state.uri."
        ) from None
    os.environ["PREFECT_API_URL"] = url
    refresh_global_settings_context()


def _address(process: "subprocess.Popen[bytes]") -> str:
    stdout = process.stdout
    port = stdout.readline().strip().decode() if stdout is not None else ""
    return f"http://127.0.0.1:{port}/api"


def _stop(process: "subprocess.Popen[bytes]") -> None:
    process.terminate()
    try:
        process.communicate(timeout=STOP_S)
    except subprocess.TimeoutExpired:
        process.kill()
        process.communicate()


def main() -> None:
    """Serve until the pipe at stdin ends."""
    listening = socket.create_server(("127.0.0.1", 0))
    print(listening.getsockname()[1], flush=True)  # noqa: T201
    # What comes before uvicorn has started waits in the socket's queue.
    import uvicorn  # noqa: PLC0415
    from prefect.server.api.server import create_app  # noqa: PLC0415

    app = create_app(ephemeral=True, final=True)
    server = uvicorn.Server(uvicorn.Config(app, log_level="error", lifespan="on"))

    def watch() -> None:
        sys.stdin.buffer.read()
        server.should_exit = True
        threading.Event().wait(STOP_S)
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()
    with contextlib.suppress(KeyboardInterrupt):
        server.run(sockets=[listening])


if __name__ == "__main__":
    main()
