"""What passes between stages has exactly the schema that was agreed on."""

from pathlib import Path

import pyarrow as pa
import pytest

from tasks.schemas import BATCH, HASH, MISSES, Batch, TableRef

TEXTS = pa.table({"text_hash": pa.array([bytes(16)], HASH), "text": ["alpha"], "tokens": [1]})


def test_a_table_of_another_schema_does_not_pass_a_border(tmp_path: Path) -> None:
    with pytest.raises(TypeError, match=r"batch\.arrow: expected text_hash"):
        TableRef.write(tmp_path / "batch.arrow", BATCH, [TEXTS])  # its tokens are of 64 bits
    ref = TableRef.write(tmp_path / "whole.arrow", BATCH, [TEXTS.cast(BATCH)])
    assert ref.load(BATCH).num_rows == 1
    for read in (ref.load, lambda schema: list(ref.batches(schema))):
        with pytest.raises(TypeError, match="expected"):
            read(MISSES)


def test_a_batch_counts_the_tokens_of_its_rows(tmp_path: Path) -> None:
    rows = TEXTS.cast(BATCH).to_batches()
    batch = Batch.write(7, tmp_path, [*rows, *rows])
    assert (batch.number, batch.tokens, batch.table.rows) == (7, 2, 2)
    assert batch.table.load(BATCH).column("text").to_pylist() == ["alpha", "alpha"]
