"""Sender: what all batches of a run share in one process: its limits, and what it has learned."""

import random
import threading
import time
from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Literal

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from tasks.budget import Budget
from tasks.cache import Cache
from tasks.claims import POLL_S, Claims, Standing
from tasks.errors import BudgetReached, EmbedOnceError, RunStopped
from tasks.journal import RunFolder, StoredAnswer
from tasks.limiter import TELL_AFTER_S, Limiter
from tasks.limits import Estimator, Learned, Limits, Packer, tokens_of
from tasks.notes import Call
from tasks.progress import Progress, tell, tell_waiting
from tasks.providers import Provider
from tasks.shared_limits import shared_window
from tasks.tokens import Calibration, Estimate, load, save

PROOF_AFTER = 8
"""So many texts refused in a row: see whether the provider takes any text at all."""

RETRY_S = 1.0
"""Before the first retry of a batch, in seconds; each further one waits twice as long."""

ANSWERS_S = 20.0
"""So long answers in flight are waited for after a cancel. Prefect kills a cancelled run after
30 s; the rest of them is for the cache, the ledger and the artifacts."""

GIVEN_UP_S = 2.0
"""So long a batch may take to notice that its call was given up."""

Arrived = Callable[[StoredAnswer], None]
OnError = Literal["quarantine", "fail_fast", "collect"]


@dataclass(frozen=True)
class Terms:
    """What all batches of a run share. A value: it crosses to other processes.

    Attributes:
        provider: Who embeds; no retries of its own.
        folder: The run's folder, with its journal.
        usd_per_million_tokens: List price.
        on_error: What becomes of a text that is refused.
        max_wait_s: Seconds without any answer that count as an outage.
        shared: Whether the account's limits are shared with other runs.
        max_usd: Most that the run may cost; None: no limit.
        anew: Whether texts are sent although their vectors are known, to verify those.
        index: Folder and table they are sent for; "" where for none.
    """

    provider: Provider
    folder: RunFolder
    usd_per_million_tokens: float
    on_error: OnError = "quarantine"
    max_wait_s: float = 600.0
    shared: bool = False
    max_usd: float | None = None
    anew: bool = False
    index: str = ""


class Sender:
    """Who sends for a run, in this process.

    Attributes:
        limiter: Lets a call go when account and concurrency allow it.
        budget: What may still be spent.
        answers: Good answers of this run so far.
        refusals: Texts refused since the last good answer.
        proven: Whether the provider is known to take texts now.
        calls: Calls that have ended, by batch.
        arrived: Is told of each answer that is durable.
        turn: Held by who decides what to send next, until the limiter lets it go.
        claims: What it sends, held against what other runs send.

    Args:
        terms: What all batches of the run share.
        cache: Vectors known, where this process has them open.
    """

    def __init__(self, terms: Terms, cache: Cache | None = None) -> None:
        self._folder = folder = terms.folder
        self._provider = provider = terms.provider
        self._calibration: Calibration | None = None
        if isinstance(provider.estimate, Estimate):
            space = provider.space
            self._calibration = load(folder.state_uri, space.provider, space.model)
        self.answers = 0
        self.refusals = 0
        self.proven = False
        self.calls: defaultdict[int, list[Call]] = defaultdict(list)
        self.arrived: Arrived = lambda _: None
        self.turn = threading.Lock()
        self._stopped = threading.Event()
        self._at_work = 0
        self._rests = threading.Condition()
        self._told_of_others = False
        if cache is None:
            cache = Cache(folder.state_uri, provider.space)
        self.claims = Claims(folder, cache)
        self.budget = Budget(terms.max_usd, terms.usd_per_million_tokens)
        self.limiter = Limiter(
            provider.limits,
            max_wait_s=terms.max_wait_s,
            least=provider.least,
            shared=shared_window(provider) if terms.shared else None,
            tell=tell_waiting,
        )

    def counts(self, texts: pa.Array) -> npt.NDArray[np.int32]:
        """Tokens of each of `texts`, utf8, by what is known by now."""
        return tokens_of(self._estimate(), texts)

    def sizes(self, texts: pa.Array) -> npt.NDArray[np.int32]:
        """What the tokens of each of `texts` follow from, whatever is learned."""
        return self._provider.estimate.sizes(texts)

    def request_limits(self) -> Limits:
        """What one call takes by now, with a margin for estimates."""
        return self.limiter.limits.with_margin(self._estimate().margin)

    def fitting(self, sizes: npt.NDArray[np.int32]) -> tuple[int, int]:
        """How many texts of these `sizes`, from the first, go into one call, and their tokens."""
        limits, counts = self.limiter.limits, self._estimate().of_sizes(sizes)
        tokens, most = int(counts.sum()), limits.tokens_per_request
        if len(counts) <= limits.texts_per_request and (most is None or tokens <= most):
            return len(counts), tokens
        packer, fits = Packer(self.request_limits()), 0
        while fits < len(counts) and packer.place(int(counts[fits])) == 1:
            fits += 1
        return fits, int(counts[:fits].sum())

    def affordable(self, sizes: npt.NDArray[np.int32]) -> int:
        """How many texts of these `sizes`, from the first, the budget covers, with a margin.

        Raises:
            BudgetReached: Not for a single one, whatever calls in flight turn out to cost.
            RunStopped: The run has been ended meanwhile.
        """
        if self.budget.tokens_left is None:
            return len(sizes)
        estimate = self._estimate()
        tokens = np.asarray(estimate.of_sizes(sizes) * (1 + estimate.margin), np.float64)
        while not (affordable := self.budget.affords(tokens)):
            if self.limiter.stopped:
                raise self.limiter.stopped
            if not self.budget.wait_for_a_bill():
                raise BudgetReached(
                    f"The budget of {self.budget.told} is reached; nothing more is "
                    "sent. Run again to go on, or raise budget.max_usd."
                )
        return affordable

    def ahead(self, most: int) -> int:
        """How many batches may wait to be sent: no more than a minute takes, and `most`.

        What waits was cut by an estimate that the answers until then make better.
        """
        limits = self.limiter.limits
        a_minute = [float(most)]
        if limits.requests_per_minute:
            a_minute.append(limits.requests_per_minute)
        if limits.tokens_per_minute and limits.tokens_per_request:
            a_minute.append(limits.tokens_per_minute / limits.tokens_per_request)
        return max(1, int(min(a_minute)))

    def works(self) -> None:
        """Note that the provider has just taken a text."""
        self.answers, self.refusals, self.proven = self.answers + 1, 0, True

    def refuses(self) -> None:
        """Note that the provider has just refused a single text; too often is no text's fault."""
        self.refusals += 1
        if self.refusals >= PROOF_AFTER:
            self.proven = False

    def learn(self, sizes: npt.NDArray[np.int32], billed_tokens: int) -> None:
        """Take in what the provider has counted for texts of these `sizes`."""
        if self._calibration is not None:
            self._calibration.learn(sizes, billed_tokens)

    def too_large(self, sizes: npt.NDArray[np.int32], tokens: int | None, learned: Learned) -> None:
        """Take in that a call was too large; `tokens` is the provider's own count of it."""
        self.limiter.too_large(learned)
        if tokens is not None and self._calibration is not None:
            self._calibration.too_large(sizes, tokens)

    def wait_for_others(self, hashes: pa.Array) -> Standing:
        """Wait until not all of these texts are on their way in another run.

        However long that takes: it is no outage of the provider.

        Raises:
            EmbedOnceError: What the sender was stopped with.
        """
        since = time.monotonic()
        while (standing := self.claims.standing(hashes)).taken.all():
            # Not in step: those that gave way to each other would meet again and again.
            self._stopped.wait(POLL_S * random.uniform(0.5, 1))  # noqa: S311
            if self.limiter.stopped:
                raise self.limiter.stopped
            if not self._told_of_others and time.monotonic() - since > TELL_AFTER_S:
                self._told_of_others = True
                tell_waiting(f"texts that another run is embedding: {len(hashes):,}")
        return standing

    def stop(self, error: EmbedOnceError) -> None:
        """Let nothing more be sent: what waits, and what comes later, ends with `error`."""
        self.limiter.stop(error)
        self._stopped.set()

    @property
    def stopped(self) -> bool:
        """Whether nothing more is sent."""
        return self._stopped.is_set()

    def pause_before(self, attempt: int) -> None:
        """Wait before a retry: 1, 2, 4, … s, give or take a half, or until all is stopped."""
        if attempt > 1:
            spread = random.uniform(0.5, 1.5)  # noqa: S311
            self._stopped.wait(RETRY_S * 2 ** (attempt - 2) * spread)

    @contextmanager
    def at_work(self) -> Iterator[None]:
        """Count a batch as at work: its calls may be in flight, its answers not yet durable."""
        with self._rests:
            self._at_work += 1
        try:
            yield
        finally:
            with self._rests:
                self._at_work -= 1
                self._rests.notify_all()

    def rest(self, within_s: float) -> bool:
        """Wait until no batch is at work; False where that took more than so many seconds."""
        with self._rests:
            return self._rests.wait_for(lambda: not self._at_work, within_s)

    def settle(self, why: str) -> None:
        """Send nothing more, and wait for answers in flight; another cancel ends the wait."""
        self.stop(RunStopped(why))
        tell(Progress("cancelling", note="cancelled: waiting for answers in flight"))
        rests = False
        try:
            rests = self.rest(ANSWERS_S)
        finally:
            if not rests:  # it ends the calls of all runs in this process
                self._provider.give_up()
        self.rest(GIVEN_UP_S)

    def save(self) -> None:
        """Keep what was learned of tokens for the next run."""
        if self._calibration is not None:
            save(self._folder.state_uri, self._folder.run_id, self._calibration)

    def _estimate(self) -> Estimator:
        return self._calibration.estimate() if self._calibration else self._provider.estimate


_senders: dict[RunFolder, Sender] = {}
_lock = threading.Lock()


def sender_of(terms: Terms, cache: Cache | None = None) -> Sender:
    """The one that all batches of this run in this process share; made with `cache`."""
    with _lock:
        if terms.folder not in _senders:
            _senders[terms.folder] = Sender(terms, cache)
        return _senders[terms.folder]


def forget_sender(folder: RunFolder) -> None:
    """Let go of the sender of a run that has ended."""
    with _lock:
        _senders.pop(folder, None)
