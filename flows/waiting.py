"""Waiting: what a run does with the Batch lane. No process sits there until its texts come.

A run takes in what has come, submits what is missing, and ends; the next one goes on.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt
from prefect import get_run_logger

from tasks.budget import Budget
from tasks.cache import Cache
from tasks.errors import BudgetReached, EmbedOnceError, ProviderError, ProviderThrottled
from tasks.job_notes import JobNotes, Submission
from tasks.jobs import Settled, settle, settle_at_once, submit
from tasks.limits import Limits
from tasks.params import Config
from tasks.providers.opening import open_provider
from tasks.providers.voyage import Voyage
from tasks.providers.voyage_jobs import FULL_S, VoyageJobs
from tasks.schemas import BATCH, Batch
from tasks.stage import stage
from tasks.summary import span_text
from tasks.survey import Survey


@dataclass(frozen=True)
class BatchLane:
    """The Batch lane of a run's space; the run holds it.

    Attributes:
        config: That of the run.
        provider: Who embeds.
        notes: What the state knows of its jobs.
    """

    config: Config
    provider: Voyage
    notes: JobNotes

    @property
    def jobs(self) -> VoyageJobs:
        """The provider's calls."""
        return VoyageJobs(self.provider)

    @property
    def is_late(self) -> bool:
        """Whether the index can wait for it no longer."""
        embedding, behind_s = self.config.embedding, self.notes.behind_s(self.config.index)
        if embedding.lane == "realtime":
            return True
        return behind_s is not None and behind_s >= embedding.lane_deadline

    def counts(self, texts: Sequence[str]) -> npt.NDArray[np.int32]:
        """Estimated tokens of each of `texts`."""
        return self.provider.estimate.counts(texts)

    def request_limits(self) -> Limits:
        """What one line of a job takes, as one call does."""
        return self.provider.limits.with_margin(self.provider.estimate.margin)


@contextmanager
def lane_held(config: Config, run_id: str) -> Iterator[BatchLane | None]:
    """Hold the Batch lane; None where the run has nothing to do with it.

    A run of the realtime lane has, where texts of an earlier choice are still there.
    """
    provider = open_provider(config)
    if not isinstance(provider, Voyage):
        yield None
        return
    notes = JobNotes(config.state.uri, provider.space)
    if config.embedding.lane == "realtime" and not notes.all():
        yield None
        return
    with notes.held(run_id):
        yield BatchLane(config, provider, notes)


@stage("take in from the Batch lane")
def take_in(lane: BatchLane, settled: Settled) -> None:
    """Bring what has come into the cache, and tell `settled`.

    Raises:
        EmbedOnceError: The provider does not tell.
    """
    if not lane.notes.all():
        return
    cache, index = Cache(lane.config.state.uri, lane.provider.space), lane.config.index.place
    try:
        if lane.is_late:
            settle_at_once(lane.provider, lane.jobs, lane.notes, cache, settled, index)
        else:
            settle(lane.provider, lane.jobs, lane.notes, cache, settled)
    except ProviderError as error:
        raise EmbedOnceError(
            f"{lane.config.name}: the Batch lane does not say what became of its jobs: {error} The "
            "index is as it was, nothing is lost. Run again."
        ) from error


@stage("submit to the Batch lane")
def submit_missing(lane: BatchLane, found: Survey, staging: Path) -> list[Submission]:
    """Submit what is missing, as far as budget and account allow; the rest is for later runs.

    Raises:
        BudgetReached: Not even the first text is within the budget.
        EmbedOnceError: The provider takes none; nothing is lost.
    """
    config, submitted = lane.config, list[Submission]()
    lane.notes.falls_behind(config.index)
    full_s, left_out = lane.notes.full_s(), "the account has too much under way in the Batch lane"
    if found.lane.name != "batch":
        return submitted
    if full_s is not None and full_s < FULL_S:
        get_run_logger().warning(
            "%s; the rest is submitted by a run in %s or later.",
            left_out, span_text(FULL_S - full_s),
        )  # fmt: skip
        return submitted
    budget = Budget(config.budget.max_usd, found.lane.usd_per_million_tokens)
    batches = _affordable(found.filling(lane, staging).batches(), budget, lane, staging)
    try:
        submitted.extend(
            submit(
                batches,
                jobs=lane.jobs,
                notes=lane.notes,
                folder=staging,
                index=config.index.place,
                usd_per_million_tokens=found.lane.usd_per_million_tokens,
            )
        )
    except ProviderThrottled:
        lane.notes.note_full()
        get_run_logger().warning(
            "%s; the rest is submitted by a run in %s or later.", left_out, span_text(FULL_S)
        )
        return submitted
    except ProviderError as error:
        raise EmbedOnceError(
            f"{config.name}: the Batch lane takes no texts: {error} The index is as it was, "
            "nothing is lost. Run again, or with --set embedding.lane=realtime."
        ) from error
    if not submitted and not found.looked_up.waiting:
        raise BudgetReached(
            f"{config.name}: the budget of {budget.told} is not enough for a single text. The "
            "index is as it was. Raise budget.max_usd."
        )
    return submitted


def _affordable(
    batches: Iterator[Batch], budget: Budget, lane: BatchLane, staging: Path
) -> Iterator[Batch]:
    """The first of `batches`, the last of them cut, that the budget is enough for by estimate."""
    left = budget.tokens_left
    for batch in batches:
        if left is None:
            yield batch
            continue
        rows = batch.table.load(BATCH)
        most = np.cumsum(rows.column("tokens").to_numpy() * (1 + lane.provider.estimate.margin))
        fits = int(np.searchsorted(most, left, side="right"))
        if fits < rows.num_rows:
            if fits:
                cut = staging / "cut"
                yield Batch.write(batch.number, cut, rows.slice(0, fits).to_batches())
            return
        left -= int(np.ceil(most[-1]))
        yield batch
