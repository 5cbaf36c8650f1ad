"""History: the generations of an index and the runs behind them, as pandas frames."""

from collections.abc import Hashable, Mapping
from typing import TYPE_CHECKING, Any

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
    frame["readers"] = "gone"
    frame.loc[~published_rows, "readers"] = ""
    frame.loc[frame["version"].notna(), "readers"] = "kept"
    now = frame["version"].notna() & (frame["generation"] == max(versions, default=0))
    frame.loc[now, "readers"] = "now"
    return frame


def as_lines(frame: "pd.DataFrame") -> str:
    """History for people: one line a run."""
    if not len(frame):
        return "No runs yet."
    head = f"{'generation':>10}  {'readers':<7}  {'started':<25}  {'what':<14}  {'rows':>9} "
    head += f"{'added':>7} {'changed':>7} {'moved':>7} {'deleted':>7} {'embedded':>8} "
    head += f"{'tokens':>9} {'usd':>9}  run"
    lines = [head]
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


def _what(row: Mapping[Hashable, Any]) -> str:
    """How a run ended, or what it went back to."""
    if row["published"] == "rollback":
        return f"rollback to {int(row['restored'])}"
    return str(row["state"])


def _count(value: object) -> str:
    return f"{int(value):,}" if isinstance(value, int | float) and value == value else "-"  # noqa: PLR0124


def _usd(value: object) -> str:
    return f"{value:.4f}" if isinstance(value, float) and value == value else "-"  # noqa: PLR0124
