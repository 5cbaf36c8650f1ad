"""How long each stage takes, without Prefect: a first run, one with nothing to do, a small one.

The corpus is a Parquet file of made-up chunks in a temporary folder: 200 tokens each on average,
15 % of the texts standing there before. Before the third run 1 % of the chunks get another text,
1 % leave and 1 % join. Run it as `python tests/benchmarks/stages.py [--chunks 100000]`.
"""

import argparse
import multiprocessing
import platform
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import nullcontext
from hashlib import blake2b
from importlib.metadata import version
from pathlib import Path
from typing import NamedTuple, TypeVar
from unittest.mock import patch

import numpy as np
import numpy.typing as npt
import pyarrow as pa
from pyarrow import parquet

from tasks.cache import Cache
from tasks.catalog import facts_for
from tasks.compare import Held, compare
from tasks.embed import embed_batch
from tasks.fill import Filled, Filling
from tasks.fingerprint import fingerprint
from tasks.form import Overrides
from tasks.index import Identity, open_index
from tasks.journal import RunFolder, StoredAnswer, fold, unfolded_hashes
from tasks.lookup import lookup
from tasks.memory import peak_bytes
from tasks.pack import pack
from tasks.params import Config
from tasks.providers.opening import open_embedder
from tasks.publish import publish
from tasks.scan import scan
from tasks.schemas import HASH, Batch, TableRef
from tasks.sender import Terms, sender_of
from tasks.storage import storage_at
from tasks.survey import open_reader
from tasks.verify import verify

SEED = 7
WORDS = 30_000
WORDS_A_TEXT = 114  # about 800 characters, that is 200 tokens
SPREAD = 0.6
DUPLICATES = 0.15
TOUCHED = 0.01
CHUNKS_A_DOCUMENT = 20
ROW_GROUP = 8192
FOLD_TEXTS = 20_000
PASSES = 3
ANSWER = (1000, 1024)
SYNC_WRITES = 20

R = TypeVar("R")


class Corpus(NamedTuple):
    """Which chunks there are, and by its number which text each of them holds."""

    ids: npt.NDArray[np.int64]
    texts: npt.NDArray[np.int64]


def first_corpus(chunks: int) -> Corpus:
    """`chunks` chunks; some hold the text of an earlier one."""
    random = np.random.default_rng(SEED)
    ids = np.arange(chunks)
    earlier = random.integers(0, np.maximum(ids, 1))
    return Corpus(ids, np.where(random.random(chunks) < DUPLICATES, earlier, ids))


def touched_corpus(before: Corpus) -> Corpus:
    """`before` with a few chunks changed, a few deleted and a few added."""
    chunks = len(before.ids)
    few = max(1, round(chunks * TOUCHED))
    changed, deleted = np.split(np.random.default_rng(SEED + 1).permutation(chunks)[: 2 * few], 2)
    texts = before.texts.copy()
    texts[changed] = chunks + np.arange(few)
    added = chunks + few + np.arange(few)
    kept = np.delete(np.arange(chunks), deleted)
    return Corpus(np.append(before.ids[kept], added), np.append(texts[kept], added))


def write_corpus(corpus: Corpus, path: Path) -> None:
    """Write `corpus` to a Parquet file; a text depends on its number alone."""
    random = np.random.default_rng(SEED)
    letters = np.array(list("etaoinshrdlucmfwypvbgk"))
    sizes = random.integers(2, 11, WORDS)
    words = np.array(["".join(random.choice(letters, size)) for size in sizes], dtype=object)

    def text(number: int) -> str:
        own = np.random.default_rng([SEED, number])
        size = int(own.lognormal(np.log(WORDS_A_TEXT) - SPREAD**2 / 2, SPREAD)) + 1
        # Few words are common and most are rare, as in any language.
        return " ".join(words[(own.random(size) ** 3 * WORDS).astype(np.int64)])

    schema = pa.schema([(name, pa.utf8()) for name in ("id", "document", "text", "section")])
    with parquet.ParquetWriter(path, schema) as writer:
        for start in range(0, len(corpus.ids), ROW_GROUP):
            ids = corpus.ids[start : start + ROW_GROUP].tolist()
            columns = [
                [f"chunk-{id_:08d}" for id_ in ids],
                [f"guides/document-{id_ // CHUNKS_A_DOCUMENT:06d}.md" for id_ in ids],
                [text(number) for number in corpus.texts[start : start + ROW_GROUP].tolist()],
                [f"section {id_ % CHUNKS_A_DOCUMENT}" for id_ in ids],
            ]
            writer.write_table(pa.table(columns, schema=schema))


class Line(NamedTuple):
    """One line of the table: a stage, the rows it dealt with, the memory held at most by then."""

    stage: str
    seconds: float
    rows: int
    peak_bytes: int


class Stages:
    """The lines of one run, as its stages pass.

    Attributes:
        lines: One for each stage.
        seconds: What the whole run took.
    """

    def __init__(self) -> None:
        self.lines: list[Line] = []
        self.seconds = 0.0

    def timed(self, stage: str, function: Callable[[], R], rows: Callable[[R], int]) -> R:
        """What `function` returns; `rows` says of it how many rows it took."""
        started = time.perf_counter()
        result = function()
        self.add(stage, time.perf_counter() - started, rows(result))
        return result

    def add(self, stage: str, seconds: float, rows: int) -> None:
        """A stage that took so many seconds for so many rows."""
        self.lines.append(Line(stage, seconds, rows, peak_bytes()))


def run(config: Config, name: str) -> Stages:
    """Reindex once, as the flow does it, but one stage after the other."""
    stages = Stages()
    folder = RunFolder(config.state.uri, name)
    started = time.perf_counter()
    with folder.alive():
        _stages(config, folder, stages)
        folder.forget_notes()
    stages.seconds = time.perf_counter() - started
    return stages


def _stages(config: Config, folder: RunFolder, stages: Stages) -> None:
    timed, staging = stages.timed, folder.staging
    provider, reader = open_embedder(config), open_reader(config, Overrides())
    identity = Identity(provider.space, reader.splitter)
    table = open_index(config.index)
    terms = Terms(provider, folder, facts_for(config.embedding).usd_per_million_tokens)

    keyed = fingerprint(reader, provider.estimate, staging / "keyed.arrow")
    stages.add("read", keyed.read_s, keyed.table.rows)
    stages.add("fingerprint", keyed.fingerprint_s, keyed.table.rows)
    indexed = timed("scan the index", lambda: scan(table, staging / "indexed.arrow"), _rows)
    compared = timed(
        "compare",
        lambda: compare(keyed.table, indexed, config.source.kind, Held(), staging),
        lambda _: keyed.table.rows,
    )
    cache = timed("open the cache", lambda: Cache(config.state.uri, identity.space), len)
    looked_up = timed(
        "lookup",
        lambda: lookup(
            compared.changes,
            indexed,
            cache,
            staging / "misses.arrow",
            unfolded=unfolded_hashes(config.state.uri, identity.space),
            quarantined=NOTHING,
        ),
        lambda _: compared.changes.rows,
    )
    packed = timed(
        "pack",
        lambda: pack(looked_up.misses, provider.limits, staging / "packed.arrow"),
        lambda result: result.texts,
    )

    def fill() -> tuple[list[Batch], Filled]:
        filling = Filling(
            reader=reader,
            changes=compared.changes,
            deletions=compared.deletions,
            packed=packed.table,
            sizes=sender_of(terms),
            folder=staging,
        )
        return list(filling.batches()), filling.finish(NOTHING)

    batches, filled = timed("fill", fill, lambda result: result[1].rows.rows)
    arrived: list[StoredAnswer] = []
    sender_of(terms).arrived = arrived.append
    timed(
        "embed",
        lambda: [embed_batch(batch, terms, attempt=1) for batch in batches],
        lambda result: sum(answer.texts for answer in result),
    )
    timed(
        "fold",
        lambda: sum(fold(folder, cache, group) for group in _groups(arrived)),
        lambda added: added,
    )
    published = timed(
        "publish",
        lambda: publish(
            rows=filled.rows,
            deletions=filled.deletions,
            updates=filled.updates,
            index=config.index,
            identity=identity,
            cache=cache,
            run_id=folder.run_id,
        ),
        lambda _: filled.rows.rows + filled.deletions.rows,
    )
    stages.lines[-1] = stages.lines[-1]._replace(stage=f"publish ({published.way})")


NOTHING = pa.array([], HASH)


def _rows(table: TableRef) -> int:
    return table.rows


def _groups(answers: Sequence[StoredAnswer]) -> Iterator[list[StoredAnswer]]:
    """About FOLD_TEXTS texts at a time."""
    group: list[StoredAnswer] = []
    texts = 0
    for answer in answers:
        group.append(answer)
        texts += answer.call.texts
        if texts >= FOLD_TEXTS:
            yield group
            group, texts = [], 0
    yield group


def bare_pass(path: Path, passes: int = PASSES) -> float:
    """Seconds to do no more than read ids and texts and hash each text; the best of `passes`."""
    seconds = []
    for _ in range(passes):
        started = time.perf_counter()
        with parquet.ParquetFile(path) as file:
            for batch in file.iter_batches(ROW_GROUP, columns=["id", "text"]):
                batch.column("id").to_pylist()
                for text in batch.column("text").to_pylist():
                    blake2b(text.encode(), digest_size=16).digest()
        seconds.append(time.perf_counter() - started)
    return min(seconds)


def sync_cost(folder: Path) -> float:
    """Time of a journal write with its syncs over that without; the medians of SYNC_WRITES."""
    data = np.zeros(ANSWER[0] * ANSWER[1], np.float32).tobytes()
    storage, seconds = storage_at(str(folder)), dict[bool, list[float]]()
    for number in range(2 * SYNC_WRITES):
        synced = number % 2 == 0
        with nullcontext() if synced else patch("os.fsync"):
            started = time.perf_counter()
            storage.write(f"{number}.arrow", data)
            seconds.setdefault(synced, []).append(time.perf_counter() - started)
    return float(np.median(seconds[True]) / np.median(seconds[False]))


def config_in(folder: Path) -> Config:
    """The corpus, index and state below `folder`."""
    return Config.model_validate(
        {
            "name": "stages",
            "source": {"kind": "table", "path": str(folder / "c.parquet"), "document": "document"},
            "embedding": {"provider": "lexical", "dimension": 256},
            "index": {"uri": str(folder / "index"), "table": "stages"},
            "state": {"uri": str(folder / "state")},
        }
    )


def main() -> None:
    """Print the tables."""
    parser = argparse.ArgumentParser(description="Measure each stage, without Prefect.")
    parser.add_argument("--chunks", type=int, default=100_000)
    chunks = parser.parse_args().chunks
    before = first_corpus(chunks)
    names = ("lancedb", "pyarrow", "numpy")
    versions = ", ".join(f"{name} {version(name)}" for name in names)
    print(f"{platform.platform()}, {_processor()}, {multiprocessing.cpu_count()} cores")
    print(f"Python {platform.python_version()}, {versions}; {chunks:,} chunks, seed {SEED}")
    with tempfile.TemporaryDirectory(prefix="embed-once-stages-") as name:
        folder = Path(name)
        config = config_in(folder)
        write_apart(before, folder / "c.parquet")
        _show("first run", run(config, "first"))
        unchanged = run(config, "second")
        _show("nothing changed", unchanged)
        seen, peak = verify(config), peak_bytes()
        bare = bare_pass(folder / "c.parquet")
        ratio = unchanged.seconds / bare
        print(
            f"\nA journal file of {ANSWER} floats: {sync_cost(folder / 'sync'):.2f} times with sync"
        )
        print(
            f"\nOnly reading and hashing takes {bare:.2f} s: nothing changed is {ratio:.2f} times"
        )
        print(
            f"\nVerify takes {seen.seconds:.2f} s ({seen.rows / seen.seconds:,.0f} rows/s, peak "
            f"{peak / 1e6:,.0f} MB; {seen.embedded_again} texts embedded again) and finds "
            f"{len(seen.findings)} kinds of things"
        )
        write_apart(touched_corpus(before), folder / "c.parquet")
        _show("1 % changed, 1 % deleted, 1 % added", run(config, "third"))


def write_apart(corpus: Corpus, path: Path) -> None:
    """Write `corpus` in a process of its own, whose memory is not ours."""
    process = multiprocessing.get_context("spawn").Process(target=write_corpus, args=(corpus, path))
    process.start()
    process.join()
    if process.exitcode:
        raise SystemExit("The corpus could not be written.")


def _show(title: str, stages: Stages) -> None:
    print(f"\n{title}\n\n| stage | seconds | rows | rows/s | peak MB |\n|---|---:|---:|---:|---:|")
    for line in stages.lines:
        rate = f"{line.rows / line.seconds:,.0f}" if line.rows else ""
        peak = f"{line.peak_bytes / 1e6:,.0f}"
        print(f"| {line.stage} | {line.seconds:.3f} | {line.rows:,} | {rate} | {peak} |")
    print(f"| **all** | **{stages.seconds:.3f}** | | | |")


def _processor() -> str:
    """Name of the processor where the system tells it."""
    facts = Path("/proc/cpuinfo")
    lines = facts.read_text(encoding="utf-8").splitlines() if facts.is_file() else []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.machine()


if __name__ == "__main__":
    main()
