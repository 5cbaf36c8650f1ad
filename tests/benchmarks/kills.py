"""Runs are killed at any moment: what is paid twice, and what readers of the index see.

Run it as `python tests/benchmarks/kills.py --moments 50 [--seed N] [--json FILE]`. It needs about
10 s a moment, uses the Prefect server of PREFECT_API_URL or starts one, and exits with 1 if a
promise was broken. Ctrl-C ends it early, with the figures until then.

At each moment a run of `embed-once reindex`, a first one or an update, is killed with SIGKILL in
a chosen phase, its rerun too now and then, while another process reads the index all the time.
Then a rerun goes to its end, and the index, what the provider billed, the ledger and the folders
are held against what they must be. Phases are recognised from the files alone, and which one a
kill has really hit is told afterwards, from what it left.
"""

import argparse
import contextlib
import json
import logging
import multiprocessing
import os
import random
import shutil
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from hashlib import blake2b, sha256
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any, Literal, NamedTuple, get_args

import lancedb
import pyarrow as pa
import yaml
from account import KEY, admin, simulator
from lancedb.table import Table
from pyarrow import parquet

CONCURRENCY = 4
BATCHES = 4 * CONCURRENCY
"""Most batches a run has at work at once, counting answers that are being written down."""
TEXTS_PER_REQUEST = 5
LATENCY = {"base_s": 0.02, "jitter_s": 0.01}
DRAINED_S = 0.3
"""So long after a kill the simulator has answered what was in flight."""

# --- what a run leaves on disk, the only place that knows file names --------------------------

RUNS = "state/runs/*/"
ANSWERS = "state/runs/*/answers/*.arrow"
ABOUT = "state/runs/*/run.json"
CACHE = "state/vectors-*.lance/_versions/*.manifest"
LEDGER = "state/ledger.lance/_versions/*.manifest"
CALLS = "state/calls.lance/_versions/*.manifest"
NOTE = "index/chunks.committing"
INDEX = "index/chunks.lance/_versions/*.manifest"
TAGS = "index/chunks.lance/_refs/tags/gen-*.json"
LEFTOVERS = ("state/runs/*", "state/set-aside/*", NOTE)


@dataclass(frozen=True)
class Disk:
    """What the files say at one moment: counts of versions and answers, names of runs."""

    runs: frozenset[str]
    answers: Counter[str] = field(hash=False)
    cache: int
    ledger: int
    calls: int
    note: bool
    index: int
    tags: int

    @classmethod
    def of(cls, home: Path) -> "Disk":
        def count(pattern: str) -> int:
            return sum(1 for _ in home.glob(pattern))

        return cls(
            runs=frozenset(path.name for path in home.glob(RUNS)),
            answers=Counter(path.parts[-3] for path in home.glob(ANSWERS)),
            cache=count(CACHE),
            ledger=count(LEDGER),
            calls=count(CALLS),
            note=(home / NOTE).exists(),
            index=count(INDEX),
            tags=count(TAGS),
        )

    def answered(self, since: "Disk") -> int:
        """Answers of the run that began after `since`."""
        return sum(count for run, count in self.answers.items() if run not in since.runs)


def named_runs(home: Path) -> set[str]:
    """Runs that lived long enough to say what they are."""
    found = set[str]()
    for file in home.glob(ABOUT):
        with contextlib.suppress(OSError, ValueError):
            found.add(json.loads(file.read_text(encoding="utf-8"))["run_id"])
    return found


# --- what is indexed --------------------------------------------------------------------------

Documents = dict[str, list[str]]
"""Paragraphs by path."""
Rows = list[dict[str, str]]


def text_of(number: int | str) -> str:
    """A text of its own, so long that two of them are two chunks."""
    return " ".join(f"{word}{number}" for word in ("river", "stone", "candle", "harbour", "moss"))


HEADER = text_of("0000")


def documents(numbers: range, first: int = 0) -> Documents:
    """Documents that share their first paragraph and have three of their own."""
    return {
        f"{number % 7}/{number}.md": [HEADER, *(text_of(first + number * 3 + n) for n in range(3))]
        for number in numbers
    }


def rows(numbers: range) -> Rows:
    """Rows, of which each sixth has the text of its neighbour."""
    return [
        {"id": str(n), "text": text_of(n - (n % 6 == 5)), "lang": "de" if n % 2 else "en"}
        for n in numbers
    ]


@dataclass(frozen=True)
class Scene:
    """A change of the corpus, and how its new generation is published.

    Attributes:
        kind: Of the source.
        way: How its new generation is published.
        less: Whether chunks leave and nothing else changes.
    """

    kind: Literal["files", "table"]
    way: Literal["create", "add", "merge", "overwrite"]
    less: bool = False

    def __str__(self) -> str:
        return f"{self.kind}, {'delete' if self.less else self.way}"

    @property
    def before(self) -> Documents | Rows | None:
        """What the index holds when the run begins; None where there is no index yet."""
        if self.way == "create":
            return None
        if self.kind == "files":
            return documents(range(40 if self.way == "add" else 80))
        return rows(range(150 if self.way == "add" else 300))

    @property
    def after(self) -> Documents | Rows:
        """What the corpus holds then."""
        if self.kind == "files":
            if self.way != "merge":
                return documents(range(80))
            same = documents(range(30))
            moved = {f"new/{name}": texts for name, texts in documents(range(30, 45)).items()}
            edited = documents(range(45, 70))
            for number, texts in enumerate(edited.values()):
                texts[1:3] = [text_of(1000 + number), HEADER]
            return same | moved | edited | documents(range(80, 95))
        if self.way in {"create", "add"}:
            return rows(range(300))
        if self.less:
            return [row for number, row in enumerate(rows(range(300))) if number % 11]
        changed = rows(range(330))
        for number, row in enumerate(changed):
            if number % 5 == 0:
                row["text"] = text_of(1000 + number)
            if number % 7 == 0:
                row["lang"] = "fr"
            if self.way == "overwrite":
                row["topic"] = f"topic {number % 3}"
        return [row for number, row in enumerate(changed) if number % 11]


SCENES = [
    Scene("files", "create"),
    Scene("table", "merge"),
    Scene("files", "add"),
    Scene("table", "overwrite"),
    Scene("files", "merge"),
    Scene("table", "create"),
    Scene("table", "add"),
    Scene("table", "merge", less=True),
]


def texts_in(corpus: Documents | Rows | None) -> set[str]:
    """SHA-256 of each text, as the simulator names them."""
    if isinstance(corpus, dict):
        texts = {text for paragraphs in corpus.values() for text in paragraphs}
    else:
        texts = {row["text"] for row in corpus or ()}
    return {sha256(text.encode()).hexdigest() for text in texts}


class Home:
    """A folder with a corpus, its config, index and state."""

    def __init__(self, folder: Path, scene: Scene, address: str) -> None:
        self.folder = folder
        self.scene = scene
        self.config = folder / "kills.yaml"
        folder.mkdir(exist_ok=True)
        source: dict[str, Any] = {"kind": "table", "path": "corpus.parquet"}
        if scene.kind == "files":
            split = {"max_tokens": 16, "overlap_tokens": 0}
            source = {"kind": "files", "path": "corpus", "split": split}
        config = {
            "name": "kills",
            "source": source,
            "embedding": {
                "provider": "voyage",
                "model": "voyage-4",
                "dimension": 256,
                "base_url": address,
            },
            "limits": {
                "concurrency": CONCURRENCY,
                "texts_per_request": TEXTS_PER_REQUEST,
                "requests_per_minute": 1_000_000,
                "tokens_per_minute": 1_000_000_000,
            },
            "index": {"uri": "index", "table": "chunks"},
            "state": {"uri": "state"},
        }
        self.config.write_text(yaml.safe_dump(config), encoding="utf-8")

    def write(self, corpus: Documents | Rows) -> None:
        """Make the corpus this one."""
        if not isinstance(corpus, dict):
            parquet.write_table(pa.Table.from_pylist(corpus), self.folder / "corpus.parquet")
            return
        root = self.folder / "corpus"
        shutil.rmtree(root, ignore_errors=True)
        for name, paragraphs in corpus.items():
            (root / name).parent.mkdir(parents=True, exist_ok=True)
            (root / name).write_text("\n\n".join(paragraphs) + "\n", encoding="utf-8")

    def copy(self, folder: Path, address: str) -> "Home":
        """A copy of index and state in another folder, with the corpus as it is afterwards."""
        for name in ("index", "state"):
            if (self.folder / name).exists():
                shutil.copytree(self.folder / name, folder / name)
        home = Home(folder, self.scene, address)
        home.write(self.scene.after)
        return home

    def run(self) -> Any:
        """One undisturbed run, in this process."""
        from flows.reindex import run  # noqa: PLC0415 - the reader's process needs no Prefect

        return run(str(self.config))

    @property
    def table(self) -> Table:
        return lancedb.connect(self.folder / "index").open_table("chunks")


# --- who reads the index meanwhile ------------------------------------------------------------

NO_INDEX = "none"


def state_of(table: Table) -> str:
    """Digest of all rows, vectors bit by bit, without the run that wrote them."""
    found = table.to_arrow().drop_columns("run_id").sort_by("id")
    digest = blake2b(str(found.schema.remove_metadata()).encode(), digest_size=8)
    for name in found.schema.names:
        column = found.column(name).combine_chunks()
        if name == "vector":
            digest.update(column.flatten().to_numpy().tobytes())
        else:
            digest.update(repr(column.to_pylist()).encode())
    return f"{found.num_rows} rows {digest.hexdigest()}"


def state_at(table: Table, version: int) -> str:
    """The same of an older version."""
    table.checkout(version)
    try:
        return state_of(table)
    finally:
        table.checkout_latest()  # type: ignore[no-untyped-call]


class Seen(NamedTuple):
    """What a reader saw: each state in which it differed from the one before."""

    states: list[str]
    errors: list[str]
    reads: int


def watch(pipe: "Connection[Any, Any]") -> None:
    """Read one index after the other, as plain LanceDB users do; most often while it changes."""
    while (home := pipe.recv()) is not None:
        uri, note = home / "index", home / NOTE
        states, errors, reads = list[str](), list[str](), 0
        kept: Table | None = None
        while not pipe.poll():
            try:
                if kept is None or reads % 2:
                    kept = lancedb.connect(uri).open_table("chunks")
                else:
                    kept.checkout_latest()  # type: ignore[no-untyped-call]
                state = state_of(kept)
            except ValueError as error:
                state = NO_INDEX
                if "was not found" not in str(error):
                    errors.append(repr(error))
            except Exception as error:  # noqa: BLE001 - that there is one is what matters
                state = f"error {error!r}"
                errors.append(repr(error))
            if not states or states[-1] != state:
                states.append(state)
            reads += 1
            time.sleep(0.002 if note.exists() else 0.02)
        pipe.send(Seen(states, errors[:5], reads))
        pipe.recv()


class Reader:
    """The other process that reads."""

    def __init__(self) -> None:
        context = multiprocessing.get_context("spawn")
        self._pipe, theirs = context.Pipe()
        self._process = context.Process(target=watch, args=(theirs,), daemon=True)
        self._process.start()

    def begin(self, home: Home) -> None:
        self._pipe.send(home.folder)

    def end(self) -> Seen:
        self._pipe.send("enough")
        seen: Seen = self._pipe.recv()
        return seen

    def close(self) -> None:
        self._pipe.send(None)
        self._process.join()


# --- where a kill falls -----------------------------------------------------------------------

Phase = Literal[
    "start",
    "recover",
    "read",
    "embed",
    "fold",
    "publish",
    "commit",
    "tag",
    "report",
    "anywhere",
    "ended",
]
FIRST: Sequence[Phase] = (
    "embed", "publish", "read", "fold", "report", "publish", "anywhere", "start",
)  # fmt: skip
LATER: Sequence[Phase] = ("recover", "publish", "embed", "report", "recover", "anywhere")


class Now(NamedTuple):
    """What is known of a run that goes on.

    Attributes:
        since: The disk before it was started.
        disk: The disk now.
        seconds: Since it was started.
    """

    since: Disk
    disk: Disk
    seconds: float


@dataclass(frozen=True)
class Aim:
    """A kill: as soon as `trigger` holds, and up to `delay` seconds later."""

    phase: Phase
    trigger: Callable[[Now], bool]
    delay: float


def aim_at(phase: Phase, calls: int, seconds: float, dice: random.Random) -> Aim:
    """A kill in `phase` of a run that makes about so many calls and takes so many seconds."""

    def grown(name: str) -> Callable[[Now], bool]:
        return lambda now: getattr(now.disk, name) > getattr(now.since, name)

    def fresh(now: Now) -> bool:
        return bool(now.disk.runs - now.since.runs)

    share, answers = dice.random(), dice.randint(1, max(1, calls))
    choices: dict[Phase, list[tuple[Callable[[Now], bool], float]]] = {
        "start": [(lambda now: now.seconds >= share * 0.6 * seconds, 0.0)],
        "recover": [
            (lambda now: now.disk != now.since, 0.01),
            (grown("calls"), 0.02),
            (lambda now: bool(now.since.runs - now.disk.runs), 0.002),
        ],
        "read": [(fresh, 0.2)],
        "embed": [(lambda now: now.disk.answered(now.since) >= answers, 0.01)],
        "fold": [
            (lambda now: now.disk.answered(now.since) >= calls, 0.04),
            (lambda now: fresh(now) and grown("cache")(now), 0.005),
        ],
        "publish": [  # and the two steps after it, which take about a millisecond
            (lambda now: now.disk.note or grown("index")(now), 0.012),
            (grown("index"), 0.001),
            (grown("tags"), 0.0),
        ],
        "report": [
            (lambda now: fresh(now) and grown("tags")(now) and not now.disk.note, 0.05),
            (lambda now: grown("tags")(now) and grown("calls")(now), 0.02),
            (lambda now: grown("tags")(now) and grown("ledger")(now), 0.02),
        ],
        "anywhere": [(lambda now: now.seconds >= share * seconds, 0.0)],
    }
    trigger, most = dice.choice(choices[phase])
    return Aim(phase, trigger, dice.random() * most)


def phase_hit(since: Disk, begun: Disk | None, left: Disk, calls: int) -> Phase:
    """Where a run was, by what it left; "publish" is before the commit, then it is tagged.

    Args:
        since: The disk before it was started.
        begun: The disk when its folder was there first; None if it never was.
        left: The disk when it was dead.
        calls: How many it would have made.
    """
    if begun is None:
        return "start" if left == since else "recover"
    answered = left.answered(since)
    if left.note:
        return (
            "tag" if left.tags > begun.tags else "commit" if left.index > begun.index else "publish"
        )
    if left.tags > begun.tags:
        return "report"
    if left.cache > begun.cache or answered >= calls > 0:
        return "fold"
    return "embed" if answered else "read"


# --- one moment -------------------------------------------------------------------------------


@dataclass(frozen=True)
class Known:
    """A scene, run once without being disturbed.

    Attributes:
        home: Holds what was before.
        before: State of the index that readers see first.
        after: State of one built from nothing.
        calls: How many an undisturbed run makes.
    """

    home: Home
    before: str
    after: str
    calls: int

    @cached_property
    def needed(self) -> set[str]:
        """The texts to pay for."""
        return texts_in(self.home.scene.after) - texts_in(self.home.scene.before)


@dataclass
class Kill:
    """One run that was killed.

    Attributes:
        aimed: The phase it was to hit.
        hit: The phase it did hit.
        answered: Requests that the provider had answered when it was killed.
        requests: Those it had answered before the next run began.
        in_flight: Requests that were billed and lost, since they were answered after the kill.
        unwritten: Those that were answered before it, but their answer was not yet durable.
        again: Texts of either that were paid for again.
    """

    aimed: Phase
    hit: Phase
    answered: int
    requests: int
    in_flight: int = 0
    unwritten: int = 0
    again: int = 0


@dataclass
class Moment:
    """What became of one moment."""

    scene: str
    kills: list[Kill]
    rerun_s: float = 0.0
    billed: int = 0
    reads: int = 0
    mixed: int = 0
    broken: list[str] = field(default_factory=list)

    def as_json(self) -> dict[str, Any]:
        kills = [vars(kill) for kill in self.kills]
        return {**vars(self), "kills": kills}


COMMAND = [sys.executable, "-m", "flows.cli", "reindex"]


def kill_one(home: Home, aim: Aim, calls: int, address: str) -> Kill:
    """Start a run, kill it, and tell where it was."""
    since, begun = Disk.of(home.folder), None
    log = (home.folder / "killed.log").open("ab")
    process = subprocess.Popen(
        [*COMMAND, str(home.config)], stdout=log, stderr=log, start_new_session=True
    )
    log.close()
    started = time.perf_counter()
    try:
        while process.poll() is None:
            now = Now(since, Disk.of(home.folder), time.perf_counter() - started)
            if begun is None and now.disk.runs - since.runs:
                begun = now.disk
            if aim.trigger(now):
                time.sleep(aim.delay)
                break
            time.sleep(0.001)
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
    answered: int = admin(address, "ledger?requests=0")["totals"]["ok"]
    ended = process.wait() != -signal.SIGKILL
    left = Disk.of(home.folder)
    time.sleep(DRAINED_S)
    if begun is None and left.runs - since.runs:
        begun = replace(since, runs=left.runs)
    hit = "ended" if ended else phase_hit(since, begun, left, calls)
    return Kill(aim.phase, hit, answered, len(billed_requests(address)))


def billed_requests(address: str) -> list[dict[str, Any]]:
    """All requests that the provider has billed since the last reset, as it answered them."""
    found: list[dict[str, Any]] = admin(address, "ledger")["requests"]
    return [request for request in found if request["billed_tokens"]]


def one_moment(
    number: int, known: Known, aims: Sequence[Phase], dice: random.Random, bench: "Bench"
) -> Moment:
    """Kill, run again, and hold everything against what it must be."""
    home = known.home.copy(bench.folder / f"moment-{number}", bench.address)
    moment = Moment(str(home.scene), [])
    dead = set[str]()
    admin(bench.address, "reset", {})
    bench.reader.begin(home)
    for aimed in aims:
        paid = {text for request in billed_requests(bench.address) for text in request["hashes"]}
        calls = -(-len(known.needed - paid) // TEXTS_PER_REQUEST)
        aim = aim_at(aimed, calls, bench.seconds, dice)
        moment.kills.append(kill_one(home, aim, calls, bench.address))
        dead |= named_runs(home.folder)
    started = time.perf_counter()
    rerun = subprocess.run(
        [*COMMAND, str(home.config)], capture_output=True, text=True, timeout=120, check=False
    )
    moment.rerun_s = time.perf_counter() - started
    if rerun.returncode:
        moment.broken.append(f"the rerun ended with {rerun.returncode}: {rerun.stderr.strip()}")
    seen = bench.reader.end()
    requests = billed_requests(bench.address)
    moment.broken += [
        *seen_wrongly(known, seen, moment),
        *indexed_wrongly(known, home),
        *billed_wrongly(known, home, requests, moment),
        *left_behind(home, dead),
        *not_done(home, requests, bench.address),
    ]
    if not moment.broken:
        shutil.rmtree(home.folder)
    return moment


def seen_wrongly(known: Known, seen: Seen, moment: Moment) -> Iterator[str]:
    """Readers see the old generation, then the new one."""
    moment.reads = seen.reads
    moment.mixed = len(set(seen.states) - {known.before, known.after})
    if seen.states not in ([known.before], [known.before, known.after], [known.after]):
        yield f"readers saw {seen.states}, not {known.before} and then {known.after}"
    if seen.errors:
        yield f"readers failed: {seen.errors}"


def indexed_wrongly(known: Known, home: Home) -> Iterator[str]:
    """The index is one built from nothing, and each of its versions holds a generation."""
    table = home.table
    found = state_of(table)
    if found != known.after:
        yield f"the index holds {found}, not {known.after}"
    tags = {name: tag["version"] for name, tag in table.tags.list().items()}
    versions = sorted(entry["version"] for entry in table.list_versions())
    wanted = [known.after] if known.before == NO_INDEX else [known.before, known.after]
    numbers = [f"gen-{number}" for number, _ in enumerate(wanted, start=1)]
    held = [state_at(table, tags[name]) for name in numbers if name in tags]
    # Tidying makes versions that are no generations, with the rows of the one before.
    others = {state_at(table, version) for version in versions}
    if sorted(tags) != numbers or held != wanted or others != set(wanted):
        yield f"versions {versions} are tagged {tags}"


def billed_wrongly(
    known: Known, home: Home, requests: Sequence[dict[str, Any]], moment: Moment
) -> Iterator[str]:
    """No text is paid twice but those in flight at a kill, and the ledger knows of all others."""
    from tasks.ledger import Ledger  # noqa: PLC0415 - the reader's process does without

    calls = Ledger(str(home.folder / "state")).calls()
    entered = dict(zip(calls["request_id"], calls["tokens_billed"], strict=True))
    if len(entered) != len(calls):
        yield "the ledger has a call twice"
    times = Counter(text for request in requests for text in request["hashes"])
    moment.billed = times.total()
    if set(times) != known.needed:
        yield f"{len(set(times) ^ known.needed)} texts were billed needlessly, or not at all"
    lost = Counter[str]()
    start = 0
    for kill in [*moment.kills, Kill("ended", "ended", len(requests), len(requests))]:
        gone = [
            (place, request["hashes"])
            for place, request in enumerate(requests[start : kill.requests], start)
            if request["request_id"] not in entered
        ]
        start = kill.requests
        kill.unwritten = sum(place < kill.answered for place, _ in gone)
        kill.in_flight = len(gone) - kill.unwritten
        allowed = (0, 0) if kill.hit == "ended" else (CONCURRENCY, BATCHES)
        if kill.in_flight > allowed[0] or len(gone) > allowed[1]:
            yield f"{len(gone)} answers to a run that was killed in {kill.hit} are nowhere"
        texts = [text for _, hashes in gone for text in hashes]
        lost.update(texts)
        kill.again = sum(times[text] > 1 for text in texts)
    twice = {text: count for text, count in times.items() if count > 1 + lost[text]}
    if twice:
        yield f"{len(twice)} texts were paid for again though their answer had arrived"
    for request in requests:
        tokens = entered.get(request["request_id"], request["billed_tokens"])
        if tokens != request["billed_tokens"]:
            yield f"the ledger says {tokens} tokens, the provider {request['billed_tokens']}"


def left_behind(home: Home, dead: set[str]) -> Iterator[str]:
    """The dead are in the history, and nothing of them is left."""
    from tasks.history import history  # noqa: PLC0415
    from tasks.params import load_config  # noqa: PLC0415

    told = set(history(load_config(home.config))["run_id"])
    if missing := dead - told:
        yield f"history does not know the runs {sorted(missing)}"
    left = [
        str(path.relative_to(home.folder)) for each in LEFTOVERS for path in home.folder.glob(each)
    ]
    if left:
        yield f"left behind: {left}"


def not_done(home: Home, requests: Sequence[dict[str, Any]], address: str) -> Iterator[str]:
    """Another run finds nothing to do."""
    before, version = Disk.of(home.folder), home.table.version
    report = home.run()
    if (report.state, report.published, report.texts.embedded) != ("unchanged", "none", 0):
        yield f"a third run was {report.state}: {report.published}, {report.texts.embedded} texts"
    after = Disk.of(home.folder)
    if home.table.version != version or (after.cache, after.calls) != (before.cache, before.calls):
        yield f"a third run wrote: {before}, then {after}"
    if len(billed_requests(address)) != len(requests):
        yield "a third run was billed"


# --- the sweep --------------------------------------------------------------------------------


@dataclass(frozen=True)
class Bench:
    """What all moments share.

    Attributes:
        folder: Where everything is done.
        address: Of the provider.
        reader: Reads the index of the moment.
        seconds: How long an undisturbed run takes, from the start of its process.
    """

    folder: Path
    address: str
    reader: Reader
    seconds: float

    def scene(self, scene: Scene) -> Known:
        """Run `scene` once without disturbing it, and build its end from nothing too."""
        name = str(scene).replace(", ", "-")
        home, before = Home(self.folder / name, scene, self.address), NO_INDEX
        if scene.before is not None:
            home.write(scene.before)
            home.run()
            before = state_of(home.table)
        undisturbed = home.copy(self.folder / f"{name}-undisturbed", self.address)
        report = undisturbed.run()
        assert report.published == scene.way, f"{scene}: published by {report.published}"
        anew = Home(self.folder / f"{name}-anew", scene, self.address)
        anew.write(scene.after)
        anew.run()
        after = state_of(anew.table)
        assert state_of(undisturbed.table) == after, f"{scene}: an update is no new build"
        return Known(home, before, after, report.calls.ok)


def seconds_of_a_run(folder: Path, address: str) -> float:
    """How long one takes, from the start of its process."""
    home = Home(folder, SCENES[0], address)
    home.write(SCENES[0].after)
    started = time.perf_counter()
    subprocess.run([*COMMAND, str(home.config)], check=True, stdout=subprocess.DEVNULL)
    return time.perf_counter() - started


@contextlib.contextmanager
def prefect_server() -> Iterator[None]:
    """The server of PREFECT_API_URL, or one that lives as long as the block."""
    if os.environ.get("PREFECT_API_URL"):
        yield
        return
    from prefect.settings import PREFECT_API_URL  # noqa: PLC0415
    from prefect.testing.utilities import prefect_test_harness  # noqa: PLC0415

    with prefect_test_harness(server_startup_timeout=120):
        os.environ["PREFECT_API_URL"] = str(PREFECT_API_URL.value())
        try:
            yield
        finally:
            del os.environ["PREFECT_API_URL"]


def sweep(moments: int, seed: int, folder: Path) -> Iterator[Moment]:
    """Kill so many times; what became of each moment, as soon as it is known."""
    known = dict[Scene, Known]()
    with prefect_server(), simulator(vectors="words", latency=LATENCY) as address:
        bench = Bench(folder, address, Reader(), seconds_of_a_run(folder / "timed", address))
        for number in range(moments):
            dice = random.Random(f"{seed}/{number}")
            # Each round of phases meets the scenes one further on.
            scene = SCENES[(number + number // len(FIRST)) % len(SCENES)]
            if scene not in known:
                known[scene] = bench.scene(scene)
            aims = [FIRST[number % len(FIRST)]]
            if number % 4 == 3:
                aims += dice.sample(LATER, dice.randint(1, 2))
            moment = one_moment(number, known[scene], aims, dice, bench)
            kills = ", ".join(f"{kill.hit} (at {kill.aimed})" for kill in moment.kills)
            again = sum(kill.again for kill in moment.kills)
            print(
                f"{number + 1:>3}  {moment.scene:<16}  killed in {kills}; paid again {again}; "
                f"rerun {moment.rerun_s:.1f} s; {moment.reads} reads",
                *(f"\n     BROKEN: {each}" for each in moment.broken),
                flush=True,
            )
            yield moment
        bench.reader.close()


def figures(moments: Sequence[Moment]) -> str:
    """A table by the phase that was hit."""
    head = f"{'phase':<9} {'aimed':>5} {'hit':>4} {'paid again: most':>16} {'sum':>4} {'share':>6} "
    head += f"{'calls in flight':>15} {'unwritten':>9} {'rerun s: median':>15} {'most':>5} "
    lines = [f"{head}{'mixed':>5} {'broken':>6}"]
    billed = sum(moment.billed for moment in moments)
    aimed = Counter(kill.aimed for moment in moments for kill in moment.kills)
    hits, last = defaultdict[str, list[Kill]](list), defaultdict[str, list[Moment]](list)
    for moment in moments:
        last[moment.kills[-1].hit].append(moment)
        for kill in moment.kills:
            hits[kill.hit].append(kill)
    for phase in get_args(Phase):
        again = [kill.again for kill in hits[phase]]
        reruns = [moment.rerun_s for moment in last[phase]] or [0.0]
        lines.append(
            f"{phase:<9} {aimed[phase]:>5} {len(again):>4} {max(again, default=0):>16} "
            f"{sum(again):>4} {sum(again) / max(1, billed):>6.2%} "
            f"{sum(kill.in_flight for kill in hits[phase]):>15} "
            f"{sum(kill.unwritten for kill in hits[phase]):>9} "
            f"{statistics.median(reruns):>15.1f} {max(reruns):>5.1f} "
            f"{sum(moment.mixed for moment in last[phase]):>5} "
            f"{sum(bool(moment.broken) for moment in last[phase]):>6}"
        )
    again_all = sum(kill.again for moment in moments for kill in moment.kills)
    lines.append(
        f"{len(moments)} moments, {sum(aimed.values())} kills, {billed:,} texts billed, "
        f"{again_all} of them again; {sum(moment.reads for moment in moments):,} reads of the "
        f"index, {sum(moment.mixed for moment in moments)} mixed states; "
        f"{sum(bool(moment.broken) for moment in moments)} moments with a broken promise"
    )
    return "\n".join(lines)


def main() -> None:
    """Kill, and tell."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--moments", type=int, default=50)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--json", type=Path, help="Write the figures here.")
    chosen = parser.parse_args()
    os.environ["VOYAGE_API_KEY"] = KEY
    os.environ.setdefault("LANCE_LOG", "error")
    os.environ.setdefault("PREFECT_SERVER_ANALYTICS_ENABLED", "false")
    logging.disable(logging.WARNING)  # what Prefect says of the runs in this process
    folder = Path(tempfile.mkdtemp(prefix="embed-once-kills-"))
    started = time.perf_counter()
    moments = list[Moment]()
    with contextlib.suppress(KeyboardInterrupt):
        for moment in sweep(chosen.moments, chosen.seed, folder):
            moments.append(moment)
    print(figures(moments))
    print(f"{time.perf_counter() - started:.0f} s")
    if chosen.json:
        chosen.json.write_text(json.dumps([moment.as_json() for moment in moments], indent=1))
    if any(moment.broken for moment in moments):
        print(f"What the broken moments left is in {folder}.")
        sys.exit(1)
    shutil.rmtree(folder)


if __name__ == "__main__":
    main()
