"""Voyage AI, through its own SDK.

One call is one request: the SDK's retries stay off, since a retry that the run does not see
is one that no limit, journal or cost report sees either. The SDK takes a second to import
and is loaded by the first call, so that a plan does not pay for it.
"""

import dataclasses
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NoReturn

import numpy as np

from tasks.catalog import FREE_TRIAL, catalog
from tasks.errors import AnswerRejected, ProviderDenied
from tasks.limits import Estimator, Learned, Limits
from tasks.prepare import PLAIN, Preparation
from tasks.providers import Answer, Space
from tasks.providers.answers import billed_tokens, numbers_in_base64
from tasks.providers.api_key import KeySource
from tasks.providers.deadline import give_up
from tasks.tokens import Estimate

if TYPE_CHECKING:
    from tasks.providers.voyage_transport import Outcome

KEY_VARIABLE = "VOYAGE_API_KEY"

_WAY_TO_A_KEY = (
    f"Set {KEY_VARIABLE} to a key of Voyage AI (https://dashboard.voyageai.com) where the run has "
    "its environment, or choose provider 'lexical', which needs none."
)

_BITS = {"float": 32, "ubinary": 1}
"""Of one number of a vector, by dtype."""


@dataclass(frozen=True)
class Voyage:
    """One model of the Voyage AI API. A value: it pickles, and holds no key.

    Attributes:
        model: Name as in the API.
        dimension: Length of each vector; one that the model offers.
        limits: What may be asked of it.
        dtype: "float", or "ubinary" for a bit a number.
        input_type: "document", "query" or None: which prompt the API puts before a text.
        base_url: Where the API is; None leaves it to the SDK, which goes by the key.
        api_key_block: Name of the Prefect Secret block with the key; None is VOYAGE_API_KEY.
        estimate: What guesses tokens before a call.
        deadline_s: Seconds for one whole call, from its first byte to its last.
        preparation: What stands in front of the texts of its space.
    """

    model: str
    dimension: int
    limits: Limits
    dtype: str = "float"
    input_type: str | None = "document"
    base_url: str | None = None
    api_key_block: str | None = None
    estimate: Estimator = Estimate()  # noqa: RUF009 - a frozen value
    deadline_s: float = 120.0
    preparation: Preparation = PLAIN

    @property
    def least(self) -> Learned:
        """The free trial."""
        return Learned(FREE_TRIAL.requests_per_minute, FREE_TRIAL.tokens_per_minute)

    @property
    def unit_vectors(self) -> bool:
        """Floats have length 1; bits have no such length."""
        return self.dtype == "float"

    @property
    def space(self) -> Space:
        """Where its vectors live."""
        return Space(
            "voyage",
            self.model,
            self.dimension,
            dtype=self.dtype,
            input_type=self.input_type,
            truncation=False,
            preparation=self.preparation.recipe(Space.preparation),
        )

    @property
    def key_source(self) -> KeySource:
        """Where its key is."""
        return KeySource(KEY_VARIABLE, self.api_key_block, "Voyage AI", _WAY_TO_A_KEY)

    def require(self) -> None:
        """Fail early where there is no key; the key itself is not tried.

        Raises:
            SettingsError: There is no key to be had.
        """
        self.key_source.require()

    def for_queries(self) -> "Voyage":
        """The same for texts that are searched with, not for."""
        if self.input_type is None:
            return self
        return dataclasses.replace(self, input_type="query")

    def prepare(self) -> None:
        """Load the SDK, which takes a second or more."""
        import tasks.providers.voyage_transport  # noqa: F401, PLC0415

    def embed(self, texts: Sequence[str]) -> Answer:
        """Embed `texts` in one call; no text is ever cut. Errors as in `Provider.embed`."""
        # Loaded late, since planning and settings need neither the SDK nor requests.
        from tasks.providers.voyage_errors import Asked, failure  # noqa: PLC0415
        from tasks.providers.voyage_transport import exchange  # noqa: PLC0415

        key = self.key_source.read_for_call()
        if key is None:
            raise ProviderDenied(self.key_source.missing)
        outcome = exchange(
            key,
            self.base_url.rstrip("/") if self.base_url else None,
            self.deadline_s,
            input=list(texts),
            model=self.model,
            input_type=self.input_type,
            truncation=False,
            output_dtype=self.dtype if self.dtype != "float" else None,
            output_dimension=self._dimension_to_ask_for(),
            encoding_format="base64",
        )
        if outcome.answered:
            return self._read(outcome, len(texts))
        raise failure(outcome, Asked(self.model, texts, key, str(self.key_source)))

    def give_up(self) -> None:
        """End the calls in flight; what they would have brought may be billed all the same."""
        give_up()

    def _dimension_to_ask_for(self) -> int | None:
        """None for a model of one length, which need not know `output_dimension`."""
        facts = catalog().get(self.model)
        fixed = facts is not None and facts.dimensions == (self.dimension,)
        return None if fixed else self.dimension

    def answer_of(self, body: dict[str, Any], texts: int, request_id: str) -> Answer:
        """The vectors of an answer that came some other way; raises `AnswerRejected`.

        Args:
            body: As JSON said it.
            texts: How many were asked for.
            request_id: Of who brought it.
        """
        from tasks.providers.voyage_reply import Reply  # noqa: PLC0415
        from tasks.providers.voyage_transport import Outcome  # noqa: PLC0415

        reply = Reply(200, {"x-request-id": request_id})
        return self._read(Outcome("The Batch API", reply, body), texts, self._any_bytes)

    def _read(
        self,
        outcome: "Outcome",
        texts: int,
        numbers: Callable[[object], bytes] = numbers_in_base64,
    ) -> Answer:
        """The vectors of a good answer; what of it is not as it should be is rejected."""
        result = outcome.result if isinstance(outcome.result, dict) else {}
        items = result.get("data")
        if not isinstance(items, list) or not all(isinstance(item, dict) for item in items):
            self._reject(outcome, "with no list of vectors")
        model = result.get("model", self.model)
        if model != self.model:
            # The server's word may be anything, so it is not repeated.
            self._reject(outcome, "with vectors of another model")
        order = [item.get("index") for item in items]
        if not all(type(at) is int and 0 <= at < texts for at in order):
            self._reject(outcome, "with vectors that belong to none of the texts")

        rows = [numbers(item.get("embedding")) for item in items]
        size = self.dimension * _BITS[self.dtype] // 8
        wrong = [at for at, row in zip(order, rows, strict=True) if len(row) != size]
        if wrong:
            self._reject(
                outcome,
                f"with {len(wrong)} of {len(rows)} vectors that are not {self.dimension} numbers "
                f"({self.dtype}) in base64",
                sorted(set(wrong)),
            )
        vectors = np.frombuffer(b"".join(rows), "<f4" if self.dtype == "float" else np.uint8)
        return Answer(
            vectors.reshape(len(rows), -1) if rows else vectors.reshape(0, size),
            order,
            billed_tokens(outcome.result),
            outcome.request_id,
            outcome.learned,
        )

    def _any_bytes(self, embedding: object) -> bytes:
        """A vector as bytes; none where it is no vector. The Batch API gives lists of numbers."""
        if not isinstance(embedding, list):
            return numbers_in_base64(embedding)
        try:
            return np.asarray(embedding, "<f4" if self.dtype == "float" else np.uint8).tobytes()
        except (TypeError, ValueError, OverflowError):
            return b""

    def _reject(self, outcome: "Outcome", what: str, positions: Sequence[int] = ()) -> NoReturn:
        raise AnswerRejected(
            f"{outcome.host} answered {what}. Nothing of it was stored; the same call may work "
            f"later (model {self.model}, request {outcome.request_id or 'without a name'}).",
            retry_after=None,
            request_id=outcome.request_id,
            positions=tuple(positions),
            billed_tokens=billed_tokens(outcome.result),
        )
