"""Embed-once beside a script written by hand, and beside LangChain's `index()`.

Run it as `python tests/benchmarks/peers.py [--chunks 10000 100000] [--rounds 1]`. It needs `uv` on
the path, which builds LangChain's environment in `--environments` the first time.

One corpus of made-up chunks (see `stages.py`), one simulated API without limits, three phases:
a first run, one with nothing to do, and one after 1 % of the chunks have changed, 1 % have left and
1 % have joined. In each phase all take their turn on the same file, each as a process of its own
with an index of its own:

- by hand: `by_hand.py`, the fastest script we could write.
- embed-once: the command, with a Prefect server that runs already; once more with
  `limits.memory_mb: 900`; "alone", it starts its own.
- empty flow: `empty_flow.py`, what Prefect takes for such a run (tasks, artifacts, states). It is
  subtracted with the start of Python in it, a few hundredths of a second, which by hand keeps.
- LangChain: `langchain_index.py`.

Seconds of processor time are those of the process and what it starts, its own Prefect server
included; memory is that of all its processes but for Prefect's server. Of several rounds the
table has the one with the least wall time for each line, since other work only ever adds to it.
"""

import argparse
import contextlib
import json
import os
import platform
import shutil
import socket
import subprocess
import sys
import tempfile
import threading
import time
import urllib.request
from collections.abc import Iterator, Sequence
from hashlib import blake2b
from importlib.metadata import version
from itertools import product
from pathlib import Path
from typing import Any, NamedTuple

import lancedb
import numpy as np
import yaml
from account import KEY, admin, simulator
from pyarrow import parquet
from stages import Corpus, first_corpus, touched_corpus, write_apart

from flows import tethered
from flows.prefect_server import HOST, comes_up, start_server
from flows.prefect_server import address as api_of
from tasks.simulator.vectors import embed as simulated
from tasks.simulator.vectors import space_of

HERE = Path(__file__).parent
LANGCHAIN = (
    "langchain-core>=1.8,<2",
    "langchain-classic>=1,<2",
    "langchain-community>=0.4.2,<0.5",
    "langchain-voyageai>=0.4.1,<0.5",
    "lancedb>=0.40,<0.41",
    "greenlet",  # the record manager imports it, and no package asks for it
)
MODEL, DIMENSION, CONCURRENCY = "voyage-4", 1024, 8
PHASES = ("first", "no-op", "next day")
EMBED_ONCE, ALONE, EMPTY, BY_HAND = "embed-once", "embed-once alone", "empty flow", "by hand"
BOUNDED, LIMIT_MB = "embed-once at 900 MiB", 900
PEER = "LangChain"
SERVER = b"flows.prefect_server"
LOOK_S = 0.02
SETTLE_S = 2.0
"""So long after a run the server has taken in all it was told."""
CLOSE = 1e-6
BATCH_SIZE = 1000
"""Of LangChain's `index()`; as many texts as one call takes."""
TARGET = 1.15
MEMORY_MB = 800


class Seen(NamedTuple):
    """One line of the table.

    Attributes:
        wall: Seconds from its start to its end.
        cpu: Seconds, of all its processes.
        peak: Bytes, of all its processes but Prefect's server.
        calls: That the API was asked.
        tokens: That it billed.
        wrong: Rows that are missing, too many, or not the corpus'; None where there is no index.
    """

    wall: float
    cpu: float
    peak: int
    calls: int
    tokens: int
    wrong: int | None


class Watched(NamedTuple):
    """What one process took."""

    wall: float
    cpu: float
    peak: int


def watched(command: Sequence[str], environment: dict[str, str], log: Path) -> Watched:
    """Run `command` to its end, and look at the memory of all its processes meanwhile."""
    with log.open("ab") as file:
        started = time.perf_counter()
        process = subprocess.Popen(command, env=environment, stdout=file, stderr=file)
        ended, peak = threading.Event(), [0]

        def look() -> None:
            while not ended.wait(LOOK_S):
                peak[0] = max(peak[0], _tree_bytes(process.pid))

        looking = threading.Thread(target=look)
        looking.start()
        _, status, used = os.wait4(process.pid, 0)
        wall = time.perf_counter() - started
        process.returncode = os.waitstatus_to_exitcode(status)
        ended.set()
        looking.join()
    if process.returncode:
        words = log.read_text(encoding="utf-8", errors="replace")[-2000:]
        raise SystemExit(f"{' '.join(command)} ended with {process.returncode}:\n{words}")
    return Watched(wall, used.ru_utime + used.ru_stime, peak[0])


def _tree_bytes(pid: int) -> int:
    """Resident bytes of a process and of all it started, Prefect's server left out."""
    total, waiting = 0, [str(pid)]
    while waiting:
        folder = Path("/proc") / waiting.pop()
        with contextlib.suppress(OSError, ValueError, IndexError):  # it may have just ended
            if SERVER in (folder / "cmdline").read_bytes():
                continue
            pages = int((folder / "statm").read_text(encoding="ascii").split()[1])
            total += pages * os.sysconf("SC_PAGE_SIZE")
            for children in folder.glob("task/*/children"):
                waiting += children.read_text(encoding="ascii").split()
    return total


@contextlib.contextmanager
def prefect_server(log: Path) -> Iterator[str]:
    """A Prefect server such as a user has running, in a process of its own; yields its API."""
    listening = socket.create_server((HOST, 0))
    url = api_of(listening.getsockname()[1])
    with log.open("ab") as file:
        process = start_server(listening, "lasting", file)
        try:
            if not comes_up(process, url):
                raise SystemExit(f"The Prefect server did not start: {log.read_text()[-2000:]}")
            yield url
        finally:
            tethered.release(process, 10.0)


def langchain_python(folder: Path) -> str:
    """The Python of an environment with LangChain, which `uv` builds if it is not there."""
    digest = blake2b(" ".join(LANGCHAIN).encode(), digest_size=4).hexdigest()
    environment = folder / f"langchain-{digest}"
    python = str(environment / "bin" / "python")
    if not (environment / "built").exists():
        uv = shutil.which("uv")
        if uv is None:
            raise SystemExit("uv is not on the path; it builds LangChain's environment.")
        subprocess.run([uv, "venv", "-q", "--clear", str(environment)], check=True)
        # Not by the pins of this project, which are in force below its folder.
        install = [uv, "pip", "install", "-q", "--no-config", "--python", python]
        subprocess.run([*install, *LANGCHAIN], check=True)
        (environment / "built").touch()
    return python


class Told(NamedTuple):
    """What a run has left on the Prefect server."""

    stages: list[str]
    batches: int
    artifacts: list[dict[str, Any]]


def left_by_last_run(api: str) -> Told:
    """What the newest run of `reindex` has left, once the server has all of it."""

    def ask(path: str, body: dict[str, Any]) -> Any:
        request = urllib.request.Request(  # noqa: S310
            f"{api}/{path}", json.dumps(body).encode(), {"content-type": "application/json"}
        )
        with urllib.request.urlopen(request, timeout=60) as answer:  # noqa: S310
            return json.load(answer)

    time.sleep(SETTLE_S)  # task runs come to the server as events, behind the run
    named = {"flows": {"name": {"any_": ["reindex"]}}}
    run = ask("flow_runs/filter", {**named, "sort": "START_TIME_DESC", "limit": 1})[0]["id"]
    of_run = {"flow_runs": {"id": {"any_": [run]}}}
    names = list[str]()
    while page := ask("task_runs/filter", {**of_run, "offset": len(names), "limit": 200}):
        names += [each["name"] for each in page]
    artifacts = ask("artifacts/filter", {"artifacts": {"flow_run_id": {"any_": [run]}}})
    stages = [name for name in names if not name.startswith("embed batch")]
    fields = ("type", "key", "description", "data")
    return Told(
        stages,
        len(names) - len(stages),
        [{name: each[name] for name in fields} for each in reversed(artifacts)],
    )


class Bench:
    """All contenders on one corpus.

    Args:
        folder: Corpus, indexes and logs.
        simulator: Address of the API.
        prefect: Address of a Prefect server.
        langchain: Python of LangChain's environment.
        batch_size: LangChain's.
    """

    def __init__(
        self, folder: Path, simulator: str, prefect: str, langchain: str, batch_size: int
    ) -> None:
        self.folder = folder
        self.corpus = folder / "corpus.parquet"
        self._simulator, self._prefect = simulator, prefect
        own = {**os.environ, "VOYAGE_API_KEY": KEY, "PREFECT_HOME": str(folder / "prefect-alone")}
        own.pop("PREFECT_API_URL", None)
        served = {**own, "PREFECT_API_URL": prefect}
        told = str(folder / "told.json")
        python = sys.executable
        by_hand = [python, str(HERE / "by_hand.py"), str(self.corpus), str(folder / BY_HAND)]
        peer = [langchain, str(HERE / "langchain_index.py"), str(self.corpus), str(folder / PEER)]
        self.commands = {
            BY_HAND: ([*by_hand, simulator], own),
            EMBED_ONCE: (self._reindex(EMBED_ONCE), served),
            EMPTY: ([python, str(HERE / "empty_flow.py"), told], served),
            BOUNDED: (self._reindex(BOUNDED, LIMIT_MB), served),
            ALONE: (self._reindex(ALONE), own),
            PEER: ([*peer, simulator, str(batch_size)], own),
        }
        # Otherwise the first of them would also make Prefect's database.
        self._tell(Told(["nothing"], 1, []))
        command, _ = self.commands[EMPTY]
        for environment in (own, served):
            watched(command, environment, folder / "warm-up.log")

    def phase(self, corpus: Corpus) -> dict[str, Seen]:
        """Each contender once, on the corpus as it is now."""
        write_apart(corpus, self.corpus)
        expected = parquet.read_table(self.corpus, columns=["id", "text"])
        texts = dict(zip(*(column.to_pylist() for column in expected.columns), strict=True))
        found = {}
        for name, (command, environment) in self.commands.items():
            if name == EMPTY:
                self._tell(left_by_last_run(self._prefect))
            before = admin(self._simulator, "ledger?requests=0")["totals"]
            took = watched(command, environment, self.folder / f"{name}.log")
            after = admin(self._simulator, "ledger?requests=0")["totals"]
            calls, tokens = (after[key] - before[key] for key in ("calls", "billed_tokens"))
            wrong = None if name == EMPTY else self._wrong(name, texts)
            found[name] = Seen(*took, calls, tokens, wrong)
            print(f"{name}: {took.wall:.1f} s", file=sys.stderr, flush=True)
        return found

    def _reindex(self, name: str, memory_mb: int | None = None) -> list[str]:
        """The command, with a config of its own."""
        config = self.folder / f"{name}.yaml"
        values = {
            "name": "peers",
            "source": {"kind": "table", "path": str(self.corpus), "document": "document"},
            "embedding": {
                "provider": "voyage",
                "model": MODEL,
                "dimension": DIMENSION,
                "base_url": self._simulator,
            },
            "limits": {
                "concurrency": CONCURRENCY,
                "texts_per_request": 1000,
                "requests_per_minute": 10**6,
                "tokens_per_minute": 10**10,
                "memory_mb": memory_mb,
            },
            "index": {"uri": str(self.folder / name), "table": "chunks"},
            "state": {"uri": str(self.folder / f"{name} state")},
        }
        config.write_text(yaml.safe_dump(values), encoding="utf-8")
        return [sys.executable, "-m", "flows.cli", "reindex", str(config)]

    def _tell(self, told: Told) -> None:
        text = json.dumps(told._asdict())
        (self.folder / "told.json").write_text(text, encoding="utf-8")

    def _wrong(self, name: str, texts: dict[str, str]) -> int:
        """Rows that are not as they must be: id, text, and the vector that the API gives it."""
        table = lancedb.connect(str(self.folder / name)).open_table("chunks")
        good, rows = set[str](), 0
        for batch in table.search().to_batches(8192):
            if name == PEER:
                ids = batch.column("metadata").field("id").to_pylist()
            else:
                ids = batch.column("id").to_pylist()
            said = batch.column("text").to_pylist()
            vectors = batch.column("vector").flatten().to_numpy().reshape(-1, DIMENSION)
            right = simulated("fast", space_of(MODEL), "document", said, DIMENSION)
            same = np.abs(vectors - right).max(axis=1) < CLOSE
            rows += len(ids)
            good.update(
                id_
                for id_, text, close in zip(ids, said, same, strict=True)
                if close and texts.get(id_) == text
            )
        return (rows - len(good)) + (len(texts) - len(good))


def best(rounds: Sequence[dict[str, Seen]]) -> dict[str, Seen]:
    """Of each contender the line with the least wall time; wrong rows are never forgotten."""
    found = {}
    for name in rounds[0]:
        lines = [each[name] for each in rounds]
        wrong = None if lines[0].wrong is None else max(line.wrong or 0 for line in lines)
        found[name] = min(lines, key=lambda line: line.wall)._replace(wrong=wrong)
    return found


def measured(
    chunks: int, rounds: int, langchain: str, batch_size: int
) -> dict[str, dict[str, Seen]]:
    """All phases, by name; then all contenders."""
    before = first_corpus(chunks)
    corpora = dict(zip(PHASES, (before, before, touched_corpus(before)), strict=True))
    seen: dict[str, list[dict[str, Seen]]] = {phase: [] for phase in PHASES}
    for _ in range(rounds):
        with (
            tempfile.TemporaryDirectory(prefix="embed-once-peers-") as name,
            simulator(vectors="fast", tier="unlimited", keep_requests=0) as address,
        ):
            folder = Path(name)
            os.environ["PREFECT_HOME"] = str(folder / "prefect-served")
            with prefect_server(folder / "server.log") as prefect:
                bench = Bench(folder, address, prefect, langchain, batch_size)
                for phase, corpus in corpora.items():
                    seen[phase].append(bench.phase(corpus))
    return {phase: best(each) for phase, each in seen.items()}


def show(chunks: int, seen: dict[str, dict[str, Seen]]) -> None:
    """One table, and what the targets are."""
    print(f"\n{chunks:,} chunks\n")
    print("| phase | who | wall s | CPU s | peak MB | calls | tokens | rows wrong |")
    print("|---|---|---:|---:|---:|---:|---:|---:|")
    for phase, lines in seen.items():
        for name, line in lines.items():
            wrong = "" if line.wrong is None else f"{line.wrong:,}"
            print(
                f"| {phase} | {name} | {line.wall:.2f} | {line.cpu:.2f} | {line.peak / 1e6:,.0f} "
                f"| {line.calls:,} | {line.tokens:,} | {wrong} |"
            )
    print(f"\nBeyond Prefect's fixed cost, over by hand (at most {TARGET}):")
    for name, (phase, lines) in product((EMBED_ONCE, BOUNDED), seen.items()):
        ratios = [
            (lines[name][at] - lines[EMPTY][at]) / lines[BY_HAND][at]  # type: ignore[operator]
            for at in (0, 1)
        ]
        print(f"- {name}, {phase}: {ratios[0]:.2f} by wall time, {ratios[1]:.2f} by processor time")
    print("\nAll three phases:")
    for name in (BY_HAND, EMBED_ONCE, BOUNDED, ALONE, PEER):
        runs = [each[name] for each in seen.values()]
        peak = max(line.peak for line in runs) / 1e6
        print(
            f"- {name}: {sum(line.wall for line in runs):.1f} s, processor "
            f"{sum(line.cpu for line in runs):.1f} s, peak {peak:,.0f} MB"
            + (f" (target: below {MEMORY_MB})" if name in {EMBED_ONCE, BOUNDED} else "")
        )


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description="Embed-once beside a script and LangChain.")
    parser.add_argument("--chunks", type=int, nargs="+", default=[10_000, 100_000])
    parser.add_argument("--rounds", type=int, default=1)
    parser.add_argument("--batch-size", type=int, default=BATCH_SIZE, help="LangChain's")
    parser.add_argument(
        "--environments", type=Path, default=Path(tempfile.gettempdir()) / "embed-once-peers"
    )
    chosen = parser.parse_args()
    os.environ["PREFECT_SERVER_ANALYTICS_ENABLED"] = "false"
    langchain = langchain_python(chosen.environments)
    names = ("lancedb", "pyarrow", "numpy", "prefect", "voyageai")
    print(f"{platform.platform()}, {os.cpu_count()} cores, Python {platform.python_version()}")
    print(", ".join(f"{name} {version(name)}" for name in names))
    print("LangChain:", ", ".join(LANGCHAIN), f"batch_size {chosen.batch_size}")
    for chunks in chosen.chunks:
        show(chunks, measured(chunks, chosen.rounds, langchain, chosen.batch_size))


if __name__ == "__main__":
    main()
