"""What `peers.py` holds embed-once against: LangChain's `index()`, in an environment of its own.

`python langchain_index.py CORPUS INDEX ADDRESS BATCH_SIZE`: the record manager on SQLite, the
LanceDB store, and full cleanup. Only the count of tokens is not LangChain's: it would fetch a
tokenizer from a hub, so its batches are cut by bytes instead, which costs it less time.
"""

import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import lancedb
from langchain_classic.indexes import SQLRecordManager
from langchain_community.vectorstores import LanceDB
from langchain_core.documents import Document
from langchain_core.indexing import index
from langchain_voyageai import VoyageAIEmbeddings
from pyarrow import parquet

BYTES_A_TOKEN = 3
TABLE = "chunks"


def documents(path: str) -> Iterator[Document]:
    """The chunks of the corpus."""
    with parquet.ParquetFile(path) as file:
        for batch in file.iter_batches():
            for row in batch.to_pylist():
                text = row.pop("text")
                yield Document(text, metadata=row)


def counted(texts: list[str], model: str) -> list[Any]:
    """Something as long as the tokens of each text."""
    return [range(len(text.encode()) // BYTES_A_TOKEN) for text in texts]


def main() -> None:
    """Bring the store in step with the corpus."""
    path, folder, address, batch_size = sys.argv[1:]
    Path(folder).mkdir(exist_ok=True)
    embeddings = VoyageAIEmbeddings(model="voyage-4", output_dimension=1024, base_url=address)
    embeddings._client.tokenize = counted  # noqa: SLF001
    # Its default mode, "overwrite", would lose all rows but the last batch's.
    store = LanceDB(lancedb.connect(folder), embeddings, table_name=TABLE, mode="append")
    records = SQLRecordManager("chunks", db_url=f"sqlite:///{folder}/records.db")
    records.create_schema()
    index(
        documents(path),
        records,
        store,
        batch_size=int(batch_size),
        cleanup="full",
        cleanup_batch_size=10_000,
        key_encoder="blake2b",
    )


if __name__ == "__main__":
    main()
