"""One batch, one call: what came is checked and durable, what failed is written down."""

import dataclasses
import pickle
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tasks.embed import Embedded, embed_batch, retry_when_busy
from tasks.errors import (
    AnswerRejected,
    BatchRefused,
    BatchTooLarge,
    ProviderBusy,
    ProviderDenied,
    ProviderError,
)
from tasks.journal import RunFolder, read_answer
from tasks.keys import text_hash
from tasks.limits import Limits
from tasks.providers import Answer, Space, Vectors, checked_vectors
from tasks.providers.lexical import Lexical
from tasks.schemas import BATCH, Batch, TableRef

LIMITS = Limits(
    requests_per_minute=None,
    tokens_per_minute=None,
    texts_per_request=100,
    tokens_per_request=None,
    concurrency=2,
)


@dataclass
class ScriptedProvider:
    """Raises or answers what it was given, one a call; then it answers by words."""

    script: list[Exception | Answer] = field(default_factory=list)
    dimension: int = 256
    unit_vectors: bool = True
    limits: Limits = LIMITS
    calls: list[list[str]] = field(default_factory=list)

    @property
    def space(self) -> Space:
        return Space("scripted", "s", self.dimension)

    def count(self, text: str) -> int:
        return len(text)

    def embed(self, texts: Sequence[str]) -> Answer:
        self.calls.append(list(texts))
        outcome = self.script.pop(0) if self.script else by_words(texts, self.dimension)
        if isinstance(outcome, Exception):
            raise outcome
        return outcome


def by_words(texts: Sequence[str], dimension: int = 256) -> Answer:
    answer = Lexical(dimension, LIMITS).embed(texts)
    return dataclasses.replace(answer, billed_tokens=1_000_000, request_id="req-7")


Embed = Callable[..., Embedded]
WORDS = ["alpha", "beta", "gamma"]


@pytest.fixture
def folder(tmp_path: Path, run_folder: Callable[..., RunFolder]) -> RunFolder:
    return run_folder(tmp_path)


@pytest.fixture
def embed(ref: Callable[..., TableRef], folder: RunFolder) -> Embed:
    def run(provider: ScriptedProvider, *texts: str, attempt: int = 1, number: int = 4) -> Embedded:
        rows = [
            {"text_hash": text_hash(text), "text": text, "tokens": 2} for text in texts or WORDS
        ]
        batch = Batch(number, 9, ref(BATCH, rows, batch_rows=2), 2 * len(rows))
        return embed_batch(batch, provider, folder, 0.25, attempt)

    return run


def test_an_answer_is_durable_and_can_be_read(embed: Embed, folder: RunFolder) -> None:
    provider = ScriptedProvider()
    found = embed(provider)
    answer = read_answer(found.answer)
    assert answer is not None
    assert folder.answers == [found.answer]
    assert provider.calls == [WORDS]
    assert answer.space == provider.space
    assert answer.table.column("text_hash").to_pylist() == [text_hash(text) for text in WORDS]
    assert answer.table.column("vector").to_pylist() == by_words(WORDS).vectors.tolist()
    assert not list(found.answer.parent.glob("*.tmp"))


def test_the_call_is_noted_with_what_it_cost(embed: Embed, folder: RunFolder) -> None:
    found = embed(ScriptedProvider(), attempt=2)
    (call,) = folder.calls()
    assert (call.run_id, call.batch, call.attempt, call.status) == ("run", 4, 2, "ok")
    assert (call.texts, call.tokens_estimated, call.tokens_billed) == (3, 6, 1_000_000)
    assert (call.usd, call.request_id) == (0.25, "req-7")
    assert (found.batch, found.texts, found.tokens, found.tokens_billed) == (4, 3, 6, 1_000_000)
    assert found.attempts == 2
    assert found.seconds == call.seconds > 0


@pytest.mark.parametrize("error", [ProviderBusy, BatchTooLarge, BatchRefused, ProviderDenied])
def test_a_failed_call_is_noted_and_stores_nothing(
    embed: Embed, folder: RunFolder, error: type[ProviderError]
) -> None:
    with pytest.raises(error):
        embed(ScriptedProvider([error("no")]))
    assert folder.answers == []
    (call,) = folder.calls()
    assert (call.status, call.tokens_billed, call.usd) == (error.__name__, 0, 0)
    assert (call.texts, call.tokens_estimated) == (3, 6)


def test_a_rejected_answer_was_paid_for_and_is_asked_again(embed: Embed, folder: RunFolder) -> None:
    provider = ScriptedProvider([by_words(["one"]), ProviderBusy("429")])
    with pytest.raises(AnswerRejected):
        embed(provider, attempt=1)
    with pytest.raises(ProviderBusy):
        embed(provider, attempt=2)
    embed(provider, attempt=3)
    assert [(call.status, call.tokens_billed) for call in folder.calls()] == [
        ("AnswerRejected", 1_000_000),
        ("ProviderBusy", 0),
        ("ok", 1_000_000),
    ]
    assert len(folder.answers) == 1


@pytest.mark.parametrize(
    ("outcome", "asked_again"),
    [
        (ProviderBusy("429"), True),
        (AnswerRejected("short"), True),
        (BatchTooLarge("long"), False),
        (BatchRefused("bad"), False),
        (ProviderDenied("key"), False),
        (ValueError("a bug"), False),
    ],
)
def test_only_a_busy_provider_is_asked_again(outcome: Exception, asked_again: bool) -> None:
    class Failed:
        def result(self, *, raise_on_failure: bool) -> Exception:
            assert not raise_on_failure
            return outcome

    assert retry_when_busy(None, None, Failed()) is asked_again


def answer_with(vectors: Any, order: Sequence[int] | None = None) -> Answer:
    rows: Vectors = np.asarray(vectors, dtype=np.float32)
    return Answer(rows, range(len(rows)) if order is None else order, 3)


def unit(*rows: Sequence[float]) -> Vectors:
    found = np.asarray(rows, dtype=np.float32)
    return np.asarray(found / np.linalg.norm(found, axis=1)[:, None], dtype=np.float32)


GOOD = unit([1, 0, 0, 0], [0, 1, 0, 0], [0, 0, 1, 0])
FOUR = ScriptedProvider(dimension=4)


@pytest.mark.parametrize(
    ("answer", "said"),
    [
        (answer_with(GOOD[:2]), r"shape \(2, 4\).*\(3, 4\) was asked for"),
        (answer_with(np.vstack([GOOD, GOOD[:1]])), r"shape \(4, 4\)"),
        (answer_with(GOOD[:0]), r"shape \(0, 4\)"),
        (answer_with(GOOD[:, :3]), r"shape \(3, 3\)"),
        (answer_with(GOOD.reshape(-1)), r"shape \(12,\)"),
        (answer_with(GOOD, [0, 1, 1]), "each of 3 texts exactly once"),
        (answer_with(GOOD, [0, 1]), "each of 3 texts exactly once"),
        (answer_with(GOOD, [1, 2, 3]), "each of 3 texts exactly once"),
        (answer_with(GOOD, [-1, 0, 1]), "each of 3 texts exactly once"),
        (answer_with([*GOOD[:2], [np.nan, 1, 0, 0]]), "not finite"),
        (answer_with([*GOOD[:2], [np.inf, 1, 0, 0]]), "not finite"),
        (answer_with([*GOOD[:2], [0, 0, 0, 0]]), "a vector of zeros"),
        (answer_with([*GOOD[:2], [0, 0, 0, 1.01]]), "not of length 1"),
        (answer_with([*GOOD[:2], [0, 0, 0, 0.5]]), "not of length 1"),
    ],
)
def test_an_answer_that_is_not_what_was_asked_for_is_rejected(answer: Answer, said: str) -> None:
    with pytest.raises(AnswerRejected, match=said):
        checked_vectors(answer, 3, FOUR)


def test_a_rejected_answer_leaves_nothing_behind(embed: Embed, folder: RunFolder) -> None:
    with pytest.raises(AnswerRejected):
        embed(ScriptedProvider([answer_with(GOOD[:2])], dimension=4))
    assert folder.answers == []
    assert not list(folder.path.glob("answers/*"))


@given(st.permutations(range(5)))
@settings(deadline=None)
def test_a_shuffled_answer_is_put_right(order: list[int]) -> None:
    vectors = unit(*np.eye(5, 4, k=-1) + 0.1)
    found = checked_vectors(answer_with(vectors[order], order), 5, FOUR)
    assert found.tolist() == vectors.tolist()
    assert found.dtype == np.float32


floats = st.floats(width=32, allow_nan=False, allow_infinity=False)


@given(st.lists(st.lists(floats, min_size=4, max_size=4), min_size=1, max_size=4))
@settings(deadline=None)
def test_where_nobody_promised_unit_vectors_they_are_made_so(rows: list[list[float]]) -> None:
    try:
        found = checked_vectors(
            answer_with(rows), len(rows), dataclasses.replace(FOUR, unit_vectors=False)
        )
    except AnswerRejected:
        assert any(not any(row) for row in rows)
        return
    lengths = np.linalg.norm(found.astype(np.float64), axis=1)
    assert np.abs(lengths - 1).max() < 1e-5
    assert found.dtype == np.float32
    assert (np.sign(found) * np.sign(np.asarray(rows)) >= 0).all()


def test_a_provider_that_answers_in_doubles_is_stored_in_floats() -> None:
    doubles = Answer(GOOD.astype(np.float64), range(3), 3)
    assert checked_vectors(doubles, 3, FOUR).dtype == np.float32


@pytest.mark.parametrize("error", [ProviderBusy, AnswerRejected, BatchRefused, ProviderDenied])
def test_an_error_survives_the_way_between_processes(error: type[ProviderError]) -> None:
    back = pickle.loads(pickle.dumps(error("503", retry_after_s=7)))  # noqa: S301
    assert isinstance(back, error)
    assert str(back) == "503"
    assert back.facts == {"retry_after_s": 7}
