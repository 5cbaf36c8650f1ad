"""Compare: what must happen to the index so that it equals the corpus.

Tables: the same id with another text is changed, with other metadata moved. Files: a text
that left one document and stands in another is moved; what else left and joined the same
document pairs as changed; the rest is added or deleted. A row that differs in its line
numbers alone counts as unchanged but is brought up to date ("relined").
"""

from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path, PurePosixPath
from typing import Literal

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc

from tasks.keys import KeySet, first_of_each, paired
from tasks.schemas import CHANGES, DELETIONS, INDEXED, KEYED, TableRef
from tasks.stage import stage

Flags = npt.NDArray[np.bool_]
Codes = npt.NDArray[np.int8]

NAMES = pa.array(["", "added", "changed", "moved", "relined", "deleted"])
"""Of changes, by their codes."""
SAME, ADDED, CHANGED, MOVED, RELINED, DELETED = range(len(NAMES))


@dataclass(frozen=True)
class Held:
    """Documents whose rows stay as they are, whatever the corpus seems to say.

    Attributes:
        unread: Documents, and folders ending in "/", that could not be read.
        narrow: If given, only documents at or below it are looked at.
        unread_ids: Rows of a table that could not be read.
    """

    unread: tuple[str, ...] = ()
    narrow: str | None = None
    unread_ids: tuple[str, ...] = ()

    @cached_property
    def _below(self) -> str:
        """`narrow` as documents are named: no "./", no slash too many."""
        return PurePosixPath(self.narrow or ".").as_posix()

    @cached_property
    def _unread(self) -> frozenset[str]:
        return frozenset(self.unread)

    def covers(self, document: str | None) -> bool:
        """Whether the rows of `document` stay."""
        if document is None:
            return False
        outside = self.narrow is not None and not (
            self._below in {document, "."} or document.startswith(f"{self._below}/")
        )
        return outside or not self._unread.isdisjoint(_places(document))


def _places(document: str) -> Iterator[str]:
    """`document` and the folders it is in: "a/b.md", "a/"."""
    yield document
    for place, letter in enumerate(document):
        if letter == "/":
            yield document[: place + 1]


@dataclass(frozen=True)
class Compared:
    """What differs.

    Attributes:
        changes: CHANGES, in corpus order.
        deletions: DELETIONS.
        unchanged: Corpus rows whose index row already says the same, but for line numbers.
        held: Index rows left alone because they could not be read in the corpus.
        duplicate: Corpus rows whose text stands in an earlier row too.
        unique_texts: Distinct texts of the corpus.
        unchanged_tokens: Estimated tokens of the unchanged rows.
        duplicate_tokens: Estimated tokens of the other rows beyond the first of each text.
        indexed: Rows in the index.
    """

    changes: TableRef
    deletions: TableRef
    unchanged: int
    held: int
    duplicate: int
    unique_texts: int
    unchanged_tokens: int
    duplicate_tokens: int
    indexed: int


@stage("compare")
def compare(
    keyed: TableRef,
    indexed: TableRef,
    kind: Literal["files", "table"],
    held: Held,
    folder: Path,
    *,
    same_columns: bool = True,
) -> Compared:
    """Hold the corpus against the published index.

    Args:
        keyed: KEYED, each key once.
        indexed: INDEXED, each key once; no rows where there is no index yet.
        kind: How changed and moved are told apart.
        held: Documents that are left alone.
        folder: Where the resulting tables go.
        same_columns: Whether both have the same metadata columns; if not, every row moved.
    """
    corpus, index = keyed.load(KEYED), indexed.load(INDEXED)
    index_at = KeySet(index.column("key")).positions(corpus.column("key"))
    in_corpus = KeySet(corpus.column("key")).holds(index.column("key"))
    new = index_at < 0

    other_text = _differs(corpus, index, index_at, "text_hash")
    other_row = _differs(corpus, index, index_at, "row_hash")
    other_lines = _differs(corpus, index, index_at, "start_line") | _differs(
        corpus, index, index_at, "end_line"
    )
    change = np.full(corpus.num_rows, SAME, np.int8)
    change[other_lines] = RELINED
    change[other_row if same_columns else ~new] = MOVED
    change[other_text] = CHANGED
    change[new] = ADDED

    could_not_be_read = _held_rows(index, replace(held, narrow=None))
    stays = could_not_be_read if held.narrow is None else _held_rows(index, held)
    unread = could_not_be_read & ~in_corpus
    gone = np.flatnonzero(~in_corpus & ~stays)
    fate = np.full(len(gone), DELETED, np.int8)
    if kind == "files":
        _pair(corpus, index, joined=np.flatnonzero(new), gone=gone, change=change, fate=fate)

    return _result(
        corpus, index, change, new=new, gone=gone, fate=fate, held=int(unread.sum()), folder=folder
    )


def tally(changes: pa.Table, deletions: pa.Table) -> Counter[str]:
    """How many chunks were added, changed, moved, relined and deleted.

    A row whose new text is refused is deleted.
    """
    counts = _values(changes)
    leaving = _values(deletions)
    counts["deleted"] = leaving["deleted"] + leaving["refused"]
    return counts


def _values(table: pa.Table) -> Counter[str]:
    """How often each change stands in CHANGES or DELETIONS."""
    found = pc.value_counts(table.column("change"))
    return Counter({pair["values"]: pair["counts"] for pair in found.to_pylist()})


def _differs(
    corpus: pa.Table, index: pa.Table, index_at: npt.NDArray[np.int64], column: str
) -> Flags:
    """For each corpus row whether its index row, if any, has another value."""
    known = np.flatnonzero(index_at >= 0)
    ours = corpus.column(column).take(pa.array(known))
    theirs = index.column(column).take(pa.array(index_at[known]))
    same = pc.fill_null(pc.equal(ours, theirs), False)
    both_null = pc.and_(pc.is_null(ours), pc.is_null(theirs))
    flags = np.zeros(corpus.num_rows, dtype=bool)
    flags[known] = ~pc.or_(same, both_null).to_numpy()
    return flags


def _held_rows(index: pa.Table, held: Held) -> Flags:
    """For each index row whether it stays because its document was not looked at."""
    by_id = np.asarray(
        pc.is_in(index.column("id"), value_set=pa.array(held.unread_ids, pa.utf8())), dtype=bool
    )
    if not held.unread and held.narrow is None:
        return by_id
    documents = index.column("document").combine_chunks().dictionary_encode()
    covered = np.array([held.covers(name) for name in documents.dictionary.to_pylist()], dtype=bool)
    at = pc.fill_null(documents.indices, -1).to_numpy()
    # Index -1, a row without a document, reads the False that is appended at the end.
    return np.asarray(by_id | np.append(covered, False)[at], dtype=bool)


def _pair(
    corpus: pa.Table,
    index: pa.Table,
    *,
    joined: npt.NDArray[np.int64],
    gone: npt.NDArray[np.int64],
    change: Codes,
    fate: Codes,
) -> None:
    """Tell moved and changed rows of files from added and deleted ones, in place."""
    for column, code in (("text_hash", MOVED), ("document_key", CHANGED)):
        still_gone = np.flatnonzero(fate == DELETED)
        still_new = joined[change[joined] == ADDED]
        left, right = paired(
            index.column(column).take(pa.array(gone[still_gone])),
            corpus.column(column).take(pa.array(still_new)),
        )
        fate[still_gone[left]] = code
        change[still_new[right]] = code


def _result(
    corpus: pa.Table,
    index: pa.Table,
    change: Codes,
    *,
    new: Flags,
    gone: npt.NDArray[np.int64],
    fate: Codes,
    held: int,
    folder: Path,
) -> Compared:
    differs = change != SAME
    quiet = ~differs | (change == RELINED)
    changes = corpus.filter(pa.array(differs)).select(CHANGES.names[:-2])
    changes = changes.append_column("change", NAMES.take(pa.array(change[differs])))
    changes = changes.append_column("in_index", pa.array(~new[differs])).cast(CHANGES)
    rows = index.take(pa.array(gone)).select(DELETIONS.names[:-1])
    deletions = rows.append_column("change", NAMES.take(pa.array(fate))).cast(DELETIONS)
    unique = len(first_of_each(corpus.column("text_hash")))
    return Compared(
        changes=TableRef.write(folder / "changes.arrow", CHANGES, [changes]),
        deletions=TableRef.write(folder / "deletions.arrow", DELETIONS, [deletions]),
        unchanged=int(quiet.sum()),
        held=held,
        duplicate=corpus.num_rows - unique,
        unique_texts=unique,
        unchanged_tokens=_tokens(corpus.filter(pa.array(quiet))),
        duplicate_tokens=repeated_tokens(corpus.filter(pa.array(~quiet))),
        indexed=index.num_rows,
    )


def _tokens(table: pa.Table) -> int:
    return pc.sum(table.column("tokens")).as_py() or 0


def repeated_tokens(table: pa.Table) -> int:
    """Tokens of the rows beyond the first of each text."""
    first = pa.array(first_of_each(table.column("text_hash")))
    return _tokens(table) - _tokens(table.take(first))
