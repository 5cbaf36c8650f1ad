"""Cancelling: what a run still does after Ctrl-C, SIGTERM or a cancel in the Prefect UI.

All of them arrive as an exception in the main thread. What waits is not sent any more;
answers in flight are paid for, so the run waits a while for them; what it began to publish
is published to the end.
"""

from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor, wait
from contextvars import copy_context
from typing import TypeVar

from prefect.exceptions import TerminationSignal
from prefect.runtime import deployment, flow_run

from tasks.errors import EmbedOnceError, RunStopped
from tasks.progress import Progress, tell
from tasks.sender import Sender

T = TypeVar("T")

CANCELS = (KeyboardInterrupt, TerminationSignal)
"""What a cancel raises; Prefect turns SIGTERM into the second."""

ENDS = (*CANCELS, SystemExit)
"""What ends a run from outside: Prefect's log raises the last when the worker that reads it
is gone."""

ANSWERS_S = 20.0
"""So long answers in flight are waited for. Prefect kills a cancelled run after 30 s; the
rest of them is for the cache, the ledger and the artifacts."""

GIVEN_UP_S = 2.0
"""So long a batch may take to notice that its call was given up."""


def settle(sender: Sender) -> None:
    """Send nothing more, and wait for answers in flight; another cancel ends the wait."""
    sender.stop(RunStopped("The run was cancelled."))
    tell(Progress("cancelling", note="cancelled: waiting for answers in flight"))
    try:
        sender.rest(ANSWERS_S)
    finally:
        sender.give_up()
    sender.rest(GIVEN_UP_S)


def told(end: BaseException) -> tuple[str, str]:
    """State and error of a run that ended so."""
    if isinstance(end, EmbedOnceError):
        return "failed", str(end)
    if isinstance(end, SystemExit):
        return "died", "The worker that started the run is gone."
    return "cancelled", ""


def by_hand() -> bool:
    """Whether nobody but the run itself tells Prefect that it was cancelled.

    The worker of a deployment does so, and a flow around this one has its own word.
    """
    return deployment.id is None and flow_run.parent_flow_run_id is None


class Whole:
    """Work that a cancel does not cut in two: it takes effect when the work is done."""

    def __init__(self) -> None:
        self._cancel: BaseException | None = None

    def run(self, work: Callable[[], T]) -> T:
        """What `work` returns; it runs in a thread of its own, which no signal interrupts."""
        begun = list[Future[T]]()
        with ThreadPoolExecutor(1) as thread:
            while not (begun and begun[0].done()):
                try:
                    if not begun:
                        begun.append(thread.submit(copy_context().run, work))
                    wait(begun)
                except CANCELS as cancel:
                    if not begun:
                        raise
                    self._cancel = cancel
        return begun[0].result()

    def end(self) -> None:
        """Raise the cancel that came meanwhile, if one did."""
        if self._cancel is not None:
            raise self._cancel
