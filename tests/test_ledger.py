"""The ledger: what was done and what it cost, each thing once."""

import dataclasses
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import lancedb
import pyarrow as pa
import pytest

from tasks.history import SHOWN, WIDTH, as_lines, history, totals, totals_lines
from tasks.journal import RunFolder
from tasks.ledger import CALLS, LATER, Ledger
from tasks.notes import About, Call
from tasks.recover import recover
from tasks.report import Cost, Saved, ledger_row
from tasks.run import ended_report, record_death


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


def before(value: Call | About) -> dict[str, Any]:
    """As a version before wrote it, which knew neither model nor lane, nor a call's index."""
    kept = dataclasses.asdict(value)
    for name in ("model",) if isinstance(value, About) else LATER:
        del kept[name]
    return kept


def test_a_ledger_of_an_earlier_version_is_read_and_written_on(
    library: Any, call_of: Callable[..., Call]
) -> None:
    uri = library.config.state.uri
    old = call_of(run_id="old")
    earlier = pa.schema([field for field in CALLS if field.name not in LATER])
    lancedb.connect(uri).create_table("calls", [before(old)], schema=earlier)
    about = About("old", "docs", "here/docs", "2026-01-01T00:00:00+00:00", 8, "voyage/voyage-4")
    row = ledger_row(saving(about, duplicates=0.5))
    report = json.loads(row["report"])
    del report["model"], report["batch_lane"], report["cost"]["saved_usd"]["batch_lane"]
    Ledger(uri).record_run({**row, "report": json.dumps(report)})

    assert Ledger(uri).calls()[[*LATER]].to_numpy().tolist() == [["", "", "realtime"]]
    assert Ledger(uri).runs()["model"].tolist() == [""]
    new = dataclasses.replace(old, run_id="new", model="voyage/voyage-4", index="here/docs")
    Ledger(uri).record_calls([old, new])
    assert [Call(*row) for row in Ledger(uri).calls().itertuples(index=False, name=None)] == [
        old,
        new,
    ]
    found = totals(library.config)
    assert found["calls"].tolist() == [1, 0, 1]
    assert found["saved_usd.duplicates"].tolist() == [0, 0.5, 0]
    assert "unknown" in totals_lines(found)


def test_what_died_under_an_earlier_version_is_taken_up(
    tmp_path: Path, call_of: Callable[..., Call]
) -> None:
    folder = RunFolder(str(tmp_path), "dead")
    about = About("dead", "docs", "here/docs", "2026-01-01T00:00:00+00:00", 8)
    folder.files.write("runs/dead/run.json", json.dumps(before(about)).encode())
    call = call_of(run_id="dead", status="ProviderBusy")
    folder.files.write("runs/dead/calls/1.json", json.dumps([before(call)]).encode())
    assert recover(str(tmp_path), record_death).set_aside == ()
    (run,) = Ledger(str(tmp_path)).runs().to_dict("records")
    assert (run["state"], run["model"], run["index"]) == ("died", "", "here/docs")
    (row,) = Ledger(str(tmp_path)).calls().itertuples(index=False, name=None)
    assert Call(*row) == call


def saving(about: About, **saved: float) -> Any:
    """The report of a run that saved so much, in US dollars by cause."""
    cost = Cost(saved_usd=Saved(**saved))
    return ended_report(about, [], "completed", "").model_copy(update={"cost": cost})


def test_totals_are_by_month_model_and_index(library: Any, call_of: Callable[..., Call]) -> None:
    assert len(totals(library.config)) == 0
    assert "Nothing" in totals_lines(totals(library.config))

    def call(number: int, month: int, index: str, status: str = "ok", cause: str = "first") -> Call:
        return dataclasses.replace(
            call_of(batch=number, status=status),
            cause=cause,
            started_at=f"2026-{month:02}-28T23:59:59.9+00:00",
            waited=0.25,
            texts=number,
            tokens_billed=0 if status != "ok" else 10 * number,
            tokens_estimated=11 * number,
            usd=0.0 if status != "ok" else 1e-6 * number,
            model="voyage/voyage-4",
            index=index,
        )

    ledger = Ledger(library.config.state.uri)
    ledger.record_calls(
        [
            call(1, 1, "here/docs"),
            call(2, 1, "here/docs", "ProviderThrottled"),
            call(3, 1, "here/docs", "BatchTooLarge", "wait"),
            call(4, 1, "here/docs", "ProviderBusy", "split"),
            call(5, 1, "here/docs", "unforeseen", "retry"),
            dataclasses.replace(call(6, 1, "here/docs", "ok", "retry"), lane="batch"),
            call(7, 2, "here/docs"),
            call(8, 2, ""),
        ]
    )
    for number, (month, saved) in enumerate([(1, 0.5), (2, 0.25), (2, 0.125), (3, 2.0), (4, 0.0)]):
        started = f"2026-{month:02}-01T00:00:00.000+00:00"
        about = About(str(number), "docs", "here/docs", started, 8, "voyage/voyage-4")
        row = saving(
            about, unchanged=saved, duplicates=2 * saved, cache=4 * saved, batch_lane=8 * saved
        )
        ledger.record_run(ledger_row(row))
    found = totals(library.config)
    where = [
        ("2026-01", "voyage/voyage-4", "here/docs"),
        ("2026-02", "voyage/voyage-4", ""),
        ("2026-02", "voyage/voyage-4", "here/docs"),
        ("2026-03", "voyage/voyage-4", "here/docs"),
    ]
    assert list(found[["month", "model", "index"]].itertuples(index=False, name=None)) == where
    counts = found.drop(columns=["month", "model", "index"])
    # calls, ok, failed, throttled, split, retried, texts, estimated, billed, of these in the
    # Batch lane, usd, waited, saved
    assert counts.to_numpy().tolist() == [
        pytest.approx([6, 2, 2, 1, 1, 2, 7, 77, 70, 60, 7e-6, 1.5, 0.5, 1, 2, 4]),
        pytest.approx([1, 1, 0, 0, 0, 0, 8, 88, 80, 0, 8e-6, 0.25, 0, 0, 0, 0]),
        pytest.approx([1, 1, 0, 0, 0, 0, 7, 77, 70, 0, 7e-6, 0.25, 0.375, 0.75, 1.5, 3]),
        pytest.approx([0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 2, 4, 8, 16]),
    ]
    assert {str(counts[name].dtype) for name in list(counts)[:10]} == {"int64"}
    lines = totals_lines(found).splitlines()
    assert max(map(len, lines)) <= WIDTH
    shown = " ".join(" ".join(lines[3:]).split())
    assert shown.startswith(
        "2026-01 voyage/voyage-4 7 6 70 $0.0000070 here/docs "
        "calls: 2 failed, 1 throttled, 1 split, 2 retried; tokens in the Batch lane: 60; "
        "tokens estimated: 77; calls waited 1.5 s in all; saved: unchanged $0.5000, "
        "duplicates $1.0000, cache $2.0000, batch lane $4.0000 "
        "2026-02 voyage/voyage-4 8 1 80 $0.0000080 - tokens estimated: 88 "
    )
    assert " all 22 8 220 $0.000022 calls: 2 failed," in shown
    assert shown.endswith(
        "saved: unchanged $2.8750, duplicates $5.7500, cache $11.5000, batch lane $23.0000"
    )
    last = totals_lines(found, last=1).splitlines()
    assert last[2] == "3 older rows are not shown; --all shows them."
    assert [line[:8] for line in last[3:] if line[0] != " "] == ["month   ", "2026-03 ", "all     "]
    assert last[-1] == lines[-1]


def test_the_history_shows_the_newest_runs_and_says_how_many_it_leaves_out(library: Any) -> None:
    ledger = Ledger(library.config.state.uri)
    for number in range(SHOWN + 2):
        started = f"2026-01-{number // 30 + 1:02}T00:{number % 30:02}:00.000+00:00"
        about = About(f"run-{number}", "t", library.config.index.place, started, 8)
        report = ended_report(about, [], "failed", "").model_copy(update={"cost": Cost(usd=2e-5)})
        ledger.record_run(ledger_row(report))
    frame = history(library.config)
    assert len(frame) == SHOWN + 2
    lines = as_lines(frame).splitlines()
    assert lines[0] == "2 older runs are not shown; --all shows them."
    assert lines[3].strip() == "run run-2"
    assert lines[-1].strip() == f"run run-{SHOWN + 1}"
    assert lines[-2].endswith("  $0.000020")
    whole = as_lines(frame, last=None)
    assert "not shown" not in whole
    assert whole.count("run run-") == SHOWN + 2


def test_a_run_tells_its_failures_waits_and_savings(
    library: Any, call_of: Callable[..., Call]
) -> None:
    ledger, place = Ledger(library.config.state.uri), library.config.index.place
    about = About("run-1", "t", place, "2026-01-01T00:00:00.000+00:00", 8, "voyage/voyage-4")
    statuses = ["ok", "ok", "ProviderBusy", "ProviderThrottled", "BatchTooLarge"]
    calls = [call_of(batch=number, status=status) for number, status in enumerate(statuses)]
    calls[1] = dataclasses.replace(calls[1], cause="retry")
    report = ended_report(about, calls, "completed", "").model_copy(
        update={
            "cost": Cost(usd=2e-5, saved_usd=Saved(unchanged=0.5, cache=2e-5)),
            "waited_seconds": {"requests per minute": 90.0, "tokens per minute": 2.0, "slot": 0.9},
        }
    )
    ledger.record_run(ledger_row(report))
    (_, told, *details) = as_lines(history(library.config)).splitlines()
    assert " 2026-01-01T00:00 " in told
    below = " ".join(" ".join(details).split())
    assert below == (
        "run run-1; texts embedded: 2, calls: 5 (1 failed, 1 throttled, 1 split, 1 retried); "
        "waited for: requests per minute 1 min 30 s, tokens per minute 2.0 s; "
        "saved: unchanged $0.5000, cache $0.000020"
    )
    other = dataclasses.replace(about, run_id="run-2", model="lexical/lexical")
    ledger.record_run(ledger_row(ended_report(other, [], "died", "")))
    lines = as_lines(history(library.config)).splitlines()
    assert "run run-1; voyage/voyage-4; texts" in lines[2]
    assert lines[-1].strip() == "run run-2; lexical/lexical"
    assert max(map(len, lines)) <= WIDTH
