"""The fault script: which request goes wrong, and how."""

import random
import re
import threading
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, Self, get_args

import yaml
from pydantic import (
    BaseModel,
    ConfigDict,
    Field,
    JsonValue,
    TypeAdapter,
    ValidationError,
    field_validator,
    model_validator,
)

from tasks.errors import SettingsError
from tasks.simulator.settings import problems

Early = Literal["status", "reset_before", "hang", "204", "redirect_307"]
"""Instead of any work: the request is not checked, and nothing is billed."""

Answered = Literal[
    "process_then_reset", "reset_mid", "short_body", "chunk_trunc", "trickle", "slow",
    "bad_json", "bad_utf8", "text_plain_200", "empty_200",
    "fewer", "more", "dup", "shuffle", "no_index", "index_gap", "no_usage", "no_data",
    "nan", "inf", "zero", "unnormalised", "wrong_dim", "bad_b64", "odd_b64", "empty_b64",
    "null_embedding", "wrong_model_name", "float_list_instead", "jitter",
]  # fmt: skip
"""In place of a good answer: the request passed all checks, and its tokens are billed."""

Action = Early | Answered

EARLY: frozenset[str] = frozenset(get_args(Early))
HARMLESS = frozenset({"trickle", "slow", "shuffle", "float_list_instead", "jitter"})
"""With these an answer is still good: all vectors are there, each with its index."""

Endpoint = Literal[
    "embeddings", "upload", "files", "file", "content", "delete",
    "create", "jobs", "job", "cancel", "line",
]  # fmt: skip
"""What is asked: embeddings; of the Batch API its files and jobs; or a single line of a job."""

UNSPOILT = frozenset(
    {"process_then_reset", "reset_mid", "short_body", "chunk_trunc", "trickle"}
    | {"bad_json", "bad_utf8", "text_plain_200", "empty_200"}
)
"""In place of any good answer; all others are about vectors."""

_HEADER = re.compile(r"[\x21-\x7e]+:[\x20-\x7e]*")


class Rule(BaseModel):
    """One fault. All that a rule names must hold for a request; one that names nothing fits all.

    A request that the rule hits but a check refuses is answered as refused, and uses up a hit.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    endpoint: Endpoint = Field(
        default="embeddings",
        description="What is asked, which is counted alone; line is a line of a job's file, which "
        "gets an error with the status.",
    )
    requests: frozenset[int] | None = Field(
        default=None, description="Numbers of requests, from 1 since the last reset; of lines."
    )
    every: int | None = Field(default=None, ge=1, description="Each n-th request.")
    probability: float | None = Field(default=None, ge=0, le=1, description="Of hitting a request.")
    seed: int = Field(default=0, description="Of the probability; the request's number joins in.")
    marker: str | None = Field(default=None, min_length=1, description="In any text of a request.")
    model: str | None = Field(default=None, description="Name in a request.")
    key: str | None = Field(default=None, repr=False, description="Key of a request.")
    in_flight: int | None = Field(
        default=None, ge=1, description="At so many requests in flight or more, this one included."
    )
    after_s: float = Field(
        default=0, ge=0, description="From here on: simulated seconds since start or reset."
    )
    until_s: float | None = Field(default=None, gt=0, description="Up to here, as after_s.")
    times: int | None = Field(default=None, ge=1, description="Most hits; null is no limit.")

    action: Action = Field(default="status", description="What goes wrong.")
    status: int | None = Field(default=None, ge=400, le=599, description="For action status.")
    kind: Literal["json", "json_no_detail", "html", "text", "empty"] = Field(
        default="json", description="Body of a status."
    )
    detail: str | list[JsonValue] | None = Field(
        default=None, description="In the body of a status; null is one that fits it."
    )
    error_code: str | None = Field(default=None, description="In a JSON body of a status.")
    retry_after: int | float | Literal["http-date", "garbage"] | None = Field(
        default=None, description="Header of a status: seconds, a date 2 s ahead, or no such thing."
    )
    headers: dict[str, str] = Field(default={}, description="More headers of a status.")

    seconds: float = Field(
        default=1, ge=0, description="Real ones, of a hang, a slow, or between pieces of a trickle."
    )
    piece_bytes: int = Field(default=20, ge=1, description="Of a trickle.")
    fraction: float = Field(
        default=0.5, ge=0, lt=1, description="Of the body that a cut answer still brings."
    )
    count: int = Field(default=1, ge=1, description="Items of fewer and more.")
    eps: float = Field(default=1e-4, gt=0, description="Size of the noise of a jitter.")

    @field_validator("headers")
    @classmethod
    def _headers_can_be_sent(cls, headers: dict[str, str]) -> dict[str, str]:
        for name, value in headers.items():
            if not _HEADER.fullmatch(f"{name}:{value}"):
                raise ValueError(f"{name!r} is no header in plain ASCII")
        return headers

    @model_validator(mode="after")
    def _status_belongs_to_its_action(self) -> Self:
        if (self.action == "status") != (self.status is not None):
            raise ValueError("status: needed by action 'status', and by no other")
        return self

    @model_validator(mode="after")
    def _action_is_one_of_its_endpoint(self) -> Self:
        if self.endpoint == "line" and self.action != "status":
            raise ValueError("action: a line of a job can but get a status")
        elsewhere = (EARLY | UNSPOILT) - {"redirect_307"}
        if self.endpoint != "embeddings" and self.action not in elsewhere:
            raise ValueError(f"action: {self.action} is for embeddings alone")
        return self

    @property
    def early(self) -> bool:
        """Whether it comes before any check of the request."""
        return self.action in EARLY


@dataclass(frozen=True)
class Traits:
    """What a rule can see of a request; what could not be read is empty."""

    ordinal: int
    seconds: float
    in_flight: int
    key: str
    model: str
    texts: Sequence[str]
    redirected: bool = False
    endpoint: Endpoint = "embeddings"


class Script:
    """Rules in order; the first that fits a request has it. Safe between threads."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._rules: list[Rule] = []
        self._hits: list[int] = []

    def add(self, rules: Iterable[Rule]) -> int:
        """Append rules, and say how many there are."""
        with self._lock:
            self._rules += rules
            self._hits += [0] * (len(self._rules) - len(self._hits))
            return len(self._rules)

    def clear(self) -> None:
        """Drop all rules."""
        with self._lock:
            self._rules, self._hits = [], []

    def first(self, traits: Traits) -> Rule | None:
        """The rule for a request, which counts as a hit of it."""
        with self._lock:
            for place, rule in enumerate(self._rules):
                if rule.times is not None and self._hits[place] >= rule.times:
                    continue
                if fits(rule, traits):
                    self._hits[place] += 1
                    return rule
        return None


def fits(rule: Rule, traits: Traits) -> bool:
    """Whether all that a rule names holds for a request."""
    return (
        # Who follows a redirect arrives: the same rule would send the request round for ever.
        not (traits.redirected and rule.action == "redirect_307")
        and rule.endpoint == traits.endpoint
        and _at_its_turn(rule, traits.ordinal)
        and (rule.in_flight is None or traits.in_flight >= rule.in_flight)
        and rule.after_s <= traits.seconds
        and (rule.until_s is None or traits.seconds < rule.until_s)
        and (rule.model is None or rule.model == traits.model)
        and (rule.key is None or rule.key == traits.key)
        and (rule.marker is None or any(rule.marker in text for text in traits.texts))
    )


def _at_its_turn(rule: Rule, ordinal: int) -> bool:
    if rule.requests is not None and ordinal not in rule.requests:
        return False
    if rule.every is not None and ordinal % rule.every:
        return False
    if rule.probability is None:
        return True
    # By number and not by order of arrival, so that threads cannot change who is hit.
    return random.Random(f"{rule.seed}/{ordinal}").random() < rule.probability  # noqa: S311


def read_rules(file: Path | None) -> tuple[Rule, ...]:
    """The fault script in a YAML file: a list of rules; none where there is no file.

    Raises:
        SettingsError: The file cannot be read, or a rule in it is wrong.
    """
    if file is None:
        return ()
    try:
        found = yaml.safe_load(file.read_text(encoding="utf-8"))
        return TypeAdapter(tuple[Rule, ...]).validate_python(found)
    except OSError as error:
        raise SettingsError(f"{file} cannot be read: {error.strerror}.") from None
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise SettingsError(f"{file} is not valid YAML: {error}") from None
    except ValidationError as error:
        raise SettingsError(f"{file} is no list of rules:\n{problems(error)}") from None
