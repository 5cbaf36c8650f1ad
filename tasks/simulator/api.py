"""One request for embeddings, from its arrival to its answer, check by check."""

import math
import random
import threading
from collections.abc import Iterable
from dataclasses import dataclass, field, replace
from http import HTTPStatus

from tasks.catalog import ModelFacts
from tasks.simulator import answer, checks, vectors, wire
from tasks.simulator.checks import Asked, Refused
from tasks.simulator.clock import Clock
from tasks.simulator.jobs import Jobs
from tasks.simulator.lane import Lane, Request
from tasks.simulator.ledger import Ledger, Record, hash_key, hash_texts
from tasks.simulator.rules import HARMLESS, Rule, Script, Traits
from tasks.simulator.settings import Settings
from tasks.simulator.window import Exceeded, Windows
from tasks.simulator.wire import Reply

_FREE_TRIAL = (
    "You have not yet added your payment method in the billing page and will have reduced rate "
    "limits of 3 RPM and 10K TPM. To unlock our standard rate limits, please add a payment "
    "method in the billing page for the appropriate organization in the user dashboard "
    "(https://dashboard.voyageai.com/). Even with payment methods entered, the free tokens "
    "(200M tokens for Voyage series 3) will still apply. After adding a payment method, you "
    "should see your rate limits increase after several minutes. See our pricing docs "
    "(https://docs.voyageai.com/docs/pricing) for the free tokens for your model."
)
_HIDDEN = "Rate limit exceeded"
_UNITS = {"tokens": "Tokens Per Minute (TPM)", "requests": "Requests Per Minute (RPM)"}


@dataclass(frozen=True)
class Call:
    """A request for embeddings as it came."""

    authorization: str
    body: bytes
    connection: int
    redirected: bool


@dataclass
class _Work:
    """What is known of a request, more and more."""

    ordinal: int
    in_flight: int
    t: float
    key: str
    model: str = ""
    asked: Asked | None = None
    facts: ModelFacts | None = None
    rule: Rule | None = None
    texts: list[str] = field(default_factory=list)
    dimension: int = 0
    tokens: int = 0


class Api:
    """The service behind the server: settings, time, script, windows and ledger."""

    def __init__(self, settings: Settings) -> None:
        self.settings = settings
        self.clock = Clock(manual=settings.clock == "manual", scale=settings.time_scale)
        self.ledger = Ledger(settings.keep_requests)
        self.stopped = threading.Event()
        self._models = settings.facts()
        self._script = Script()
        self._windows = Windows(settings.window)
        self._jobs = Jobs(self.ledger, self.clock.now)
        self._lane = Lane(self._jobs, self._script)
        self._started = 0.0

    def add(self, rules: Iterable[Rule]) -> int:
        """Append to the fault script, and say how long it is."""
        return self._script.add(rules)

    def clear_rules(self) -> None:
        """Drop the fault script."""
        self._script.clear()

    def reset(self) -> None:
        """Drop rules, ledger, windows, files and jobs. Settings and time stay."""
        self._script.clear()
        self._jobs.reset()
        self._lane.reset()
        self.ledger.reset()
        self._windows = Windows(self.settings.window)
        self._started = self.clock.now()

    def change(self, settings: Settings) -> None:
        """Go on with other settings; another kind of window starts empty."""
        self.settings, self._models = settings, settings.facts()
        self.clock.rescale(settings.time_scale)
        self.ledger.keep(settings.keep_requests)
        if self._windows.kind != settings.window:
            self._windows = Windows(settings.window)

    def settle(self) -> None:
        """Have the ledger know what jobs have done by now."""
        self._jobs.settle()

    def answer_lane(self, request: Request) -> Reply:
        """What a request for files or jobs is answered with."""
        seconds = self.clock.now() - self._started
        return self._lane.answer(request, self.settings, self._models, seconds)

    def answer(self, call: Call) -> Reply:
        """What `call` is answered with, noted in the ledger. `Ledger.left` is yet to come."""
        now = self.clock.now()
        ordinal, in_flight = self.ledger.arrived(now)
        work = _Work(ordinal, in_flight, now, checks.bearer(call.authorization))
        try:
            reply = self._answer(call, work)
        except Refused as refused:
            reply = self._refusal(refused)
            work.rule = None
        reply = replace(
            reply,
            headers=(*reply.headers, *self._warning()),
            request_id=wire.new_request_id(),
        )
        self._record(work, reply, call.connection)
        return reply

    def _answer(self, call: Call, work: _Work) -> Reply:
        """The checks in their order: body, key, model, sizes, limits."""
        settings, models = self.settings, self._models
        unread: Refused | None = None
        body: object = None
        try:
            body = checks.read(call.body)
        except Refused as refused:
            unread = refused
        work.model, work.texts = checks.peek(body)
        rule = work.rule = self._rule(work, redirected=call.redirected)
        if rule is not None and rule.early:
            return wire.scripted(rule)
        if unread is not None:
            raise unread

        asked = checks.arguments(body, settings, models)
        checks.check_key(work.key, settings)
        facts = checks.facts_of(asked, settings, models)
        work.dimension = asked.output_dimension or facts.default_dimension
        work.asked, work.facts, work.texts = asked, facts, asked.texts
        work.tokens = checks.count(asked, facts, settings)
        self._admit(work, facts)

        self._wait(work)
        return self._good(work, asked)

    def _rule(self, work: _Work, *, redirected: bool) -> Rule | None:
        traits = Traits(
            ordinal=work.ordinal,
            seconds=work.t - self._started,
            in_flight=work.in_flight,
            key=work.key,
            model=work.model,
            texts=work.texts,
            redirected=redirected,
        )
        return self._script.first(traits)

    def _admit(self, work: _Work, facts: ModelFacts) -> None:
        """Check 10: neither too many at once nor too much in a minute."""
        settings, now = self.settings, self.clock.now()
        self.ledger.counted(now, work.tokens)
        if settings.max_concurrent is not None and work.in_flight > settings.max_concurrent:
            raise Refused(
                HTTPStatus.TOO_MANY_REQUESTS, "Request rejected: too many concurrent streams."
            )  # a guess
        exceeded = self._windows.admit(
            (hash_key(work.key), facts.name),
            settings.limits(facts),
            work.tokens,
            now,
            count_rejected=settings.count_rejected,
        )
        if exceeded is not None:
            raise Refused(
                HTTPStatus.TOO_MANY_REQUESTS,
                self._announced(exceeded, facts.name),
                wait_s=exceeded.wait_s,
            )

    def _announced(self, exceeded: Exceeded, model: str) -> str:
        free = self.settings.tier == "free"
        match self.settings.announce or ("free-trial" if free else "hidden"):
            case "free-trial":
                return _FREE_TRIAL
            case "numbers":
                unit = exceeded.unit
                return (
                    f"You have exceeded the project's {_UNITS[unit]} rate limit of "
                    f"{exceeded.limit:,} {unit} per minute for {model}. In the minute before "
                    f"this request, you used {exceeded.used:,} {unit}."
                )
            case _:
                return _HIDDEN

    def _wait(self, work: _Work) -> None:
        """Take as long as the real service would, and longer for a slow answer."""
        latency = self.settings.latency
        chance = random.Random(f"{latency.seed}/{work.ordinal}").random()  # noqa: S311
        simulated = (
            latency.base_s
            + latency.per_1k_tokens_s * work.tokens / 1000
            + latency.jitter_s * chance
        )
        seconds = self.clock.real(simulated)
        if work.rule is not None and work.rule.action == "slow":
            seconds += work.rule.seconds
        if seconds:
            self.stopped.wait(seconds)

    def _good(self, work: _Work, asked: Asked) -> Reply:
        """An answer with status 200, but for the fault in it or on its way."""
        space = vectors.space_of(asked.model)
        found = vectors.embed(
            self.settings.vectors, space, asked.input_type, asked.texts, work.dimension
        )
        body = answer.body(asked, found, work.tokens, work.rule, work.ordinal)
        return wire.answered(body, work.rule)

    def _refusal(self, refused: Refused) -> Reply:
        headers: tuple[tuple[str, str], ...] = ()
        form = self.settings.retry_after
        if refused.wait_s is not None and form is not None:
            wait_s = max(1, math.ceil(refused.wait_s / self.settings.time_scale))
            value = str(wait_s) if form == "seconds" else wire.http_date(wait_s)
            headers = (("retry-after", value),)
        return Reply(refused.status, wire.error(refused.detail, refused.code), headers)

    def _warning(self) -> tuple[tuple[str, str], ...]:
        return (("x-api-warning", _FREE_TRIAL),) if self.settings.tier == "free" else ()

    def _record(self, work: _Work, reply: Reply, connection: int) -> None:
        rule, asked = work.rule, work.asked
        worked = reply.status == HTTPStatus.OK or (
            rule is not None and rule.action == "process_then_reset"
        )
        billed = work.tokens if worked else 0
        record = Record(
            ordinal=work.ordinal,
            t=work.t,
            key=hash_key(work.key),
            model=work.model,
            input_type=None if asked is None else asked.input_type,
            dimension=work.dimension,
            dtype="" if asked is None else asked.dtype,
            n_texts=len(work.texts),
            tokens=work.tokens,
            billed_tokens=billed,
            status=reply.status,
            fault=None if rule is None else rule.action,
            request_id=reply.request_id,
            connection=connection,
            hashes=hash_texts(work.texts),
        )
        good = rule is None or rule.action in HARMLESS
        usd = 0.0 if work.facts is None else work.facts.usd(billed)
        self.ledger.record(record, ok=reply.status == HTTPStatus.OK and good, usd=usd)
