"""Texts encoded a few at a time: those of like length together, as many as the memory takes."""

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from tasks.errors import EmbedOnceError
from tasks.providers import Vectors

Counts = npt.NDArray[np.int32]
"""Tokens of each text."""

Positions = npt.NDArray[np.int64]

_NO_MEMORY = ("can't allocate memory", "DefaultCPUAllocator", "out of memory", "bad_alloc")
"""What an error says that comes of too little memory and has no class of its own."""


class PartFailed(Exception):
    """Some texts cannot be encoded.

    Attributes:
        positions: Which ones.
        tokens: Of the longest of them.
        out_of_memory: Whether it is one text, for which there is too little memory.
    """

    def __init__(self, positions: Positions, tokens: int, cause: str, out_of_memory: bool) -> None:
        super().__init__(cause)
        self.positions = positions
        self.tokens = tokens
        self.out_of_memory = out_of_memory


@dataclass
class Budget:
    """How many padded tokens are encoded at once, by what has fitted so far.

    Attributes:
        tokens: Texts times tokens of the longest.
    """

    tokens: int

    def shrink(self, failed: int) -> None:
        """Take in that so many were too many."""
        self.tokens = max(1, min(self.tokens, failed) // 2)


def encode_in_parts(
    counts: Counts, budget: Budget, encode: Callable[[Positions], Vectors], vectors: Vectors
) -> None:
    """Fill `vectors` with what `encode` makes of each text, longest first.

    A part is padded to its longest text, so that texts of like length belong together. Where a
    part does not fit into the memory, the budget halves and all that is left goes on.

    Args:
        counts: Tokens of each text.
        budget: What is encoded at once; it shrinks where that was too much.
        encode: Makes a row for each of the positions that it is given.
        vectors: Shape (texts, dimension); row i is written for text i.

    Raises:
        PartFailed: `encode` failed otherwise, or for want of memory over a single text.
        EmbedOnceError: `encode` was told to stop.
    """
    todo = np.argsort(-counts.astype(np.int64), kind="stable")
    while len(todo):
        longest = max(1, int(counts[todo[0]]))
        part = todo[: max(1, budget.tokens // longest)]
        try:
            vectors[part] = encode(part)
        except EmbedOnceError:
            raise
        except Exception as error:  # noqa: BLE001 - models and backends promise no class
            # Only in words: its traceback holds on to what fills the memory.
            cause, full = f"{type(error).__name__}", is_out_of_memory(error)
        else:
            todo = todo[len(part) :]
            continue
        if not full or len(part) == 1:
            raise PartFailed(part, longest, cause, out_of_memory=full)
        budget.shrink(len(part) * longest)


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an error comes of too little memory, on the device or beside it."""
    if isinstance(error, MemoryError) or type(error).__name__ == "OutOfMemoryError":
        return True
    return isinstance(error, RuntimeError) and any(words in str(error) for words in _NO_MEMORY)
