"""Workers: the calls of a run are made in its own threads, or by workers of Dask.

To a worker goes nothing but the call, with its texts; the answer comes back, and is in the
journal before anything else happens. Limits, budget, claims and retries stay with the run's own
process. So a worker holds nothing that others would have to share, or that is lost with it.
"""

import asyncio
import math
import os
import threading
from collections.abc import Iterator, Sequence
from concurrent.futures import CancelledError
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from importlib.metadata import version
from typing import Any, cast

from tasks.errors import EmbedOnceError, ProviderBusy, ProviderDenied, SettingsError
from tasks.params import Config, Runner
from tasks.providers import Answer, Provider

RELEASE = version("embed-once")
"""Of this process."""
WORKERS_S = 60
"""So long a cluster may be without any worker."""
ANSWER_S = 10
"""So long a scheduler may take to answer."""

_PREPARED = set[str]()
"""In a worker: the spaces that it is ready for."""


def require_dask(runner: Runner) -> None:
    """Fail early where Dask is asked for and not installed.

    Raises:
        SettingsError: It is not.
    """
    if runner.kind == "threads":
        return
    try:
        import distributed  # noqa: F401, PLC0415 - an optional extra
    except ImportError as error:
        raise SettingsError(
            f"runner.kind: dask needs packages that are not installed ({error}). Run "
            "`pip install 'embed-once[dask]'`, or in a clone `uv sync --extra dask`."
        ) from None


def on_workers(config: Config, provider: Provider) -> Provider:
    """`provider` with as many calls at once as all workers together may make.

    A model on this machine is served one call after another; with workers there are several.
    """
    if config.runner.kind == "threads":
        return provider
    limits = replace(provider.limits, concurrency=config.limits.concurrency)
    # Each provider is a frozen dataclass, which its protocol does not say.
    made: Provider = replace(cast("Any", provider), limits=limits)
    return made


@contextmanager
def workers_of(config: Config, provider: Provider, *, needed: bool) -> Iterator[Provider]:
    """`provider`, with its calls made where the config says, as long as the block lasts.

    Args:
        config: Names the workers.
        provider: For embedding.
        needed: Whether there will be any call.

    Raises:
        SettingsError: There are no workers, or they cannot embed.
    """
    if config.runner.kind == "threads" or not needed:
        yield provider
        return
    with _client(config) as client:
        try:
            client.run(_all_prepared, provider, RELEASE)
            # By way of the scheduler, as the calls go: it reads them too.
            client.submit(_prepare, provider, RELEASE, pure=False).result(timeout=WORKERS_S)
        except EmbedOnceError:
            raise
        except Exception as error:
            raise SettingsError(
                f"runner: Dask cannot embed ({type(error).__name__}: {error}). Its scheduler and "
                "each worker need the same Python, packages and version of embed-once as the run."
            ) from error
        yield cast("Provider", _ByDask(provider, client))


def dask_setup(_worker: Any) -> None:
    """Called by Dask in each process that it starts for a run: a cancel is the run's own matter.

    Signals of a terminal, or to a group, would end a worker with an answer that is paid for.
    """
    os.setpgid(0, 0)


class _ByDask:
    """A provider whose calls are made by workers.

    Args:
        provider: Which.
        client: Of their scheduler.
    """

    def __init__(self, provider: Provider, client: Any) -> None:
        self._provider = provider
        self._client = client
        self._in_flight = set[Any]()
        self._lock = threading.Lock()

    def __getattr__(self, name: str) -> Any:
        return getattr(self._provider, name)

    def prepare(self) -> None:
        """Nothing here: the workers have."""

    def embed(self, texts: Sequence[str]) -> Answer:
        """As the provider does.

        Raises:
            ProviderBusy: No worker lived to answer.
            ProviderDenied: There is no scheduler any more.
        """
        from distributed import KilledWorker  # noqa: PLC0415 - an optional extra
        from distributed.comm import CommClosedError  # noqa: PLC0415

        with _scheduler_there():
            call = (_embedded, self._provider, list(texts), RELEASE)
            future = self._client.submit(*call, pure=False)
        with self._lock:
            self._in_flight.add(future)
        try:
            return self._answer_of(future)
        except KilledWorker as error:
            raise ProviderBusy(
                "The worker of Dask that made the call died over it. See its log; one that dies "
                "again and again may have too little memory.",
                retry_after=None,
            ) from error
        except (CancelledError, CommClosedError) as error:
            raise ProviderBusy(
                "Dask gave the call up: the run was cancelled, or its scheduler is gone.",
                retry_after=None,
            ) from error
        finally:
            with self._lock:
                self._in_flight.discard(future)

    def give_up(self) -> None:
        """End the calls in flight, without their answers."""
        with self._lock:
            given_up = list(self._in_flight)
        self._client.cancel(given_up, force=True)

    def _answer_of(self, future: Any) -> Answer:
        without_s = 0
        while True:
            try:
                return cast("Answer", future.result(timeout=ANSWER_S))
            except TimeoutError as late:
                if future.done():  # just now, or the error is the call's own
                    return cast("Answer", future.result())
                without_s = 0 if self._any_worker() else without_s + ANSWER_S
                if without_s >= WORKERS_S:
                    raise ProviderBusy(
                        f"Dask has had no worker for {WORKERS_S} s.", retry_after=None
                    ) from late

    def _any_worker(self) -> bool:
        # A call that was made while the client sought its scheduler is told of nothing: it is
        # asked here, and a client that has given up has none.
        scheduler = self._client.scheduler
        if scheduler is None:
            raise _no_scheduler("its client is closed")
        with _scheduler_there():
            return bool(self._client.sync(scheduler.ncores))


@contextmanager
def _scheduler_there() -> Iterator[None]:
    """Tell of a scheduler that is gone; its client stays closed, even if it comes back."""
    from distributed.client import ClosedClientError  # noqa: PLC0415 - an optional extra
    from distributed.comm import CommClosedError  # noqa: PLC0415

    try:
        yield
    except (ClosedClientError, CommClosedError, OSError) as error:
        raise _no_scheduler(f"{type(error).__name__}: {error}") from error


def _no_scheduler(why: str) -> ProviderDenied:
    return ProviderDenied(
        f"The scheduler of Dask is gone ({why}). What was paid for is kept; start it, then run "
        "again."
    )


def _embedded(provider: Provider, texts: list[str], release: str) -> Answer:
    """In a worker: one call."""
    _prepare(provider, release)  # for one that came later
    return provider.embed(texts)


async def _all_prepared(provider: Provider, release: str) -> None:
    """In each worker, beside its loop: a model may take minutes to load."""
    await asyncio.to_thread(_prepare, provider, release)


def _prepare(provider: Provider, release: str) -> None:
    """In a worker, once: see that it embeds as the run itself would.

    Raises:
        SettingsError: It cannot, or is of another release of embed-once.
    """
    if release != RELEASE:
        raise SettingsError(
            f"runner: a worker of Dask has embed-once {RELEASE}, the run {release}. Their vectors "
            "might differ: install the same there."
        )
    if provider.space.id not in _PREPARED:
        provider.require()
        provider.prepare()
        _PREPARED.add(provider.space.id)


@contextmanager
def _client(config: Config) -> Iterator[Any]:
    """A client of the cluster that the config names, once its workers are there.

    Raises:
        SettingsError: They are not.
    """
    with ExitStack() as stack:
        where = config.runner.address or f"{config.runner.processes} processes"
        try:
            client = _connected(config, stack)
        except (OSError, RuntimeError, ValueError, TypeError, AssertionError) as error:
            raise SettingsError(
                f"runner: no workers of Dask at {where} ({type(error).__name__}: {error}). See "
                "that its scheduler and its workers run."
            ) from error
        yield client


def _connected(config: Config, stack: ExitStack) -> Any:
    from distributed import Client, LocalCluster  # noqa: PLC0415 - an optional extra

    processes = config.runner.processes
    if processes is None:
        client = Client(config.runner.address, timeout=ANSWER_S, set_as_default=False)
    else:
        cluster = LocalCluster(
            n_workers=processes,
            threads_per_worker=math.ceil(config.limits.concurrency / processes),
            # Where none is named, it takes a well-known port on all interfaces.
            dashboard_address="127.0.0.1:0",
            memory_limit=0,  # a call is bounded by its texts
            scheduler_kwargs={"allowed_failures": 0},  # a call that is lost is one of ours
            preload=[__name__],
        )
        client = Client(stack.enter_context(cluster), set_as_default=False)
    stack.enter_context(client)
    client.wait_for_workers(processes or 1, timeout=WORKERS_S)
    return client
