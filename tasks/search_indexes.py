"""Indexes that make a search fast, or hybrid: over the vectors, and over the words of the texts.

Without them a search is exact and knows no words. An overwrite of the table drops them, rows that
are younger than they are are scanned beside them; both ends with the next `maintain`.
"""

from typing import Literal

from lancedb.index import FTS, IvfFlat, IvfSq
from lancedb.table import Table

Metric = Literal["cosine", "l2", "dot", "hamming"]

TEXT_ROWS = 1_000
"""Rows from which on there is an index of words."""
VECTOR_BYTES = 64 * 2**20
"""Bytes of vectors from which on they are indexed; below, reading them all is fast enough."""
REFINE = 4
"""Candidates of the vector index that are held against their exact vectors, by hits asked for."""

TEXT_INDEX = "text_idx"
VECTOR_INDEX = "vector_idx"


def text_index(table: Table) -> str | None:
    """Name of the index of words, None where there is none."""
    return _index_on(table, "text")


def vector_index(table: Table) -> str | None:
    """Name of the index of vectors, None where there is none."""
    return _index_on(table, "vector")


def build_search_indexes(table: Table, metric: Metric) -> list[str]:
    """Build the indexes that the table is large enough for, and anew those that lack rows.

    Returns:
        What was done, a phrase each.
    """
    done = []
    rows = table.count_rows()
    if rows >= TEXT_ROWS and (_lacks_rows(table, text_index(table))):
        _build_text_index(table)
        done.append(f"full-text index built ({rows:,} rows)")
    field = table.schema.field("vector")
    size = rows * field.type.list_size * field.type.value_type.bit_width // 8
    vectors = vector_index(table)
    if size >= VECTOR_BYTES and (
        _lacks_rows(table, vectors) or _distance(table, vectors) != metric
    ):
        # Of 50,000 lexical vectors of 256 numbers IVF-SQ found 0.955 of the ten nearest, 1.000
        # with REFINE, in 1.1 s and a quarter of their bytes. HNSW-SQ took 89 s for 0.957, IVF-PQ
        # 55 s for 0.896. Bits have no scale to quantize: their lists hold them as they are.
        config = IvfFlat("hamming") if metric == "hamming" else IvfSq(metric)
        table.create_index("vector", config=config, name=VECTOR_INDEX, replace=True)
        done.append(f"vector index built ({rows:,} rows)")
    return done


def refresh_text_index(table: Table) -> None:
    """Take rows into the index of words that it lacks, if there is one."""
    name = text_index(table)
    if name is not None and _lacks_rows(table, name):
        _build_text_index(table)


def _build_text_index(table: Table) -> None:
    # With positions, `optimize` fails (lance-format/lance#7653).
    table.create_index("text", config=FTS(with_position=False), name=TEXT_INDEX, replace=True)


def _index_on(table: Table, column: str) -> str | None:
    return next((each.name for each in table.list_indices() if each.columns == [column]), None)


def _lacks_rows(table: Table, name: str | None) -> bool:
    """Whether there is no such index, or one that does not know all rows."""
    stats = None if name is None else table.index_stats(name)
    return stats is None or stats.num_unindexed_rows > 0


def _distance(table: Table, name: str | None) -> str | None:
    stats = None if name is None else table.index_stats(name)
    return None if stats is None else stats.distance_type
