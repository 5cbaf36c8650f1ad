"""Storage: where the files of runs live, a folder or an object store.

Both keep a few promises: a file is there whole or not at all, it is durable once written,
and a lock frees itself when its holder dies. Names are relative, with `/` between parts.
"""

import os
import socket
import tempfile
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from functools import cache
from hashlib import blake2b
from pathlib import Path
from stat import S_ISDIR
from typing import Any, Self

import pyarrow as pa

from tasks.errors import StorageFailed

SCHEMES = ("s3", "gs")
"""Object stores that LanceDB and obstore name alike and find by the same variables."""


@dataclass(frozen=True)
class Holder:
    """Who holds a lock.

    Attributes:
        run_id: The run.
        since: ISO 8601, UTC.
        host: Name of its machine.
        pid: Number of its process there.
    """

    run_id: str
    since: str
    host: str
    pid: int

    @classmethod
    def here(cls, run_id: str) -> Self:
        """This process, from now on."""
        since = datetime.now(tz=UTC).isoformat(timespec="seconds")
        return cls(run_id, since, socket.gethostname(), os.getpid())

    @classmethod
    def read(cls, values: Any) -> Self | None:
        """The holder that `to_dict` gave; None where it is none."""
        try:
            return cls(**values)
        except TypeError:
            return None

    def to_dict(self) -> dict[str, Any]:
        """All fields, for JSON."""
        return asdict(self)

    def __str__(self) -> str:
        return f"run {self.run_id}, since {self.since}, on {self.host} (process {self.pid})"


class Taken(Exception):
    """Somebody who lives holds the lock.

    Attributes:
        holder: Who, where that is known.
    """

    def __init__(self, holder: Holder | None) -> None:
        super().__init__(str(holder or "an unknown holder"))
        self.holder = holder


Told = Callable[[Holder | None], None]
"""Is called with who holds the lock that is waited for, once for each of them."""


class Hold(ABC):
    """A lock that this process holds."""

    @abstractmethod
    def require(self) -> None:
        """Make sure that it is still ours.

        Raises:
            LockLost: Another process has taken it over.
            StorageFailed: The storage does not answer.
        """


class Storage(ABC):
    """Files below one folder or prefix. All verbs raise `StorageFailed` where it does not work.

    Attributes:
        uri: Where.
    """

    uri: str

    @abstractmethod
    def write(self, name: str, data: bytes | pa.Buffer, *, durable: bool = True) -> None:
        """Write a file, whole or not at all; it is durable when this returns, or need not be."""

    @abstractmethod
    def read(self, name: str) -> pa.Buffer | None:
        """The bytes of a file, or None where there is none of that name."""

    @abstractmethod
    def names(self, prefix: str) -> list[str]:
        """Names of all files below the folder `prefix`, sorted."""

    @abstractmethod
    def folders(self, prefix: str) -> list[str]:
        """Names of the folders right below the folder `prefix`, without it; in any order."""

    @abstractmethod
    def delete(self, names: Iterable[str]) -> None:
        """Remove files; one that is not there is no error."""

    @abstractmethod
    def delete_all(self, prefix: str) -> None:
        """Remove everything below the folder `prefix`."""

    @abstractmethod
    def lives(self, name: str) -> bool:
        """Whether somebody holds the lock `name`; who died may seem to for a while."""

    @abstractmethod
    def _holding(
        self, name: str, holder: Holder, wait_s: float, told: Told
    ) -> AbstractContextManager[Hold]:
        """What `held` does on this kind of storage."""

    @contextmanager
    def held(
        self, name: str, run_id: str, wait_s: float = 0.0, told: Told = lambda _: None
    ) -> Iterator[Hold]:
        """Hold the lock `name` against all other processes until the block ends.

        It frees itself when its holder dies.

        Args:
            name: Of the lock; a small file.
            run_id: For whom it is held.
            wait_s: Most seconds to wait for a holder that lives.
            told: Hears who is waited for.

        Raises:
            Taken: Somebody who lives still holds it after `wait_s`.
        """
        with self._holding(name, Holder.here(run_id), wait_s, told) as hold:
            _holds[self.uri, name, run_id] = hold
            try:
                yield hold
            finally:
                del _holds[self.uri, name, run_id]

    def require_held(self, name: str, run_id: str) -> None:
        """Make sure that the lock `name`, where this process holds it for the run, is still ours.

        Raises:
            LockLost: Another process has taken it over.
            StorageFailed: The storage does not answer.
        """
        if hold := _holds.get((self.uri, name, run_id)):
            hold.require()


_holds: dict[tuple[str, str, str], Hold] = {}
"""What this process holds, by URI, name and run."""


def is_local(uri: str) -> bool:
    """Whether `uri` names a folder of this machine."""
    return "://" not in uri


@cache
def storage_at(uri: str) -> Storage:
    """The storage at `uri`, a folder or an address such as `s3://bucket/prefix`.

    Keys and addresses of object stores come from the usual variables (AWS_ACCESS_KEY_ID,
    AWS_ENDPOINT_URL, …), which LanceDB reads too.

    Raises:
        StorageFailed: The address or the variables are wrong.
    """
    if is_local(uri):
        from tasks.storage.folder import Folder  # noqa: PLC0415

        return Folder(Path(uri).resolve())
    from tasks.storage.objects import Objects  # noqa: PLC0415 - only who uses it loads it

    return Objects(uri)


def local_folder(uri: str, name: str) -> Path:
    """Where this machine keeps what only it needs of `uri`: below it, or in a temporary folder.

    Raises:
        StorageFailed: The temporary folder cannot be made, or belongs to somebody else.
    """
    return (Path(uri) if is_local(uri) else own_temporary(uri)) / name


def own_temporary(uri: str) -> Path:
    """A temporary folder for `uri`, the same for all runs of this user on this machine.

    Raises:
        StorageFailed: It cannot be made, or belongs to somebody else.
    """
    folder = _temporary(uri)
    try:
        folder.parent.mkdir(mode=0o700, exist_ok=True)
    except OSError as error:
        raise StorageFailed(f"{folder.parent} cannot be made: {error.strerror}.") from None
    if not _ours(folder.parent):
        raise StorageFailed(
            f"{folder.parent} belongs to somebody else, or others may write to it, so nothing is "
            "kept there."
        )
    return folder


def known_temporary(uri: str) -> Path | None:
    """The same folder, if there is one already that only this user may write to."""
    folder = _temporary(uri)
    return folder if folder.exists() and _ours(folder.parent) else None


def _temporary(uri: str) -> Path:
    name = blake2b(uri.encode(), digest_size=8).hexdigest()
    return Path(tempfile.gettempdir()) / f"embed-once-{os.getuid()}" / name


def _ours(folder: Path) -> bool:
    found = folder.lstat()
    return found.st_uid == os.getuid() and S_ISDIR(found.st_mode) and not found.st_mode & 0o022
