"""Who embeds: what a provider is, and the one border where its answers are checked."""

import hashlib
import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Protocol

import numpy as np
import numpy.typing as npt

from tasks.errors import AnswerRejected
from tasks.limits import Limits

Vectors = npt.NDArray[np.float32]
"""float32, shape (texts, dimension)."""

UNIT_TOLERANCE = 1e-3
"""How far from 1 the norm of a vector may be that is promised to be a unit vector."""


@dataclass(frozen=True)
class Space:
    """The full identity of a vector: two vectors compare only within one space."""

    provider: str
    model: str
    dimension: int
    dtype: str = "float"
    input_type: str = "document"
    truncation: bool = False
    preparation: str = "1"

    @property
    def id(self) -> str:
        """Short stable name, fit for a table or a file."""
        digest = hashlib.blake2b(self.to_json().encode(), digest_size=6).hexdigest()
        return f"{self.provider}-{self.dimension}-{digest}"

    def to_json(self) -> str:
        """All members as JSON, keys sorted."""
        return json.dumps(asdict(self), sort_keys=True)

    @classmethod
    def from_json(cls, text: str) -> "Space":
        """The space that `to_json` wrote."""
        return cls(**json.loads(text))

    def __str__(self) -> str:
        return f"{self.provider}/{self.model}, {self.dimension} {self.dtype}"


@dataclass(frozen=True)
class Answer:
    """What one call brought.

    Attributes:
        vectors: float32, one row a text.
        order: For each row the position of its text in the request, as the provider says.
        billed_tokens: Tokens the provider counted, by its own word.
        request_id: The provider's name for the call, "" where it has none.
    """

    vectors: Vectors
    order: Sequence[int]
    billed_tokens: int
    request_id: str = ""


class Provider(Protocol):
    """One model of one vendor. A value: it pickles, and holds no key, client or socket."""

    @property
    def space(self) -> Space:
        """Where its vectors live."""

    @property
    def dimension(self) -> int:
        """Length of each vector."""

    @property
    def limits(self) -> Limits:
        """What may be asked of it."""

    @property
    def unit_vectors(self) -> bool:
        """Whether the vendor promises unit vectors."""

    def count(self, text: str) -> int:
        """Estimated tokens of `text`, at least 1."""

    def embed(self, texts: Sequence[str]) -> Answer:
        """Embed `texts` in one call, with no retry of its own.

        Raises:
            ProviderBusy: The same call may work later.
            BatchTooLarge: The call holds too much.
            BatchRefused: A text in it is bad.
            ProviderDenied: No call can work.
        """


def checked_vectors(answer: Answer, texts: int, provider: Provider) -> Vectors:
    """The vectors of `answer` in the order of the request, each one fit to be stored.

    A provider that promises unit vectors must keep to it; others are normalised here.

    Raises:
        AnswerRejected: Too few or too many rows, an order that is no permutation, a wrong
            dimension, a number that is not finite, or a norm that is wrong or zero.
    """
    vectors = np.asarray(answer.vectors, dtype=np.float32)
    if vectors.shape != (texts, provider.dimension):
        raise AnswerRejected(
            f"{provider.space} answered with vectors of shape {vectors.shape}; "
            f"{(texts, provider.dimension)} was asked for. Nothing of it was stored."
        )
    order = np.asarray(answer.order, dtype=np.int64)
    if not np.array_equal(np.sort(order), np.arange(texts)):
        raise AnswerRejected(
            f"{provider.space} did not name each of {texts} texts exactly once. "
            "Nothing of its answer was stored."
        )
    if not np.isfinite(vectors).all():
        raise AnswerRejected(f"{provider.space} answered with numbers that are not finite.")
    norms = np.linalg.norm(vectors.astype(np.float64), axis=1)  # squares leave float32 early
    if (norms == 0).any():
        raise AnswerRejected(f"{provider.space} answered with a vector of zeros.")
    if provider.unit_vectors and (np.abs(norms - 1) > UNIT_TOLERANCE).any():
        raise AnswerRejected(f"{provider.space} answered with vectors that are not of length 1.")
    if not provider.unit_vectors:
        vectors = (vectors / norms[:, None]).astype(np.float32)
    ordered = np.empty_like(vectors)
    ordered[order] = vectors
    return ordered
