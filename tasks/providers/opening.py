"""Which provider a config asks for."""

from dataclasses import replace

from tasks.catalog import dimension_of, facts_for, limits_for
from tasks.errors import SettingsError
from tasks.limits import Estimator, Limits
from tasks.params import Embedding, Engine
from tasks.prepare import Preparation
from tasks.providers import Provider
from tasks.providers.lexical import Lexical
from tasks.providers.model_folder import read_model
from tasks.providers.openai import OpenAI
from tasks.providers.sentence_transformers import CONCURRENCY, SentenceTransformers
from tasks.providers.voyage import Voyage
from tasks.tokens import TokenizerEstimate, load


def open_provider(config: Engine) -> Provider:
    """The provider, for planning at least; its space knows what stands in front of texts.

    Raises:
        SettingsError: Provider, model, dimension and limits do not fit together.
    """
    return replace(_opened(config), preparation=Preparation(config.embedding.prepend))


def _opened(config: Engine) -> Lexical | OpenAI | SentenceTransformers | Voyage:
    embedding = config.embedding
    facts = facts_for(embedding)
    dimension = dimension_of(embedding)
    limits = limits_for(config.limits, facts)
    if facts.provider == "lexical":
        return Lexical(dimension, limits)
    if facts.provider == "sentence-transformers":
        return _local(embedding, dimension, limits)
    estimate: Estimator
    if embedding.tokenizer is not None:
        estimate = TokenizerEstimate(embedding.tokenizer)
    else:
        estimate = load(config.state.uri, facts.provider, facts.name).estimate()
    if facts.provider == "openai":
        return OpenAI(
            facts.name,
            dimension,
            limits,
            base_url=embedding.base_url,
            api_key_block=embedding.api_key_block,
            estimate=estimate,
        )
    return Voyage(
        facts.name,
        dimension,
        limits,
        dtype=embedding.output_dtype,
        input_type=embedding.input_type,
        base_url=embedding.base_url,
        api_key_block=embedding.api_key_block,
        estimate=estimate,
    )


def _local(embedding: Embedding, dimension: int, limits: Limits) -> SentenceTransformers:
    """A model on this machine, which is served one call after another whatever the config says."""
    model = read_model(embedding.model or "", embedding.backend)
    tokenizer = embedding.tokenizer or model.tokenizer
    if tokenizer is None:
        raise SettingsError(
            f"embedding.tokenizer: missing. {model.name} has no tokenizer.json of its own; name "
            "one, or save the model anew with `SentenceTransformer(…).save_pretrained(folder)`."
        )
    return SentenceTransformers(
        model,
        dimension,
        replace(limits, concurrency=min(CONCURRENCY, limits.concurrency)),
        tokenizer,
        input_type=embedding.input_type,
        device=embedding.device,
        backend=embedding.backend,
        precision=embedding.precision,
    )


def open_embedder(config: Engine) -> Provider:
    """The provider, for embedding.

    Raises:
        SettingsError: As in `open_provider`, there is no key, something is not installed, or
            limits a minute are given to a provider that has none.
    """
    provider = open_provider(config)
    provider.require()
    if isinstance(provider, Lexical | SentenceTransformers):
        for name in ("requests_per_minute", "tokens_per_minute"):
            if getattr(config.limits, name) is not None:
                raise SettingsError(
                    f"limits.{name}: {config.embedding.provider!r} runs on this machine and has "
                    "no limit a minute; set it to null."
                )
        if config.limits.shared:
            raise SettingsError(
                f"limits.shared: {config.embedding.provider!r} runs on this machine and has no "
                "account to share; set it to false."
            )
    return provider
