"""Voyage AI: what a plan needs to know of it. Its calls come with the next version."""

from collections.abc import Sequence
from dataclasses import dataclass

from tasks.errors import ProviderDenied
from tasks.limits import Limits
from tasks.providers import Answer, Space

BYTES_PER_TOKEN = 4
"""First guess of the length of a token, in UTF-8 bytes."""


@dataclass(frozen=True)
class Voyage:
    """One model of the Voyage AI API, for planning."""

    model: str
    dimension: int
    limits: Limits
    unit_vectors: bool = True

    @property
    def space(self) -> Space:
        """Where its vectors live."""
        return Space("voyage", self.model, self.dimension)

    def count(self, text: str) -> int:
        """Estimated tokens of `text`, at least 1."""
        return max(1, -(-len(text.encode()) // BYTES_PER_TOKEN))

    def embed(self, texts: Sequence[str]) -> Answer:
        """Voyage is planned for, but not called yet.

        Raises:
            ProviderDenied: Always.
        """
        raise ProviderDenied(
            f"This version plans for Voyage but does not call it; {len(texts)} texts were not sent."
        )
