"""What a plan knows of a local model: from its small files alone, wherever they lie."""

import json
import os
import random
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from tokenizers import Tokenizer, models, pre_tokenizers, processors

from tasks.catalog import facts_for
from tasks.errors import SettingsError
from tasks.form import Overrides
from tasks.params import Config, load_config
from tasks.plan import make_plan, plan_rows
from tasks.providers.model_folder import read_model
from tasks.providers.opening import open_embedder, open_provider
from tasks.providers.sentence_transformers import SentenceTransformers

PROJECT = Path(__file__).parents[1]
TRANSFORMER = {"idx": 0, "path": "", "type": "sentence_transformers.models.Transformer"}
POOLING = {"idx": 1, "path": "1_Pooling", "type": "sentence_transformers.models.Pooling"}
DENSE = {"idx": 2, "path": "2_Dense", "type": "sentence_transformers.base.modules.Dense"}
NORMALIZE = {"idx": 3, "path": "3_Normalize", "type": "sentence_transformers.models.Normalize"}
STATIC = {"idx": 0, "path": "", "type": "sentence_transformers.models.StaticEmbedding"}
COMMIT = "c0ffee00c0ffee00c0ffee00c0ffee00c0ffee00"

MODEL: dict[str, Any] = {
    "modules.json": [TRANSFORMER, POOLING, NORMALIZE],
    "config.json": {"hidden_size": 32, "max_position_embeddings": 512},
    "sentence_bert_config.json": {"max_seq_length": 8},
    "config_sentence_transformers.json": {"prompts": {"query": "ask: ", "document": "say: "}},
    "1_Pooling/config.json": {"word_embedding_dimension": 32, "pooling_mode_mean_tokens": True},
}


def write_model(folder: Path, files: dict[str, Any] = MODEL, weights: bytes = b"w" * 100) -> Path:
    """A folder like that of a model, whose weights no library could read."""
    for name, content in files.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(json.dumps(content), encoding="utf-8")
    words = {"?": 0, "[CLS]": 1, "[SEP]": 2}
    tokenizer = Tokenizer(models.WordLevel(words, "?"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]", special_tokens=[("[CLS]", 1), ("[SEP]", 2)]
    )
    tokenizer.save(str(folder / "tokenizer.json"))
    (folder / "model.safetensors").write_bytes(weights)
    return folder


@pytest.fixture
def model(tmp_path: Path) -> Path:
    return write_model(tmp_path / "models" / "tiny")


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The hub's cache on this machine, with the model owner/tiny in it and no way to the hub."""
    from huggingface_hub import constants  # noqa: PLC0415 - read from the environment at import

    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setenv("SENTENCE_TRANSFORMERS_HOME", str(tmp_path / "hub"))
    cached = tmp_path / "hub" / "models--owner--tiny"
    write_model(cached / "snapshots" / COMMIT)
    (cached / "refs").mkdir()
    (cached / "refs" / "main").write_text(COMMIT, encoding="utf-8")
    return tmp_path / "hub"


Configure = Callable[..., Config]


@pytest.fixture
def configured(tmp_path: Path) -> Configure:
    """A config of this provider, with further keys of `embedding`, read from its file."""

    def configure(model: str | Path | None, *settings: str, **embedding: Any) -> Config:
        (tmp_path / "corpus").mkdir(exist_ok=True)
        (tmp_path / "corpus" / "a.md").write_text("one two three four five", encoding="utf-8")
        named = {} if model is None else {"model": str(model)}
        values = {
            "name": "local",
            "source": {"kind": "files", "path": "./corpus"},
            "embedding": {"provider": "sentence-transformers", **named, **embedding},
            "index": {"uri": "./index", "table": "t"},
            "state": {"uri": "./state"},
        }
        (tmp_path / "local.yaml").write_text(json.dumps(values), encoding="utf-8")
        return load_config(tmp_path / "local.yaml", settings)

    return configure


def provider_of(config: Config) -> SentenceTransformers:
    provider = open_provider(config)
    assert isinstance(provider, SentenceTransformers)
    return provider


@pytest.mark.parametrize(
    ("files", "dimension"),
    [
        ({}, 32),
        ({"1_Pooling/config.json": {"embedding_dimension": 48, "pooling_mode": "cls"}}, 48),
        (
            {"1_Pooling/config.json": {"embedding_dimension": 48, "pooling_mode": ["cls", "max"]}},
            96,
        ),
        (
            {
                "1_Pooling/config.json": {
                    "word_embedding_dimension": 32,
                    "pooling_mode_mean_tokens": True,
                    "pooling_mode_max_tokens": True,
                    "pooling_mode_cls_token": False,
                }
            },
            64,
        ),
        (
            {
                "modules.json": [TRANSFORMER, POOLING, DENSE, NORMALIZE],
                "2_Dense/config.json": {"in_features": 32, "out_features": 16},
            },
            16,
        ),
        ({"config_sentence_transformers.json": {"truncate_dim": 24}}, 24),
        ({"modules.json": [TRANSFORMER]}, 32),
        ({"modules.json": [STATIC]}, None),
    ],
)
def test_the_length_of_vectors_is_that_of_the_last_part(
    tmp_path: Path, files: dict[str, Any], dimension: int | None
) -> None:
    assert read_model(str(write_model(tmp_path / "m", MODEL | files))).dimension == dimension


def test_a_plain_transformer_is_a_model_too(tmp_path: Path) -> None:
    folder = write_model(tmp_path / "m", {"config.json": MODEL["config.json"]})
    found = read_model(str(folder))
    assert (found.dimension, found.longest) == (32, 512)


@pytest.mark.parametrize(
    ("files", "longest"),
    [
        ({}, 8),
        ({"sentence_bert_config.json": {"max_seq_length": None}}, 512),
        (
            {
                "sentence_bert_config.json": {},
                "tokenizer_config.json": {"model_max_length": 128},
            },
            128,
        ),
        (
            {
                "sentence_bert_config.json": {},
                "config.json": {"hidden_size": 32},
                "tokenizer_config.json": {"model_max_length": 10**30},
            },
            None,
        ),
    ],
)
def test_the_longest_text_is_what_the_library_cuts_at(
    tmp_path: Path, files: dict[str, Any], longest: int | None
) -> None:
    assert read_model(str(write_model(tmp_path / "m", MODEL | files))).longest == longest


@pytest.mark.parametrize(
    ("said", "document", "query"),
    [
        ({"prompts": {"query": "q: ", "document": "d: "}}, "d: ", "q: "),
        ({"prompts": {"query": "q: ", "passage": "p: "}}, "p: ", "q: "),
        ({"prompts": {"query": "q: ", "document": ""}}, "", "q: "),
        ({"prompts": {"x": "x: "}, "default_prompt_name": "x"}, "x: ", "x: "),
        ({"prompts": {"query": "q: ", "x": "x: "}, "default_prompt_name": "x"}, "x: ", "q: "),
        ({"prompts": {"query": None}, "default_prompt_name": None}, "", ""),
        ({}, "", ""),
    ],
)
def test_prompts_are_those_of_the_models_makers(
    tmp_path: Path, said: dict[str, Any], document: str, query: str
) -> None:
    files = MODEL | {"config_sentence_transformers.json": said}
    found = read_model(str(write_model(tmp_path / "m", files)))
    assert (found.document_prompt, found.query_prompt) == (document, query)


def test_a_moved_folder_is_the_same_model(tmp_path: Path) -> None:
    large = random.Random(1).randbytes(20_000_000)
    before = read_model(str(write_model(tmp_path / "here" / "m", weights=large)))
    shutil.copytree(tmp_path / "here" / "m", tmp_path / "there" / "m")
    after = read_model(str(tmp_path / "there" / "m"))
    assert (after.name, after.revision) == (before.name, before.revision)


@pytest.mark.slow
def test_other_weights_of_the_same_length_are_another_model(tmp_path: Path) -> None:
    folder = tmp_path / "m"
    large = random.Random(1).randbytes(20_000_000)
    before = read_model(str(write_model(folder, weights=large)))
    trained = bytes(byte ^ 1 if at % 100 < 30 else byte for at, byte in enumerate(large))
    after = read_model(str(write_model(folder, weights=trained)))
    assert after.revision != before.revision


@pytest.mark.parametrize(
    ("file", "counts"),
    [
        ("1_Pooling/config.json", True),
        ("vocab.txt", True),
        ("pytorch_model.bin", True),
        ("onnx/model.onnx", True),
        ("openvino/openvino_model.bin", False),
        ("README.md", False),
        (".cache/x.json", False),
    ],
)
def test_a_file_counts_that_decides_about_vectors(model: Path, file: str, counts: bool) -> None:
    before = read_model(str(model), "onnx")
    (model / file).parent.mkdir(exist_ok=True)
    (model / file).write_text('{"word_embedding_dimension": 32}', encoding="utf-8")
    assert (read_model(str(model), "onnx").revision != before.revision) is counts


def test_a_model_in_the_hubs_cache_is_found_without_the_hub(hub: Path) -> None:
    found = read_model("owner/tiny")
    assert (found.source, found.name, found.revision) == ("owner/tiny", "owner/tiny", COMMIT)
    assert (found.dimension, found.longest, found.on_hub) == (32, 8, True)


def test_a_model_of_the_hub_can_be_held_to_a_commit(hub: Path) -> None:
    shutil.copytree(
        hub / "models--owner--tiny/snapshots" / COMMIT,
        hub / "models--owner--tiny/snapshots" / ("0" * 40),
    )
    assert read_model(f"owner/tiny@{'0' * 40}").revision == "0" * 40
    assert read_model("owner/tiny").revision == COMMIT


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("owner/large", "not in the hub's cache"),
        ("large", "not in the hub's cache"),
        ("a/b/c", "no name that a model on the Hugging Face hub can have"),
    ],
)
def test_a_model_that_is_nowhere_is_named(hub: Path, name: str, said: str) -> None:
    with pytest.raises(SettingsError, match=said) as caught:
        read_model(name)
    assert repr(name) in str(caught.value)


def test_a_folder_that_is_not_there_or_holds_no_model_is_named(tmp_path: Path) -> None:
    with pytest.raises(SettingsError, match="there is no folder"):
        read_model(str(tmp_path / "none"))
    with pytest.raises(SettingsError, match=r"neither modules.json nor config.json"):
        read_model(str(tmp_path))


@pytest.mark.parametrize("content", ["{", "[]", '[{"type": 1, "path": ""}, 7]'])
def test_a_damaged_file_of_a_model_is_named(model: Path, content: str) -> None:
    name = "modules.json" if "type" in content else "config_sentence_transformers.json"
    (model / name).write_text(content, encoding="utf-8")
    with pytest.raises(SettingsError, match=name):
        read_model(str(model))


def test_a_folder_is_resolved_like_other_paths(
    configured: Configure, model: Path, hub: Path, tmp_path: Path
) -> None:
    for name in ("models/tiny", "./models/tiny", str(model)):
        assert configured(name).embedding.model == str(model)
    assert configured("./elsewhere").embedding.model == str(tmp_path / "elsewhere")
    assert configured("owner/tiny").embedding.model == "owner/tiny"


def test_the_space_is_made_of_model_files_prompt_backend_and_precision(
    configured: Configure, model: Path, tmp_path: Path
) -> None:
    space = provider_of(configured(model)).space
    assert space.truncation
    assert space.dimension == 32
    others = [
        provider_of(configured(model, **other)).space
        for other in (
            {"backend": "openvino"},
            {"backend": "onnx"},
            {"precision": "bfloat16"},
            {"precision": "float32"},
            {"dimension": 16},
            {"input_type": None},
        )
    ]
    others.append(provider_of(configured(model)).for_queries().space)
    assert len({space.id, *(other.id for other in others)}) == 1 + len(others)
    assert provider_of(configured(model, device="cuda:1")).space == space
    shutil.move(model, tmp_path / "tiny")
    assert provider_of(configured(tmp_path / "tiny")).space == space
    write_model(tmp_path / "tiny", weights=b"v" * 100)
    assert provider_of(configured(tmp_path / "tiny")).space != space


def test_tokens_are_those_that_the_model_sees(configured: Configure, model: Path) -> None:
    estimate = provider_of(configured(model)).estimate
    # [CLS] say: … [SEP], cut off at 8
    assert estimate.counts(["one two", "one", "one two three four five six"]).tolist() == [5, 4, 8]
    assert provider_of(configured(model, input_type=None)).estimate.count("one") == 3
    assert estimate.margin == 0


def test_a_plan_counts_the_texts_that_the_model_cuts_off(
    configured: Configure, model: Path, tmp_path: Path
) -> None:
    config = configured(model)
    for number, text in enumerate(["one two", "one two three four five six seven", "one"]):
        (tmp_path / "corpus" / f"{number}.txt").write_text(text, encoding="utf-8")
    plan = make_plan(config, Overrides())
    assert plan.cut == 2  # with the one that is there already, of just as many tokens as are read
    assert ("cut off", "2 texts, at what the model reads") in plan_rows(plan)
    plain = make_plan(configured(model, "embedding={provider: lexical}"), Overrides())
    assert plain.cut == 0
    assert "cut off" not in dict(plan_rows(plain))


def test_no_more_than_two_calls_are_in_flight(configured: Configure, model: Path) -> None:
    assert provider_of(configured(model)).limits.concurrency == 2
    assert provider_of(configured(model, "limits.concurrency=1")).limits.concurrency == 1


@pytest.mark.parametrize(
    ("embedding", "said"),
    [
        ({"dimension": 33}, "any length from 1 to 32"),
        ({"output_dtype": "ubinary"}, "embedding.output_dtype"),
        ({"base_url": "http://localhost"}, "embedding.base_url: .* has no use for it"),
        ({"api_key_block": "key"}, "embedding.api_key_block: .* has no use for it"),
    ],
)
def test_what_does_not_fit_the_model_is_refused(
    configured: Configure, model: Path, embedding: dict[str, Any], said: str
) -> None:
    with pytest.raises(SettingsError, match=said):
        facts_for(configured(model, **embedding).embedding)


@pytest.mark.parametrize(
    ("embedding", "said"),
    [
        ({"device": "gpu"}, "embedding.device"),
        ({"device": "cuda:x"}, "embedding.device"),
        ({"backend": "jax"}, "embedding.backend"),
        ({"precision": "int8"}, "embedding.precision"),
    ],
)
def test_a_device_backend_or_precision_that_does_not_exist_is_refused(
    configured: Configure, model: Path, embedding: dict[str, Any], said: str
) -> None:
    with pytest.raises(SettingsError, match=said):
        configured(model, **embedding)


@pytest.mark.parametrize("key", ["device: cpu", "backend: onnx", "precision: float32"])
@pytest.mark.parametrize("provider", ["lexical", "voyage, model: voyage-4"])
def test_other_providers_have_no_use_for_a_device(
    configured: Configure, model: Path, provider: str, key: str
) -> None:
    name = key.partition(":")[0]
    config = configured(model, f"embedding={{provider: {provider}, {key}}}")
    with pytest.raises(SettingsError, match=f"embedding.{name}: .*has no use for it"):
        facts_for(config.embedding)


def test_a_model_must_be_named(configured: Configure) -> None:
    with pytest.raises(SettingsError, match=r"embedding.model: missing"):
        facts_for(configured(None).embedding)


def test_a_model_whose_files_are_silent_needs_a_dimension_and_a_tokenizer(
    configured: Configure, model: Path
) -> None:
    (model / "modules.json").write_text(json.dumps([STATIC]), encoding="utf-8")
    with pytest.raises(SettingsError, match=r"embedding.dimension: missing"):
        open_provider(configured(model))
    (model / "tokenizer.json").rename(model.parent / "words.json")
    with pytest.raises(SettingsError, match=r"embedding.tokenizer: missing"):
        open_provider(configured(model, dimension=48))
    provider = open_provider(configured(model, dimension=48, tokenizer="models/words.json"))
    assert (provider.dimension, provider.estimate.count("one two")) == (48, 5)


def test_without_the_extra_a_plan_works_and_a_run_says_what_to_install(
    configured: Configure, model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "sentence_transformers", None)
    config = configured(model)
    assert make_plan(config, Overrides()).texts.embedded == 1
    with pytest.raises(SettingsError, match=r"pip install 'embed-once\[sentence-transformers\]'"):
        open_embedder(config)


@pytest.mark.slow
def test_a_plan_loads_no_library_of_models(configured: Configure, model: Path) -> None:
    file = str(Path(configured(model).index.uri).parent / "local.yaml")
    script = (
        "import sys\n"
        "from tasks.form import Overrides\n"
        "from tasks.params import load_config\n"
        "from tasks.plan import make_plan\n"
        f"plan = make_plan(load_config({file!r}), Overrides())\n"
        "heavy = {'torch', 'transformers', 'sentence_transformers', 'prefect'} & set(sys.modules)\n"
        "print(plan.tokens, sorted(heavy))\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", script],
        check=True,
        cwd=PROJECT,
        env={**os.environ, "PYTHONPATH": str(PROJECT)},
        capture_output=True,
        text=True,
    )
    assert done.stdout.strip() == "8 []"  # [CLS] say: one two three four five [SEP]
