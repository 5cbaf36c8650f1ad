"""Asked: texts as somebody asks for their vectors, and each of them once."""

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np
import pyarrow as pa

from tasks.embeddings import TextError
from tasks.keys import KeySet, digest_column, first_of_each
from tasks.providers import Vectors


class Asked:
    """Texts as they were asked for, and each of them once.

    Attributes:
        unique: text_hash of each text that could be embedded, once, in the order they first stand.

    Args:
        texts: As they were asked for.
        invalid: Positions of those that nobody could embed.
    """

    def __init__(self, texts: Sequence[str | None], invalid: Mapping[int, TextError]) -> None:
        self._texts = texts
        self._rows = np.array([at for at in range(len(texts)) if at not in invalid], np.int64)
        hashes = digest_column(pa.array([texts[at] for at in self._rows], pa.utf8()))
        self._first = first_of_each(hashes)
        self.unique = hashes.take(pa.array(self._first))
        self._place = KeySet(self.unique).positions(hashes)

    def texts_at(self, places: Iterable[int]) -> dict[bytes, str]:
        """The unique texts at these places, by hash."""
        hashes = self.unique.take(pa.array(places, pa.int64())).to_pylist()
        rows = [int(self._rows[self._first[place]]) for place in places]
        return {each: str(self._texts[row]) for each, row in zip(hashes, rows, strict=True)}

    def spread(self, values: Vectors) -> Vectors:
        """Values of the unique texts as rows of what was asked for, the rest NaN or 0."""
        if len(self._rows) == len(self._texts) == len(values):
            return values  # every text once: nothing to copy
        blank: Any = np.nan if values.dtype == np.float32 else 0
        spread: Vectors = np.full((len(self._texts), *values.shape[1:]), blank, values.dtype)
        spread[self._rows] = values[self._place]
        return spread

    def errors_of(self, failed: Mapping[bytes, TextError]) -> dict[int, TextError]:
        """Errors of unique texts as errors of rows."""
        if not failed:
            return {}
        of_place = [failed.get(each) for each in self.unique.to_pylist()]
        return {
            int(row): error
            for row, place in zip(self._rows, self._place, strict=True)
            if (error := of_place[place]) is not None
        }


def invalid(texts: Sequence[object]) -> dict[int, TextError]:
    """The texts that nobody could embed, by position."""
    errors = {}
    for at, text in enumerate(texts):
        if not isinstance(text, str):
            what = "it is not valid UTF-8" if text is None else f"it is a {type(text).__name__}"
            errors[at] = TextError("not text", f"This is no text: {what}.")
        elif not text.strip():
            errors[at] = TextError("blank", "This text is blank; there is nothing to embed.")
    return errors
