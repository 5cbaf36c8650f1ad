"""A rollback publishes an older generation again, costs nothing, and shows in the history."""

import os
import random
import re
import signal
import subprocess
import sys
import time
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pytest

import tasks.rollback
import tasks.search_indexes
from tasks.errors import IndexHeld, SettingsError
from tasks.history import as_lines, history
from tasks.index import adopt, generations, held, open_index
from tasks.ledger import Ledger
from tasks.maintain import maintain
from tasks.providers.lexical import Lexical
from tasks.report import ledger_row
from tasks.rollback import rollback
from tasks.run import Clock, about_run, ended_report
from tasks.search import search

ROOT = Path(__file__).parents[1]
ONE = {"a": "apples arrive", "b": "bears bathe", "c": "cats climb"}
TWO = {"a": "apples arrive", "b": "bears bake", "d": "deer doze"}
THREE = {"a": "ants agree"}


def kept(library: Any) -> list[int]:
    table = open_index(library.config.index)
    assert table is not None
    return [each.number for each in generations(table)]


def test_a_rollback_goes_to_the_generation_before_the_newest(library: Any) -> None:
    library.reindex(ONE)
    library.reindex(TWO)
    done = rollback(library.config)
    assert library.texts() == ONE
    assert (done.generation, done.restored, done.published) == (3, 1, "rollback")
    assert kept(library) == [1, 2, 3]
    chunks = done.chunks
    assert (chunks.total, chunks.unchanged, chunks.added, chunks.changed, chunks.deleted) == (
        3, 1, 1, 1, 1,
    )  # fmt: skip
    assert (done.tokens.billed, done.texts.embedded, done.calls.ok) == (0, 0, 0)


def test_any_kept_generation_can_be_named_even_a_rollback(library: Any) -> None:
    for texts in (ONE, TWO, THREE):
        library.reindex(texts)
    for number, texts in ((1, ONE), (3, THREE), (4, ONE), (2, TWO)):
        rollback(library.config, number)
        assert library.texts() == texts
    assert kept(library) == [3, 4, 5, 6, 7]


def test_a_reindex_brings_the_index_forward_again_at_no_cost(library: Any) -> None:
    library.reindex(ONE)
    library.reindex(TWO)
    rollback(library.config)
    again = library.reindex(TWO)
    assert again.sent == []
    assert again.published.generation == 4
    assert library.texts() == TWO


def test_what_cannot_be_gone_back_to_is_said_with_what_can(library: Any) -> None:
    with pytest.raises(SettingsError, match="no index 't'"):
        rollback(library.config)
    library.settings = {"keep_generations": 2}
    library.reindex(ONE)
    with pytest.raises(SettingsError, match=r"no generation before the newest one \(kept: 1\)"):
        rollback(library.config)
    library.reindex(TWO)
    library.reindex(THREE)
    for number in (1, 7, 0, -1):
        with pytest.raises(SettingsError, match="is not kept; choose one of 2, 3") as caught:
            rollback(library.config, number)
        assert caught.value.exit_code == 2
    with pytest.raises(SettingsError, match="is the newest one already"):
        rollback(library.config, 3)
    assert library.texts() == THREE
    assert kept(library) == [2, 3]


def test_a_rollback_waits_for_nobody(library: Any) -> None:
    library.reindex(ONE)
    library.reindex(TWO)
    with held(library.config.index, "other"), pytest.raises(IndexHeld, match="other"):
        rollback(library.config)
    assert library.texts() == TWO


def test_a_rollback_that_dies_before_its_tag_is_adopted(
    library: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    library.reindex(ONE)
    library.reindex(TWO)

    def die(_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(tasks.rollback, "tag_generation", die)
    with pytest.raises(KeyboardInterrupt):
        rollback(library.config)
    assert kept(library) == [1, 2]
    adopt(library.config.index)
    assert kept(library) == [1, 2, 3]
    assert library.texts() == ONE
    assert "no record" in as_lines(history(library.config))


def test_the_history_tells_rollbacks_and_what_readers_see(library: Any) -> None:
    library.settings = {"keep_generations": 2}
    library.reindex(ONE)
    library.reindex(TWO)
    rollback(library.config)
    library.reindex(THREE)
    rollback(library.config, 3)
    frame = history(library.config)
    rolled = frame[frame["published"] == "rollback"]
    assert rolled["restored"].tolist() == [1, 3]
    assert rolled["tokens.billed"].tolist() == [0, 0]
    readers = dict(zip(frame["generation"], frame["readers"], strict=True))
    assert readers == {3: "gone", 4: "kept", 5: "now"}
    lines = as_lines(frame)
    assert "rollback to 1" in lines
    assert "rollback to 3" in lines


@pytest.mark.parametrize("state", ["failed", "died", "cancelled"])
def test_the_history_counts_no_chunks_of_a_run_that_published_nothing(
    library: Any, lexical: Lexical, state: str
) -> None:
    about = about_run(library.config, lexical.space, "early", Clock(datetime.now(tz=UTC)))
    ended = ended_report(about, [], state, "")
    Ledger(library.config.state.uri).record_run(ledger_row(ended))
    line = as_lines(history(library.config)).splitlines()[1]
    assert re.search(rf"{state}( +-){{5}} +0 ", line)


def test_search_after_a_rollback_finds_what_the_older_generation_holds(
    library: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tasks.search_indexes, "TEXT_ROWS", 10)
    monkeypatch.setattr(tasks.search_indexes, "VECTOR_BYTES", 0)
    before = {f"id{number}": f"common text{number}" for number in range(300)}
    after = {**before, **{f"id{number}": f"common other{number}" for number in range(100)}}
    library.reindex(before)
    maintain(library.config)
    library.reindex({**before, "new": "nothing"})
    library.reindex(after)
    maintain(library.config)
    rollback(library.config, 2)
    for text, id_ in (("text7", "id7"), ("text250", "id250"), ("nothing", "new")):
        assert search(library.config, text, 1)[0].id == id_
    found = search(library.config, "other7", 300)
    assert not any("other" in hit.text for hit in found)
    assert len({hit.id for hit in found}) == len(found) == 300


ROLL = """
import sys
from pathlib import Path
from tasks.params import load_config
from tasks.rollback import rollback
from tasks.ledger import Ledger
from tasks.maintain import maintain
from tasks.report import ledger_row
config = load_config(sys.argv[2])
print("ready", flush=True)
while True:
    {"rollback": rollback, "maintain": maintain}[sys.argv[1]](config)
"""


@pytest.mark.slow
@pytest.mark.timeout(900)
@pytest.mark.parametrize("what", ["rollback", "maintain"])
def test_a_kill_at_any_moment_leaves_whole_generations(
    library: Any, what: str, tmp_path: Path
) -> None:
    texts = {f"id{number}": f"common text{number}" for number in range(1200)}
    states = [texts]
    library.reindex(texts)
    for number in range(3):
        texts = {**texts, f"id{number}": f"changed {number}", f"new{number}": "added"}
        states.append(texts)
        library.reindex(texts)
    file = tmp_path / "killed.yaml"
    file.write_text(library.config.model_dump_json(exclude_none=True), encoding="utf-8")
    for attempt in range(12):
        process = subprocess.Popen(
            [sys.executable, "-c", ROLL, what, str(file)],
            stdout=subprocess.PIPE, text=True, cwd=ROOT,
        )  # fmt: skip
        assert process.stdout is not None
        assert process.stdout.readline().strip() == "ready"
        time.sleep(random.Random(attempt).uniform(0.0, 0.6))
        os.kill(process.pid, signal.SIGKILL)
        process.communicate()
        assert library.texts() in states
        adopt(library.config.index)
        table = open_index(library.config.index)
        assert table is not None
        for each in generations(table):
            table.checkout(each.version)
            rows = table.search().select(["id", "text"]).limit(10**6).to_list()
            assert {row["id"]: row["text"] for row in rows} in states
        if attempt % 5 == 0:  # the index goes on from whatever the kill has left, for free
            texts = {**texts, f"id{attempt}": "common text0"}
            states.append(texts)
            assert library.reindex(texts).sent == []
            assert library.texts() == texts
