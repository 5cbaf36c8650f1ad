"""Embedding: what nobody has paid for goes out as mapped tasks, a batch a task.

Answers are folded into the cache in groups as they come in, failures are kept for the end.
"""

import itertools
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress

from prefect import task, unmapped
from prefect.cache_policies import NO_CACHE
from prefect.futures import PrefectFuture, as_completed
from prefect.runtime import task_run

from flows.cancelling import ENDS
from tasks.artifacts import ProgressArtifact
from tasks.aside import Aside
from tasks.claims import Shared, take_up
from tasks.embed import RETRIES, Embedded, embed_batch, retry_when_busy
from tasks.errors import BudgetReached, EmbedOnceError, RunStopped, StorageFailed
from tasks.fill import Filled
from tasks.journal import RunFolder, StoredAnswer, fold
from tasks.limiter import LimiterStatistics
from tasks.notes import Refused
from tasks.progress import Progress, listening, tell
from tasks.providers import Provider
from tasks.run import embedded_texts
from tasks.schemas import Batch
from tasks.sender import GIVEN_UP_S, Sender, Terms, sender_of
from tasks.survey import Survey
from tasks.workers import workers_of

WAVE = 2
"""Batches mapped at once, by concurrency; so many more may be in flight."""
FOLDS_AHEAD = 3
"""Most vectors, in folds, that come in while others are folded: each fold costs 0.3 s by itself, so
what has come meanwhile goes together."""


@task(
    name="embed batch",
    task_run_name="embed batch {batch.number}",
    retries=RETRIES,
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


def embed_all(
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
    with workers_of(found.config, found.provider, needed=bool(found.packed.texts)) as provider:
        return _embed_all(found, folder, provider)


def _embed_all(
    found: Survey, folder: RunFolder, provider: Provider
) -> tuple[Filled, list[Refused], Shared, LimiterStatistics]:
    config = found.config
    terms = Terms(
        provider,
        folder,
        found.facts.usd_per_million_tokens,
        on_error=config.on_error,
        max_wait_s=config.limits.max_wait,
        shared=config.limits.shared,
        max_usd=config.budget.max_usd,
        index=config.index.place,
    )
    if found.packed.texts:  # a model may take long to load, and a run with nothing new needs none
        provider.prepare()
    sender = sender_of(terms, found.cache)
    filling = found.filling(sender, folder.staging)
    collected = _Collected(folder, found, sender)
    with ExitStack() as shown:
        progress = None
        if found.packed.texts:
            progress = shown.enter_context(ProgressArtifact(config.name))
            shown.enter_context(listening(progress))
        with ExitStack() as stack:
            stack.enter_context(collected.ending_the_run())
            stack.callback(sender.save)
            sending = Aside(lambda: _send(filling.batches(), terms, collected))
            try:
                sending.result()
            except ENDS:
                sender.settle("The run was cancelled.")
                if not sending.prevent():
                    sending.wait_at_most(GIVEN_UP_S)
                with suppress(EmbedOnceError):  # then the next run folds them
                    collected.fold()
                raise
            except BaseException:  # what waits is not sent any more
                sender.stop(RunStopped("The run was ended."))
                raise
        collected.finish()
        if progress is not None:  # a text that left the corpus meanwhile is not missed
            progress.finish()
    filled = filling.finish(found.refused(collected.refused))
    return filled, collected.refused, collected.shared, sender.limiter.statistics()


def _send(batches: Iterator[Batch], terms: Terms, collected: "_Collected") -> None:
    """Map batch after batch, and take in what they bring, until all is in or nothing may be sent.

    Done aside: tasks and whoever waits for them share locks.
    """
    sender, first = sender_of(terms), True
    size = WAVE * terms.provider.limits.concurrency
    going = itertools.takewhile(lambda _: not sender.stopped, batches)
    with collected.ending_the_run():
        while wave := list(itertools.islice(going, 1 if first else sender.ahead(size))):
            if sender.stopped:
                break
            collected.flying += embed.map(wave, unmapped(terms))
            # The first answer tells how large the next batches may be.
            collected.take(down_to=0 if first else sender.ahead(size))
            first = False
    collected.take(down_to=0)


class _Collected:
    """Answers as they come in: folded in groups, failures kept for the end."""

    def __init__(self, folder: RunFolder, found: Survey, sender: Sender) -> None:
        self._folder = folder
        self._found = found
        self._sender = sender
        self._brought: dict[int, list[StoredAnswer]] = {}
        self._unfolded: list[StoredAnswer] = []
        self._fold: Aside[None] | None = None
        sender.arrived = self._arrived
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

    def _arrived(self, answer: StoredAnswer) -> None:
        self._brought.setdefault(answer.call.batch, []).append(answer)

    def _keep(self, outcome: Embedded) -> None:
        # Not sooner: a retry of the batch looks for its own answers in the journal.
        self._unfolded += self._brought.pop(outcome.batch, ())
        self.refused += outcome.refused
        self.shared.add(outcome.found, outcome.found_tokens)
        self._waiting += outcome.texts * self._found.provider.space.vector_bytes
        self._done += outcome.texts + len(outcome.refused) + len(outcome.found)
        tell(Progress("embedding", self._done, self._found.packed.texts))
        ready = self._waiting // self._found.sizes.folded
        if ready >= FOLDS_AHEAD or (ready and (self._fold is None or self._fold.ended)):
            self._fold_aside()

    def _fold_aside(self) -> None:
        """Fold all that has come while more comes in."""
        if self._fold is not None:
            self._fold.wait()
        if self._sender.stopped:  # then all is folded at the end
            return
        answers, self._unfolded, self._waiting = self._unfolded, [], 0

        def work() -> None:
            with self.ending_the_run():
                fold(self._folder, self._found.cache, answers)
            answers.clear()  # else they are held until the next fold, the last ones to the end

        self._fold = Aside(work)
        self._fold.start()

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

    def fold(self) -> None:
        """Fold what is not folded yet, of batches that failed too.

        Raises:
            EmbedOnceError: The cache cannot be written; the answers stay in the journal.
        """
        if self._fold is not None:
            self._fold.result()
        answers, self._unfolded = self._unfolded, []
        fold(self._folder, self._found.cache, answers)
        fold(self._folder, self._found.cache)

    def finish(self) -> None:
        """Fold the rest, of batches that failed too, then say what failed."""
        with self.ending_the_run():
            self.fold()
        if not self.failed:
            take_up(self._found.cache, self._folder.state_uri, self.shared.hashes)
            return
        kept = "what was paid for is kept"
        with suppress(StorageFailed):
            done = embedded_texts(self._folder.calls())
            kept = f"{done:,} texts of {self._found.packed.texts:,} are paid for and kept"
        if lost := sum(getattr(error, "facts", {}).get("lost", 0) for error in self.failed):
            kept += f"; {lost:,} more were paid for and are lost"
        name = self._found.config.name
        if all(isinstance(error, BudgetReached) for error in self.failed):
            raise BudgetReached(
                f"{name}: the budget of {self._sender.budget.told} is reached. The "
                f"index is as it was; {kept}. Run again to go on, or raise budget.max_usd."
            )
        first = next(each for each in self.failed if not isinstance(each, BudgetReached))
        raise EmbedOnceError(
            f"{name}: not all texts could be embedded: {first} The index is as "
            f"it was; {kept}. Run again: only the rest is embedded."
        ) from first
