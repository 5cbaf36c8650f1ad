"""An object store as storage. One PUT writes an object whole or not at all, and for good.

A lock is a lease: an object whose holder writes it anew every few seconds. Who finds it
taken watches its ETag by the own clock, as the clocks of two machines never agree. One
that changes has a holder who lives; one that stays as it is for longer than a lease lasts
is taken over by a PUT on the condition that it is still the same.
"""

import json
import re
import threading
import time
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from datetime import timedelta
from typing import TYPE_CHECKING, Any
from uuid import uuid4

import obstore
import pyarrow as pa
from obstore.exceptions import AlreadyExistsError, BaseError, PreconditionError
from obstore.store import from_url

from tasks.errors import LockLost, StorageFailed
from tasks.storage import Hold, Holder, Storage, Taken, Told

if TYPE_CHECKING:
    from obstore import PutMode, UpdateVersion
    from obstore.store import ObjectStore, RetryConfig

BEAT_S = 3.0
"""A holder writes its lease so often."""
LASTS_S = 15.0
"""A lease that was not written for so long has a dead holder."""
LOOK_S = 0.5
"""Who waits looks so often."""
RETRY: "RetryConfig" = {"max_retries": 10, "retry_timeout": timedelta(minutes=3)}
"""How long a store that fails or does not answer is asked again: about a minute."""


def open_store(uri: str) -> "ObjectStore":
    """The store at `uri`, by the usual variables; it is not asked anything yet."""
    return from_url(uri, retry_config=RETRY)


def in_words(error: Exception) -> str:
    """What a store says, and what to do about it."""
    text = str(error)
    said = re.search("<Code>(.*?)</Code>.*?<Message>(.*?)</Message>", text, re.DOTALL)
    first = f"{said[1]}: {said[2]}" if said else text.splitlines()[0]
    return (
        f"{first.rstrip(' .')}. See that the bucket is there, and that the variables of its "
        "credentials and address (for S3 AWS_ACCESS_KEY_ID, AWS_ENDPOINT_URL, …) are right, then "
        "run again."
    )


class Objects(Storage):
    """Objects below a prefix of a bucket."""

    def __init__(self, uri: str) -> None:
        self.uri = uri
        self._conditional = False
        self._seen: dict[str, tuple[UpdateVersion, float]] = {}
        with self._at("reached"):
            self._store = open_store(uri)

    def write(self, name: str, data: bytes | pa.Buffer, *, durable: bool = True) -> None:  # noqa: ARG002
        """Write an object in one PUT, which is always durable."""
        with self._at("written"):
            # A multipart upload that is cut off leaves parts behind that cost money unseen.
            obstore.put(self._store, name, memoryview(data).cast("B"), use_multipart=False)

    def read(self, name: str) -> pa.Buffer | None:
        """The bytes of an object, or None where there is none."""
        with self._at("read"):
            try:
                return pa.py_buffer(obstore.get(self._store, name).bytes())
            except FileNotFoundError:
                return None

    def names(self, prefix: str) -> list[str]:
        """Names of all objects below `prefix`, sorted."""
        with self._at("read"):
            return sorted(
                meta["path"] for chunk in obstore.list(self._store, prefix) for meta in chunk
            )

    def folders(self, prefix: str) -> list[str]:
        """Names that objects below `prefix` share up to the next `/`."""
        with self._at("read"):
            found = obstore.list_with_delimiter(self._store, prefix)["common_prefixes"]
        return [name.removesuffix("/").rpartition("/")[2] for name in found]

    def delete(self, names: Iterable[str]) -> None:
        """Remove objects; one that is not there is no error."""
        if gone := list(names):
            with self._at("written"), suppress(FileNotFoundError):
                obstore.delete(self._store, gone)

    def delete_all(self, prefix: str) -> None:
        """Remove all objects below `prefix`."""
        self.delete(self.names(prefix))

    def lives(self, name: str) -> bool:
        """Whether the lease `name` was renewed; one seen for the first time is taken to be."""
        found = self.lease(name)
        if found is None or found[0].get("free"):
            return False
        version, now = found[1], time.monotonic()
        seen = self._seen.get(name)
        if seen is None or seen[0] != version:
            self._seen[name] = seen = version, now
        return now - seen[1] < LASTS_S

    @contextmanager
    def _holding(self, name: str, holder: Holder, wait_s: float, told: Told) -> Iterator[Hold]:
        lease = _Lease(self, name, holder)
        lease.acquire(wait_s, told)
        beats = threading.Thread(target=lease.beat, name=f"lease {name}", daemon=True)
        beats.start()
        try:
            yield lease
        finally:
            lease.ended.set()
            beats.join()
            with suppress(StorageFailed):  # then it ends by itself
                lease.release()

    def put_if(self, name: str, data: bytes, mode: "PutMode") -> "UpdateVersion | None":
        """Write an object on a condition: that there is none yet, or that it is still the same.

        Returns:
            What to name it by in the next condition; None where the condition does not hold.
        """
        with self._at("written"):
            try:
                return _version(obstore.put(self._store, name, data, mode=mode))
            except (AlreadyExistsError, PreconditionError):
                return None

    def require_conditions(self, name: str) -> None:
        """See once that the store heeds conditions; `name` is there by now.

        Raises:
            StorageFailed: It does not, so that it can lock nothing.
        """
        if not self._conditional and self.put_if(name, b"", "create") is not None:
            raise StorageFailed(
                f"The store of {self.uri} overwrites objects although it is told not to "
                "(If-None-Match), so two runs could not be kept apart there. Use one that knows "
                "conditional writes, or a local folder."
            )
        self._conditional = True

    def lease(self, name: str) -> "tuple[dict[str, Any], UpdateVersion] | None":
        """A lease, and what to name it by in a condition; None where there is none."""
        with self._at("read"):
            try:
                found = obstore.get(self._store, name)
                text = bytes(found.bytes())
            except FileNotFoundError:
                return None
        try:
            values = json.loads(text)
        except ValueError:
            values = {}
        return values if isinstance(values, dict) else {}, _version(found.meta)

    @contextmanager
    def _at(self, verb: str) -> Iterator[None]:
        """Say in words what the store says."""
        try:
            yield
        except (BaseError, OSError, ValueError) as error:
            raise StorageFailed(f"{self.uri} cannot be {verb}: {in_words(error)}") from error


def _version(meta: Any) -> "UpdateVersion":
    """What tells this state of an object from all others; stores differ in what they give."""
    version: UpdateVersion = {}
    if e_tag := meta.get("e_tag"):
        version["e_tag"] = e_tag
    if number := meta.get("version"):
        version["version"] = number
    return version


class _Lease(Hold):
    """One lock on an object store, in the hand of this process once it is acquired.

    Attributes:
        ended: Set when it need not be renewed any more.
    """

    def __init__(self, objects: Objects, name: str, holder: Holder) -> None:
        self.ended = threading.Event()
        self._objects = objects
        self._name = name
        self._holder = holder
        self._token = uuid4().hex
        self._beats = 0
        self._version: UpdateVersion = {}
        self._lost = False
        self._lock = threading.Lock()

    def acquire(self, wait_s: float, told: Told) -> None:
        """Take it; a dead holder is waited for until that is sure.

        Raises:
            Taken: A holder who lives has it, for longer than `wait_s`.
        """
        deadline, known = time.monotonic() + wait_s, None
        while not self._put("create"):
            found = self._objects.lease(self._name)
            if found is None:
                continue
            values, version = found
            if values.get("token") == self._token:  # the answer to our PUT was lost
                self._version = version
                return
            if not values.get("free"):
                holder = Holder.read(values.get("holder"))
                if known is None or holder != known[0]:
                    told(holder)
                    known = (holder,)
                if self._lives(version):
                    if time.monotonic() >= deadline:
                        raise Taken(holder)
                    continue
            if self._put(version):
                return
        self._objects.require_conditions(self._name)

    def _lives(self, version: "UpdateVersion") -> bool:
        """Watch a lease until it changes, or has had the time in which it should have."""
        since = time.monotonic()
        while time.monotonic() - since < LASTS_S:
            time.sleep(LOOK_S)
            found = self._objects.lease(self._name)
            if found is None or found[1] != version:
                return found is not None and not found[0].get("free")
        return False

    def beat(self) -> None:
        """Renew it every few seconds until it has ended or is lost."""
        while not self.ended.wait(BEAT_S):
            try:
                self.require()
            except LockLost:
                return
            except StorageFailed:
                continue  # nobody else reaches the store either; else `require` will tell

    def require(self) -> None:
        """Renew it now, which works only as long as nobody else has taken it.

        Raises:
            LockLost: Somebody has.
        """
        with self._lock:
            if not self._lost and not self._put(self._version):
                found = self._objects.lease(self._name)
                self._lost = found is None or found[0].get("token") != self._token
                if found is not None:  # else the answer to our last PUT was lost
                    self._version = found[1]
            if self._lost:
                raise LockLost(
                    f"The lock {self._name} in {self._objects.uri} was not renewed for "
                    f"{LASTS_S:g} s, and another run has taken it over. Nothing more is "
                    "committed; what was paid for is kept. Run again."
                )

    def release(self) -> None:
        """Let others have it at once. It is not deleted: that could hit the lease of another."""
        if not self._lost:
            self._put(self._version, free=True)

    def _put(self, mode: "PutMode", *, free: bool = False) -> bool:
        self._beats += 1  # an ETag is a digest of what is written
        lease = {"token": self._token, "beat": self._beats, "free": free}
        text = json.dumps(lease | {"holder": self._holder.to_dict()}).encode()
        version = self._objects.put_if(self._name, text, mode)
        if version is not None:
            self._version = version
        return version is not None
