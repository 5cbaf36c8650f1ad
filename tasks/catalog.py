"""What is known about each embedding model: prices, limits, dimensions (`configs/models.yaml`)."""

import difflib
import functools
from collections.abc import Sequence
from datetime import date
from pathlib import Path
from typing import Annotated, Literal, Self

import yaml
from pydantic import Field, TypeAdapter, ValidationError, model_validator

from tasks.errors import SettingsError
from tasks.limits import Limits
from tasks.params import Embedding, LimitSettings, Settings
from tasks.providers.model_folder import EXAMPLE, read_model

# An installed package carries the file beside this module; a checkout has it at its root.
_INSTALLED = Path(__file__).parent / "configs" / "models.yaml"
_CHECKOUT = Path(__file__).parents[1] / "configs" / "models.yaml"

ANY_MODEL = ("openai",)
"""Providers that serve models no catalog can list."""

UNLISTED = "the config"
"""Source of what is assumed of such a model."""

STORABLE = ("float", "ubinary")
"""What the index can hold: float for cosine, l2 and dot, packed bits for hamming."""

_Names = Annotated[tuple[str, ...], Field(strict=False, min_length=1)]
_Lengths = Annotated[tuple[int, ...], Field(strict=False, min_length=1)]


class Tier(Settings):
    """What one account may ask of one model in a minute; None means no limit."""

    requests_per_minute: int | None = Field(default=None, ge=1)
    tokens_per_minute: int | None = Field(default=None, ge=1)


FREE_TRIAL = Tier(requests_per_minute=3, tokens_per_minute=10_000)
"""Every model of Voyage, for an account without a payment method (docs, rate limits, 2026)."""

_FREE = {
    "voyage": FREE_TRIAL,
    "openai": Tier(requests_per_minute=100, tokens_per_minute=40_000),
}
"""By provider; of OpenAI its model pages, 2026."""


class ModelFacts(Settings):
    """One model of one provider; every number has the source and date below it."""

    provider: Literal["lexical", "voyage", "openai", "sentence-transformers"]
    name: str
    status: Literal["active", "legacy"]
    context_tokens: int | None = Field(ge=1, description="Longest text; null is any.")
    dimensions: _Lengths | None = Field(description="Lengths on offer; null is a range.")
    default_dimension: int = Field(ge=1)
    min_dimension: int = Field(ge=1)
    max_dimension: int = Field(ge=1)
    output_dtypes: _Names
    unit_vectors: bool = Field(description="Whether every vector has length 1.")
    usd_per_million_tokens: float = Field(ge=0)
    free_tokens: int = Field(ge=0, description="Once per account; in no cost shown.")
    batch_lane: bool = Field(description="Whether the vendor's Batch API takes it.")
    batch_discount: float | None = Field(default=None, gt=0, lt=1)
    texts_per_request: int = Field(ge=1)
    tokens_per_request: int = Field(ge=1)
    tiers: dict[int, Tier] | None = Field(description="By usage tier; null is no limit.")
    source: str = Field(min_length=1)
    date: date

    @model_validator(mode="before")
    @classmethod
    def _listed_dimensions_name_default_and_range(cls, facts: object) -> object:
        """Where the lengths are listed, the first is the default and the list is the range."""
        if not isinstance(facts, dict) or not (listed := facts.get("dimensions")):
            return facts
        found = {
            "default_dimension": listed[0],
            "min_dimension": min(listed),
            "max_dimension": max(listed),
        }
        return {**found, **facts}

    @model_validator(mode="after")
    def _agrees_with_itself(self) -> Self:
        if not self.offers(self.default_dimension):
            raise ValueError(f"default_dimension {self.default_dimension} is not on offer")
        if self.batch_lane != (self.batch_discount is not None):
            raise ValueError("batch_discount belongs to batch_lane: true, and only there")
        if self.tiers is not None and set(self.tiers) != {1, 2, 3}:
            raise ValueError(f"tiers must be 1, 2 and 3, found {sorted(self.tiers)}")
        return self

    def offers(self, dimension: int) -> bool:
        """Whether its vectors can have this length."""
        if self.dimensions is not None:
            return dimension in self.dimensions
        return self.min_dimension <= dimension <= self.max_dimension

    def tier(self, name: int | str) -> Tier:
        """The limits a minute at usage tier 1, 2 or 3, or "free", without a payment method."""
        if self.tiers is None:
            return Tier()
        return _FREE[self.provider] if name == "free" else self.tiers[int(name)]

    def usd(self, tokens: int) -> float:
        """List price of `tokens`, in US dollars."""
        return tokens * self.usd_per_million_tokens / 1_000_000

    def batch_usd(self, tokens: int) -> float | None:
        """List price of `tokens` in the vendor's Batch API; None where it has no such lane."""
        if self.batch_discount is None:
            return None
        return self.usd(tokens) * (1 - self.batch_discount)


@functools.cache
def catalog() -> dict[str, ModelFacts]:
    """All known models by name, in the order of the file."""
    return read_catalog(_INSTALLED if _INSTALLED.is_file() else _CHECKOUT)


def read_catalog(file: Path) -> dict[str, ModelFacts]:
    """The models that `file` describes, by name.

    Raises:
        SettingsError: The file cannot be read, or a fact in it is missing or wrong.
    """
    try:
        models = yaml.safe_load(file.read_text(encoding="utf-8"))
        named = {name: {"name": name, **facts} for name, facts in models.items()}
        return TypeAdapter(dict[str, ModelFacts]).validate_python(named)
    except OSError as error:
        raise SettingsError(f"{file} cannot be read: {error.strerror}.") from None
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise SettingsError(f"{file} is not valid YAML: {error}") from None
    except (AttributeError, TypeError):
        raise SettingsError(f"{file} must hold a model's name and its facts under it.") from None
    except ValidationError as error:
        lines = [
            f"  {'.'.join(map(str, problem['loc']))}: {problem['msg']}."
            for problem in error.errors(include_url=False)
        ]
        raise SettingsError("\n".join([f"{file} is not a valid catalog:", *lines])) from None


def facts_for(embedding: Embedding) -> ModelFacts:
    """What is known about the model that a config names, once its choices fit together.

    Raises:
        SettingsError: No such model, a model of another provider, or a dimension that the
            model does not offer.
    """
    facts = _catalogued(embedding)
    _check_dimension(embedding.dimension, facts)
    _check_dtype(embedding.output_dtype, facts)
    _check_unused(embedding)
    return facts


def _catalogued(embedding: Embedding) -> ModelFacts:
    provider = embedding.provider
    if provider == "sentence-transformers":
        return _local(embedding)
    own = [facts for facts in catalog().values() if facts.provider == provider]
    if embedding.model is None and (len(own) > 1 or provider in ANY_MODEL):
        current = [facts.name for facts in own if facts.status == "active"]
        raise SettingsError(
            f"embedding.model: missing. Provider {provider!r} has several models; "
            f"current are {_listed(current)}.",
            models=current,
        )
    name = own[0].name if embedding.model is None else embedding.model
    facts = catalog().get(name)
    names = [facts.name for facts in own]
    if facts not in own and provider in ANY_MODEL:
        return _uncatalogued(embedding, name)
    if facts is None:
        raise SettingsError(
            f"embedding.model: {name!r} is unknown.{_did_you_mean(name, names)} "
            f"Models of provider {provider!r}: {_listed(names)}.",
            models=names,
        )
    if facts.provider != provider:
        raise SettingsError(
            f"embedding.provider: {provider!r} has no model {name!r}, it is one of "
            f"{facts.provider!r}. Set embedding.provider to {facts.provider!r}, or "
            f"embedding.model to one of {_listed(names)}.",
            models=names,
        )
    return facts


def _uncatalogued(embedding: Embedding, name: str) -> ModelFacts:
    """What is assumed of a model of which nobody but the config says anything; it has no price."""
    if embedding.dimension is None:
        raise SettingsError(
            f"embedding.dimension: missing. Nothing is known here about the model {name!r}; say "
            "how many numbers its vectors have."
        )
    return _facts(
        embedding,
        name,
        dimensions=[embedding.dimension],
        unit_vectors=False,
        tokens_per_request=32_000,
        source=UNLISTED,
    )


def _local(embedding: Embedding) -> ModelFacts:
    """What the files of a model say that runs on this machine, where nothing has a price."""
    if embedding.model is None:
        raise SettingsError(
            "embedding.model: missing. Name a folder with a model of sentence-transformers, or "
            f"one on the Hugging Face hub, say {EXAMPLE}."
        )
    model = read_model(embedding.model, embedding.backend)
    longest = model.dimension or embedding.dimension
    if longest is None:
        raise SettingsError(
            f"embedding.dimension: missing. The files of {model.name} do not say how many numbers "
            "its vectors have; set it."
        )
    return _facts(
        embedding,
        model.name,
        context_tokens=model.longest,
        dimensions=None,
        default_dimension=longest,
        min_dimension=1,
        max_dimension=longest,
        unit_vectors=True,
        # A few seconds of work, so that little is lost with a run that dies.
        tokens_per_request=16_000,
        source=f"the files of {model.name}",
    )


def _facts(embedding: Embedding, name: str, **known: object) -> ModelFacts:
    """What is known of a model that has no entry in the catalog."""
    return ModelFacts.model_validate(
        {
            "provider": embedding.provider,
            "name": name,
            "status": "active",
            "context_tokens": None,
            "output_dtypes": ["float"],
            "usd_per_million_tokens": 0.0,
            "free_tokens": 0,
            "batch_lane": False,
            "texts_per_request": 256,
            "tiers": None,
            "date": date(1970, 1, 1),
            **known,
        }
    )


def dimension_of(embedding: Embedding) -> int:
    """Length of the vectors that a config asks for; errors as in `facts_for`."""
    facts = facts_for(embedding)
    return facts.default_dimension if embedding.dimension is None else embedding.dimension


def limits_for(config_limits: LimitSettings, facts: ModelFacts) -> Limits:
    """The most a run may ask: the config's numbers, else the model's at that tier.

    No request is larger than what may be sent in a whole minute, since it could never pass.

    Raises:
        SettingsError: The config asks for larger requests than the model takes.
    """
    tier = facts.tier(config_limits.tier)
    tokens_per_minute = config_limits.tokens_per_minute or tier.tokens_per_minute
    texts = _within("texts", config_limits.texts_per_request, facts.texts_per_request, facts)
    tokens = _within("tokens", config_limits.tokens_per_request, facts.tokens_per_request, facts)
    return Limits(
        requests_per_minute=config_limits.requests_per_minute or tier.requests_per_minute,
        tokens_per_minute=tokens_per_minute,
        texts_per_request=texts,
        tokens_per_request=min(tokens, tokens_per_minute or tokens),
        concurrency=config_limits.concurrency,
    )


def _check_dimension(dimension: int | None, facts: ModelFacts) -> None:
    if dimension is None or facts.offers(dimension):
        return
    if facts.dimensions is None:
        offered = f"any length from {facts.min_dimension} to {facts.max_dimension}"
    else:
        offered = _listed(facts.dimensions)
    raise SettingsError(
        f"embedding.dimension: {facts.name!r} has no vectors of length {dimension}. "
        f"It offers {offered}; null is {facts.default_dimension}.",
        dimension=dimension,
        dimensions=facts.dimensions,
    )


def _check_dtype(dtype: str, facts: ModelFacts) -> None:
    offered = [name for name in STORABLE if name in facts.output_dtypes]
    if dtype not in offered:
        why = "" if dtype not in facts.output_dtypes else " LanceDB has no index for it."
        raise SettingsError(
            f"embedding.output_dtype: {dtype!r} cannot be had of {facts.name!r} and kept here."
            f"{why} Choose {' or '.join(offered)}.",
            dtypes=offered,
        )


_NO_USE = "has no use for it; leave it out"
_ON_THIS_MACHINE = f"runs on this machine and {_NO_USE}"


def _unused(why: str, **harmless: str | None) -> dict[str, tuple[tuple[str | None, ...], str]]:
    return {key: ((value,), why) for key, value in harmless.items()}


_ACCOUNT: dict[str, str | None] = {"base_url": None, "api_key_block": None}
_LOCAL_MODEL: dict[str, str | None] = {"device": None, "backend": "torch", "precision": None}
_UNUSED: dict[str, dict[str, tuple[tuple[str | None, ...], str]]] = {
    "lexical": _unused(
        _ON_THIS_MACHINE, **_ACCOUNT, tokenizer=None, input_type="document", **_LOCAL_MODEL
    ),
    "voyage": _unused(_NO_USE, **_LOCAL_MODEL),
    "openai": {
        "input_type": (
            ("document", None),
            "has an API that is not told what a text is; leave it out",
        ),
        **_unused(_NO_USE, **_LOCAL_MODEL),
    },
    "sentence-transformers": _unused(_ON_THIS_MACHINE, **_ACCOUNT),
}
"""By provider: keys without effect, the values that ask for none, and why there is none."""


def _check_unused(embedding: Embedding) -> None:
    """Refuse what a provider would silently ignore."""
    for key, (harmless, why) in _UNUSED[embedding.provider].items():
        if getattr(embedding, key) not in harmless:
            raise SettingsError(f"embedding.{key}: {embedding.provider!r} {why}.")


def _within(unit: str, asked: int | None, cap: int, facts: ModelFacts) -> int:
    """`asked` or the model's own `cap`, which no config can raise where it is known."""
    if asked is None:
        return cap
    if asked > cap and facts.source != UNLISTED:
        raise SettingsError(
            f"limits.{unit}_per_request: {asked} is more than {facts.name!r} takes in one "
            f"request. Set it to {cap} or less; null is {cap}.",
            asked=asked,
            cap=cap,
        )
    return asked


def _did_you_mean(name: str, known: Sequence[str]) -> str:
    near = difflib.get_close_matches(name.lower(), known, n=1)
    return f" Did you mean {near[0]!r}?" if near else ""


def _listed(values: Sequence[object]) -> str:
    return ", ".join(str(value) for value in values)
