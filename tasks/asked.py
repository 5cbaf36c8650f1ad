"""Asked: texts as somebody asks for their vectors, and each of them once."""

from collections.abc import Iterable, Mapping
from typing import Any

import numpy as np
import pyarrow as pa

from tasks.embeddings import TextError
from tasks.keys import KeySet, digest_column, first_of_each, has_bytes
from tasks.providers import Vectors


class Asked:
    """Texts as they were asked for, and each of them once. A copy: the caller's may change.

    Attributes:
        texts: As they were asked for; None where one was no text.
        invalid: Why nobody could embed them, by position.
        unique: text_hash of each text that could be embedded, once, in the order they first stand.

    Args:
        given: What was asked for.
    """

    def __init__(self, given: Iterable[object]) -> None:
        whole = list(given)
        self.invalid = _invalid(whole)
        self.texts = [
            text if isinstance(text, str) and not _no_text(self.invalid.get(at)) else None
            for at, text in enumerate(whole)
        ]
        self._rows = np.array([at for at in range(len(whole)) if at not in self.invalid], np.int64)
        hashes = digest_column(pa.array([self.texts[at] for at in self._rows], pa.utf8()))
        self._first = first_of_each(hashes)
        self.unique = hashes.take(pa.array(self._first))
        self._place = KeySet(self.unique).positions(hashes)

    def texts_at(self, places: Iterable[int]) -> dict[bytes, str]:
        """The unique texts at these places, by hash."""
        hashes = self.unique.take(pa.array(places, pa.int64())).to_pylist()
        rows = [int(self._rows[self._first[place]]) for place in places]
        return {each: str(self.texts[row]) for each, row in zip(hashes, rows, strict=True)}

    def spread(self, values: Vectors) -> Vectors:
        """Values of the unique texts as rows of what was asked for, the rest NaN or 0."""
        if len(self._rows) == len(self.texts) == len(values):
            return values  # every text once: nothing to copy
        blank: Any = np.nan if values.dtype == np.float32 else 0
        spread: Vectors = np.full((len(self.texts), *values.shape[1:]), blank, values.dtype)
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


def _invalid(texts: list[object]) -> dict[int, TextError]:
    """Why nobody could embed a text, by position."""
    errors = {}
    for at, text in enumerate(texts):
        if isinstance(text, bytes):
            errors[at] = TextError("not text", "This is no text: it is bytes, not UTF-8.")
        elif not isinstance(text, str):
            errors[at] = TextError("not text", f"This is no text: it is {type(text).__name__}.")
        elif not text.strip():
            errors[at] = TextError("blank", "This text is blank; there is nothing to embed.")
        elif not has_bytes(text):
            errors[at] = TextError("not text", "This is no text: it holds half of a character.")
    return errors


def _no_text(error: TextError | None) -> bool:
    return error is not None and error.kind == "not text"
