"""What a run costs that has nothing to do, or a hundredth, beside only reading and hashing.

A table and a folder of files, of the same made-up texts, each in one process and without Prefect:
a first run; runs with nothing to do, of the folder also with `trust_mtime: false`; a run after 1 %
of the rows, or of the files, got other texts. Seconds are those of the processor in this process,
the least of PASSES where nothing changes, since other programs disturb them less than the clock;
those of the clock stand beside them. Run it as
`python tests/benchmarks/noop.py [--chunks 100000]`.
"""

import argparse
import itertools
import os
import tempfile
import time
from collections.abc import Callable, Iterator
from hashlib import blake2b
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from pyarrow import parquet
from stages import (
    CHUNKS_A_DOCUMENT,
    NOTHING,
    SEED,
    TOUCHED,
    Corpus,
    bare_pass,
    config_in,
    first_corpus,
    write_corpus,
)

from tasks.embed import embed_batch
from tasks.form import Overrides
from tasks.journal import RunFolder, fold
from tasks.params import Config
from tasks.read.stamp import FINE_NS
from tasks.run import keep_found, keep_scanned, publish_found
from tasks.sender import Terms, sender_of
from tasks.survey import survey

PASSES = 3
NUMBERS = itertools.count(1)


class Took(NamedTuple):
    """Seconds of the processor, and of the clock."""

    processor: float
    clock: float

    def __sub__(self, other: "Took") -> "Took":
        return Took(self.processor - other.processor, self.clock - other.clock)


def took(work: Callable[[], object], times: int = 1) -> Took:
    """What `work` takes, the least of so many times."""
    each = []
    for _ in range(times):
        processor, clock = time.process_time(), time.perf_counter()
        work()
        each.append(Took(time.process_time() - processor, time.perf_counter() - clock))
    return Took(min(one.processor for one in each), min(one.clock for one in each))


def run(config: Config) -> str:
    """Reindex once, as the flow does it; how it was published."""
    folder = RunFolder(config.state.uri, f"run-{next(NUMBERS)}")
    with folder.alive():
        found = survey(config, Overrides(), folder.staging)
        terms = Terms(found.provider, folder, 0.0)
        filling = found.filling(sender_of(terms), folder.staging)
        for batch in filling.batches():
            embed_batch(batch, terms, attempt=1)
        fold(folder, found.cache)
        filled = filling.finish(NOTHING)
        published = publish_found(found, filled, folder.run_id)
        keep_found(found, filled, published)
        keep_scanned(found, filled)
        folder.forget_notes()
    return published.way


def quiet(config: Config) -> None:
    """A run that has nothing to do."""
    if (way := run(config)) != "none":
        raise SystemExit(f"A run with nothing to do published: {way}")


def documents_of(path: Path) -> Iterator[tuple[str, str]]:
    """Name and text of the documents that the chunks in the Parquet file at `path` make up."""
    with parquet.ParquetFile(path) as file:
        for batch in file.iter_batches(CHUNKS_A_DOCUMENT * 100, columns=["document", "text"]):
            rows = zip(*(column.to_pylist() for column in batch.columns), strict=True)
            for name, chunks in itertools.groupby(rows, key=lambda row: row[0]):
                yield name, "\n\n".join(text for _, text in chunks)


def bare_files(folder: Path) -> None:
    """List a folder, read each file and hash its bytes: no more."""
    for above, _, names in os.walk(folder):
        for name in sorted(names):
            blake2b((Path(above) / name).read_bytes(), digest_size=16).digest()


def other_texts(corpus: Corpus) -> Corpus:
    """`corpus` with other texts for 1 % of its chunks."""
    few = max(1, round(len(corpus.ids) * TOUCHED))
    texts = corpus.texts.copy()
    chosen = np.random.default_rng(SEED).permutation(len(texts))[:few]
    texts[chosen] = len(texts) + np.arange(few)
    return Corpus(corpus.ids, texts)


def of_table(chunks: int, folder: Path) -> None:
    """Measure a table."""
    config, corpus, file = config_in(folder), first_corpus(chunks), folder / "c.parquet"
    write_corpus(corpus, file)
    first = took(lambda: run(config))
    nothing = took(lambda: quiet(config), PASSES)
    bare = took(lambda: bare_pass(file, passes=1), PASSES)
    write_corpus(other_texts(corpus), file)
    show("table", first, bare, {"nothing to do": nothing}, took(lambda: run(config)))


def of_files(chunks: int, folder: Path) -> None:
    """Measure a folder of files."""
    file, files = folder / "c.parquet", folder / "files"
    write_corpus(first_corpus(chunks), file)
    (files / "guides").mkdir(parents=True)
    for name, text in documents_of(file):
        (files / name).write_text(text, encoding="utf-8")
    config = config_in(folder)

    def settings(**source: Any) -> Config:
        values = {"kind": "files", "path": str(files), **source}
        return Config.model_validate(config.model_dump() | {"source": values})

    settle()
    first = took(lambda: run(settings()))
    nothing = {
        "nothing to do": took(lambda: quiet(settings()), PASSES),
        "nothing to do, all read": took(lambda: quiet(settings(trust_mtime=False)), PASSES),
    }
    bare = took(lambda: bare_files(files), PASSES)
    names = sorted((files / "guides").iterdir())
    for path in names[:: round(1 / TOUCHED)]:
        path.write_text(path.read_text(encoding="utf-8")[::-1], encoding="utf-8")
    settle()
    show("files", first, bare, nothing, took(lambda: run(settings())))


def settle() -> None:
    """Wait until what was written last is old enough to be trusted."""
    time.sleep(2 * FINE_NS / 1e9)


def show(source: str, first: Took, bare: Took, nothing: dict[str, Took], small: Took) -> None:
    """Print what a source took."""
    beyond = small - nothing["nothing to do"]
    lines = {
        "first run": first,
        "only reading and hashing": bare,
        **nothing,
        "1 % changed": small,
        "1 % changed, beyond nothing to do": beyond,
    }
    columns = "run | processor s | clock s | times reading and hashing | of the first run"
    print(f"\n{source}\n\n| {columns} |")
    print("|---|---:|---:|---:|---:|")
    for name, each in lines.items():
        times, share = each.processor / bare.processor, each.processor / first.processor
        print(f"| {name} | {each.processor:.3f} | {each.clock:.3f} | {times:.2f} | {share:.2%} |")


def main() -> None:
    """Print the tables."""
    parser = argparse.ArgumentParser(description="Measure runs with little or nothing to do.")
    parser.add_argument("--chunks", type=int, default=100_000)
    chunks = parser.parse_args().chunks
    print(f"{chunks:,} chunks")
    for measure in (of_table, of_files):
        with tempfile.TemporaryDirectory(prefix="embed-once-noop-") as name:
            measure(chunks, Path(name))


if __name__ == "__main__":
    main()
