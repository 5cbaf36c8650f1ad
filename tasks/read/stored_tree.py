"""Listing: the documents of a bucket, less what git, the config and we ourselves leave out."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import chain
from pathlib import Path

from tasks.errors import SettingsError
from tasks.read import ReadNotes, Wanted
from tasks.read.bucket import Bucket, Found, Stored, Unreadable, place_at
from tasks.read.patterns import Rules, Sieve


@dataclass(frozen=True)
class _Folder:
    """A folder on the way to an object; its name ends in "/", the root's is empty."""

    name: str
    rules: tuple[Rules, ...] = ()
    taken: bool = True


def documents_at(
    uri: str,
    sieve: Sieve,
    skip_paths: Sequence[str | Path],
    notes: ReadNotes,
    wanted: Wanted | None = None,
) -> Iterator[tuple[str, bytes]]:
    """Each document at `uri` that is wanted and can be read, with what stands in it.

    Args:
        uri: A folder of a bucket, or a single object.
        sieve: Which documents of the folder.
        skip_paths: Our own addresses; never read.
        notes: What cannot be read.
        wanted: Which of them.

    Raises:
        SettingsError: There is nothing at `uri`, or at what it is narrowed to.
        StorageFailed: The store does not answer.
    """
    place, own = place_at(uri, skip_paths)
    if isinstance(place, Stored):
        sieve.narrowed(uri, lambda name: name == place.name)
        found = place.bucket.find(place.name)
        return place.bucket.contents([found] if found else [], notes, wanted)
    bucket = place
    sieve = sieve.narrowed(uri, lambda name: bucket.is_folder(name) or bool(bucket.find(name)))
    return bucket.contents(StoredTree(bucket, sieve, own).documents(notes), notes, wanted)


@dataclass(frozen=True)
class StoredTree:
    """The documents below an address.

    Attributes:
        bucket: The address.
        sieve: Which of them. Of ignore files those below the address count.
        skip: Names of folders that are never listed.
    """

    bucket: Bucket
    sieve: Sieve
    skip: frozenset[str] = frozenset()

    def documents(self, notes: ReadNotes) -> Iterator[Found]:
        """The documents, sorted by their names.

        Raises:
            SettingsError: A pattern is none, or the ignore file of the root cannot be read.
            StorageFailed: The store does not answer.
        """
        self.sieve.require_patterns()
        way: list[_Folder] = []
        for found in self._objects():
            name = found.name
            while way and not name.startswith(way[-1].name):
                way.pop()
            if not way:
                way.append(self._entered(_Folder(""), "", name, notes))
            while way[-1].taken and (end := name.find("/", len(way[-1].name)) + 1):
                way.append(self._entered(way[-1], name[:end], name, notes))
            if not way[-1].taken or self.sieve.leaves_out(name, way[-1].rules):
                continue
            if name.endswith("/"):
                notes.fail("unreadable", name)
            else:
                yield found

    def _objects(self) -> Iterator[Found]:
        narrow = self.sieve.narrow
        if narrow is None:
            return self.bucket.objects()
        alone = self.bucket.find(narrow)
        return chain([alone] if alone else [], self.bucket.objects(f"{narrow}/"))

    def _entered(self, above: _Folder, name: str, first: str, notes: ReadNotes) -> _Folder:
        """The folder `name`, of whose objects `first` is listed first."""
        if name.removesuffix("/") in self.skip or self.sieve.leaves_out(name, above.rules):
            return _Folder(name, taken=False)
        try:
            return _Folder(name, above.rules + self._own_rules(name, first))
        except Unreadable as error:
            if not name:
                raise SettingsError(
                    f"{self.bucket.uri}/.gitignore cannot be read: {error} Or set "
                    "source.respect_gitignore to false."
                ) from None
        notes.fail("unreadable", name)
        return _Folder(name, taken=False)

    def _own_rules(self, folder: str, first: str) -> tuple[Rules, ...]:
        """Those of the ignore file in `folder`, asked for where there may be one."""
        if not self.sieve.respect_gitignore:
            return ()
        file, narrow = f"{folder}.gitignore", self.sieve.narrow
        listed = narrow is None or folder.startswith(f"{narrow}/")
        if (listed and first > file) or self.bucket.find(file) is None:
            return ()  # it would have been listed before `first`
        return (Rules.read(self.bucket.read(file), below=len(folder)),)
