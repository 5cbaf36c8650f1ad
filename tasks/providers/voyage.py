"""Voyage AI, through its own SDK.

One call is one request: the SDK's retries stay off, since a retry that the run does not see
is one that no limit, journal or cost report sees either. The SDK takes a second to import
and is loaded by the first call, so that a plan does not pay for it.
"""

import binascii
import dataclasses
import functools
import os
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NoReturn

import numpy as np
from pydantic import SecretStr

from tasks.catalog import FREE_TRIAL, catalog
from tasks.errors import AnswerRejected, ProviderBusy, ProviderDenied, SettingsError
from tasks.limits import Estimator, Learned, Limits
from tasks.prepare import PLAIN, Preparation
from tasks.providers import Answer, Provider, Space
from tasks.tokens import Estimate

if TYPE_CHECKING:
    from tasks.providers.voyage_transport import Outcome

KEY_VARIABLE = "VOYAGE_API_KEY"

_BLOCK_LIVES_S = 60
"""So long a key from a block is used without asking Prefect again."""

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

        key = self._key()
        if key is None:
            raise ProviderDenied(_missing(self.api_key_block))
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
        source = KEY_VARIABLE if self.api_key_block is None else f"block {self.api_key_block!r}"
        raise failure(outcome, Asked(self.model, texts, key, source))

    def give_up(self) -> None:
        """End the calls in flight; what they would have brought may be billed all the same."""
        from tasks.providers.voyage_transport import give_up  # noqa: PLC0415

        give_up()

    def _key(self) -> SecretStr | None:
        try:
            return read_key(self.api_key_block)
        except SettingsError as error:
            denied = ProviderDenied(str(error))
        raise denied

    def _dimension_to_ask_for(self) -> int | None:
        """None for a model of one length, which need not know `output_dimension`."""
        facts = catalog().get(self.model)
        fixed = facts is not None and facts.dimensions == (self.dimension,)
        return None if fixed else self.dimension

    def _read(self, outcome: "Outcome", texts: int) -> Answer:
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

        rows = [_decoded(item.get("embedding")) for item in items]
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
            _billed(outcome),
            outcome.request_id,
            outcome.learned,
        )

    def _reject(self, outcome: "Outcome", what: str, positions: Sequence[int] = ()) -> NoReturn:
        raise AnswerRejected(
            f"{outcome.host} answered {what}. Nothing of it was stored; the same call may work "
            f"later (model {self.model}, request {outcome.request_id or 'without a name'}).",
            retry_after=None,
            request_id=outcome.request_id,
            positions=tuple(positions),
            billed_tokens=_billed(outcome),
        )


def _billed(outcome: "Outcome") -> int:
    """The tokens of an answer by the provider's word; 0 where it does not say."""
    usage = outcome.result.get("usage") if isinstance(outcome.result, dict) else None
    tokens = usage.get("total_tokens") if isinstance(usage, dict) else None
    return tokens if type(tokens) is int and tokens >= 0 else 0


def require_key(provider: Provider) -> None:
    """Fail early where a provider needs a key and has none; the key itself is not tried.

    Raises:
        SettingsError: There is no key to be had.
    """
    if not isinstance(provider, Voyage):
        return
    try:
        key = read_key(provider.api_key_block)
    except ProviderBusy as error:
        unread = SettingsError(str(error))
    else:
        if key is not None:
            return
        unread = SettingsError(_missing(provider.api_key_block))
    raise unread


def read_key(block: str | None) -> SecretStr | None:
    """The key from the environment or the Secret block; None where there is none.

    Raises:
        SettingsError: What is there is no key.
        ProviderBusy: The Prefect API does not hand out the block just now.
    """
    if block is None:
        key = SecretStr(os.environ.get(KEY_VARIABLE, "").strip())
        source = KEY_VARIABLE
    else:
        key = _key_in_block(block, int(time.monotonic() / _BLOCK_LIVES_S))
        source = f"The Secret block {block!r}"
    # A header takes no other characters, and the error about one would show the key.
    if any(not "!" <= letter <= "~" for letter in key.get_secret_value()):
        raise SettingsError(
            f"{source} holds white space or letters that no key has. Copy the key again, "
            "without quotes and line breaks."
        )
    return key if key.get_secret_value() else None


@functools.lru_cache(maxsize=8)
def _key_in_block(name: str, _period: int) -> SecretStr:
    from prefect.blocks.system import Secret  # noqa: PLC0415 - most keys are in the environment

    failed: SettingsError | ProviderBusy
    try:
        block: Any = Secret.load(name, _sync=True)  # type: ignore[call-arg]
        value = block.get()
    except ValueError:
        failed = SettingsError(
            f"There is no Secret block {name!r} that can be read. Create it in Prefect "
            f"(Blocks, Secret), or leave the block's name out and set {KEY_VARIABLE}."
        )
    except Exception as error:  # noqa: BLE001 - Prefect's client promises no class of errors
        failed = ProviderBusy(
            f"The Prefect API did not hand out the Secret block {name!r} "
            f"({type(error).__name__}). See that PREFECT_API_URL is right and its server runs.",
            retry_after=None,
        )
    else:
        # The block reads its own value as JSON, so digits alone come as a number.
        return SecretStr(str(value).strip())
    raise failed


def _missing(block: str | None) -> str:
    if block is not None:
        return f"The Secret block {block!r} is empty. Store your key of Voyage AI in it."
    found = "is empty" if KEY_VARIABLE in os.environ else "is not set"
    return (
        f"{KEY_VARIABLE} {found}. Set {KEY_VARIABLE} to a key of Voyage AI "
        "(https://dashboard.voyageai.com) where the run has its environment, or choose "
        "provider 'lexical', which needs none."
    )


def _decoded(embedding: object) -> bytes:
    """The bytes of one vector; none where it is no base64."""
    if not isinstance(embedding, str):
        return b""
    try:
        return binascii.a2b_base64(embedding, strict_mode=True)
    except ValueError:
        return b""
