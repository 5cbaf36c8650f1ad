"""History: the generations of an index and the runs behind them, as pandas frames."""

from typing import TYPE_CHECKING

from tasks.index import generations, open_index
from tasks.ledger import Ledger
from tasks.params import Config
from tasks.plan import index_name

if TYPE_CHECKING:
    import pandas as pd

STRAY = "no record"


def history(config: Config) -> "pd.DataFrame":
    """All runs of an index, oldest first.

    Returns:
        One row a run, columns as in the run report (`chunks.added`, `cost.usd`, …), with
        `version`, the LanceDB version of a generation that is still kept (else <NA>). A
        generation that the ledger does not know has a row of its own: its run died before it
        could say so, or the state was lost.

    Raises:
        SettingsError: The table was not made by embed-once.
    """
    import pandas as pd  # noqa: PLC0415

    table = open_index(config.index)
    kept = generations(table) if table is not None else []
    runs = Ledger(config.state.uri).runs()
    if len(runs):
        runs = runs[runs["index"] == index_name(config)]
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
    return frame


def as_lines(frame: "pd.DataFrame") -> str:
    """History for people: one line a run."""
    if not len(frame):
        return "No runs yet."
    head = f"{'generation':>10}  {'started':<25}  {'state':<12}  {'added':>7} {'changed':>7} "
    head += f"{'moved':>7} {'deleted':>7} {'embedded':>8} {'tokens':>9} {'usd':>9}  run"
    lines = [head]
    for row in frame.to_dict("records"):
        counts = [
            f"{_count(row.get(f'chunks.{name}')):>7}"
            for name in ("added", "changed", "moved", "deleted")
        ]
        generation = row["generation"] if row["published"] != "none" else "-"
        lines.append(
            f"{generation:>10}  {row['started_at']:<25}  {row['state']:<12}  "
            f"{' '.join(counts)} {_count(row.get('texts.embedded')):>8} "
            f"{_count(row.get('tokens.billed')):>9} {_usd(row.get('cost.usd')):>9}  "
            f"{row.get('run_id') if isinstance(row.get('run_id'), str) else '-'}"
        )
    return "\n".join(lines)


def _count(value: object) -> str:
    return f"{int(value):,}" if isinstance(value, int | float) and value == value else "-"  # noqa: PLR0124


def _usd(value: object) -> str:
    return f"{value:.4f}" if isinstance(value, float) and value == value else "-"  # noqa: PLR0124
