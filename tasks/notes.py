"""Notes: what a run writes down of its calls, of refused texts, and of itself."""

from dataclasses import dataclass

from tasks.errors import BatchTooLarge, ProviderThrottled

OUTCOMES = {"ok": "ok", ProviderThrottled.__name__: "throttled", BatchTooLarge.__name__: "split"}
"""How a call counts in reports and totals, by its status; by any other it has "failed"."""


@dataclass(frozen=True)
class Call:
    """One call to a provider, as the ledger keeps it.

    Attributes:
        run_id: The run that made it.
        batch: Number of its batch, from 1; 0 for a call that belongs to none.
        attempt: Of the batch, from 1.
        call: Of the attempt, from 1.
        cause: Why it was made: "first", "retry" after a failure, "wait" after the account's
            limit was reached, "split" of a batch too large, "isolate" to find a text that is
            refused, "proof" that the provider takes any text, "query" of a search, "verify" of a
            text whose vector is known.
        status: "ok", or the class of the error; "unforeseen" where it was none of ours.
        started_at: ISO 8601, UTC.
        waited: Seconds it waited for its turn before it was sent.
        seconds: From sending to the end of the answer.
        texts: Texts in it.
        tokens_estimated: By our own count.
        tokens_billed: By the provider's word; 0 where it failed.
        usd: tokens_billed at list price.
        request_id: The provider's name for it.
        model: Provider and model, `voyage/voyage-4`; "" where an earlier version wrote it down.
        index: Folder and table it was made for; "" where it was for none, or as with `model`.
        lane: "realtime", or "batch" for what came through the Batch lane, without its times.
    """

    run_id: str
    batch: int
    attempt: int
    call: int
    cause: str
    status: str
    started_at: str
    waited: float
    seconds: float
    texts: int
    tokens_estimated: int
    tokens_billed: int
    usd: float
    request_id: str
    model: str = ""
    index: str = ""
    lane: str = "realtime"

    @property
    def key(self) -> tuple[int, int, int]:
        """What tells it from all other calls of its run."""
        return self.batch, self.attempt, self.call


@dataclass(frozen=True)
class Refused:
    """A text that no call will embed.

    Attributes:
        text_hash: Which.
        reason: In the provider's words, cut, without the text.
        lasting: Whether it is the text's fault, so that it is not worth sending again.
    """

    text_hash: bytes
    reason: str
    lasting: bool = True


@dataclass(frozen=True)
class About:
    """What a run is.

    Attributes:
        run_id: Id of the Prefect flow run; `-2`, … follows where it was retried.
        name: The config's name.
        index: Folder and table.
        started_at: ISO 8601, UTC.
        concurrency: Most calls in flight.
        model: Provider and model; "" where an earlier version wrote it down.
    """

    run_id: str
    name: str
    index: str
    started_at: str
    concurrency: int
    model: str = ""
