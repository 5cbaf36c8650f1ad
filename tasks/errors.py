"""Everything that can go wrong, named after what happens next.

EmbedOnceError
├── SettingsError        a person changes a setting and runs again; nothing was touched
├── CorpusError          a person mends the corpus and runs again; nothing was touched
├── IndexHeld            another run holds the index; run again when it has ended
├── IndexConflict        the table is not ours, or of another space; name another one
├── StorageFailed        a folder or store does not take or give files: send nothing more
├── LockLost             another run has taken the lock over: commit nothing more
├── BudgetReached        the run may spend no more; run again for the rest
├── NotApproved          nobody has approved what the run would cost; nothing was spent
└── ProviderError        what a provider's call can end with
    ├── ProviderBusy     wait, then the same call may work; spends a retry
    │   ├── AnswerRejected   the answer failed a check; ask again, never store it
    │   └── ProviderUnreachable  nobody is there; wait, unless nobody ever was
    ├── ProviderThrottled    the account's limit is reached: all calls wait; spends no retry
    ├── BatchTooLarge    split the batch
    ├── BatchRefused     one text in it is bad: isolate it
    ├── ProviderDenied   no call can work: stop
    ├── JobLost          answers that may be paid for are not to be had: a person decides
    └── RunStopped       another call ended the run; this one was not sent

A message says what was found and where, and what to do about it. It never holds
a key or a whole text.
"""

from typing import Any, ClassVar

UNFORESEEN = "Something unforeseen happened"
"""How a failure begins that none of these names."""


class EmbedOnceError(Exception):
    """Root of all errors meant for people.

    One positional message, so that it survives pickling; facts ride along as keywords.

    Attributes:
        exit_code: What the command line ends with.
        facts: Values behind the message, for logs and tests.
    """

    exit_code: ClassVar[int] = 1

    def __init__(self, message: str, **facts: Any) -> None:
        super().__init__(message)
        self.facts = facts


class SettingsError(EmbedOnceError):
    """A setting is wrong or a guard refused; nothing was touched."""

    exit_code = 2


class CorpusError(EmbedOnceError):
    """The corpus holds what no index can hold, such as one id twice; nothing was touched."""


class IndexHeld(EmbedOnceError):
    """Another run holds the index."""

    exit_code = 6


class IndexConflict(SettingsError):
    """The table at `index` is not ours to write, or holds vectors of another space."""


class StorageFailed(EmbedOnceError):
    """A folder or an object store cannot be read or written.

    Facts: `lost`, texts that were paid for and could not be kept anywhere.
    """


class LockLost(EmbedOnceError):
    """This process did not renew its lock in time, and another one has taken it over."""


class BudgetReached(EmbedOnceError):
    """The next call would cost more than the run may; what was paid for is kept."""

    exit_code = 4


class NotApproved(EmbedOnceError):
    """The run would cost more than it may unasked, and nobody has approved it.

    Facts: `plan`, what it would have done.
    """

    exit_code = 4


class ProviderError(EmbedOnceError):
    """A call to a provider did not bring vectors."""


class ProviderBusy(ProviderError):
    """The same call may work later.

    Facts: `retry_after` (seconds, or None where the provider names no time).
    """


class AnswerRejected(ProviderBusy):
    """The provider answered, but not with the vectors that were asked for.

    Facts: `positions` of the texts whose vectors are bad, () where it is the whole answer;
    `billed_tokens`, where the answer was dropped before anyone else could read them.
    """


class ProviderUnreachable(ProviderBusy):
    """Nobody is at the provider's address: no such name, or no connection taken."""


class ProviderThrottled(ProviderError):
    """The account's limit is reached; the same call works later, and no call does before.

    Facts: `retry_after` as in `ProviderBusy`; `learned`, a `Learned` with the limits the
    provider names; `streams`, True where it is calls at once that are too many.
    """


class BatchTooLarge(ProviderError):
    """The batch holds more than one call takes.

    Facts: `learned`, a `Learned` with what one call takes, where the provider names it;
    `tokens`, the provider's own count of the batch or None.
    """


class BatchRefused(ProviderError):
    """The provider refuses a text of this batch.

    Facts: `positions`, of the texts that it names, () where it names none.
    """


class ProviderDenied(ProviderError):
    """No call can work: key, address or model."""


class JobLost(ProviderError):
    """A job of the Batch lane, or some of its answers, are not to be had; they may be billed."""


class RunStopped(ProviderError):
    """Another call ended the run; this one was not sent."""
