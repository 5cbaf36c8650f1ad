"""Claims: of runs that share a state, one pays for a text; the others take its answer.

A run claims the texts of a call just before it is sent, and lets them go when the call has
ended, after the answer is in its journal. What another living run has claimed is put off.

    runs/<run id>/claims/<space>-<batch>-<digest>   the text hashes of a call, 16 bytes each

First the claim is written, then the other runs are looked at, and what they have claimed is
not sent. So of two runs that want a text at once at least one sees the other, and never do
both send it; where neither does, they try again at random moments. What others know is
looked up in the order claims, journals, cache, the way that an answer takes, so that none
is missed that moves on meanwhile.
"""

import threading
import time
from contextlib import suppress
from dataclasses import dataclass, field
from hashlib import blake2b

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from tasks.cache import Cache
from tasks.errors import StorageFailed
from tasks.journal import RunFolder, read_answer, unfolded_answers
from tasks.keys import KeySet
from tasks.schemas import HASH
from tasks.storage import storage_at

POLL_S = 0.5
"""Who waits for another run looks so often what has become of its calls."""

Mask = npt.NDArray[np.bool_]


@dataclass(frozen=True)
class Standing:
    """How texts stand with the other runs, a truth value a text.

    Attributes:
        found: Its vector is paid for, in a journal or in the cache.
        taken: A living run is sending it.
    """

    found: Mask
    taken: Mask

    @property
    def free(self) -> Mask:
        """Neither of both."""
        return ~(self.found | self.taken)


@dataclass
class Shared:
    """What other runs have paid for while this one embedded.

    Attributes:
        tokens: Estimated, of all of these texts.
    """

    tokens: int = 0
    _parts: list[pa.Array] = field(default_factory=list)

    def add(self, hashes: pa.Array, tokens: int) -> None:
        """Note the text_hash of some, and their tokens."""
        self._parts.append(hashes)
        self.tokens += tokens

    @property
    def hashes(self) -> pa.Array:
        """text_hash of each."""
        return pa.concat_arrays([_hashes(b""), *self._parts])

    @property
    def texts(self) -> int:
        """How many."""
        return sum(map(len, self._parts))


class Claims:
    """What one run sends, and what it sees of the others. Serves the threads of one process.

    Args:
        folder: The run's.
        cache: Vectors known, of the space that the run embeds in.
    """

    def __init__(self, folder: RunFolder, cache: Cache) -> None:
        self._folder = folder
        self._space = cache.space
        self._cache = cache
        self._storage = storage_at(folder.state_uri)
        self._mine: dict[int, str] = {}
        self._lock = threading.Lock()
        self._looked_at = -POLL_S
        self._theirs: dict[str, bytes] = {}
        self._claimed = KeySet(_hashes(b""))
        self._journals: dict[str, bytes] = {}
        self._answered = KeySet(_hashes(b""))

    def claim(self, batch: int, hashes: pa.Array) -> Standing:
        """Claim those of the texts that are free, until `release`.

        Args:
            batch: Number of their batch, which has one claim at most.
            hashes: text_hash of each text.

        Returns:
            How they stood; the free ones are this run's. Where none is, nothing is claimed.

        Raises:
            LockLost: Others take this run for dead: it did not renew its lock in time.
            StorageFailed: The state cannot be read or written.
        """
        self._storage.require_held(self._folder.lock, self._folder.run_id)
        data = _bytes(hashes)
        # Named by what it holds: who has read it once need not read it again.
        digest = blake2b(data, digest_size=8).hexdigest()
        name = f"{_folder(self._folder)}/{self._space.id}-{batch:08d}-{digest}"
        self._mine[batch] = name
        self._storage.write(name, data, durable=False)
        if not self._others():  # whoever comes from now on sees the claim
            self._cache.refresh()  # others may have come, paid and gone
            found = self._cache.holds(hashes)
            standing = Standing(found, np.zeros(len(found), dtype=bool))
        else:
            with self._lock:
                self._look()
                standing = self._standing(hashes)
        if not standing.free.any():
            self.release(batch)
        return standing

    def release(self, batch: int) -> None:
        """Let go what the batch has claimed, if it has; where that fails, it ends with the run."""
        if name := self._mine.pop(batch, None):
            with suppress(StorageFailed):
                self._storage.delete([name])

    def standing(self, hashes: pa.Array) -> Standing:
        """How texts stand by now, give or take half of `POLL_S`.

        Raises:
            StorageFailed: The state cannot be read.
        """
        with self._lock:
            if time.monotonic() - self._looked_at > POLL_S / 2:
                self._look()
            return self._standing(hashes)

    def _others(self) -> list[RunFolder]:
        """All other runs, living or dead."""
        runs = self._folder.files.folders("runs")
        state = self._folder.state_uri
        return [RunFolder(state, run) for run in runs if run != self._folder.run_id]

    def _look(self) -> None:
        """See what all other runs have claimed and answered."""
        others = self._others()
        claims = [
            name
            for run in others
            if (names := self._claims_of(run)) and self._storage.lives(run.lock)
            for name in names
        ]
        self._theirs = {name: self._theirs.get(name) or self._read_claim(name) for name in claims}
        self._claimed = KeySet(_hashes(b"".join(self._theirs.values())))
        # After it was asked who lives: the journal of a run dead by then gains nothing more.
        answers = [(run, name) for run in others for name in run.answers]
        if [name for _, name in answers] != list(self._journals):
            self._journals = {
                name: self._journals[name] if name in self._journals else self._read(run, name)
                for run, name in answers
            }
            self._answered = KeySet(_hashes(b"".join(self._journals.values())))
        self._cache.refresh()
        self._looked_at = time.monotonic()

    def _claims_of(self, run: RunFolder) -> list[str]:
        start, names = f"{_folder(run)}/{self._space.id}-", self._storage.names(_folder(run))
        return [name for name in names if name.startswith(start)]

    def _read_claim(self, name: str) -> bytes:
        data = self._storage.read(name)
        return b"" if data is None else data.to_pybytes()  # None: let go meanwhile

    def _read(self, run: RunFolder, name: str) -> bytes:
        answer = read_answer(run, name)
        if answer is None or answer.space != self._space:
            return b""
        return _bytes(answer.table.column("text_hash").combine_chunks())

    def _standing(self, hashes: pa.Array) -> Standing:
        found = self._answered.holds(hashes) | self._cache.holds(hashes)
        return Standing(found, self._claimed.holds(hashes) & ~found)


def take_up(cache: Cache, state_uri: str, hashes: pa.Array) -> None:
    """Put vectors into the cache that were found in the journals of other runs.

    Args:
        cache: Vectors known.
        state_uri: Where the runs' folders are.
        hashes: text_hash of those that are needed.
    """
    cache.refresh()
    wanted = KeySet(hashes.filter(pa.array(~cache.holds(hashes))))
    if not len(wanted):
        return
    answers = [
        answer.table.filter(pa.array(wanted.holds(answer.table.column("text_hash"))))
        for answer in unfolded_answers(state_uri, cache.space)
    ]
    cache.remember(answer for answer in answers if answer.num_rows)
    cache.refresh()  # what its run has folded since is there


def _folder(run: RunFolder) -> str:
    return f"runs/{run.run_id}/claims"


def _bytes(hashes: pa.Array) -> bytes:
    width, buffer = HASH.byte_width, hashes.buffers()[1]
    return bytes(buffer[width * hashes.offset : width * (hashes.offset + len(hashes))])


def _hashes(data: bytes) -> pa.Array:
    count = len(data) // HASH.byte_width
    return pa.Array.from_buffers(HASH, count, [None, pa.py_buffer(data)])
