"""Rescue: what cannot be written where it belongs is kept on this machine meanwhile."""

from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

import pyarrow as pa

from tasks.errors import StorageFailed
from tasks.storage import Storage, known_temporary, own_temporary, storage_at


@dataclass(frozen=True)
class Rescuing:
    """A storage, and a temporary folder of this machine that stands in where it fails.

    Whoever reads sees the files of both as if they stood in one place.

    Attributes:
        uri: Of the storage.
    """

    uri: str

    def write(self, name: str, data: bytes | pa.Buffer, texts: int = 0) -> None:
        """Write a file, as `Storage.write` does.

        Args:
            name: Of the file.
            data: Its bytes.
            texts: How many texts were paid for it.

        Raises:
            StorageFailed: The storage does not take it; the message says what became of it.
        """
        try:
            storage_at(self.uri).write(name, data)
        except StorageFailed as error:
            raise self._rescued(name, data, texts, error) from error

    def read(self, name: str) -> pa.Buffer | None:
        """The bytes of a file, wherever it was written; None where there is none."""
        found = (storage.read(name) for storage in self._both())
        return next((data for data in found if data is not None), None)

    def names(self, prefix: str) -> list[str]:
        """Names of all files below `prefix`, sorted."""
        return sorted({name for storage in self._both() for name in storage.names(prefix)})

    def folders(self, prefix: str) -> list[str]:
        """Names of the folders right below `prefix`, sorted."""
        return sorted({name for storage in self._both() for name in storage.folders(prefix)})

    def delete(self, names: Iterable[str]) -> None:
        """Remove files, wherever they were written."""
        gone = list(names)
        for storage in self._both():
            storage.delete(gone)

    def delete_all(self, prefix: str) -> None:
        """Remove everything below `prefix`."""
        for storage in self._both():
            storage.delete_all(prefix)

    def _both(self) -> list[Storage]:
        rescued = known_temporary(self.uri)
        return [storage_at(self.uri), *([_rescue_in(rescued)] if rescued else [])]

    def _rescued(
        self, name: str, data: bytes | pa.Buffer, texts: int, cause: StorageFailed
    ) -> StorageFailed:
        """Keep a file elsewhere, and say so."""
        try:
            rescue = _rescue_in(own_temporary(self.uri))
            rescue.write(name, data)
        except StorageFailed as error:
            return StorageFailed(f"{cause} Nor could it be kept elsewhere: {error}", lost=texts)
        return StorageFailed(
            f"{cause} What came meanwhile is kept in {rescue.uri}, from where the next run on this "
            "machine takes it up at no cost.",
            lost=0,
        )


def _rescue_in(folder: Path) -> Storage:
    return storage_at(str(folder / "rescued"))
