"""Search: the nearest chunks of an index, without Prefect and within two seconds."""

from collections.abc import Sequence
from typing import Any

from lancedb.query import LanceVectorQueryBuilder
from pydantic import BaseModel

from tasks.errors import SettingsError
from tasks.index import open_index, require_space
from tasks.params import Config
from tasks.providers import checked_vectors
from tasks.providers.opening import open_embedder

SNIPPET_LINES = 4
SNIPPET_WIDTH = 100


class Hit(BaseModel):
    """A chunk that was found.

    Attributes:
        distance: By the index's metric; smaller is nearer.
    """

    id: str
    document: str | None
    start_line: int | None
    end_line: int | None
    distance: float
    text: str

    @property
    def place(self) -> str:
        """Where the chunk stands, say `guide.md:3-9`."""
        where = self.document or self.id
        return where if self.start_line is None else f"{where}:{self.start_line}-{self.end_line}"


def search(config: Config, text: str, k: int = 5) -> list[Hit]:
    """The `k` chunks of the index nearest to `text`, nearest first.

    Raises:
        SettingsError: There is no index yet, it is of another space, or the text is blank.
    """
    if not text.strip():
        raise SettingsError("There is nothing to search for: the text is blank.")
    provider = open_embedder(config)
    table = open_index(config.index)
    if table is None:
        raise SettingsError(
            f"There is no index {config.index.table!r} in {config.index.uri} yet. "
            "Run `embed-once reindex` with this config first."
        )
    require_space(table, config.index, provider.space)
    vector = checked_vectors(provider.embed([text]), 1, provider)[0]
    query: LanceVectorQueryBuilder = table.search(vector, vector_column_name="vector")  # type: ignore[assignment]
    query = query.distance_type(config.index.metric)
    columns = ["id", "document", "start_line", "end_line", "text", "_distance"]
    rows: list[dict[str, Any]] = query.limit(k).select(columns).to_list()
    return [Hit(distance=row.pop("_distance"), **row) for row in rows]


def as_lines(hits: Sequence[Hit]) -> str:
    """Hits for people: place, distance and the first lines of the text."""
    return "\n\n".join(
        f"{number}. {hit.place}  (distance {hit.distance:.3f})\n{_snippet(hit.text)}"
        for number, hit in enumerate(hits, 1)
    )


def _snippet(text: str) -> str:
    lines = [line.rstrip() for line in text.splitlines() if line.strip()][:SNIPPET_LINES]
    return "\n".join(f"   {line[:SNIPPET_WIDTH]}" for line in lines)
