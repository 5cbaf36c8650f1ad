"""Embed: one batch of texts becomes vectors. The only step that costs money.

What a call ends with says what happens next: a batch too large is split, a refused one is
halved until the text that is to blame stands alone, a throttled one waits its turn, and
what may work later is left to the caller's retries, which send only what is still missing.
"""

import time
from collections import deque
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from tasks.budget import Bill, may_be_charged
from tasks.claims import Standing
from tasks.errors import (
    AnswerRejected,
    BatchRefused,
    BatchTooLarge,
    ProviderBusy,
    ProviderDenied,
    ProviderError,
    ProviderThrottled,
    ProviderUnreachable,
    RunStopped,
    StorageFailed,
)
from tasks.journal import read_answer
from tasks.keys import KeySet
from tasks.limits import Learned
from tasks.notes import Call, Refused
from tasks.part import Part
from tasks.providers import Vectors, checked_vectors
from tasks.quota import Sending
from tasks.schemas import BATCH, Batch
from tasks.sender import PROOF_AFTER, Terms, sender_of

PROOF = "The quick brown fox jumps over the lazy dog."
RETRIES = 7
"""So often a batch is tried again; what lasts longer than the delays, two minutes, is an outage."""
REACHED_ATTEMPTS = 3
"""So often an address is tried where nobody has answered in this run."""
TRUSTED_ATTEMPTS = 2
"""So often an answer may hold bad vectors before the texts they belong to are blamed."""


@dataclass(frozen=True)
class Embedded:
    """One batch, paid for and durable.

    Attributes:
        batch: Its number, from 1.
        texts: Texts embedded.
        refused: Texts that no call will embed.
        found: text_hash of those that other runs have paid for meanwhile.
        found_tokens: Their estimated tokens.
    """

    batch: int
    texts: int
    refused: tuple[Refused, ...]
    found: pa.Array
    found_tokens: int


def embed_batch(batch: Batch, terms: Terms, attempt: int) -> Embedded:
    """Embed every text of `batch`, and make each answer durable as it comes.

    Args:
        batch: Distinct texts, about as many as one call takes.
        terms: What all batches of the run share.
        attempt: How often this batch was tried, from 1. What earlier attempts brought is
            not sent again.

    Raises:
        ProviderBusy: The rest of the batch may work later.
        BatchRefused: A text is refused, and `terms.on_error` is "fail_fast".
        ProviderDenied: No call can work.
        StorageFailed: The journal takes no answer; nothing more is sent.
    """
    sender = sender_of(terms)
    with sender.at_work():
        try:
            terms.provider.prepare()  # in each process; the flow's own has done so
            return _Embedding(batch, terms, attempt).run()
        except StorageFailed as error:  # what is sent from now on could not be kept either
            sender.stop(RunStopped(str(error)))
            raise


def embed_with_retries(batch: Batch, terms: Terms, retries: int = RETRIES) -> Embedded:
    """Embed `batch` as `embed_batch` does, and try again what may work later."""
    sender = sender_of(terms)
    for attempt in range(1, retries + 1):
        try:
            return embed_batch(batch, terms, attempt)
        except ProviderBusy:
            sender.pause_before(attempt + 1)
    return embed_batch(batch, terms, retries + 1)


def retry_when_busy(_task: Any, _task_run: Any, state: Any) -> bool:
    """Ask again only when that can help. Prefect ignores anything but a plain function here."""
    return isinstance(state.result(raise_on_failure=False), ProviderBusy)


@dataclass(frozen=True)
class _Turn:
    """A call that may go: its estimated tokens, how long it waited, and who is told its bill."""

    sending: Sending
    tokens: int
    waited_s: float
    bill: Bill


class _Embedding:
    """One attempt at one batch."""

    def __init__(self, batch: Batch, terms: Terms, attempt: int) -> None:
        self._batch = batch
        self._terms = terms
        self._attempt = attempt
        self._provider = terms.provider
        self._folder = terms.folder
        self._sender = sender_of(terms)
        self._cause = ("verify" if terms.anew else "first") if attempt == 1 else "retry"
        self._calls = 0
        self._answers = self._sender.answers
        self._suspects: list[tuple[Part, str]] = []
        self._refused: list[Refused] = []
        self._put_off: list[pa.Table] = []
        self._found: list[pa.Table] = []

    def run(self) -> Embedded:
        rows = self._unanswered(self._batch.table.load(BATCH))
        todo = deque([self._part(rows)])
        try:
            while todo or self._put_off:
                part = todo.popleft() if todo else self._let_go_by_others()
                if len(part):
                    todo.extendleft(reversed(self._send(part)))
        except ProviderBusy:
            if self._believable(len(self._suspects)):
                self._judge()  # what is known of them need not be found out again
            raise
        self._judge()
        found = pa.concat_tables([BATCH.empty_table(), *self._found])
        return Embedded(
            self._batch.number,
            texts=self._batch.table.rows - len(self._refused) - found.num_rows,
            refused=tuple(self._refused),
            found=found.column("text_hash").combine_chunks(),
            found_tokens=pc.sum(found.column("tokens")).as_py() or 0,
        )

    def _part(self, rows: pa.Table) -> Part:
        """All of `rows`, measured once: before its turn, in which nobody else can send."""
        texts = rows.column("text").combine_chunks()
        return Part(rows, self._cause, texts.to_pylist(), self._sender.sizes(texts))

    def _unanswered(self, rows: pa.Table) -> pa.Table:
        """The rows that no earlier attempt has settled."""
        if self._attempt == 1:
            return rows
        known = [
            answer.table.column("text_hash").combine_chunks()
            for name in self._folder.answers_of(self._batch.number)
            if (answer := read_answer(self._folder, name)) is not None
        ]
        refused = self._folder.refused().get(self._provider.space.id, {})
        hashes = rows.column("text_hash").to_pylist()
        self._refused = [refused[each] for each in hashes if each in refused]
        settled = pa.array([text.text_hash for text in self._refused], BATCH.field(0).type)
        keys = KeySet(pa.concat_arrays([settled, *known]))
        return rows.filter(pa.array(~keys.holds(rows.column("text_hash"))))

    def _send(self, part: Part) -> list[Part]:
        """Send `part`, or as much of it as fits; what comes back is still to be sent."""
        try:
            return self._sent(part)
        finally:  # an answer is in the journal by now
            self._sender.claims.release(self._batch.number)

    def _sent(self, part: Part) -> list[Part]:
        piece, rest = part, list[Part]()
        try:
            with ExitStack() as stack:
                since = time.perf_counter()
                with self._sender.turn:
                    piece, rest, tokens = self._claimed(part)
                    if not len(piece):
                        return rest
                    if (affordable := self._sender.affordable(piece.sizes)) < len(piece):
                        piece, unaffordable = piece.cut(affordable)
                        rest, tokens = unaffordable + rest, self._sender.fitting(piece.sizes)[1]
                    turn = stack.enter_context(self._turn(len(piece), tokens, since))
                vectors, call = self._call(piece.texts, piece.cause, turn)
                # Still in its turn: what a kill may cost is what calls in flight hold.
                hashes = piece.rows.column("text_hash").combine_chunks()
                space = self._provider.space
                answer = self._folder.write_answer(hashes, vectors, space, call)
        except ProviderThrottled:
            return [replace(piece, cause="wait"), *rest]
        except BatchTooLarge as error:
            return self._split(piece, error) + rest
        except BatchRefused as error:
            return self._isolate(piece, error) + rest
        except AnswerRejected as error:
            return self._doubt(piece, error) + rest
        except ProviderUnreachable as error:
            if self._sender.answers or self._attempt < REACHED_ATTEMPTS:
                raise
            denied = ProviderDenied(str(error))  # nobody has ever been there
            self._sender.stop(denied)
            raise denied from None
        self._sender.arrived(answer)
        self._sender.works()
        self._sender.learn(piece.sizes, call.tokens_billed)
        return rest

    def _claimed(self, part: Part) -> tuple[Part, list[Part], int]:
        """What of `part` this run may send in one call, what comes after it, and its tokens."""
        fits, tokens = self._sender.fitting(part.sizes)
        piece, rest = part.cut(fits)
        if self._terms.anew:
            return piece, rest, tokens
        hashes = piece.rows.column("text_hash").combine_chunks()
        standing = self._sender.claims.claim(self._batch.number, hashes)
        if standing.free.all():
            return piece, rest, tokens
        piece = self._sorted(piece, standing)
        return piece, rest, self._sender.fitting(piece.sizes)[1]

    def _sorted(self, part: Part, standing: Standing) -> Part:
        """What is free of `part`; what is found is noted, and what is taken put off."""
        self._found.append(part.rows.filter(pa.array(standing.found)))
        if standing.taken.any():
            self._put_off.append(part.rows.filter(pa.array(standing.taken)))
        return part.take(np.flatnonzero(standing.free), part.cause)

    def _let_go_by_others(self) -> Part:
        """What another run had claimed and has not embedded; waits until any of it is settled."""
        rows, self._put_off = pa.concat_tables(self._put_off), []
        standing = self._sender.wait_for_others(rows.column("text_hash").combine_chunks())
        return self._sorted(self._part(rows), standing)

    @contextmanager
    def _turn(self, texts: int, tokens: int, since: float) -> Iterator[_Turn]:
        """Wait until a call may be sent; `since` is when (seconds) it began to wait."""
        limiter, budget = self._sender.limiter, self._sender.budget
        with (
            budget.held(tokens) as bill,
            limiter.sending(tokens, splittable=texts > 1) as sending,
        ):
            yield _Turn(sending, tokens, time.perf_counter() - since, bill)

    def _call(self, texts: list[str], cause: str, turn: _Turn) -> tuple[Vectors, Call]:
        """One call to the provider, and its entry for the ledger, written down if it failed."""
        started_at, started = datetime.now(tz=UTC).isoformat(), time.perf_counter()
        status, vectors, billed, request_id, lost = "unforeseen", None, 0, "", False
        try:
            answer = self._provider.embed(texts)
            billed, request_id = answer.billed_tokens, answer.request_id
            turn.sending.answered(answer.billed_tokens, answer.learned)
            vectors = checked_vectors(answer, len(texts), self._provider)
            status = "ok"
        except ProviderError as error:
            status, lost = type(error).__name__, may_be_charged(error)
            billed = error.facts.get("billed_tokens", billed)
            request_id = error.facts.get("request_id", request_id)
            raise
        finally:
            self._calls += 1
            call = Call(
                run_id=self._folder.run_id,
                batch=self._batch.number,
                attempt=self._attempt,
                call=self._calls,
                cause=cause,
                status=status,
                started_at=started_at,
                waited=turn.waited_s,
                seconds=time.perf_counter() - started,
                texts=len(texts),
                tokens_estimated=turn.tokens,
                tokens_billed=billed,
                usd=billed * self._terms.usd_per_million_tokens / 1e6,
                request_id=request_id,
                model=self._provider.space.model_name,
                index=self._terms.index,
            )
            turn.bill(billed or turn.tokens * (lost or status == "ok"))  # 0 may be charged too
            self._sender.calls[self._batch.number].append(call)
            if vectors is None:
                self._folder.note(call)
        return vectors, call

    def _split(self, part: Part, error: BatchTooLarge) -> list[Part]:
        """Send less at once, by what the provider has just said, or else the half."""
        counted = error.facts.get("tokens")
        self._sender.too_large(part.sizes, counted, error.facts.get("learned", Learned()))
        if len(part) == 1:
            # By the provider's own count it is the text; by the account's quota it may pass later.
            reason = str(error)
            if counted is None:
                reason += " Cut the text shorter, or see limits.tier and limits.tokens_per_minute."
            self._refuse(part, reason, lasting=counted is not None)
            return []
        if self._sender.fitting(part.sizes)[0] < len(part):
            return [replace(part, cause="split")]  # cut when its turn comes
        return part.halves("split")

    def _isolate(self, part: Part, error: BatchRefused) -> list[Part]:
        """Cut the texts off that the provider blames, or halve `part` to find them."""
        if len(part) == 1:
            self._suspect(part, str(error))
            return []
        named = sorted({at for at in error.facts.get("positions", ()) if 0 <= at < len(part)})
        if named and len(named) < len(part):
            rest = sorted(set(range(len(part))) - set(named))
            return [part.take(rest, "isolate"), part.take(named, "isolate")]
        return part.halves("isolate")

    def _doubt(self, part: Part, error: AnswerRejected) -> list[Part]:
        """Ask once more for all of it; then only the texts that got no good vector are doubted."""
        bad = error.facts.get("positions", ())
        if self._attempt < TRUSTED_ATTEMPTS or not bad:
            raise error
        if len(bad) < len(part):
            rest = sorted(set(range(len(part))) - set(bad))
            return [part.take(rest, "isolate"), part.take(bad, "isolate")]
        if self._attempt == TRUSTED_ATTEMPTS or not self._sender.answers:
            raise error  # all of it is bad: that is hardly the texts
        if len(part) > 1:
            return [part.take([at], "isolate") for at in range(len(part))]
        self._suspect(part, str(error))
        return []

    def _suspect(self, part: Part, reason: str) -> None:
        """Put one text aside that seems to be bad."""
        self._suspects.append((part, reason))
        self._sender.refuses()
        if self._terms.on_error == "fail_fast" or self._sender.refusals >= PROOF_AFTER:
            self._judge()

    def _judge(self) -> None:
        """Refuse the suspects, once it is clear that the provider takes other texts."""
        suspects, self._suspects = self._suspects, []
        if suspects and not self._believable(len(suspects)):
            self._prove(suspects[0][1])
        for part, reason in suspects:
            self._refuse(part, reason, lasting=True)

    def _believable(self, suspects: int) -> bool:
        """Whether texts were taken beside those refused; of one alone, at any time before."""
        return self._sender.proven and (suspects == 1 or self._sender.answers > self._answers)

    def _prove(self, reason: str) -> None:
        while True:
            try:
                with ExitStack() as stack:
                    with self._sender.turn:
                        _, tokens = self._sender.fitting(self._sender.sizes(pa.array([PROOF])))
                        turn = stack.enter_context(self._turn(1, tokens, time.perf_counter()))
                    _, call = self._call([PROOF], "proof", turn)
            except ProviderThrottled:
                continue
            except BatchRefused:
                denied = ProviderDenied(
                    f"{self._provider.space} refuses every text, a plain English sentence too, so "
                    f"the texts are not to blame. It says: {reason}"
                )
                self._sender.stop(denied)
                raise denied from None
            self._folder.note(call)
            self._sender.works()
            return

    def _refuse(self, part: Part, reason: str, *, lasting: bool) -> None:
        """Give up one text."""
        (text_hash,) = part.rows.column("text_hash").to_pylist()
        refused = Refused(text_hash, reason, lasting and self._terms.on_error == "quarantine")
        if self._terms.on_error == "fail_fast":
            error = BatchRefused(
                f"A text of {len(part.texts[0]):,} characters is refused, and on_error is "
                f"fail_fast: {reason} Change the text, or set on_error to quarantine.",
                text_hash=text_hash,
            )
            self._sender.stop(error)
            raise error
        self._folder.refuse(self._provider.space, refused)
        self._refused.append(refused)
