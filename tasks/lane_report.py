"""Lane report: what a run had to do with the Batch lane, counted."""

from collections.abc import Iterable, Sequence

import numpy as np
import pyarrow as pa

from tasks.harvest import Settled
from tasks.job_notes import Submission
from tasks.keys import KeySet
from tasks.report import BatchLane
from tasks.schemas import HASH, KEYED
from tasks.survey import Survey

REASONS = 20
"""Why texts came without a vector, so many reasons are told."""


def batch_lane_of(
    survey: Survey, settled: Settled, submitted: Sequence[Submission] = ()
) -> BatchLane:
    """What `settled` has seen and a run has submitted."""
    tokens, index = sum(each.tokens for each in submitted), survey.config.index.place
    theirs = [each.texts.column("text_hash") for each in settled.waiting if each.index == index]
    paid = pa.chunked_array([settled.hashes(index), *_chunks(theirs)], HASH).unique()
    corpus = survey.keyed.table.load(KEYED).column("text_hash")
    return BatchLane(
        submitted_texts=sum(each.texts.num_rows for each in submitted),
        submitted_tokens=tokens,
        submitted_usd=survey.lane.usd(tokens),
        waiting_texts=survey.looked_up.waiting + sum(each.texts.num_rows for each in submitted),
        waiting_jobs=len(settled.waiting) + len(submitted),
        came_texts=settled.texts,
        came_tokens=settled.tokens,
        came_usd=settled.usd,
        superseded_texts=int(np.sum(~KeySet(corpus).holds(paid))) if len(paid) else 0,
        failed=dict(settled.failed.most_common(REASONS)),
        why=survey.lane.why,
    )


def _chunks(columns: Iterable[pa.ChunkedArray]) -> list[pa.Array]:
    return [chunk for column in columns for chunk in column.chunks]
