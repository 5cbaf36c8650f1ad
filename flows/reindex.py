"""Reindex: the index follows the corpus, and every text is paid for once.

read → fingerprint → compare → lookup → pack → embed, a batch a task → publish → report
"""

import itertools
import json
import tempfile
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

from prefect import Task, flow, get_run_logger, task, unmapped
from prefect.cache_policies import NO_CACHE
from prefect.futures import PrefectFuture, as_completed
from prefect.runtime import flow_run, task_run
from prefect.states import Completed
from prefect.task_runners import ThreadPoolTaskRunner
from prefect.tasks import exponential_backoff

from tasks.artifacts import ProgressArtifact, publish_report
from tasks.embed import Embedded, embed_batch, retry_when_busy
from tasks.errors import EmbedOnceError, RunStopped, SettingsError
from tasks.fill import Filled, Filling
from tasks.index import adopt, held, vectors_of
from tasks.journal import About, Refused, RunFolder, fold, unfolded_answers
from tasks.ledger import Ledger
from tasks.limiter import LimiterStatistics
from tasks.params import Config, Overrides, TableSource, configured
from tasks.plan import Survey, require_few_leave, require_runnable, require_safe, survey
from tasks.progress import Progress, listening, tell
from tasks.publish import publish
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
    retries=7,  # 1 + 2 + 4 + … + 64 s: two minutes; what lasts longer ends the run
    retry_delay_seconds=exponential_backoff(backoff_factor=1),
    retry_jitter_factor=0.5,
    retry_condition_fn=retry_when_busy,
    cache_policy=NO_CACHE,
    persist_result=False,
)
def embed(batch: Batch, terms: Terms) -> Embedded:
    """Embed one batch; see `embed_batch`. A retry sends what is still missing."""
    return embed_batch(batch, terms, attempt=int(task_run.run_count))


EmbedTask = Task[[Batch, Terms], Embedded]

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
    settings = configured(config, overrides)
    require_runnable(settings, overrides)
    folder = RunFolder(settings.state.uri, str(flow_run.id))
    clock = Clock(datetime.now(tz=UTC))
    about = about_run(settings, folder.run_id, clock)
    with ExitStack() as stack:
        stack.enter_context(held(settings.index, folder.run_id))
        stack.enter_context(folder.alive(about))  # from here on nobody prunes the cache
        recovered = recover(settings.state.uri, record_death)
        adopt(settings.index)
        stack.enter_context(_waits_logged())
        try:
            report = _reindex(
                settings, overrides, folder, recovered=recovered, clock=clock, about=about
            )
        except EmbedOnceError as error:
            failed = ended_report(about, folder.calls(), "failed", str(error), clock.total())
            _close(failed, folder)
            raise
        finally:
            forget_sender(folder)
        _close(report, folder)
    if report.state in LEFT_OUT_STATES:
        return Completed(name=report.state.title(), message=headline(report), data=report)
    return report


def run(config: str, overrides: Overrides = Overrides()) -> RunReport:
    """The flow as a plain call: its report, whatever state the run ended in.

    Raises:
        EmbedOnceError: The run failed; the message says why and what to do.
    """
    return cast("RunReport", reindex(config, overrides))


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


def _reindex(
    settings: Config,
    overrides: Overrides,
    folder: RunFolder,
    *,
    recovered: Recovered,
    clock: Clock,
    about: About,
) -> RunReport:
    """The path of the data."""
    tell(Progress("reading"))
    found = survey(settings, overrides, folder.staging)
    require_safe(found, overrides)
    with clock.stage("embed"):
        _take_up_known(found)
        filled, refused, sent = _embed_all(found, folder)
        reasons = settle_quarantine(found, overrides, refused, folder.run_id)
    require_few_leave(found, filled)
    tell(Progress("publishing"))
    with clock.stage("publish"):
        published = publish(
            rows=filled.rows,
            deletions=filled.deletions,
            updates=filled.updates,
            index=settings.index,
            identity=found.identity,
            cache=found.cache,
            run_id=folder.run_id,
        )
    return finished_report(
        survey=found,
        filled=filled,
        published=published,
        recovered=recovered,
        calls=folder.calls(),
        sent=sent,
        reasons=reasons,
        about=about,
        clock=clock,
    )


def _take_up_known(found: Survey) -> None:
    """Put into the cache what lookup found elsewhere: in the index, in other runs' journals."""
    for known in vectors_of(found.config.index, found.looked_up.in_index):
        found.cache.remember([known])
    others = unfolded_answers(found.config.state.uri, found.cache.space)
    found.cache.remember(answer.table for answer in others)


def _embed_all(
    found: Survey, folder: RunFolder, embed: EmbedTask = embed
) -> tuple[Filled, list[Refused], LimiterStatistics]:
    """Embed what nobody has paid for; the next batches fill while these are in flight.

    Args:
        found: What is known before anything is sent.
        folder: The run's folder, with its journal.
        embed: The task to map, if not with its usual retries.

    Returns:
        What publish needs, the texts that were refused, and what the limiter did.

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
    sender = sender_of(terms)
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
        stack.callback(sender.save)
        try:
            batches, first = filling.batches(), True
            while wave := list(itertools.islice(batches, 1 if first else sender.ahead(size))):
                collected.flying += embed.map(wave, unmapped(terms))
                # The first answer tells how large the next batches may be.
                collected.take(down_to=0 if first else sender.ahead(size))
                first = False
                if collected.failed:
                    break
            collected.take(down_to=0)
        except BaseException:  # Ctrl-C above all: what waits is not sent any more
            sender.stop(RunStopped("The run was ended."))
            raise
    collected.finish()
    filled = filling.finish(found.refused(collected.refused))
    return filled, collected.refused, sender.limiter.statistics()


class _Collected:
    """Answers as they come in: folded in groups, failures kept for the end."""

    def __init__(self, folder: RunFolder, found: Survey, sender: Sender) -> None:
        self._folder = folder
        self._found = found
        self._sender = sender
        self._unfolded: list[Path] = []
        self._waiting = 0
        self._done = 0
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
                self.failed.append(outcome)
                self._sender.stop(RunStopped("Another batch has ended the run."))
            if len(self.flying) <= down_to:
                return

    def _keep(self, outcome: Embedded) -> None:
        self._unfolded += outcome.answers
        self.refused += outcome.refused
        self._waiting += outcome.texts
        self._done += outcome.texts + len(outcome.refused)
        tell(Progress("embedding", self._done, self._found.packed.texts))
        if self._waiting >= FOLD_TEXTS:
            self._fold()

    def finish(self) -> None:
        """Fold the rest, of batches that failed too, then say what failed."""
        fold(self._folder, self._found.cache)
        if not self.failed:
            return
        first, done = self.failed[0], embedded_texts(self._folder.calls())
        raise EmbedOnceError(
            f"{self._found.config.name}: not all texts could be embedded: {first} The index is as "
            f"it was; {done:,} texts of {self._found.packed.texts:,} are paid for and kept. "
            "Run again: only the rest is embedded."
        ) from first

    def _fold(self) -> None:
        fold(self._folder, self._found.cache, self._unfolded)
        self._unfolded, self._waiting = [], 0


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
