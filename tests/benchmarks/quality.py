"""How well `lexical` finds code by its description, alone and fused with words, and how fast.

1000 first paragraphs of docstrings are the queries, the functions they were taken from, without
the docstring, are the documents, all from the packages installed here. The choice depends on the
packages and their versions only. Run it as `python tests/benchmarks/quality.py`.
"""

import ast
import hashlib
import inspect
import platform
import re
import sysconfig
import tempfile
import time
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.parquet as pq

from flows.reindex import run
from tasks.catalog import facts_for, limits_for
from tasks.maintain import maintain
from tasks.params import Embedding, LimitSettings, load_config
from tasks.providers import Vectors
from tasks.providers.lexical import Lexical
from tasks.search import search

PAIRS = 1000
PAIRS_A_FILE = 2
DIMENSIONS = (1024, 384)
AT = 10
CHARACTERS = 400


class Documented(NamedTuple):
    """A function, taken apart."""

    description: str
    signature: str
    body: str


def choose(folder: Path) -> list[Documented]:
    """`PAIRS` functions from below `folder`, no two of one description or one body."""
    found: list[Documented] = []
    seen: set[str] = set()
    files = [file for file in folder.rglob("*.py") if "tests" not in file.parts]
    for file in sorted(files, key=lambda file: _shuffled(str(file.relative_to(folder)))):
        taken = 0
        for function in _documented(file):
            if not seen.isdisjoint({function.description, function.body}):
                continue
            seen |= {function.description, function.body}
            found.append(function)
            taken += 1
            if len(found) == PAIRS:
                return found
            if taken == PAIRS_A_FILE:
                break
    raise SystemExit(f"Only {len(found)} documented functions below {folder}; {PAIRS} are needed.")


def _shuffled(name: str) -> bytes:
    return hashlib.blake2b(name.encode(), digest_size=8).digest()


def _documented(file: Path) -> Iterator[Documented]:
    """The functions in `file` that have a docstring and two statements more."""
    try:
        source = file.read_text(encoding="utf-8")
        with warnings.catch_warnings(action="ignore"):
            tree = ast.parse(source)
    except (SyntaxError, UnicodeDecodeError, ValueError):
        return
    lines = source.splitlines(keepends=True)
    nodes = [n for n in ast.walk(tree) if isinstance(n, ast.FunctionDef | ast.AsyncFunctionDef)]
    for node in sorted(nodes, key=lambda node: _shuffled(f"{node.name} {node.lineno}")):
        docstring = ast.get_docstring(node, clean=False)
        if docstring is None or len(node.body) < 3:
            continue
        paragraph = re.split(r"\n\s*\n", inspect.cleandoc(docstring))[0]
        if len(paragraph.split()) < 4 or not paragraph.isascii():
            continue
        first, second, last = node.body[0], node.body[1], node.body[-1]
        if first.end_lineno is None or last.end_lineno is None or second.lineno <= first.end_lineno:
            continue
        signature = "".join(lines[node.lineno - 1 : first.lineno - 1])
        yield Documented(paragraph, signature, "".join(lines[first.end_lineno : last.end_lineno]))


def ranks(queries: Vectors, documents: Vectors) -> npt.NDArray[np.int64]:
    """For each query the place of its own document, 1 being first; ties count against it."""
    scores = queries @ documents.T
    own = np.diag(scores)[:, None]
    return np.asarray((scores >= own).sum(axis=1), dtype=np.int64)


def main() -> None:
    """Print the table."""
    functions = choose(Path(sysconfig.get_path("purelib")))
    descriptions = [function.description for function in functions]
    forms = {
        "body": [function.body for function in functions],
        "signature and body": [function.signature + function.body for function in functions],
    }
    print(
        f"Python {platform.python_version()}, numpy {np.__version__}, {_processor()}, one core; "
        f"{PAIRS} pairs; speed for the first {CHARACTERS} characters of each document\n"
    )
    print("| documents | dimension | MRR@10 | R@1 | R@10 | texts/s |")
    print("|---|---|---|---|---|---|")
    for form, documents in forms.items():
        for dimension in DIMENSIONS:
            embedding = Embedding(provider="lexical", dimension=dimension)
            lexical = Lexical(dimension, limits_for(LimitSettings(), facts_for(embedding)))
            place = ranks(lexical.embed(descriptions).vectors, lexical.embed(documents).vectors)
            speed = f"{_texts_a_second(lexical, documents):,.0f}"
            print(_row(form, dimension, place, speed))
            print(_row(f"{form}, fused", dimension, _fused(descriptions, documents, dimension), ""))


def _row(form: str, dimension: int, place: npt.NDArray[np.int64], speed: str) -> str:
    reciprocal = np.where(place <= AT, 1 / place, 0).mean()
    return (
        f"| {form} | {dimension} | {reciprocal:.3f} | {(place == 1).mean():.3f} "
        f"| {(place <= AT).mean():.3f} | {speed} |"
    )


def _fused(descriptions: list[str], documents: list[str], dimension: int) -> npt.NDArray[np.int64]:
    """For each query the place of its own document in a search of an index with one of words."""
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "documents.parquet"
        names = [str(number) for number in range(len(documents))]
        pq.write_table(pa.table({"id": names, "text": documents}), file)
        (Path(folder) / "quality.yaml").write_text(
            "name: quality\nsource: {kind: table, path: documents.parquet}\n"
            f"embedding: {{provider: lexical, dimension: {dimension}}}\n"
            "index: {uri: index, table: t}\nstate: {uri: state}\n",
            encoding="utf-8",
        )
        run(str(Path(folder) / "quality.yaml"))
        config = load_config(Path(folder) / "quality.yaml")
        maintain(config)
        found = [[hit.id for hit in search(config, text, AT)] for text in descriptions]
    own = zip(found, names, strict=True)
    return np.array([ids.index(name) + 1 if name in ids else AT + 1 for ids, name in own])


def _texts_a_second(lexical: Lexical, documents: list[str]) -> float:
    """Speed with a warm cache of words, as in any longer run; the best of five."""
    texts = [document[:CHARACTERS] for document in documents]
    seconds = []
    for _ in range(6):
        start = time.perf_counter()
        lexical.embed(texts)
        seconds.append(time.perf_counter() - start)
    return len(texts) / min(seconds[1:])


def _processor() -> str:
    """Name of the processor where the system tells it."""
    facts = Path("/proc/cpuinfo")
    lines = facts.read_text(encoding="utf-8").splitlines() if facts.is_file() else []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.machine()


if __name__ == "__main__":
    main()
