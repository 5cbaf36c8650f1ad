"""What Prefect takes for a run whatever that does: the same flow with empty steps.

`python empty_flow.py RUN.json`, where the file tells of a real run: its stages, the number of
its batches, and the artifacts it left. Each stage and each batch is a task here too, with nothing
in it, and the artifacts are the same. Only Prefect is imported, no LanceDB and no SDK, so that
nothing else is counted as its cost.
"""

import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any, cast
from uuid import UUID

from flows.prefect_server import have_server


def main() -> None:
    """Run the empty flow once."""
    have_server("prefect")
    from prefect import flow, task  # noqa: PLC0415
    from prefect.artifacts import (  # noqa: PLC0415
        create_markdown_artifact,
        create_progress_artifact,
        create_table_artifact,
        update_progress_artifact,
    )
    from prefect.cache_policies import NO_CACHE  # noqa: PLC0415
    from prefect.events import emit_event  # noqa: PLC0415
    from prefect.task_runners import ThreadPoolTaskRunner  # noqa: PLC0415

    told = json.loads(Path(sys.argv[1]).read_text(encoding="utf-8"))
    threads: ThreadPoolTaskRunner[Any] = ThreadPoolTaskRunner(max_workers=1024)

    @task(cache_policy=NO_CACHE, persist_result=False)
    def stage() -> None:
        """Nothing."""

    @task(
        name="embed batch",
        task_run_name="embed batch {number}",
        retries=7,
        cache_policy=NO_CACHE,
        persist_result=False,
    )
    def batch(number: int) -> int:
        return number

    def left(kind: str) -> Iterator[dict[str, Any]]:
        return (artifact for artifact in told["artifacts"] if artifact["type"] == kind)

    @flow(name="empty", task_runner=threads, persist_result=False)  # type: ignore[arg-type]
    def empty() -> None:
        *before, last = told["stages"]
        for name in before:
            stage.with_options(name=name)()
        moving = [
            create_progress_artifact(0.0, each["key"], each["description"])
            for each in left("progress")
        ]
        for future in batch.map(list(range(1, told["batches"] + 1))):
            future.result()
        for artifact in moving:
            update_progress_artifact(cast("UUID", artifact), 100.0)
        stage.with_options(name=last)()
        for each in left("markdown"):
            create_markdown_artifact(each["data"], each["key"], each["description"])
        for each in left("table"):
            rows = json.loads(each["data"])
            create_table_artifact(rows, each["key"], each["description"])
        emit_event("embedding.batch_generated", {"prefect.resource.id": "embed-once.run.empty"})

    empty()


if __name__ == "__main__":
    main()
