"""One batch: what came is checked and durable, what failed says what happens next."""

import dataclasses
import math
import pickle
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tasks.embed import PROOF, Embedded, embed_batch, retry_when_busy
from tasks.errors import (
    AnswerRejected,
    BatchRefused,
    BatchTooLarge,
    ProviderBusy,
    ProviderDenied,
    ProviderError,
    ProviderThrottled,
    ProviderUnreachable,
    RunStopped,
)
from tasks.journal import RunFolder, read_answer
from tasks.keys import text_hash
from tasks.limits import Learned, Limits
from tasks.prepare import PLAIN, Preparation
from tasks.providers import Answer, Space, Vectors, checked_vectors
from tasks.providers.lexical import Lexical
from tasks.schemas import BATCH, Batch, TableRef
from tasks.sender import PROOF_AFTER, Terms, forget_sender, sender_of

LIMITS = Limits(
    requests_per_minute=None,
    tokens_per_minute=None,
    texts_per_request=5000,
    tokens_per_request=None,
    concurrency=2,
)
Outcome = Exception | Answer | None


@dataclass(eq=False)
class ScriptedProvider:
    """Raises or answers what it was given, one a call; then it answers by words.

    Attributes:
        script: None answers by words.
        bad: Texts that it refuses, as a batch that holds one of them.
        holed: Texts that it answers with zeros.
        most: Most texts it takes in one call.
        names: Whether a refusal names the texts.
    """

    script: list[Outcome] = field(default_factory=list)
    dimension: int = 256
    unit_vectors: bool = True
    least: Learned = Learned()  # noqa: RUF009
    limits: Limits = LIMITS
    preparation: Preparation = PLAIN
    bad: frozenset[str] = frozenset()
    holed: frozenset[str] = frozenset()
    most: int = 5000
    names: bool = False
    calls: list[list[str]] = field(default_factory=list)

    @property
    def space(self) -> Space:
        return Space("scripted", "s", self.dimension)

    @property
    def estimate(self) -> Lexical:
        return Lexical(self.dimension, self.limits)

    def require(self) -> None:
        """Nothing can be missing."""

    def for_queries(self) -> "ScriptedProvider":
        return self

    def prepare(self) -> None:
        """Nothing to load."""

    def give_up(self) -> None:
        """Nothing to wait for."""

    def embed(self, texts: Sequence[str]) -> Answer:
        self.calls.append(list(texts))
        outcome = self.script.pop(0) if self.script else None
        if isinstance(outcome, Exception):
            raise outcome
        if len(texts) > self.most:
            raise BatchTooLarge("too many", learned=Learned(texts_per_request=self.most), tokens=9)
        if blamed := [at for at, text in enumerate(texts) if text in self.bad]:
            raise BatchRefused("bad input", positions=tuple(blamed) if self.names else ())
        if outcome is not None:
            return outcome
        answer = by_words(texts, self.dimension)
        answer.vectors[[text in self.holed for text in texts]] = 0
        return answer


def by_words(texts: Sequence[str], dimension: int = 256) -> Answer:
    answer = Lexical(dimension, LIMITS).embed(texts)
    return dataclasses.replace(answer, billed_tokens=1_000_000, request_id="req-7")


Embed = Callable[..., Embedded]
WORDS = ["alpha", "beta", "gamma"]


@pytest.fixture
def folder(tmp_path: Path, run_folder: Callable[..., RunFolder]) -> Iterator[RunFolder]:
    made = run_folder(tmp_path)
    yield made
    forget_sender(made)


@pytest.fixture
def embed(ref: Callable[..., TableRef], folder: RunFolder) -> Embed:
    def run(
        provider: ScriptedProvider,
        *texts: str,
        attempt: int = 1,
        number: int = 4,
        on_error: Any = "quarantine",
    ) -> Embedded:
        rows = [
            {"text_hash": text_hash(text), "text": text, "tokens": 2} for text in texts or WORDS
        ]
        batch = Batch(number, ref(BATCH, rows, batch_rows=2), 2 * len(rows))
        return embed_batch(batch, Terms(provider, folder, 0.25, on_error), attempt)

    return run


def known(folder: RunFolder, embedded: Embedded) -> dict[bytes, list[float]]:
    """What stands in the journal of a batch: vectors by text_hash."""
    found: dict[bytes, list[float]] = {}
    for name in folder.answers_of(embedded.batch):
        answer = read_answer(folder, name)
        assert answer is not None
        for row in answer.table.to_pylist():
            assert row["text_hash"] not in found
            found[row["text_hash"]] = row["vector"]
    return found


def vectors_of(*texts: str) -> dict[bytes, list[float]]:
    rows = by_words(texts).vectors.tolist() if texts else []
    return dict(zip(map(text_hash, texts), rows, strict=True))


def test_an_answer_is_durable_and_can_be_read(embed: Embed, folder: RunFolder) -> None:
    provider = ScriptedProvider()
    found = embed(provider)
    (name,) = folder.answers
    assert provider.calls == [WORDS]
    assert known(folder, found) == vectors_of(*WORDS)
    answer = read_answer(folder, name)
    assert answer is not None
    assert answer.space == provider.space
    assert not list(Path(folder.state_uri).rglob("*.tmp"))


def test_the_call_is_noted_with_what_it_cost(embed: Embed, folder: RunFolder) -> None:
    found = embed(ScriptedProvider(), attempt=2)
    (call,) = folder.calls()
    assert (call.run_id, call.key, call.status, call.cause) == ("run", (4, 2, 1), "ok", "retry")
    assert (call.texts, call.tokens_estimated, call.tokens_billed) == (3, 5, 1_000_000)
    assert (call.usd, call.request_id) == (0.25, "req-7")
    assert (found.batch, found.texts, found.refused) == (4, 3, ())
    assert call.seconds > 0


@pytest.mark.parametrize("error", [ProviderBusy, ProviderDenied])
def test_a_failed_call_is_noted_and_stores_nothing(
    embed: Embed, folder: RunFolder, error: type[ProviderError]
) -> None:
    with pytest.raises(error):
        embed(ScriptedProvider([error("no")]))
    assert folder.answers == []
    (call,) = folder.calls()
    assert (call.status, call.tokens_billed, call.usd) == (error.__name__, 0, 0)
    assert (call.texts, call.tokens_estimated) == (3, 5)


def test_a_rejected_answer_was_paid_for_and_is_asked_again(embed: Embed, folder: RunFolder) -> None:
    provider = ScriptedProvider([by_words(["one"]), ProviderBusy("429")])
    with pytest.raises(AnswerRejected):
        embed(provider, attempt=1)
    with pytest.raises(ProviderBusy):
        embed(provider, attempt=2)
    embed(provider, attempt=3)
    assert [(call.status, call.cause, call.tokens_billed) for call in folder.calls()] == [
        ("AnswerRejected", "first", 1_000_000),
        ("ProviderBusy", "retry", 0),
        ("ok", "retry", 1_000_000),
    ]
    assert len(folder.answers) == 1


def test_an_address_where_nobody_ever_was_is_left_after_three_tries(embed: Embed) -> None:
    provider = ScriptedProvider([ProviderUnreachable("no such name")] * 9)
    for attempt in (1, 2):
        with pytest.raises(ProviderUnreachable):
            embed(provider, attempt=attempt)
    with pytest.raises(ProviderDenied, match="no such name"):
        embed(provider, attempt=3)
    with pytest.raises(ProviderDenied):
        embed(provider, number=5)
    assert len(provider.calls) == 3


def test_an_address_that_is_gone_for_a_while_is_waited_for(embed: Embed) -> None:
    provider = ScriptedProvider([None, *[ProviderUnreachable("no such name")] * 4])
    embed(provider, "delta", number=1)
    for attempt in (1, 2, 3, 4):
        with pytest.raises(ProviderUnreachable):
            embed(provider, attempt=attempt)
    assert embed(provider, attempt=5).texts == 3


def test_a_fault_of_ours_is_no_good_call(embed: Embed, folder: RunFolder) -> None:
    with pytest.raises(ValueError, match="a bug"):
        embed(ScriptedProvider([ValueError("a bug")]))
    assert [call.status for call in folder.calls()] == ["unforeseen"]


def test_after_a_denial_nothing_more_is_sent(embed: Embed) -> None:
    provider = ScriptedProvider([ProviderDenied("wrong key")])
    for number in (1, 2):
        with pytest.raises(ProviderDenied, match="wrong key"):
            embed(provider, number=number)
    assert len(provider.calls) == 1


def test_limits_that_come_with_an_answer_reach_the_limiter(embed: Embed, folder: RunFolder) -> None:
    answer = dataclasses.replace(by_words(WORDS), learned=Learned(3, 10_000))
    provider = ScriptedProvider([answer])
    embed(provider)
    assert sender_of(Terms(provider, folder, 0.0)).limiter.limits.tokens_per_minute == 10_000


def test_a_throttled_call_is_sent_again_and_is_no_retry(embed: Embed, folder: RunFolder) -> None:
    provider = ScriptedProvider([ProviderThrottled("slow down", retry_after=0.05)])
    assert known(folder, embed(provider)) == vectors_of(*WORDS)
    assert [(call.status, call.cause, call.attempt) for call in folder.calls()] == [
        ("ProviderThrottled", "first", 1),
        ("ok", "wait", 1),
    ]


# Too large


@pytest.mark.parametrize("most", [1, 2, 3, 7])
def test_a_batch_too_large_is_split_by_what_the_provider_takes(
    embed: Embed, folder: RunFolder, most: int
) -> None:
    texts = [f"word{number}" for number in range(20)]
    provider = ScriptedProvider(most=most)
    found = embed(provider, *texts)
    assert known(folder, found) == vectors_of(*texts)
    assert (found.texts, found.refused) == (20, ())
    assert [call.status for call in folder.calls()].count("BatchTooLarge") == 1
    assert len(provider.calls) == 1 + math.ceil(20 / most)


def test_a_batch_too_large_for_no_known_reason_is_halved(embed: Embed, folder: RunFolder) -> None:
    provider = ScriptedProvider([BatchTooLarge("413", learned=Learned(), tokens=None)])
    assert known(folder, embed(provider)) == vectors_of(*WORDS)
    assert provider.calls == [WORDS, WORDS[:2], WORDS[2:]]


def test_a_text_that_is_longer_than_any_call_is_refused(embed: Embed, folder: RunFolder) -> None:
    provider = ScriptedProvider([BatchTooLarge("has 200000 tokens", tokens=200_000)])
    found = embed(provider, "alpha")
    assert found.texts == 0
    assert [(text.reason, text.lasting) for text in found.refused] == [("has 200000 tokens", True)]
    assert folder.refused()[provider.space.id] == {text_hash("alpha"): found.refused[0]}


# Refused texts


@pytest.mark.slow
@given(st.data(), st.integers(1, 60), st.booleans())
@settings(max_examples=60, deadline=None)
def test_bad_texts_are_found_and_all_others_embedded(  # noqa: PLR0917
    ref: Callable[..., TableRef],
    fresh: Callable[[], Path],
    run_folder: Callable[..., RunFolder],
    data: st.DataObject,
    size: int,
    names: bool,
) -> None:
    texts = [f"word{number}" for number in range(size)]
    bad = frozenset(data.draw(st.lists(st.sampled_from(texts), max_size=size - 1)))
    provider, folder = ScriptedProvider(bad=bad, names=names), run_folder(fresh())
    rows = [{"text_hash": text_hash(text), "text": text, "tokens": 1} for text in texts]
    found = embed_batch(Batch(1, ref(BATCH, rows), size), Terms(provider, folder, 0.0), 1)
    forget_sender(folder)
    good = [text for text in texts if text not in bad]
    assert known(folder, found) == vectors_of(*good)
    assert found.texts == len(good)
    assert {text.text_hash for text in found.refused} == set(map(text_hash, bad))
    calls = [call for call in provider.calls if call != [PROOF]]
    assert len(calls) <= max(1, len(bad) * (2 * math.ceil(math.log2(size)) + 1))
    sent_and_taken = [text for call in calls if not bad & set(call) for text in call]
    assert sorted(sent_and_taken) == sorted(good)  # nothing is paid for twice


def test_what_a_refusal_names_costs_two_calls_more(embed: Embed) -> None:
    texts = [f"word{number}" for number in range(1000)]
    provider = ScriptedProvider(bad=frozenset(["word777"]), names=True)
    assert len(embed(provider, *texts).refused) == 1
    assert [len(call) for call in provider.calls] == [1000, 999, 1]


def test_a_provider_that_refuses_everything_is_not_the_texts_fault(
    embed: Embed, folder: RunFolder
) -> None:
    texts = [f"word{number}" for number in range(1000)]
    provider = ScriptedProvider(bad=frozenset([*texts, PROOF]))
    with pytest.raises(ProviderDenied, match=r"refuses every text.*bad input"):
        embed(provider, *texts)
    assert len(provider.calls) < 4 * PROOF_AFTER
    assert folder.refused() == {}


def test_one_bad_text_alone_is_refused_once_another_text_was_taken(
    embed: Embed, folder: RunFolder
) -> None:
    provider = ScriptedProvider(bad=frozenset(["alpha"]))
    assert len(embed(provider, "alpha").refused) == 1
    assert provider.calls == [["alpha"], [PROOF]]
    assert [call.cause for call in folder.calls()] == ["first", "proof"]


def test_fail_fast_ends_the_run_with_the_first_bad_text(embed: Embed, folder: RunFolder) -> None:
    provider = ScriptedProvider(bad=frozenset(["beta"]))
    with pytest.raises(BatchRefused, match=r"4 characters.*on_error is fail_fast: bad input"):
        embed(provider, on_error="fail_fast")
    with pytest.raises(BatchRefused):
        embed(provider, "delta", number=5, on_error="fail_fast")
    assert ["delta"] not in provider.calls
    assert folder.refused() == {}


def test_collect_reports_a_bad_text_but_would_send_it_again(embed: Embed) -> None:
    found = embed(ScriptedProvider(bad=frozenset(["beta"])), on_error="collect")
    assert [text.lasting for text in found.refused] == [False]
    assert found.texts == 2


def test_a_retry_sends_only_what_is_missing(embed: Embed, folder: RunFolder) -> None:
    texts = [f"word{number}" for number in range(8)]
    provider = ScriptedProvider(bad=frozenset(["word1"]))
    provider.script = [None, None, None, None, None, ProviderBusy("503")]
    with pytest.raises(ProviderBusy):
        embed(provider, *texts)
    sent = {text for call in provider.calls for text in call if not provider.bad & set(call)}
    provider.calls.clear()
    found = embed(provider, *texts, attempt=2)
    assert known(folder, found) == vectors_of(*(text for text in texts if text != "word1"))
    assert [text.text_hash for text in found.refused] == [text_hash("word1")]
    assert (found.texts, found.batch) == (7, 4)
    assert not {"word0", "word1"} & {text for call in provider.calls for text in call}
    assert sent


# Answers with holes


def test_a_text_that_never_gets_a_good_vector_is_refused_and_the_others_go_on(
    embed: Embed, folder: RunFolder
) -> None:
    provider = ScriptedProvider(holed=frozenset(["beta"]))
    embed(provider, "delta", number=1)  # the provider works
    for attempt in (1, 2):
        with pytest.raises(AnswerRejected, match="1 of"):
            embed(provider, attempt=attempt)
    found = embed(provider, attempt=3)
    assert known(folder, found) == vectors_of("alpha", "gamma")
    assert [text.text_hash for text in found.refused] == [text_hash("beta")]
    assert "zeros" in found.refused[0].reason
    statuses = [call.status for call in folder.calls() if call.batch == 4]
    assert statuses == [
        "AnswerRejected",
        "AnswerRejected",
        "ok",
        "AnswerRejected",
        "AnswerRejected",
    ]


def test_a_provider_whose_answers_are_all_bad_blames_no_text(embed: Embed) -> None:
    provider = ScriptedProvider(holed=frozenset(WORDS))
    for attempt in (1, 2, 3, 4):
        with pytest.raises(AnswerRejected):
            embed(provider, attempt=attempt)
    assert len(provider.calls) == 4


@pytest.mark.parametrize(
    ("outcome", "asked_again"),
    [
        (ProviderBusy("429"), True),
        (AnswerRejected("short"), True),
        (BatchTooLarge("long"), False),
        (BatchRefused("bad"), False),
        (ProviderDenied("key"), False),
        (RunStopped("elsewhere"), False),
        (ValueError("a bug"), False),
    ],
)
def test_only_a_busy_provider_is_asked_again(outcome: Exception, asked_again: bool) -> None:
    class Failed:
        def result(self, *, raise_on_failure: bool) -> Exception:
            assert not raise_on_failure
            return outcome

    assert retry_when_busy(None, None, Failed()) is asked_again


def test_one_sender_serves_a_run_until_it_is_forgotten(folder: RunFolder) -> None:
    terms = Terms(ScriptedProvider(), folder, 0.0)
    first = sender_of(terms)
    assert sender_of(terms) is first
    forget_sender(folder)
    assert sender_of(terms) is not first


# What is checked


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
    assert not list((Path(folder.state_uri) / "runs").rglob("*.arrow"))


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
