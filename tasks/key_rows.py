"""Which row of a table holds a key, for keys that keep coming: what is known of a cache.

Keys come in lots and are held in sorted arrays, the levels. Two levels of about one size become
one, as in a log-structured merge tree (O'Neil et al., 1996), unless it were more than an eighth
of all: so merging takes little memory beside. There are 31 levels at 10 million keys that come
8,192 at a time.
"""

from collections.abc import Iterator
from typing import NamedTuple

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from tasks.keys import halves, halves_in_lots, positions_among

LEVEL_KEYS = 2**17
"""Levels of so many keys are merged whatever their share of all."""
PARTS = 8

Numbers = npt.NDArray[np.uint64]


class _Level(NamedTuple):
    """Keys as pairs of numbers, sorted by the first, and the row of each: 24 bytes a key."""

    high: Numbers
    low: Numbers
    rows: Numbers


class KeyRows:
    """The rows of 16-byte keys. A value: to take more in is to make another one."""

    def __init__(self, levels: tuple[_Level, ...] = ()) -> None:
        self._levels = levels

    def __len__(self) -> int:
        return sum(len(level.rows) for level in self._levels)

    def with_more(self, keys: pa.Array | pa.ChunkedArray, rows: Numbers) -> "KeyRows":
        """These keys and further ones.

        Args:
            keys: Of one that is here already either row may be told from then on.
            rows: Where each of them is.
        """
        if not len(keys):
            return self
        high, low = halves(keys)
        order = np.argsort(high)
        levels = [*self._levels, _Level(high[order], low[order], rows[order])]
        most = max(LEVEL_KEYS, (len(self) + len(keys)) // PARTS)
        while len(levels) > 1:
            before, last = levels[-2:]
            if len(before.rows) > 2 * len(last.rows) or len(before.rows) + len(last.rows) > most:
                break
            levels[-2:] = [_merged(before, last)]
        return KeyRows(tuple(levels))

    def holds(self, keys: pa.Array | pa.ChunkedArray) -> npt.NDArray[np.bool_]:
        """For each key whether it is here."""
        found = [np.empty(0, bool)]
        found += [known for known, _ in self._found(keys)]
        return np.concatenate(found)

    def rows(self, keys: pa.Array | pa.ChunkedArray) -> Numbers:
        """The row of each key.

        Raises:
            KeyError: One of them is not here.
        """
        found = [np.empty(0, np.uint64)]
        for known, rows in self._found(keys):
            if not known.all():
                missing = sum(map(len, found)) + int(np.flatnonzero(~known)[0])
                raise KeyError(keys[missing].as_py().hex())
            found.append(rows)
        return np.concatenate(found)

    def _found(
        self, keys: pa.Array | pa.ChunkedArray
    ) -> Iterator[tuple[npt.NDArray[np.bool_], Numbers]]:
        """Which of the keys are here, and their rows; so many keys at a time."""
        for high, low in halves_in_lots(keys):
            rows, known = np.zeros(len(high), np.uint64), np.zeros(len(high), dtype=bool)
            for level in self._levels:
                at = positions_among(level.high, level.low, high, low)
                here = at >= 0
                rows[here] = level.rows[at[here]]
                known |= here
            yield known, rows


def _merged(left: _Level, right: _Level) -> _Level:
    at = np.searchsorted(left.high, right.high)
    return _Level(*(np.insert(ours, at, theirs) for ours, theirs in zip(left, right, strict=True)))
