"""A folder of this machine as storage: files are synced to disk, locks are the system's."""

import fcntl
import json
import os
import shutil
import time
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import pyarrow as pa
from filelock import FileLock, Timeout

from tasks.errors import StorageFailed
from tasks.storage import Hold, Holder, Storage, Taken, Told

UNFINISHED = ".tmp"
POLL_S = 0.2


class Folder(Storage):
    """Files below a folder, which is made when something is written."""

    def __init__(self, path: Path) -> None:
        self.uri = str(path)
        self._path = path
        self._flocks: set[_Flock] = set()

    def write(self, name: str, data: bytes | pa.Buffer, *, durable: bool = True) -> None:
        """Write a file; if `durable` it survives a power cut once this returns.

        Raises:
            StorageFailed: It could not be written, or not be synced.
        """
        target = self._path / name
        unfinished = target.with_name(target.name + UNFINISHED)
        with self._at(target):
            for flock in tuple(self._flocks):
                flock.require()  # else the folder would be made anew, on whatever disk is left
            make_folder(target.parent)
            try:
                with unfinished.open("wb") as file:
                    file.write(memoryview(data))
                    if durable:
                        file.flush()
                        os.fsync(file.fileno())
                unfinished.replace(target)
            except OSError:
                with suppress(OSError):
                    unfinished.unlink()  # on a full disk it takes the room for something whole
                raise
            if durable:
                sync(target.parent)

    def read(self, name: str) -> pa.Buffer | None:
        """The bytes of a file, mapped into memory.

        Raises:
            StorageFailed: It is there, but cannot be read.
        """
        file = self._path / name
        with self._at(file, "read"):
            try:
                if not file.stat().st_size:
                    return pa.py_buffer(b"")  # nothing to map
                return pa.memory_map(str(file)).read_buffer()
            except FileNotFoundError:
                return None

    def names(self, prefix: str) -> list[str]:
        """Names of all whole files below the folder `prefix`, sorted."""
        found = []
        with self._at(self._path / prefix, "read"):
            for folder, _, files in os.walk(self._path / prefix, onerror=_unless_missing):
                below = Path(folder).relative_to(self._path)
                found += [str(below / file) for file in files if not file.endswith(UNFINISHED)]
        return sorted(found)

    def folders(self, prefix: str) -> list[str]:
        """Names of the folders right below the folder `prefix`; in any order."""
        folder = self._path / prefix
        with self._at(folder, "read"), suppress(FileNotFoundError), os.scandir(folder) as entries:
            return [entry.name for entry in entries if entry.is_dir()]
        return []

    def delete(self, names: Iterable[str]) -> None:
        """Remove files; one that is not there is no error."""
        for name in names:
            # A lock that its holder removes is not one that was lost.
            self._flocks -= {each for each in self._flocks if each.file == self._path / name}
            with self._at(self._path / name, "removed"):
                (self._path / name).unlink(missing_ok=True)

    def delete_all(self, prefix: str) -> None:
        """Remove the folder `prefix`, as far as the system lets us."""
        shutil.rmtree(self._path / prefix, ignore_errors=True)

    def lives(self, name: str) -> bool:
        """Whether somebody holds the lock `name`."""
        file = self._path / name
        with self._at(file, "read"):
            try:
                lock = os.open(file, os.O_RDONLY)
            except FileNotFoundError:
                return False
            try:
                # Shared: of two that ask at once, neither takes the other for the holder.
                fcntl.flock(lock, fcntl.LOCK_SH | fcntl.LOCK_NB)
            except BlockingIOError:
                return True
            finally:
                os.close(lock)
        return False

    @contextmanager
    def _holding(self, name: str, holder: Holder, wait_s: float, told: Told) -> Iterator[Hold]:
        file = self._path / name
        beside = f"{name}.holder"
        lock = FileLock(file)
        with self._at(file):
            make_folder(file.parent)
            self._acquire(lock, beside, wait_s, told)
        flock = _Flock(file)
        self._flocks.add(flock)
        try:
            self.write(beside, json.dumps(holder.to_dict()).encode())
            yield flock
        finally:
            self._flocks.discard(flock)
            with suppress(StorageFailed):
                self.delete([beside])
            lock.release()

    def _acquire(self, lock: FileLock, beside: str, wait_s: float, told: Told) -> None:
        """Take `lock`, waiting for holders that live; the system frees those of the dead."""
        deadline, known = time.monotonic() + wait_s, None
        while True:
            left = max(0.0, deadline - time.monotonic())
            try:
                lock.acquire(timeout=min(1.0, left), poll_interval=POLL_S)
            except Timeout:
                holder = self._holder(beside)
                if not left:
                    raise Taken(holder) from None
                if known is None or holder != known[0]:
                    told(holder)
                    known = (holder,)
            else:
                return

    def _holder(self, beside: str) -> Holder | None:
        try:
            found = self.read(beside)
            return Holder.read(json.loads(found.to_pybytes())) if found else None
        except ValueError:
            return None

    @contextmanager
    def _at(self, file: Path, verb: str = "written") -> Iterator[None]:
        """Say in words what the system says of `file`."""
        try:
            yield
        except OSError as error:
            raise StorageFailed(
                f"{file} cannot be {verb}: {error.strerror or error}. See that the disk below "
                f"{self.uri} is there, is writable and has room, then run again."
            ) from error


class _Flock(Hold):
    """A lock of the system, which nobody can take over, but whose file may vanish."""

    def __init__(self, file: Path) -> None:
        self.file = file
        self._identity = self._found()

    def require(self) -> None:
        """See that the file is still the one that is locked.

        Raises:
            StorageFailed: It is not: the folder was removed, or its disk is gone.
        """
        if self._found() != self._identity:
            raise StorageFailed(
                f"{self.file.parent} was removed, or its disk is gone, while a run held "
                f"{self.file.name} in it. See that it is there, then run again."
            )

    def _found(self) -> tuple[int, int] | None:
        try:
            found = self.file.stat()
        except OSError:
            return None
        return found.st_dev, found.st_ino


def _unless_missing(error: OSError) -> None:
    if not isinstance(error, FileNotFoundError):
        raise error


def make_folder(folder: Path) -> None:
    """Make `folder` and those above it; they survive a power cut."""
    lacking = [each for each in (folder, *folder.parents) if not each.exists()]
    folder.mkdir(parents=True, exist_ok=True)
    for each in lacking:
        sync(each.parent)


def sync(path: Path) -> None:
    """Have the file or folder at `path` on disk before this returns."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
