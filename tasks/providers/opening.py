"""Which provider a config asks for."""

from dataclasses import replace

from tasks.catalog import dimension_of, facts_for, limits_for
from tasks.errors import SettingsError
from tasks.limits import Estimator
from tasks.params import Engine
from tasks.prepare import Preparation
from tasks.providers import Provider
from tasks.providers.lexical import Lexical
from tasks.providers.openai import OpenAI
from tasks.providers.voyage import Voyage, require_key
from tasks.tokens import TokenizerEstimate, load


def open_provider(config: Engine) -> Provider:
    """The provider, for planning at least; its space knows what stands in front of texts.

    Raises:
        SettingsError: Provider, model, dimension and limits do not fit together.
    """
    return replace(_opened(config), preparation=Preparation(config.embedding.prepend))


def _opened(config: Engine) -> Lexical | OpenAI | Voyage:
    embedding = config.embedding
    facts = facts_for(embedding)
    dimension = dimension_of(embedding)
    limits = limits_for(config.limits, facts)
    if facts.provider == "lexical":
        return Lexical(dimension, limits)
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


def open_embedder(config: Engine) -> Provider:
    """The provider, for embedding.

    Raises:
        SettingsError: As in `open_provider`, there is no key or no SDK, or limits a minute are
            given to a provider that has none.
    """
    provider = open_provider(config)
    if isinstance(provider, OpenAI):
        provider.require()
    require_key(provider)
    if isinstance(provider, Lexical):
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
