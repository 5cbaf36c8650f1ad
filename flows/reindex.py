"""Reindex: the index follows the corpus, and every text is paid for once.

read → fingerprint → compare → lookup → pack → embed, a batch a task → publish → report
"""

import itertools
import json
import tempfile
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

from prefect import flow, get_run_logger, task, unmapped
from prefect.cache_policies import NO_CACHE
from prefect.exceptions import CancelledRun
from prefect.futures import PrefectFuture, as_completed
from prefect.runtime import flow_run, task_run
from prefect.states import Cancelled, Completed
from prefect.task_runners import ThreadPoolTaskRunner

from flows.cancelling import CANCELS, ENDS, Whole, by_hand, settle, told
from tasks.artifacts import ProgressArtifact, publish_report
from tasks.claims import Shared, take_up
from tasks.embed import Embedded, embed_batch, retry_when_busy
from tasks.errors import EmbedOnceError, RunStopped, SettingsError, StorageFailed
from tasks.fill import Filled, Filling
from tasks.index import adopt, held, vectors_of
from tasks.journal import RunFolder, fold, unfolded_answers
from tasks.ledger import Ledger
from tasks.limiter import LimiterStatistics
from tasks.notes import About, Refused
from tasks.params import Config, Overrides, TableSource, configured
from tasks.plan import Survey, require_few_leave, require_runnable, require_safe, survey
from tasks.progress import Progress, listening, tell
from tasks.publish import publish, tidy_published
from tasks.read.frames import write_frame
from tasks.recover import Recovered, recover
from tasks.report import RunReport, ledger_row
from tasks.run import (
    Clock,
    about_run,
    embedded_texts,
    ended_report,
    finished_report,
    record_death,
    record_notes,
    settle_quarantine,
)
from tasks.schemas import Batch
from tasks.sender import Sender, Terms, forget_sender, sender_of
from tasks.summary import headline

if TYPE_CHECKING:
    import pandas as pd

FOLD_TEXTS = 20_000
"""Answers are folded into the cache in groups of about so many vectors."""
LEFT_OUT_STATES = ("incomplete", "quarantined")
WAVE = 2
"""Batches mapped at once, by concurrency; so many more may be in flight."""


@task(
    name="embed batch",
    task_run_name="embed batch {batch.number}",
    retries=7,  # what lasts longer than their delays, two minutes, ends the run
    retry_condition_fn=retry_when_busy,
    cache_policy=NO_CACHE,
    persist_result=False,
)
def embed(batch: Batch, terms: Terms) -> Embedded:
    """Embed one batch; see `embed_batch`. A retry sends what is still missing."""
    attempt = int(task_run.run_count)
    # Prefect sleeps through a delay, and the end of the run would have to wait for it.
    sender_of(terms).pause_before(attempt)
    return embed_batch(batch, terms, attempt)


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
    if report.state in LEFT_OUT_STATES:
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
    settings = configured(config, overrides)
    require_runnable(settings, overrides)
    folder = RunFolder(settings.state.uri, str(flow_run.id))
    clock = Clock(datetime.now(tz=UTC))
    about = about_run(settings, folder.run_id, clock)
    whole = Whole()
    with ExitStack() as stack:
        stack.enter_context(_waits_logged())
        stack.enter_context(held(settings.index, folder.run_id))
        stack.enter_context(folder.alive(about))  # from here on nobody prunes the cache
        recovered = recover(settings.state.uri, record_death, besides=folder.run_id)
        adopt(settings.index)
        try:
            ready = _embedded(settings, overrides, folder, clock)
            report = whole.run(lambda: _published(ready, folder, recovered, about, clock))
        except (EmbedOnceError, *ENDS) as end:
            with suppress(EmbedOnceError):  # then the next run tells of it
                _close(ended_report(about, folder.calls(), *told(end), clock.total()), folder)
            raise
        finally:
            forget_sender(folder)
    if not by_hand():  # else the cancel came too late: all is done and told
        whole.end()
    return report


@dataclass(frozen=True)
class _Ready:
    """All that a run needs to publish: no text is missing any more."""

    found: Survey
    filled: Filled
    reasons: dict[bytes, str]
    shared: Shared
    sent: LimiterStatistics


def _embedded(settings: Config, overrides: Overrides, folder: RunFolder, clock: Clock) -> _Ready:
    """The path of the data, up to the point from which on it is published."""
    tell(Progress("reading"))
    found = survey(settings, overrides, folder.staging)
    require_safe(found, overrides)
    with clock.stage("embed"):
        _take_up_known(found)
        filled, refused, shared, sent = _embed_all(found, folder)
        reasons = settle_quarantine(found, overrides, refused, folder.run_id)
    require_few_leave(found, filled)
    return _Ready(found, filled, reasons, shared, sent)


def _published(
    ready: _Ready, folder: RunFolder, recovered: Recovered, about: About, clock: Clock
) -> RunReport:
    """Publish, tell, and tidy."""
    tell(Progress("publishing"))
    found, filled = ready.found, ready.filled
    with clock.stage("publish"):
        published = publish(
            rows=filled.rows,
            deletions=filled.deletions,
            updates=filled.updates,
            index=found.config.index,
            identity=found.identity,
            cache=found.cache,
            run_id=folder.run_id,
        )
    report = finished_report(
        survey=found,
        filled=filled,
        published=published,
        recovered=recovered,
        calls=folder.calls(),
        shared=ready.shared,
        sent=ready.sent,
        reasons=ready.reasons,
        about=about,
        clock=clock,
    )
    _close(report, folder)
    tidy_published(published, filled.rows.rows, found.config.index, found.cache, folder.run_id)
    return report


def _take_up_known(found: Survey) -> None:
    """Put into the cache what lookup found elsewhere: in the index, in other runs' journals."""
    for known in vectors_of(found.config.index, found.looked_up.in_index):
        found.cache.remember([known])
    others = unfolded_answers(found.config.state.uri, found.cache.space)
    found.cache.remember(answer.table for answer in others)


def _embed_all(
    found: Survey, folder: RunFolder
) -> tuple[Filled, list[Refused], Shared, LimiterStatistics]:
    """Embed what nobody has paid for; the next batches fill while these are in flight.

    Args:
        found: What is known before anything is sent.
        folder: The run's folder, with its journal.

    Returns:
        What publish needs, the texts that were refused, what other runs paid for meanwhile,
        and what the limiter did.

    Raises:
        EmbedOnceError: A batch failed for good. All answers that came are in the cache.
    """
    config = found.config
    terms = Terms(
        found.provider,
        folder,
        found.facts.usd_per_million_tokens,
        on_error=config.on_error,
        max_wait_s=config.limits.max_wait,
        shared=config.limits.shared,
    )
    sender = sender_of(terms, found.cache)
    filling = Filling(
        reader=found.reader,
        changes=found.compared.changes,
        deletions=found.compared.deletions,
        packed=found.packed.table,
        sizes=sender,
        folder=folder.staging,
    )
    size = WAVE * found.provider.limits.concurrency
    progress = ProgressArtifact(found.config.name) if found.packed.texts else None
    collected = _Collected(folder, found, sender)
    with ExitStack() as stack:
        if progress is not None:
            stack.enter_context(listening(progress))
        stack.enter_context(collected.ending_the_run())
        stack.callback(sender.save)
        try:
            batches, first = filling.batches(), True
            with collected.ending_the_run():
                while wave := list(itertools.islice(batches, 1 if first else sender.ahead(size))):
                    collected.flying += embed.map(wave, unmapped(terms))
                    # The first answer tells how large the next batches may be.
                    collected.take(down_to=0 if first else sender.ahead(size))
                    first = False
                    if collected.failed:
                        break
            collected.take(down_to=0)
        except ENDS:
            settle(sender)
            fold(folder, found.cache)
            raise
        except BaseException:  # what waits is not sent any more
            sender.stop(RunStopped("The run was ended."))
            raise
    collected.finish()
    filled = filling.finish(found.refused(collected.refused))
    return filled, collected.refused, collected.shared, sender.limiter.statistics()


class _Collected:
    """Answers as they come in: folded in groups, failures kept for the end."""

    def __init__(self, folder: RunFolder, found: Survey, sender: Sender) -> None:
        self._folder = folder
        self._found = found
        self._sender = sender
        self._unfolded: list[str] = []
        self._waiting = 0
        self._done = 0
        self.shared = Shared()
        self.flying: list[PrefectFuture[Embedded]] = []
        self.refused: list[Refused] = []
        self.failed: list[Exception] = []

    def take(self, down_to: int) -> None:
        """Keep what comes in, until at most so many batches are in flight."""
        if len(self.flying) <= down_to:
            return
        for future in as_completed(list(self.flying)):
            self.flying.remove(future)
            outcome = future.result(raise_on_failure=False)
            if isinstance(outcome, Embedded):
                self._keep(outcome)
            elif not isinstance(outcome, RunStopped):
                self._fail(outcome)
            if len(self.flying) <= down_to:
                return

    def _keep(self, outcome: Embedded) -> None:
        self._unfolded += outcome.answers
        self.refused += outcome.refused
        self.shared.add(outcome.found, outcome.found_tokens)
        self._waiting += outcome.texts
        self._done += outcome.texts + len(outcome.refused) + len(outcome.found)
        tell(Progress("embedding", self._done, self._found.packed.texts))
        if self._waiting >= FOLD_TEXTS and not self.failed:
            with self.ending_the_run():
                fold(self._folder, self._found.cache, self._unfolded)
            self._unfolded, self._waiting = [], 0

    @contextmanager
    def ending_the_run(self) -> Iterator[None]:
        """Send nothing more where the block fails, but go on: what is in flight is paid for."""
        try:
            yield
        except EmbedOnceError as error:
            self._fail(error)

    def _fail(self, error: Exception) -> None:
        self.failed.append(error)
        self._sender.stop(RunStopped("Another batch has ended the run."))

    def finish(self) -> None:
        """Fold the rest, of batches that failed too, then say what failed."""
        with self.ending_the_run():
            fold(self._folder, self._found.cache)
        if not self.failed:
            take_up(self._found.cache, self._folder.state_uri, self.shared.hashes)
            return
        first, kept = self.failed[0], "what was paid for is kept"
        with suppress(StorageFailed):
            done = embedded_texts(self._folder.calls())
            kept = f"{done:,} texts of {self._found.packed.texts:,} are paid for and kept"
        if lost := sum(getattr(error, "facts", {}).get("lost", 0) for error in self.failed):
            kept += f"; {lost:,} more were paid for and are lost"
        raise EmbedOnceError(
            f"{self._found.config.name}: not all texts could be embedded: {first} The index is as "
            f"it was; {kept}. Run again: only the rest is embedded."
        ) from first


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
    """Enter the run in the ledger, then show it."""
    calls = folder.calls()
    record_notes(folder, calls)
    Ledger(folder.state_uri).record_run(ledger_row(report))
    folder.forget_notes()
    publish_report(report, calls)
