"""The two identities: what a text is (paid for once), and where a chunk stands.

All are blake2b-128 digests: 16 bytes, so that keys of a whole corpus fit in memory.
"""

import json
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from hashlib import blake2b

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc

from tasks.prepare import PLAIN, Preparation
from tasks.schemas import HASH, metadata_fields, rows_schema

NO_DOCUMENT = bytes(16)
"""Document key of a row that belongs to no document."""
AT_ONCE = 2**17
"""Keys that are made, or looked for, at a time."""


def digest(data: bytes) -> bytes:
    """blake2b-128 of `data`."""
    return blake2b(data, digest_size=16).digest()


def text_hash(text: str) -> bytes:
    """Identity of a text: the digest of exactly what is sent."""
    return digest(text.encode())


def has_bytes(text: str) -> bool:
    """Whether `text` can be hashed and sent at all: half of a character has no bytes in UTF-8."""
    if text.isascii():
        return True
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True


def document_key(document: str | None) -> bytes:
    """Fixed-width name of a document."""
    return NO_DOCUMENT if document is None else digest(document.encode())


def chunk_id(document: str, text_digest: bytes, occurrence: int) -> str:
    """Id of a chunk of a file: hex digest of path, text_hash and how often it stood there before.

    An insertion at the top of a file moves no other id.
    """
    return digest(b"\0".join([document.encode(), text_digest, str(occurrence).encode()])).hex()


def hash_column(digests: Sequence[bytes]) -> pa.Array:
    """`digests` as an Arrow array of 16 bytes each."""
    return pa.array(digests, HASH)


def digest_column(texts: pa.Array | pa.ChunkedArray) -> pa.Array:
    """The digest of each of `texts`, none of them null."""
    # As bytes they are hashed as they lie; as text each would be decoded and encoded first.
    lots = (texts.slice(start, AT_ONCE) for start in range(0, len(texts), AT_ONCE))
    digests = [_digests(lot.cast(pa.binary()).to_pylist()) for lot in lots]
    return pa.chunked_array(digests, HASH).combine_chunks()


def _digests(data: Sequence[bytes]) -> pa.Array:
    """`digest` of each: a call of it for each would take a quarter more."""
    joined = b"".join([blake2b(each, digest_size=16).digest() for each in data])
    return pa.FixedSizeBinaryArray.from_buffers(HASH, len(data), [None, pa.py_buffer(joined)])


def identified(
    batches: Iterable[pa.RecordBatch],
    metadata: list[pa.Field],
    preparation: Preparation = PLAIN,
) -> Iterator[pa.RecordBatch]:
    """Chunks with the text_hash of what is sent for them, and for files with their id.

    Args:
        batches: CHUNKS and metadata; the chunks of a document are contiguous.
        metadata: The source's own columns.
        preparation: What stands in front of their texts.

    Yields:
        Batches of `rows_schema(metadata)`, row for row those of `batches`.
    """
    schema = rows_schema(metadata)
    ids_of_files = _IdsOfFiles()
    for batch in batches:
        hashes = digest_column(preparation.texts(batch))
        ids = batch.column("id")
        own = {
            "id": ids_of_files.filled_in(batch, hashes) if ids.null_count else ids,
            "text_hash": hashes,
            **{name: batch.column(name) for name in ("document", "text", "start_line", "end_line")},
        }
        columns = [
            own[name] if name in own else batch.column(name).cast(schema.field(name).type)
            for name in schema.names
        ]
        yield pa.record_batch(columns, schema=schema)


class _IdsOfFiles:
    """Gives ids to the chunks of files; knows what stood in the current document before."""

    def __init__(self) -> None:
        self._document: str | None = None
        self._occurrences: Counter[bytes] = Counter()

    def filled_in(self, batch: pa.RecordBatch, hashes: pa.Array) -> pa.Array:
        """The ids of `batch`, made up where there is none."""
        ids = batch.column("id").to_pylist()
        documents = batch.column("document").to_pylist()
        for row, (document, text_digest) in enumerate(
            zip(documents, hashes.to_pylist(), strict=True)
        ):
            if ids[row] is not None:
                continue
            if document != self._document:
                self._occurrences.clear()
                self._document = document
            ids[row] = chunk_id(document, text_digest, self._occurrences[text_digest])
            self._occurrences[text_digest] += 1
        return pa.array(ids, pa.utf8())


def document_keys(documents: pa.Array) -> pa.Array:
    """The document key of each row, each name hashed once."""
    names = documents.dictionary_encode()
    by_name = hash_column([document_key(name) for name in names.dictionary.to_pylist()])
    return pc.fill_null(by_name.take(names.indices), pa.scalar(NO_DOCUMENT, HASH))


def key_columns(rows: pa.RecordBatch) -> dict[str, pa.Array]:
    """The columns `key`, `document_key` and `row_hash` for rows with id, document, metadata."""
    documents = document_keys(rows.column("document"))
    # By name: columns in another order are the same row.
    names_of_metadata = sorted(field.name for field in metadata_fields(rows.schema))
    metadata = [rows.column(name) for name in names_of_metadata]
    return {
        "key": digest_column(rows.column("id")),
        "document_key": documents,
        "row_hash": _row_hashes([documents, *metadata]) if metadata else documents,
    }


class KeySet:
    """Finds 16-byte keys among many, without a Python object for each.

    Held as pairs of uint64 sorted by the first, which is 20 bytes a key with its position.
    """

    def __init__(self, keys: pa.Array | pa.ChunkedArray) -> None:
        high, low = halves(keys)
        order = np.argsort(high)  # four times as fast as a stable sort
        if _repeats(high[order]).any():
            order = np.argsort(high, kind="stable")
        self._high, self._low = high[order], low[order]
        self._position = order.astype(np.uint32 if len(order) < 2**32 else np.int64)

    def __len__(self) -> int:
        return len(self._high)

    def positions(self, keys: pa.Array | pa.ChunkedArray) -> npt.NDArray[np.int64]:
        """For each key its position in the set as given, -1 where it is not in it."""
        return np.concatenate([np.empty(0, np.int64), *self._positions(keys)])

    def holds(self, keys: pa.Array | pa.ChunkedArray) -> npt.NDArray[np.bool_]:
        """For each key whether it is in the set."""
        return np.concatenate([np.empty(0, bool), *(at >= 0 for at in self._positions(keys))])

    def _positions(self, keys: pa.Array | pa.ChunkedArray) -> Iterator[npt.NDArray[np.int64]]:
        for high, low in halves_in_lots(keys):
            at = positions_among(self._high, self._low, high, low)
            found = at >= 0
            at[found] = self._position[at[found]]
            yield at


def positions_among(
    high: npt.NDArray[np.uint64],
    low: npt.NDArray[np.uint64],
    high_asked: npt.NDArray[np.uint64],
    low_asked: npt.NDArray[np.uint64],
) -> npt.NDArray[np.int64]:
    """For each key that is asked for its position among others, -1 where it is not there.

    Args:
        high: First halves of the others, ascending.
        low: Their second halves.
        high_asked: First halves of the keys that are asked for.
        low_asked: Their second halves.
    """
    found = np.full(len(high_asked), -1, dtype=np.int64)
    at = np.searchsorted(high, high_asked)
    looking = np.arange(len(high_asked))
    while len(looking):  # more than once only where two keys share their first half
        looking = looking[at[looking] < len(high)]
        looking = looking[high[at[looking]] == high_asked[looking]]
        hit = low[at[looking]] == low_asked[looking]
        found[looking[hit]] = at[looking[hit]]
        looking = looking[~hit]
        at[looking] += 1
    return found


def first_of_each(keys: pa.Array | pa.ChunkedArray) -> npt.NDArray[np.int64]:
    """Positions at which a key stands for the first time, ascending."""
    high, low = halves(keys)
    order = np.argsort(high)
    alike = _repeats(high[order])
    some = np.sort(order[alike | np.append(alike[1:], False)])  # most share no half with another
    some = some[np.lexsort((low[some], high[some]))]  # stable: equal keys stay in their order
    first = np.ones(len(high), dtype=bool)
    first[some[_repeats(high[some]) & _repeats(low[some])]] = False
    return np.flatnonzero(first)


def _repeats(values: npt.NDArray[np.uint64]) -> npt.NDArray[np.bool_]:
    """For each value whether it is the one before it."""
    return np.append(False, values[1:] == values[:-1])[: len(values)]


def paired(
    left: pa.Array | pa.ChunkedArray, right: pa.Array | pa.ChunkedArray
) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.int64]]:
    """Positions of equal keys on both sides, the n-th of each key left with the n-th right."""
    (left_high, left_low), (right_high, right_low) = halves(left), halves(right)
    high, low = np.append(left_high, right_high), np.append(left_low, right_low)
    order = np.lexsort((low, high))  # stable: of equal keys the left ones come first, in order
    starts = np.ones(len(order), dtype=bool)
    starts[1:] = (np.diff(high[order]) != 0) | (np.diff(low[order]) != 0)
    group = np.cumsum(starts)
    is_left = order < len(left_high)
    sides = []
    for own in (is_left, ~is_left):
        groups = group[own]
        first = np.searchsorted(groups, groups)
        sides.append((order[own], groups * (len(order) + 1) + np.arange(len(groups)) - first))
    (at_left, named_left), (at_right, named_right) = sides
    _, pick_left, pick_right = np.intersect1d(
        named_left, named_right, assume_unique=True, return_indices=True
    )
    return at_left[pick_left], at_right[pick_right] - len(left_high)


def halves(
    keys: pa.Array | pa.ChunkedArray,
) -> tuple[npt.NDArray[np.uint64], npt.NDArray[np.uint64]]:
    """Each 16-byte key as two numbers of 8 bytes."""
    high, low = np.empty(len(keys), np.uint64), np.empty(len(keys), np.uint64)
    at = 0
    for chunk in keys.chunks if isinstance(keys, pa.ChunkedArray) else [keys]:
        if len(chunk):
            numbers = np.frombuffer(chunk.buffers()[1], dtype=np.uint64).reshape(-1, 2)
            numbers = numbers[chunk.offset : chunk.offset + len(chunk)]
            high[at : at + len(chunk)], low[at : at + len(chunk)] = numbers.T
            at += len(chunk)
    return high, low


def halves_in_lots(
    keys: pa.Array | pa.ChunkedArray,
) -> Iterator[tuple[npt.NDArray[np.uint64], npt.NDArray[np.uint64]]]:
    """`halves` of so many keys at a time: to look for one takes 60 bytes."""
    for start in range(0, len(keys), AT_ONCE):
        yield halves(keys.slice(start, AT_ONCE))


def _row_hashes(columns: Sequence[pa.Array]) -> pa.Array:
    """For each row the digest of all `columns`; when it differs, the row moved."""
    joined = pc.binary_join_element_wise(*[_tagged(column) for column in columns], b"")
    return _digests(joined.to_pylist())


def _tagged(column: pa.Array) -> pa.Array:
    """Each value as bytes that say their own length, so that no two rows read alike."""
    values = _as_bytes(column)
    lengths = pc.cast(pc.cast(pc.binary_length(values), pa.utf8()), pa.binary())
    tagged = pc.binary_join_element_wise(lengths, values, b":")
    return pc.fill_null(tagged, pa.scalar(b"-", pa.binary()))


def _as_bytes(column: pa.Array) -> pa.Array:
    kind = column.type
    if pa.types.is_temporal(kind):  # Python's moments are coarser than Arrow's, and end in 9999
        column = column.view(pa.int32() if kind.bit_width == 32 else pa.int64())  # noqa: PLR2004
        kind = column.type
    if pa.types.is_string(kind) or pa.types.is_fixed_size_binary(kind):
        return pc.cast(column, pa.binary())
    if pa.types.is_integer(kind) or pa.types.is_floating(kind) or pa.types.is_boolean(kind):
        return pc.cast(pc.cast(column, pa.utf8()), pa.binary())
    return pa.array(
        [
            None if value is None else json.dumps(value, sort_keys=True, default=repr).encode()
            for value in column.to_pylist()
        ],
        pa.binary(),
    )
