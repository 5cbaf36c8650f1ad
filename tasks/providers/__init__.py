"""Who embeds: what a provider is, and the one border where its answers are checked."""

import hashlib
import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from tasks.errors import AnswerRejected
from tasks.limits import Estimator, Learned, Limits
from tasks.prepare import Preparation

Vectors = npt.NDArray[Any]
"""float32, shape (texts, dimension); or uint8, shape (texts, dimension / 8), a bit a number."""

UNIT_TOLERANCE = 1e-3
"""How far from 1 the norm of a vector may be that is promised to be a unit vector."""


@dataclass(frozen=True)
class Space:
    """The full identity of a vector: two vectors compare only within one space."""

    provider: str
    model: str
    dimension: int
    dtype: str = "float"
    input_type: str | None = "document"
    truncation: bool = False
    preparation: str = "1"

    @property
    def vector_type(self) -> pa.DataType:
        """Arrow type of one vector: float32 numbers, or bytes of eight bits each."""
        if self.dtype == "ubinary":
            return pa.list_(pa.uint8(), self.dimension // 8)
        return pa.list_(pa.float32(), self.dimension)

    @property
    def vector_bytes(self) -> int:
        """Bytes of one vector."""
        return self.dimension // 8 if self.dtype == "ubinary" else 4 * self.dimension

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

    @property
    def model_name(self) -> str:
        """Provider and model, as reports and the ledger name them: `voyage/voyage-4`."""
        return f"{self.provider}/{self.model}"

    def __str__(self) -> str:
        return f"{self.model_name}, {self.dimension} {self.dtype}"


@dataclass(frozen=True)
class Answer:
    """What one call brought.

    Attributes:
        vectors: One row a text: float32, or packed bits (uint8) in a space of ubinary.
        order: For each row the position of its text in the request, as the provider says.
        billed_tokens: Tokens the provider counted, by its own word.
        request_id: The provider's name for the call, "" where it has none.
        learned: Limits of the account that came with the answer.
    """

    vectors: Vectors
    order: Sequence[int]
    billed_tokens: int
    request_id: str = ""
    learned: Learned = Learned()  # noqa: RUF009 - a frozen value


class Provider(Protocol):
    """One model of one vendor. A value: it pickles, and holds no key, client or socket."""

    @property
    def space(self) -> Space:
        """Where its vectors live."""

    @property
    def preparation(self) -> Preparation:
        """What stands in front of the texts of its space; `embed` is given them whole."""

    @property
    def dimension(self) -> int:
        """Length of each vector."""

    @property
    def limits(self) -> Limits:
        """What may be asked of it."""

    @property
    def least(self) -> Learned:
        """What an account may ask that may ask least; nothing where there is no account."""

    @property
    def unit_vectors(self) -> bool:
        """Whether the vendor promises unit vectors."""

    @property
    def estimate(self) -> Estimator:
        """How many tokens its texts have."""

    def prepare(self) -> None:
        """Load what the first call needs, so that it is sent when the limiter lets it go."""

    def require(self) -> None:
        """Fail early where a key or a package is missing; nothing is sent.

        Raises:
            SettingsError: What is missing, and how to come by it.
        """

    def for_queries(self) -> "Provider":
        """The one that embeds what is searched for; its vectors compare with those of `space`."""

    def embed(self, texts: Sequence[str]) -> Answer:
        """Embed `texts` in one call, with no retry of its own.

        Raises:
            ProviderBusy: The same call may work later.
            ProviderThrottled: The account's limit is reached.
            BatchTooLarge: The call holds too much.
            BatchRefused: A text in it is bad.
            ProviderDenied: No call can work.
        """

    def give_up(self) -> None:
        """End the calls of this process that are in flight, without their answers."""


def checked_vectors(answer: Answer, texts: int, provider: Provider) -> Vectors:
    """The vectors of `answer` in the order of the request, each one fit to be stored.

    A provider that promises unit vectors must keep to it; others are normalised here.

    Raises:
        AnswerRejected: Too few or too many rows, an order that is no permutation, a wrong
            dimension, a number that is not finite, or a norm that is wrong or zero. Where
            single rows are bad, the fact `positions` names their texts.
    """
    bits = provider.space.dtype == "ubinary"
    vectors: Vectors = np.asarray(answer.vectors, dtype=np.uint8 if bits else np.float32)
    wanted = (texts, provider.space.vector_type.list_size)
    if vectors.shape != wanted:
        raise AnswerRejected(
            f"{provider.space} answered with vectors of shape {vectors.shape}; "
            f"{wanted} was asked for. Nothing of it was stored."
        )
    order = np.asarray(answer.order, dtype=np.int64)
    if not np.array_equal(np.sort(order), np.arange(texts)):
        raise AnswerRejected(
            f"{provider.space} did not name each of {texts} texts exactly once. "
            "Nothing of its answer was stored."
        )
    if not bits:
        vectors = _checked_numbers(vectors, order, provider)
    if np.array_equal(order, np.arange(texts)):
        return vectors
    ordered = np.empty_like(vectors)
    ordered[order] = vectors
    return ordered


def lengths(vectors: Vectors) -> npt.NDArray[np.float64]:
    """The Euclidean norm of each row; not finite where one of its numbers is not."""
    # In float64, as squares leave float32 early; einsum makes no copy of all numbers for that.
    squares = np.einsum("ij,ij->i", vectors, vectors, dtype=np.float64)
    return np.asarray(np.sqrt(squares), dtype=np.float64)


def _checked_numbers(
    vectors: Vectors, order: npt.NDArray[np.int64], provider: Provider
) -> npt.NDArray[np.float32]:
    """Float vectors of length 1 and finite."""
    norms = lengths(vectors)
    finite = np.isfinite(norms)
    off = np.abs(norms - 1) > UNIT_TOLERANCE if provider.unit_vectors else norms < 0
    for bad, what in (
        (~finite, "numbers that are not finite"),
        (norms == 0, "a vector of zeros"),
        (off, "a vector that is not of length 1"),
    ):
        if bad.any():
            raise AnswerRejected(
                f"{provider.space} answered {int(bad.sum())} of {len(vectors)} texts with {what}. "
                "Nothing of its answer was stored.",
                positions=sorted(order[bad].tolist()),
            )
    if not provider.unit_vectors:
        vectors = vectors / norms[:, None]
    return vectors.astype(np.float32, copy=False)
