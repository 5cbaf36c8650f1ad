"""What is wrong with a config, in words."""

import difflib
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, get_args

from pydantic import BaseModel, ValidationError


def explain(error: ValidationError, what: str | Path, model: type[BaseModel]) -> str:
    """All that is wrong with a config of `model`, a line each.

    Args:
        error: What pydantic found.
        what: The file, or what else was read.
        model: What it should have been.
    """
    problems = error.errors(include_url=False)
    lines = [f"  {_explain_one(dict(problem), model)}" for problem in problems]
    return "\n".join([f"{what} is not a valid config:", *lines])


def _explain_one(problem: dict[str, Any], model: type[BaseModel]) -> str:
    # The tag of the source's kind stands in the location, but is no key of the file.
    where = [str(part) for part in problem["loc"] if part not in {"files", "table"}]
    if problem["loc"][-1:] == ("table",) and len(problem["loc"]) == 2:  # noqa: PLR2004
        where = [str(part) for part in problem["loc"]]  # index.table
    key = ".".join(where)
    if problem["type"] == "extra_forbidden":
        return f"{key}: unknown key.{_did_you_mean(where, model)}"
    if problem["type"] == "missing":
        return f"{key}: missing."
    message = str(problem["msg"]).removeprefix("Value error, ")
    found = problem.get("input")
    plain = isinstance(found, str | int | float | bool) and where[-1:] != ["base_url"]
    shown = f" (found {found!r})" if plain else ""  # an address may hold a password
    return f"{key or 'config'}: {message}{shown}."


def _did_you_mean(where: Sequence[str], model: type[BaseModel]) -> str:
    """The known keys beside the unknown one, nearest first named."""
    models = [model]
    for part in where[:-1]:
        fields = [each.model_fields[part] for each in models if part in each.model_fields]
        models = [inner for field in fields for inner in _models_in(field.annotation)]
    known = sorted({name for each in models for name in each.model_fields})
    near = difflib.get_close_matches(where[-1], known, n=1)
    if near:
        return f" Did you mean {near[0]!r}?"
    return f" Known here: {', '.join(known)}." if known else ""


def _models_in(annotation: Any) -> Iterator[type[BaseModel]]:
    """The models of a field's type, each one of a union."""
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        yield annotation
    for part in get_args(annotation):
        yield from _models_in(part)
