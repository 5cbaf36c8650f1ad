"""Whatever needs a text, it is looked up once and paid for once."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import pyarrow as pa
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tasks.cache import Cache
from tasks.keys import NO_DOCUMENT, digest, hash_column, text_hash
from tasks.lookup import LookedUp, lookup
from tasks.providers.lexical import Lexical
from tasks.schemas import CHANGES, INDEXED, MISSES, TableRef

Ref = Callable[..., TableRef]
TOKENS = {text: 10**place for place, text in enumerate("abcdef")}


@dataclass
class Found:
    """The result of a lookup, with texts for hashes."""

    result: LookedUp
    misses: list[str]
    in_index: list[str]


def texts_of(hashes: Sequence[bytes]) -> list[str]:
    names = {text_hash(text): text for text in TOKENS}
    return [names[one] for one in hashes]


Look = Callable[..., Found]


@pytest.fixture(scope="session")
def look(
    ref: Ref, fresh: Callable[[], Path], lexical: Lexical, paid: Callable[..., pa.Table]
) -> Look:
    def run(
        changes: Sequence[tuple[str, str]],
        cached: str = "",
        unfolded: Sequence[str] = (),
        published: str = "",
        quarantined: str = "",
    ) -> Found:
        folder = fresh()
        cache = Cache(str(folder), lexical.space)
        if cached:
            cache.remember([paid(*cached)])
        rows = [
            {
                "key": digest(str(number).encode()),
                "document_key": NO_DOCUMENT,
                "text_hash": text_hash(text),
                "tokens": TOKENS[text],
                "change": change,
                "in_index": change != "added",
            }
            for number, (text, change) in enumerate(changes)
        ]
        index = [
            {
                "id": text,
                "key": digest(text.encode()),
                "document_key": NO_DOCUMENT,
                "text_hash": text_hash(text),
                "row_hash": NO_DOCUMENT,
            }
            for text in published
        ]
        journal = [hash_column([text_hash(text) for text in texts]) for texts in unfolded]
        refused = hash_column([text_hash(text) for text in quarantined])
        result = lookup(
            ref(CHANGES, rows),
            ref(INDEXED, index),
            cache,
            folder / "m.arrow",
            unfolded=journal,
            quarantined=refused,
        )
        misses = result.misses.load(MISSES)
        assert misses.column("tokens").to_pylist() == [
            TOKENS[text] for text in texts_of(misses.column("text_hash").to_pylist())
        ]
        return Found(
            result,
            texts_of(misses.column("text_hash").to_pylist()),
            texts_of(result.in_index.to_pylist()),
        )

    return run


def added(texts: str) -> list[tuple[str, str]]:
    return [(text, "added") for text in texts]


def test_a_text_that_many_rows_need_is_missed_once_in_corpus_order(look: Look) -> None:
    found = look([*added("cab"), ("a", "changed"), ("c", "moved"), ("d", "moved")])
    assert found.misses == ["c", "a", "b", "d"]
    assert (found.result.from_cache, found.result.cache_tokens) == (0, 0)


def test_a_text_in_the_cache_is_known(look: Look) -> None:
    found = look(added("abcb"), cached="bc")
    assert found.misses == ["a"]
    assert (found.result.from_cache, found.result.cache_tokens) == (2, 110)
    assert found.in_index == []


def test_a_text_in_an_answer_that_nobody_folded_is_known(look: Look) -> None:
    found = look(added("abc"), unfolded=["b", "", "cb"])
    assert found.misses == ["a"]
    assert found.result.from_cache == 2


def test_a_text_that_only_the_index_has_is_known_and_named(look: Look) -> None:
    found = look(added("abc"), cached="b", published="bc")
    assert found.misses == ["a"]
    assert found.in_index == ["c"]
    assert found.result.from_cache == 2


def test_a_row_of_other_lines_needs_its_vector_but_saves_nothing(look: Look) -> None:
    found = look([("a", "relined"), ("b", "relined"), ("b", "added")], published="ab")
    assert found.misses == []
    assert sorted(found.in_index) == ["a", "b"]
    assert (found.result.from_cache, found.result.cache_tokens) == (1, 10)


def test_nothing_changed_needs_nothing(look: Look) -> None:
    found = look([], cached="a", published="a")
    assert (found.misses, found.in_index, found.result.from_cache) == ([], [], 0)


@given(
    st.lists(
        st.tuples(st.sampled_from("abcdef"), st.sampled_from(["added", "changed", "moved"])),
        max_size=10,
    ),
    st.sets(st.sampled_from("abcdef"), max_size=3).map(sorted).map("".join),
    st.lists(st.sets(st.sampled_from("abcdef")).map(sorted).map("".join), max_size=2),
    st.sets(st.sampled_from("abcdef")).map(sorted).map("".join),
)
@settings(max_examples=30, deadline=None)
def test_each_needed_text_is_either_missed_or_known(
    look: Look,
    changes: list[tuple[str, str]],
    cached: str,
    unfolded: list[str],
    published: str,
) -> None:
    found = look(changes, cached, unfolded, published)
    needed = list(dict.fromkeys(text for text, _ in changes))
    known = {*cached, *"".join(unfolded), *published}
    assert found.misses == [text for text in needed if text not in known]
    assert found.result.from_cache == len(needed) - len(found.misses)
    assert set(found.in_index) == set(needed) & set(published) - {*cached, *"".join(unfolded)}


def test_a_refused_text_is_neither_missed_nor_known(look: Look) -> None:
    found = look(added("abcd"), cached="b", quarantined="abz")
    assert found.misses == ["c", "d"]
    assert texts_of(found.result.quarantined.to_pylist()) == ["a"]
    assert (found.result.from_cache, found.result.cache_tokens) == (1, 10)
