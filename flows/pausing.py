"""Pausing: a run whose price nobody has approved waits for a person, with a form in the UI."""

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Literal
from uuid import UUID

from httpx import HTTPError
from prefect import get_run_logger
from prefect.client.orchestration import get_client
from prefect.exceptions import FlowPauseTimeout, NotPausedError
from prefect.flow_runs import pause_flow_run, resume_flow_run
from prefect.input import RunInput
from prefect.runtime import deployment, flow_run
from pydantic import Field

from tasks.approval import ceiling, not_approved, question
from tasks.artifacts import publish_plan
from tasks.budget import usd_text
from tasks.errors import EmbedOnceError
from tasks.form import Overrides
from tasks.params import Config
from tasks.plan import Plan, plan_of
from tasks.summary import span_text
from tasks.survey import Survey

LOOK_S = 2
"""A paused run looks so often whether it may go on."""
GRACE_S = 600
"""A pause that has timed out on the server can only fail, so ours ends before it."""


class ApprovalNeeded(Exception):
    """The run may not go on unasked.

    Attributes:
        plan: What it would do and cost.
    """

    def __init__(self, plan: Plan) -> None:
        super().__init__(question(plan))
        self.plan = plan


def require_approved(found: Survey, overrides: Overrides) -> None:
    """Let a run go on only if it may cost what it will.

    Raises:
        ApprovalNeeded: A person has to say so first.
    """
    if found.config.budget.approve_above_usd is None:
        return
    plan = plan_of(found, overrides)
    if plan.needs_approval:
        raise ApprovalNeeded(plan)


def approved(plan: Plan, settings: Config, run_id: str) -> Config:
    """The settings of a run that a person has approved, after a pause for that.

    Args:
        plan: What it would do and cost.
        settings: What it was started with.
        run_id: The run; a retry asks anew.

    Raises:
        NotApproved: They rejected it or did not answer in time, or there is nobody to ask.
    """
    if deployment.id is None:
        raise not_approved(plan, "Approve it with --yes, or raise budget.approve_above_usd.")
    if _limited(deployment.id):
        raise not_approved(
            plan,
            "It cannot wait for approval: its deployment has a concurrency_limit, whose slot "
            "Prefect takes from a run that pauses, to end it minutes later. Remove that limit; the "
            "lock of the index keeps runs apart.",
        )
    publish_plan(plan)
    answer = _answer(plan, settings.budget.approval_timeout, run_id)
    if answer.decision == "reject":
        raise not_approved(plan, "It was rejected.")
    budget = settings.budget.model_copy(
        update={"max_usd": answer.max_usd, "approve_above_usd": None}
    )
    return settings.model_copy(update={"budget": budget})


def _limited(deployment_id: str) -> bool:
    """Whether runs of the deployment hold a slot, with a lease that a pause revokes."""
    with get_client(sync_client=True) as client:
        return client.read_deployment(UUID(deployment_id)).global_concurrency_limit is not None


class Approval(RunInput):
    """What a person says to a plan."""

    decision: Literal["approve", "reject"] = Field(
        title="Decision",
        description="approve: the plan is made anew and the run goes on. reject: it ends, and "
        "nothing is spent.",
        json_schema_extra={"position": 0},
    )
    max_usd: float


def _form(described: str, most: float) -> type[Approval]:
    """The form of a plan, with `most` filled in and `described` above it.

    `with_initial_data` could fill that in too, but drops title, description and bounds.
    """

    class Filled(Approval):
        max_usd: float = Field(
            default=most,
            gt=0,
            allow_inf_nan=False,
            title="Maximum price",
            description="Most US dollars that this run may cost at list price; it stops before "
            "the call that would pass it.",
            json_schema_extra={"position": 1},
        )

    return Filled.with_initial_data(description=described)


def _answer(plan: Plan, timeout_s: float, run_id: str) -> Approval:
    most = ceiling(plan)
    described = f"""{question(plan)}

- **{plan.texts.embedded:,} texts** to embed, about {plan.tokens:,} tokens, {plan.calls:,} calls
- **{plan.chunks.added:,} chunks** added, {plan.chunks.changed:,} changed, \
{plan.chunks.moved:,} moved, {plan.chunks.deleted:,} deleted

The whole plan is among the artifacts of this run. Approve up to {usd_text(most)}, or name \
another maximum. Unanswered, the run ends after {span_text(timeout_s)} and spends nothing."""
    with _rejected_after(timeout_s) as unanswered:
        try:
            answer = pause_flow_run(
                wait_for_input=_form(described, most),
                timeout=int(timeout_s) + GRACE_S,
                poll_interval=LOOK_S,
                key=run_id,
            )
        except FlowPauseTimeout:
            unanswered.set()
        except HTTPError as error:
            raise EmbedOnceError(
                f"Prefect's server went away while this run waited for approval ({error}). Nothing "
                "was spent. Run it again."
            ) from None
    if unanswered.is_set():
        raise not_approved(plan, f"Nobody answered within {span_text(timeout_s)}.")
    return answer


@contextmanager
def _rejected_after(seconds: float) -> Iterator[threading.Event]:
    """Reject this run if nobody has answered after so long; what it yields says so."""
    unanswered, ended, run_id = threading.Event(), threading.Event(), UUID(flow_run.id)
    logger = get_run_logger()

    def reject() -> None:
        wait_s = seconds
        while not ended.wait(wait_s):
            first, wait_s = not unanswered.is_set(), LOOK_S
            unanswered.set()  # before the run can see the answer
            try:
                resume_flow_run(run_id, {"decision": "reject", "max_usd": 1.0})
            except NotPausedError:
                if first:  # somebody has just answered; else it was a former try of ours
                    unanswered.clear()
                return
            except (RuntimeError, HTTPError) as error:
                logger.warning("Prefect's server does not take the end of the pause: %s", error)
            else:
                return

    threading.Thread(target=reject, name="approval timeout", daemon=True).start()
    try:
        yield unanswered
    finally:
        ended.set()
