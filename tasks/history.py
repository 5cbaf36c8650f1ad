"""History: the generations of an index, the runs behind them and what they cost, as frames."""

from collections.abc import Hashable, Mapping
from typing import TYPE_CHECKING, Any

from tasks.budget import usd_text
from tasks.index import generations, open_index
from tasks.ledger import Ledger
from tasks.notes import OUTCOMES
from tasks.params import Config, Engine
from tasks.summary import span_text

if TYPE_CHECKING:
    import pandas as pd

STRAY = "no record"
SHOWN = 30
"""Runs that people are shown; the frame has all."""
GROUPS = ["month", "model", "index"]
COUNTS = (
    *("calls", "ok", "failed", "throttled", "split", "retried"),
    *("texts", "tokens_estimated", "tokens_billed"),
)
SAVINGS = ("saved_usd.unchanged", "saved_usd.duplicates", "saved_usd.cache")


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

        `saved_usd.unchanged`, `saved_usd.duplicates` and `saved_usd.cache`: list price of what
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
    return sums.astype({**dict.fromkeys(COUNTS, "int64"), **dict.fromkeys(columns[-5:], float)})


def as_lines(frame: "pd.DataFrame") -> str:
    """History for people: one line a run, the newest last, and how many older ones there are."""
    if not len(frame):
        return "No runs yet."
    older = len(frame) - SHOWN
    frame = frame.tail(SHOWN)
    head = f"{'generation':>10}  {'readers':<7}  {'started':<25}  {'what':<14}  {'rows':>9} "
    head += f"{'added':>7} {'changed':>7} {'moved':>7} {'deleted':>7} {'embedded':>8} "
    head += f"{'tokens':>9} {'usd':>9}  run"
    lines = [head]
    if older > 0:
        runs = "run is" if older == 1 else "runs are"
        lines.insert(
            0, f"{older:,} older {runs} not shown; `tasks.history.history` gives all in Python."
        )
    for row in frame.to_dict("records"):
        told = row["state"] not in {"failed", "died", "cancelled", "over budget", "not approved"}
        counts = [
            f"{_count(row.get(f'chunks.{name}')) if told else '-':>{width}}"
            for name, width in (
                ("total", 9),
                ("added", 7),
                ("changed", 7),
                ("moved", 7),
                ("deleted", 7),
            )
        ]
        generation = row["generation"] if row["published"] != "none" else "-"
        lines.append(
            f"{generation:>10}  {row['readers']:<7}  {row['started_at']:<25}  {_what(row):<14}  "
            f"{' '.join(counts)} {_count(row.get('texts.embedded')):>8} "
            f"{_count(row.get('tokens.billed')):>9} {_usd(row.get('cost.usd')):>9}  "
            f"{row.get('run_id') if isinstance(row.get('run_id'), str) else '-'}"
        )
    return "\n".join(lines)


def totals_lines(frame: "pd.DataFrame") -> str:
    """Totals for people: a table, the index last."""
    if not len(frame):
        return "Nothing was sent or saved yet."
    head = ["month", "model", "calls", "failed", "throttled", "split", "retried", "texts"]
    head += ["estimated", "billed", "usd", "waited", "unchanged", "duplicates", "cache", "index"]
    rows = [
        [
            row["month"],
            row["model"] or "unknown",
            *[f"{row[name]:,}" for name in COUNTS if name != "ok"],
            usd_text(row["usd"]),
            span_text(row["waited_seconds"]) if row["waited_seconds"] else "-",
            *[usd_text(row[name]) for name in SAVINGS],
            row["index"] or "-",
        ]
        for row in frame.to_dict("records")
    ]
    table = [head, *rows]
    widths = [max(map(len, column)) for column in zip(*table, strict=True)]
    lines = ["totals of this state; list price of what was saved: unchanged, duplicates, cache"]
    for line in table:
        cells = [cell.rjust(width) for cell, width in zip(line, widths, strict=True)]
        cells[:2] = [cell.ljust(width) for cell, width in zip(line[:2], widths, strict=False)]
        lines.append("  ".join([*cells[:-1], line[-1]]))
    return "\n".join(lines)


def _what(row: Mapping[Hashable, Any]) -> str:
    """How a run ended, or what it went back to."""
    if row["published"] == "rollback":
        return f"rollback to {int(row['restored'])}"
    return str(row["state"])


def _count(value: object) -> str:
    return f"{int(value):,}" if isinstance(value, int | float) and value == value else "-"  # noqa: PLR0124


def _usd(value: object) -> str:
    return usd_text(value) if isinstance(value, float) and value == value else "-"  # noqa: PLR0124
