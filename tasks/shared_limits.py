"""Shared limits: one account's quota between runs, processes and machines, kept by Prefect.

Each limit is a Prefect global concurrency limit whose slots are the requests, or tokens, of
one minute. A call takes its slots with a lease and gives them back a minute later: together
that is a log of the last minute, exact for any quota, and what a killed process held comes
back when its lease ends. Slot decay, Prefect's own rate limit, does not fit: never to pass
the quota it needs a capacity of one request and a refill of the rest, which wastes a third
of 3 requests a minute, and the server rounds what decayed down to whole slots at every call,
which at 2000 requests a minute is nearly all.
"""

import random
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from typing import Protocol
from urllib.parse import urlsplit

from tasks.errors import ProviderBusy, SettingsError
from tasks.limits import SLACK
from tasks.providers import Provider

HOLD_S = 5.0
"""Seconds in which slots that were taken ahead must be used."""

LEASE_S = 75.0
"""A minute, `HOLD_S`, and time to give back; the server takes no less than 60 seconds."""

ASK_AGAIN_S = 0.5
"""Seconds between two questions whether slots are free."""

AHEAD = 1 / 50
"""Share of a quota taken ahead at most, so that small calls need not ask Prefect each time."""


class Leases(Protocol):
    """Who keeps the slots."""

    def take(self, name: str, slots: int) -> str | None:
        """Take slots; the lease, or None where too few are free."""

    def give_back(self, lease: str) -> None:
        """Give the slots of a lease back."""


@dataclass(slots=True)
class _Block:
    """Slots of one lease: how many are not used yet, and when some last were (seconds)."""

    lease: str
    left: int
    taken_at: float
    used_at: float | None = None


class Pool:
    """The slots of one limit that this process holds."""

    def __init__(self, name: str, quota: int, leases: Leases, span_s: float) -> None:
        self._name, self._quota, self._leases, self._span_s = name, quota, leases, span_s
        self._blocks: list[_Block] = []
        self._ahead = 0
        self._owed = 0

    def settle(self, now: float) -> None:
        """Give back what was used a minute ago, and what was taken ahead in vain."""
        for block in list(self._blocks):
            if block.left and now - block.taken_at > HOLD_S:
                block.left = self._ahead = 0
            if not block.left and (block.used_at is None or block.used_at + self._span_s <= now):
                # Forgotten first: should giving back fail, the lease ends by itself.
                self._blocks.remove(block)
                self._leases.give_back(block.lease)

    def reserve(self, now: float, amount: int) -> bool:
        """Hold slots for `amount`; a call larger than the quota takes all there are."""
        lacking = min(amount + self._owed, self._quota) - sum(block.left for block in self._blocks)
        if lacking <= 0:
            return True
        # Not less than a part of what was useful before: crumbs would be asked for one by one.
        sizes = {max(lacking, self._ahead), max(lacking, self._ahead // 4)}
        for slots in sorted(sizes, reverse=True):
            lease = self._leases.take(self._name, slots)
            if lease is not None:
                self._blocks.append(_Block(lease, slots, now))
                self._ahead = max(self._ahead, min(2 * slots, int(self._quota * AHEAD)))
                return True
        return False

    def use(self, now: float, amount: int) -> None:
        """Count a call that is sent now."""
        amount, self._owed = min(amount + self._owed, self._quota), 0
        for block in self._blocks:
            drawn = min(block.left, amount)
            if drawn:
                block.left, block.used_at = block.left - drawn, now
                amount -= drawn

    def owe(self, amount: int) -> None:
        """Take so much more with the next call."""
        self._owed += amount


class SharedQuota:
    """Requests and tokens a minute of one account, shared with other processes.

    There is no queue between processes: a large call may wait while small ones of another
    run take what becomes free.
    """

    def __init__(
        self,
        leases: Leases,
        requests: tuple[str, int] | None,
        tokens: tuple[str, int] | None,
        *,
        now: Callable[[], float] = time.monotonic,
        minute_s: float = 60.0,
    ) -> None:
        span_s = minute_s * (1 + SLACK)
        self._requests = Pool(*requests, leases, span_s) if requests else None
        self._tokens = Pool(*tokens, leases, span_s) if tokens else None
        self._now = now
        self._lock = threading.Lock()

    def take(self, tokens: int) -> float:
        """Reserve a call of `tokens`: 0.0, or the seconds after which to ask again."""
        with self._lock:
            needs = [(self._requests, 1), (self._tokens, tokens)]
            pools = [(pool, amount) for pool, amount in needs if pool is not None]
            for pool, _amount in pools:
                pool.settle(self._now())
            if not all(pool.reserve(self._now(), amount) for pool, amount in pools):
                return ASK_AGAIN_S * (0.5 + random.random())  # noqa: S311 - so that no one always loses
            for pool, amount in pools:
                pool.use(self._now(), amount)
            return 0.0

    def correct(self, reserved: int, billed: int) -> None:
        """Take what the provider counted above the reservation with the next call.

        Slots reserved in vain stay taken for their minute: a lease can not shrink.
        """
        if self._tokens and billed > reserved:
            with self._lock:
                self._tokens.owe(billed - reserved)


class PrefectLeases:
    """Slots of Prefect's global concurrency limits."""

    def __init__(self) -> None:
        from prefect.settings import PREFECT_API_URL  # noqa: PLC0415 - needs no Prefect otherwise

        self._url = str(PREFECT_API_URL.value() or "")
        if not self._url:
            raise SettingsError(
                "limits.shared: there is no Prefect server that several runs could share. "
                "Start one with `prefect server start` and set PREFECT_API_URL, or set "
                "limits.shared to false."
            )

    def ensure(self, name: str, slots: int) -> None:
        """Make the limit where there is none.

        Raises:
            SettingsError: There is one with other numbers, or no server to ask.
        """
        from prefect.client.orchestration import get_client  # noqa: PLC0415
        from prefect.client.schemas.actions import GlobalConcurrencyLimitCreate  # noqa: PLC0415
        from prefect.exceptions import ObjectAlreadyExists, ObjectNotFound  # noqa: PLC0415

        try:
            with get_client(sync_client=True) as client:
                try:
                    found = client.read_global_concurrency_limit_by_name(name)
                except ObjectNotFound:
                    wanted = GlobalConcurrencyLimitCreate(name=name, limit=slots)
                    with suppress(ObjectAlreadyExists):  # another run was faster
                        client.create_global_concurrency_limit(wanted)
                    found = client.read_global_concurrency_limit_by_name(name)
        except Exception as error:
            raise SettingsError(
                f"limits.shared: the Prefect server at {self._url} does not answer "
                f"({type(error).__name__}: {error}). Start it, or set limits.shared to false."
            ) from error
        if (found.limit, found.active, found.slot_decay_per_second) != (slots, True, 0.0):
            state = "" if found.active else ", not active"
            decay = found.slot_decay_per_second
            raise SettingsError(
                f"limits.shared: Prefect's limit {name!r} has {found.limit:,} slots{state}"
                f"{f', {decay} decaying a second' if decay else ''}; this config says {slots:,}. "
                f"Give all runs of the account the same limits, or delete Prefect's with "
                f"`prefect gcl delete {name!r}`."
            )

    def take(self, name: str, slots: int) -> str | None:
        """Take slots; the lease, or None where too few are free."""
        from httpx import HTTPStatusError  # noqa: PLC0415
        from prefect.client.orchestration import get_client  # noqa: PLC0415

        try:
            with get_client(sync_client=True) as client:
                answer = client.increment_concurrency_slots_with_lease(
                    names=[name], slots=slots, mode="concurrency", lease_duration=LEASE_S
                ).json()
        except HTTPStatusError as error:
            if error.response.status_code == 423:  # noqa: PLR2004 - Prefect's word for "none free"
                return None
            raise self._silent(error) from error
        except Exception as error:
            raise self._silent(error) from error
        if not answer["limits"]:
            raise SettingsError(
                f"limits.shared: Prefect's limit {name!r} is gone. Start the run again to make it."
            )
        return str(answer["lease_id"])

    def give_back(self, lease: str) -> None:
        """Give the slots of a lease back."""
        from uuid import UUID  # noqa: PLC0415

        from prefect.client.orchestration import get_client  # noqa: PLC0415

        try:
            with get_client(sync_client=True) as client:
                client.release_concurrency_slots_with_lease(UUID(lease))
        except Exception as error:
            raise self._silent(error) from error

    def _silent(self, error: Exception) -> ProviderBusy:
        return ProviderBusy(
            f"The Prefect server at {self._url}, which shares the account's limits, does not "
            f"answer ({type(error).__name__}: {error}). Nothing was sent.",
            retry_after=None,
        )


def shared_window(provider: Provider) -> SharedQuota:
    """The quota of the account that `provider` uses, shared through Prefect.

    Raises:
        SettingsError: No limit is configured, another run shares other numbers, or there is
            no Prefect server.
    """
    space, limits = provider.space, provider.limits
    address = getattr(provider, "base_url", None)
    host = urlsplit(address).netloc if address else ""
    leases, named = PrefectLeases(), []
    for what, quota in (
        ("requests per minute", limits.requests_per_minute),
        ("tokens per minute", limits.tokens_per_minute),
    ):
        name = " ".join(
            part for part in ("embed-once", space.provider, space.model, host, what) if part
        )
        if quota is not None:
            leases.ensure(name, quota)
        named.append(None if quota is None else (name, quota))
    if named == [None, None]:
        raise SettingsError(
            "limits.shared: there is nothing to share. Set limits.requests_per_minute or "
            "limits.tokens_per_minute, or set limits.shared to false."
        )
    return SharedQuota(leases, *named)
