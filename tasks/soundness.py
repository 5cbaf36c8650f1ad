"""Soundness: whether numbers can be a vector of a space, and how far two vectors are apart."""

from enum import IntEnum

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from tasks.providers import UNIT_TOLERANCE, Space, Vectors, lengths

Faults = npt.NDArray[np.uint8]
"""A `Fault` for each vector."""

SAME = 1e-3
"""Distance up to which two stored vectors are one: float noise, and no bit."""
ALIKE = 0.05
"""The same where a text was embedded twice: a cosine of 0.999, or one bit in twenty."""


class Fault(IntEnum):
    """What is wrong with a stored vector. All float vectors are stored with length 1."""

    SOUND = 0
    NOT_FINITE = 1
    ZERO = 2
    CONSTANT = 3
    NORM = 4
    TYPE = 5
    WRONG = 6
    OTHER_SPACE = 7


def numbers(column: pa.Array | pa.ChunkedArray) -> Vectors:
    """The vectors of a fixed_size_list column, shape (rows, list size); nulls are NaN or 0."""
    if isinstance(column, pa.ChunkedArray):
        column = column.combine_chunks()
    size = column.type.list_size
    # `flatten` would leave the rows out that are null.
    values = column.values.slice(column.offset * size, len(column) * size)
    nothing = 0 if pa.types.is_integer(values.type) else float("nan")
    found: Vectors = values.fill_null(nothing).to_numpy().reshape(-1, size)
    if column.null_count:
        found = found.copy()
        found[column.is_null().to_numpy(zero_copy_only=False)] = nothing
    return found


def faults_of(column: pa.Array | pa.ChunkedArray, space: Space) -> Faults:
    """What is wrong with each vector of `column` by itself."""
    if column.type != space.vector_type:
        return np.full(len(column), Fault.TYPE, np.uint8)
    vectors = numbers(column)
    faults = np.full(len(vectors), Fault.SOUND, np.uint8)
    if space.dtype == "ubinary":
        faults[(vectors == np.iinfo(np.uint8).max).all(axis=1)] = Fault.CONSTANT
        faults[(vectors == 0).all(axis=1)] = Fault.ZERO
        return faults
    norms = lengths(vectors)
    faults[np.abs(norms - 1) > UNIT_TOLERANCE] = Fault.NORM
    if space.dimension > 1:
        faults[vectors.max(axis=1) == vectors.min(axis=1)] = Fault.CONSTANT
    faults[norms == 0] = Fault.ZERO
    faults[~np.isfinite(norms)] = Fault.NOT_FINITE
    return faults


def distances(left: Vectors, right: Vectors) -> npt.NDArray[np.float64]:
    """For each pair of vectors how far they are apart: as floats, or as the share of bits."""
    if left.dtype == np.uint8:
        differ = np.unpackbits(np.bitwise_xor(left, right), axis=1)
        return np.asarray(differ.mean(axis=1), dtype=np.float64)
    apart = np.linalg.norm(left.astype(np.float64) - right, axis=1)
    return np.asarray(apart, dtype=np.float64)
