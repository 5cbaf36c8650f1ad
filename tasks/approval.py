"""Approval: a plan that costs more than may be spent unasked, and the most that is approved."""

import math

from tasks.budget import usd_text
from tasks.errors import NotApproved
from tasks.plan import Plan

HEADROOM = 1.1
"""A run that was approved may cost so many times its plan: tokens are estimated before they are
billed, and the corpus may grow while a person thinks."""


def ceiling(plan: Plan) -> float:
    """Most US dollars that a run of this plan may cost if nobody names another maximum."""
    return ceiling_usd(plan.cost.usd, plan.max_usd)


def ceiling_usd(usd: float, max_usd: float | None) -> float:
    """A price with HEADROOM, rounded up to two digits, or `max_usd` if that is less."""
    usd *= HEADROOM
    unit = 10.0 ** (math.floor(math.log10(usd)) - 1)
    # As a float two digits may lie a little above themselves.
    most = float(f"{math.ceil(usd / unit - 1e-9) * unit:.1e}")
    return most if max_usd is None else min(most, max_usd)


def question(plan: Plan) -> str:
    """Why a person is asked, in one sentence."""
    free = plan.approve_above_usd or 0.0
    return (
        f"This run would cost about {usd_text(plan.cost.usd, free)}, more than the "
        f"{usd_text(free, plan.cost.usd)} that budget.approve_above_usd allows unasked."
    )


def not_approved(plan: Plan, why: str) -> NotApproved:
    """The error of a run that ends here, `why` being what was said to it."""
    return NotApproved(f"{question(plan)} {why} Nothing was spent.", plan=plan)
