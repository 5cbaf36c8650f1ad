"""Quarantine: texts that a provider refuses, kept from being sent and refused again.

One LanceDB table under `state.uri`, a row for each text and space. A text that changes is
another text; the same one is sent again only on request.
"""

from collections.abc import Collection, Iterable
from typing import TYPE_CHECKING, Any

import pyarrow as pa
from lancedb.table import Table

from tasks.lance import PRIMARY_KEY, durable, make_table, open_table, quoted, writing
from tasks.notes import Refused
from tasks.schemas import HASH

if TYPE_CHECKING:
    import pandas as pd

QUARANTINE = pa.schema(
    [
        pa.field("id", pa.utf8(), nullable=False, metadata=PRIMARY_KEY),
        pa.field("space", pa.utf8(), nullable=False),
        pa.field("text_hash", HASH, nullable=False),
        pa.field("reason", pa.utf8(), nullable=False),
        pa.field("first_seen", pa.utf8(), nullable=False),
        pa.field("last_seen", pa.utf8(), nullable=False),
        pa.field("run_id", pa.utf8(), nullable=False),
    ]
)
"""One row a refused text: times are ISO 8601 in UTC, `run_id` is the run that saw it last."""

TABLE = "quarantine"


class Quarantine:
    """The refused texts of one space."""

    def __init__(self, state_uri: str, space_id: str) -> None:
        self._uri = state_uri
        self._space_id = space_id
        self._rows = {row["text_hash"]: row for row in self._read()}

    @property
    def reasons(self) -> dict[bytes, str]:
        """Why each text is here, by its hash."""
        return {text_hash: row["reason"] for text_hash, row in self._rows.items()}

    @property
    def hashes(self) -> pa.Array:
        """text_hash of each text that is here."""
        return pa.array(self._rows, HASH)

    def add(self, refused: Iterable[Refused], run_id: str, now: str) -> None:
        """Take in texts that were refused; those that are here already were seen again.

        Args:
            refused: Those that are not `lasting` are left out.
            run_id: The run that was told.
            now: ISO 8601, UTC.
        """
        self._write(
            [
                self._row(text.text_hash, run_id, now) | {"reason": text.reason}
                for text in refused
                if text.lasting
            ]
        )

    def saw(self, hashes: Collection[bytes], run_id: str, now: str) -> None:
        """Note that these texts, already here, still stand in a corpus."""
        self._write([self._row(each, run_id, now) for each in hashes if each in self._rows])

    def release(self, hashes: Collection[bytes]) -> None:
        """Let texts go that the provider has taken after all."""
        gone = [row["id"] for each in hashes if (row := self._rows.pop(each, None))]
        table = open_table(self._uri, TABLE)
        if gone and table is not None:
            with writing(f"the quarantine in {self._uri}"):
                table.delete(f"id IN ({', '.join(map(quoted, gone))})")

    def _row(self, text_hash: bytes, run_id: str, now: str) -> dict[str, Any]:
        new = {
            "id": f"{self._space_id}/{text_hash.hex()}",
            "space": self._space_id,
            "text_hash": text_hash,
            "first_seen": now,
        }
        return {**new, **self._rows.get(text_hash, {}), "last_seen": now, "run_id": run_id}

    def _write(self, rows: list[dict[str, Any]]) -> None:
        if not rows:
            return
        with writing(f"the quarantine in {self._uri}"), durable(self._uri, TABLE):
            table = make_table(self._uri, TABLE, QUARANTINE)
            merge = table.merge_insert("id").when_matched_update_all().when_not_matched_insert_all()
            merge.execute(pa.Table.from_pylist(rows, schema=QUARANTINE))
        self._rows |= {row["text_hash"]: row for row in rows}

    def _read(self) -> list[dict[str, Any]]:
        table = open_table(self._uri, TABLE)
        if table is None:
            return []
        mine = table.search().where(f"space = {quoted(self._space_id)}")
        rows: list[dict[str, Any]] = mine.to_arrow().to_pylist()
        return rows


def quarantined(state_uri: str) -> "pd.DataFrame":
    """All refused texts of all spaces as a frame, fields as in QUARANTINE."""
    table: Table | None = open_table(state_uri, TABLE)
    arrow = QUARANTINE.empty_table() if table is None else table.to_arrow()
    frame: pd.DataFrame = arrow.to_pandas()
    return frame
