"""History: the generations of an index, the runs behind them and what they cost, as frames."""

import textwrap
from collections.abc import Hashable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from tasks.budget import usd_text
from tasks.index import generations, open_index
from tasks.ledger import Ledger
from tasks.notes import OUTCOMES
from tasks.params import Config, Engine
from tasks.report import Calls
from tasks.summary import (
    ENDED,
    WAIT_SHOWN_S,
    calls_text,
    saved_text,
    span_text,
    waits_text,
)

if TYPE_CHECKING:
    import pandas as pd

STRAY = "no record"
SHOWN = 30
"""Runs, and rows of totals, that people are shown unless they ask for all."""
WIDTH = 110
"""Columns of a terminal that the lines below a run are wrapped to."""
CHUNK_COUNTS = ("total", "added", "changed", "moved", "deleted")
GROUPS = ["month", "model", "index"]
COUNTS = (
    *("calls", "ok", "failed", "throttled", "split", "retried"),
    *("texts", "tokens_estimated", "tokens_billed", "tokens_batch_lane"),
)
SAVINGS = ("saved_usd.unchanged", "saved_usd.duplicates", "saved_usd.cache", "saved_usd.batch_lane")


def history(config: Config) -> "pd.DataFrame":
    """All runs of an index, oldest first.

    Returns:
        One row a run, columns as in the run report (`chunks.added`, `cost.usd`, …), with
        `version`, the LanceDB version of a generation that is still kept (else <NA>), and
        `readers`: "now" where readers see this generation, "kept" where they may go back to it,
        "gone" where it is not kept any more, "" for a run that published none. A generation that
        the ledger does not know has a row of its own: its run died before it could say so, or
        the state was lost.

    Raises:
        SettingsError: The table was not made by embed-once.
    """
    import pandas as pd  # noqa: PLC0415

    table = open_index(config.index)
    kept = generations(table) if table is not None else []
    runs = Ledger(config.state.uri).runs()
    if len(runs):
        runs = runs[runs["index"] == config.index.place]
    published = runs[runs["published"] != "none"] if len(runs) else runs
    known = set(published["generation"]) if len(published) else set()
    strays = [
        {
            "generation": generation.number,
            "started_at": generation.published_at.isoformat(timespec="seconds"),
            "state": STRAY,
            "published": "unknown",
        }
        for generation in kept
        if generation.number not in known
    ]
    frame = pd.concat([runs, pd.DataFrame(strays)], ignore_index=True) if strays else runs.copy()
    if not len(frame):
        return frame
    frame = frame.sort_values("started_at", ignore_index=True, kind="stable")
    versions = {generation.number: generation.version for generation in kept}
    # Numbers start again where an index was deleted and built anew: the last run has them.
    published_rows = frame["published"] != "none"
    newest = ~frame["generation"].where(published_rows).duplicated(keep="last") & published_rows
    frame["version"] = frame["generation"].map(versions).where(newest).astype("Int64")
    frame["readers"] = "gone"
    frame.loc[~published_rows, "readers"] = ""
    frame.loc[frame["version"].notna(), "readers"] = "kept"
    now = frame["version"].notna() & (frame["generation"] == max(versions, default=0))
    frame.loc[now, "readers"] = "now"
    return frame


def totals(config: Engine) -> "pd.DataFrame":
    """What all calls of a state came to, by month, model and index.

    All indexes that share `state.uri` are in it, and what belongs to none. Every number but the
    savings is a sum over the calls that the ledger holds: of runs that failed or died as well,
    of searches and of `verify --sample`.

    Returns:
        One row for each `month` (of the call, UTC, as `2026-11`), `model` (`voyage/voyage-4`) and
        `index` (folder and table; "" for a `BatchEmbedder`), in that order. Model and index are
        "" for calls that a version recorded which kept neither.

        `calls` and of those `ok`, `failed`, `throttled` and `split`, and `retried`, which are
        counted among these too; `texts` and `tokens_estimated` of the calls that brought
        vectors; `tokens_billed` and `usd` (list price) of all; `waited_seconds` for a turn, of
        calls that may wait side by side.

        Of `tokens_billed`, `tokens_batch_lane` are those of the Batch lane.

        `saved_usd.unchanged`, `.duplicates`, `.cache` and `.batch_lane`: list price of what
        reindexes of the month had not to embed, by cause. "unchanged" is counted anew by each
        run: it is what the same runs would have cost that embed everything each time.
    """
    import pandas as pd  # noqa: PLC0415

    ledger = Ledger(config.state.uri)
    calls, runs = ledger.calls(), ledger.runs()
    outcomes, good = calls["status"].map(OUTCOMES).fillna("failed"), calls["status"] == "ok"
    counted = pd.DataFrame(
        {
            "month": calls["started_at"].str[:7],
            "model": calls["model"],
            "index": calls["index"],
            "calls": 1,
            **{name: outcomes == name for name in ("ok", "failed", "throttled", "split")},
            "retried": calls["cause"] == "retry",
            "texts": calls["texts"].where(good, 0),
            "tokens_estimated": calls["tokens_estimated"].where(good, 0),
            "tokens_billed": calls["tokens_billed"],
            "tokens_batch_lane": calls["tokens_billed"].where(calls["lane"] == "batch", 0),
        }
    ).astype(dict.fromkeys(COUNTS, "int64"))
    counted = counted.assign(usd=calls["usd"], waited_seconds=calls["waited"])
    parts = [counted]
    if len(runs):
        saved = runs[["model", "index", *[f"cost.{name}" for name in SAVINGS]]]
        saved = saved.rename(columns=lambda name: name.removeprefix("cost."))
        saved = saved.assign(month=runs["started_at"].str[:7])
        parts.append(saved[saved[list(SAVINGS)].sum(axis="columns") > 0])
    columns = [*GROUPS, *COUNTS, "usd", "waited_seconds", *SAVINGS]
    frame = pd.concat(parts, ignore_index=True).reindex(columns=columns)
    sums = frame.groupby(GROUPS, as_index=False).sum()
    return sums.astype({**dict.fromkeys(COUNTS, "int64"), **dict.fromkeys(columns[-6:], float)})


def as_lines(frame: "pd.DataFrame", last: int | None = SHOWN) -> str:
    """History for people: the `last` runs, the newest at the end; None: all of them."""
    if not len(frame):
        return "No runs yet."
    head = ["generation", "readers", "started (UTC)", "what", "rows", "added", "changed", "moved"]
    table: list[tuple[list[str], list[str]]] = [([*head, "deleted", "tokens", "usd"], [])]
    models = {model for model in frame.get("model", ()) if isinstance(model, str)} - {""}
    older = 0 if last is None else max(0, len(frame) - last)
    for row in frame.iloc[older:].to_dict("records"):
        told = row["state"] not in ENDED
        cells = [
            str(row["generation"]) if row["published"] != "none" else "-",
            row["readers"],
            row["started_at"][:16],
            _what(row),
            *[_count(row.get(f"chunks.{name}")) if told else "-" for name in CHUNK_COUNTS],
            _count(row.get("tokens.billed")),
            _usd(row.get("cost.usd")),
        ]
        table.append((cells, _run_details(row, several_models=len(models) > 1)))
    return "\n".join([*_older(older, "runs"), *_aligned(table, to_left={1, 2, 3})])


def totals_lines(frame: "pd.DataFrame", last: int | None = SHOWN) -> str:
    """Totals for people: the `last` rows and the sum of all; None: all of them."""
    if not len(frame):
        return "Nothing was sent or saved yet."
    sums: dict[Hashable, Any] = dict(frame.drop(columns=GROUPS).sum())
    older = 0 if last is None else max(0, len(frame) - last)
    table = [(["month", "model", "texts", "calls", "tokens", "usd", "index"], list[str]())]
    for row in [*frame.iloc[older:].to_dict("records"), {**sums, "month": "all"}]:
        counts = [_count(row[name]) for name in ("texts", "calls", "tokens_billed")]
        sum_of_all = row["month"] == "all"
        model, index = ("", "") if sum_of_all else (row["model"] or "unknown", row["index"] or "-")
        cells = [row["month"], model, *counts, usd_text(row["usd"]), index]
        table.append((cells, _total_details(row)))
    return "\n".join(
        [
            "Totals of this state by month (UTC), model and index. What was saved is counted anew",
            "by each run: against embedding every chunk of its corpus.",
            *_older(older, "rows"),
            *_aligned(table, to_left={0, 1, 6}),
        ]
    )


def _run_details(row: Mapping[Hashable, Any], *, several_models: bool) -> list[str]:
    """What stands below the line of a run."""
    if not isinstance(row.get("run_id"), str):
        return []
    details = [f"run {row['run_id']}"]
    if several_models:
        details.append(row["model"] or "unknown model")
    calls = Calls(**{name: int(row[f"calls.{name}"]) for name in Calls.model_fields})
    if calls != Calls():
        details.append(
            f"texts embedded: {_count(row['texts.embedded'])}, calls: {calls_text(calls)}"
        )
    waits = {
        str(name).removeprefix("waited_seconds."): seconds
        for name, seconds in row.items()
        if str(name).startswith("waited_seconds.")
    }
    if told := waits_text(waits):
        details.append(f"waited for: {told}")
    return details + _saved({name: row[f"cost.{name}"] for name in SAVINGS})


def _total_details(row: Mapping[Hashable, Any]) -> list[str]:
    """What stands below the line of a total."""
    named = {name: row[name] for name in ("failed", "throttled", "split", "retried")}
    ended = ", ".join(f"{_count(count)} {name}" for name, count in named.items() if count)
    details = [f"calls: {ended}"] if ended else []
    if row["tokens_batch_lane"]:
        details.append(f"tokens in the Batch lane: {_count(row['tokens_batch_lane'])}")
    if row["tokens_estimated"] != row["tokens_billed"]:
        details.append(f"tokens estimated: {_count(row['tokens_estimated'])}")
    if row["waited_seconds"] >= WAIT_SHOWN_S:
        details.append(f"calls waited {span_text(row['waited_seconds'])} in all")
    return details + _saved({name: row[name] for name in SAVINGS})


def _saved(savings: Mapping[str, float]) -> list[str]:
    """What was saved by what, in words; nothing where nothing was."""
    told = saved_text({name.removeprefix("saved_usd."): usd for name, usd in savings.items()})
    return [f"saved: {told}"] if told else []


def _older(count: int, what: str) -> list[str]:
    return [f"{count:,} older {what} are not shown; --all shows them."] if count else []


def _aligned(table: Sequence[tuple[list[str], list[str]]], to_left: set[int]) -> list[str]:
    """Cells as aligned columns, each line with its details below it."""
    widths = [max(map(len, column)) for column in zip(*(cells for cells, _ in table), strict=True)]
    lines = []
    for cells, details in table:
        aligned = [
            cell.ljust(width) if number in to_left else cell.rjust(width)
            for number, (cell, width) in enumerate(zip(cells, widths, strict=True))
        ]
        lines.append("  ".join(aligned).rstrip())
        lines += textwrap.wrap(
            "; ".join(details),
            WIDTH,
            initial_indent="    ",
            subsequent_indent="      ",
            break_long_words=False,
            break_on_hyphens=False,
        )
    return lines


def _what(row: Mapping[Hashable, Any]) -> str:
    """How a run ended, or what it went back to."""
    if row["published"] == "rollback":
        return f"rollback to {int(row['restored'])}"
    return str(row["state"])


def _count(value: object) -> str:
    return f"{int(value):,}" if isinstance(value, int | float) and value == value else "-"  # noqa: PLR0124


def _usd(value: object) -> str:
    return usd_text(value) if isinstance(value, float) and value == value else "-"  # noqa: PLR0124
