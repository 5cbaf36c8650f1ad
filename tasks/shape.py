"""Shape: what a LanceDB table takes on disk, and for what."""

import os
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lancedb.table import Table

from tasks.lance import versions_of


@dataclass(frozen=True)
class Copy:
    """Versions in a row that share one copy of the rows, each with what was added since.

    Attributes:
        first: The first of them.
        last: The last of them.
        size: Bytes of all their data files.
    """

    first: int
    last: int
    size: int


@dataclass(frozen=True)
class Shape:
    """What a table takes on disk, in bytes.

    Attributes:
        copies: Oldest first; the newest version is in the last one.
        disk: All files; what killed writers left is among them.
        newest: Data files of the newest version.
        live: What the newest version would take freshly written, its indexes included.
        indexes: Indexes of the newest version.
        fragments: Of the newest version.
        deleted: Rows deleted in them.
        largest: Rows of the largest of them.
        rows: Rows of the newest version.
    """

    copies: tuple[Copy, ...]
    disk: int
    newest: int
    live: int
    indexes: int
    fragments: int
    deleted: int
    largest: int
    rows: int

    @property
    def waste(self) -> int:
        """Bytes of the newest version that are deleted rows."""
        return self.newest + self.indexes - self.live

    def bytes_of(self, rows: int) -> int:
        """What so many rows take."""
        return rows * self.live // max(self.rows, 1)

    def unneeded(self, since: int) -> int:
        """Bytes of copies that end before version `since`."""
        return sum(copy.size for copy in self.copies if copy.last < since)


def shape_of(table: Table) -> Shape:
    """What `table`, at its newest version, takes on disk."""
    versions = sorted(versions_of(table), key=lambda entry: entry["version"])
    facts = [{name: int(value) for name, value in entry["metadata"].items()} for entry in versions]
    copies: list[Copy] = []
    before: dict[str, int] | None = None
    for entry, now in zip(versions, facts, strict=True):
        version, size = int(entry["version"]), now["total_files_size"]
        if before is None or (
            # What only adds has more fragments, what only deletes has the same files.
            now["total_fragments"] <= before["total_fragments"]
            and size != before["total_files_size"]
            and _first_fragment(table, version) != _first_fragment(table, copies[-1].last)
        ):
            copies.append(Copy(version, version, size))
        else:
            last = copies[-1]
            copies[-1] = Copy(last.first, version, max(last.size, size))
        before = now
    newest = facts[-1]
    stats: Any = table.stats()
    stored = max(newest["total_data_file_rows"], 1)
    indexes = max(stats["total_bytes"] - newest["total_files_size"], 0)
    return Shape(
        copies=tuple(copies),
        disk=max(
            bytes_of_folder(str(table.uri)),  # type: ignore[attr-defined]
            sum(copy.size for copy in copies),
        ),
        newest=newest["total_files_size"],
        live=newest["total_files_size"] * newest["total_rows"] // stored + indexes,
        indexes=indexes,
        fragments=newest["total_fragments"],
        deleted=newest["total_deletion_file_rows"],
        largest=stats["fragment_stats"]["lengths"]["max"],
        rows=newest["total_rows"],
    )


def bytes_of_folder(path: str) -> int:
    """Bytes of all files below `path`; 0 where it is no folder of this machine."""
    total = 0
    for folder, _, files in os.walk(path):
        for name in files:
            with suppress(FileNotFoundError):
                total += (Path(folder) / name).stat().st_size
    return total


def _first_fragment(table: Table, version: int) -> int:
    """Number of the fragment that the rows of a version begin with; LanceDB uses none twice."""
    table.checkout(version)
    try:
        found = table.search().select([]).with_row_id(True).limit(1).to_arrow()
    finally:
        table.checkout_latest()  # type: ignore[no-untyped-call]
    return int(found.column("_rowid")[0].as_py()) >> 32 if found.num_rows else -1
