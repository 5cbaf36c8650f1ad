"""The ledger: every run and every provider call, two LanceDB tables under `state.uri`."""

import json
from collections.abc import Sequence
from dataclasses import asdict, fields
from typing import TYPE_CHECKING, Any

import pyarrow as pa
from lancedb.table import Table

from tasks.lance import durable, make_table, open_table, quoted, writing
from tasks.notes import Call

if TYPE_CHECKING:
    import pandas as pd

RUNS = pa.schema(
    [
        pa.field("run_id", pa.utf8(), nullable=False),
        pa.field("index", pa.utf8(), nullable=False),
        pa.field("state", pa.utf8(), nullable=False),
        pa.field("started_at", pa.utf8(), nullable=False),
        pa.field("generation", pa.int64()),
        pa.field("tokens_billed", pa.int64(), nullable=False),
        pa.field("usd", pa.float64(), nullable=False),
        pa.field("report", pa.utf8(), nullable=False),
    ]
)
"""One row a run; `report` is the run report as JSON."""

_ARROW = {"str": pa.utf8(), "int": pa.int64(), "float": pa.float64()}
CALLS = pa.schema([pa.field(f.name, _ARROW[str(f.type.__name__)]) for f in fields(Call)])  # type: ignore[union-attr]
"""One row a provider call, fields as in `Call`."""

LATER = {"model": "", "index": "", "lane": "realtime"}
"""What an earlier version did not keep of a call, and what it is taken for."""


class Ledger:
    """What was done and what it cost."""

    def __init__(self, state_uri: str) -> None:
        self._uri = state_uri

    def record_run(self, row: dict[str, object]) -> None:
        """Append a row of RUNS."""
        self._append("ledger", RUNS, ["run_id"], [row])

    def record_calls(self, calls: Sequence[Call]) -> None:
        """Append provider calls; one that is there already is not counted twice."""
        if calls:
            key = ["run_id", "batch", "attempt", "call"]
            self._append("calls", CALLS, key, [asdict(call) for call in calls])

    def runs(self) -> "pd.DataFrame":
        """All runs as a frame, oldest first; fields of the report as columns `chunks.added`."""
        import pandas as pd  # noqa: PLC0415

        table = self._open("ledger")
        rows = [] if table is None else table.to_arrow().column("report").to_pylist()
        frame = pd.json_normalize([_as_now(json.loads(row)) for row in rows])
        return frame.sort_values("started_at", ignore_index=True) if len(frame) else frame

    def calls(self) -> "pd.DataFrame":
        """All provider calls as a frame, in the order they were recorded; columns as in `Call`."""
        table = self._open("calls")
        arrow = CALLS.empty_table() if table is None else table.to_arrow()
        frame: pd.DataFrame = arrow.to_pandas()
        for name, value in LATER.items():
            frame[name] = frame[name].fillna(value) if name in frame else value
        return frame.reindex(columns=CALLS.names)

    def calls_of(self, run_id: str) -> list[Call]:
        """The provider calls of one run."""
        table = self._open("calls")
        if table is None:
            return []
        rows = table.search().where(f"run_id = {quoted(run_id)}").to_arrow().to_pylist()
        return [Call(**(row | _later(row))) for row in rows]

    def _open(self, name: str) -> Table | None:
        return open_table(self._uri, name)

    def _append(
        self, name: str, schema: pa.Schema, key: list[str], rows: list[dict[str, object]]
    ) -> None:
        with writing(f"the table {name} in {self._uri}"), durable(self._uri, name):
            table = make_table(self._uri, name, schema)
            merge = table.merge_insert(key).when_not_matched_insert_all()
            merge.execute(pa.Table.from_pylist(rows, schema=schema))


def _as_now(report: dict[str, Any]) -> dict[str, Any]:
    """A report with what an earlier version did not say: the model, what the Batch lane saved."""
    report["cost"]["saved_usd"].setdefault("batch_lane", 0.0)
    return {"model": "", **report}


def _later(row: dict[str, Any]) -> dict[str, str]:
    """What an earlier version did not keep of a call."""
    return {name: value for name, value in LATER.items() if row.get(name) is None}
