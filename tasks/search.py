"""Search: the nearest chunks of an index, without Prefect and within two seconds."""

import time
from collections.abc import Sequence
from datetime import UTC, datetime
from typing import Any
from uuid import uuid4

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from lancedb.query import LanceFtsQueryBuilder, LanceVectorQueryBuilder
from lancedb.rerankers import RRFReranker
from lancedb.table import Table
from pydantic import BaseModel

from tasks.catalog import facts_for
from tasks.errors import ProviderError, SettingsError
from tasks.index import published_index, reading_index, require_space
from tasks.lance import quoted
from tasks.ledger import Ledger
from tasks.notes import Call
from tasks.params import Config
from tasks.providers import Answer, Provider, Vectors, checked_vectors
from tasks.providers.opening import open_embedder
from tasks.report import place
from tasks.search_indexes import REFINE, text_index, vector_index

SHOWN = ["id", "document", "start_line", "end_line", "text"]
FUSED = 10
"""Least rows of each kind that are fused. On 1,000 docstrings and their functions, lexical vectors
of 1024 numbers found 0.735 in the first ten, fused with ten by words 0.840, with fifty 0.807."""
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
    """The `k` chunks of the index that answer `text` best, best first.

    Nearest by vector; where the index has one of words, fused with those that share its words.

    Raises:
        SettingsError: There is no index yet, it is of another space, or the text is blank.
        EmbedOnceError: The provider does not answer, or the index cannot be read.
    """
    if not text.strip():
        raise SettingsError("There is nothing to search for: the text is blank.")
    provider = open_embedder(config)
    table = published_index(config.index)
    require_space(table, config.index, provider.space)
    vector = _embedded(config, provider.for_queries(), text)
    with reading_index(table):
        table.checkout_latest()  # type: ignore[no-untyped-call] # the call may have taken long
        if text_index(table) is None:
            found = _near(table, config, vector, k).to_arrow()
        else:
            found = _fused(table, config, vector, text, k)
    rows: list[dict[str, Any]] = found.to_pylist()
    return [Hit(distance=row["_distance"], **{name: row[name] for name in SHOWN}) for row in rows]


def _near(table: Table, config: Config, vector: Vectors, k: int) -> LanceVectorQueryBuilder:
    """A query for the `k` rows nearest to `vector`."""
    query: LanceVectorQueryBuilder = table.search(vector, vector_column_name="vector")  # type: ignore[assignment]
    query = query.distance_type(config.metric)  # type: ignore[arg-type] # it takes hamming too
    if vector_index(table) is not None:
        query = query.refine_factor(REFINE)
    return query.limit(k).select([*SHOWN, "_distance"])


def _fused(table: Table, config: Config, vector: Vectors, text: str, k: int) -> pa.Table:
    """The best `k` rows by vector and by words, fused by reciprocal rank."""
    depth = max(k, FUSED)
    near = _near(table, config, vector, depth).with_row_id(True).to_arrow()
    words: LanceFtsQueryBuilder = table.search(text, query_type="fts", fts_columns="text")  # type: ignore[assignment]
    worded = words.limit(depth).select([*SHOWN, "_score"]).with_row_id(True).to_arrow()
    best = RRFReranker(return_score="all").rerank_hybrid(text, near, worded).slice(0, k)
    lacking = best.filter(pc.is_null(best.column("_distance"))).column("id").to_pylist()
    if not lacking:
        return best
    ids = ", ".join(map(quoted, lacking))
    exact = _near(table, config, vector, len(lacking)).where(f"id IN ({ids})", prefilter=True)
    known = {row["id"]: row["_distance"] for row in exact.bypass_vector_index().to_list()}
    return best.set_column(
        best.schema.get_field_index("_distance"),
        "_distance",
        pa.array(
            [
                known[row["id"]] if row["_distance"] is None else row["_distance"]
                for row in best.select(["id", "_distance"]).to_pylist()
            ],
            pa.float32(),
        ),
    )


def _embedded(config: Config, provider: Provider, text: str) -> Vectors:
    """The vector of a query: one call, entered in the ledger where calls have a price."""
    facts = facts_for(config.embedding)
    started_at, started = datetime.now(tz=UTC).isoformat(), time.perf_counter()
    answer: Answer | None = None
    status, billed = "unforeseen", 0
    try:
        answer = provider.embed([text])
        vectors = checked_vectors(answer, 1, provider)
        status = "ok"
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
                model=provider.space.model_name,
                index=config.index.place,
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
