"""Which provider a config asks for."""

from tasks.catalog import dimension_of, facts_for, limits_for
from tasks.errors import SettingsError
from tasks.params import Config
from tasks.providers import Provider
from tasks.providers.lexical import Lexical
from tasks.providers.voyage import Voyage


def open_provider(config: Config) -> Provider:
    """The provider, for planning at least.

    Raises:
        SettingsError: Provider, model, dimension and limits do not fit together.
    """
    facts = facts_for(config.embedding)
    dimension = dimension_of(config.embedding)
    limits = limits_for(config.limits, facts)
    if facts.provider == "lexical":
        return Lexical(dimension, limits)
    return Voyage(facts.name, dimension, limits)


def open_embedder(config: Config) -> Provider:
    """The provider, for embedding.

    Raises:
        SettingsError: As in `open_provider`, or it can be planned but not called yet.
    """
    provider = open_provider(config)
    if isinstance(provider, Voyage):
        raise SettingsError(
            "embedding.provider: this version plans for 'voyage' but does not call it. "
            "Use `embed-once plan` for the price, or provider 'lexical' to build an index."
        )
    if facts_for(config.embedding).tiers is None:
        for name in ("requests_per_minute", "tokens_per_minute"):
            if getattr(config.limits, name) is not None:
                raise SettingsError(
                    f"limits.{name}: {config.embedding.provider!r} runs on this machine and has "
                    "no limit a minute; set it to null."
                )
    return provider
