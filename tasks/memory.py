"""Memory: how much of a corpus a run holds at once, and that what it frees is free at once.

Texts and vectors pass through a run in pieces, whose size follows from `limits.memory_mb`. Of the
whole corpus only keys of fixed width are held.
"""

import ctypes
import os
import resource
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, cast

import pyarrow as pa

from tasks.aside import meanwhile
from tasks.errors import SettingsError
from tasks.providers import Provider

BASE_MB = 500
"""Python, Prefect, LanceDB and their code, before there is any corpus (measured: 460)."""
KEY_BYTES = 200
"""What the keys of a chunk take, those of the index and of the cache among them (measured)."""
LEAST_MB = 100
"""Less than that for all pieces together would make calls and commits too small to be of use."""
FEWEST_MB = 640
"""Enough for 200,000 chunks; no limit may be less."""
FLYING_MB = 512
"""Most for all calls in flight: with more of them the account or the processor is the limit."""
OTHERS_MB = 150
"""Beside calls: vectors on their way to the cache and the index, and what lies free between them
(measured: 60)."""
COPIES = 4
"""Copies of a vector that a call holds at once: as it came, checked, in the journal, for who
asked."""
OVERHEAD = 1.25
"""Beside texts and vectors a call holds a quarter more: hashes, tables, what Python adds."""
MIB = 2**20

LOOK_S = 0.25
"""So often a run looks how much it holds."""

_CGROUP = Path("/sys/fs/cgroup/memory.max")
_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD, _M_ARENA_MAX = -1, -3, -8
"""Numbers of settings of glibc's `mallopt`, from its malloc.h."""
_KEPT_BYTES = 16 * MIB
_LARGE_BYTES = 8 * MIB
_HEAPS = 1
_READ_AHEAD_BYTES = 16 * MIB


@dataclass(frozen=True)
class Sizes:
    """What a run holds at once, in bytes.

    Attributes:
        share: Of the most that makes a run faster, 0 to 1.
        room_mb: What the limit leaves beside code and keys, MiB.
        flying_mb: The most for all calls in flight, MiB.
    """

    share: float = 1.0
    room_mb: float = FLYING_MB + OTHERS_MB
    flying_mb: float = FLYING_MB

    @property
    def flying(self) -> int:
        """Of all calls in flight, as `estimated_bytes` counts them."""
        return int(self.share * self.flying_mb * MIB)

    @property
    def folded(self) -> int:
        """Vectors that go into the cache in one commit, three times as many if it lags behind."""
        return int(self.share * 12 * MIB)

    @property
    def written(self) -> int:
        """Vectors that go to the index at once, each held some times over on its way."""
        return int(self.share * 8 * MIB)

    @property
    def kept(self) -> int:
        """What the process may hold in all before it gives back what is free."""
        return BASE_MB * MIB + int(min(192, self.room_mb / 2) * MIB)

    @property
    def grown(self) -> int:
        """Where it holds more than `kept`: by so much it may grow before it gives back again."""
        return int(min(32, self.room_mb / 4) * MIB)


MOST = Sizes()


def sizes_for(memory_mb: int | None, chunks: int, flying_mb: float = FLYING_MB) -> Sizes:
    """The sizes by which a run of so many chunks keeps to its limit.

    Args:
        memory_mb: The limit of the whole process, MiB; None: `default_mb()`.
        chunks: Of the corpus.
        flying_mb: What all calls in flight would take if none were made smaller, MiB.

    Raises:
        SettingsError: The keys of the corpus alone take more.
    """
    limit = default_mb() if memory_mb is None else memory_mb
    taken = BASE_MB + KEY_BYTES * chunks / MIB
    room = limit - taken
    if room < LEAST_MB:
        raise SettingsError(
            f"limits.memory_mb: {limit:,} MiB are too little for {chunks:,} chunks: their keys, "
            f"Python, Prefect and LanceDB take about {taken:,.0f}. Nothing was sent. Allow at "
            f"least {taken + LEAST_MB:,.0f}."
        )
    flying_mb = min(FLYING_MB, flying_mb)
    return Sizes(min(1.0, room / (flying_mb + OTHERS_MB)), room, flying_mb)


def default_mb() -> int:
    """Half of the memory of this machine, or container, MiB."""
    pages = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    told = _CGROUP.read_text(encoding="ascii").strip() if _CGROUP.is_file() else "max"
    allowed = min(pages, int(told)) if told.isdigit() else pages
    return max(FEWEST_MB, allowed // MIB // 2)


def in_flight_mb(provider: Provider, chunks: int, text_bytes: int) -> float:
    """The most MiB of all calls in flight at once, where `provider` takes so many texts in each.

    Args:
        provider: By the config.
        chunks: Of the corpus, as many as were looked at.
        text_bytes: Of the texts of all of them.
    """
    if not chunks:
        return FLYING_MB  # how long texts are is not known
    limits = provider.limits
    texts = limits.concurrency * limits.texts_per_request
    characters = texts * text_bytes // chunks
    return estimated_bytes(texts, characters, provider.space.vector_bytes) / MIB


def within(sizes: Sizes, provider: Provider, chunks: int, text_bytes: int) -> Provider:
    """`provider` with calls so small that all that may be in flight at once fit.

    Args:
        sizes: Those of the run.
        provider: By the config.
        chunks: Of the corpus, as many as were looked at.
        text_bytes: Of the texts of all of them.
    """
    # Not left to the division below, whose rounding would make calls a text smaller.
    if in_flight_mb(provider, chunks, text_bytes) * MIB <= sizes.flying:
        return provider
    limits = provider.limits
    most = most_texts(
        sizes.flying // limits.concurrency, chunks, text_bytes, provider.space.vector_bytes
    )
    if most >= limits.texts_per_request:
        return provider
    # Each provider is a frozen dataclass, which its protocol does not say.
    made: Provider = replace(cast("Any", provider), limits=replace(limits, texts_per_request=most))
    return made


def most_texts(room_bytes: int, texts: int, characters: int, vector_bytes: int) -> int:
    """How many of such texts, at least one, a call may hold.

    Args:
        room_bytes: For one call.
        texts: How many there are.
        characters: Of all of them.
        vector_bytes: Of one vector.
    """
    if not texts:
        return sys.maxsize
    return max(1, int(room_bytes * texts / estimated_bytes(texts, characters, vector_bytes)))


def estimated_bytes(texts: int, characters: int, vector_bytes: int) -> int:
    """Memory that embedding takes at once.

    Args:
        texts: How many.
        characters: Of all of them; two bytes each, between ASCII and the rest.
        vector_bytes: Of one vector.
    """
    return int(OVERHEAD * (COPIES * texts * vector_bytes + 2 * COPIES * characters))


def spare() -> None:
    """Have this process keep little of what it frees, and LanceDB read ahead less, from now on.

    Pieces of some megabytes are made in one thread and freed in another. The C library keeps
    them for later, in a heap for each few threads, and so does Arrow's own allocator: a run of
    100,000 vectors of 1,024 floats held 1,100 MB, and 800 with this, in the same time. To keep
    nothing at all costs more than it spares: with pieces from 1 MiB on given back at once it held
    620 MB and took a third longer, as the system clears each page before it gives it out again.
    """
    # LanceDB looks when it reads for the first time.
    os.environ.setdefault("LANCE_DEFAULT_IO_BUFFER_SIZE", str(_READ_AHEAD_BYTES))
    pa.set_memory_pool(pa.system_memory_pool())
    mallopt = _of_glibc("mallopt")
    if mallopt is not None:
        # Where it is not set, glibc raises it to 32 MiB as soon as a piece of that size is freed.
        mallopt(_M_MMAP_THRESHOLD, _LARGE_BYTES)
        mallopt(_M_TRIM_THRESHOLD, _KEPT_BYTES)
        mallopt(_M_ARENA_MAX, _HEAPS)


class _Held:
    """Bytes that this process held after it last gave back what it did not use."""

    bytes = 0


@contextmanager
def giving_back(sizes: Sizes) -> Iterator[None]:
    """Give back what is free between pieces in use, whenever this process has grown by much.

    Freed pieces stay where a newer one lies above them; without this a run of a million chunks
    held 1,800 MB. To give back each time would cost what `spare` saves.
    """
    with meanwhile(lambda: _give_back(sizes), LOOK_S):
        yield


def _give_back(sizes: Sizes) -> None:
    """Give back what is free, if this process has grown by much since that was done last."""
    if _resident_bytes() > max(sizes.kept, _Held.bytes + sizes.grown):
        give_back_all()


def give_back_all() -> None:
    """Give back all that is free, as between two stages: the next needs pieces of other sizes.

    Of a million chunks the stages before embedding left 120 MB, and embedding 200.
    """
    trim = _of_glibc("malloc_trim")
    if trim is not None:
        trim(0)
        _Held.bytes = _resident_bytes()


def _of_glibc(name: str) -> Any:
    """A function of glibc; None where the C library is another one."""
    return getattr(ctypes.CDLL(None), name, None) if sys.platform == "linux" else None


def _resident_bytes() -> int:
    """What this process holds now; 0 where the system does not tell."""
    try:
        pages = Path("/proc/self/statm").read_text(encoding="ascii").split()[1]
    except OSError:  # no Linux, or no file may be opened now: no run fails for that
        return 0
    return int(pages) * os.sysconf("SC_PAGE_SIZE")


def peak_bytes() -> int:
    """Most memory this process held, in bytes."""
    # On Linux `ru_maxrss` counts what the process held that started this one, too.
    status = Path("/proc/self/status")
    told = status.read_text(encoding="ascii") if status.is_file() else ""
    if found := told.partition("VmHWM:")[2].split():
        return 1024 * int(found[0])
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024
