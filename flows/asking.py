"""Asking: a run that would cost more than it may unasked, approved by a person at the terminal."""

import contextlib
import math
import sys

from tasks.approval import ceiling, not_approved, question
from tasks.budget import usd_text
from tasks.form import UNASKED, Overrides
from tasks.params import Config
from tasks.plan import make_plan, plan_rows
from tasks.summary import as_text


def approved(config: Config, overrides: Overrides) -> Overrides:
    """What the run does otherwise once the person at the terminal has approved its price.

    Raises:
        NotApproved: They have not, or there is no terminal.
    """
    planned = make_plan(config, overrides)
    if not planned.needs_approval or planned.would_refuse:
        return overrides
    print(f"Plan for {planned.name}")
    print(as_text(plan_rows(planned)))
    if not (sys.stdin.isatty() and sys.stderr.isatty()):
        raise not_approved(planned, "Run with --yes to approve it.")
    print(question(planned), file=sys.stderr)
    most = ceiling(planned)
    ask = f"Approve up to {usd_text(most)}? [y, N, or another maximum in US dollars] "
    while True:
        print(ask, end="", file=sys.stderr, flush=True)
        answer = sys.stdin.readline().strip().lower()
        if answer in {"", "n", "no"}:
            raise not_approved(planned, "It was not approved.")
        with contextlib.suppress(ValueError):
            named = most if answer in {"y", "yes"} else float(answer.removeprefix("$"))
            if 0 < named < math.inf:
                break
        print(f"{answer!r} is neither y, n nor a price.", file=sys.stderr)
    return overrides.model_copy(
        update={"max_usd": named, "settings": [*overrides.settings, UNASKED]}
    )
