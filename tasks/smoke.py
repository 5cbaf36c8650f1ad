"""The built-in corpus of the smoke flow, state by state, and what each run must count."""

import shutil
from dataclasses import dataclass
from pathlib import Path

from tasks.report import RunReport

CONFIG = """\
name: smoke
source: {kind: files, path: ./corpus, include: ["*.txt"]}
embedding: {provider: lexical, dimension: 256}
index: {uri: ./index, table: smoke}
state: {uri: ./state}
"""

Counts = dict[str, int]


@dataclass(frozen=True)
class Step:
    """One state of the corpus.

    Attributes:
        name: What it proves.
        documents: Text by file name; each is one chunk.
        expected: Counts of the run that follows.
    """

    name: str
    documents: dict[str, str]
    expected: Counts

    @staticmethod
    def counts(report: RunReport) -> Counts:
        """The counts of a report that a step speaks of."""
        return {
            "added": report.chunks.added,
            "changed": report.chunks.changed,
            "moved": report.chunks.moved,
            "deleted": report.chunks.deleted,
            "unchanged": report.chunks.unchanged,
            "embedded": report.texts.embedded,
            "calls": report.calls.ok,
            "generation": report.generation,
        }


_FIRST = {
    "apples.txt": "Apples keep for weeks in a cool cellar.",
    "bread.txt": "Bread wants a hot oven and some steam.",
    "copy-of-bread.txt": "Bread wants a hot oven and some steam.",
    "dates.txt": "Dates ripen late in the year.",
}
_CHANGED = {**_FIRST, "apples.txt": "Apples keep for months when they do not touch."}
_MOVED = {
    **{name: text for name, text in _CHANGED.items() if name != "dates.txt"},
    "fruit.txt": _CHANGED["dates.txt"],
}
_DELETED = {name: text for name, text in _MOVED.items() if name != "copy-of-bread.txt"}
_NOTHING = {"added": 0, "changed": 0, "moved": 0, "deleted": 0, "embedded": 0, "calls": 0}

DOCUMENTS = (
    Step(
        "a first run adds every chunk and embeds each text once",
        _FIRST,
        {**_NOTHING, "added": 4, "unchanged": 0, "embedded": 3, "calls": 1, "generation": 1},
    ),
    Step(
        "a second run embeds nothing and makes no generation",
        _FIRST,
        {**_NOTHING, "unchanged": 4, "generation": 1},
    ),
    Step(
        "a changed text is embedded, and it alone",
        _CHANGED,
        {**_NOTHING, "changed": 1, "unchanged": 3, "embedded": 1, "calls": 1, "generation": 2},
    ),
    Step(
        "a moved document costs nothing",
        _MOVED,
        {**_NOTHING, "moved": 1, "unchanged": 3, "generation": 3},
    ),
    Step(
        "a deleted document leaves the index",
        _DELETED,
        {**_NOTHING, "deleted": 1, "unchanged": 3, "generation": 4},
    ),
    Step(
        "a text that comes back is not paid for again",
        _FIRST,
        {**_NOTHING, "added": 1, "changed": 1, "moved": 1, "unchanged": 1, "generation": 5},
    ),
)
"""The states in order; each is reindexed once."""


def write_corpus(folder: Path, documents: dict[str, str]) -> None:
    """Make `folder` hold exactly `documents`."""
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    for name, text in documents.items():
        (folder / name).write_text(text + "\n", encoding="utf-8")


def expected_rows(documents: dict[str, str]) -> set[tuple[str, str]]:
    """Document and text of each row that the index must hold."""
    return set(documents.items())
