"""The budget of a run: what calls may still cost, whatever they are billed."""

import threading
from contextlib import ExitStack

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from tasks.budget import LOOK_S, Budget, usd_text

calls = st.lists(st.tuples(st.integers(1, 1000), st.none() | st.integers(0, 1000)), max_size=30)


@given(calls=calls, max_tokens=st.integers(1, 5000), price=st.floats(0.001, 10))
def test_what_is_left_is_what_no_call_has_taken(
    calls: list[tuple[int, int | None]], max_tokens: int, price: float
) -> None:
    budget, spent = Budget((max_tokens + 0.5) * price / 1e6, price), 0
    for estimated, billed in calls:
        with ExitStack() as stack:
            bill = stack.enter_context(budget.held(estimated))
            assert budget.tokens_left == max(0, max_tokens - spent - estimated)
            if billed is not None:  # else it was never made
                bill(billed)
                spent += billed
        assert budget.tokens_left == max(0, max_tokens - spent)


@given(
    counts=st.lists(st.integers(1, 100), max_size=20).map(lambda each: np.array(each, np.float64)),
    max_tokens=st.integers(0, 1000),
)
def test_it_affords_as_many_texts_as_there_are_tokens_for(
    counts: np.ndarray, max_tokens: int
) -> None:
    affords = Budget((max_tokens + 0.5) / 1e6, 1.0).affords(counts)
    assert counts[:affords].sum() <= max_tokens
    assert affords == len(counts) or counts[: affords + 1].sum() > max_tokens


def test_without_a_limit_or_a_price_all_is_afforded() -> None:
    many = np.full(10, 2.0**30)
    for budget in (Budget(None, 0.06), Budget(0.01, 0.0)):
        with budget.held(2**30):
            assert (budget.tokens_left, budget.affords(many)) == (None, 10)


def test_who_cannot_afford_a_call_waits_for_the_bills_of_others() -> None:
    budget, waited = Budget(1e-4, 1.0), list[bool]()
    assert not budget.wait_for_a_bill()
    with budget.held(100) as bill:
        assert budget.affords(np.array([60.0])) == 0
        thread = threading.Thread(target=lambda: waited.append(budget.wait_for_a_bill()))
        thread.start()
        thread.join(LOOK_S / 5)
        assert not waited  # no bill has come
        bill(40)
        thread.join()
        assert waited == [True]
        assert budget.affords(np.array([60.0])) == 1
    assert not budget.wait_for_a_bill()


@pytest.mark.parametrize(
    ("usd", "said"),
    [(0.0, "$0.0000"), (2e-5, "$0.000020"), (0.0123, "$0.0123"), (1234.5, "$1,234.5000")],
)
def test_a_price_is_never_rounded_to_nothing(usd: float, said: str) -> None:
    assert usd_text(usd) == said


def test_two_prices_that_are_compared_differ_in_words() -> None:
    assert (usd_text(0.01004, 0.01), usd_text(0.01, 0.01004)) == ("$0.01004", "$0.01000")
    assert (usd_text(1.0, 1.0), usd_text(2.0, 1.0)) == ("$1.0000", "$2.0000")
