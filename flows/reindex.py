"""Reindex: the index follows the corpus, and every text is paid for once.

read → fingerprint → compare → lookup → pack → embed, a batch a task → publish → report
"""

import itertools
import json
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

from prefect import Task, flow, task, unmapped
from prefect.cache_policies import NO_CACHE
from prefect.futures import PrefectFuture, as_completed
from prefect.runtime import flow_run, task_run
from prefect.states import Completed
from prefect.task_runners import ThreadPoolTaskRunner
from prefect.tasks import exponential_backoff

from tasks.artifacts import ProgressArtifact, publish_report
from tasks.embed import Embedded, embed_batch, retry_when_busy
from tasks.errors import EmbedOnceError, SettingsError
from tasks.fill import Filled, Filling
from tasks.index import adopt, held, vectors_of
from tasks.journal import About, Recovered, RunFolder, fold, recover, unfolded_answers
from tasks.ledger import Ledger
from tasks.params import Config, Overrides, TableSource, load_config
from tasks.plan import Survey, require_runnable, require_safe, survey
from tasks.progress import Progress, listening, tell
from tasks.providers import Provider
from tasks.publish import publish
from tasks.read.frames import write_frame
from tasks.report import RunReport, headline, ledger_row
from tasks.run import Clock, about_run, died_report, ended_report, finished_report
from tasks.schemas import Batch

if TYPE_CHECKING:
    import pandas as pd

FOLD_TEXTS = 20_000
"""Answers are folded into the cache in groups of about so many vectors."""
WAVE = 2
"""Batches mapped at once, by concurrency; at most two waves are in flight."""


@task(
    name="embed batch",
    task_run_name="embed batch {batch.number} of {batch.of}",
    retries=5,
    retry_delay_seconds=exponential_backoff(backoff_factor=2),
    retry_jitter_factor=0.5,
    retry_condition_fn=retry_when_busy,
    cache_policy=NO_CACHE,
    persist_result=False,
)
def embed(
    batch: Batch, provider: Provider, folder: RunFolder, usd_per_million_tokens: float
) -> Embedded:
    """Embed one batch in one call; see `embed_batch`."""
    attempt = int(task_run.run_count)
    return embed_batch(batch, provider, folder, usd_per_million_tokens, attempt)


EmbedTask = Task[[Batch, Provider, RunFolder, float], Embedded]

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
    settings = load_config(config, overrides.settings)
    require_runnable(settings, overrides)
    folder = RunFolder(settings.state.uri, str(flow_run.id))
    ledger = Ledger(settings.state.uri)
    clock = Clock(datetime.now(tz=UTC))
    about = about_run(settings, folder.run_id, clock)
    with ExitStack() as stack:
        stack.enter_context(held(settings.index, folder.run_id))
        recovered = recover(
            settings.state.uri,
            ledger.record_calls,
            lambda dead, calls: ledger.record_run(ledger_row(died_report(dead, calls))),
        )
        adopt(settings.index)
        stack.enter_context(folder.alive(about))
        try:
            report = _reindex(
                settings, overrides, folder, recovered=recovered, clock=clock, about=about
            )
        except EmbedOnceError as error:
            failed = ended_report(about, folder.calls(), "failed", str(error), clock.total())
            _close(failed, folder, ledger)
            raise
        _close(report, folder, ledger)
    if report.state == "incomplete":
        return Completed(name="Incomplete", message=headline(report), data=report)
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
    settings = load_config(config, overrides.settings)
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
        filled = _embed_all(found, folder)
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
        about=about,
        clock=clock,
    )


def _take_up_known(found: Survey) -> None:
    """Put into the cache what lookup found elsewhere: in the index, in other runs' journals."""
    for known in vectors_of(found.config.index, found.looked_up.in_index):
        found.cache.remember([known])
    others = unfolded_answers(found.config.state.uri, found.cache.space)
    found.cache.remember(answer.table for answer in others)


def _embed_all(found: Survey, folder: RunFolder, embed: EmbedTask = embed) -> Filled:
    """Embed what nobody has paid for; the next batches fill while these are in flight.

    Args:
        found: What is known before anything is sent.
        folder: The run's folder, with its journal.
        embed: The task to map, if not with its usual retries.

    Raises:
        EmbedOnceError: A batch failed for good. All answers that came are in the cache.
    """
    filling = Filling(
        reader=found.reader,
        changes=found.compared.changes,
        deletions=found.compared.deletions,
        packed=found.packed.table,
        batches=found.packed.batches,
        limits=found.provider.limits,
        folder=folder.staging,
    )
    size = WAVE * found.provider.limits.concurrency
    progress = ProgressArtifact(found.config.name) if found.packed.texts else None
    collected = _Collected(folder, found)
    with ExitStack() as stack:
        if progress is not None:
            stack.enter_context(listening(progress))
        flying: Sequence[PrefectFuture[Embedded]] = []
        for wave in _waves(filling.batches(), size):
            futures = embed.map(
                wave,
                unmapped(found.provider),
                unmapped(folder),
                unmapped(found.facts.usd_per_million_tokens),
            )
            collected.take(flying)
            flying = futures
            if collected.failed:
                break
        collected.take(flying)
    collected.finish()
    return filling.finish()


class _Collected:
    """Answers as they come in: folded in groups, failures kept for the end."""

    def __init__(self, folder: RunFolder, found: Survey) -> None:
        self._folder = folder
        self._found = found
        self._unfolded: list[Path] = []
        self._waiting = 0
        self._done = 0
        self.failed: list[Exception] = []

    def take(self, futures: Sequence[PrefectFuture[Embedded]]) -> None:
        """Wait for `futures` and keep what they bring."""
        for future in as_completed(list(futures)):
            outcome = future.result(raise_on_failure=False)
            if not isinstance(outcome, Embedded):
                self.failed.append(outcome)
                continue
            self._unfolded.append(outcome.answer)
            self._waiting += outcome.texts
            self._done += outcome.texts
            tell(Progress("embedding", self._done, self._found.packed.texts))
            if self._waiting >= FOLD_TEXTS:
                self._fold()

    def finish(self) -> None:
        """Fold the rest, then say what failed."""
        self._fold()
        if not self.failed:
            return
        first = self.failed[0]
        raise EmbedOnceError(
            f"{len(self.failed)} of {self._found.packed.batches} batches failed, the first "
            f"with: {first} The index is as it was; what was paid for is in the cache. "
            "Run again: only the rest is embedded."
        ) from first

    def _fold(self) -> None:
        fold(self._folder, self._found.cache, self._unfolded)
        self._unfolded, self._waiting = [], 0


def _waves(batches: Iterator[Batch], size: int) -> Iterator[list[Batch]]:
    """`batches` in lists of `size`; `.map` needs a whole list."""
    while wave := list(itertools.islice(batches, size)):
        yield wave


def _close(report: RunReport, folder: RunFolder, ledger: Ledger) -> None:
    """Enter the run in the ledger, then show it."""
    calls = folder.calls()
    ledger.record_calls(calls)
    ledger.record_run(ledger_row(report))
    folder.forget_calls()
    publish_report(report, calls)
