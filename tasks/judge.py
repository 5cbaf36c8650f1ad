"""Judge: which of two vectors for one text is the right one.

Where index and cache disagree, the provider knows: it is asked wherever that costs nothing,
and for as many texts as a person pays for. Where it is not asked, a vector that the cache of
another space has for that text is of that space, and else the cache is believed: its entries
were checked, with their digest, on the way from the provider.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from tasks.cache import Cache, caches_beside
from tasks.embed import embed_with_retries
from tasks.examine import Entries, Flags, Rows
from tasks.journal import RunFolder, read_answer
from tasks.keys import KeySet, first_of_each
from tasks.pack import cut
from tasks.params import Config
from tasks.providers import Provider, checked_vectors
from tasks.schemas import BATCH, Batch, vectors_schema
from tasks.sender import Terms, forget_sender, sender_of
from tasks.soundness import ALIKE, SAME, Fault, distances, numbers

FREE_SAMPLE = 100
"""Rows embedded again where that costs nothing, beside all that are in doubt."""
SEED = 20
JUDGED_ROWS = 1024
RETRIES = 2

Positions = npt.NDArray[np.int64]


@dataclass(frozen=True)
class Asking:
    """Whom to ask, and how much.

    Attributes:
        config: Its limits hold.
        provider: Who embeds.
        usd_per_million_tokens: Its list price.
        sample: Texts to ask for; of a provider that costs nothing, beside those in doubt.
        folder: The run's folder, with its journal; None where nothing may be paid for.
    """

    config: Config
    provider: Provider
    usd_per_million_tokens: float
    sample: int
    folder: RunFolder | None

    @property
    def free(self) -> bool:
        """Whether asking costs nothing."""
        return not self.usd_per_million_tokens


def judge(rows: Rows, entries: Entries, asking: Asking) -> int:
    """Enter in `rows.faults` and `entries.faults` which vectors do not belong to their text.

    Returns:
        Texts that were embedded again.

    Raises:
        ProviderError: The provider was to be asked and did not answer.
    """
    doubtful = _doubtful(rows, entries)
    sampled = _sampled(rows)
    asked = 0
    if asking.free:
        every = np.unique(np.concatenate([doubtful, sampled[: asking.sample]]))
        for at in _parts(every):
            _settle(rows, entries, at, _embedded(rows.texts(at).to_pylist(), asking.provider))
            asked += len(at)
        return asked
    if asking.sample and asking.folder is not None:
        unlike = doubtful[rows.unlike[doubtful]]
        order = np.concatenate([unlike, sampled, doubtful])
        order = order[first_of_each(rows.hashes.take(pa.array(order)))][: asking.sample]
        asked_for = [rows.hashes.take(pa.array(order)), rows.texts(order)]
        texts = pa.Table.from_arrays(asked_for, names=["text_hash", "text"])
        answers = _paid(texts, asking, asking.folder)
        asked = answers.num_rows
        known = KeySet(answers.column("text_hash"))
        judged = np.flatnonzero(known.holds(rows.hashes) & ~rows.bad_hash)
        for at in _parts(judged):
            places = known.positions(rows.hashes.take(pa.array(at)))
            _settle(rows, entries, at, numbers(answers.column("vector"))[places])
        doubtful = doubtful[~known.holds(rows.hashes.take(pa.array(doubtful)))]
    others = [one for one in caches_beside(entries.cache, asking.config.state.uri) if len(one)]
    for at in _parts(doubtful):
        _suppose(rows, entries, at, others)
    return asked


def _doubtful(rows: Rows, entries: Entries) -> Positions:
    """Rows whose vector the cache does not confirm, and such whose entry has no row to confirm."""
    held = entries.holds(rows.hashes)
    return np.flatnonzero((rows.good & (rows.unlike | ~held)) | (~rows.good & held))


def _sampled(rows: Rows) -> Positions:
    """All rows with a sound vector, in a random order that is the same each time."""
    sound = np.flatnonzero(rows.good)
    return np.random.default_rng(SEED).permutation(sound)


def _parts(at: Positions) -> Iterator[Positions]:
    for start in range(0, len(at), JUDGED_ROWS):
        yield at[start : start + JUDGED_ROWS]


def _settle(rows: Rows, entries: Entries, at: Positions, truth: Any) -> None:
    """Hold the vectors of these rows, and the entries of their texts, against the right ones."""
    _blame(rows.faults, at, _differ(rows, at, truth))
    entry = entries.at(rows.hashes.take(pa.array(at)))
    # A row whose hash is not that of its text says nothing about the entry of that hash.
    there = np.flatnonzero((entry >= 0) & ~rows.bad_hash[at])
    if len(there):
        wrong = distances(entries.vectors(entry[there]), truth[there]) > ALIKE
        _blame(entries.faults, entry[there], wrong)


def _differ(rows: Rows, at: Positions, truth: Any) -> Flags:
    """For each of these rows whether it has a sound vector and it is another one."""
    differ = np.zeros(len(at), dtype=bool)
    sound = np.flatnonzero(rows.good[at])
    if len(sound):
        ours = numbers(rows.take(at[sound], ["vector"]).column("vector"))
        differ[sound] = distances(ours, truth[sound]) > ALIKE
    return differ


def _suppose(rows: Rows, entries: Entries, at: Positions, others: list[Cache]) -> None:
    """What can be known of these rows when nobody is asked."""
    at = at[rows.good[at]]
    if not len(at):
        return
    hashes = rows.hashes.take(pa.array(at))
    ours = numbers(rows.take(at, ["vector"]).column("vector"))
    entry = entries.at(hashes)
    there = np.flatnonzero(entry >= 0)
    foreign, cache_foreign = _of_other_space(hashes, ours, others), np.zeros(len(at), dtype=bool)
    if len(there):
        theirs = entries.vectors(entry[there])
        cache_foreign[there] = _of_other_space(hashes.take(pa.array(there)), theirs, others)
    _blame(rows.faults, at, rows.unlike[at] & ~cache_foreign)
    _blame(rows.faults, at, foreign, Fault.OTHER_SPACE)
    _blame(entries.faults, entry[there], cache_foreign[there], Fault.OTHER_SPACE)


def _of_other_space(hashes: pa.Array, vectors: Any, others: list[Cache]) -> Flags:
    """For each vector whether another space's cache has it for that text."""
    found = np.zeros(len(hashes), dtype=bool)
    for other in others:
        there = np.flatnonzero(other.holds(hashes))
        if len(there):
            theirs = numbers(other.vectors(hashes.take(pa.array(there))))
            found[there] |= distances(vectors[there], theirs) <= SAME
    return found


def _blame(faults: Any, at: Positions, bad: Flags, fault: Fault = Fault.WRONG) -> None:
    faults[at[bad]] = fault


def _embedded(texts: list[str], provider: Provider) -> Any:
    """The vectors of `texts`, from a provider that costs nothing."""
    most = provider.limits.texts_per_request
    parts = [texts[start : start + most] for start in range(0, len(texts), most)]
    return np.concatenate(
        [checked_vectors(provider.embed(part), len(part), provider) for part in parts]
    )


def _paid(texts: pa.Table, asking: Asking, folder: RunFolder) -> pa.Table:
    """text_hash and vector of these texts, paid for within the account's limits.

    The answers stay in the journal of `folder`, so that none is paid for in vain.
    """
    provider, schema = asking.provider, vectors_schema(asking.provider.space.vector_type)
    terms = Terms(
        provider,
        folder,
        asking.usd_per_million_tokens,
        on_error="collect",
        max_wait_s=asking.config.limits.max_wait,
        shared=asking.config.limits.shared,
        anew=True,
        index=asking.config.index.place,
    )
    try:
        sender = sender_of(terms)
        counts = sender.counts(texts.column("text").combine_chunks())
        rows = texts.append_column("tokens", pa.array(counts, pa.int32())).cast(BATCH)
        for number, part in enumerate(cut(rows, sender.request_limits()), 1):
            batch = Batch.write(number, folder.staging, part.to_batches())
            embed_with_retries(batch, terms, RETRIES)
    finally:
        forget_sender(folder)
    answers = [read_answer(folder, name) for name in folder.answers]
    tables = [answer.table.cast(schema) for answer in answers if answer is not None]
    return pa.concat_tables([schema.empty_table(), *tables])
