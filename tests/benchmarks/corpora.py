"""Corpora that hurt: what a run over each of them takes, beside one over half as much.

Run it as `python tests/benchmarks/corpora.py [case …] [--size N] [--json FILE]`; without a case all
of them run at their own size. A corpus is made in a temporary folder and reindexed by the command,
with `lexical` and 256 floats, while a Prefect server runs already. Wall and CPU seconds and the
peak are those of the command; `flat` is its peak over that of the half as large corpus, and
`linear` the same of its CPU seconds, so 2 where time is linear.

- tiny: files of 50 bytes, a thousand in a folder.
- folder: the same in one folder.
- jsonl: one JSONL file of so many megabytes, 4 KB a row; `--size 5000` is the one of 5 GB.
- again: the same, but each text stands there 25 times: 5 GB are read, hashed and published, and
  `lexical`, which takes half an hour for 5 GB, has little to do.
- group: a Parquet file with a single row group, 1 KB a row.
- long: a Parquet file of texts of 200 KB each, in one row group.
- identical: files of one and the same text, whose folder was renamed since it was indexed.
- changed: a table of chunks of which every text has changed since it was indexed.
"""

import argparse
import json
import os
import platform
import sys
import tempfile
from collections.abc import Callable, Iterable, Iterator
from itertools import chain, repeat
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa
import yaml
from peers import Watched, prefect_server, watched
from pyarrow import parquet

MEGABYTE = 1_000_000
TIMES = 25
"""How often a text of `again` stands there."""
ROW_BYTES = {"jsonl": 4000, "again": 4000, "group": 1000, "long": 200_000, "changed": 1000}
WORDS = [f"word{number:x}" for number in range(20_000)]


def text_of(number: int, size: int) -> str:
    """A text of its own, of about so many characters."""
    words = np.random.default_rng([7, number]).integers(0, len(WORDS), size // 9 + 1)
    return f"{number} " + " ".join(WORDS[word] for word in words.tolist())


def tiny(folder: Path, size: int) -> None:
    """So many files of 50 bytes, a thousand in a folder."""
    for number in range(size):
        path = folder / "corpus" / f"{number // 1000:04d}" / f"{number:07d}.txt"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(f"note {number:07d}: " + "a few words for it, no more.\n".ljust(36))


def one_folder(folder: Path, size: int) -> None:
    """So many files of 50 bytes in one folder."""
    (folder / "corpus").mkdir()
    for number in range(size):
        path = folder / "corpus" / f"{number:07d}.txt"
        path.write_text(f"note {number:07d}: " + "a few words for it, no more.\n".ljust(36))


def jsonl(folder: Path, size: int) -> None:
    """One file of so many megabytes."""
    rows = size * MEGABYTE // ROW_BYTES["jsonl"]
    _write_jsonl(folder, (text_of(number, ROW_BYTES["jsonl"]) for number in range(rows)))


def again(folder: Path, size: int) -> None:
    """One file of so many megabytes, whose texts come again and again."""
    some = size * MEGABYTE // ROW_BYTES["again"] // TIMES
    texts = [text_of(number, ROW_BYTES["again"]) for number in range(some)]
    _write_jsonl(folder, chain.from_iterable(repeat(texts, TIMES)))


def group(folder: Path, size: int) -> None:
    """So many rows in one row group."""
    _write_table(folder, "group", range(size))


def long(folder: Path, size: int) -> None:
    """So many long texts."""
    _write_table(folder, "long", range(size))


def identical(folder: Path, size: int) -> None:
    """So many files of one text in one folder, indexed, then renamed."""
    (folder / "corpus" / "before").mkdir(parents=True)
    for number in range(size):
        (folder / "corpus" / "before" / f"{number:07d}.txt").write_text("All rights reserved.\n")
    reindex("identical", folder)
    (folder / "corpus" / "before").rename(folder / "corpus" / "after")


def changed(folder: Path, size: int) -> None:
    """So many chunks, indexed, of which every text then changes."""
    _write_table(folder, "changed", range(size))
    reindex("changed", folder)
    _write_table(folder, "changed", range(size, 2 * size))


class Case(NamedTuple):
    """What makes a corpus of a size, which size is its own, and of what."""

    make: Callable[[Path, int], None]
    size: int
    unit: str


CASES = {
    "tiny": Case(tiny, 100_000, "files"),
    "folder": Case(one_folder, 100_000, "files"),
    "jsonl": Case(jsonl, 400, "MB"),
    "again": Case(again, 400, "MB"),
    "group": Case(group, 400_000, "rows"),
    "long": Case(long, 4_000, "rows"),
    "identical": Case(identical, 50_000, "files"),
    "changed": Case(changed, 100_000, "rows"),
}


def reindex(case: str, folder: Path) -> tuple[Watched, dict[str, Any]]:
    """What the command took over the corpus below `folder`, and its report."""
    lines, tables = ("jsonl", "again"), ("group", "long", "changed")
    name = "corpus.jsonl" if case in lines else "c.parquet" if case in tables else "corpus"
    path = folder / name
    values = {
        "name": case,
        "source": {"kind": "table" if path.suffix else "files", "path": str(path)},
        "embedding": {"provider": "lexical", "dimension": 256},
        "index": {"uri": str(folder / "index"), "table": "t"},
        "state": {"uri": str(folder / "state")},
    }
    config, report = folder / "corpus.yaml", folder / "report.json"
    config.write_text(yaml.safe_dump(values), encoding="utf-8")
    command = [sys.executable, "-m", "flows.cli", "reindex", str(config), "--report", str(report)]
    took = watched(command, dict(os.environ), folder / "run.log")
    return took, json.loads(report.read_text(encoding="utf-8"))


def _write_jsonl(folder: Path, texts: Iterable[str]) -> None:
    with (folder / "corpus.jsonl").open("w", encoding="utf-8") as file:
        for number, text in enumerate(texts):
            file.write(json.dumps({"id": number, "text": text, "lang": "en"}) + "\n")


def _write_table(folder: Path, case: str, numbers: range) -> None:
    """A text for each of `numbers` in one row group, the ids from 0 on."""
    schema = pa.schema([("id", pa.int64()), ("text", pa.large_utf8())])
    texts = pa.array((text_of(each, ROW_BYTES[case]) for each in numbers), pa.large_utf8())
    table = pa.Table.from_arrays([pa.array(range(len(numbers))), texts], schema=schema)
    parquet.write_table(table, folder / "c.parquet", row_group_size=len(numbers))


class Measured(NamedTuple):
    """What a run took: seconds, bytes, chunks, texts embedded, seconds of its stages."""

    case: str
    size: int
    wall_s: float
    cpu_s: float
    peak_bytes: int
    chunks: int
    embedded: int
    stages: dict[str, float]


def measured(case: str, size: int) -> Measured:
    """Make the corpus, and reindex it."""
    with tempfile.TemporaryDirectory(prefix="embed-once-corpora-") as name:
        CASES[case].make(Path(name), size)
        took, report = reindex(case, Path(name))
        total, embedded = report["chunks"]["total"], report["texts"]["embedded"]
        return Measured(case, size, *took, total, embedded, report["seconds"])


def pairs(cases: dict[str, int]) -> Iterator[tuple[Measured, Measured]]:
    """Each case at half its size and at its size, as they are measured."""
    for case, size in cases.items():
        yield measured(case, size // 2), measured(case, size)


def show(each: Measured, of: Measured | None) -> None:
    """One line of the table, held against `of`."""
    linear = f"{each.cpu_s / of.cpu_s:.2f}" if of else ""
    flat = f"{each.peak_bytes / of.peak_bytes:.2f}" if of else ""
    print(
        f"| {each.case} | {each.size:,} {CASES[each.case].unit} | {each.wall_s:.1f} "
        f"| {each.cpu_s:.1f} | {each.peak_bytes / 1e6:,.0f} | {each.chunks:,} "
        f"| {each.embedded:,} | {linear} | {flat} |",
        flush=True,
    )


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description="Measure runs over corpora that hurt.")
    parser.add_argument("cases", nargs="*", metavar="case", help=f"of {', '.join(CASES)}")
    parser.add_argument("--size", type=int, help="instead of the case's own")
    parser.add_argument("--json", type=Path, help="write the figures to this file, too")
    parser.add_argument("--stages", action="store_true", help="tell the seconds of each stage")
    arguments = parser.parse_args()
    if unknown := set(arguments.cases) - CASES.keys():
        parser.error(f"no such case: {', '.join(sorted(unknown))}")
    cases = {case: arguments.size or CASES[case].size for case in arguments.cases or CASES}
    print(f"{platform.platform()}, Python {platform.python_version()}\n")
    print("| case | size | wall s | CPU s | peak MB | chunks | embedded | linear | flat |")
    print("|---|---:|---:|---:|---:|---:|---:|---:|---:|")
    figures = []
    os.environ["PREFECT_SERVER_ANALYTICS_ENABLED"] = "false"
    with tempfile.TemporaryDirectory(prefix="embed-once-prefect-") as home:
        os.environ["PREFECT_HOME"] = home
        with prefect_server(Path(home) / "server.log") as api:
            os.environ["PREFECT_API_URL"] = api
            for half, full in pairs(cases):
                for each, of in ((half, None), (full, half)):
                    show(each, of)
                    if arguments.stages:
                        took = each.stages.items()
                        print("  " + ", ".join(f"{name} {seconds:.1f}" for name, seconds in took))
                    figures.append(each._asdict())
    if arguments.json:
        arguments.json.write_text(json.dumps(figures), encoding="utf-8")


if __name__ == "__main__":
    main()
