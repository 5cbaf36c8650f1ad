"""Search: the nearest chunks of an index, without Prefect and within two seconds."""

import time
from collections.abc import Sequence
from datetime import UTC, datetime
from typing import Any
from uuid import uuid4

import numpy as np
from lancedb.query import LanceVectorQueryBuilder
from pydantic import BaseModel

from tasks.catalog import facts_for
from tasks.errors import ProviderError, SettingsError
from tasks.index import open_index, require_space
from tasks.journal import Call
from tasks.ledger import Ledger
from tasks.params import Config
from tasks.providers import Answer, Provider, Vectors, checked_vectors
from tasks.providers.opening import open_embedder
from tasks.report import place

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
        return place(self.model_dump())


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
    vector = _embedded(config, provider.for_queries(), text)
    query: LanceVectorQueryBuilder = table.search(vector, vector_column_name="vector")  # type: ignore[assignment]
    query = query.distance_type(config.metric)  # type: ignore[arg-type] # it takes hamming too
    columns = ["id", "document", "start_line", "end_line", "text", "_distance"]
    rows: list[dict[str, Any]] = query.limit(k).select(columns).to_list()
    return [Hit(distance=row.pop("_distance"), **row) for row in rows]


def _embedded(config: Config, provider: Provider, text: str) -> Vectors:
    """The vector of a query: one call, entered in the ledger where calls have a price."""
    facts = facts_for(config.embedding)
    started_at, started = datetime.now(tz=UTC).isoformat(), time.perf_counter()
    answer: Answer | None = None
    status, billed = "ok", 0
    try:
        answer = provider.embed([text])
        vectors = checked_vectors(answer, 1, provider)
    except ProviderError as error:
        status, billed = type(error).__name__, error.facts.get("billed_tokens", 0)
        raise
    finally:
        billed = answer.billed_tokens if answer else billed
        if facts.usd_per_million_tokens:
            call = Call(
                run_id=f"search-{uuid4()}",
                batch=0,
                attempt=1,
                call=1,
                cause="query",
                status=status,
                started_at=started_at,
                waited=0.0,
                seconds=time.perf_counter() - started,
                texts=1,
                tokens_estimated=provider.estimate.count(text),
                tokens_billed=billed,
                usd=facts.usd(billed),
                request_id=answer.request_id if answer else "",
            )
            Ledger(config.state.uri).record_calls([call])
    return np.asarray(vectors[0])


def as_lines(hits: Sequence[Hit]) -> str:
    """Hits for people: place, distance and the first lines of the text."""
    return "\n\n".join(
        f"{number}. {hit.place}  (distance {hit.distance:.3f})\n{_snippet(hit.text)}"
        for number, hit in enumerate(hits, 1)
    )


def _snippet(text: str) -> str:
    lines = [line.rstrip() for line in text.splitlines() if line.strip()][:SNIPPET_LINES]
    return "\n".join(f"   {line[:SNIPPET_WIDTH]}" for line in lines)
