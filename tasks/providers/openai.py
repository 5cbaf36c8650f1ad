"""OpenAI, and every server that speaks its API for embeddings, through OpenAI's SDK.

One call is one request: the SDK's retries stay off, since a retry that the run does not see
is one that no limit, journal or cost report sees either. The SDK is an optional extra and
takes seconds to import: it is loaded by the first call, so that a plan does without it.
"""

import importlib.util
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, NoReturn
from urllib.parse import urlsplit

import numpy as np
import numpy.typing as npt
from pydantic import SecretStr

from tasks.catalog import catalog
from tasks.errors import AnswerRejected, BatchRefused, ProviderDenied, SettingsError
from tasks.keys import has_bytes
from tasks.limits import Estimator, Learned, Limits
from tasks.prepare import PLAIN, Preparation
from tasks.providers import Answer, Space
from tasks.providers.answers import billed_tokens, numbers_in_base64
from tasks.providers.api_key import KeySource
from tasks.providers.deadline import give_up
from tasks.tokens import Estimate

if TYPE_CHECKING:
    from tasks.providers.openai_transport import Outcome

KEY_VARIABLE = "OPENAI_API_KEY"
OWN_HOST = "api.openai.com"
OWN_URL = f"https://{OWN_HOST}/v1"

RECIPE = "unit-1"
"""Names what becomes of a vector once it is here: it is divided by its length."""

_NO_KEY = SecretStr("no-key-is-needed-here")
"""What goes to a server that takes calls without a key, since the SDK makes none without."""

_NUMBER_BYTES = 4


@dataclass(frozen=True)
class OpenAI:
    """One model behind OpenAI's API for embeddings. A value: it pickles, and holds no key.

    Attributes:
        model: Name as the server knows it.
        dimension: Length of each vector.
        limits: What may be asked of it.
        base_url: Where the API is; None is OpenAI's own address. No part of the space.
        api_key_block: Name of the Prefect Secret block with the key; None is OPENAI_API_KEY.
        estimate: What guesses tokens before a call.
        deadline_s: Seconds for one whole call; a model on a processor may need minutes.
        preparation: What stands in front of the texts of its space.
    """

    model: str
    dimension: int
    limits: Limits
    base_url: str | None = None
    api_key_block: str | None = None
    estimate: Estimator = Estimate()  # noqa: RUF009 - a frozen value
    deadline_s: float = 300.0
    preparation: Preparation = PLAIN

    @property
    def least(self) -> Learned:
        """An account's limits come with each answer, and a server of one's own has none."""
        return Learned()

    @property
    def unit_vectors(self) -> bool:
        """Nobody promises that of any server, so every vector is divided by its length here."""
        return False

    @property
    def space(self) -> Space:
        """Where its vectors live; the API is not told what a text is."""
        recipe = self.preparation.recipe(RECIPE)
        return Space("openai", self.model, self.dimension, input_type=None, preparation=recipe)

    @property
    def key_source(self) -> KeySource:
        """Where its key is."""
        return KeySource(
            KEY_VARIABLE,
            self.api_key_block,
            "OpenAI" if self.base_url is None else "the server",
            f"Set {KEY_VARIABLE} to a key of OpenAI (https://platform.openai.com/api-keys) where "
            "the run has its environment, or set embedding.base_url to a server that needs none.",
        )

    def for_queries(self) -> "OpenAI":
        """A query is embedded like a document."""
        return self

    def require(self) -> None:
        """Fail early where the SDK is not installed or a key that is needed is missing.

        Raises:
            SettingsError: One of the two.
        """
        if importlib.util.find_spec("openai") is None:
            raise SettingsError(
                "embedding.provider: 'openai' needs the package openai, which is not installed. "
                "Run `pip install 'embed-once[openai]'`, or in a clone `uv sync --extra openai`."
            )
        if self._needs_key:
            self.key_source.require()
        else:
            self.key_source.read()

    def prepare(self) -> None:
        """Load the SDK, which takes a second or more."""
        import tasks.providers.openai_transport  # noqa: F401, PLC0415

    def embed(self, texts: Sequence[str]) -> Answer:
        """Embed `texts` in one call. Errors as in `Provider.embed`."""
        # Loaded late, since planning and settings need neither the SDK nor its HTTP library.
        from tasks.providers.openai_errors import failure  # noqa: PLC0415
        from tasks.providers.openai_transport import exchange  # noqa: PLC0415

        key = self.key_source.read_for_call()
        if key is None and self._needs_key:
            raise ProviderDenied(self.key_source.missing)
        _refuse_half_characters(texts)
        outcome = exchange(
            key or _NO_KEY,
            self.base_url or OWN_URL,
            self.deadline_s,
            model=self.model,
            texts=list(texts),
            dimensions=self._dimensions_to_ask_for(),
        )
        if outcome.answered:
            return self._read(outcome, len(texts))
        source = str(self.key_source) if key is not None else ""
        raise failure(outcome, self.model, texts, key or _NO_KEY, source)

    def give_up(self) -> None:
        """End the calls in flight; what they would have brought may be billed all the same."""
        give_up()

    @property
    def _needs_key(self) -> bool:
        return at_openai(self.base_url or OWN_URL) or self.api_key_block is not None

    def _dimensions_to_ask_for(self) -> int | None:
        """None for a model's own length: many servers refuse to be asked for any."""
        facts = catalog().get(self.model)
        if facts is None or facts.provider != "openai":
            return None
        return None if facts.default_dimension == self.dimension else self.dimension

    def _read(self, outcome: "Outcome", texts: int) -> Answer:
        """The vectors of a good answer; what of it is not as it should be is rejected."""
        result = outcome.result
        items = result.get("data") if isinstance(result, dict) else None
        if not isinstance(items, list) or not all(isinstance(item, dict) for item in items):
            self._reject(outcome, "with no list of vectors")
        order = [item.get("index") for item in items]
        if not all(type(at) is int and 0 <= at < texts for at in order):
            self._reject(outcome, "with vectors that belong to none of the texts")

        rows = [_numbers(item.get("embedding")) for item in items]
        size = self.dimension * _NUMBER_BYTES
        wrong = [at for at, row in zip(order, rows, strict=True) if len(row) != size]
        if wrong:
            lengths = {len(row) for row in rows}
            if len(lengths) == 1 and (found := lengths.pop()) and found % _NUMBER_BYTES == 0:
                self._deny_length(outcome, found // _NUMBER_BYTES)
            self._reject(
                outcome,
                f"with {len(wrong)} of {len(rows)} vectors that are not {self.dimension} numbers",
                sorted(set(wrong)),
            )
        vectors: npt.NDArray[np.float32] = np.frombuffer(b"".join(rows), "<f4")
        return Answer(
            vectors.reshape(len(rows), self.dimension),
            order,
            billed_tokens(result),
            outcome.request_id,
            outcome.learned,
        )

    def _reject(self, outcome: "Outcome", what: str, positions: Sequence[int] = ()) -> NoReturn:
        raise AnswerRejected(
            f"{outcome.host} answered {what}. Nothing of it was stored; the same call may work "
            f"later (model {self.model}, request {outcome.request_id or 'without a name'}). See "
            "that base_url is right.",
            retry_after=None,
            request_id=outcome.request_id,
            positions=tuple(positions),
            billed_tokens=billed_tokens(outcome.result),
        )

    def _deny_length(self, outcome: "Outcome", found: int) -> NoReturn:
        raise ProviderDenied(
            f"{outcome.host} gives vectors of {found} numbers for {self.model!r}, and "
            f"embedding.dimension is {self.dimension}. Set embedding.dimension to {found}, or "
            "embedding.model to another one; nothing was stored.",
            dimension=found,
            request_id=outcome.request_id,
            billed_tokens=billed_tokens(outcome.result),
        )


def at_openai(url: str) -> bool:
    """Whether `url` is an address of OpenAI itself."""
    host = urlsplit(url).hostname or ""
    return host == OWN_HOST or host.endswith(f".{OWN_HOST}")


def _refuse_half_characters(texts: Sequence[str]) -> None:
    """Keep texts from being sent that have no bytes in UTF-8, in which JSON is sent."""
    bad = [at for at, text in enumerate(texts) if not has_bytes(text)]
    if bad:
        lengths = ", ".join(f"number {at} of {len(texts[at])} characters" for at in bad[:5])
        raise BatchRefused(
            f"{len(bad)} of {len(texts)} texts hold halves of characters that no API takes, "
            f"counted from 0: {lengths}.",
            positions=tuple(bad),
        )


def _numbers(embedding: object) -> bytes:
    """The bytes of one vector, from base64 or a list of numbers; none where it is neither."""
    if not isinstance(embedding, list):
        return numbers_in_base64(embedding)
    try:
        numbers = np.asarray(embedding)
    except ValueError:  # lists of several lengths in a list
        return b""
    if numbers.ndim != 1 or numbers.dtype.kind not in "iuf":
        return b""
    with np.errstate(over="ignore"):  # infinite then, which is found
        return numbers.astype("<f4").tobytes()
