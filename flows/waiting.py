"""Waiting: what a run does with the Batch lane. No process sits there until its texts come.

A run takes in what has come, submits what is missing, and ends; the next one goes on.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt
import pyarrow as pa
from prefect import get_run_logger

from tasks.budget import Budget
from tasks.cache import Cache
from tasks.claims import Claims
from tasks.errors import BudgetReached, EmbedOnceError, ProviderError, ProviderThrottled
from tasks.harvest import Settled
from tasks.job_notes import JobNotes, Submission
from tasks.jobs import settle, settle_at_once, submit
from tasks.journal import RunFolder
from tasks.limits import Limits, tokens_of
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
    """The Batch lane of a run's space.

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
    def is_used(self) -> bool:
        """Whether the run has to do with it; of the realtime lane, if an earlier choice has."""
        return self.config.embedding.lane != "realtime" or bool(self.notes.all())

    @property
    def is_late(self) -> bool:
        """Whether the index can wait for it no longer."""
        embedding, behind_s = self.config.embedding, self.notes.behind_s(self.config.index)
        if embedding.lane == "realtime":
            return True
        return behind_s is not None and behind_s >= embedding.lane_deadline

    def counts(self, texts: pa.Array) -> npt.NDArray[np.int32]:
        """Estimated tokens of each of `texts`, utf8."""
        return tokens_of(self.provider.estimate, texts)

    def request_limits(self) -> Limits:
        """What one line of a job takes, as one call does."""
        return self.provider.limits.with_margin(self.provider.estimate.margin)


def batch_lane(config: Config) -> BatchLane | None:
    """The Batch lane of a run; None where its provider has none."""
    provider = open_provider(config)
    if not isinstance(provider, Voyage):
        return None
    return BatchLane(config, provider, JobNotes(config.state.uri, provider.space))


@stage("take in from the Batch lane")
def take_in(lane: BatchLane, settled: Settled) -> None:
    """Bring what has come into the cache, and tell `settled`.

    Raises:
        EmbedOnceError: The provider does not tell of jobs of this index.
    """
    config = lane.config
    cache, index = Cache(config.state.uri, lane.provider.space), config.index.place
    if not lane.is_late:
        settle(lane.provider, lane.jobs, lane.notes, cache, settled)
    else:
        with _told(config):
            settle_at_once(lane.provider, lane.jobs, lane.notes, cache, settled, index)
    for submission, error in settled.troubles:
        if submission.index == index:
            with _told(config):
                raise error
        get_run_logger().warning(
            "What became of a job for the index %s is not known: %s", submission.index, error
        )


@contextmanager
def _told(config: Config) -> Iterator[None]:
    """Say what it means for the run that the provider does not tell."""
    try:
        yield
    except ProviderError as error:
        raise EmbedOnceError(
            f"{config.name}: the Batch lane does not say what became of its jobs: {error} The "
            "index is as it was, nothing is lost. Run again."
        ) from error


@stage("submit to the Batch lane")
def submit_missing(lane: BatchLane, found: Survey, folder: RunFolder) -> list[Submission]:
    """Submit what is missing, as far as budget and account allow; the rest is for later runs.

    Raises:
        BudgetReached: Not even the first text is within the budget.
        EmbedOnceError: The provider takes none; nothing is lost.
    """
    config, submitted, staging = lane.config, list[Submission](), folder.staging
    lane.notes.falls_behind(config.index)
    if found.lane.name != "batch":
        return submitted
    full_s = lane.notes.full_s()
    if full_s is not None and full_s < FULL_S:
        _warn_full(FULL_S - full_s)
        return submitted
    budget = Budget(config.budget.max_usd, found.lane.usd_per_million_tokens)
    batches = _unclaimed(found.filling(lane, staging).batches(), Claims(folder, found.cache))
    try:
        submitted.extend(
            submit(
                _affordable(batches, budget, lane, staging / "affordable"),
                jobs=lane.jobs,
                notes=lane.notes,
                folder=staging,
                index=config.index.place,
                usd_per_million_tokens=found.lane.usd_per_million_tokens,
            )
        )
    except ProviderThrottled:
        lane.notes.note_full()
        _warn_full(FULL_S)
    except ProviderError as error:
        if not submitted:
            raise EmbedOnceError(
                f"{config.name}: the Batch lane takes no texts: {error} The index is as it was, "
                "nothing is lost. Run again, or with --set embedding.lane=realtime."
            ) from error
        get_run_logger().warning("The rest is submitted by the next run: %s", error)
    if not submitted and budget.max_usd is not None and not found.looked_up.waiting:
        raise BudgetReached(
            f"{config.name}: the budget of {budget.told} is not enough for a single text. The "
            "index is as it was. Raise budget.max_usd."
        )
    return submitted


def _warn_full(seconds: float) -> None:
    get_run_logger().warning(
        "The account has too much under way in the Batch lane; the rest is submitted by a run in "
        "%s or later.", span_text(seconds),
    )  # fmt: skip


def _unclaimed(batches: Iterator[Batch], claims: Claims) -> Iterator[Batch]:
    """Of `batches` what no other living run is sending; the next run finds it in the cache."""
    for batch in batches:
        rows = batch.table.load(BATCH)
        free = claims.standing(rows.column("text_hash").combine_chunks()).free
        if free.all():
            yield batch
        elif free.any():
            folder = Path(batch.table.path).parent / "unclaimed"
            yield Batch.write(batch.number, folder, rows.filter(pa.array(free)).to_batches())


def _affordable(
    batches: Iterator[Batch], budget: Budget, lane: BatchLane, folder: Path
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
                yield Batch.write(batch.number, folder, rows.slice(0, fits).to_batches())
            return
        left -= int(np.ceil(most[-1]))
        yield batch
