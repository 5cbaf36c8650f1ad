"""Cancelling: what a run still does after Ctrl-C, SIGTERM or a cancel in the Prefect UI.

All of them arrive as an exception in the main thread. The sender settles: what waits is not
sent any more, and answers in flight, which are paid for, are waited for a while. What the run
began to publish is published to the end.
"""

from collections.abc import Callable
from typing import TypeVar

from prefect.exceptions import TerminationSignal
from prefect.runtime import deployment, flow_run

from tasks.aside import Aside
from tasks.errors import BudgetReached, EmbedOnceError, NotApproved

T = TypeVar("T")

CANCELS = (KeyboardInterrupt, TerminationSignal)
"""What a cancel raises; Prefect turns SIGTERM into the second."""

ENDS = (*CANCELS, SystemExit)
"""What ends a run from outside: Prefect's log raises the last when the worker that reads it
is gone."""


def told(end: BaseException) -> tuple[str, str]:
    """State and error of a run that ended so."""
    if isinstance(end, BudgetReached):
        return "over budget", str(end)
    if isinstance(end, NotApproved):
        return "not approved", str(end)
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
        """What `work` returns; it is done aside."""
        aside = Aside(work)
        while not aside.ended:
            try:
                aside.wait()
            except CANCELS as cancel:
                if aside.prevent():
                    raise
                self._cancel = cancel
        return aside.result()

    def end(self) -> None:
        """Raise the cancel that came meanwhile, if one did."""
        if self._cancel is not None:
            raise self._cancel
