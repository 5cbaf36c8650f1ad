"""What is sent next: as much as one call takes by what is known when its turn comes."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tasks.journal import RunFolder
from tasks.limits import Learned, Limits
from tasks.providers.voyage import Voyage
from tasks.sender import Sender, Terms
from tasks.tokens import Estimate, load

LIMITS = Limits(2000, 8_000_000, 1000, 320_000, 8)


@pytest.fixture
def sender(tmp_path: Path, run_folder: Callable[..., RunFolder]) -> Sender:
    return Sender(Terms(Voyage("voyage-4", 256, LIMITS), run_folder(tmp_path), 0.06))


def sizes(some: list[str]) -> npt.NDArray[np.int32]:
    return Estimate().sizes(pa.array(some))


def texts(count: int) -> list[str]:
    return [f"The story of animal number {number:06} and its house." for number in range(count)]


def tokens_of(sender: Sender, some: list[str]) -> int:
    return int(sender.counts(pa.array(some, pa.utf8())).sum())


def prior(some: list[str]) -> int:
    """Tokens before anything is learned."""
    return int(Estimate().counts(some).sum())


def test_all_of_what_fits_is_sent_and_a_margin_is_left_where_it_is_cut(sender: Sender) -> None:
    few = texts(100)
    assert sender.fitting(sizes(few)) == (100, tokens_of(sender, few))
    assert sender.fitting(sizes(texts(1500)))[0] == 1000
    long = [text * 100 for text in texts(800)]
    fits, tokens = sender.fitting(sizes(long))
    assert fits < 800
    assert tokens == tokens_of(sender, long[:fits])
    margin = 320_000 / (sender.request_limits().tokens_per_request or 0)
    assert margin > 1.2  # nothing is known of the tokens yet
    assert tokens <= 320_000 / margin < tokens_of(sender, long[: fits + 1])


def test_a_text_longer_than_a_call_goes_alone(sender: Sender) -> None:
    assert sender.fitting(sizes(["word " * 2_000_000, "word"]))[0] == 1


def test_what_is_learned_cuts_what_is_sent_next(sender: Sender) -> None:
    many = [text * 50 for text in texts(700)]
    before = sender.fitting(sizes(many))[0]
    for _ in range(5):
        sender.learn(sizes(many[:50]), 3 * prior(many[:50]))
    assert 2.2 < before / sender.fitting(sizes(many))[0] < 3.0
    sender.too_large(sizes(many), None, Learned(tokens_per_minute=10_000, requests_per_minute=3))
    _, tokens = sender.fitting(sizes(many))
    assert 8_000 < tokens <= 10_000
    sender.too_large(sizes(many), None, Learned(texts_per_request=2))
    assert sender.fitting(sizes(many))[0] == 2


@given(st.integers(1, 5000), st.integers(1000, 10_000_000), st.integers(1, 64))
@settings(max_examples=30, deadline=None)
def test_no_more_waits_than_a_minute_takes(
    fresh: Callable[[], Path],
    run_folder: Callable[..., RunFolder],
    requests: int,
    tokens: int,
    most: int,
) -> None:
    limits = replace(
        LIMITS,
        requests_per_minute=requests,
        tokens_per_minute=tokens,
        tokens_per_request=min(tokens, 320_000),
    )
    one = Sender(Terms(Voyage("voyage-4", 256, limits), run_folder(fresh()), 0.06))
    ahead = one.ahead(most)
    assert 1 <= ahead <= max(1, min(most, requests))
    assert ahead <= max(1, -(-tokens // min(tokens, 320_000)))


def test_the_next_run_knows_what_this_one_has_learned(sender: Sender, tmp_path: Path) -> None:
    some = texts(60)
    truth = 2 * prior(some)
    sender.learn(sizes(some), truth)
    sender.save()
    later = load(str(tmp_path), "voyage", "voyage-4").estimate()
    assert later.counts(some).sum() == pytest.approx(truth, rel=0.05)
    other = load(str(tmp_path), "voyage", "voyage-4-lite").estimate()
    assert other.observations == 0
