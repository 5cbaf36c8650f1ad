"""What `peers.py` holds embed-once against: the fastest script we could write by hand.

`python by_hand.py CORPUS INDEX ADDRESS`: the bare SDK with calls in flight, pyarrow, and one
commit to a LanceDB table. It hashes all texts, compares them with the table by id, embeds each
text that is new once, and writes rows while the next calls are in flight. It keeps no cache and
no journal: killed, it pays for everything again.
"""

import base64
import os
import sys
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from hashlib import blake2b
from pathlib import Path

import lancedb
import numpy as np
import numpy.typing as npt
import pyarrow as pa
from pyarrow import parquet

MODEL, DIMENSION = "voyage-4", 1024
CALLS = 8
TEXTS_A_CALL = 1000
BYTES_A_CALL = 800_000
"""Below 320,000 tokens, whatever the texts are."""
ROWS = 4096
TABLE = "chunks"
SCHEMA = pa.schema(
    [
        *((name, pa.utf8()) for name in ("id", "document", "section", "text")),
        ("text_hash", pa.binary(16)),
        ("vector", pa.list_(pa.float32(), DIMENSION)),
    ]
)

Vectors = npt.NDArray[np.float32]


def embed(texts: list[str], address: str) -> Vectors:
    """One call."""
    from voyageai.api_resources.embedding import Embedding  # noqa: PLC0415 - takes a second

    answer = Embedding.create(  # type: ignore[no-untyped-call]
        api_key=os.environ["VOYAGE_API_KEY"],
        base_url=address,
        input=texts,
        model=MODEL,
        input_type="document",
        truncation=False,
        encoding_format="base64",
    )
    items = sorted(answer.data, key=lambda item: item.index)
    data = b"".join(base64.b64decode(item.embedding) for item in items)
    return np.frombuffer(data, "<f4").reshape(len(texts), DIMENSION)


def calls(texts: Sequence[str]) -> Iterator[list[str]]:
    """`texts` in calls as large as one may be."""
    call, size = list[str](), 0
    for text in texts:
        length = len(text.encode())
        if call and (len(call) == TEXTS_A_CALL or size + length > BYTES_A_CALL):
            yield call
            call, size = [], 0
        call.append(text)
        size += length
    if call:
        yield call


def rows(
    corpus: pa.Table, hashes: list[bytes], changed: list[int], address: str
) -> Iterator[pa.RecordBatch]:
    """The rows to write, with their vectors as the answers come in."""
    numbers: dict[bytes, int] = {}
    whose = np.array([numbers.setdefault(hashes[row], len(numbers)) for row in changed])
    firsts = np.array(changed)[np.unique(whose, return_index=True)[1]]
    texts = corpus.column("text").take(pa.array(firsts)).to_pylist()
    vectors, filled = np.empty((len(texts), DIMENSION), np.float32), 0
    with ThreadPoolExecutor(CALLS) as pool:
        answers = pool.map(lambda call: embed(call, address), calls(texts))
        for start in range(0, len(changed), ROWS):
            some = whose[start : start + ROWS]
            while filled <= some.max():
                answer = next(answers)
                vectors[filled : filled + len(answer)] = answer
                filled += len(answer)
            part = changed[start : start + ROWS]
            taken = corpus.take(pa.array(part)).combine_chunks()
            columns = [taken.column(name).combine_chunks() for name in SCHEMA.names[:4]]
            columns.append(pa.array([hashes[row] for row in part], pa.binary(16)))
            flat = pa.array(vectors[some].reshape(-1))
            columns.append(pa.FixedSizeListArray.from_arrays(flat, DIMENSION))
            yield pa.record_batch(columns, schema=SCHEMA)


def main() -> None:
    """Bring the table in step with the corpus."""
    path, index, address = sys.argv[1:]
    corpus = parquet.read_table(path)
    ids = corpus.column("id").to_pylist()
    texts = corpus.column("text").to_pylist()
    hashes = [blake2b(text.encode(), digest_size=16).digest() for text in texts]
    del texts
    database, known = lancedb.connect(index), dict[str, bytes]()
    table = database.open_table(TABLE) if (Path(index) / f"{TABLE}.lance").exists() else None
    if table is not None:
        there = table.search().select(["id", "text_hash"]).to_arrow()
        columns = (there.column(name).to_pylist() for name in ("id", "text_hash"))
        known = dict(zip(*columns, strict=True))
    changed = [row for row, id_ in enumerate(ids) if known.get(id_) != hashes[row]]
    gone = known.keys() - set(ids)
    new = pa.RecordBatchReader.from_batches(SCHEMA, rows(corpus, hashes, changed, address))
    if table is None:
        database.create_table(TABLE, new, schema=SCHEMA)
    elif changed or gone:
        merge = table.merge_insert("id").when_matched_update_all().when_not_matched_insert_all()
        if gone:
            listed = ", ".join(f"'{id_}'" for id_ in gone)
            merge = merge.when_not_matched_by_source_delete(f"id IN ({listed})")
        merge.execute(new)


if __name__ == "__main__":
    main()
