"""catalog: every model is complete, and a config that does not fit is told the way out."""

from pathlib import Path

import pytest

from tasks.catalog import (
    ModelFacts,
    catalog,
    dimension_of,
    facts_for,
    limits_for,
    read_catalog,
)
from tasks.errors import SettingsError
from tasks.limits import Limits
from tasks.params import Embedding, LimitSettings

PRICES = {
    "voyage-4-large": 0.12,
    "voyage-4": 0.06,
    "voyage-4-lite": 0.02,
    "voyage-code-4": 0.12,
    "voyage-code-3": 0.18,
    "voyage-3-large": 0.18,
    "voyage-3.5": 0.06,
    "voyage-3.5-lite": 0.02,
    "voyage-finance-2": 0.12,
    "voyage-law-2": 0.12,
    "voyage-code-2": 0.12,
    "lexical": 0.0,
    "text-embedding-3-small": 0.02,
    "text-embedding-3-large": 0.13,
    "text-embedding-ada-002": 0.10,
}
NOT_IN_THE_BATCH_LANE = {"voyage-code-4", "voyage-finance-2", "voyage-law-2", "lexical"}
VOYAGE = [facts for facts in catalog().values() if facts.provider == "voyage"]


def voyage(model: str | None, dimension: int | None = None) -> Embedding:
    return Embedding(provider="voyage", model=model, dimension=dimension)


def lexical(dimension: int | None = None) -> Embedding:
    return Embedding(provider="lexical", dimension=dimension)


def test_every_model_has_its_list_price() -> None:
    prices = {name: facts.usd_per_million_tokens for name, facts in catalog().items()}
    assert prices == PRICES


@pytest.mark.parametrize("facts", VOYAGE, ids=lambda facts: facts.name)
def test_higher_tiers_are_multiples_of_the_first(facts: ModelFacts) -> None:
    first = facts.tier(1)
    assert first.requests_per_minute == 2000
    assert first.tokens_per_minute
    for number in (2, 3):
        tier = facts.tier(number)
        assert tier.requests_per_minute == number * first.requests_per_minute
        assert tier.tokens_per_minute == number * first.tokens_per_minute


@pytest.mark.parametrize("facts", VOYAGE, ids=lambda facts: facts.name)
def test_every_voyage_model_can_send_a_full_request_a_minute(facts: ModelFacts) -> None:
    assert facts.unit_vectors
    assert facts.texts_per_request == 1000
    assert facts.context_tokens is not None
    assert facts.context_tokens <= facts.tokens_per_request
    assert facts.tokens_per_request <= (facts.tier(1).tokens_per_minute or 0)


def test_the_batch_lane_takes_the_models_it_lists_a_third_off_or_a_half() -> None:
    without = {name for name, facts in catalog().items() if not facts.batch_lane}
    assert without == NOT_IN_THE_BATCH_LANE
    assert catalog()["voyage-4"].batch_usd(1_000_000) == pytest.approx(0.0402)
    assert catalog()["text-embedding-3-small"].batch_usd(1_000_000) == pytest.approx(0.01)
    assert catalog()["voyage-code-4"].batch_usd(1_000_000) is None


def test_a_price_is_counted_in_tokens() -> None:
    assert catalog()["voyage-4"].usd(100_000_000) == pytest.approx(6.0)
    assert catalog()["lexical"].usd(100_000_000) == 0


def test_lexical_needs_no_model_and_no_dimension() -> None:
    assert facts_for(lexical()).name == "lexical"
    assert dimension_of(lexical()) == 1024
    assert dimension_of(lexical(384)) == 384


def test_a_dimension_of_voyage_defaults_to_the_first_on_offer() -> None:
    assert dimension_of(voyage("voyage-4")) == 1024
    assert dimension_of(voyage("voyage-4", 256)) == 256
    assert dimension_of(voyage("voyage-code-2")) == 1536


@pytest.mark.parametrize(
    ("embedding", "message"),
    [
        (
            voyage(None),
            (
                "embedding.model: missing. Provider 'voyage' has several models; current are "
                "voyage-4-large, voyage-4, voyage-4-lite, voyage-code-4."
            ),
        ),
        (
            voyage("Voyage4-lite"),
            (
                "embedding.model: 'Voyage4-lite' is unknown. Did you mean 'voyage-4-lite'? Models "
                "of provider 'voyage': voyage-4-large, voyage-4, voyage-4-lite, voyage-code-4, "
                "voyage-code-3, voyage-3-large, voyage-3.5, voyage-3.5-lite, voyage-finance-2, "
                "voyage-law-2, voyage-code-2."
            ),
        ),
        (
            Embedding(provider="lexical", model="bag"),
            "embedding.model: 'bag' is unknown. Models of provider 'lexical': lexical.",
        ),
        (
            Embedding(provider="lexical", model="voyage-4"),
            (
                "embedding.provider: 'lexical' has no model 'voyage-4', it is one of 'voyage'. Set "
                "embedding.provider to 'voyage', or embedding.model to one of lexical."
            ),
        ),
        (
            voyage("voyage-4", 1000),
            (
                "embedding.dimension: 'voyage-4' has no vectors of length 1000. "
                "It offers 1024, 256, 512, 2048; null is 1024."
            ),
        ),
        (
            lexical(63),
            (
                "embedding.dimension: 'lexical' has no vectors of length 63. "
                "It offers any length from 64 to 8192; null is 1024."
            ),
        ),
    ],
    ids=["no-model", "misspelt", "unknown", "other-provider", "not-offered", "out-of-range"],
)
def test_a_choice_that_does_not_fit_is_refused_with_the_way_out(
    embedding: Embedding, message: str
) -> None:
    with pytest.raises(SettingsError) as refused:
        facts_for(embedding)
    assert str(refused.value) == message


def test_limits_are_the_models_at_the_tier_of_the_account() -> None:
    assert limits_for(LimitSettings(tier=2), catalog()["voyage-4"]) == Limits(
        requests_per_minute=4000,
        tokens_per_minute=16_000_000,
        texts_per_request=1000,
        tokens_per_request=320_000,
        concurrency=8,
    )


def test_what_the_config_says_comes_before_the_models_limits() -> None:
    config = LimitSettings(
        requests_per_minute=5,
        tokens_per_minute=900_000,
        texts_per_request=10,
        tokens_per_request=2000,
        concurrency=3,
    )
    assert limits_for(config, catalog()["voyage-4"]) == Limits(5, 900_000, 10, 2000, 3)


def test_no_request_is_larger_than_a_minute_allows() -> None:
    trial = LimitSettings(requests_per_minute=3, tokens_per_minute=10_000)
    assert limits_for(trial, catalog()["voyage-4"]).tokens_per_request == 10_000


def test_lexical_has_no_limit_a_minute() -> None:
    assert limits_for(LimitSettings(), catalog()["lexical"]) == Limits(None, None, 1000, 120_000, 8)


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (
            LimitSettings(texts_per_request=1001),
            (
                "limits.texts_per_request: 1001 is more than 'voyage-4' takes in one request. "
                "Set it to 1000 or less; null is 1000."
            ),
        ),
        (
            LimitSettings(tokens_per_request=320_001),
            (
                "limits.tokens_per_request: 320001 is more than 'voyage-4' takes in one request. "
                "Set it to 320000 or less; null is 320000."
            ),
        ),
    ],
    ids=["texts", "tokens"],
)
def test_no_config_asks_for_more_than_a_request_takes(config: LimitSettings, message: str) -> None:
    with pytest.raises(SettingsError) as refused:
        limits_for(config, catalog()["voyage-4"])
    assert str(refused.value) == message


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("lexical: {provider: lexical}", "lexical.status: Field required."),
        ("[voyage-4]", "must hold a model's name and its facts under it."),
        ("voyage-4: null", "must hold a model's name and its facts under it."),
        ("voyage-4: [", "is not valid YAML"),
    ],
    ids=["incomplete", "list", "empty", "broken"],
)
def test_a_catalog_that_was_edited_badly_says_where(
    tmp_path: Path, text: str, message: str
) -> None:
    file = tmp_path / "models.yaml"
    file.write_text(text, encoding="utf-8")
    with pytest.raises(SettingsError, match=message) as refused:
        read_catalog(file)
    assert str(file) in str(refused.value)


def test_a_catalog_that_is_missing_is_named(tmp_path: Path) -> None:
    with pytest.raises(SettingsError, match=r"gone\.yaml cannot be read: No such file"):
        read_catalog(tmp_path / "gone.yaml")
