"""lexical: a vector is a unit vector, made of the text's words and of nothing else."""

import hashlib
import itertools
import os
import pickle
import subprocess
import sys
import unicodedata
from random import Random

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from tasks.limits import Limits
from tasks.providers import Provider, Vectors, checked_vectors
from tasks.providers.lexical import STOP_WORDS, Lexical, words

LIMITS = Limits(None, None, 1000, 120_000, 8)
ANY_TEXT = st.text(st.characters(codec=None, exclude_categories=[]), max_size=80)
"""Any characters, lone surrogates and unassigned ones too."""

MIXED = ["def readLines(path): return open(path)", "Ёлка и снег", "東京タワー", "🚀 2", "?!", ""]


def lexical(dimension: int = 1024) -> Provider:
    return Lexical(dimension, LIMITS)


def vectors(*texts: str, dimension: int = 1024) -> Vectors:
    provider = lexical(dimension)
    return checked_vectors(provider.embed(texts), len(texts), provider)


def likeness(one: str, other: str) -> float:
    first, second = vectors(one, other)
    return float(first @ second)


@given(st.lists(ANY_TEXT, max_size=8), st.sampled_from([64, 100, 1024]))
@example(["", " ", "\n", "!", "the", "a", "\ud800", "\0", "\ufe0f", "\u0301", "٣", "々", "ß"], 64)
@settings(max_examples=300, deadline=None)
def test_any_text_has_a_unit_vector(texts: list[str], dimension: int) -> None:
    found = vectors(*texts, dimension=dimension)
    assert found.shape == (len(texts), dimension)
    assert np.linalg.norm(found, axis=1) == pytest.approx(np.ones(len(texts)), abs=1e-6)


@given(st.lists(ANY_TEXT, min_size=1, max_size=8), st.randoms())
@settings(max_examples=200, deadline=None)
def test_a_vector_is_the_same_in_any_company(texts: list[str], order: Random) -> None:
    together = vectors(*texts)
    shuffled = list(range(len(texts)))
    order.shuffle(shuffled)
    assert np.array_equal(vectors(*[texts[i] for i in shuffled]), together[shuffled])
    assert np.array_equal(np.concatenate([vectors(text) for text in texts]), together)


def test_rows_follow_their_texts_beyond_one_block() -> None:
    texts = [f"chunk {number} of file{number % 7}" for number in range(700)]
    assert np.array_equal(vectors(*texts)[::-1], vectors(*reversed(texts)))


def test_another_process_makes_the_same_bytes() -> None:
    program = (
        "import sys; from tasks.limits import Limits; from tasks.providers.lexical import Lexical\n"
        "limits = Limits(None, None, 1000, 120000, 8)\n"
        f"sys.stdout.buffer.write(Lexical(1024, limits).embed({MIXED!a}).vectors.tobytes())"
    )
    bytes_there = subprocess.run(
        [sys.executable, "-c", program],
        env={**os.environ, "PYTHONHASHSEED": "4711", "PYTHONPATH": os.pathsep.join(sys.path)},
        capture_output=True,
        check=True,
    ).stdout
    assert bytes_there == vectors(*MIXED).tobytes()


def test_the_recipe_has_not_changed_unnoticed() -> None:
    """Where this fails, RECIPE needs another name: stored vectors no longer fit."""
    row = vectors("parse parse HTTP headers", dimension=64)[0]
    found = {int(slot): round(float(row[slot]), 4) for slot in np.flatnonzero(row)}
    assert lexical().space.preparation == "words-1"
    assert found == {5: -0.7462, 16: 0.4708, 63: -0.4708}
    everything = vectors(*MIXED, *sorted(STOP_WORDS)).astype("<f4").tobytes()
    assert hashlib.blake2b(everything, digest_size=8).hexdigest() == "0c014f4946132fdc"


def test_identifiers_are_the_words_they_are_made_of() -> None:
    assert words("parseHTTPHeader") == ["parse", "HTTP", "Header"]
    assert likeness("parseHTTPHeader", "parse_http_header") == pytest.approx(1)
    assert likeness("MAX_RETRY_DELAY2", "max retry delay 2") == pytest.approx(1)


def test_other_characters_leave_the_ascii_words_as_they_are() -> None:
    text = "def parseHTTPHeader(line2, URLPath='x'): return is_OK or 42"
    assert words(f"{text} —") == words(text)
    assert words(text.replace(" ", "—")) == words(text)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("новаяФункция_и ЙОД", ["новая", "Функция", "и", "ЙОД"]),
        ("Zürcher Straße, café", ["Zürcher", "Straße", "café"]),
        ("كتاب جديد", ["كتاب", "جديد"]),
        ("हिन्दी में", ["हिन्दी", "में"]),
        ("東京都", ["東", "京", "都", "東京", "京都"]),
        ("v2を使う", ["v", "2", "を", "使", "う", "を使", "使う"]),
        ("파일 열기", ["파", "일", "파일", "열", "기", "열기"]),
        ("ภาษา", ["ภ", "า", "ษ", "า", "ภา", "าษ", "ษา"]),
        ("go 🚀🎉", ["go", "🚀", "🎉"]),
        ("\uff21\uff22\uff23 \uff11\uff12", ["ABC", "12"]),
        ("ﬁle", ["file"]),
    ],
)
def test_words_are_found_in_any_script(text: str, expected: list[str]) -> None:
    assert sorted(words(text)) == sorted(expected)


def test_composed_and_decomposed_accents_are_one() -> None:
    assert likeness("Café Zürich", unicodedata.normalize("NFD", "Café Zürich")) == pytest.approx(1)


@pytest.mark.parametrize(
    ("query", "related", "unrelated"),
    [
        ("open a file", "def openFile(path): ...", "class Socket: def connect(self): ..."),
        ("чтение файла", "Чтение большого файла по строкам", "Отправка письма по почте"),
        ("文件读取", "如何读取一个大文件", "今天天气很好"),
        ("ファイルを読む", "大きなファイルの読み方", "明日は雨が降る"),
        ("قراءة الملف", "قراءة الملف سطرا سطرا", "الطقس جميل اليوم"),
        ("파일 읽기", "큰 파일을 읽기", "오늘 날씨가 좋다"),
        ("🚀 launch", "The 🚀 went up", "A 🐟 in the sea"),
        ("to be or not to be", "To be, or not to be!", "so it was then"),
        ("=> !=", "!= ==", "{}"),
    ],
    ids=["code", "russian", "chinese", "japanese", "arabic", "korean", "emoji", "stop", "signs"],
)
def test_related_texts_are_nearer_than_unrelated_ones(
    query: str, related: str, unrelated: str
) -> None:
    assert likeness(query, related) > likeness(query, unrelated) + 0.2


def test_texts_without_words_that_count_differ() -> None:
    texts = ["", " ", "!", "!!", "?", "?!", "!?", "the", "The", "the a", "...", "\ud800", "\ud801"]
    assert len(np.unique(vectors(*texts), axis=0)) == len(texts)


def test_texts_of_many_scripts_differ() -> None:
    texts = [
        "снег",
        "снеги",
        "雪",
        "雪花",
        "ثلج",
        "ثلوج",
        "❄️",
        "🎉",
        "snow",
        "snows",
        "chunk 1",
        "chunk 2",
    ]
    assert len(np.unique(vectors(*texts), axis=0)) == len(texts)


def test_words_that_cancel_each_other_out_still_make_a_vector() -> None:
    """With one slot, words of unlike signs leave nothing."""
    names = ["tree", "river", "stone", "bird", "fox", "moon", "sand", "wolf", "leaf", "rain"]
    assert len(np.unique(vectors(*names, dimension=1))) == 2
    pairs = [f"{one} {other}" for one, other in itertools.combinations(names, 2)]
    assert np.array_equal(np.abs(vectors(*pairs, dimension=1)), np.ones((len(pairs), 1)))


def test_common_words_and_single_letters_do_not_count() -> None:
    assert likeness("the index of a table", "index table x") == pytest.approx(1)
    assert all(word == word.casefold() for word in STOP_WORDS)


def test_repeating_a_word_adds_less_each_time() -> None:
    once, twice, often = (likeness("index", f"table{' index' * n}") for n in (1, 2, 50))
    assert once < twice < often < 0.99


@given(ANY_TEXT)
def test_a_text_counts_a_quarter_of_its_bytes(text: str) -> None:
    size = len(text.encode("utf-8", "surrogatepass"))
    assert lexical().estimate.count(text) == max(1, (size + 3) // 4)


def test_an_answer_bills_what_was_counted() -> None:
    assert lexical().embed(["", "abcd", "abcde"]).billed_tokens == 1 + 1 + 2


def test_each_dimension_and_recipe_is_a_space_of_its_own() -> None:
    assert lexical(64).space.id != lexical(65).space.id
    assert str(lexical(64).space) == "lexical/lexical, 64 float"


def test_the_provider_is_a_value() -> None:
    assert pickle.loads(pickle.dumps(lexical())) == lexical()  # noqa: S301 - our own bytes


def test_a_long_word_is_not_kept_in_memory() -> None:
    from tasks.providers import lexical as module  # noqa: PLC0415

    vectors("x" * 1_000_000)
    assert max(map(len, module._codes)) < 100  # noqa: SLF001
