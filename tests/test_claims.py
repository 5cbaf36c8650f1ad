"""Runs that share a state: whatever they do at once, one of them pays for a text."""

import signal
import subprocess
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from random import Random
from types import FrameType
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tasks import claims, sender
from tasks.cache import Cache
from tasks.claims import Claims, Standing, take_up
from tasks.embed import Embedded, embed_batch
from tasks.errors import ProviderBusy, RunStopped
from tasks.index import open_index
from tasks.journal import RunFolder, fold
from tasks.keys import hash_column, text_hash
from tasks.limits import Limits
from tasks.notes import Call
from tasks.params import Config
from tasks.providers import Answer
from tasks.providers.lexical import Lexical
from tasks.recover import recover
from tasks.schemas import BATCH, Batch, TableRef
from tasks.sender import Terms, forget_sender, sender_of
from tasks.storage import storage_at
from tests.waiting import until

WORDS = ["alpha", "beta", "gamma"]
LIMITS = Limits(None, None, 1000, None, 1)
Ref = Callable[..., TableRef]
CallOf = Callable[..., Call]


def hashes(*texts: str) -> pa.Array:
    return hash_column([text_hash(text) for text in texts])


def how(standing: Standing) -> str:
    """A letter a text: free, found or taken."""
    return "".join(
        "-" if free else "f" if found else "t"
        for free, found in zip(standing.free, standing.found, strict=True)
    )


@dataclass
class Run:
    """A run as others see it: it lives, claims, pays and folds."""

    folder: RunFolder
    provider: Lexical
    call_of: CallOf
    living: bool = True

    def __post_init__(self) -> None:
        self._life = ExitStack()
        self._life.enter_context(self.folder.alive())
        self.cache = Cache(self.folder.state_uri, self.provider.space)
        self.claims = Claims(self.folder, self.cache)

    def claim(self, *texts: str, batch: int = 1) -> str:
        return how(self.claims.claim(batch, hashes(*texts)))

    def pay(self, *texts: str, batch: int = 1) -> None:
        vectors = self.provider.embed(texts).vectors
        call = self.call_of(self.folder.run_id, batch)
        self.folder.write_answer(hashes(*texts), vectors, self.provider.space, call)

    def ends(self) -> None:
        """End as a killed one does: what it has written stays."""
        self.living = False
        self._life.close()


def claims_in(folder: RunFolder) -> list[str]:
    return storage_at(folder.state_uri).names(f"runs/{folder.run_id}/claims")


@pytest.fixture
def run(tmp_path: Path, lexical: Lexical, call_of: CallOf) -> Iterator[Callable[..., Run]]:
    """Makes living runs that share a state."""
    with ExitStack() as living:

        def make(run_id: str, provider: Lexical = lexical) -> Run:
            one = Run(RunFolder(str(tmp_path), run_id), provider, call_of)
            living.callback(one.ends)
            return one

        yield make


# Claims


def test_what_a_living_run_has_claimed_is_taken_until_it_lets_go(run: Callable[..., Run]) -> None:
    one, two = run("one"), run("two")
    assert one.claim("alpha", "beta") == "--"
    assert two.claim("beta", "gamma") == "t-"
    assert one.claim("alpha", "gamma", "delta", batch=2) == "-t-"
    assert one.claim("gamma", batch=3) == "t"
    assert len(claims_in(one.folder)) == 2
    one.claims.release(1)
    one.claims.release(2)
    two.claims.release(1)
    assert two.claim("alpha", "beta", "gamma") == "---"
    two.claims.release(1)
    two.claims.release(1)
    assert claims_in(two.folder) == []


def test_a_run_alone_claims_too_so_that_whoever_comes_sees_it(run: Callable[..., Run]) -> None:
    one = run("one")
    assert one.claim(*WORDS) == "---"
    assert run("two").claim(*WORDS) == "ttt"


def test_claims_of_another_space_do_not_count(run: Callable[..., Run], lexical: Lexical) -> None:
    one, other = run("one"), run("two", Lexical(64, lexical.limits))
    assert one.claim(*WORDS) == "---"
    assert other.claim(*WORDS) == "---"
    one.pay(*WORDS)
    assert other.claim(*WORDS, batch=2) == "---"


def test_claims_of_a_run_that_died_do_not_count(run: Callable[..., Run]) -> None:
    dead, one = run("dead"), run("one")
    dead.pay("alpha")
    assert dead.claim("beta") == "-"
    assert one.claim(*WORDS) == "ft-"
    one.claims.release(1)
    dead.ends()
    assert len(claims_in(dead.folder)) == 1
    assert one.claim(*WORDS) == "f--"


def test_an_answer_is_found_wherever_it_is_on_its_way(run: Callable[..., Run]) -> None:
    one, two = run("one"), run("two")
    one.claim(*WORDS)
    one.pay("alpha", "beta")
    assert two.claim(*WORDS) == "fft"
    two.claims.release(1)
    fold(one.folder, one.cache)
    one.claims.release(1)
    assert two.claim(*WORDS) == "ff-"


def test_what_a_run_paid_that_came_and_went_unseen_is_found(
    tmp_path: Path, run: Callable[..., Run]
) -> None:
    one = run("one")
    assert one.claim("alpha") == "-"
    short = run("short")
    short.pay("beta")
    fold(short.folder, short.cache)
    short.folder.forget_notes()
    short.ends()
    assert storage_at(str(tmp_path)).folders("runs") == ["one"]
    assert one.claim("gamma", "beta", batch=2) == "-f"
    assert one.claim("beta", batch=3) == "f"
    assert len(claims_in(one.folder)) == 2  # nothing is held for nothing


@given(st.integers(0, 40), st.integers(0, 20), st.integers(0, 20))
def test_hashes_are_the_same_in_a_file(size: int, start: int, length: int) -> None:
    column = hashes(*map(str, range(size))).slice(start, length)
    assert claims._hashes(claims._bytes(column)).to_pylist() == column.to_pylist()  # noqa: SLF001


def test_of_runs_that_claim_at_once_at_most_one_gets_a_text(run: Callable[..., Run]) -> None:
    runs, rounds = [run(name) for name in "abc"], 60
    start = threading.Barrier(len(runs))

    def claims_of(one: Run) -> list[str]:
        found = []
        for number in range(rounds):
            start.wait()
            found.append(one.claim(*(f"{number} {word}" for word in WORDS), batch=number))
        return found

    with ThreadPoolExecutor() as threads:
        claimed = list(threads.map(claims_of, runs))
    got = [sum(one == "---" for one in each) for each in zip(*claimed, strict=True)]
    assert set(got) <= {0, 1}


Step = Callable[["Run", str, int], None]


def dies(one: Run, text: str, batch: int) -> None:
    one.pay(text, batch=batch)
    one.ends()


def lets_go(one: Run, text: str, batch: int) -> None:
    one.pay(text, batch=batch)
    one.claims.release(batch)


def folds(one: Run, text: str, batch: int) -> None:
    lets_go(one, text, batch)
    fold(one.folder, one.cache)


@pytest.mark.slow
@pytest.mark.parametrize("step", [dies, lets_go, folds])
def test_no_answer_is_missed_that_moves_on_while_it_is_looked_for(
    run: Callable[..., Run], step: Step
) -> None:
    """At whatever line of the look the other run moves on, what it has paid is not free."""
    one, two, line, reached = run("one"), run("two"), 0, True
    while reached:
        line += 1
        if not two.living:
            two = run(f"two-{line}")
        text = f"text {line}"
        assert two.claim(text, batch=line) == "-"
        with at_line(line, lambda: step(two, text, line)) as came:  # noqa: B023
            assert one.claim(text, batch=line) in {"f", "t"}
        reached = came()
        two.claims.release(line)
    assert line > 30


@contextmanager
def at_line(number: int, act: Callable[[], None]) -> Iterator[Callable[[], bool]]:
    """Do something when so many lines of tasks/claims.py are reached; says whether they were."""
    seen, done = set[int](), False

    def trace(frame: FrameType, event: str, _: Any) -> Any:
        nonlocal done
        if frame.f_code.co_filename != claims.__file__ or done:
            return None
        if event == "line":
            seen.add(frame.f_lineno)
            if len(seen) == number:
                done = True
                sys.settrace(None)
                act()
        return trace

    before = sys.gettrace()
    sys.settrace(trace)
    try:
        yield lambda: done
    finally:
        sys.settrace(before)


def test_vectors_found_elsewhere_are_taken_up_wherever_they_went(
    tmp_path: Path, run: Callable[..., Run], lexical: Lexical
) -> None:
    one, two, dead = run("one"), run("two"), run("dead")
    two.pay("alpha", "other")
    dead.pay("beta")
    dead.ends()
    assert one.claim(*WORDS) == "ff-"
    recover(str(tmp_path), lambda _folder, _calls: None)
    take_up(one.cache, str(tmp_path), hashes("alpha", "beta"))
    found = one.cache.vectors(hashes("alpha", "beta")).values.to_numpy().reshape(2, -1)
    assert np.array_equal(found, lexical.embed(["alpha", "beta"]).vectors)
    assert one.cache.holds(hashes("other")).tolist() == [False]


# Batches


@dataclass(eq=False)
class Gate:
    """A provider whose calls wait for `open`, and fail while `busy`; it counts what it bills."""

    lexical: Lexical
    billed: Counter[str] = field(default_factory=Counter)
    calls: list[list[str]] = field(default_factory=list)
    open: threading.Event = field(default_factory=threading.Event)
    busy: bool = False

    def __getattr__(self, name: str) -> Any:
        return getattr(self.lexical, name)

    def embed(self, texts: Sequence[str]) -> Answer:
        self.calls.append(list(texts))
        assert self.open.wait(30)
        if self.busy:
            raise ProviderBusy("503")
        self.billed.update(texts)
        return self.lexical.embed(texts)


@pytest.fixture
def gate() -> Callable[[], Gate]:
    return lambda: Gate(Lexical(256, LIMITS))


@dataclass
class Embedding:
    """A run that embeds batches in threads."""

    terms: Terms
    ref: Ref
    threads: ThreadPoolExecutor
    batches: int = 0

    def start(self, *texts: str, attempt: int = 1) -> Any:
        self.batches += attempt == 1
        rows = [{"text_hash": text_hash(text), "text": text, "tokens": 2} for text in texts]
        batch = Batch(self.batches, self.ref(BATCH, rows), 2 * len(rows))
        return self.threads.submit(embed_batch, batch, self.terms, attempt)


@pytest.fixture
def embedding(tmp_path: Path, ref: Ref) -> Iterator[Callable[..., Embedding]]:
    """Makes living runs that embed; their threads end with the test."""
    with ExitStack() as living:

        def make(run_id: str, provider: Gate) -> Embedding:
            folder = RunFolder(str(tmp_path), run_id)
            living.enter_context(folder.alive())
            living.callback(forget_sender, folder)
            threads = living.enter_context(ThreadPoolExecutor())
            terms: Any = Terms(provider, folder, 0.0)
            living.callback(sender_of(terms).stop, RunStopped("The test has ended."))
            return Embedding(terms, ref, threads)

        yield make


def texts_of(embedded: Embedded) -> tuple[int, list[bytes]]:
    return embedded.texts, embedded.found.to_pylist()


def test_a_text_that_another_run_is_sending_is_waited_for_and_not_sent(
    embedding: Callable[..., Embedding], gate: Callable[[], Gate]
) -> None:
    first, second = gate(), gate()
    one, two = embedding("one", first), embedding("two", second)
    second.open.set()
    sending = one.start("alpha", "beta")
    until(lambda: first.calls == [["alpha", "beta"]])
    waiting = two.start("beta", "gamma", "alpha")
    # What is its own goes first; meanwhile it holds neither slot nor turn, nor a claim.
    until(lambda: second.calls == [["gamma"]])
    assert two.start("delta").result(10).texts == 1
    assert claims_in(two.terms.folder) == []
    assert not waiting.done()
    first.open.set()
    assert texts_of(sending.result(10)) == (2, [])
    found = waiting.result(10)
    assert texts_of(found) == (1, hashes("beta", "alpha").to_pylist())
    assert found.found_tokens == 4
    assert second.calls == [["gamma"], ["delta"]]
    assert [call.texts for call in two.terms.folder.calls()] == [1, 1]


def test_what_another_run_could_not_embed_is_embedded_here(
    embedding: Callable[..., Embedding], gate: Callable[[], Gate]
) -> None:
    first, second = gate(), gate()
    one, two = embedding("one", first), embedding("two", second)
    first.busy = True
    second.open.set()
    sending = one.start(*WORDS)
    until(lambda: len(first.calls) == 1)
    waiting = two.start(*WORDS)
    time.sleep(0.2)
    first.open.set()
    with pytest.raises(ProviderBusy):
        sending.result(10)
    assert texts_of(waiting.result(10)) == (3, [])
    assert second.calls == [WORDS]
    # And the other way round: its retry finds what was paid for meanwhile.
    assert texts_of(one.start(*WORDS, attempt=2).result(10)) == (0, hashes(*WORDS).to_pylist())
    assert len(first.calls) == 1


def test_a_run_that_is_stopped_waits_for_others_no_longer(
    embedding: Callable[..., Embedding], gate: Callable[[], Gate]
) -> None:
    first = gate()
    one, two = embedding("one", first), embedding("two", gate())
    sending = one.start(*WORDS)
    until(lambda: len(first.calls) == 1)
    waiting = two.start(*WORDS)
    time.sleep(0.1)
    stopped = time.monotonic()
    sender_of(two.terms).stop(RunStopped("Ctrl-C"))
    with pytest.raises(RunStopped, match="Ctrl-C"):
        waiting.result(10)
    assert time.monotonic() - stopped < 2 * claims.POLL_S
    first.open.set()
    assert sending.result(10).texts == 3


def test_a_long_wait_for_another_run_is_told_once_and_is_no_outage(
    embedding: Callable[..., Embedding],
    gate: Callable[[], Gate],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    told: list[str] = []
    monkeypatch.setattr(sender, "tell_waiting", told.append)
    monkeypatch.setattr(sender, "TELL_AFTER_S", 0.05)
    monkeypatch.setattr(sender, "POLL_S", 0.02)
    first, second = gate(), gate()
    one, two = embedding("one", first), embedding("two", second)
    two.terms = Terms(second, two.terms.folder, 0.0, max_wait_s=0.1)
    sending = one.start(*WORDS)
    until(lambda: len(first.calls) == 1)
    waiting = [two.start("alpha"), two.start("beta")]
    until(lambda: len(told) == 1)
    time.sleep(0.3)
    first.open.set()
    assert [each.result(10).texts for each in (*waiting, sending)] == [0, 0, 3]
    assert told == ["texts that another run is embedding: 1"]


@pytest.mark.slow
@given(st.data())
@settings(max_examples=8, deadline=None)
def test_runs_that_embed_the_same_in_any_order_pay_for_each_text_once(
    fresh: Callable[[], Path], ref: Ref, data: st.DataObject
) -> None:
    """Batches are cut differently, calls fail now and then, and nobody waits for ever."""
    seed = data.draw(st.integers(0, 2**32))
    fail = data.draw(st.sampled_from([0.0, 0.3]))
    state, texts, billed = fresh(), [f"word{number}" for number in range(30)], Counter[str]()

    @dataclass(eq=False)
    class Flaky(Gate):
        seed: int = 0

        def embed(self, texts: Sequence[str]) -> Answer:
            draw = Random(f"{self.seed} {len(self.calls)}")
            self.calls.append(list(texts))
            time.sleep(draw.random() / 100)
            if draw.random() < fail:
                raise ProviderBusy("503")
            billed.update(texts)
            return self.lexical.embed(texts)

    def run_one(number: int) -> Counter[str]:
        draw, order, seen = Random(seed + number), list(texts), Counter[str]()
        draw.shuffle(order)
        folder = RunFolder(str(state), f"run-{number}")
        terms: Any = Terms(Flaky(Lexical(64, LIMITS), billed, seed=number), folder, 0.0)
        with folder.alive(), ThreadPoolExecutor() as threads:
            one, running = Embedding(terms, ref, threads), []
            while order:
                part = [order.pop() for _ in range(min(len(order), draw.randint(1, 9)))]
                running.append((part, one.start(*part)))
            for at, (part, future) in enumerate(running, 1):
                one.batches, attempts = at, [future]
                while isinstance(attempts[-1].exception(120), ProviderBusy):
                    attempts.append(one.start(*part, attempt=len(attempts) + 1))
                embedded = attempts[-1].result()
                assert embedded.texts + len(embedded.found) == len(part)
                seen.update(embedded=embedded.texts, found=len(embedded.found))
            cache = Cache(str(state), terms.provider.space)
            fold(folder, cache)
            take_up(cache, str(state), hashes(*texts))
            cache.require(hashes(*texts))
        forget_sender(folder)
        return seen

    with pytest.MonkeyPatch.context() as patch, ThreadPoolExecutor() as runs:
        patch.setattr(sender, "POLL_S", 0.02)
        patch.setattr(claims, "POLL_S", 0.02)
        seen = list(runs.map(run_one, range(3)))
    assert billed == Counter(texts)
    assert sum(one["embedded"] for one in seen) == len(texts)


# Kills

KILLED = """
import os, signal, sys
from pathlib import Path
import numpy as np
from tasks.embed import embed_batch
from tasks.journal import RunFolder
from tasks.keys import text_hash
from tasks.limits import Limits
from tasks.providers.lexical import Lexical
from tasks.schemas import BATCH, Batch, TableRef
from tasks.sender import Terms
import pyarrow as pa

state, left, texts = sys.argv[1], int(sys.argv[2]), sys.argv[3].split(",")

def step():
    global left
    left -= 1
    if not left:
        os.kill(os.getpid(), signal.SIGKILL)

def heard(event, arguments):
    if event in {"open", "os.rename", "os.remove"} and f"{state}/runs/killed/" in str(arguments[0]):
        step()

class Billed(Lexical):
    def embed(self, texts):
        step()
        answer = super().embed(texts)
        with open(f"{state}/billed", "a") as file:
            file.write("".join(f"{text}\\n" for text in texts))
        step()
        return answer

folder = RunFolder(state, "killed")
with folder.alive():
    terms = Terms(Billed(64, Limits(None, None, 1000, None, 1)), folder, 0.0)
    sys.addaudithook(heard)
    print("ready", flush=True)
    for number in range(len(texts) // 5):
        rows = [{"text_hash": text_hash(text), "text": text, "tokens": 2}
                for text in texts[5 * number : 5 * number + 5]]
        path = Path(f"{state}/batch-{number}.arrow")
        table = pa.Table.from_pylist(rows, schema=BATCH)
        embed_batch(Batch(number + 1, TableRef.write(path, BATCH, [table]), 10), terms, 1)
"""


@pytest.mark.slow
@pytest.mark.parametrize("steps", [*range(1, 14), 22, 35])
def test_a_run_killed_between_any_two_steps_costs_what_was_in_flight_and_holds_up_nobody(
    tmp_path: Path, embedding: Callable[..., Embedding], steps: int
) -> None:
    texts = [f"word{number}" for number in range(25)]
    command = [sys.executable, "-c", KILLED, str(tmp_path), str(steps), ",".join(texts)]
    killed = subprocess.Popen(command, stdout=subprocess.PIPE, cwd=Path(__file__).parents[1])
    try:
        assert killed.stdout is not None
        assert killed.stdout.readline() == b"ready\n"
        gate = Gate(Lexical(64, LIMITS))
        gate.open.set()
        one = embedding("one", gate)
        running = [one.start(*texts[start : start + 4]) for start in range(0, len(texts), 4)]
        seen = [future.result(120) for future in running]
    finally:
        killed.kill()
        # Where the other one is faster, it finds most paid for and takes fewer steps.
        assert killed.wait() in ({-signal.SIGKILL} if steps < 15 else {-signal.SIGKILL, 0})
        killed.communicate()
    assert sum(each.texts + len(each.found) for each in seen) == len(texts)
    log = tmp_path / "billed"
    billed = Counter(log.read_text().split()) if log.exists() else Counter[str]()
    twice = billed + gate.billed - Counter(texts)
    assert twice.total() <= 5
    assert set(billed + gate.billed) == set(texts)
    recover(str(tmp_path), lambda _folder, _calls: None)
    cache = Cache(str(tmp_path), gate.space)
    fold(one.terms.folder, cache)
    cache.require(hashes(*texts))


# Whole runs


def test_two_runs_at_once_on_the_same_corpus_pay_for_it_once(
    tmp_path: Path, reindex: Callable[..., Any]
) -> None:
    (tmp_path / "corpus").mkdir()
    for number in range(120):
        (tmp_path / "corpus" / f"{number}.txt").write_text(f"wolf{number} fox{number}\n")
    start = threading.Barrier(2)

    def run(table: str) -> Any:
        config = Config.model_validate(
            {
                "name": "shared",
                "source": {"kind": "files", "path": str(tmp_path / "corpus")},
                "embedding": {"provider": "lexical", "dimension": 64},
                "limits": {"texts_per_request": 10},
                "index": {"uri": str(tmp_path / "index"), "table": table},
                "state": {"uri": str(tmp_path / "state")},
            }
        )
        return config, reindex(config, before_second_pass=start.wait)

    with ThreadPoolExecutor() as threads:
        (one_config, one), (two_config, two) = threads.map(run, ["one", "two"])
    assert sorted([*one.sent, *two.sent]) == sorted(f"wolf{n} fox{n}" for n in range(120))
    first, second = (rows_of(config) for config in (one_config, two_config))
    assert len(first) == 120
    assert first == second


def rows_of(config: Config) -> dict[str, tuple[str, list[float]]]:
    table = open_index(config.index)
    assert table is not None
    return {row["id"]: (row["text"], row["vector"]) for row in table.search().to_list()}
