"""What an account still allows now: plain arithmetic on a clock that the caller brings.

How the provider counts its minute is not documented. A log of the last minute that never
holds more than the quota is safe for a sliding minute and for fixed ones alike, and uses
all of it; a bucket that starts full sends twice the quota in its first minute, and one of
a request's size wastes that size every minute. Calls are spaced evenly only after a refusal
that the log does not explain: then the provider may watch shorter times than a minute. Until
then a corpus below one minute's quota is done at once.
"""

from collections import deque
from dataclasses import dataclass, field

from tasks.limits import SLACK, Learned

LATE = 1 / 240
"""Part of a minute that evenly spaced calls may catch up after a delay."""

PAUSES = (1 / 60, 4 / 60, 16 / 60, 1 + SLACK)
"""Minutes without a call after the first, second … refusal in a row."""

LONGEST_PAUSE_S = 300.0
"""Most seconds that a provider's own Retry-After is believed."""

LARGEST_GAP = 256
"""Most successes between two looks above a ceiling that holds: well under 1 % of the calls."""

NEARLY = 0.9
"""A limit this full, compared with the fullest, may be the one that a refusal is about."""


@dataclass(slots=True)
class Entry:
    """One call in the log: when it was sent (seconds) and what it counts for."""

    at: float
    amount: int
    refused: bool = False
    past: bool = False


class Window:
    """One limit: what the last minute holds, and what it may hold.

    Attributes:
        name: As people are told, such as "tokens per minute".
        quota: What the configuration or the provider names; None where nobody does.
        ceiling: What refusals without numbers taught; None as long as there were none.
        paced: Whether calls are spaced evenly.
    """

    def __init__(self, name: str, quota: int | None, minute_s: float = 60.0) -> None:
        self.name = name
        self.quota = quota
        self.ceiling: int | None = None
        self.paced = False
        self.gap = 0
        self._longest_gap = 2
        self._minute_s = minute_s
        self._span = minute_s * (1 + SLACK)
        self._log: deque[Entry] = deque()
        self._used = 0
        self._refused = 0
        self._next = 0.0

    @property
    def limit(self) -> int | None:
        """What a minute may hold now."""
        known = [limit for limit in (self.quota, self.ceiling) if limit is not None]
        return min(known) if known else None

    def used(self, now: float) -> int:
        """What the last minute holds."""
        while self._log and self._log[0].at + self._span <= now:
            entry = self._log.popleft()
            entry.past = True
            self._used -= entry.amount
            self._refused -= entry.amount * entry.refused
        return self._used

    def accepted(self, now: float) -> int:
        """What the last minute holds of calls that were not refused."""
        return self.used(now) - self._refused

    def delay(self, now: float, amount: int, *, above: bool = False) -> float:
        """Seconds until `amount` may be sent; with `above`, over the ceiling.

        What no minute can hold waits until the last minute is empty, and goes alone.
        """
        above = above and self.ceiling is not None
        limit = self.quota if above else self.limit
        if limit is None:
            return 0.0
        excess = self.used(now) + amount - limit
        wait = self._next - now if self.paced and self._log and not above else 0.0
        for entry in self._log:
            if excess <= 0:
                break
            excess -= entry.amount
            wait = max(wait, entry.at + self._span - now)
        return max(0.0, wait)

    def take(self, now: float, amount: int) -> Entry:
        """Count `amount` as sent."""
        self.used(now)
        entry = Entry(now, amount)
        self._log.append(entry)
        self._used += amount
        # A call that goes a little late does not delay the next ones.
        self._next = max(self._next, now - LATE * self._minute_s) + self._share(amount)
        return entry

    def correct(self, entry: Entry, amount: int) -> None:
        """Put what the provider counted in the place of what was assumed."""
        self._next += self._share(amount - entry.amount)
        if not entry.past:
            self._used += amount - entry.amount
        entry.amount = amount

    def refuse(self, entry: Entry, amount: int) -> None:
        """Count a refused call for `amount`."""
        self.correct(entry, amount)
        entry.refused = True
        self._refused += 0 if entry.past else amount

    def look_less(self) -> None:
        """Be slower to look above the ceiling: it was refused there once more."""
        self.gap = self._longest_gap = min(4 * self._longest_gap, LARGEST_GAP)

    def look_more(self) -> None:
        """Be quicker to look above the ceiling: it gave way."""
        self.gap //= 2
        self._longest_gap -= self._longest_gap // 4

    def _share(self, amount: int) -> float:
        """Seconds that `amount` takes at an even pace."""
        return amount * self._span / self.limit if self.limit else 0.0


@dataclass(slots=True)
class Call:
    """One call as it was sent: what it took, and what the last minute held before it."""

    at: float
    tokens: int
    entries: tuple[Entry, Entry]
    before: tuple[int, int]
    alone: bool
    above: list[Window] = field(default_factory=list)


@dataclass
class Sending:
    """One call in flight.

    Attributes:
        number: Its place in the queue.
        at_once: Calls in flight when it was sent, with this one.
        call: What it took of the quota.
    """

    number: int
    at_once: int
    call: Call
    billed_tokens: int | None = None
    learned: Learned = field(default_factory=Learned)

    def answered(self, billed_tokens: int, learned: Learned | None = None) -> None:
        """Say that the provider answered, what it counted and which limits it named."""
        self.billed_tokens, self.learned = billed_tokens, learned or Learned()


class Quota:
    """Requests and tokens a minute of one account, and what its answers teach about them.

    A refused or rejected call counts as a request but not as tokens: whether it does is
    undocumented, and so the pace is safe in both cases.
    """

    def __init__(
        self, requests: int | None, tokens: int | None, *, now: float, minute_s: float = 60.0
    ) -> None:
        self.requests = Window("requests per minute", requests, minute_s)
        self.tokens = Window("tokens per minute", tokens, minute_s)
        self.paused_until = now
        self._minute_s = minute_s
        self._span = minute_s * (1 + SLACK)
        self._born = now
        self._warned_at: float | None = None
        self._looking: Call | None = None
        self._look_after = now
        self._successes = 0
        self._in_a_row = 0
        self._refused_at = now - 1
        self._refused_alone = set[int]()

    @property
    def _windows(self) -> tuple[Window, Window]:
        return self.requests, self.tokens

    def delay(self, now: float, tokens: int) -> tuple[float, str]:
        """Seconds until a call of `tokens` may be sent, and what it waits for."""
        waits = [(self.paused_until - now, "the provider's pause")]
        for window, amount in zip(self._windows, (1, tokens), strict=True):
            above = self._may_look(now, window)
            waits.append((window.delay(now, amount, above=above), window.name))
        return max((max(wait, 0.0), cause) for wait, cause in waits)

    def send(self, now: float, tokens: int) -> Call:
        """Count a call as sent now."""
        before = self.requests.accepted(now), self.tokens.accepted(now)
        alone = not self.requests.used(now) and now - self._born >= self._minute_s
        call = Call(
            now, tokens, (self.requests.take(now, 1), self.tokens.take(now, tokens)), before, alone
        )
        for window in self._windows:
            if window.ceiling is not None and window.used(now) > window.ceiling:
                call.above.append(window)
        if call.above:
            self._looking, self._successes = call, 0
        return call

    def answered(self, call: Call, billed: int, learned: Learned) -> None:
        """Take in an answer."""
        self._in_a_row = 0
        self._refused_alone.clear()
        self._successes += 1
        for window, entry, held in zip(self._windows, call.entries, call.before, strict=True):
            if window in call.above:
                window.ceiling = max(window.ceiling or 0, held + entry.amount)
                window.look_more()
        self._end_look(call)
        self.tokens.correct(call.entries[1], billed)
        self.learn(learned)

    def lost(self, now: float, call: Call, retry_after: float | None) -> None:
        """Take in that no answer came: the account may be charged all the same."""
        self._end_look(call)
        self._pause(now, retry_after or 0.0)

    def rejected(self, call: Call) -> None:
        """Take in that the provider did not work on a call."""
        self._end_look(call)
        self.tokens.correct(call.entries[1], 0)

    def refused(self, now: float, call: Call, learned: Learned, retry_after: float | None) -> bool:
        """Take in a refusal; True where the call is too large for any minute."""
        self._end_look(call)
        self.requests.refuse(call.entries[0], 1)
        self.tokens.refuse(call.entries[1], 0)
        self.learn(learned)
        first = call.at > self._refused_at
        if first:
            self._refused_at = now
            self._in_a_row += 1
        if retry_after is not None:
            self._pause(now, retry_after)
        elif first:
            self._pause(now, PAUSES[min(self._in_a_row, len(PAUSES)) - 1] * self._minute_s)
        if not self._explained(call):
            self._infer(now, call, first=first, told=retry_after is not None)
        if not call.alone:
            return False
        # By size: several such calls may take turns.
        again = call.tokens in self._refused_alone
        self._refused_alone ^= {call.tokens}
        return again

    def learn(self, learned: Learned) -> None:
        """Take in limits that the provider names; they only ever lower ours."""
        named = learned.requests_per_minute, learned.tokens_per_minute
        for window, limit in zip(self._windows, named, strict=True):
            if limit is not None:
                window.quota = limit if window.quota is None else min(limit, window.quota)

    def used(self, now: float) -> dict[str, int]:
        """What the last minute holds, by the name of the limit."""
        return {window.name: window.used(now) for window in self._windows}

    def _pause(self, now: float, seconds: float) -> None:
        self.paused_until = max(self.paused_until, now + min(seconds, LONGEST_PAUSE_S))

    def _explained(self, call: Call) -> bool:
        """Whether the refusal follows from limits that were named meanwhile."""
        amounts = 1, call.tokens
        return any(
            window.quota is not None and held + amount > window.quota
            for window, held, amount in zip(self._windows, call.before, amounts, strict=True)
        )

    def _infer(self, now: float, call: Call, *, first: bool, told: bool) -> None:
        """Lower the ceiling to what the minute before a refusal held."""
        amounts = 1, call.tokens
        shares = [
            (held + amount) / window.limit if window.limit else 1.0
            for window, held, amount in zip(self._windows, call.before, amounts, strict=True)
        ]
        known = all(window.quota is not None for window in self._windows)
        if self._warned_at is None and (known or told):
            # Once, a named pause or an even pace may be all it takes.
            self.requests.paced = self.tokens.paced = True
            self._warned_at = now
            return
        if self._warned_at is not None and call.at <= self._warned_at:
            return
        self._look_after = now + self._span
        for window, held, share in zip(self._windows, call.before, shares, strict=True):
            if share < NEARLY * max(shares) or not held:
                continue
            if first and window.ceiling is not None:
                window.look_less()
            if window not in call.above:
                window.ceiling = max(held, (window.limit or 0) // 2)

    def _may_look(self, now: float, window: Window) -> bool:
        return self._looking is None and now >= self._look_after and self._successes >= window.gap

    def _end_look(self, call: Call) -> None:
        if self._looking is call:
            self._looking = None
