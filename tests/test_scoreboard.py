"""What other tools are measured by: 100 files of 300 chunks, of which 201 are unique texts."""

import subprocess
import sys
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest
from lancedb.table import Table

from tasks.index import open_index
from tasks.params import Config
from tasks.schemas import TableRef
from tasks.simulator import Settings, Simulator

HEADER = "License: all that is written here may be used by all and everybody."
UNIQUE = 201
WRITER = """\
import sys, lancedb, pyarrow as pa
table = lancedb.connect(sys.argv[1]).open_table("docs")
rows = pa.ipc.open_file(sys.argv[2]).read_all()
print("ready", flush=True)
sys.stdin.readline()
upsert = table.merge_insert("id").when_matched_update_all().when_not_matched_insert_all()
upsert.execute(rows)
"""


def paragraph(name: str) -> str:
    return f"{name}: " + " ".join(f"{word}{name}" for word in ("river", "stone", "candle", "moss"))


class Board:
    """The files, a provider that bills, and the index that follows."""

    def __init__(self, folder: Path, run: Callable[..., Any], simulator: Simulator) -> None:
        self.folder = folder
        self.corpus = folder / "corpus"
        self._run = run
        self._simulator = simulator
        self.corpus.mkdir()
        for number in range(100):
            own = [paragraph(f"{number:03}a"), paragraph(f"{number:03}b")]
            self.write(f"{number:03}.md", [HEADER, *own])

    def write(self, name: str, paragraphs: list[str]) -> None:
        (self.corpus / name).write_text("\n\n".join(paragraphs) + "\n", encoding="utf-8")

    def config(self, model: str = "voyage-4", table: str = "docs") -> Config:
        return Config.model_validate(
            {
                "name": "scoreboard",
                "source": {
                    "kind": "files",
                    "path": str(self.corpus),
                    "split": {"max_tokens": 18, "overlap_tokens": 0},
                },
                "embedding": {
                    "provider": "voyage",
                    "model": model,
                    "dimension": 256,
                    "base_url": self._simulator.base_url,
                },
                "index": {"uri": str(self.folder / "index"), "table": table},
                "state": {"uri": str(self.folder / "state")},
            }
        )

    def run(self, **which: str) -> tuple[int, int]:
        """Reindex; the texts billed, counted by the provider, and the new versions."""
        config = self.config(**which)
        before = self.versions(config)
        self._simulator.ledger.reset()
        self._run(config)
        billed = sum(record.n_texts for record in self._simulator.ledger.requests)
        return billed, self.versions(config) - before

    @staticmethod
    def versions(config: Config) -> int:
        table = open_index(config.index)
        return 0 if table is None else len(table.list_versions())

    @property
    def calls(self) -> int:
        """Of the last run."""
        return len(self._simulator.ledger.requests)

    @property
    def table(self) -> Table:
        table = open_index(self.config().index)
        assert table is not None
        return table

    def rows(self) -> list[tuple[str, str]]:
        """Document and text of each row."""
        found = self.table.to_arrow().select(["document", "text"]).to_pylist()
        return sorted((row["document"], row["text"]) for row in found)


@pytest.fixture
def board(
    tmp_path: Path, reindex: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> Iterator[Board]:
    """A board whose index follows already."""
    monkeypatch.setenv("VOYAGE_API_KEY", "pa-scoreboard")
    with Simulator(Settings(vectors="words")) as simulator:
        board = Board(tmp_path, reindex, simulator)
        assert board.run() == (UNIQUE, 1)
        yield board


def test_a_first_run_bills_each_text_once_in_one_call(board: Board) -> None:
    assert board.calls == 1
    rows = board.rows()
    assert len(rows) == 300
    assert len({text for _, text in rows}) == UNIQUE


def test_a_rerun_over_the_same_files_bills_nothing_and_makes_no_version(board: Board) -> None:
    assert board.run() == (0, 0)


def test_renaming_twenty_files_bills_nothing_and_makes_one_version(board: Board) -> None:
    before = board.rows()
    for number in range(20):
        (board.corpus / f"{number:03}.md").rename(board.corpus / f"renamed-{number:03}.md")
    assert board.run() == (0, 1)
    names = Counter(document for document, _ in board.rows())
    assert names == {
        **{f"renamed-{number:03}.md": 3 for number in range(20)},
        **{f"{number:03}.md": 3 for number in range(20, 100)},
    }
    assert Counter(text for _, text in board.rows()) == Counter(text for _, text in before)


def test_deleting_twenty_files_bills_nothing_and_makes_one_version(board: Board) -> None:
    before = board.rows()
    for number in range(20):
        (board.corpus / f"{number:03}.md").unlink()
    assert board.run() == (0, 1)
    assert board.rows() == [row for row in before if row[0] >= "020.md"]


def test_editing_one_chunk_in_ten_files_bills_these_ten_in_one_version(board: Board) -> None:
    for number in range(10):
        edited = [HEADER, paragraph(f"{number:03}a"), paragraph(f"{number:03}new")]
        board.write(f"{number:03}.md", edited)
    assert board.run() == (10, 1)
    changed = [text for _, text in board.rows() if "new: " in text]
    assert len(changed) == 10
    assert len(board.rows()) == 300


def test_a_change_of_the_model_is_billed_and_the_way_back_is_not(board: Board) -> None:
    assert board.run(model="voyage-4-lite", table="lite") == (UNIQUE, 1)
    assert board.run(model="voyage-4", table="again") == (0, 1)
    assert board.run(model="voyage-4") == (0, 0)


@pytest.mark.slow
def test_five_processes_that_upsert_the_same_keys_leave_each_once(board: Board) -> None:
    rows = board.table.to_arrow().slice(0, 100)
    keys = pa.array([f"key {number}" for number in range(100)], pa.utf8())
    rows = rows.set_column(0, rows.schema.field("id"), keys)
    file = board.folder / "rows.arrow"
    TableRef.write(file, rows.schema, [rows])
    writers = [
        subprocess.Popen(
            [sys.executable, "-c", WRITER, board.config().index.uri, str(file)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        for _ in range(5)
    ]
    for writer in writers:
        assert writer.stdout is not None
        assert writer.stdout.readline() == "ready\n"
    for writer in writers:
        writer.communicate("go\n", timeout=60)
    assert [writer.returncode for writer in writers] == [0] * 5
    ids = board.table.to_arrow().column("id").to_pylist()
    assert sorted(id_ for id_ in ids if id_.startswith("key ")) == sorted(keys.to_pylist())
    assert len(ids) == 400
