"""How the simulated API behaves, whatever is asked of it."""

from collections.abc import Sequence
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, JsonValue, ValidationError, model_validator

from tasks.catalog import FREE_TRIAL, ModelFacts, Tier, catalog
from tasks.errors import SettingsError
from tasks.yaml_file import lay_over

_NEW_MODEL = "voyage-4"
"""Whose facts a model has that only the settings name."""


class Latency(BaseModel):
    """Simulated seconds from a request's arrival to its answer."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    base_s: float = Field(default=0, ge=0, description="Seconds for any request.")
    per_1k_tokens_s: float = Field(default=0, ge=0, description="More for each 1,000 tokens.")
    jitter_s: float = Field(default=0, ge=0, description="Up to so much more, at random.")
    seed: int = Field(default=0, description="Of the random part.")


class JobSettings(BaseModel):
    """The Batch API: how long a job takes, in simulated seconds, and what an account may ask."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    validating_s: float = Field(default=10, ge=0, description="Until its first line is begun.")
    line_s: float = Field(default=0.1, ge=0, description="For each line, one after the other.")
    finalizing_s: float = Field(default=10, ge=0, description="From its last line to its output.")
    cancelling_s: float = Field(default=10, ge=0, description="The same after a cancel.")
    window_s: float = Field(
        default=12 * 3600, gt=0, description="What is not done so long after its start expires."
    )
    most_in_flight: int = Field(default=100, ge=1, description="Jobs; one more is 429.")
    most_enqueued_tokens: int = Field(default=10**9, ge=1, description="Of jobs in flight; 429.")
    most_lines: int = Field(default=100_000, ge=1, description="Of a job; one with more fails.")
    most_bytes: int = Field(default=10**9, ge=1, description="Of a file; a larger one is 413.")


class Settings(BaseModel):
    """One simulator. All but `port` and `clock` can be changed while it runs."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    port: int = Field(default=0, ge=0, le=65535, description="On 127.0.0.1; 0 is a free one.")

    tier: Literal["free", 1, 2, 3, "unlimited"] = Field(
        default="unlimited", description="Usage tier of every account."
    )
    requests_per_minute: int | None = Field(
        default=None, ge=1, description="Instead of the tier's, for every model."
    )
    tokens_per_minute: int | None = Field(
        default=None, ge=1, description="Instead of the tier's, for every model."
    )
    window: Literal["sliding", "fixed_minute"] = Field(
        default="sliding", description="The last 60 seconds, or the minute by the clock."
    )
    count_rejected: bool = Field(
        default=False, description="Whether requests that a limit rejects use it up too."
    )
    max_concurrent: int | None = Field(
        default=None, ge=1, description="Requests in flight at once; one more is 429."
    )
    announce: Literal["hidden", "free-trial", "numbers"] | None = Field(
        default=None,
        description="What a 429 says; null is free-trial for the free tier, else hidden.",
    )
    retry_after: Literal["seconds", "date"] | None = Field(
        default=None, description="Form of the Retry-After of a 429, in real time; null is none."
    )

    clock: Literal["real", "manual"] = Field(
        default="real", description="A manual clock moves by advance alone; no latency then."
    )
    time_scale: float = Field(
        default=1, gt=0, description="Simulated seconds for each real one: windows and latency."
    )
    latency: Latency = Field(default=Latency(), description="Of each answer with status 200.")

    keys: frozenset[str] | None = Field(
        default=None, repr=False, description="Good keys; null is any that is not empty."
    )
    wrong_host: str | None = Field(
        default=None,
        min_length=1,
        description="Keys that start so belong to the other host: 403.",
    )
    retired: dict[str, str] = Field(
        default={}, description="Models that are gone, with the name to use instead: 410."
    )
    models: dict[str, dict[str, JsonValue]] = Field(
        default={},
        description="Facts instead of the catalog's, by model. A new name starts as voyage-4.",
    )
    code_4_cap: int | None = Field(
        default=None,
        ge=1,
        description="Tokens per request of voyage-code-4, on which sources conflict: "
        "120,000 (null) or 320,000.",
    )

    jobs: JobSettings = Field(default=JobSettings(), description="Of the Batch API.")

    strict: bool = Field(
        default=True,
        description="False lets unknown arguments, values and models pass.",
    )
    whitespace_is_empty: bool = Field(
        default=False, description="Whether a text of white space alone is refused as empty."
    )

    token_rule: Literal["bytes", "scripts"] = Field(
        default="bytes", description="Tokens from the bytes alone, or by kind of character."
    )
    bytes_per_token: float = Field(default=4.2, gt=0, description="For the rule 'bytes'.")
    surprise: float = Field(
        default=1,
        ge=0.5,
        le=3,
        description="All token counts times this, to prove estimates wrong.",
    )
    bill_prompt_tokens: bool = Field(
        default=False, description="Whether the prompt of an input_type counts with each text."
    )
    vectors: Literal["exact", "fast", "words"] = Field(
        default="exact",
        description="Normal numbers; cheap ones; or near for texts that share words.",
    )
    gzip: bool = Field(default=False, description="Compress answers for clients that accept it.")
    keep_requests: int = Field(
        default=10_000, ge=0, description="Requests the ledger keeps; its totals cover all."
    )

    @model_validator(mode="after")
    def _facts_are_whole(self) -> "Settings":
        self.facts()
        return self

    def facts(self) -> dict[str, ModelFacts]:
        """The models on offer, by name.

        Raises:
            ValueError: A fact in `models` is wrong.
        """
        known = {name: facts for name, facts in catalog().items() if facts.provider == "voyage"}
        changes = {name: dict(change) for name, change in self.models.items()}
        if self.code_4_cap is not None:
            cap = {"tokens_per_request": self.code_4_cap}
            changes["voyage-code-4"] = {**cap, **changes.get("voyage-code-4", {})}
        for name, change in changes.items():
            base = catalog().get(name, catalog()[_NEW_MODEL]).model_dump()
            known[name] = ModelFacts.model_validate({**base, "name": name, **change})
        return known

    def limits(self, facts: ModelFacts) -> Tier:
        """What one key may ask of one model in a minute."""
        match self.tier:
            case "free":
                tier = FREE_TRIAL
            case "unlimited":
                tier = Tier()
            case number:
                tier = facts.tier(number)
        return Tier(
            requests_per_minute=self.requests_per_minute or tier.requests_per_minute,
            tokens_per_minute=self.tokens_per_minute or tier.tokens_per_minute,
        )

    def changed(self, changes: dict[str, JsonValue]) -> "Settings":
        """These settings with `changes` in them.

        Raises:
            SettingsError: A change is wrong, or cannot be made while the simulator runs.
        """
        fixed = sorted({"port", "clock"} & set(changes))
        if fixed:
            raise SettingsError(f"{' and '.join(fixed)} cannot change while the simulator runs.")
        try:
            return Settings.model_validate({**self.model_dump(), **changes})
        except ValidationError as error:
            raise SettingsError(problems(error)) from None


def read_settings(port: int, pairs: Sequence[str]) -> Settings:
    """Settings as they are typed, "key=value" with the value in YAML.

    Raises:
        SettingsError: A pair is none, or names no setting, or a wrong value.
    """
    values: dict[str, Any] = {"port": port}
    for pair in pairs:
        lay_over(values, pair)
    try:
        return Settings.model_validate(values)
    except ValidationError as error:
        raise SettingsError(f"The simulator cannot be set up:\n{problems(error)}") from None


def problems(error: ValidationError) -> str:
    """What pydantic found, a line each: where, what. Never the value, it may be a key."""
    return "\n".join(
        f"{'.'.join(map(str, problem['loc'])) or 'body'}: {problem['msg']}."
        for problem in error.errors(include_url=False, include_input=False)
    )
