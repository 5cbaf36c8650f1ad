"""The ledger: what was done and what it cost, each thing once."""

import dataclasses
from collections.abc import Callable
from pathlib import Path

from tasks.ledger import Ledger
from tasks.notes import Call


def test_an_empty_ledger_gives_empty_frames(tmp_path: Path) -> None:
    ledger = Ledger(str(tmp_path))
    assert len(ledger.runs()) == len(ledger.calls()) == 0
    assert list(ledger.calls().columns) == [field.name for field in dataclasses.fields(Call)]


def test_a_call_that_is_recorded_twice_counts_once(
    tmp_path: Path, call_of: Callable[..., Call]
) -> None:
    ledger = Ledger(str(tmp_path))
    calls = [call_of(batch=1), call_of(batch=2), call_of(batch=2, attempt=2)]
    ledger.record_calls(calls[:2])
    ledger.record_calls(calls)
    found = ledger.calls()
    assert found["tokens_billed"].sum() == sum(call.tokens_billed for call in calls)
    rows = found.sort_values(["batch", "attempt"]).itertuples(index=False, name=None)
    assert [Call(*row) for row in rows] == calls


def test_recording_no_calls_leaves_no_trace(tmp_path: Path) -> None:
    Ledger(str(tmp_path)).record_calls([])
    assert list(tmp_path.iterdir()) == []
