"""The simulated Batch API: a job goes on by the clock, is billed by line, and fails as told."""

import base64
import json
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
import requests
from hypothesis import given
from hypothesis import strategies as st
from openai import OpenAI
from pydantic import ValidationError

from tasks.catalog import catalog
from tasks.simulator import Rule, Settings, Simulator
from tasks.simulator.checks import Asked
from tasks.simulator.job import ENDED, Job, Line
from tasks.simulator.settings import JobSettings

KEY = "a key"
TIMES = JobSettings(
    validating_s=10, line_s=2, finalizing_s=10, cancelling_s=5, window_s=1000, most_lines=50
)
PARAMS = {"model": "voyage-4", "input_type": "document", "output_dimension": 256}
FACTS = catalog()["voyage-4"]


@pytest.fixture
def simulator() -> Iterator[Simulator]:
    with Simulator(Settings(clock="manual", jobs=TIMES)) as started:
        yield started


class Account:
    """What one key asks of the simulator."""

    def __init__(self, simulator: Simulator, key: str = KEY) -> None:
        self._url = simulator.base_url
        self._session = requests.Session()
        self._session.trust_env = False
        self._session.headers["authorization"] = f"Bearer {key}"

    def send(self, method: str, path: str, **more: Any) -> requests.Response:
        return self._session.request(method, f"{self._url}/{path}", timeout=10, **more)

    def upload(self, data: bytes, purpose: str = "batch") -> requests.Response:
        files = {"file": ("lines.jsonl", data)}
        return self.send("POST", "files", data={"purpose": purpose}, files=files)

    def create(self, data: bytes, **changes: Any) -> requests.Response:
        wanted = {
            "endpoint": "/v1/embeddings",
            "input_file_id": self.upload(data).json()["id"],
            "completion_window": "12h",
            "request_params": PARAMS,
            "metadata": {"run": "one"},
        }
        return self.send("POST", "batches", json={**wanted, **changes})

    def job(self, name: str) -> Any:
        return self.send("GET", f"batches/{name}").json()

    def rows(self, file: str) -> dict[str, Any]:
        """The lines of a file, by custom_id."""
        content = self.send("GET", f"files/{file}/content").content
        return {row["custom_id"]: row for row in map(json.loads, content.splitlines())}


@pytest.fixture
def account(simulator: Simulator) -> Account:
    return Account(simulator)


def lines(*batches: list[str], **more: Any) -> bytes:
    rows = [
        {"custom_id": f"r-{number}", "body": {"input": texts, **more}}
        for number, texts in enumerate(batches)
    ]
    return b"".join(json.dumps(row).encode() + b"\n" for row in rows)


def words(count: int) -> list[list[str]]:
    return [[f"word {number}", f"and {number} again"] for number in range(count)]


def test_a_job_passes_all_its_states_and_brings_each_line_once_in_no_order(
    simulator: Simulator, account: Account
) -> None:
    texts = words(20)
    made = account.create(lines(*texts)).json()
    assert (made["status"], made["object"], made["metadata"]) == (
        "validating",
        "batch",
        {"run": "one"},
    )
    seen = [made["status"]]
    for _ in range(70):
        simulator.advance(1)
        job = account.job(made["id"])
        seen += [job["status"]] if job["status"] != seen[-1] else []
        assert (job["output_file_id"] is None) == (job["status"] != "completed")
    assert seen == ["validating", "in_progress", "finalizing", "completed"]
    assert job["request_counts"] == {"total": 20, "completed": 20, "failed": 0}
    assert job["error_file_id"] is None
    moments = ("created_at", "in_progress_at", "finalizing_at", "completed_at")
    assert [job[moment] for moment in moments] == sorted(job[moment] for moment in moments)

    rows = account.rows(job["output_file_id"])
    assert set(rows) == {f"r-{number}" for number in range(20)}
    assert list(rows) != sorted(rows, key=lambda name: int(name[2:]))
    direct = account.send("POST", "embeddings", json={**PARAMS, "input": texts[7]}).json()
    body = rows["r-7"]["response"]["body"]
    assert rows["r-7"]["response"]["status_code"] == 200
    assert (body["data"], body["usage"]) == (direct["data"], direct["usage"])


def test_vectors_come_in_base64_where_that_is_asked_for(
    simulator: Simulator, account: Account
) -> None:
    params = {**PARAMS, "encoding_format": "base64"}
    made = account.create(lines(["alpha"]), request_params=params).json()
    simulator.advance(100)
    (row,) = account.rows(account.job(made["id"])["output_file_id"]).values()
    data = base64.b64decode(row["response"]["body"]["data"][0]["embedding"])
    assert np.linalg.norm(np.frombuffer(data, "<f4")) == pytest.approx(1, abs=1e-5)


def test_each_line_is_billed_when_it_is_done_at_a_third_less(
    simulator: Simulator, account: Account
) -> None:
    texts = words(10)
    account.create(lines(*texts))
    assert simulator.ledger.totals()["batch_lines"] == 0
    simulator.advance(10 + 2 * 4)
    totals = simulator.ledger.totals()
    assert (totals["batch_jobs"], totals["batch_lines"], totals["calls"]) == (1, 4, 0)
    assert totals["distinct_texts"] == 8
    simulator.advance(1000)
    totals = simulator.ledger.totals()
    tokens = totals["batch_tokens"]
    assert totals["batch_usd"] == pytest.approx(0.67 * FACTS.usd(tokens), rel=1e-12)
    assert (totals["billed_tokens"], totals["usd"]) == (tokens, totals["batch_usd"])
    account.send("POST", "embeddings", json={**PARAMS, "input": texts[0]})
    assert simulator.ledger.totals()["texts_billed_again"] == 2  # whichever lane
    assert {record.lane for record in simulator.ledger.requests} == {"batch", "realtime"}


def test_what_the_window_cuts_off_is_told_and_not_billed(
    simulator: Simulator, account: Account
) -> None:
    times = TIMES.model_copy(update={"window_s": 20})
    simulator.change(jobs=times.model_dump())
    made = account.create(lines(*words(20))).json()
    simulator.advance(19)
    assert account.job(made["id"])["status"] == "in_progress"
    simulator.advance(100)
    job = account.job(made["id"])
    assert job["status"] == "completed"
    assert job["request_counts"] == {"total": 20, "completed": 5, "failed": 15}
    assert set(account.rows(job["output_file_id"])) == {f"r-{number}" for number in range(5)}
    expired = account.rows(job["error_file_id"])
    assert len(expired) == 15
    assert {row["error"]["code"] for row in expired.values()} == {"batch_expired"}
    assert simulator.ledger.totals()["batch_lines"] == 5


def test_a_cancelled_job_keeps_what_was_done(simulator: Simulator, account: Account) -> None:
    made = account.create(lines(*words(20))).json()
    simulator.advance(10 + 2 * 3 + 1)
    assert account.send("POST", f"batches/{made['id']}/cancel").json()["status"] == "cancelling"
    simulator.advance(5)
    job = account.job(made["id"])
    assert (job["status"], job["completed_at"]) == ("cancelled", None)
    assert set(account.rows(job["output_file_id"])) == {"r-0", "r-1", "r-2"}
    assert job["error_file_id"] is None
    simulator.advance(1000)
    assert simulator.ledger.totals()["batch_lines"] == 3
    assert account.send("POST", f"batches/{made['id']}/cancel").status_code == 400

    early = account.create(lines(*words(2))).json()
    account.send("POST", f"batches/{early['id']}/cancel")
    simulator.advance(1000)
    assert account.job(early["id"])["request_counts"]["completed"] == 0
    assert account.job(early["id"])["output_file_id"] is None


def test_a_line_that_is_refused_stands_among_the_errors(
    simulator: Simulator, account: Account
) -> None:
    simulator.add(Rule(endpoint="line", marker="<poison>", status=500, detail="Broken."))
    made = account.create(lines(["good"], [""], ["a <poison>"])).json()
    simulator.advance(1000)
    job = account.job(made["id"])
    errors = account.rows(job["error_file_id"])
    assert set(account.rows(job["output_file_id"])) == {"r-0"}
    assert errors["r-1"]["response"]["status_code"] == 400
    assert "empty strings" in errors["r-1"]["response"]["message"]
    assert errors["r-2"]["response"] == {"status_code": 500, "message": "Broken."}
    assert simulator.ledger.totals()["batch_lines"] == 1


@pytest.mark.parametrize(
    ("data", "line", "code"),
    [
        (b"", None, "empty_file"),
        (b"no json\n", 1, "invalid_line"),
        (lines(["a"]) + b'{"custom_id": "x"}\n', 2, "invalid_line"),
        (lines(["a"]) + lines(["b"]), 2, "duplicate_custom_id"),
        (lines(*words(51)), None, "too_many_lines"),
    ],
)
def test_a_job_whose_file_is_bad_fails_when_it_is_validated(
    simulator: Simulator, account: Account, data: bytes, line: int | None, code: str
) -> None:
    made = account.create(data).json()
    assert made["status"] == "validating"
    simulator.advance(10)
    job = account.job(made["id"])
    assert (job["status"], job["output_file_id"]) == ("failed", None)
    assert [(each["line"], each["code"]) for each in job["errors"]["data"]] == [(line, code)]
    assert simulator.ledger.totals()["usd"] == 0


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"endpoint": "/v1/rerank"}, "endpoint"),
        ({"completion_window": "24h"}, "completion_window"),
        ({"request_params": {"model": "voyage-code-4"}}, "not supported in batches"),
        ({"request_params": {**PARAMS, "input": ["a"]}}, "request_params"),
        ({"metadata": {"a": "x" * 513}}, "metadata"),
        ({"metadata": {f"{number}": "" for number in range(17)}}, "metadata"),
        ({"more": 1}, "nothing else"),
        ({"input_file_id": "file-none"}, "No such file"),
    ],
)
def test_a_job_that_asks_for_what_there_is_not_is_refused(
    account: Account, changes: dict[str, Any], words: str
) -> None:
    refused = account.create(lines(["a"]), **changes)
    assert refused.status_code in {400, 404}
    assert words in refused.json()["detail"]


def test_an_account_has_no_more_under_way_than_it_may(
    simulator: Simulator, account: Account
) -> None:
    simulator.change(jobs=TIMES.model_copy(update={"most_in_flight": 2}).model_dump())
    for _ in range(2):
        assert account.create(lines(["a"])).status_code == 200
    assert account.create(lines(["a"])).status_code == 429
    assert Account(simulator, "another").create(lines(["a"])).status_code == 200
    simulator.advance(1000)
    assert account.create(lines(["a"])).status_code == 200

    simulator.change(jobs=TIMES.model_copy(update={"most_enqueued_tokens": 10}).model_dump())
    assert account.create(lines(["long " * 100])).status_code == 429


def test_files_and_jobs_are_listed_in_pages_and_belong_to_their_account(
    simulator: Simulator, account: Account
) -> None:
    made = [account.create(lines([f"text {number}"])).json()["id"] for number in range(5)]
    first = account.send("GET", "batches", params={"limit": 2}).json()
    assert [job["id"] for job in first["data"]] == made[:2:-1]
    assert (first["last_id"], first["has_more"]) == (made[3], True)
    rest = account.send("GET", "batches", params={"after": made[3]}).json()
    assert ([job["id"] for job in rest["data"]], rest["has_more"]) == (made[2::-1], False)
    assert account.send("GET", "batches", params={"limit": 101}).status_code == 400
    assert len(account.send("GET", "files").json()["data"]) == 5

    other = Account(simulator, "another")
    assert other.send("GET", "batches").json()["data"] == []
    assert other.send("GET", f"batches/{made[0]}").status_code == 404
    assert Account(simulator, "").send("GET", "batches").status_code == 401


def test_a_file_is_shown_read_and_deleted(simulator: Simulator, account: Account) -> None:
    data = lines(["alpha", "beta"]) + b"\r\n--not a boundary\r\n"
    file = account.upload(data).json()
    assert (file["object"], file["purpose"], file["bytes"]) == ("file", "batch", len(data))
    assert account.send("GET", f"files/{file['id']}").json() == file
    assert account.send("GET", f"files/{file['id']}/content").content == data
    assert account.upload(data, purpose="fine-tune").status_code == 400

    made = account.create(lines(["alpha"])).json()
    simulator.advance(1000)
    output = account.job(made["id"])["output_file_id"]
    for name in (file["id"], output):
        assert account.send("DELETE", f"files/{name}").json()["deleted"] is True
        assert account.send("GET", f"files/{name}/content").status_code == 404
    assert account.send("GET", "files/none/of/these").status_code == 404
    assert account.send("PUT", "batches").status_code in {404, 501}


def test_faults_hit_the_endpoint_that_they_name(simulator: Simulator, account: Account) -> None:
    simulator.add(Rule(endpoint="create", requests=frozenset({1}), action="process_then_reset"))
    simulator.add(Rule(endpoint="job", times=1, status=503))
    with pytest.raises(requests.ConnectionError):
        account.create(lines(["alpha"]))
    (made,) = account.send("GET", "batches").json()["data"]  # it is there all the same
    assert account.send("GET", f"batches/{made['id']}").status_code == 503
    assert account.job(made["id"])["status"] == "validating"
    with pytest.raises(ValidationError, match="embeddings alone"):
        Rule(endpoint="create", action="nan")
    with pytest.raises(ValidationError, match="can but get a status"):
        Rule(endpoint="line", action="hang")
    simulator.reset()
    assert account.send("GET", "batches").json()["data"] == []


def test_openais_sdk_gets_through_a_job(simulator: Simulator) -> None:
    client = OpenAI(api_key=KEY, base_url=simulator.base_url, max_retries=0)
    file = client.files.create(file=("lines.jsonl", lines(["alpha"], ["beta"])), purpose="batch")
    job = client.batches.create(
        input_file_id=file.id,
        endpoint="/v1/embeddings",
        completion_window="12h",  # type: ignore[arg-type]
        extra_body={"request_params": PARAMS},
    )
    simulator.advance(1000)
    job = client.batches.retrieve(job.id)
    assert job.status == "completed"
    assert job.output_file_id is not None
    rows = client.files.content(job.output_file_id).text.splitlines()
    assert {json.loads(row)["custom_id"] for row in rows} == {"r-0", "r-1"}
    client.files.delete(file.id)


@given(
    st.integers(1, 30),
    st.builds(
        JobSettings,
        validating_s=st.floats(0, 20),
        line_s=st.floats(0, 5),
        finalizing_s=st.floats(0, 20),
        window_s=st.floats(1, 60),
    ),
    st.none() | st.floats(0, 100),
    st.lists(st.floats(0, 400), min_size=2).map(sorted),
)
def test_a_job_never_goes_back_and_each_line_ends_in_one_file_at_most(
    count: int,
    times: JobSettings,
    cancelled: float | None,
    moments: list[float],
) -> None:
    asked = Asked("voyage-4", ["text"], None, False, None, "float", False)
    every = [Line(f"r-{number}", asked, 256, 1, None) for number in range(count)]
    job = Job("batch-1", "file-1", FACTS, {}, 0.0, times, "fast", every, [])
    if cancelled is not None and job.status(cancelled) not in ENDED | {"finalizing"}:
        job.cancelled = max(cancelled, job.begins)
    order = ["validating", "in_progress", "cancelling", "finalizing", "completed", "cancelled"]
    seen = [(order.index(job.status(now)), job.done(now)) for now in moments]
    if job.cancelled is None:
        assert seen == sorted(seen)
    assert [done for _, done in seen] == sorted(done for _, done in seen)
    assert job.status(job.ends) in ENDED
    good = [line.custom_id for line, _ in job.outcomes(good=True)]
    bad = [line.custom_id for line, _ in job.outcomes(good=False)]
    assert len(good) == job.done(job.ends)
    assert not set(good) & set(bad)
    if job.cancelled is None:
        assert len(good) + len(bad) == count
