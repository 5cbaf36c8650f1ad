"""Limiter: lets a call go when the account and the calls in flight allow it.

One for all threads of a run. Waiting calls go in the order they came, so that small ones
cannot starve a large one; a slot is held only while sending.
"""

import math
import threading
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Protocol

from tasks.errors import (
    BatchRefused,
    BatchTooLarge,
    EmbedOnceError,
    ProviderBusy,
    ProviderDenied,
    ProviderError,
    ProviderThrottled,
)
from tasks.limits import Learned, Limits
from tasks.quota import Quota, Sending
from tasks.slots import Slots
from tasks.turns import REAL, Clock, Ticket, Turns

MINUTE_S = 60.0
"""Length of the provider's minute; a benchmark may shorten it."""

STEPS = 96
"""Calls a minute into which a quota of tokens that nobody named is cut.

With 24 the share used was 95 % and 0.8 to 2.6 % of the calls were refused, with 96 98 % and
under 1 %: a step above what is known to pass is smaller, and refusals are fewer among more.
"""

TELL_AFTER_S = 10.0
"""A wait this long is told to people."""

SHARED = "the quota shared with other runs"


class SharedWindow(Protocol):
    """The quota of one account that several runs share."""

    def take(self, tokens: int) -> float:
        """Reserve a call of `tokens`: 0.0, or the seconds after which to ask again."""

    def correct(self, reserved: int, billed: int) -> None:
        """Put what the provider counted in the place of what was reserved."""


@dataclass(frozen=True)
class LimiterStatistics:
    """What the limiter did.

    Attributes:
        waited_seconds: Time in which the next call waited, by what it waited for.
        throttled: Calls refused because of the account's limits.
        peak_in_flight: Most calls in flight at once.
        in_flight_seconds: Sum of the times that calls were in flight.
        slot_seconds: Sum of the times that slots were open; busy fraction is the ratio of the two.
        concurrency: Calls allowed in flight at the end.
        requests_per_minute: Quota in force at the end; None where none is known.
        tokens_per_minute: As above.
        limit_used_fraction: Share of the tightest quota that was used since the first call,
            0 where no quota is known.
    """

    waited_seconds: dict[str, float]
    throttled: int
    peak_in_flight: int
    in_flight_seconds: float
    slot_seconds: float
    concurrency: int
    requests_per_minute: int | None
    tokens_per_minute: int | None
    limit_used_fraction: float


class Limiter:
    """Lets calls go as fast as `limits`, and what the provider teaches, allow.

    Args:
        limits: What the account may ask, as far as it is known.
        max_wait_s: A call that waits so long while nobody gets an answer ends as an outage.
        clock: The time.
        least: What an account may ask that may ask least.
        shared: The part of the quota that other runs use too.
        tell: Is told, once, what a long wait is for.
    """

    def __init__(
        self,
        limits: Limits,
        *,
        max_wait_s: float = 600.0,
        least: Learned | None = None,
        clock: Clock = REAL,
        shared: SharedWindow | None = None,
        tell: Callable[[str], None] = lambda _message: None,
    ) -> None:
        self._limits = limits
        self._max_wait_s = max_wait_s
        self._clock = clock
        self._least = least or Learned()
        self._shared = shared
        self._tell = tell
        self._told: set[str] = set()
        self._lock = threading.Lock()
        now = clock.now()
        self._quota = Quota(
            limits.requests_per_minute, limits.tokens_per_minute, now=now, minute_s=MINUTE_S
        )
        self._slots = Slots(limits.concurrency, now)
        self._turns = Turns(clock, self._lock)
        self._stopped: EmbedOnceError | None = None
        self._progress_at = now
        self._failing_since: float | None = None
        self._first_at: float | None = None
        self._used = Counter[str]()
        self._waited = defaultdict[str, float](float)
        self._throttled = 0

    @contextmanager
    def sending(self, tokens: int, *, splittable: bool = True) -> Iterator[Sending]:
        """Wait until a call of `tokens` may be sent; the body is the call.

        An exception that leaves the body says how the call ended.

        Raises:
            BatchTooLarge: No minute of the account holds such a call.
            ProviderBusy: Nobody got an answer for too long.
            EmbedOnceError: What the limiter was stopped with.
        """
        sending = self._wait(tokens, splittable)
        try:
            yield sending
        except BaseException as error:
            learned = self._failed(sending, error)
            if learned is self._least:
                self._tell(
                    f"A call of {tokens:,} tokens is more than the account takes in a minute. It "
                    f"is taken for the smallest, of {learned.requests_per_minute} requests and "
                    f"{learned.tokens_per_minute:,} tokens a minute. If it has other limits, set "
                    "limits.requests_per_minute and limits.tokens_per_minute."
                )
            if learned is not None:
                raise BatchTooLarge(
                    f"A call of {tokens:,} tokens was refused twice after a minute without any "
                    "other: the account allows less in a minute.",
                    learned=learned,
                    tokens=None,
                ) from error
            raise
        self._answered(sending)

    @property
    def limits(self) -> Limits:
        """The limits in force now, those that the provider taught included."""
        with self._lock:
            most, allowed = self._limits.tokens_per_request, self._quota.tokens.quota
            if allowed is not None:
                # A whole number of calls uses all of a minute.
                most = allowed // math.ceil(allowed / min(most or allowed, allowed))
            if self._quota.tokens.ceiling is not None:
                # Found out, not told: small steps come nearer to the quota, if there is room
                # for so many requests.
                steps = max(1, min(STEPS, (self._quota.requests.limit or STEPS) // 2))
                fine = max(1, self._quota.tokens.ceiling // steps)
                most = min(most or fine, fine)
            return replace(
                self._limits,
                requests_per_minute=self._quota.requests.quota,
                tokens_per_minute=allowed,
                tokens_per_request=most,
            )

    def too_large(self, learned: Learned) -> None:
        """Take in what the provider says that one call, or one minute, takes."""
        with self._lock:
            self._learn(learned)

    def stop(self, error: EmbedOnceError) -> None:
        """End every call that waits, or comes later, with `error`; the first one counts."""
        with self._lock:
            self._stopped = self._stopped or error
            self._turns.wake_all()

    @property
    def stopped(self) -> EmbedOnceError | None:
        """What the limiter was stopped with."""
        return self._stopped

    def statistics(self) -> LimiterStatistics:
        """What it did until now."""
        with self._lock:
            now = self._clock.now()
            self._slots.tick(now)
            requests, tokens = self._quota.requests.limit, self._quota.tokens.limit
            minutes = max(
                1.0, (now - (now if self._first_at is None else self._first_at)) / MINUTE_S
            )
            shares = [
                self._used[name] / (limit * minutes)
                for name, limit in (("requests", requests), ("tokens", tokens))
                if limit
            ]
            return LimiterStatistics(
                waited_seconds=dict(self._waited),
                throttled=self._throttled,
                peak_in_flight=self._slots.peak,
                in_flight_seconds=self._slots.in_flight_seconds,
                slot_seconds=self._slots.slot_seconds,
                concurrency=self._slots.limit,
                requests_per_minute=requests,
                tokens_per_minute=tokens,
                limit_used_fraction=min(1.0, max(shares, default=0.0)),
            )

    def _wait(self, tokens: int, splittable: bool) -> Sending:
        with self._lock:
            ticket = self._turns.join(tokens, splittable=splittable)
        try:
            while True:
                message = ""
                with self._lock:
                    now = self._clock.now()
                    self._require_possible(ticket)
                    seconds, cause = self._delay(now, ticket)
                    # A reservation counts from now: after a wait it is old.
                    ticket.reserved = ticket.reserved and seconds == 0
                    ask = seconds == 0 and self._shared is not None and not ticket.reserved
                    if seconds == 0 and not ask:
                        return self._send(now, ticket)
                    if not ask:
                        message = self._news(now, ticket, seconds, cause)
                        if not message:
                            self._sleep(now, ticket, seconds, cause)
                # Outside the lock: both may take their time.
                if message:
                    self._tell(message)
                if ask and self._shared is not None:
                    wait = self._shared.take(tokens)
                    ticket.reserved, ticket.ask_at = not wait, self._clock.now() + wait
        finally:
            with self._lock:
                self._turns.leave(ticket)

    def _require_possible(self, ticket: Ticket) -> None:
        if self._stopped:
            raise self._stopped
        allowed = self._quota.tokens.quota
        if ticket.splittable and allowed is not None and ticket.tokens > allowed:
            raise BatchTooLarge(
                f"A call of {ticket.tokens:,} tokens can never pass: the account allows "
                f"{allowed:,} tokens per minute.",
                learned=Learned(tokens_per_minute=allowed, tokens_per_request=allowed),
                tokens=None,
            )

    def _delay(self, now: float, ticket: Ticket) -> tuple[float | None, str]:
        """Seconds until this call may go, None until it is woken; and what it waits for."""
        if not self._turns.first(ticket):
            return None, ""
        seconds, cause = self._quota.delay(now, ticket.tokens)
        if seconds <= 0 and not ticket.reserved and ticket.ask_at > now:
            seconds, cause = ticket.ask_at - now, SHARED
        if seconds <= 0 and not self._slots.free():
            return None, "calls in flight"
        return max(0.0, seconds), cause

    def _sleep(self, now: float, ticket: Ticket, seconds: float | None, cause: str) -> None:
        since = max(ticket.since, self._progress_at)
        if self._failing_since is not None:
            since = min(since, self._failing_since)
        left = since + self._max_wait_s - now
        if left <= 0:
            raise ProviderBusy(
                f"no answer for {now - since:,.0f} s; the next call waits for {cause or 'others'}",
                retry_after=None,
            )
        ticket.wake.wait(left if seconds is None else min(left, seconds))
        if cause:
            self._waited[cause] += self._clock.now() - now

    def _news(self, now: float, ticket: Ticket, seconds: float | None, cause: str) -> str:
        """What to tell of a long wait; "" where there is nothing new."""
        long = now - ticket.since if cause == SHARED else seconds or 0.0
        if long < TELL_AFTER_S or cause in self._told:
            return ""
        self._told.add(cause)
        if cause == SHARED:
            return f"{cause}: all used for {long:,.0f} s"
        used = self._quota.used(now).get(cause)
        return f"{cause}: {'' if used is None else f'{used:,} used, '}next in {seconds:,.0f} s"

    def _send(self, now: float, ticket: Ticket) -> Sending:
        if self._first_at is None:
            self._first_at = now
        return Sending(
            number=ticket.number,
            at_once=self._slots.take(now),
            call=self._quota.send(now, ticket.tokens),
        )

    def _answered(self, sending: Sending) -> None:
        with self._lock:
            now = self._clock.now()
            self._slots.release(now)
            billed = self._take_in(sending)
            self._slots.answered(now, sending.call.at, sending.at_once, billed)
            self._progress_at, self._failing_since = now, None
            self._turns.wake_first()

    def _take_in(self, sending: Sending) -> int:
        # An answer may say 0 although the account is charged: then our own count stands.
        billed = sending.billed_tokens or sending.call.tokens
        self._used.update(requests=1, tokens=billed)
        self._quota.answered(sending.call, billed, sending.learned)
        if self._shared:
            self._shared.correct(sending.call.tokens, billed)
        self._learn(sending.learned)
        return billed

    def _failed(self, sending: Sending, error: BaseException) -> Learned | None:
        """Take in how a call failed; what a minute holds where it does not hold this call."""
        with self._lock:
            now, call = self._clock.now(), sending.call
            self._slots.release(now)
            facts = error.facts if isinstance(error, ProviderError) else {}
            learned = facts.get("learned") or Learned()
            too_large = False
            if isinstance(error, ProviderThrottled):
                self._throttled += 1
                if facts.get("streams"):
                    self._slots.too_many(now, call.at, sending.at_once)
                    self._quota.rejected(call)
                else:
                    too_large = self._quota.refused(now, call, learned, facts.get("retry_after"))
                if too_large:
                    learned = self._smaller(call.tokens, learned)
                else:
                    self._turns.send_back(sending.number, call.tokens)
            elif sending.billed_tokens is not None:
                self._take_in(sending)
            elif isinstance(error, BatchTooLarge | BatchRefused):
                self._quota.rejected(call)
                self._progress_at, self._failing_since = now, None
            else:
                self._quota.lost(now, call, facts.get("retry_after"))
                if isinstance(error, ProviderBusy):
                    self._slots.busy(now, call.at)
            if isinstance(error, ProviderDenied):
                self._stopped = self._stopped or error
            if self._failing_since is None and isinstance(error, ProviderThrottled | ProviderBusy):
                self._failing_since = now
            self._learn(learned)
            self._turns.wake_all()
            return learned if too_large else None

    def _smaller(self, tokens: int, learned: Learned) -> Learned:
        """What to send instead of a call of `tokens` that no minute holds.

        Where the provider does not say, it is the account that gets least, if that explains
        it: no other is so small, and to halve a call costs minutes each time.
        """
        least = self._least
        unsaid = learned.requests_per_minute is None and learned.tokens_per_minute is None
        if unsaid and least.tokens_per_minute is not None and tokens > least.tokens_per_minute:
            return least
        return replace(learned, tokens_per_request=max(1, tokens // 2))

    def _learn(self, learned: Learned) -> None:
        self._quota.learn(learned)
        texts, tokens = self._limits.texts_per_request, self._limits.tokens_per_request
        if learned.texts_per_request is not None:
            texts = min(texts, learned.texts_per_request)
        if learned.tokens_per_request is not None:
            tokens = min(tokens or learned.tokens_per_request, learned.tokens_per_request)
        self._limits = replace(self._limits, texts_per_request=texts, tokens_per_request=tokens)
