"""The terminal: its signals, where Prefect's words go, the bar that moves while a run goes on."""

import contextlib
import logging
import os
import signal
import sys
import traceback
from collections.abc import Iterator
from datetime import UTC, datetime
from pathlib import Path
from types import FrameType
from typing import Any

from tasks.errors import UNFORESEEN, EmbedOnceError, StorageFailed

CANCELLED = 130
LOGS_KEPT = 20
SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
"""Ctrl-C, what `kill` sends, and what comes when the terminal closes."""
UNREACHED = "Failed to reach API"
"""So a RuntimeError of Prefect begins where its server is not there (3.8)."""
SHOW_CURSOR = "\x1b[?25h"


class Signals:
    """Any of SIGNALS cancels; a second Ctrl-C or SIGTERM ends the process at once.

    That is as safe as a kill: what was paid for is in the journal, a commit is done or not
    there. A signal that was ignored from the start, say by `nohup`, stays ignored.

    Attributes:
        console: A descriptor of the real stderr.
    """

    def __init__(self) -> None:
        self.console = 2
        self._cancelled = False

    @contextlib.contextmanager
    def heeded(self) -> Iterator[None]:
        """Heed them until the block ends."""
        before = {each: signal.getsignal(each) for each in SIGNALS}
        heeded = [each for each, handler in before.items() if handler is not signal.SIG_IGN]
        for each in heeded:
            signal.signal(each, self._heed)
        try:
            yield
        finally:
            for each in heeded:
                signal.signal(each, before[each])

    def _heed(self, number: int, _frame: FrameType | None) -> None:
        if not self._cancelled:
            self._cancelled = True
            raise KeyboardInterrupt
        if number == signal.SIGHUP:
            return  # the shell and the system both send it; nobody is impatient
        cursor = SHOW_CURSOR if os.isatty(self.console) else ""
        with contextlib.suppress(OSError):  # the terminal may be gone
            os.write(self.console, f"{cursor}embed-once: {ENDED_AT_ONCE}\n".encode())
        os._exit(CANCELLED)


ENDED_AT_ONCE = "ended at once; what was paid for is kept, run again."
SIGNALS_HERE = Signals()
"""Those of this process."""


def new_log(folder: Path, name: str) -> Path:
    """The path of a new log in `folder`; old ones are deleted there."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise StorageFailed(f"{folder} cannot be made for the logs: {error.strerror}.") from None
    for old in sorted(folder.glob("*.log"))[: -LOGS_KEPT + 1]:
        old.unlink(missing_ok=True)
    return folder / f"{datetime.now(tz=UTC):%Y%m%dT%H%M%S}-{name}-{os.getpid()}.log"


@contextlib.contextmanager
def prefect_log(folder: Path, name: str) -> Iterator[int]:
    """Send what Prefect, its temporary server and other libraries print to a file.

    The server is a process of its own that writes to our stdout and stderr, so the two
    descriptors themselves are turned, not Python's objects.

    Yields:
        A descriptor of the real stderr.
    """
    os.environ.setdefault("PREFECT_SERVER_ANALYTICS_ENABLED", "false")
    log = new_log(folder, name)
    problem = ""
    with _turned(log, 1, 2) as (_, real_err):
        try:
            SIGNALS_HERE.console = real_err
            yield real_err
        except EmbedOnceError:
            raise
        except Exception as error:  # noqa: BLE001 - the last line of defence: nothing ends unexplained
            traceback.print_exc()
            problem = f"{UNFORESEEN} ({type(error).__name__}: {error})."
            if str(error).startswith(UNREACHED):
                problem = (
                    f"No Prefect server answers ({error}). Start it, name another one in "
                    "PREFECT_API_URL, or unset that: then one is started for the command."
                )
        finally:
            # The temporary server is stopped when Python exits, and says so.
            logging.getLogger("prefect").setLevel(logging.WARNING)
    if problem:
        raise EmbedOnceError(f"{problem} Details: {log}")


@contextlib.contextmanager
def unheard() -> Iterator[None]:
    """Drop what anybody writes to stderr, also a thread of a library."""
    with _turned(Path(os.devnull), 2):
        yield


@contextlib.contextmanager
def _turned(file: Path, *descriptors: int) -> Iterator[list[int]]:
    """Have `descriptors` lead to the end of `file`; yields what they were, which stays open."""
    _flush()
    real = [os.dup(each) for each in descriptors]
    with file.open("ab") as opened:
        for each in descriptors:
            os.dup2(opened.fileno(), each)
    try:
        yield real
    finally:
        _flush()
        for each, own in zip(descriptors, real, strict=True):
            os.dup2(own, each)


def _flush() -> None:
    for stream in (sys.stdout, sys.stderr):
        with contextlib.suppress(OSError):  # who reads it may be gone
            stream.flush()


@contextlib.contextmanager
def bar_on(console: int) -> Iterator[None]:
    """A progress bar on the real stderr, if that is a terminal."""
    if not os.isatty(console):
        yield
        return
    from rich.console import Console  # noqa: PLC0415
    from rich.progress import (  # noqa: PLC0415
        BarColumn,
        MofNCompleteColumn,
        SpinnerColumn,
        TextColumn,
        TimeElapsedColumn,
    )
    from rich.progress import Progress as Bar  # noqa: PLC0415

    from tasks.progress import Progress, listening  # noqa: PLC0415

    terminal = os.fdopen(os.dup(console), "w")
    bar = Bar(
        SpinnerColumn(),
        TextColumn("{task.description:<11}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        console=Console(file=terminal, force_terminal=True),
        transient=True,
    )
    task = bar.add_task("starting", total=None)

    def show(progress: Progress) -> None:
        counts: dict[str, Any] = {"completed": progress.done, "total": progress.total or None}
        bar.update(
            task,
            description=progress.note or progress.stage,
            **({} if progress.note else counts),
        )

    bar.start()
    try:
        with listening(show):
            yield
    finally:
        for end in (bar.stop, terminal.close):
            with contextlib.suppress(OSError):  # the terminal may be gone
                end()
