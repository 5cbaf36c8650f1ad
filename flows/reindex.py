"""Reindex: the index follows the corpus, and every text is paid for once.

read → fingerprint → compare → lookup → pack → embed, a batch a task → publish → report
"""

import json
import tempfile
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

from httpx import HTTPError
from prefect import flow, get_run_logger
from prefect.exceptions import CancelledRun
from prefect.runtime import flow_run
from prefect.states import Cancelled, Completed
from prefect.task_runners import ThreadPoolTaskRunner

from flows.cancelling import CANCELS, ENDS, Whole, by_hand, told
from flows.embedding import embed_all
from flows.pausing import ApprovalNeeded, approved, require_approved
from flows.waiting import BatchLane, batch_lane, submit_missing, take_in
from tasks import memory
from tasks.artifacts import publish_report
from tasks.claims import Shared
from tasks.errors import BudgetReached, EmbedOnceError, NotApproved, SettingsError
from tasks.fill import Filled
from tasks.form import Overrides, configured
from tasks.harvest import Settled
from tasks.index import adopt, held, vectors_of
from tasks.journal import RunFolder, unfolded_answers
from tasks.limiter import LimiterStatistics
from tasks.notes import About
from tasks.params import Config, TableSource
from tasks.progress import Progress, listening, tell
from tasks.providers import Space
from tasks.publish import tidy_published
from tasks.read.frames import write_frame
from tasks.recover import Recovered, recover
from tasks.report import RunReport
from tasks.run import (
    Clock,
    about_run,
    ended_report,
    enter,
    finished_report,
    keep_found,
    keep_scanned,
    publish_found,
    record_death,
    settle_quarantine,
    waiting_report,
)
from tasks.sender import forget_sender
from tasks.summary import headline
from tasks.survey import Survey, require_few_leave, require_runnable, require_safe, survey

if TYPE_CHECKING:
    import pandas as pd

NAMED_STATES = ("incomplete", "quarantined", "waiting")
"""Of reports whose run has completed, and whose name says what is to be known."""

THREADS: ThreadPoolTaskRunner[Any] = ThreadPoolTaskRunner(max_workers=1024)
"""A task that waits for its retry keeps its thread, so there are far more threads than calls
in flight; `limits.concurrency` bounds those."""


@flow(
    name="reindex",
    flow_run_name="reindex {config}",
    task_runner=THREADS,  # type: ignore[arg-type]
    persist_result=False,
)
def reindex(config: str, overrides: Overrides = Overrides()) -> Any:
    """Bring the index in step with the corpus.

    Args:
        config: Path of the YAML file that describes the corpus and its index.
        overrides: What this run does otherwise than the file says.

    Returns:
        What the run did, a `RunReport`; also an artifact of the run.
    """
    try:
        report = _run(config, overrides)
    except CANCELS:
        if not by_hand():
            raise
        return Cancelled(message="What was paid for is kept.")
    except (BudgetReached, NotApproved) as end:  # no failure, which Prefect would retry
        return Cancelled(name=type(end).__name__, message=str(end), data=end)
    if report.state in NAMED_STATES:
        return Completed(name=report.state.title(), message=headline(report), data=report)
    return report


def run(config: str, overrides: Overrides = Overrides()) -> RunReport:
    """The flow as a plain call: its report, whatever state the run ended in.

    Raises:
        EmbedOnceError: The run failed; the message says why and what to do.
        KeyboardInterrupt: It was cancelled, by Ctrl-C or SIGTERM.
    """
    try:
        return cast("RunReport", reindex(config, overrides))
    except CancelledRun:
        raise KeyboardInterrupt from None
    except HTTPError as error:
        raise EmbedOnceError(
            f"Prefect's server does not answer ({error}). What was paid for is kept, and "
            "what was published stands: `embed-once history` tells. Run again when the server is "
            "back; a run that was at its end has nothing left to do."
        ) from None


def run_frame(config: str, frame: "pd.DataFrame", overrides: Overrides = Overrides()) -> RunReport:
    """Reindex from a pandas frame, one chunk a row, instead of the config's `source.path`.

    Args:
        config: Path of a config whose source is a table; its columns apply to the frame.
        frame: The whole corpus.
        overrides: What this run does otherwise than the file says.

    Raises:
        EmbedOnceError: As in `run`, and where a column cannot be stored.
    """
    settings = configured(config, overrides)
    if not isinstance(settings.source, TableSource):
        raise SettingsError("source.kind: a frame needs a config whose source is a table.")
    with tempfile.TemporaryDirectory(prefix="embed-once-frame-") as folder:
        file = Path(folder) / "frame.arrow"
        write_frame(frame, file, settings.source)
        path = f"source.path={json.dumps(str(file))}"
        return run(config, overrides.model_copy(update={"settings": [*overrides.settings, path]}))


def _run(config: str, overrides: Overrides) -> RunReport:
    """One run, entered in the ledger however it ends."""
    memory.spare()
    settings = configured(config, overrides)
    space = require_runnable(settings, overrides)
    folder, settled = RunFolder(settings.state.uri, _run_id()), Settled()
    with _waits_logged():
        try:
            return _attempt(settings, overrides, folder, space, settled)
        except ApprovalNeeded as needed:
            plan = needed.plan
        # From here on others may hold the index, so all is looked at anew when it is approved.
        clock = Clock(datetime.now(tz=UTC))
        about = about_run(settings, space, folder.run_id, clock)
        with _told_if_ended(about, folder, clock, settled):
            settings = approved(plan, settings, folder.run_id)
        return _attempt(settings, overrides, folder, space, settled)


def _attempt(
    settings: Config, overrides: Overrides, folder: RunFolder, space: Space, settled: Settled
) -> RunReport:
    """All of a run, while it holds the index; `settled` goes on in what it says.

    Raises:
        ApprovalNeeded: It would cost more than it may unasked; nothing was done.
    """
    clock = Clock(datetime.now(tz=UTC))
    about = about_run(settings, space, folder.run_id, clock)
    whole = Whole()
    with ExitStack() as stack:
        stack.enter_context(held(settings.index, folder.run_id))
        stack.enter_context(folder.alive(about))  # from here on nobody prunes the cache
        recovered = recover(settings.state.uri, record_death, besides=folder.run_id)
        adopt(settings.index)
        stack.callback(forget_sender, folder)
        stack.enter_context(_told_if_ended(about, folder, clock, settled))
        lane = batch_lane(settings)
        with ExitStack() as held_lane:
            if lane is not None and lane.is_used:
                held_lane.enter_context(lane.notes.held(folder.run_id))
                take_in(lane, settled)
            found = _surveyed(settings, overrides, folder, settled)
            if lane is not None and found.waits:
                return _waiting(lane, found, folder, settled, about, clock)
        with memory.giving_back(found.sizes):
            ready = _embedded(found, overrides, folder, clock)
        report = whole.run(lambda: _published(ready, folder, recovered, settled, about, clock))
        if lane is not None:
            lane.notes.caught_up(settings.index)
    if not by_hand():  # else the cancel came too late: all is done and told
        whole.end()
    return report


@contextmanager
def _told_if_ended(
    about: About, folder: RunFolder, clock: Clock, settled: Settled
) -> Iterator[None]:
    """Enter the run in the ledger if the block ends early."""
    try:
        yield
    except (EmbedOnceError, *ENDS) as end:
        with suppress(EmbedOnceError):  # then the next run tells of it
            calls = [*settled.calls, *folder.calls()]
            report = ended_report(about, calls, *told(end), clock.total())
            if isinstance(end, EmbedOnceError):
                end.facts["report"] = report
            _close(report, folder)
        raise


def _run_id() -> str:
    """The flow run's id; a retry in Prefect has one of its own, and takes up what came before."""
    count = int(flow_run.run_count)
    return str(flow_run.id) if count <= 1 else f"{flow_run.id}-{count}"


@dataclass(frozen=True)
class _Ready:
    """All that a run needs to publish: no text is missing any more."""

    found: Survey
    filled: Filled
    reasons: dict[bytes, str]
    shared: Shared
    sent: LimiterStatistics


def _surveyed(
    settings: Config, overrides: Overrides, folder: RunFolder, settled: Settled
) -> Survey:
    """All that is known before anything is sent, once that may be."""
    tell(Progress("reading"))
    found = survey(settings, overrides, folder.staging, came=settled.hashes())
    memory.give_back_all()
    require_safe(found, overrides)
    require_approved(found, overrides)
    return found


def _waiting(  # noqa: PLR0917 - as `_published`
    lane: BatchLane,
    found: Survey,
    folder: RunFolder,
    settled: Settled,
    about: About,
    clock: Clock,
) -> RunReport:
    """Submit what is missing, and tell what is waited for."""
    submitted = submit_missing(lane, found, folder)
    report = waiting_report(found, settled, submitted, about, clock)
    _close(report, folder)
    return report


def _embedded(found: Survey, overrides: Overrides, folder: RunFolder, clock: Clock) -> _Ready:
    """The path of the data, up to the point from which on it is published."""
    with clock.stage("embed"):
        _take_up_known(found)
        filled, refused, shared, sent = embed_all(found, folder)
        reasons = settle_quarantine(found, overrides, refused, folder.run_id)
    memory.give_back_all()
    require_few_leave(found, filled)
    return _Ready(found, filled, reasons, shared, sent)


def _published(  # noqa: PLR0917 - what a run has learned on its way
    ready: _Ready,
    folder: RunFolder,
    recovered: Recovered,
    settled: Settled,
    about: About,
    clock: Clock,
) -> RunReport:
    """Publish, tell, and tidy."""
    found, filled = ready.found, ready.filled
    with memory.giving_back(found.sizes):
        tell(Progress("publishing"))
        with clock.stage("publish"):
            published = publish_found(found, filled, folder.run_id)
        memory.give_back_all()
        report = finished_report(
            survey=found,
            filled=filled,
            published=published,
            recovered=recovered,
            calls=folder.calls(),
            settled=settled,
            shared=ready.shared,
            sent=ready.sent,
            reasons=ready.reasons,
            about=about,
            clock=clock,
        )
        _close(report, folder)
        keep_found(found, filled, published)
        tidy_published(published, filled.rows.rows, found.config.index, found.cache, folder.run_id)
        keep_scanned(found, filled)
    return report


def _take_up_known(found: Survey) -> None:
    """Put into the cache what lookup found elsewhere: in the index, in other runs' journals."""
    for known in vectors_of(found.config.index, found.looked_up.in_index):
        found.cache.remember([known])
    others = unfolded_answers(found.config.state.uri, found.cache.space)
    found.cache.remember(answer.table for answer in others)


@contextmanager
def _waits_logged() -> Iterator[None]:
    """Have the run's log say what it waits for."""
    logger = get_run_logger()

    def log(progress: Progress) -> None:
        if progress.note:
            logger.info("%s", progress.note)

    with listening(log):
        yield


def _close(report: RunReport, folder: RunFolder) -> None:
    """Enter the run in the ledger, then show it; a server that is gone changes nothing."""
    calls = enter(report, folder)
    try:
        publish_report(report, calls)
    except HTTPError as error:
        get_run_logger().warning(
            "Prefect's server did not take the report of this run, which the ledger has: %s", error
        )
