"""Recall: how much of what an exact search finds the vector index finds too."""

from typing import cast

import numpy as np
import numpy.typing as npt
from lancedb.query import LanceVectorQueryBuilder
from lancedb.table import Table

from tasks.examine import Rows
from tasks.params import Config
from tasks.soundness import numbers

K = 10
QUERIES = 100
SEED = 10
TIES = 50
"""Rows beyond the tenth that may be just as near, say where texts repeat."""
EQUAL = 1e-5


def recall(rows: Rows, config: Config) -> float | None:
    """recall@10 of the vector index on sampled rows; None where there is no such index.

    Among rows that are equally near any is as good as another.
    """
    table = rows.table
    if not any("vector" in index.columns for index in table.list_indices()):
        return None
    sound = np.flatnonzero(rows.good)
    if not len(sound):
        return None
    random = np.random.default_rng(SEED)
    at = random.choice(sound, min(QUERIES, len(sound)), replace=False)
    found = [
        _found(table, vector, config.metric)
        for vector in numbers(rows.take(at, ["vector"]).column("vector"))
    ]
    return float(np.mean(found))


def _found(table: Table, vector: npt.NDArray[np.generic], metric: str) -> float:
    """The share of the nearest rows that the vector index finds."""
    exact = _search(table, vector, metric).bypass_vector_index().limit(K + TIES).to_arrow()
    distances = exact.column("_distance").to_numpy()
    nearest = distances[:K]
    if not len(nearest):
        return 1.0
    allowed = exact.column("_rowid").to_numpy()[distances <= nearest[-1] + EQUAL]
    got = _search(table, vector, metric).limit(K).to_arrow().column("_rowid").to_numpy()
    return min(1.0, float(np.isin(got, allowed).sum()) / len(nearest))


def _search(table: Table, vector: npt.NDArray[np.generic], metric: str) -> LanceVectorQueryBuilder:
    query = table.search(vector, vector_column_name="vector").with_row_id(True)
    typed = cast("LanceVectorQueryBuilder", query)
    return typed.distance_type(metric).select(["_distance"])  # type: ignore[arg-type]
