"""The most memory that a run takes, whole process tree apart from Prefect's server.

A Parquet file of made-up chunks (see `stages.py`) is embedded by `lexical` with 1024 floats, which
costs nothing: a first run, one where 1 % changed, 1 % left and 1 % joined, then one where every
text changed. Each run is a process of its own, looked at 20 times a second. Run it as
`python tests/benchmarks/memory.py 100000 1000000`; the last column holds each against the smallest.
"""

import argparse
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

from prefect.testing.utilities import prefect_test_harness
from stages import Corpus, first_corpus, touched_corpus, write_apart

LOOK_S = 0.05
DIMENSION = 1024
CONFIG = """\
name: memory
source: {{kind: table, path: {corpus}, document: document}}
embedding: {{provider: lexical, dimension: {dimension}}}
index: {{uri: ./index, table: memory}}
state: {{uri: ./state}}
"""


class Held(NamedTuple):
    """Memory of processes, in bytes: of their own, and pages of files they have mapped."""

    own: int
    mapped: int


class Peak(NamedTuple):
    """The most that was held at once, with and without mapped files, and in which stage."""

    all: int
    own: int
    stage: str
    seconds: float


def tree(root: int) -> Iterator[int]:
    """The process `root` and all below it, by number."""
    yield root
    for task in Path(f"/proc/{root}/task").glob("*/children"):
        try:
            children = task.read_text(encoding="ascii").split()
        except OSError:
            continue
        for child in children:
            yield from tree(int(child))


def held(root: int) -> Held:
    """What the processes below `root` hold."""
    own = mapped = 0
    for pid in tree(root):
        try:
            status = Path(f"/proc/{pid}/status").read_text(encoding="ascii")
        except OSError:
            continue
        sizes = dict(line.split(":", 1) for line in status.splitlines())
        own += 1024 * int(sizes.get("RssAnon", "0").split()[0])
        mapped += 1024 * int(sizes.get("RssFile", "0").split()[0])
    return Held(own, mapped)


def run(folder: Path, environment: dict[str, str]) -> Peak:
    """One `reindex`, watched until it ends."""
    said = folder / "said.txt"
    with said.open("w") as out:
        process = subprocess.Popen(
            [sys.executable, __file__, "--run", str(folder / "memory.yaml")],
            stdout=out,
            stderr=subprocess.STDOUT,
            env=environment,
        )
        started, most, own, stage = time.monotonic(), 0, 0, ""
        while process.poll() is None:
            now = held(process.pid)
            if sum(now) > most:
                most, stage = sum(now), (folder / "stage").read_text() or "start"
            own = max(own, now.own)
            time.sleep(LOOK_S)
    if process.returncode:
        raise SystemExit(said.read_text(encoding="utf-8"))
    return Peak(most, own, stage, time.monotonic() - started)


def watched(config: str) -> None:
    """Run, and write down which stage it is in."""
    from flows.reindex import run as reindex  # noqa: PLC0415
    from tasks.progress import Progress, listening  # noqa: PLC0415

    file = Path(config).with_name("stage")

    def note(progress: Progress) -> None:
        file.write_text(f"{progress.stage} {progress.percent:.0f} %")

    with listening(note):
        reindex(config)
    file.write_text("done")


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("chunks", type=int, nargs="*", default=[100_000, 1_000_000])
    parser.add_argument("--run", help=argparse.SUPPRESS)
    chosen = parser.parse_args()
    if chosen.run:
        watched(chosen.run)
        return
    least: dict[str, int] = {}
    print("| chunks | run | seconds | peak MiB | of its own | in stage | against the smallest |")
    print("|---:|---|---:|---:|---:|---|---:|")
    with prefect_test_harness(server_startup_timeout=120):
        from prefect.settings import PREFECT_API_URL  # noqa: PLC0415

        environment = {**os.environ, "PREFECT_API_URL": str(PREFECT_API_URL.value())}
        for chunks in sorted(chosen.chunks):
            with tempfile.TemporaryDirectory(prefix="embed-once-memory-") as name:
                folder = Path(name)
                corpus = folder / "c.parquet"
                (folder / "stage").write_text("")
                (folder / "memory.yaml").write_text(
                    CONFIG.format(corpus=corpus, dimension=DIMENSION)
                )
                first = first_corpus(chunks)
                touched = touched_corpus(first)
                corpora = {
                    "first": first,
                    "1 % changed": touched,
                    "all changed": Corpus(touched.ids, touched.texts + 2 * chunks),
                }
                for title, made in corpora.items():
                    write_apart(made, corpus)
                    peak = run(folder, environment)
                    ratio = peak.all / least.setdefault(title, peak.all)
                    print(
                        f"| {chunks:,} | {title} | {peak.seconds:.0f} | {peak.all / 2**20:,.0f} | "
                        f"{peak.own / 2**20:,.0f} | {peak.stage} | {ratio:.2f} |",
                        flush=True,
                    )


if __name__ == "__main__":
    main()
