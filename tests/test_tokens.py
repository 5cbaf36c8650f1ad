"""Token estimates: right in scale after one bill, right by kind after twenty, kept across runs."""

import json
import math
import pickle
import random
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

import lancedb
import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pytest
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import Tokenizer
from tokenizers.models import BPE
from tokenizers.pre_tokenizers import ByteLevel
from tokenizers.trainers import BpeTrainer

from tasks import tokens as tokens_module
from tasks.errors import SettingsError
from tasks.limits import Limits
from tasks.providers.lexical import Lexical
from tasks.tokens import (
    CALIBRATIONS,
    TABLE,
    Calibration,
    Estimate,
    TokenizerEstimate,
    load,
    save,
)

ANY = Limits(None, None, texts_per_request=1000, tokens_per_request=None, concurrency=2)
ANY_TEXT = st.text(st.characters(exclude_categories=()), max_size=60)
"""Lone surrogates included."""

ENGLISH = "the of and a to in is you that, it he was. for on are with information"
CODE = "def return self. (x, y) = {} [0] None\n    name_of != -> 42"
CYRILLIC = "съешь же ещё этих мягких французских булок, да выпей чаю"
CHINESE = "的一是不了 人我在有 他这为之。 大来以个中上们"
WORDS = {
    "english": ENGLISH.split(" "),
    "code": CODE.split(" "),
    "cyrillic": CYRILLIC.split(" "),
    "chinese": CHINESE.split(" "),
}
CHARACTERS_PER_TOKEN = {"english": 4.5, "code": 3.0, "cyrillic": 2.2, "chinese": 1.2}

Bill = Callable[[str, str], int]
Mix = Callable[[random.Random, int], Mapping[str, float]]


def by_bytes(surprise: float = 1.0) -> Bill:
    return lambda text, _: max(1, math.ceil(math.ceil(len(text.encode()) / 4.2) * surprise))


def by_script(text: str, kind: str) -> int:
    return max(1, math.ceil(len(text) / CHARACTERS_PER_TOKEN[kind]))


def noisy(text: str, kind: str) -> int:
    """As `by_script`, but each text is up to 40 % off, as real ones are."""
    return max(1, round(by_script(text, kind) * random.Random(text).uniform(0.6, 1.4)))


def only(kind: str) -> Mix:
    return lambda _, __: {kind: 1.0}


def at_random(*kinds: str) -> Mix:
    return lambda chance, _: {kind: chance.random() for kind in kinds}


def drifting(_: random.Random, number: int) -> dict[str, float]:
    """From English to Cyrillic, and Chinese that comes up half way."""
    part = number / 60
    return {
        "english": 1 - part,
        "code": 0.3,
        "cyrillic": part,
        "chinese": max(0.0, part - 0.5),
    }


THREE = at_random("english", "code", "cyrillic")
FOUR = at_random(*WORDS)


@dataclass
class Seen:
    """What was expected of a batch before it was billed, and whether the margin held."""

    error: float
    within_margin: bool


def batches(
    mix: Mix, bill: Bill, seed: int, count: int = 60, characters: tuple[int, int] = (20, 800)
) -> Iterator[tuple[list[str], int]]:
    chance = random.Random(seed)
    for number in range(1, count + 1):
        shares = mix(chance, number)
        kinds = chance.choices(list(shares), list(shares.values()), k=60)
        texts = [written(chance, kind, chance.randint(*characters)) for kind in kinds]
        yield texts, sum(map(bill, texts, kinds))


def sizes(texts: list[str]) -> npt.NDArray[np.int32]:
    return Estimate().sizes(pa.array(texts, pa.utf8()))


def written(chance: random.Random, kind: str, characters: int) -> str:
    words = chance.choices(WORDS[kind], k=characters // 3 + 1)
    return ("" if kind == "chinese" else " ").join(words)[:characters]


def rehearsed(
    calibration: Calibration,
    corpus: Iterator[tuple[list[str], int]],
    misreported: Mapping[int, float] | None = None,
) -> list[Seen]:
    """Estimate each batch, then learn its bill."""
    seen = []
    for number, (texts, billed) in enumerate(corpus, start=1):
        estimate = calibration.estimate()
        expected = int(estimate.counts(texts).sum())
        seen.append(Seen(abs(expected / billed - 1), billed <= expected * (1 + estimate.margin)))
        factor = 1.0 if misreported is None else misreported.get(number, 1.0)
        calibration.learn(sizes(texts), round(billed * factor))
    return seen


def fresh() -> Calibration:
    return Calibration("voyage", "voyage-4")


def taught(count: int = 12, mix: Mix = THREE, bill: Bill = by_script, seed: int = 5) -> Calibration:
    calibration = fresh()
    rehearsed(calibration, batches(mix, bill, seed, count))
    return calibration


# Learning


@pytest.mark.parametrize("kind", WORDS)
@pytest.mark.parametrize("surprise", [0.5, 3.0])
def test_one_bill_sets_the_scale_of_a_corpus_of_one_kind(kind: str, surprise: float) -> None:
    corpus = batches(
        only(kind), lambda text, own: round(by_script(text, own) * surprise) or 1, 1, 4
    )
    assert max(seen.error for seen in rehearsed(fresh(), corpus)[1:]) < 0.03


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize(
    ("mix", "bill", "characters", "allowed"),
    [
        pytest.param(FOUR, by_bytes(), (20, 800), 0.01, id="bytes"),
        pytest.param(FOUR, by_bytes(), (1, 40), 0.025, id="bytes of short texts"),
        pytest.param(FOUR, by_bytes(0.5), (20, 800), 0.01, id="half as many"),
        pytest.param(FOUR, by_bytes(0.5), (1, 40), 0.05, id="half as many, short"),
        pytest.param(FOUR, by_bytes(3.0), (20, 800), 0.01, id="three times as many"),
        pytest.param(THREE, by_script, (20, 800), 0.02, id="three scripts"),
        pytest.param(FOUR, by_script, (20, 800), 0.02, id="four scripts"),
        pytest.param(drifting, by_script, (20, 800), 0.03, id="drift"),
        pytest.param(THREE, lambda t, k: 10 + by_script(t, k), (20, 800), 0.02, id="a prompt"),
        pytest.param(FOUR, noisy, (20, 800), 0.10, id="noise"),
    ],
)
def test_after_twenty_bills_the_next_forty_are_foreseen(
    mix: Mix, bill: Bill, characters: tuple[int, int], allowed: float, seed: int
) -> None:
    seen = rehearsed(fresh(), batches(mix, bill, seed, characters=characters))[20:]
    assert max(one.error for one in seen) < allowed
    assert sum(not one.within_margin for one in seen) <= 2


@pytest.mark.parametrize("seed", range(3))
def test_a_bill_that_strays_moves_nothing_for_long(seed: int) -> None:
    wrong = {2: 5.0, 9: 0.15, 25: 8.0, 40: 0.1, 41: 6.0}
    seen = rehearsed(fresh(), batches(THREE, by_script, seed), wrong)
    assert max(one.error for one in seen[20:]) < 0.03


def test_batches_that_are_all_alike_say_nothing_of_their_parts() -> None:
    calibration, texts = fresh(), ["the same, 42 times", "и то же по-русски"]
    for billed in (30, 31, 29, 30, 30):
        calibration.learn(sizes(texts * 50), billed * 50)
    scaled = np.array(calibration.estimate().weights) / Estimate().weights
    assert scaled.max() < 1.3 * scaled.min()


def test_a_kind_that_was_never_seen_is_scaled_like_the_rest() -> None:
    calibration = taught(mix=only("english"), bill=by_bytes(3.0))
    expected, before = calibration.estimate(), Estimate()
    english, chinese = WORDS["english"][7] * 90, WORDS["chinese"][0] * 90
    scale = expected.count(english) / before.count(english)
    assert expected.count(chinese) == pytest.approx(before.count(chinese) * scale, rel=0.25)


def test_no_weight_is_below_zero_whatever_is_billed() -> None:
    chance, calibration = random.Random(3), fresh()
    for texts, _ in batches(FOUR, by_script, 3, 30, (1, 60)):
        calibration.learn(sizes(texts), chance.randint(1, 9000))
        estimate = calibration.estimate()
        assert min(estimate.weights) > 0
        assert math.isfinite(estimate.margin)


def test_the_margin_is_wide_at_first_and_as_narrow_as_the_bills_allow() -> None:
    assert Estimate().margin == fresh().estimate().margin == 0.3
    exact, strayed = taught(60).estimate().margin, taught(60, bill=noisy).estimate().margin
    assert 0.02 <= exact < 0.025
    assert 2 * exact < strayed < 0.2
    assert 0.1 < taught(1).estimate().margin < 0.3


def test_a_bill_of_nothing_teaches_nothing() -> None:
    calibration = fresh()
    before = calibration.estimate()
    calibration.learn(sizes(["text"]), 0)
    calibration.learn(sizes([]), 7)
    assert calibration.estimate() is before
    assert before == Estimate()


def test_a_refusal_that_names_the_count_teaches_as_a_bill_does() -> None:
    billed, refused = fresh(), fresh()
    texts = ["some text of a batch that is too large"] * 90
    billed.learn(sizes(texts), 1234)
    refused.too_large(sizes(texts), 1234)
    assert billed.estimate() == refused.estimate()
    assert refused.estimate().counts(texts).sum() == pytest.approx(1234, rel=0.05)


def test_batches_of_a_single_text_stray_and_say_little() -> None:
    calibration, chance = taught(20), random.Random(2)
    margin = calibration.estimate().margin
    for _ in range(20):
        calibration.learn(sizes(["a text of a batch"]), chance.choice([2, 12]))
    assert calibration.estimate().margin < 2 * margin


def test_many_threads_learn_at_once() -> None:
    calibration = fresh()
    corpus = list(batches(THREE, by_script, 1, 40, (5, 50)))

    def work(part: int) -> None:
        for texts, billed in corpus[part::4]:
            calibration.learn(sizes(texts), billed)
            calibration.estimate()

    threads = [threading.Thread(target=work, args=(part,)) for part in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert calibration.estimate().observations == 40
    assert calibration.learned()[1] == 40


# Counting


@given(st.lists(ANY_TEXT, max_size=12))
def test_counting_many_is_counting_each(texts: list[str]) -> None:
    estimate = Estimate(weights=(0.21, 0.7, 0.13, 0.66, 0.8, 0.47, 0.9, 1.9, 0.37))
    counts = estimate.counts(texts)
    assert counts.dtype == np.int32
    assert counts.tolist() == [estimate.count(text) for text in texts]
    assert all(counts >= 1)


@pytest.mark.parametrize("texts", [["the", "съешь 語😀", ""], ["plain", "\x00"], []])
def test_sizes_say_the_same_once_more(texts: list[str], tokenizer: Path) -> None:
    """Also of a slice, and with other weights than when they were taken."""
    column = pa.array(["before", *texts, "after"], pa.utf8()).slice(1, len(texts))
    for estimate in (Estimate(), Lexical(256, ANY), TokenizerEstimate(str(tokenizer))):
        sizes = estimate.sizes(column)
        assert sizes.dtype == np.int32
        assert estimate.of_sizes(sizes).tolist() == estimate.counts(texts).tolist()
    later = Estimate(weights=(0.2, 0.1, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 3.0))
    assert later.of_sizes(Estimate().sizes(column)).tolist() == later.counts(texts).tolist()
    assert later.measure == Estimate().measure


def test_more_texts_than_are_counted_at_once_keep_their_order() -> None:
    estimate, texts = Estimate(), ["x" * (number % 97) for number in range(1001)]
    assert estimate.counts(texts).tolist() == [estimate.count(text) for text in texts]


@pytest.mark.parametrize(
    ("character", "kind"),
    [
        *[("q", 0), ("7", 1), ("\t", 2), ("\x00", 2), ("{", 3), ("é", 4), ("ő", 4)],
        *[("ж", 5), ("λ", 5), ("ع", 5), ("ש", 5), ("語", 6), ("カ", 6), ("한", 6), ("ไ", 6)],
        *[("→", 7), ("😀", 7), ("\ud800", 6)],
    ],
)
def test_a_character_counts_by_its_kind(character: str, kind: int) -> None:
    weights = tuple(3.0 if position == kind else 0.0 for position in range(9))
    assert Estimate(weights).count(character * 5) == 15


def test_an_estimate_is_a_value() -> None:
    estimate = taught().estimate()
    assert pickle.loads(pickle.dumps(estimate)) == estimate  # noqa: S301 - our own bytes
    assert hash(estimate) == hash(pickle.loads(pickle.dumps(estimate)))  # noqa: S301


# Across runs


def table_of(folder: Path) -> pa.Table:
    return lancedb.connect(folder).open_table(TABLE).to_arrow()


def loaded(folder: Path) -> Calibration:
    return load(str(folder), "voyage", "voyage-4")


def test_the_next_run_begins_with_what_the_last_one_knew(tmp_path: Path) -> None:
    save(str(tmp_path), "first", taught(30))
    calibration = loaded(tmp_path)
    assert calibration.estimate().observations == 30
    assert calibration.estimate().margin < 0.04
    seen = rehearsed(calibration, batches(THREE, by_script, 8, 20))
    assert max(one.error for one in seen) < 0.03


def test_a_run_keeps_only_what_it_learned_and_only_once(tmp_path: Path) -> None:
    save(str(tmp_path), "first", taught(12))
    second = loaded(tmp_path)
    save(str(tmp_path), "second", second)
    assert table_of(tmp_path).num_rows == 1
    rehearsed(second, batches(THREE, by_script, 9, 4))
    save(str(tmp_path), "second", second)
    rehearsed(second, batches(THREE, by_script, 10, 3))
    save(str(tmp_path), "second", second)
    rows = table_of(tmp_path).sort_by("run_id").to_pylist()
    assert [(row["run_id"], row["observations"]) for row in rows] == [("first", 12), ("second", 7)]
    assert loaded(tmp_path).estimate().observations == 19


def test_nothing_learned_leaves_no_trace(tmp_path: Path) -> None:
    save(str(tmp_path), "run", fresh())
    assert list(tmp_path.iterdir()) == []
    assert loaded(tmp_path).estimate() == Estimate()


def test_models_do_not_learn_from_each_other(tmp_path: Path) -> None:
    save(str(tmp_path), "run", taught())
    assert load(str(tmp_path), "voyage", "voyage-code-3").estimate() == Estimate()
    other = load(str(tmp_path), "it's", "voyage-4")
    assert other.estimate() == Estimate()
    other.learn(sizes(["text"]), 3)
    save(str(tmp_path), "run", other)
    assert loaded(tmp_path).estimate().observations == 12


def test_runs_that_end_at_once_do_not_lose_each_other(tmp_path: Path) -> None:
    calibrations = [taught(3, seed=seed) for seed in range(5)]
    threads = [
        threading.Thread(target=save, args=(str(tmp_path), f"run-{number % 5}", calibration))
        for number, calibration in enumerate(calibrations * 2)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted(table_of(tmp_path)["run_id"].to_pylist()) == [f"run-{n}" for n in range(5)]
    assert loaded(tmp_path).estimate().observations == 15


def test_a_tokenizer_that_changed_is_learned_anew_within_a_few_batches(tmp_path: Path) -> None:
    save(str(tmp_path), "first", taught(60))
    calibration = loaded(tmp_path)
    seen = rehearsed(calibration, batches(THREE, lambda t, k: 3 * by_script(t, k), 4, 20))
    assert seen[0].error > 0.5
    assert max(one.error for one in seen[5:]) < 0.03


def test_a_tokenizer_that_changed_for_some_scripts_is_learned_in_a_run(tmp_path: Path) -> None:
    for run in range(4):
        save(str(tmp_path), f"run-{run}", taught(60, mix=FOUR, bill=by_bytes()))
    seen = rehearsed(loaded(tmp_path), batches(FOUR, by_script, 4))
    assert max(one.error for one in seen[40:]) < 0.06


def test_what_earlier_runs_agreed_on_outweighs_one_bill_that_strays(tmp_path: Path) -> None:
    save(str(tmp_path), "first", taught(30))
    calibration, text = loaded(tmp_path), "the same text " * 40
    before = calibration.estimate().count(text)
    calibration.learn(sizes([text] * 50), before * 50 * 5)
    assert calibration.estimate().count(text) == pytest.approx(before, rel=0.05)
    assert calibration.estimate().margin > loaded(tmp_path).estimate().margin


def test_only_the_newest_runs_are_heard(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tokens_module, "_RUNS", 2)
    for number, count in enumerate([7, 3, 2]):
        save(str(tmp_path), f"run-{number}", taught(count, seed=number))
    assert loaded(tmp_path).estimate().observations == 5


def changed(sums: object, **stored: object) -> str:
    return json.dumps({"prior": list(Estimate().weights), "sums": sums, **stored})


@pytest.mark.parametrize(
    "damaged",
    [
        "",
        "[]",
        "{}",
        "not json",
        changed([]),
        changed([[1.0] * 9] * 9),
        changed([[0.0] * 10] * 10),
        changed([[math.nan] * 10] * 10),
        changed((-np.eye(10)).tolist()),
        changed((2 * np.eye(10) - 0.1).tolist()),
        changed([[1.0] * row + [3.0] * (10 - row) for row in range(10)]),
        changed((np.ones((10, 10)) - np.eye(10)).tolist()),
        changed([[1.0] * 10] * 10, prior=[1.0] * 9),
        changed([["x"] * 10] * 10),
    ],
)
def test_a_damaged_row_is_passed_over(tmp_path: Path, damaged: str) -> None:
    save(str(tmp_path), "sound", taught(12))
    alone = loaded(tmp_path).estimate()
    row = {"key": "voyage/voyage-4", "run_id": "damaged", "observations": 5, "sums": damaged}
    row |= {"tokens_per_character": "", "updated_at": "9999"}
    table = lancedb.connect(tmp_path).open_table(TABLE)
    table.add(pa.Table.from_pylist([row], schema=CALIBRATIONS))
    assert loaded(tmp_path).estimate() == alone


def test_the_table_is_read_without_pandas(tmp_path: Path) -> None:
    save(str(tmp_path), "run", taught(2))
    # LanceDB imports pandas itself where it finds it, so here it does not.
    code = (
        "import sys\n"
        "class NoPandas:\n"
        "    def find_spec(self, name, path=None, target=None):\n"
        "        if name == 'pandas': raise ModuleNotFoundError(name)\n"
        "sys.meta_path.insert(0, NoPandas())\n"
        "from tasks.tokens import load\n"
        f"known = load({str(tmp_path)!r}, 'voyage', 'voyage-4')\n"
        "assert known.estimate().observations == 2\n"
        "sys.exit('tokenizers' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_the_table_says_in_words_what_was_learned(tmp_path: Path) -> None:
    calibration = taught(20, mix=only("chinese"))
    save(str(tmp_path), "run", calibration)
    (row,) = table_of(tmp_path).to_pylist()
    assert row["key"] == "voyage/voyage-4"
    found = json.loads(row["tokens_per_character"])
    assert tuple(found.values()) == calibration.estimate().weights
    assert found["ideograph"] == pytest.approx(1 / 1.2, rel=0.1)


# A tokenizer of one's own


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small real one, that cuts texts short and fills them up if it is let."""
    made = Tokenizer(BPE())
    made.pre_tokenizer = ByteLevel(add_prefix_space=False)
    alphabet = ByteLevel.alphabet()
    trainer = BpeTrainer(vocab_size=400, show_progress=False, initial_alphabet=alphabet)
    made.train_from_iterator([" ".join(WORDS["english"])] * 20, trainer)
    made.enable_truncation(8)
    made.enable_padding(length=8)
    path = tmp_path_factory.mktemp("tokenizer") / "tokenizer.json"
    made.save(str(path))
    return path


def test_a_tokenizer_counts_its_own_tokens(tokenizer: Path) -> None:
    estimate, library = TokenizerEstimate(str(tokenizer)), Tokenizer.from_file(str(tokenizer))
    library.no_truncation()
    library.no_padding()
    texts = ["the information", "zzz", "съешь", "that, " * 90, "the"]
    exact = [len(library.encode(text).ids) for text in texts]
    assert max(exact) > 8 > min(exact)
    assert estimate.counts(texts).tolist() == exact
    assert estimate.counts(texts).dtype == np.int32
    assert [estimate.count(text) for text in texts] == exact
    assert estimate.margin == 0.02


def test_another_tokenizer_has_another_measure(tokenizer: Path, tmp_path: Path) -> None:
    other = tmp_path / "tokenizer.json"
    Tokenizer(BPE()).save(str(other))
    assert TokenizerEstimate(str(other)).measure != TokenizerEstimate(str(tokenizer)).measure


def test_a_tokenizer_takes_any_text(tokenizer: Path) -> None:
    estimate = TokenizerEstimate(str(tokenizer))
    assert estimate.counts(["", "a\ud800b", "\x00"]).min() == 1
    assert estimate.counts([]).tolist() == []


def test_a_tokenizer_travels_as_its_path(tokenizer: Path) -> None:
    estimate = TokenizerEstimate(str(tokenizer))
    estimate.count("load it")
    pickled = pickle.dumps(estimate)
    assert len(pickled) < 500
    assert pickle.loads(pickled) == estimate  # noqa: S301 - our own bytes


@pytest.mark.parametrize("content", [None, b"", b"{}", b"\xff\xfe", b'{"model": 3}'])
def test_a_file_that_holds_no_tokenizer_is_a_wrong_setting(
    tmp_path: Path, content: bytes | None
) -> None:
    path = tmp_path / "tokenizer.json"
    if content is not None:
        path.write_bytes(content)
    estimate = TokenizerEstimate(str(path))
    with pytest.raises(SettingsError, match=r"tokenizer\.json.*embedding\.tokenizer"):
        estimate.count("text")
