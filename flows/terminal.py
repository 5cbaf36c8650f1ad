"""The terminal: where Prefect's words go, and the bar that moves while a run goes on."""

import contextlib
import logging
import os
import sys
import traceback
from collections.abc import Iterator
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import typer

from tasks.errors import UNFORESEEN, EmbedOnceError, StorageFailed

CANCELLED = 130
LOGS_KEPT = 20


@contextlib.contextmanager
def prefect_log(folder: Path, name: str) -> Iterator[int]:
    """Send what Prefect, its temporary server and other libraries print to a file.

    The server is a process of its own that writes to our stdout and stderr, so the two
    descriptors themselves are turned, not Python's objects.

    Yields:
        A descriptor of the real stderr.
    """
    os.environ.setdefault("PREFECT_SERVER_ANALYTICS_ENABLED", "false")
    os.environ.setdefault("PREFECT_SERVER_EPHEMERAL_STARTUP_TIMEOUT_SECONDS", "120")
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise StorageFailed(f"{folder} cannot be made for the logs: {error.strerror}.") from None
    for old in sorted(folder.glob("*.log"))[: -LOGS_KEPT + 1]:
        old.unlink(missing_ok=True)
    log = folder / f"{datetime.now(tz=UTC):%Y%m%dT%H%M%S}-{name}-{os.getpid()}.log"
    sys.stdout.flush()
    sys.stderr.flush()
    real_out, real_err = os.dup(1), os.dup(2)
    with log.open("ab") as file:
        os.dup2(file.fileno(), 1)
        os.dup2(file.fileno(), 2)
    problem, cancelled = "", False
    try:
        yield real_err
    except EmbedOnceError:
        raise
    except KeyboardInterrupt:
        cancelled = True
    except Exception as error:  # noqa: BLE001 - the last line of defence: nothing ends unexplained
        traceback.print_exc()
        problem = f"{type(error).__name__}: {error}"
    finally:
        # The temporary server is stopped when Python exits, and says so.
        logging.getLogger("prefect").setLevel(logging.WARNING)
        sys.stdout.flush()
        sys.stderr.flush()
        os.dup2(real_out, 1)
        os.dup2(real_err, 2)
    if cancelled:
        print("embed-once: cancelled; what was paid for is kept, run again.", file=sys.stderr)
        raise typer.Exit(CANCELLED)
    if problem:
        raise EmbedOnceError(f"{UNFORESEEN} ({problem}). Details: {log}")


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

    with os.fdopen(os.dup(console), "w") as terminal:
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

        with bar, listening(show):
            yield
