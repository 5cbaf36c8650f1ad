"""Buckets: a corpus in an object store, listed in pages, read as if it were a folder.

`/` in keys makes folders. A store answers late, so that documents are read a few ahead, and
files of tables a range at a time. It is loaded by who has such a corpus only.
"""

import io
import os
import re
from collections import deque
from collections.abc import Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import chain
from pathlib import Path, PurePosixPath
from typing import Any, BinaryIO, Literal, cast

import obstore
from obstore.exceptions import (
    BaseError,
    InvalidPathError,
    PermissionDeniedError,
    PreconditionError,
)

from tasks.errors import CorpusError, SettingsError, StorageFailed
from tasks.read import ReadNotes, Wanted
from tasks.storage import is_local
from tasks.storage.objects import in_words, open_store

AHEAD = 16
"""Documents that are asked for before the first of them has come."""
AHEAD_BYTES = 64 << 20
"""Bytes of them from which on none more is asked for."""
RANGE_BYTES = 8 << 20
"""Bytes of a file of a table that are asked for at once."""

_REFUSED = (FileNotFoundError, PermissionDeniedError, PreconditionError)
_OF_THE_STORE = re.compile(r"status code: (40[18]|429)|ExpiredToken|RequestTimeout|SlowDown")
"""Refusals that are none of one object: of who asks, or of how often."""


class Unreadable(OSError):
    """The store answers, but does not give this object."""


@dataclass(frozen=True)
class Found:
    """What a listing names, from the folder that was listed.

    Attributes:
        name: Of an object; ends in "/" for a folder that cannot be listed.
        size: Bytes.
    """

    name: str
    size: int


class Bucket:
    """The objects below an address such as `s3://bucket/prefix`.

    All verbs raise `StorageFailed` where the store does not answer.

    Attributes:
        uri: The address.
    """

    def __init__(self, uri: str) -> None:
        self.uri = uri
        with self._listing():
            self._store = open_store(uri)

    def objects(self, folder: str = "") -> Iterator[Found]:
        """All objects below `folder` ("" or ending in "/"), in the order of their names.

        An object without bytes whose key ends in "/", as some tools make one for a folder, is
        left out.

        Raises:
            SettingsError: The store lists in no order, or what is right below `uri` has keys
                that cannot be listed.
        """
        held: Found | None = None
        last = ""
        for found in self._all(folder, ""):
            if held and not found.name.startswith(f"{held.name}/") and self.find(held.name):
                yield held
            held = None
            if not found.size and not found.name.endswith("/"):
                # The listing does not tell the key "name/" from "name", which comes long before.
                held = found if found.name > last else None
                continue
            if found.name.endswith("/"):  # it comes after what could be listed of it
                yield found
                continue
            if found.name <= last:
                raise SettingsError(
                    f"source.path: the store of {self.uri} lists its objects in no order, so that "
                    "it cannot hold a corpus. Name another one."
                )
            last = found.name
            yield found
        if held and self.find(held.name):
            yield held

    def _all(self, folder: str, after: str) -> Iterator[Found]:
        """What `objects` tells of, and objects that stand for folders."""
        with self._listing():
            try:
                pages = obstore.list(self._store, folder or None, offset=after or None)
                for meta in chain.from_iterable(pages):
                    if meta["path"]:
                        after = meta["path"]
                        yield Found(after, meta["size"])
            except InvalidPathError:
                pass
            else:
                return
        yield from self._each_folder(folder, after)

    def _each_folder(self, folder: str, after: str) -> Iterator[Found]:
        """The same, for one key that is no path spoils the listing of all folders above it."""
        with self._listing():
            try:
                found = obstore.list_with_delimiter(self._store, folder or None)
            except InvalidPathError as error:
                if not folder:
                    raise SettingsError(
                        f"source.path: {self.uri} cannot be listed, for a key in it is no path: "
                        f"{str(error).splitlines()[0]}. Rename or remove that object, or name a "
                        "folder without it."
                    ) from None
                yield Found(folder, 0)
                return
        sizes = {meta["path"]: meta["size"] for meta in found["objects"]}
        folders = [f"{name.removesuffix('/')}/" for name in found["common_prefixes"]]
        for name in sorted([*sizes, *folders]):
            if after.startswith(name) and name.endswith("/"):
                yield from self._all(name, after)
            elif name > after and name.startswith(folder):
                yield from self._all(name, "") if name.endswith("/") else [Found(name, sizes[name])]

    def is_folder(self, folder: str = "") -> bool:
        """Whether anything lies below `folder`, without a slash at its end."""
        with self._listing():
            try:
                return any(obstore.list(self._store, folder or None, chunk_size=1))
            except InvalidPathError:
                return True

    def find(self, name: str) -> Found | None:
        """The object of that name; None where there is none."""
        try:
            with self._asking(name):
                return Found(name, obstore.head(self._store, name)["size"])
        except Unreadable as error:
            return None if isinstance(error.__cause__, FileNotFoundError) else Found(name, 1)

    def read(self, name: str) -> bytes:
        """The bytes of an object.

        Raises:
            Unreadable: There is none, or the store does not give it.
        """
        with self._asking(name):
            return bytes(obstore.get(self._store, name).bytes())

    def contents(
        self, documents: Iterable[Found], notes: ReadNotes, wanted: Wanted | None
    ) -> Iterator[tuple[str, bytes]]:
        """Each document that is wanted and can be read, with what stands in it; in their order."""
        pool = ThreadPoolExecutor(AHEAD, thread_name_prefix="reading")
        asked = deque[tuple[Found, Future[bytes]]]()
        size = 0
        try:
            for found in documents:
                if wanted is not None and not wanted(found.name):
                    continue
                asked.append((found, pool.submit(self.read, found.name)))
                size += found.size
                while len(asked) >= AHEAD or (size >= AHEAD_BYTES and asked):
                    size -= asked[0][0].size
                    yield from _come(*asked.popleft(), notes)
            while asked:
                yield from _come(*asked.popleft(), notes)
        finally:
            pool.shutdown(cancel_futures=True)

    def open(self, name: str) -> io.RawIOBase:
        """An object as a file, each read of which asks for a range of it.

        Raises:
            Unreadable: There is none, or the store does not give it.
        """
        with self._asking(name):
            meta = obstore.head(self._store, name)
        return _Ranges(self, name, meta["size"], meta["e_tag"])

    def range(self, name: str, start: int, end: int, e_tag: str | None) -> bytes:
        """Bytes of an object that is still the same.

        Raises:
            Unreadable: It is not, or the store does not give it.
        """
        options: obstore.GetOptions = {"range": (start, end)}
        if e_tag is not None:
            options["if_match"] = e_tag
        with self._asking(name):
            return bytes(obstore.get(self._store, name, options=options).bytes())

    @contextmanager
    def _listing(self) -> Iterator[None]:
        try:
            yield
        except (BaseError, OSError, ValueError) as error:
            raise StorageFailed(f"{self.uri} cannot be listed: {in_words(error)}") from error

    @contextmanager
    def _asking(self, name: str) -> Iterator[None]:
        """Tell an object that the store does not give from a store that does not answer."""
        try:
            yield
        except PreconditionError as error:
            raise Unreadable("it was changed while it was read; run again") from error
        except _REFUSED as error:
            raise Unreadable(in_words(error)) from error
        except (BaseError, OSError, ValueError) as error:
            of_the_store = _OF_THE_STORE.search(str(error))
            if re.search(r"status code: 4\d\d", str(error)) and not of_the_store:
                raise Unreadable(in_words(error)) from error
            raise StorageFailed(f"{self.uri}/{name} cannot be read: {in_words(error)}") from error


def _come(found: Found, reading: Future[bytes], notes: ReadNotes) -> Iterator[tuple[str, bytes]]:
    try:
        yield found.name, reading.result()
    except Unreadable:
        notes.fail("unreadable", found.name)


class _Ranges(io.RawIOBase):
    """An object as a file."""

    def __init__(self, bucket: Bucket, name: str, size: int, e_tag: str | None) -> None:
        self._bucket = bucket
        self._name = name
        self._size = size
        self._e_tag = e_tag
        self._at = 0

    def readable(self) -> bool:
        """It is."""
        return True

    def seekable(self) -> bool:
        """It is."""
        return True

    def seek(self, offset: int, whence: int = os.SEEK_SET) -> int:
        """Go to a place, without asking the store."""
        start = {os.SEEK_SET: 0, os.SEEK_CUR: self._at, os.SEEK_END: self._size}[whence]
        self._at = max(start + offset, 0)
        return self._at

    def tell(self) -> int:
        """The place."""
        return self._at

    def readinto(self, buffer: Any) -> int:
        """Fill `buffer`, as far as there is anything, with one request."""
        view = memoryview(buffer)
        end = min(self._at + len(view), self._size)
        if end <= self._at:
            return 0
        data = self._bucket.range(self._name, self._at, end, self._e_tag)
        view[: len(data)] = data
        self._at += len(data)
        return len(data)


@dataclass(frozen=True)
class Stored:
    """A file of a table, or a table, with what of `pathlib.Path` its readers use."""

    bucket: Bucket
    name: str

    @property
    def suffix(self) -> str:
        """Its extension, with the dot."""
        return PurePosixPath(self.name).suffix

    @property
    def stem(self) -> str:
        """The last part of its name, without the extension."""
        return PurePosixPath(self.name).stem

    @property
    def parent(self) -> str:
        """The address that its name starts from."""
        return self.bucket.uri

    def open(self, mode: Literal["rb"] = "rb", buffering: int = -1) -> BinaryIO:  # noqa: ARG002
        """It as a file to read, a range at a time; with 0, just what is asked for."""
        raw = self.bucket.open(self.name)
        return cast("BinaryIO", io.BufferedReader(raw, RANGE_BYTES) if buffering else raw)

    def __str__(self) -> str:
        return f"{self.bucket.uri}/{self.name}"


def require_there(uri: str) -> Bucket | Stored:
    """What is at `uri`: a folder, or a single object.

    Raises:
        SettingsError: Nothing, or the store does not let us look.
    """
    try:
        bucket = Bucket(uri)
        if bucket.is_folder():
            return bucket
        above, _, name = uri.rpartition("/")
        if not above.endswith("/") and (parent := Bucket(above)).find(name):
            return Stored(parent, name)
    except StorageFailed as error:
        raise SettingsError(f"source.path: {error}") from None
    raise SettingsError(f"source.path: there is nothing at {uri}.")


def place_at(uri: str, skip_paths: Iterable[str | Path]) -> tuple[Bucket | Stored, frozenset[str]]:
    """What is at `uri`, and which of `skip_paths` are below it, as names.

    Raises:
        SettingsError: It is among `skip_paths`, there is nothing, or the store does not let us
            look.
    """
    own = [str(path) for path in skip_paths if not is_local(str(path))]
    if any(f"{uri}/".startswith(f"{each}/") for each in own):
        raise SettingsError(
            f"source.path: {uri} is where the index or its state is kept; name another one."
        )
    below = (each.removeprefix(f"{uri}/") for each in own if each.startswith(f"{uri}/"))
    return require_there(uri), frozenset(below)


def files_at(uri: str, skip_paths: Iterable[str | Path]) -> Iterator[Stored]:
    """The files of tables at `uri`, sorted, or the LanceDB table that is there.

    Raises:
        SettingsError: As in `place_at`; or a LanceDB table lies among files.
        CorpusError: A folder cannot be listed.
    """
    place, own = place_at(uri, skip_paths)
    if isinstance(place, Stored):
        yield place
        return
    if uri.lower().endswith(".lance"):
        above, _, name = uri.rpartition("/")
        yield Stored(Bucket(above), name)
        return
    for found in place.objects():
        parts = PurePosixPath(found.name)
        names = {found.name, *map(str, parts.parents)}
        if names & own or any(part.startswith((".", "_")) for part in parts.parts):
            continue
        for folder in parts.parents:
            if folder.suffix.lower() == ".lance":
                raise SettingsError(
                    f"{uri}/{folder} is a LanceDB table, which source.path must name itself."
                )
        if found.name.endswith("/"):
            raise CorpusError(
                f"{uri}/{found.name} cannot be listed, for a key in it is no path. Rename or "
                "remove that object. Nothing is taken from a corpus that is read in part."
            )
        yield Stored(place, found.name)
