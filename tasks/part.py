"""Part: what of a batch goes into one call."""

from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt
import pyarrow as pa


@dataclass(frozen=True)
class Part:
    """Rows of a batch that go into one call, and why they do.

    Attributes:
        rows: BATCH.
        cause: As in `Call`.
        texts: Those of the rows, in their order.
    """

    rows: pa.Table
    cause: str
    texts: list[str] = field(repr=False)

    @classmethod
    def of(cls, rows: pa.Table, cause: str) -> "Part":
        """All of `rows`."""
        return cls(rows, cause, rows.column("text").to_pylist())

    def __len__(self) -> int:
        return len(self.texts)

    def take(self, positions: Sequence[int] | npt.NDArray[np.int64], cause: str) -> "Part":
        """The rows at these positions."""
        return Part.of(self.rows.take(pa.array(positions, pa.int64())), cause)

    def cut(self, count: int) -> tuple["Part", list["Part"]]:
        """The first `count` rows, and the rest if there is any."""
        if count >= len(self):
            return self, []
        return self.take(range(count), self.cause), [self.take(range(count, len(self)), "split")]

    def halves(self, cause: str) -> list["Part"]:
        """The first and the second half; the first is the larger one."""
        middle = (len(self) + 1) // 2
        return [self.take(range(middle), cause), self.take(range(middle, len(self)), cause)]
