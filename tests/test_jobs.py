"""Texts in the Batch lane: submitted once, taken in once, whatever goes wrong between."""

import re
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pyarrow as pa
import pytest
from hypothesis import given
from hypothesis import strategies as st

from tasks.cache import Cache
from tasks.catalog import catalog
from tasks.errors import (
    JobLost,
    ProviderBusy,
    ProviderDenied,
    ProviderError,
    ProviderThrottled,
    StorageFailed,
)
from tasks.harvest import Settled
from tasks.job_notes import JobNotes, Submission
from tasks.jobs import MOST, Most, settle, submit
from tasks.keys import hash_column, text_hash
from tasks.ledger import Ledger
from tasks.limits import Limits
from tasks.providers.voyage import Voyage
from tasks.providers.voyage_jobs import Job, VoyageJobs, _lines
from tasks.recover import recover
from tasks.run import record_notes
from tasks.schemas import BATCH, Batch
from tasks.simulator import Rule, Settings, Simulator
from tasks.simulator.settings import JobSettings
from tasks.storage.folder import Folder

LIMITS = Limits(2000, 8_000_000, 1000, 320_000, 8)
USD = 0.06 * 0.67
TIMES = JobSettings(validating_s=10, line_s=1, finalizing_s=10, window_s=1000)


@pytest.fixture
def simulator(monkeypatch: pytest.MonkeyPatch) -> Iterator[Simulator]:
    monkeypatch.setenv("VOYAGE_API_KEY", "pa-any")
    for name in ("http_proxy", "https_proxy", "all_proxy"):
        monkeypatch.delenv(name, raising=False)
    with Simulator(Settings(clock="manual", jobs=TIMES)) as started:
        yield started


class Lane:
    """One state, one account."""

    def __init__(self, simulator: Simulator, state: Path) -> None:
        self.provider = Voyage("voyage-4", 256, LIMITS, base_url=simulator.base_url)
        self.jobs = VoyageJobs(self.provider)
        self.state = state
        self.notes = JobNotes(str(state), self.provider.space)
        self.staging = state / "staging"
        self.staging.mkdir(parents=True)

    @property
    def cache(self) -> Cache:
        return Cache(str(self.state), self.provider.space)

    def submit(self, *batches: list[str], most: Most = MOST) -> list[Submission]:
        return list(
            submit(
                self.written(batches),
                jobs=self.jobs,
                notes=self.notes,
                folder=self.staging,
                index="index/birds",
                usd_per_million_tokens=USD,
                most=most,
            )
        )

    def written(self, batches: tuple[list[str], ...]) -> Iterator[Batch]:
        for number, texts in enumerate(batches, 1):
            hashes = hash_column([text_hash(text) for text in texts])
            columns = [hashes, pa.array(texts), pa.array([7] * len(texts), pa.int32())]
            yield Batch.write(number, self.staging, [pa.record_batch(columns, schema=BATCH)])

    def settle(self) -> Settled:
        settled = Settled()
        settle(self.provider, self.jobs, self.notes, self.cache, settled)
        return settled

    def known(self, *texts: str) -> list[bool]:
        found: list[bool] = self.cache.holds(
            hash_column([text_hash(text) for text in texts])
        ).tolist()
        return found

    def bill(self) -> tuple[int, float]:
        calls = Ledger(str(self.state)).calls()
        return int(calls["tokens_billed"].sum()), float(calls["usd"].sum())


@pytest.fixture
def lane(simulator: Simulator, tmp_path: Path) -> Lane:
    return Lane(simulator, tmp_path / "state")


def words(count: int, start: int = 0) -> list[str]:
    return [f"bird number {number}" for number in range(start, start + count)]


def test_what_is_submitted_waits_and_comes_in_once_at_a_third_less(
    simulator: Simulator, lane: Lane
) -> None:
    (made,) = lane.submit(words(3), words(2, 3))
    assert made.texts.num_rows == 5
    waiting = lane.settle()
    assert [each.name for each in waiting.waiting] == [made.name]
    assert sorted(lane.notes.waiting().to_pylist()) == sorted(map(text_hash, words(5)))
    assert not any(lane.known(*words(5)))

    simulator.advance(100)
    settled = lane.settle()
    totals = simulator.ledger.totals()
    assert (settled.waiting, settled.texts, settled.failed) == ([], 5, {})
    assert all(lane.known(*words(5)))
    tokens, usd = lane.bill()
    assert tokens == totals["billed_tokens"]
    assert usd == pytest.approx(totals["usd"], rel=1e-12)
    assert totals["usd"] == pytest.approx(0.67 * catalog()["voyage-4"].usd(settled.tokens))
    direct = lane.provider.embed(["bird number 4"]).vectors
    found = lane.cache.vectors(hash_column([text_hash("bird number 4")])).to_pylist()
    assert np.allclose(found, direct, atol=1e-6)
    assert list(lane.jobs.files()) == []  # nothing is kept there that costs storage
    assert lane.notes.all() == []
    assert lane.settle().texts == 0


def test_more_than_a_job_takes_goes_in_several(simulator: Simulator, lane: Lane) -> None:
    made = lane.submit(*[words(3, 3 * number) for number in range(4)], most=Most(texts=6))
    assert [each.texts.num_rows for each in made] == [6, 6]
    assert len(lane.submit(words(2, 12), words(2, 14), most=Most(tokens=15))) == 2
    assert len(lane.submit(words(2, 16), words(2, 18), most=Most(bytes=90))) == 2
    simulator.advance(1000)
    assert lane.settle().texts == 20
    assert all(lane.known(*words(20)))
    assert simulator.ledger.totals()["texts_billed_again"] == 0


@pytest.mark.parametrize("lost", ["the answer", "the request"])
def test_a_job_of_which_nobody_heard_is_found_or_given_up_and_never_doubled(
    simulator: Simulator, lane: Lane, monkeypatch: pytest.MonkeyPatch, lost: str
) -> None:
    action: Any = "process_then_reset" if lost == "the answer" else "reset_before"
    simulator.add(Rule(endpoint="create", action=action, times=1))
    with pytest.raises(ProviderBusy):
        lane.submit(words(3))
    assert len(lane.notes.all()) == 1
    assert len(lane.settle().waiting) == 1  # it may still turn up
    simulator.advance(1000)
    if lost == "the request":
        assert len(lane.settle().waiting) == 1
        monkeypatch.setattr("tasks.jobs.SURE_S", 0.0)
    settled = lane.settle()
    assert settled.texts == (3 if lost == "the answer" else 0)
    assert lane.notes.all() == []
    assert list(lane.jobs.files()) == []
    assert simulator.ledger.totals()["batch_jobs"] == (lost == "the answer")


class Cut(BaseException):
    """As a kill, but for what a `finally` does."""


class Cuts:
    """Cuts a run off at one of its steps: a request, or a write or a removal in the state."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.left = -1
        for owner, name in (
            (Folder, "write"), (Folder, "delete"), (VoyageJobs, "_answer")
        ):  # fmt: skip
            monkeypatch.setattr(owner, name, self._cutting(getattr(owner, name)))

    def _cutting(self, verb: Callable[..., Any]) -> Callable[..., Any]:
        def wrapped(*args: Any, **more: Any) -> Any:
            self.left -= not isinstance(args[0], Folder) or "job" in str(args[1])
            if self.left == 0:
                self.left = -1
                raise Cut
            return verb(*args, **more)

        return wrapped


def test_a_cut_at_any_step_pays_for_nothing_twice(
    simulator: Simulator, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("tasks.jobs.SURE_S", 0.0)
    cuts, moment, cut, billed = Cuts(monkeypatch), 0, True, 0
    while cut:
        moment += 1
        texts = words(4, 10 * moment)
        lane = Lane(simulator, tmp_path / str(moment))
        cuts.left, cut = moment, False
        try:
            lane.submit(texts[:2], texts[2:])
            simulator.advance(200)
            lane.settle()
        except Cut:
            cut = True
        cuts.left = -1
        simulator.advance(200)
        recover(str(lane.state), record_notes)  # as each run does first
        assert lane.settle().waiting == []
        if not all(lane.known(*texts)):  # then it never came to a job
            lane.submit([text for text in texts if not lane.known(text)[0]])
            simulator.advance(200)
            lane.settle()
        assert all(lane.known(*texts))
        assert (lane.notes.all(), list(lane.jobs.files())) == ([], [])
        assert Ledger(str(lane.state)).calls()["texts"].sum() == len(texts)
        billed += lane.bill()[0]
        assert simulator.ledger.totals()["billed_tokens"] == billed
    assert moment > 15
    totals = simulator.ledger.totals()
    assert totals["texts_billed_again"] == 0
    assert totals["batch_jobs"] == moment


def test_what_fails_is_told_by_reason_and_what_is_refused_is_named(
    simulator: Simulator, lane: Lane
) -> None:
    simulator.add(Rule(endpoint="line", marker="number 2", status=400, detail="Bad text."))
    simulator.add(Rule(endpoint="line", marker="number 4", status=500, detail="Down."))
    lane.submit(*[[word] for word in words(12)])
    simulator.change(jobs=TIMES.model_copy(update={"window_s": 18}).model_dump())
    lane.submit(*[[word] for word in words(12, 50)])
    simulator.advance(1000)
    settled = lane.settle()
    assert settled.texts == 10 + 8
    assert settled.failed == {"Bad text.": 1, "Down.": 1, "batch_expired": 4}
    assert lane.notes.refused().to_pylist() == [text_hash("bird number 2")]
    assert lane.known("bird number 2", "bird number 4", "bird number 61") == [False] * 3
    assert lane.notes.all() == []


def test_a_job_that_fails_says_why_and_its_texts_are_free_again(
    simulator: Simulator, lane: Lane
) -> None:
    simulator.change(jobs=TIMES.model_copy(update={"most_lines": 1}).model_dump())
    lane.submit(words(1), words(1, 1))
    simulator.advance(1000)
    settled = lane.settle()
    assert list(settled.failed.values()) == [2]
    assert "At most" in next(iter(settled.failed)) or "holds at most" in next(iter(settled.failed))
    assert lane.notes.waiting().to_pylist() == []


SPOILT = ("process_then_reset", "reset_mid", "short_body", "chunk_trunc")
GARBAGE = ("bad_json", "bad_utf8", "text_plain_200", "empty_200")


@pytest.mark.parametrize("action", [*SPOILT, *GARBAGE, "reset_before"])
@pytest.mark.parametrize(
    "endpoint", ["upload", "create", "jobs", "job", "files", "content", "delete"]
)
def test_whatever_goes_wrong_with_an_answer_is_told_and_costs_nothing(
    simulator: Simulator, lane: Lane, monkeypatch: pytest.MonkeyPatch, endpoint: Any, action: Any
) -> None:
    monkeypatch.setattr("tasks.jobs.SURE_S", 0.0)
    monkeypatch.setattr("tasks.providers.voyage_jobs._AGAIN_S", ())
    simulator.add(Rule(endpoint=endpoint, action=action, times=1))
    if endpoint in {"jobs", "files"}:  # asked only where a job was not heard of
        simulator.add(Rule(endpoint="create", action="process_then_reset", times=1))
    for _ in range(6):
        with suppress(ProviderError):
            lane.settle()
            missing = [text for text in words(3) if not lane.known(text)[0]]
            if missing and not len(lane.notes.waiting()):
                lane.submit(missing[:1], missing[1:])
            simulator.advance(100)
    assert all(lane.known(*words(3)))
    assert lane.notes.all() == []
    totals = simulator.ledger.totals()
    assert (totals["batch_jobs"], totals["texts_billed_again"]) == (1, 0)
    assert lane.bill()[0] == totals["billed_tokens"]


def test_a_job_of_another_account_is_not_taken_for_lost(
    simulator: Simulator, lane: Lane, monkeypatch: pytest.MonkeyPatch
) -> None:
    (made,) = lane.submit(words(3))
    monkeypatch.setenv("VOYAGE_API_KEY", "pa-of-another-account")
    ((trouble, error),) = lane.settle().troubles
    assert (trouble.name, type(error)) == (made.name, JobLost)
    assert re.search(rf"does not know the job {made.id}.*jobs/.*{made.name}", str(error))
    assert len(lane.notes.waiting()) == 3
    monkeypatch.setattr("tasks.jobs.KEPT_S", 0.0)  # a month later
    assert lane.settle().failed == {"Voyage no longer knows the job": 3}
    assert lane.notes.all() == []


def test_an_answer_that_is_gone_is_not_paid_for_again_unasked(
    simulator: Simulator, lane: Lane, monkeypatch: pytest.MonkeyPatch
) -> None:
    (made,) = lane.submit(words(3), words(2, 3))
    simulator.advance(100)
    job = lane.jobs.job(str(made.id))
    assert job is not None
    lane.jobs.delete(str(job.output_file))
    (_,) = lane.submit(words(2, 10))
    simulator.advance(100)
    settled = lane.settle()  # a job of which all is well is taken in all the same
    ((trouble, error),) = settled.troubles
    assert (trouble.name, type(error), settled.texts) == (made.name, JobLost, 2)
    assert re.search(rf"lack 2 of its 2 answers.*jobs/.*{made.name}", str(error))
    assert len(lane.notes.waiting()) == 5
    monkeypatch.setattr("tasks.harvest.KEPT_S", 0.0)  # a month later
    assert lane.settle().failed == {"the job is completed": 5}
    assert lane.notes.all() == []


@pytest.mark.parametrize("cut", ["a bad vector", "too few"])
def test_a_wrong_answer_is_on_the_bill_and_not_asked_for_in_the_lane_again(
    simulator: Simulator, lane: Lane, monkeypatch: pytest.MonkeyPatch, cut: str
) -> None:
    def spoilt(self: VoyageJobs, file: str) -> Iterator[dict[str, Any]]:
        for row in rows(self, file):
            data = row["response"]["body"]["data"]
            if row["custom_id"] == "1" and cut == "too few":
                data.pop()
            elif row["custom_id"] == "1":
                data[0]["embedding"][0] = 7.0
            yield row

    rows = VoyageJobs.rows
    monkeypatch.setattr(VoyageJobs, "rows", spoilt)
    lane.submit(words(2), words(2, 2))
    simulator.advance(100)
    simulator.add(Rule(endpoint="delete", status=503, times=1))
    settled = lane.settle()
    assert (settled.texts, settled.failed.total(), settled.troubles) == (2, 2, [])
    assert lane.notes.refused().to_pylist() == [text_hash(text) for text in words(2)]
    (left,) = lane.notes.all()
    assert left.done
    assert lane.notes.waiting().to_pylist() == []
    again = lane.settle()  # its files went not; its answers are counted once
    assert (again.calls, again.failed, lane.notes.all()) == ([], {}, [])
    assert list(lane.jobs.files()) == []
    assert lane.bill()[0] == simulator.ledger.totals()["billed_tokens"]


def test_notes_that_cannot_be_read_are_named(lane: Lane, index_in: Callable[..., Any]) -> None:
    index = index_in(lane.state)
    (made,) = lane.submit(words(2))
    notes = lane.state / "jobs" / lane.provider.space.id / made.name / "texts.arrow"
    notes.write_bytes(notes.read_bytes()[:50])
    with pytest.raises(
        StorageFailed, match=rf"jobs/.*{made.name}/texts.arrow in .* cannot be read"
    ):
        lane.settle()
    lane.notes.falls_behind(index)
    lane.notes.refuse([text_hash("a")], lane.cache)
    for file in (lane.state / "lanes" / lane.provider.space.id).iterdir():
        file.write_bytes(b"")
    assert lane.notes.behind_s(index) is None
    assert lane.notes.refused().to_pylist() == []
    lane.notes.falls_behind(index)
    assert 0 <= (lane.notes.behind_s(index) or -1) < 60


@pytest.mark.parametrize("status", ["completed", "failed", "cancelled", "expired", "of tomorrow"])
def test_a_job_has_ended_unless_it_is_known_to_go_on(status: str) -> None:
    said = {"id": "1", "input_file_id": "2", "created_at": "2026-01-01T00:00:00Z"}
    assert Job.read({**said, "status": status}).ended
    assert not Job.read({**said, "status": "finalizing"}).ended


@given(st.lists(st.binary(), min_size=1), st.integers(1, 7))
def test_lines_of_an_answer_end_at_line_feeds_only(lines: list[bytes], size: int) -> None:
    lines = [line.replace(b"\n", b"\xe2\x80\xa8") for line in lines]
    data = b"\n".join(lines)
    chunks = (data[at : at + size] for at in range(0, len(data), size))
    assert list(_lines(httpx.Response(200, content=chunks))) == lines


@pytest.mark.parametrize(
    ("rule", "error"),
    [
        (Rule(endpoint="create", status=429), ProviderThrottled),
        (Rule(endpoint="upload", status=503), ProviderBusy),
        (Rule(endpoint="upload", status=401), ProviderDenied),
        (Rule(endpoint="create", action="bad_json"), ProviderBusy),
    ],
)
def test_what_the_provider_says_no_with_is_named_by_what_is_next(
    simulator: Simulator, lane: Lane, rule: Rule, error: type[ProviderError]
) -> None:
    simulator.add(rule)
    with pytest.raises(error) as caught:
        lane.submit(words(2))
    assert "pa-any" not in str(caught.value)
    # Where a job may be there all the same, what it holds is not free yet.
    assert len(lane.notes.all()) == (rule.action == "bad_json")
