"""The worker of `up`: it runs what Prefect schedules, and ends with who started it.

Before it ends it cancels its runs by way of the server, so that they end in the state
`Cancelled` and keep what was paid for; a run whose worker just goes ends as `Crashed`, or stays
`Running` for ever.
"""

import asyncio
import contextlib
import sys
import time
from uuid import UUID

from httpx import HTTPError
from prefect.client.orchestration import PrefectClient, SyncPrefectClient, get_client
from prefect.client.schemas.actions import WorkPoolCreate
from prefect.client.schemas.filters import (
    FlowRunFilter,
    FlowRunFilterState,
    FlowRunFilterStateType,
    WorkPoolFilter,
    WorkPoolFilterName,
)
from prefect.client.schemas.objects import FlowRun, StateType
from prefect.exceptions import ObjectNotFound, PrefectException
from prefect.states import Cancelled, Cancelling
from prefect.workers.process import ProcessWorker

from flows import tethered
from tasks.errors import SettingsError

POOL = "embed-once"
CANCEL_S = 60.0
"""So long its runs may take to end; Prefect gives each 30 s before it kills it, and on a busy
machine takes long to note that it has ended."""
STOP_S = 120.0
"""So long it may take to end altogether."""
LOOK_S = 0.5
GOING_ON = [StateType.PENDING, StateType.RUNNING, StateType.PAUSED, StateType.CANCELLING]


def make_pool(client: SyncPrefectClient) -> None:
    """See that the work pool is there.

    Raises:
        SettingsError: It is there, but for other workers than this one.
    """
    try:
        kind = client.read_work_pool(POOL).type
    except ObjectNotFound:
        template = ProcessWorker.get_default_base_job_template()
        pool = WorkPoolCreate(name=POOL, type=ProcessWorker.type, base_job_template=template)
        kind = client.create_work_pool(pool).type
    if kind != ProcessWorker.type:
        raise SettingsError(
            f"The work pool {POOL} of this Prefect server has the type {kind}, and `up` works in "
            f"one of the type {ProcessWorker.type}. Start a worker of that type instead of `up`."
        )


def main() -> None:
    """Work under the name of the first argument until released."""
    asyncio.run(work(sys.argv[1]))


async def work(name: str) -> None:
    """Run what is scheduled in the pool until released, then cancel what still runs."""
    loop, released = asyncio.get_running_loop(), asyncio.Event()

    def release() -> None:
        loop.call_soon_threadsafe(released.set)

    tethered.on_release(release, within_s=STOP_S)
    working = asyncio.create_task(ProcessWorker(work_pool_name=POOL, name=name).start())
    waiting = asyncio.create_task(released.wait())
    await asyncio.wait({working, waiting}, return_when=asyncio.FIRST_COMPLETED)
    if not released.is_set():
        await working
        return
    with contextlib.suppress(HTTPError, PrefectException):  # the server may be gone
        await cancel_runs(name)
    working.cancel()
    with contextlib.suppress(asyncio.CancelledError):
        await working  # it kills what still runs
    with contextlib.suppress(HTTPError, PrefectException):
        await note_cancelled(name)


async def cancel_runs(name: str) -> None:
    """Cancel the runs of the worker `name`, and wait until they have ended."""
    asked, deadline = set[UUID](), time.monotonic() + CANCEL_S
    async with get_client() as client:
        while (runs := await _runs_of(name, client)) and time.monotonic() < deadline:
            for run in runs:
                if run.id not in asked:
                    await client.set_flow_run_state(run.id, Cancelling())
                    asked.add(run.id)
            await asyncio.sleep(LOOK_S)


async def note_cancelled(name: str) -> None:
    """Say of the runs of the worker `name`, which is gone, that they were cancelled."""
    async with get_client() as client:
        for run in await _runs_of(name, client):
            await client.set_flow_run_state(run.id, Cancelled(), force=True)


async def _runs_of(name: str, client: PrefectClient) -> list[FlowRun]:
    """What goes on under that worker; a run that is suspended has no process."""
    found = await client.read_flow_runs(
        work_pool_filter=WorkPoolFilter(name=WorkPoolFilterName(any_=[POOL])),
        flow_run_filter=FlowRunFilter(
            state=FlowRunFilterState(type=FlowRunFilterStateType(any_=GOING_ON))
        ),
    )
    return [
        run
        for run in found
        if run.labels.get("prefect.worker.name") == name and run.state_name != "Suspended"
    ]


if __name__ == "__main__":
    main()
