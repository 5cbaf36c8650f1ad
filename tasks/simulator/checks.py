"""What the API refuses, check by check, in its own words.

The checks of the body come before that of the key; this order was seen on the real service.
The order of those after the key, and texts marked as guesses, are not known.
"""

import json
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from tasks.catalog import ModelFacts
from tasks.simulator.settings import Settings
from tasks.simulator.tokens import counter

_BAD_BODY = (
    "The request body is not valid JSON, or some arguments were not specified properly. "
    "In particular, "
)
_NO_JSON = "Error for argument '0': JSON decode error"
_MISSING = "Your request body was missing one or more required arguments."
_EMPTY = (
    "Error for argument 'input': Value error, Input cannot contain empty strings or empty lists"
)
DTYPES = ("float", "int8", "uint8", "binary", "ubinary")
_DEFAULT_FACTS = "voyage-4"
_LONGEST_VECTOR = 2048

_REQUIRED = ("input", "model")
_TYPES: dict[str, tuple[type, str]] = {  # the texts are guesses
    "model": (str, "string"),
    "input_type": (str, "string"),
    "truncation": (bool, "boolean"),
    "output_dimension": (int, "integer"),
    "output_dtype": (str, "string"),
    "encoding_format": (str, "string"),
}
_CHOICES = {"input_type": ("query", "document"), "encoding_format": ("base64",)}


class Refused(Exception):
    """An answer that is not 200."""

    def __init__(
        self, status: int, detail: str, code: str | None = None, wait_s: float | None = None
    ) -> None:
        super().__init__(detail)
        self.status = status
        self.detail = detail
        self.code = code
        self.wait_s = wait_s


@dataclass(frozen=True)
class Asked:
    """A request for embeddings whose arguments are good."""

    model: str
    texts: list[str]
    input_type: str | None
    truncation: bool
    output_dimension: int | None
    dtype: str
    base64: bool


def read(body: bytes) -> object:
    """Check 2: the body is JSON."""
    try:
        return json.loads(body)
    except (ValueError, RecursionError):
        raise _bad_body(_NO_JSON) from None


def peek(body: object) -> tuple[str, list[str]]:
    """Model and texts of a body, as far as they can be read."""
    if not isinstance(body, dict):
        return "", []
    model, given = body.get("model"), body.get("input")
    texts = given if isinstance(given, list) else [given]
    return model if isinstance(model, str) else "", [one for one in texts if isinstance(one, str)]


def arguments(body: object, settings: Settings, models: dict[str, ModelFacts]) -> Asked:
    """Checks 3 and 4: all arguments are there, known and good, and no text is empty."""
    if not isinstance(body, dict):
        raise _bad_body("Error for argument '0': Input should be a valid dictionary")  # a guess
    given = {name: value for name, value in body.items() if value is not None}
    facts = models.get(str(given.get("model"))) if settings.strict else None
    if not settings.strict:
        given = {
            name: value
            for name, value in given.items()
            if name in _REQUIRED or (name in _TYPES and _wrong(name, value, None) is None)
        }
    problems = list(_problems(given, facts))
    if problems:
        raise _bad_body(*problems)
    texts = given["input"] if isinstance(given["input"], list) else [given["input"]]
    if not texts or any(_is_empty(text, settings) for text in texts):
        raise _bad_body(_EMPTY)
    return Asked(
        model=given["model"],
        texts=texts,
        input_type=given.get("input_type"),
        truncation=given.get("truncation", True),
        output_dimension=given.get("output_dimension"),
        dtype=given.get("output_dtype", "float"),
        base64=given.get("encoding_format") == "base64",
    )


def bearer(authorization: str) -> str:
    """The key in a header; "" without one."""
    kind, _, key = authorization.partition(" ")
    return key.strip() if kind.lower() == "bearer" else ""


def check_key(key: str, settings: Settings) -> None:
    """Check 5: the key is there, of this host, and good."""
    if not key:
        raise Refused(401, "Unauthorized")
    if settings.wrong_host is not None and key.startswith(settings.wrong_host):
        raise Refused(403, "The provided API key cannot be used with this host.")  # a guess
    if settings.keys is not None and key not in settings.keys:
        raise Refused(401, "Provided API key is invalid.")


def facts_of(asked: Asked, settings: Settings, models: dict[str, ModelFacts]) -> ModelFacts:
    """Check 6: the model is on offer."""
    model = asked.model
    if model in settings.retired:
        instead = settings.retired[model]
        raise Refused(410, f"Model {model} has been retired. Please use {instead}.")  # a guess
    if model in models:
        return models[model]
    if not settings.strict:
        return models[_DEFAULT_FACTS].model_copy(update={"name": model})
    raise Refused(400, f"Model {model} is not supported. Supported models are {list(models)}.")


def count(asked: Asked, facts: ModelFacts, settings: Settings) -> int:
    """Checks 7 to 9: not too many texts, none too long, and tokens that fit one request."""
    if len(asked.texts) > facts.texts_per_request:
        raise Refused(
            400,
            f"The batch size limit is {facts.texts_per_request}. "
            f"Your batch size is {len(asked.texts)}.",
        )
    counts = list(map(counter(settings, asked.input_type), asked.texts))
    longest = facts.context_tokens
    if longest is not None and not asked.truncation:
        _check_lengths(counts, longest, asked.model)
    if longest is not None:
        counts = [min(tokens, longest) for tokens in counts]
    tokens = sum(counts)
    if tokens > facts.tokens_per_request:
        raise Refused(
            400,
            f"Request to model '{asked.model}' failed. The max allowed tokens per submitted "
            f"batch is {facts.tokens_per_request}. Your batch has {tokens} tokens after "
            "truncation. Please lower the number of tokens in the batch.",
            code="TOO_MANY_TOKENS_IN_BATCH",
        )
    return tokens


def _bad_body(*problems: str) -> Refused:
    *first, last = problems
    return Refused(400, _BAD_BODY + ".; ".join([*(one.removesuffix(".") for one in first), last]))


def _problems(given: dict[str, Any], facts: ModelFacts | None) -> Iterator[str]:
    known = {"input", *_TYPES}
    yield from (
        f"Argument '{name}' is not supported by our API" for name in given if name not in known
    )
    if any(name not in given for name in _REQUIRED):
        yield _MISSING
    for name, value in given.items():
        if name in known and (problem := _wrong(name, value, facts)):
            yield problem


def _wrong(name: str, value: object, facts: ModelFacts | None) -> str | None:
    if name == "input":
        texts = value if isinstance(value, list) else [value]
        good = all(isinstance(text, str) for text in texts)
        wanted = "string or list of strings"
    else:
        kind, wanted = _TYPES[name]
        good = type(value) is kind  # True is an int to isinstance
    if not good:
        return f"Error for argument '{name}': Input should be a valid {wanted}"
    if not _allowed(name, value, facts):
        return f"Value '{value}' supplied for {name} is not allowed"
    return None


def _allowed(name: str, value: Any, facts: ModelFacts | None) -> bool:
    """Whether a value of the right type is on offer; by an unknown model, if any offers it."""
    match name:
        case "output_dtype":
            return value in (DTYPES if facts is None else facts.output_dtypes)
        case "output_dimension":
            return 0 < value <= _LONGEST_VECTOR if facts is None else facts.offers(value)
        case _:
            return name not in _CHOICES or value in _CHOICES[name]


def _is_empty(text: str, settings: Settings) -> bool:
    return not (text.strip() if settings.whitespace_is_empty else text)


def _check_lengths(counts: list[int], longest: int, model: str) -> None:
    for index, tokens in enumerate(counts):
        if tokens > longest:  # how the real text lists several is not known: the first is named
            raise Refused(
                400,
                f"Request to model '{model}' failed. The example at index {index} in your batch "
                "has too many tokens and does not fit into the model's context window of "
                f"{longest} tokens. Please lower the number of tokens in the listed example(s) "
                "or use truncation.",
            )
