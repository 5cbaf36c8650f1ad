"""Embed: one batch of texts becomes vectors. The only step that costs money."""

import time
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from tasks.errors import ProviderBusy, ProviderError
from tasks.journal import Call, RunFolder
from tasks.limits import gate
from tasks.providers import Answer, Provider, Vectors, checked_vectors
from tasks.schemas import BATCH, Batch


@dataclass(frozen=True)
class Embedded:
    """One batch, paid for and durable.

    Attributes:
        batch: Its number, from 1.
        answer: File in the journal.
        texts: Texts embedded.
        tokens: Their estimated tokens.
        tokens_billed: By the provider's word.
        attempts: Calls it took.
        seconds: How long the call that brought the answer took.
    """

    batch: int
    answer: Path
    texts: int
    tokens: int
    tokens_billed: int
    attempts: int
    seconds: float


def embed_batch(
    batch: Batch, provider: Provider, folder: RunFolder, usd_per_million_tokens: float, attempt: int
) -> Embedded:
    """Embed every text of `batch` in one call, and make the answer durable.

    Args:
        batch: Distinct texts, within what one call takes.
        provider: Who embeds; no retries of its own.
        folder: The run's folder, with its journal.
        usd_per_million_tokens: List price.
        attempt: How often this batch was tried, from 1.

    Raises:
        ProviderBusy: The same call may work later; nothing was stored.
        BatchTooLarge: The batch must be split.
        BatchRefused: A text in it is bad.
        ProviderDenied: No call can work.
    """
    rows = batch.table.load(BATCH)
    texts = rows.column("text").to_pylist()

    def call(status: str, seconds: float, answer: Answer | None) -> Call:
        billed = answer.billed_tokens if answer else 0
        return Call(
            run_id=folder.run_id,
            batch=batch.number,
            attempt=attempt,
            status=status,
            started_at=started_at,
            seconds=seconds,
            texts=len(texts),
            tokens_estimated=batch.tokens,
            tokens_billed=billed,
            usd=billed * usd_per_million_tokens / 1e6,
            request_id=answer.request_id if answer else "",
        )

    with gate(folder.run_id, provider.limits.concurrency).slot():
        started_at, started = datetime.now(tz=UTC).isoformat(), time.perf_counter()
        answer: Answer | None = None
        try:
            answer = provider.embed(texts)
            vectors: Vectors = checked_vectors(answer, len(texts), provider)
        except ProviderError as error:
            folder.note(call(type(error).__name__, time.perf_counter() - started, answer))
            raise
        seconds = time.perf_counter() - started

    hashes = rows.column("text_hash").combine_chunks()
    path = folder.write_answer(hashes, vectors, provider.space, call("ok", seconds, answer))
    return Embedded(
        batch=batch.number,
        answer=path,
        texts=len(texts),
        tokens=batch.tokens,
        tokens_billed=answer.billed_tokens,
        attempts=attempt,
        seconds=seconds,
    )


def retry_when_busy(_task: Any, _task_run: Any, state: Any) -> bool:
    """Ask again only when that can help. Prefect ignores anything but a plain function here."""
    return isinstance(state.result(raise_on_failure=False), ProviderBusy)
