"""Reading: a corpus becomes chunks, a batch of rows at a time.

Each kind of source is one module with one class behind the same few members, so that the
stages after it know none of them.
"""

from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Protocol

import pyarrow as pa

from tasks.prepare import Preparation

Wanted = Callable[[str | None], bool]
"""Whether the chunks of this document are wanted; None stands for a row without document."""


@dataclass
class ReadNotes:
    """What a reader left out, and why. Nothing is dropped without a trace here.

    Attributes:
        skipped: Counts by reason, say {"binary file": 3, "blank text": 1}.
        examples: For each reason the first few documents or row ids, for messages.
        unread: Documents and folders (ending in "/") that could not be read; their rows
            stay in the index as they are.
        unread_ids: The same for single rows of a table.
        failed: How many of those are missing from the corpus that should be in it.
        documents: Documents with a text.
        untouched: Those of them that were not read again: what is in them is known.
    """

    EXAMPLES = 5

    skipped: Counter[str] = field(default_factory=Counter)
    examples: dict[str, list[str]] = field(default_factory=dict)
    unread: list[str] = field(default_factory=list)
    unread_ids: list[str] = field(default_factory=list)
    failed: int = 0
    documents: int = 0
    untouched: int = 0

    def skip(self, reason: str, what: str) -> None:
        """Count `what` as left out for `reason`: there is no text in it to index."""
        self.skipped[reason] += 1
        seen = self.examples.setdefault(reason, [])
        if len(seen) < self.EXAMPLES:
            seen.append(what)

    def fail(self, reason: str, document: str) -> None:
        """Count a document or folder that should be indexed but cannot be read."""
        self.skip(reason, document)
        self.unread.append(document)
        self.failed += 1

    def fail_row(self, reason: str, id_: str) -> None:
        """Count a row of a table that should be indexed but cannot be read."""
        self.skip(reason, id_)
        self.unread_ids.append(id_)
        self.failed += 1


class Reader(Protocol):
    """A corpus that can be read more than once."""

    @property
    def splitter(self) -> str:
        """Version of what cuts documents into chunks; "" where rows are chunks already."""

    @property
    def preparation(self) -> Preparation:
        """What stands in front of the texts of its chunks when they are sent."""

    @property
    def metadata(self) -> list[pa.Field]:
        """The source's own columns, as they stand in the index.

        Raises:
            SettingsError: A column is missing, or takes a name of ours.
        """

    def chunks(self, notes: ReadNotes, wanted: Wanted | None = None) -> Iterator[pa.RecordBatch]:
        """The chunks of all documents, or of those that are `wanted`, in a stable order.

        Yields:
            Batches of at most a few thousand rows: CHUNKS followed by the metadata columns.
            No text is blank. Rows without an id come from files: there all chunks of a
            document are contiguous.

        Raises:
            SettingsError: The path or a column does not exist.
            CorpusError: The corpus holds what no index can hold.
        """
