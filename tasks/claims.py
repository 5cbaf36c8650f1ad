"""Claims: of runs that share a state, one pays for a text; the others take its answer.

A run claims the texts of a call just before it is sent, and lets them go when the call has
ended, after the answer is in its journal. What another living run has claimed is put off.

    runs/<run id>/claims/<space>-<batch>    the text hashes of a call, 16 bytes each

A claim is written before the other runs are looked at: of two runs that claim at once, at
least one sees the other. Which of them gives way is settled under one lock for the state.
What others know is looked up in the order claims, journals, cache, the way that an answer
takes, so that none is missed that moves on meanwhile.
"""

import fcntl
import os
import threading
import time
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import numpy.typing as npt
import pyarrow as pa
from filelock import FileLock

from tasks.cache import Cache
from tasks.journal import RunFolder, read_answer, unfolded_answers
from tasks.keys import KeySet
from tasks.providers import Space
from tasks.schemas import HASH

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
        self._lock = threading.Lock()
        self._looked_at = -POLL_S
        self._claimed: list[KeySet] = []
        self._journals: dict[Path, bytes] = {}
        self._answered = KeySet(_hashes(b""))

    def claim(self, batch: int, hashes: pa.Array) -> Standing:
        """Claim those of the texts that are free, until `release`.

        Args:
            batch: Number of their batch, which has one claim at most.
            hashes: text_hash of each text.

        Returns:
            How they stood; the free ones are this run's.
        """
        file = self._file(batch)
        _write(file, hashes)
        if not any(self._others()):  # whoever comes from now on sees the claim
            return self._alone(file, hashes)
        with self._lock, FileLock(Path(self._folder.state_uri) / "claims.lock", poll_interval=0.01):
            self._look()
            standing = self._standing(hashes)
            _trim(file, hashes, standing)
        return standing

    def release(self, batch: int) -> None:
        """Let go what the batch has claimed, if it has."""
        self._file(batch).unlink(missing_ok=True)

    def standing(self, hashes: pa.Array) -> Standing:
        """How texts stand by now, give or take half of `POLL_S`."""
        with self._lock:
            if time.monotonic() - self._looked_at > POLL_S / 2:
                self._look()
            return self._standing(hashes)

    def _file(self, batch: int) -> Path:
        return self._folder.path / "claims" / f"{self._space.id}-{batch:08d}"

    def _alone(self, file: Path, hashes: pa.Array) -> Standing:
        self._cache.refresh()  # others may have come, paid and gone
        found = self._cache.holds(hashes)
        standing = Standing(found, np.zeros(len(found), dtype=bool))
        _trim(file, hashes, standing)
        return standing

    def _others(self) -> Iterator[Path]:
        """Folders of all other runs, living or dead."""
        with suppress(FileNotFoundError), os.scandir(self._folder.path.parent) as entries:
            for entry in entries:
                if entry.name != self._folder.run_id and entry.is_dir():
                    yield Path(entry.path)

    def _look(self) -> None:
        """See what all other runs have claimed and answered."""
        others = list(self._others())
        claimed = {run.name: _claims(run, self._space) for run in others}
        # Asked before the journals are read: that of a run dead by then gains nothing more.
        self._claimed = [
            KeySet(one) for run, one in claimed.items() if len(one) and self._lives(run)
        ]
        files = [file for run in others for file in sorted((run / "answers").glob("*.arrow"))]
        if files != list(self._journals):
            self._journals = {
                file: self._journals[file] if file in self._journals else self._read(file)
                for file in files
            }
            self._answered = KeySet(_hashes(b"".join(self._journals.values())))
        self._cache.refresh()
        self._looked_at = time.monotonic()

    def _read(self, file: Path) -> bytes:
        answer = read_answer(file)
        if answer is None or answer.space != self._space:
            return b""
        return _bytes(answer.table.column("text_hash").combine_chunks())

    def _standing(self, hashes: pa.Array) -> Standing:
        found = self._answered.holds(hashes) | self._cache.holds(hashes)
        taken = np.zeros(len(found), dtype=bool)
        for claimed in self._claimed:
            taken |= claimed.holds(hashes)
        return Standing(found, taken & ~found)

    def _lives(self, run_id: str) -> bool:
        """Whether somebody holds the lock of a run."""
        try:
            lock = os.open(RunFolder(self._folder.state_uri, run_id).lock, os.O_RDONLY)
        except FileNotFoundError:
            return False
        try:
            # Shared: of two that ask at once, neither takes the other for the run.
            fcntl.flock(lock, fcntl.LOCK_SH | fcntl.LOCK_NB)
        except BlockingIOError:
            return True
        finally:
            os.close(lock)
        return False


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


def _claims(run: Path, space: Space) -> pa.Array:
    """text_hash of all that a run has claimed in a space."""
    found = list[bytes]()
    for file in (run / "claims").glob(f"{space.id}-*"):
        with suppress(FileNotFoundError):  # let go meanwhile
            found.append(file.read_bytes())
    return _hashes(b"".join(found))


def _trim(file: Path, hashes: pa.Array, standing: Standing) -> None:
    """Keep a claim to what was free."""
    free = standing.free
    if not free.any():
        file.unlink()
    elif not free.all():
        _write(file, hashes.filter(pa.array(free)))


def _write(file: Path, hashes: pa.Array) -> None:
    """Write a claim, whole or not at all; it need not outlive the machine."""
    file.parent.mkdir(exist_ok=True)
    temporary = file.with_name(f"writing-{file.name}")
    temporary.write_bytes(_bytes(hashes))
    temporary.rename(file)


def _bytes(hashes: pa.Array) -> bytes:
    width, buffer = HASH.byte_width, hashes.buffers()[1]
    return bytes(buffer[width * hashes.offset : width * (hashes.offset + len(hashes))])


def _hashes(data: bytes) -> pa.Array:
    count = len(data) // HASH.byte_width
    return pa.Array.from_buffers(HASH, count, [None, pa.py_buffer(data)])
