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
        sizes: What the tokens of each of them follow from, by the provider's estimate.
    """

    rows: pa.Table
    cause: str
    texts: list[str] = field(repr=False)
    sizes: npt.NDArray[np.int32] = field(repr=False)

    def __len__(self) -> int:
        return len(self.texts)

    def take(self, positions: Sequence[int] | npt.NDArray[np.int64], cause: str) -> "Part":
        """The rows at these positions."""
        at = np.asarray(positions, np.int64)
        texts = [self.texts[each] for each in at.tolist()]
        return Part(self.rows.take(pa.array(at)), cause, texts, self.sizes[at])

    def cut(self, count: int) -> tuple["Part", list["Part"]]:
        """The first `count` rows, and the rest if there is any."""
        if count >= len(self):
            return self, []
        return self.take(range(count), self.cause), [self.take(range(count, len(self)), "split")]

    def halves(self, cause: str) -> list["Part"]:
        """The first and the second half; the first is the larger one."""
        middle = (len(self) + 1) // 2
        return [self.take(range(middle), cause), self.take(range(middle, len(self)), cause)]
