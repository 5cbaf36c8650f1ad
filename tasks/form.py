"""The run form: what one run does otherwise than the config file says."""

from pathlib import Path
from typing import Literal

from pydantic import BaseModel, ConfigDict, Field

from tasks.params import Config, load_config

UNASKED = "budget.approve_above_usd=null"
"""The setting of a run whose price a person has approved."""


class Overrides(BaseModel):
    """What one run does otherwise than the config file says."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    narrow: str = Field(
        default="",
        title="Narrower source path",
        description="Look only at this file or folder below source.path, say guides/api; "
        "all other documents stay in the index as they are. Empty: the whole source.",
        json_schema_extra={"position": 0},
    )
    max_usd: float = Field(
        default=0.0,
        ge=0,
        allow_inf_nan=False,
        title="Maximum price",
        description="Most US dollars that this run may cost at list price; it stops before the "
        "call that would pass it, and the next run goes on. 0: as the file says.",
        json_schema_extra={"position": 1},
    )
    approve_above_usd: float = Field(
        default=0.0,
        ge=0,
        allow_inf_nan=False,
        title="Approval threshold",
        description="Pause with the plan until a person approves it, if this run would cost more "
        "US dollars. 0: as the file says.",
        json_schema_extra={"position": 2},
    )
    on_error: Literal["as the file says", "quarantine", "fail_fast", "collect"] = Field(
        default="as the file says",
        title="Texts that are refused",
        description="quarantine: leave them out and do not send them again. collect: leave them "
        "out and only report them. fail_fast: end the run.",
        json_schema_extra={"position": 3},
    )
    retry_quarantined: bool = Field(
        default=False,
        title="Retry what is quarantined",
        description="Send the texts that the provider has refused before once more.",
        json_schema_extra={"position": 4},
    )
    accept_splitter: bool = Field(
        default=False,
        title="Accept another splitter",
        description="Cut the documents with the installed splitter although the index was made "
        "with another version; chunks that come out differently are embedded again.",
        json_schema_extra={"position": 5},
    )
    settings: list[str] = Field(
        default=[],
        title="Further settings",
        description="Config values as key=value, one an item, "
        "say index.max_deleted_fraction=1 or limits.concurrency=2.",
        json_schema_extra={"position": 6},
    )


def configured(path: str | Path, overrides: Overrides) -> Config:
    """The config at `path` with what this run does otherwise; errors as in `load_config`."""
    settings = list(overrides.settings)
    if overrides.on_error != "as the file says":
        settings.append(f"on_error={overrides.on_error}")
    if overrides.max_usd:
        settings.append(f"budget.max_usd={overrides.max_usd:.12f}")  # YAML reads 1e-05 as text
    if overrides.approve_above_usd:
        settings.append(f"budget.approve_above_usd={overrides.approve_above_usd:.12f}")
    return load_config(path, settings)
