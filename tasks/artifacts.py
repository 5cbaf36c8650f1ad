"""What a run leaves in Prefect: artifacts under fixed keys, a moving progress, an event."""

import re
import threading
from collections.abc import Sequence
from contextvars import copy_context
from typing import Self
from uuid import UUID

from prefect import get_run_logger
from prefect.artifacts import (
    create_markdown_artifact,
    create_progress_artifact,
    create_table_artifact,
    update_progress_artifact,
)
from prefect.events import emit_event

from tasks import findings
from tasks.faces import markdown
from tasks.findings import Verified, to_do_lines, verified_rows
from tasks.maintain import Maintained
from tasks.notes import Call
from tasks.plan import Plan, plan_rows
from tasks.progress import Progress
from tasks.report import RunReport
from tasks.sections import sections
from tasks.summary import as_markdown

TABLE_ROWS = 500
"""Most rows of the table of batches; an artifact is one request."""
UPDATE_S = 1.0
"""Least time between two updates of the progress, each about 40 ms."""
SETTLE_S = 5.0
"""So long the end of a run waits for the last of them; a server that is stuck takes minutes."""


def key(kind: str, name: str) -> str:
    """Artifact key of `kind` for the config called `name`: lower case, digits, dashes."""
    slug = re.sub(r"[^a-z0-9]+", "-", name.lower()).strip("-") or "index"
    return f"{kind}-{slug}"


def publish_plan(plan: Plan) -> None:
    """The plan, as Markdown."""
    create_markdown_artifact(
        as_markdown(f"Plan for {plan.name}", plan.would_refuse, plan_rows(plan)),
        key=key("plan", plan.name),
        description="What a reindex would do and cost.",
    )


def publish_verified(verified: Verified) -> None:
    """What verify saw, as Markdown."""
    text = as_markdown(
        f"Verify {verified.name}", findings.headline(verified), verified_rows(verified)
    )
    to_do = [f"- {each}" for each in to_do_lines(verified.findings)]
    create_markdown_artifact(
        "\n".join([text, "", *to_do]),
        key=key("verify", verified.name),
        description="Whether index, cache and corpus agree.",
    )


def publish_report(report: RunReport, calls: Sequence[Call]) -> None:
    """The report as Markdown, the batches as a table, and the event of the run."""
    create_markdown_artifact(
        markdown(report, sections(report, calls)),
        key=key("report", report.name),
        description="What the run did and what it cost.",
    )
    create_table_artifact(
        [
            {
                "batch": call.batch,
                "attempt": call.attempt,
                "call": call.call,
                "cause": call.cause,
                "status": call.status,
                "texts": call.texts,
                "tokens estimated": call.tokens_estimated,
                "tokens billed": call.tokens_billed,
                "usd": float(f"{call.usd:.3g}"),
                "waited s": round(call.waited, 1),
                "ms": round(call.seconds * 1000, 1),
            }
            for call in sorted(calls, key=lambda call: call.key)[:TABLE_ROWS]
        ],
        key=key("batches", report.name),
        description=f"Provider calls: {min(len(calls), TABLE_ROWS)} of {len(calls)}.",
    )
    latencies = [call.seconds for call in calls if call.status == "ok"]
    emit_event(
        "embedding.batch_generated",
        resource={
            "prefect.resource.id": f"embed-once.run.{report.run_id}",
            "prefect.resource.name": report.name,
        },
        payload={
            "total_count": report.texts.from_cache + report.texts.embedded,
            "cache_hits": report.texts.from_cache,
            "api_calls": len(calls),
            "processing_time_ms": round(report.seconds.embed * 1000, 1),
            "avg_latency_ms": (
                round(sum(latencies) / len(latencies) * 1000, 1) if latencies else 0.0
            ),
        },
    )


def publish_maintained(maintained: Maintained) -> None:
    """What maintenance did, as Markdown."""
    create_markdown_artifact(
        as_markdown(f"Maintenance of {maintained.name}", "", maintained.rows()),
        key=key("maintain", maintained.name),
        description="What was done, and the bytes before and after.",
    )


class ProgressArtifact:
    """A progress artifact that moves while a run embeds, and shows where it ended.

    A thread of its own shows it: no batch waits for the Prefect server, and no run fails by it.
    """

    def __init__(self, name: str) -> None:
        created = create_progress_artifact(
            0.0, key=key("progress", name), description="Texts embedded."
        )
        if not isinstance(created, UUID):
            raise TypeError("create_progress_artifact must be called from a flow that is not async")
        self._id = created
        self._percent = self._shown = 0.0
        self._ended = threading.Event()
        self._thread = threading.Thread(
            target=copy_context().run, args=(self._follow,), name="progress", daemon=True
        )

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        self._ended.set()
        if kind is None or issubclass(kind, Exception):  # who cancels is not kept waiting
            self._thread.join(SETTLE_S)

    def __call__(self, progress: Progress) -> None:
        """Show `progress` within about a second; it never goes back."""
        if progress.stage == "embedding":
            self._percent = max(self._percent, progress.percent)

    def finish(self) -> None:
        """Show that nothing is missing any more."""
        self._percent = 100.0

    def _follow(self) -> None:
        while not self._ended.wait(UPDATE_S):
            self._show()
        self._show()

    def _show(self) -> None:
        percent = self._percent
        if percent <= self._shown:
            return
        try:
            update_progress_artifact(self._id, percent)
        except Exception as error:  # noqa: BLE001 - the run goes on without
            get_run_logger().warning(
                "The progress artifact stays at %.0f %%: the Prefect server did not take %.0f %% "
                "(%s: %s).", self._shown, percent, type(error).__name__, error,
            )  # fmt: skip
        else:
            self._shown = percent
