"""A process on a tether: it ends when who started it ends, also by a `kill -9`.

It has a session of its own, so that the Ctrl-C of our terminal does not reach it, and reads
from a pipe whose other end nobody but its starter holds.
"""

import contextlib
import os
import signal
import subprocess
import sys
import threading
from collections.abc import Callable, Sequence
from typing import IO


def start(
    module: str, *arguments: str, passed: Sequence[int], output: IO[bytes] | None = None
) -> "subprocess.Popen[bytes]":
    """Start `python -m module` on a tether.

    Args:
        module: It calls `on_release`.
        *arguments: Of its command line.
        passed: Descriptors of ours that it gets under the same numbers.
        output: Where stdout and stderr of it go; None: where ours go.
    """
    return subprocess.Popen(  # noqa: S603 - of our own
        [sys.executable, "-m", module, *arguments],
        stdin=subprocess.PIPE,
        stdout=output,
        stderr=output,
        start_new_session=True,
        pass_fds=passed,
    )


def release(process: "subprocess.Popen[bytes]", within_s: float) -> None:
    """End a process on a tether; by force where it takes longer than `within_s` seconds."""
    if process.stdin is not None:
        process.stdin.close()
    try:
        process.wait(timeout=within_s)
    except subprocess.TimeoutExpired:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()


def on_release(end: Callable[[], None], within_s: float) -> None:
    """In the process itself: call `end` once it is released, in a thread.

    It ends by force if it has not ended `within_s` seconds later.
    """

    def watch() -> None:
        # Not sys.stdin: the lock of its buffer would be in the way when Python exits.
        while os.read(0, 1):
            pass
        end()
        threading.Event().wait(within_s)
        os._exit(1)

    threading.Thread(target=watch, name="tether", daemon=True).start()
