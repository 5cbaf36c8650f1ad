"""A stage: a plain function that is a Prefect task inside a flow run.

`plan`, `search` and `history` on the command line call the same stages without importing
Prefect, which costs two seconds. So a stage looks for a flow run around it when it is
called, and only then becomes a task of it.
"""

import functools
import sys
from collections.abc import Callable
from typing import Any, ParamSpec, TypeVar

P = ParamSpec("P")
R = TypeVar("R")


def stage(name: str) -> Callable[[Callable[P, R]], Callable[P, R]]:
    """Make a function the stage `name`."""

    def decorate(function: Callable[P, R]) -> Callable[P, R]:
        @functools.wraps(function)
        def run(*args: P.args, **kwargs: P.kwargs) -> R:
            if not _inside_a_flow():
                return function(*args, **kwargs)
            return _as_task(function, name)(*args, **kwargs)  # type: ignore[no-any-return]

        return run

    return decorate


def _inside_a_flow() -> bool:
    if "prefect" not in sys.modules:
        return False
    from prefect.context import FlowRunContext, TaskRunContext  # noqa: PLC0415

    return FlowRunContext.get() is not None and TaskRunContext.get() is None


@functools.cache
def _as_task(function: Callable[..., Any], name: str) -> Any:
    from prefect import task  # noqa: PLC0415
    from prefect.cache_policies import NO_CACHE  # noqa: PLC0415

    return task(name=name, cache_policy=NO_CACHE, persist_result=False)(function)
