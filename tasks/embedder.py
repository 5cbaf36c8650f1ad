"""The engine as a library: texts in, vectors out, over the very pieces that the flows use.

    with BatchEmbedder("configs/voyage.yaml") as embedder:
        found = embedder.embed_batch(["a wolf", "two foxes"])

What was ever paid for is taken from the cache under `state.uri`, whoever paid for it; the rest
goes out in as few calls as the provider takes, within the account's limits. An answer is durable
before anything else can fail: after a kill the next run, or the next embedder, goes on from there.
"""

from collections.abc import Callable, Iterable, Mapping
from concurrent.futures import Future
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from tasks.embed import RETRIES
from tasks.embedder_report import EmbedderReport
from tasks.embedder_run import NOT_OPEN, EmbedderRun
from tasks.embeddings import Embeddings, StreamProgress
from tasks.errors import BudgetReached, EmbedOnceError
from tasks.params import Engine, engine_of
from tasks.providers import Vectors
from tasks.stream import Source, Stream


class BatchEmbedder:
    """Embeds texts, each of them once. Serves many threads; open it in a `with` block.

    Args:
        config: Path of a config file, or `embedding`, `limits`, `budget`, `on_error` and `state`
            as they stand in one. `on_error` tells what a text without a vector does: quarantine and
            collect name it in the result's errors, and quarantine does not send it again;
            fail_fast raises at the first one, before any call where it is blank or no text.
        memory_mb: About what texts and vectors on their way may take, in MiB: calls get smaller
            where they would take more. None: no limit.
        retries: So often a call that may work later is tried again, 1, 2, 4, … s apart.

    Raises:
        SettingsError: The config is wrong; at the opening also: there is no key.
    """

    def __init__(
        self,
        config: Engine | Mapping[str, Any] | str | Path,
        *,
        memory_mb: int | None = None,
        retries: int = RETRIES,
    ) -> None:
        if (memory_mb is not None and memory_mb < 1) or retries < 0:
            raise ValueError("memory_mb must be at least 1, retries at least 0.")
        self._config = engine_of(config)
        self._memory_bytes = None if memory_mb is None else memory_mb * 2**20
        self._retries = retries
        self._open: EmbedderRun | None = None

    def __enter__(self) -> Self:
        if self._open is not None:
            raise RuntimeError("The embedder is open already: one `with` block at a time.")
        self._open = EmbedderRun(self._config, self._memory_bytes, self._retries)
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        run, self._open = self._opened(), None
        try:
            if error is not None:
                run.cancel()
        finally:
            state = "failed" if isinstance(error, Exception) else "completed"
            run.close("over budget" if isinstance(error, BudgetReached) else state)

    def embed(self, text: str) -> Vectors:
        """The vector of one text, shape (dimension,): a batch of one.

        Raises:
            EmbedOnceError: It has none; the message says why.
        """
        found = self.embed_batch([text])
        if found.errors:
            raise EmbedOnceError(found.errors[0].message)
        vector: Vectors = found.vectors[0]
        return vector

    def embed_batch(self, texts: Iterable[str]) -> Embeddings:
        """The vectors of `texts`, row for row; a text that stands twice is sent once.

        Raises:
            ValueError: There are no texts.
            CorpusError: on_error is fail_fast, and one of them is blank or no text.
            ProviderError: No call can work, or on_error is fail_fast and one did not.
            BudgetReached: The rest would cost more than budget.max_usd.
            StorageFailed: The state takes no answers; nothing more is sent.
        """
        return self._opened().answer(_copied(texts))

    def submit(self, texts: Iterable[str]) -> "Future[Embeddings]":
        """`embed_batch` on a bounded pool of threads; in async code, `asyncio.wrap_future` it.

        Raises:
            ValueError: There are no texts.
        """
        return self._opened().submit(_copied(texts))

    def stream(
        self, source: Source, progress: Callable[[StreamProgress], None] | None = None
    ) -> Stream:
        """Embed more texts than memory holds; iterate with `for` or `async for` over the parts.

        Args:
            source: Texts, or a path: of a file with a text a line, or of a folder, whose
                documents are cut into chunks as for an index.
            progress: Is told how far it is, after each part.

        Raises:
            SettingsError: There is nothing at the path.
        """
        return self._opened().stream(source, progress)

    def cancel(self) -> None:
        """Send nothing more. What waits is given back as cancelled, answers in flight are kept.

        It returns when they are in or given up, after 22 s at most.
        """
        self._opened().cancel()

    def report(self) -> EmbedderReport:
        """What was done so far, and how well."""
        return self._opened().report()

    def _opened(self) -> EmbedderRun:
        if self._open is None:
            raise RuntimeError(NOT_OPEN)
        return self._open


def _copied(texts: Iterable[object]) -> list[object]:
    if isinstance(texts, str):
        raise TypeError("Give a list of texts; a single one goes to `embed`.")
    copied = list(texts)
    if not copied:
        raise ValueError("There are no texts to embed.")
    return copied
