"""The limiter: the provider's quota is the only bottleneck, and is never passed."""

import heapq
import itertools
import random
import threading
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tasks import limiter as limiter_module
from tasks.errors import (
    BatchRefused,
    BatchTooLarge,
    EmbedOnceError,
    ProviderBusy,
    ProviderDenied,
    ProviderThrottled,
)
from tasks.limiter import Limiter, LimiterStatistics
from tasks.limits import Learned, Limits
from tasks.quota import Quota, Window
from tasks.slots import BURST, Slots
from tasks.turns import REAL, Clock


class VirtualThread(threading.Thread):
    def __init__(self, work: Callable[[], None]) -> None:
        super().__init__(daemon=True)
        self.work, self.turn, self.naps, self.ended = work, threading.Semaphore(0), 0, False
        self.error: BaseException | None = None

    def begin(self, main: threading.Semaphore) -> None:
        self._main = main
        self.start()

    def run(self) -> None:
        try:
            self.work()
        except BaseException as error:  # noqa: BLE001 - handed to the test
            self.error = error
        self.ended = True
        self._main.release()


class VirtualTime(Clock):
    """Threads that run one at a time, in a time that passes only while all of them wait."""

    def __init__(self) -> None:
        self._now = 0.0
        self._due: list[tuple[float, int, VirtualThread, int]] = []
        self._order = itertools.count()
        self._main = threading.Semaphore(0)

    def now(self) -> float:
        return self._now

    def condition(self, lock: threading.Lock) -> Any:
        return VirtualCondition(self, lock)

    def start(self, work: Callable[[], None]) -> "VirtualThread":
        thread = VirtualThread(work)
        self.wake(thread, self._now)
        return thread

    def wake(self, thread: VirtualThread, at: float) -> None:
        heapq.heappush(self._due, (at, next(self._order), thread, thread.naps))

    def nap(self, seconds: float | None) -> None:
        """Let the others run; back after so long, or when woken."""
        me = threading.current_thread()
        assert isinstance(me, VirtualThread)
        if seconds is not None:
            self.wake(me, self._now + seconds)
        self._main.release()
        me.turn.acquire()

    def run(self, until: float = float("inf")) -> None:
        while self._due and self._due[0][0] <= until:
            at, _, thread, naps = heapq.heappop(self._due)
            if naps != thread.naps or thread.ended:
                continue
            self._now = max(self._now, at)
            thread.naps += 1
            if not thread.ident:
                thread.begin(self._main)
            else:
                thread.turn.release()
            self._main.acquire()
            if thread.error:
                raise thread.error


class VirtualCondition:
    def __init__(self, time: VirtualTime, lock: threading.Lock) -> None:
        self._time, self._lock = time, lock
        self._waiting: list[VirtualThread] = []

    def wait(self, seconds: float | None = None) -> None:
        me = threading.current_thread()
        assert isinstance(me, VirtualThread)
        self._waiting.append(me)
        self._lock.release()
        self._time.nap(seconds)
        self._lock.acquire()
        self._waiting.remove(me)

    def notify_all(self) -> None:
        for thread in self._waiting:
            self._time.wake(thread, self._time.now())


@dataclass
class Server:
    """A provider with a quota that the limiter may not know."""

    time: VirtualTime
    requests: int = 10**9
    tokens: int = 10**12
    kind: str = "sliding"
    base_s: float = 0.2
    token_s: float = 1e-5
    way_s: float = 0.3
    streams: int = 1000
    useful: int = 1000
    says: Learned | None = None
    retry_after: float | None = None
    counts_refused: bool = False
    used_before: int = 0
    accepted: list[tuple[float, int]] = field(default_factory=list)
    refused: list[float] = field(default_factory=list)
    in_flight: int = 0
    most_in_flight: int = 0

    def __post_init__(self) -> None:
        self._rng = random.Random(7)
        self._log: deque[tuple[float, int]] = deque()
        self._used = 0
        self._level = 0.0, 0.0, 0.0
        for second in range(-60 if self.used_before else 0, 0):
            self._count(second, self.used_before // 60)

    def call(self, tokens: int) -> int:
        """The tokens it bills."""
        self.in_flight += 1
        self.most_in_flight = max(self.most_in_flight, self.in_flight)
        try:
            self.time.nap(self._rng.random() * self.way_s)
            if self.in_flight > self.streams:
                raise ProviderThrottled("too many concurrent streams", streams=True)
            now = self.time.now()
            if not self._fits(now, tokens):
                self.refused.append(now)
                if self.counts_refused:
                    self._count(now, 0)
                self.time.nap(0.05)
                raise ProviderThrottled("429", learned=self.says, retry_after=self.retry_after)
            self.accepted.append((now, tokens))
            self._count(now, tokens)
            crowded = max(1.0, self.in_flight / self.useful)
            seconds = (self.base_s + tokens * self.token_s) * crowded
            self.time.nap(seconds * (0.5 + self._rng.random()))
            return tokens
        finally:
            self.in_flight -= 1

    def _count(self, now: float, tokens: int) -> None:
        self._log.append((now, tokens))
        self._used += tokens

    def _fits(self, now: float, tokens: int) -> bool:
        if self.kind == "leaky":  # a strict one: no more than a second ahead of its rate
            at, requests, held = self._level
            requests = max(0.0, requests - (now - at) * self.requests / 60)
            held = max(0.0, held - (now - at) * self.tokens / 60)
            fits = requests <= self.requests / 60 and held <= self.tokens / 60
            self._level = now, requests + fits, held + tokens * fits
            return fits
        start = now - 60 if self.kind == "sliding" else now // 60 * 60
        while self._log and self._log[0][0] < start:
            self._used -= self._log.popleft()[1]
        return len(self._log) < self.requests and self._used + tokens <= self.tokens


@dataclass
class Outcome:
    """What a simulated run came to, after its warm-up: shares of the quota, and of the calls."""

    used: float
    throttled: float
    throttled_before: int
    server: Server
    statistics: LimiterStatistics


def limits(requests: int | None = None, tokens: int | None = None, concurrency: int = 8) -> Limits:
    return Limits(requests, tokens, 1000, None, concurrency)


LEAST = Learned(requests_per_minute=3, tokens_per_minute=10_000)
"""What the smallest account may ask."""


def as_large_as_allowed(
    own: Limits, *, text: int, minutes: float, warm: float, **server: Any
) -> "Outcome":
    """As `simulate`, with calls as large as the limiter says, of whole texts."""
    time = VirtualTime()
    host = Server(time, **server)
    limiter = Limiter(own, clock=time, least=LEAST)

    def fitting() -> int:
        return max(1, (limiter.limits.tokens_per_request or 0) // text) * text

    def work() -> None:
        while True:
            tokens, sent = fitting(), False
            while not sent:
                tokens = min(tokens, fitting())
                try:
                    with limiter.sending(tokens) as sending:
                        sending.answered(host.call(tokens))
                    sent = True
                except ProviderThrottled:
                    continue
                except BatchTooLarge as error:
                    limiter.too_large(error.facts["learned"])

    for _ in range(16):
        time.start(work)
    time.run(until=minutes * 60)
    return outcome(host, limiter, warm, minutes)


def simulate(
    own: Limits,
    size: int,
    *,
    minutes: float = 10,
    warm: float = 2,
    threads: int = 16,
    smallest: float = 1.0,
    estimate: float = 1.0,
    **server: Any,
) -> Outcome:
    """Run `threads` that always have more to send, in virtual time."""
    time = VirtualTime()
    host = Server(time, **server)
    limiter = Limiter(own, clock=time)
    rng = random.Random(3)

    def work() -> None:
        while True:
            tokens = int(size * (smallest + (1 - smallest) * rng.random()))
            sent = False
            while not sent:
                try:
                    with limiter.sending(int(tokens * estimate)) as sending:
                        sending.answered(host.call(tokens))
                    sent = True
                except ProviderThrottled:
                    continue
                except BatchTooLarge:
                    tokens //= 2

    for _ in range(threads):
        time.start(work)
    time.run(until=minutes * 60)
    return outcome(host, limiter, warm, minutes)


def outcome(host: Server, limiter: Limiter, warm: float, minutes: float) -> Outcome:
    """What a server saw after the warm-up."""
    late = [tokens for at, tokens in host.accepted if at >= warm * 60]
    refused = sum(1 for at in host.refused if at >= warm * 60)
    span = minutes - warm
    return Outcome(
        used=max(len(late) / (host.requests * span), sum(late) / (host.tokens * span)),
        throttled=refused / (len(late) + refused),
        throttled_before=len(host.refused) - refused,
        server=host,
        statistics=limiter.statistics(),
    )


KNOWN = [
    (3, 10_000, 3_300, 30),
    (3, 10_000, 10_000, 30),
    (2000, 3_000_000, 120_000, 10),
    (2000, 8_000_000, 320_000, 10),
    (2000, 16_000_000, 1_000_000, 10),
    (2000, 3_000_000, 50, 3),
]


@pytest.mark.parametrize("kind", ["sliding", "fixed"])
@pytest.mark.parametrize(("requests", "tokens", "size", "minutes"), KNOWN)
def test_a_known_quota_is_used_and_never_passed(
    requests: int, tokens: int, size: int, minutes: int, kind: str
) -> None:
    own = limits(requests, tokens, 16)
    outcome = simulate(
        own, size, minutes=minutes, warm=1, requests=requests, tokens=tokens, kind=kind
    )
    assert outcome.used >= 0.95
    assert outcome.server.refused == []


@pytest.mark.parametrize(("requests", "tokens", "size", "minutes"), KNOWN[:5])
def test_a_server_that_watches_shorter_times_than_a_minute_gets_evenly_spaced_calls(
    requests: int, tokens: int, size: int, minutes: int
) -> None:
    outcome = simulate(
        limits(requests, tokens),
        size,
        minutes=minutes,
        requests=requests,
        tokens=tokens,
        kind="leaky",
    )
    assert outcome.used >= 0.95
    assert outcome.throttled == 0
    assert outcome.throttled_before <= 3


HIDDEN = [
    (limits(2000, 8_000_000), 3, 10_000, 3_300, 240, 20),
    (limits(2000, 3_000_000), 3, 10_000, 10_000, 240, 20),
    (limits(), 3, 10_000, 3_300, 240, 20),
    (limits(2000, 8_000_000), 2000, 3_000_000, 120_000, 45, 5),
    (limits(), 2000, 3_000_000, 120_000, 45, 5),
    (limits(2000, 3_000_000, 16), 1000, 3_000_000, 50, 6, 2),
]


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["sliding", "fixed"])
@pytest.mark.parametrize("case", HIDDEN)
def test_a_hidden_quota_is_found_and_seldom_passed(
    case: tuple[Limits, int, int, int, int, int], kind: str
) -> None:
    own, requests, tokens, size, minutes, warm = case
    outcome = simulate(
        own, size, minutes=minutes, warm=warm, requests=requests, tokens=tokens, kind=kind
    )
    assert outcome.used >= 0.95
    assert outcome.throttled < 0.01
    assert outcome.throttled_before < 30


@pytest.mark.parametrize("counts_refused", [False, True])
def test_a_server_that_counts_refused_calls_is_used_as_well(counts_refused: bool) -> None:
    outcome = simulate(
        limits(), 1000, minutes=240, warm=20, requests=3, counts_refused=counts_refused
    )
    assert outcome.used >= 0.95
    assert outcome.throttled < 0.01


def test_a_quota_that_an_earlier_run_used_up_is_not_mistaken_for_a_small_one() -> None:
    outcome = simulate(
        limits(2000, 3_000_000),
        120_000,
        tokens=3_000_000,
        used_before=3_000_000,
        minutes=12,
        warm=4,
    )
    assert outcome.used >= 0.95
    assert outcome.throttled < 0.01


@pytest.mark.parametrize("estimate", [0.7, 1.4])
def test_a_wrong_estimate_is_put_right_by_what_was_billed(estimate: float) -> None:
    own = limits(2000, 3_000_000, 4)
    outcome = simulate(own, 100_000, tokens=3_000_000, estimate=estimate, minutes=20, warm=5)
    assert outcome.used >= 0.93
    assert outcome.throttled < 0.02


def test_limits_that_the_provider_names_hold_at_once() -> None:
    named = Learned(requests_per_minute=3, tokens_per_minute=10_000)
    outcome = simulate(
        limits(2000, 8_000_000), 3_000, requests=3, tokens=10_000, says=named, minutes=20
    )
    assert outcome.used >= 0.95
    assert len(outcome.server.refused) <= 2  # that many were in flight
    assert outcome.statistics.requests_per_minute == 3


class Run:
    """A limiter and a server in virtual time, and what happened when."""

    def __init__(self, own: Limits, *, server: dict[str, Any] | None = None, **terms: Any) -> None:
        self.time = VirtualTime()
        self.told: list[str] = []
        self.limiter = Limiter(own, clock=self.time, tell=self.told.append, **terms)
        self.server = Server(
            self.time, **{"way_s": 0.0, "token_s": 0.0, "base_s": 0.0, **(server or {})}
        )
        self.sent: list[tuple[float, int]] = []
        self.ended: list[EmbedOnceError] = []

    def send(
        self, *sizes: int, splittable: bool = True, at: float = 0.0, error: Any = None
    ) -> None:
        """Send one call after the other in a thread of its own."""

        def work() -> None:
            self.time.nap(at)
            for tokens in sizes:
                try:
                    with self.limiter.sending(tokens, splittable=splittable) as sending:
                        self.sent.append((round(self.time.now(), 1), tokens))
                        if error:
                            raise error
                        sending.answered(self.server.call(tokens))
                except EmbedOnceError as caught:
                    self.ended.append(caught)

        self.time.start(work)

    def at(self) -> list[float]:
        self.time.run()
        return [at for at, _tokens in self.sent]


def test_a_corpus_below_one_minutes_quota_is_done_at_once() -> None:
    run = Run(limits(2000, 1000))
    run.send(*[100] * 11)
    assert run.at() == [0.0] * 10 + [61.0]


def test_the_first_answer_may_name_the_limits_before_anything_is_refused() -> None:
    run = Run(limits(2000, 8_000_000))

    def work() -> None:
        for _ in range(4):
            with run.limiter.sending(10) as sending:
                run.sent.append((run.time.now(), 10))
                sending.answered(10, Learned(requests_per_minute=3, tokens_per_minute=10_000))

    run.time.start(work)
    assert run.at() == [0, 0, 0, 61]
    assert run.limiter.limits.tokens_per_request == 10_000


def test_nobody_sends_before_retry_after_and_an_absurd_one_is_cut() -> None:
    for seconds, expected in ((20.0, 21.0), (9999.0, 301.0)):
        run = Run(limits())
        run.send(5)
        run.send(5, at=1, error=ProviderThrottled("429", retry_after=seconds))
        run.send(5, at=2)
        run.send(5, at=3)
        assert run.at() == [0.0, 1.0, expected, expected]


def test_a_busy_providers_retry_after_holds_for_everyone() -> None:
    run = Run(limits())
    run.send(5, error=ProviderBusy("503", retry_after=7.0))
    run.send(5, at=1)
    assert run.at() == [0.0, 7.0]


def test_a_stream_of_small_calls_does_not_starve_a_large_one() -> None:
    run = Run(limits(None, 1000), server={"base_s": 0.1})
    run.send(*[100] * 60)
    run.send(*[100] * 60)
    run.send(900, at=5)
    run.time.run(until=200)
    assert [at for at, tokens in run.sent if tokens == 900] == [122.0]


def test_a_throttled_call_keeps_its_place() -> None:
    run = Run(limits(None, None, 1))
    order = []

    def refuse() -> None:
        run.time.nap(5)
        raise ProviderThrottled("429")

    def work(name: str, at: float) -> None:
        run.time.nap(at)
        for attempt in (1, 2):
            try:
                with run.limiter.sending(7 if name == "a" else 8) as sending:
                    order.append(name)
                    if name == "a" and attempt == 1:
                        refuse()
                    sending.answered(7)
                    return
            except ProviderThrottled:
                pass

    for number, name in enumerate("abc"):
        run.time.start(lambda name=name, at=number: work(name, at))  # type: ignore[misc]
    run.time.run()
    assert order == ["a", "a", "b", "c"]


def test_what_no_minute_holds_must_be_split_or_goes_alone_after_an_idle_minute() -> None:
    run = Run(limits(None, 1000))
    run.send(1001)
    run.send(400, 400, at=1)
    run.send(5000, at=2, splittable=False)
    run.send(300, at=3)
    assert run.at() == [1.0, 1.0, 62.0, 123.0]
    assert run.ended[0].facts["learned"].tokens_per_request == 1000
    assert "1,001 tokens can never pass: the account allows 1,000" in str(run.ended[0])


def test_a_waiting_call_that_the_quota_just_learned_can_not_hold_must_be_split() -> None:
    run = Run(limits(None, None, 1))
    run.send(5, error=ProviderThrottled("429", learned=Learned(tokens_per_minute=100)))
    run.send(101)
    run.time.run()
    assert isinstance(run.ended[1], BatchTooLarge)


def test_a_call_refused_twice_after_an_idle_minute_must_be_split() -> None:
    run = Run(limits(), server={"tokens": 500})

    def work() -> None:
        tokens = 800
        while True:
            try:
                with run.limiter.sending(tokens) as sending:
                    sending.answered(run.server.call(tokens))
            except ProviderThrottled:
                continue
            except BatchTooLarge as error:
                run.ended.append(error)
                tokens = error.facts["learned"].tokens_per_request
            else:
                return

    run.time.start(work)
    run.time.run()
    assert [error.facts["learned"].tokens_per_request for error in run.ended] == [400]
    assert run.limiter.limits.tokens_per_request == 400
    assert run.server.accepted[0][1] == 400
    assert len(run.server.refused) == 6
    assert 120 < run.time.now() < 300


@pytest.mark.parametrize("kind", ["sliding", "fixed"])
@pytest.mark.parametrize(
    ("requests", "tokens", "text", "minutes"),
    [(3, 10_000, 50, 40), (2000, 3_000_000, 400, 16), (2000, 1_000_000, 200, 16)],
)
def test_calls_are_cut_so_that_a_hidden_quota_is_used(
    kind: str, requests: int, tokens: int, text: int, minutes: float
) -> None:
    found = as_large_as_allowed(
        Limits(2000, 8_000_000, 1000, 320_000, 8),
        text=text, minutes=minutes, warm=0.4 * minutes,
        requests=requests, tokens=tokens, kind=kind,
    )  # fmt: skip
    assert found.used >= 0.95
    assert found.throttled < 0.01


def test_an_account_that_takes_hardly_anything_is_the_smallest_one() -> None:
    told: list[str] = []
    time = VirtualTime()
    host = Server(time, requests=3, tokens=10_000)
    limiter = Limiter(limits(2000, 8_000_000), clock=time, least=LEAST, tell=told.append)
    learned: list[Learned] = []

    def work() -> None:
        tokens = 200_000
        while True:
            try:
                with limiter.sending(tokens) as sending:
                    sending.answered(host.call(tokens))
            except ProviderThrottled:
                continue
            except BatchTooLarge as error:
                learned.append(error.facts["learned"])
                limiter.too_large(learned[-1])
                tokens = limiter.limits.tokens_per_request or 0
            else:
                return

    time.start(work)
    time.run()
    assert learned == [LEAST]
    assert (limiter.limits.requests_per_minute, limiter.limits.tokens_per_minute) == (3, 10_000)
    assert host.accepted[0][1] == 10_000
    assert [message for message in told if "taken for the smallest" in message]


def test_an_outage_ends_what_waits_and_progress_elsewhere_does_not() -> None:
    run = Run(limits(3, None), max_wait_s=100)
    run.send(*[1] * 10)
    assert run.at()[-1] == 183.0
    assert run.ended == []
    run = Run(limits(), max_wait_s=100)
    run.send(*[1] * 30, error=ProviderThrottled("429"))
    run.time.run()
    assert isinstance(run.ended[-1], ProviderBusy)
    assert "no answer for 100 s; the next call waits for the provider's pause" in str(run.ended[-1])


def test_a_call_that_waits_behind_a_silent_one_ends_too() -> None:
    run = Run(limits(None, None, 1), max_wait_s=50, server={"base_s": 1000.0})
    run.send(1)
    run.send(1, at=1)
    run.time.run()
    assert [str(error) for error in run.ended] == [
        "no answer for 50 s; the next call waits for calls in flight"
    ]


def test_a_long_wait_is_told_once() -> None:
    run = Run(limits(None, 10_000))
    run.send(*[5_000] * 8)
    run.time.run()
    assert run.told == ["tokens per minute: 10,000 used, next in 61 s"]


def test_a_wrong_key_costs_one_call() -> None:
    run = Run(limits())
    for _ in range(8):
        run.send(5, error=ProviderDenied("401"))
    assert len(run.at()) == 1
    assert [str(error) for error in run.ended] == ["401"] * 8


def test_stop_ends_what_waits_and_what_comes_later() -> None:
    run = Run(limits(1, None))
    run.send(5, 5)
    run.send(5, at=30)

    def stop() -> None:
        run.time.nap(10)
        run.limiter.stop(ProviderDenied("stopped"))

    run.time.start(stop)
    assert run.at() == [0.0]
    assert [str(error) for error in run.ended] == ["stopped", "stopped"]
    assert str(run.limiter.stopped) == "stopped"


def test_calls_in_flight_grow_while_they_help() -> None:
    outcome = simulate(limits(), 1000, minutes=2, warm=1, tokens=10**9)
    assert outcome.statistics.peak_in_flight == 8
    quiet = simulate(limits(None, 100_000), 10_000, minutes=10, tokens=100_000, way_s=0.0)
    assert quiet.statistics.concurrency < 8


def test_calls_in_flight_that_only_wait_for_each_other_are_taken_back() -> None:
    outcome = simulate(limits(None, None, 16), 1000, minutes=3, tokens=10**9, useful=3)
    assert outcome.statistics.concurrency <= 8
    assert outcome.statistics.in_flight_seconds / outcome.statistics.slot_seconds > 0.9


def test_noise_alone_does_not_take_slots_back() -> None:
    outcome = simulate(limits(None, None, 8), 1000, minutes=3, tokens=10**9, way_s=2.0)
    assert outcome.statistics.concurrency >= 6


def test_smaller_calls_do_not_look_like_a_slower_provider() -> None:
    slots, now = Slots(16), 0.0
    for tokens in [300_000] * 30 + [50] * 60:
        now += 1
        slots.in_flight = slots.limit
        slots.free()
        slots.answered(now, now - 0.2 - tokens * 1e-5, slots.limit, tokens)
    assert slots.limit == 16


@pytest.mark.slow
def test_too_many_streams_are_remembered() -> None:
    outcome = simulate(limits(None, None, 16), 1000, minutes=10, tokens=10**9, streams=5)
    assert outcome.server.most_in_flight <= 7
    assert outcome.statistics.throttled / len(outcome.server.accepted) < 0.01
    assert outcome.statistics.concurrency in {4, 5, 6}
    assert outcome.statistics.tokens_per_minute is None


def test_a_burst_of_failures_halves_the_calls_in_flight() -> None:
    slots = Slots(16)
    for now in range(1, 16):
        slots.free()
        slots.in_flight = slots.limit
        slots.free()
        slots.answered(now, now - 1, slots.limit, 1)
    assert slots.limit == 16
    for _ in range(BURST - 1):
        slots.busy(20, 19)
    assert slots.limit == 16
    slots.busy(20, 19)
    assert slots.limit == 8
    for _ in range(BURST):
        slots.busy(21, 19)
    assert slots.limit == 8


def test_a_refused_call_counts_as_a_request_and_not_as_tokens() -> None:
    run = Run(limits(3, 100))
    run.send(60, error=BatchRefused("400"))
    run.send(60, 30, 1, at=1)
    assert run.at() == [0.0, 1.0, 1.0, 61.0]


def test_a_throttled_call_counts_as_a_request() -> None:
    quota = Quota(2, None, now=0)
    quota.refused(0.1, quota.send(0, 5), Learned(), None)
    assert quota.used(1) == {"requests per minute": 1, "tokens per minute": 0}
    assert quota.used(61) == {"requests per minute": 0, "tokens per minute": 0}


def test_an_answer_that_says_nothing_was_billed_keeps_the_reservation() -> None:
    run = Run(limits(None, 100))

    def work() -> None:
        for _ in range(2):
            with run.limiter.sending(60) as sending:
                run.sent.append((run.time.now(), 60))
                sending.answered(0)

    run.time.start(work)
    assert run.at() == [0.0, 61.0]


def test_statistics_say_what_was_waited_for_and_used() -> None:
    run = Run(limits(None, 1000), server={"base_s": 2.0})
    run.send(500, 500, 500)
    run.time.run()
    statistics = run.limiter.statistics()
    assert statistics.waited_seconds.keys() == {"tokens per minute"}
    assert statistics.throttled == 0
    assert statistics.in_flight_seconds <= statistics.slot_seconds
    assert statistics.limit_used_fraction == pytest.approx(1.0, abs=0.5)


def test_a_minute_holds_a_whole_number_of_the_largest_calls() -> None:
    assert Limiter(Limits(None, 500_000, 1, 320_000, 1)).limits.tokens_per_request == 250_000
    assert Limiter(Limits(None, 8_000_000, 1, 320_000, 1)).limits.tokens_per_request == 320_000
    limiter = Limiter(Limits(None, None, 100, None, 1))
    limiter.too_large(Learned(texts_per_request=7, tokens_per_request=9))
    assert (limiter.limits.texts_per_request, limiter.limits.tokens_per_request) == (7, 9)


def test_real_threads_keep_to_the_quota_in_real_time(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(limiter_module, "MINUTE_S", 0.5)
    limiter, sent = Limiter(limits(20, None)), list[float]()

    def work() -> None:
        for _ in range(10):
            with limiter.sending(1) as sending:
                sent.append(REAL.now())
                sending.answered(1)

    threads = [threading.Thread(target=work) for _ in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(sent) == 60
    sent.sort()
    assert all(later - sooner > 0.4 for sooner, later in zip(sent, sent[20:], strict=False))
    assert sent[-1] - sent[0] < 10


@given(
    quota=st.integers(1, 1000),
    paced=st.booleans(),
    calls=st.lists(
        st.tuples(st.floats(0, 40), st.integers(1, 1500), st.floats(0.2, 1.0), st.floats(0, 1)),
        max_size=60,
    ),
)
def test_no_minute_holds_more_than_the_quota_and_every_call_passes(
    quota: int, paced: bool, calls: list[tuple[float, int, float, float]]
) -> None:
    window, now = Window("tokens per minute", quota), 0.0
    window.paced = paced
    arrived: list[tuple[float, int]] = []
    for idle, size, billed, way in calls:
        amount = min(size, quota)
        now += idle
        waits = 0
        while (wait := window.delay(now, amount)) > 0:
            now += wait
            waits += 1
            assert waits < 100
        entry = window.take(now, amount)
        counted = max(1, int(amount * billed))
        window.correct(entry, counted)
        arrived.append((now + way, counted))
    for at, _counted in arrived:
        assert sum(n for other, n in arrived if at <= other < at + 60) <= quota
        assert sum(n for other, n in arrived if other // 60 == at // 60) <= quota


@given(st.integers(1, 100), st.integers(101, 10_000))
def test_what_is_larger_than_the_quota_waits_for_an_empty_minute(quota: int, size: int) -> None:
    window = Window("tokens per minute", quota)
    assert window.delay(0, size) == 0
    window.take(0, 1)
    assert window.delay(20, size) == pytest.approx(41)
