"""Embeddings: what a `BatchEmbedder` gives back, row for row what was asked for."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Literal

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc

from tasks.keys import text_hash
from tasks.notes import Call
from tasks.providers import Space, Vectors
from tasks.schemas import HASH

if TYPE_CHECKING:
    import pandas as pd

Kind = Literal["blank", "not text", "quarantined", "refused", "failed", "cancelled"]
"""Why a text has no vector: there is nothing in it, it is no text, the provider has refused it
before or now, no call brought it, or nobody sends any more."""


@dataclass(frozen=True)
class TextError:
    """Why a text has no vector.

    Attributes:
        kind: What it is.
        message: What was found, and what to do about it; never the text itself.
    """

    kind: Kind
    message: str


@dataclass(frozen=True)
class Embeddings:
    """The vectors of texts, in the order of the texts.

    Attributes:
        texts: As they were given; None where one was no text.
        vectors: Shape (texts, dimension), float32, of length 1; (texts, dimension / 8), uint8, in
            a space of ubinary. A text with an error has NaN or 0 throughout.
        cached: A flag a text: its vector was there before, nothing was paid for it.
        errors: By position, of the texts that have no vector.
        calls: Those that were made for these texts.
        space: Where the vectors live.
        processing_time_seconds: From the question to the answer.
    """

    texts: Sequence[str | None] = field(repr=False)
    vectors: Vectors = field(repr=False)
    cached: npt.NDArray[np.bool_] = field(repr=False)
    errors: Mapping[int, TextError]
    calls: Sequence[Call] = field(repr=False)
    space: Space
    processing_time_seconds: float

    def __len__(self) -> int:
        return len(self.texts)

    @property
    def total_count(self) -> int:
        """Texts in all."""
        return len(self)

    @property
    def cache_hits(self) -> int:
        """Texts whose vector was there before."""
        return int(self.cached.sum())

    @property
    def cache_hit_rate(self) -> float:
        """Their share, 0 to 1."""
        return self.cache_hits / len(self) if len(self) else 0.0

    @property
    def api_calls(self) -> int:
        """Calls that were made for these texts."""
        return len(self.calls)

    @property
    def tokens_billed(self) -> int:
        """Tokens of those calls, by the provider's word."""
        return sum(call.tokens_billed for call in self.calls)

    @property
    def usd(self) -> float:
        """Their list price."""
        return sum(call.usd for call in self.calls)

    def to_arrow(self) -> pa.Table:
        """Columns text, text_hash, vector, cached and error; numbers are not copied.

        A text without a vector has null there and says why in `error`.
        """
        column = pa.FixedSizeListArray.from_arrays(
            pa.array(np.ascontiguousarray(self.vectors).reshape(-1)), type=self.space.vector_type
        )
        messages: list[str | None] = [None] * len(self)
        for at, error in self.errors.items():
            messages[at] = error.message
        errors = pa.array(messages, pa.utf8())
        if self.errors:
            column = pc.if_else(pc.is_null(errors), column, pa.scalar(None, column.type))
        hashes = [None if text is None else text_hash(text) for text in self.texts]
        return pa.table(
            {
                "text": pa.array(self.texts, pa.utf8()),
                "text_hash": pa.array(hashes, HASH),
                "vector": column,
                "cached": pa.array(self.cached),
                "error": errors,
            }
        )

    def to_pandas(self) -> "pd.DataFrame":
        """The same as a frame; each vector is a view of a row of `vectors`."""
        import pandas as pd  # noqa: PLC0415

        return pd.DataFrame(
            {
                "text": list(self.texts),
                "vector": list(self.vectors),
                "cached": self.cached,
                "error": [
                    self.errors[at].message if at in self.errors else None
                    for at in range(len(self))
                ],
            }
        )


@dataclass(frozen=True)
class StreamProgress:
    """How far a stream is.

    Attributes:
        completed: Texts done, failed ones too; the last one always equals `total`.
        total: Texts in all; None as long as nobody knows.
        failed: Texts without a vector.
        batches_processed: Parts of the stream given so far.
        api_calls: Calls made for them.
        seconds: Since the stream began.
    """

    completed: int
    total: int | None
    failed: int
    batches_processed: int
    api_calls: int
    seconds: float

    @property
    def rate(self) -> float:
        """Texts a second."""
        return self.completed / self.seconds if self.seconds else 0.0

    @property
    def eta(self) -> float | None:
        """Seconds until the end at this rate; None as long as nobody knows."""
        if self.total is None or not self.completed:
            return None
        return (self.total - self.completed) / self.rate
