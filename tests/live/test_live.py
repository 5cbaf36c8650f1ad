"""What the docs of Voyage leave open, asked of the API itself: 20 small calls, two small jobs.

    VOYAGE_API_KEY=... pytest tests/live -m live

It takes a minute, or seven on the free trial, and bills less than a cent: what would cost
more is there to be refused. What is seen is written to a file that holds neither key, text
nor vector; its path is printed at the end.
"""

import base64
import contextlib
import json
import os
import tempfile
import time
import uuid
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
from pydantic import SecretStr
from voyageai.util import get_default_base_url

from tasks.errors import (
    BatchRefused,
    BatchTooLarge,
    ProviderDenied,
    ProviderError,
    ProviderThrottled,
)
from tasks.limits import Limits
from tasks.providers.voyage import Voyage
from tasks.providers.voyage_errors import Asked, failure
from tasks.providers.voyage_jobs import VoyageJobs
from tasks.providers.voyage_reply import quoted
from tasks.providers.voyage_transport import Outcome, exchange

pytestmark = pytest.mark.live

MOST_CALLS = 20
DEADLINE_S = 60.0
JOB_S = 60.0
"""So long a job is watched before it is cancelled."""
SHOWN_HEADERS = ("server", "retry-after", "date")

TEXTS = [
    "A heron waits at the edge of the reeds.",
    "The lighthouse keeper writes down the weather twice a day.",
    "Fresh bread cools on the window sill.",
]
LONG = "the tide comes in and goes out again " * 6_000
SHORTS = [f"wave {number}" for number in range(1001)]
HEAVY = ["the tide comes in and goes out again " * 50] * 990

Floats = npt.NDArray[np.float32]
_first: dict[str, Floats] = {}


@dataclass
class Live:
    """The API, and what was seen of it.

    Attributes:
        key: The user's.
        base_url: Where calls go.
        facts: What was seen; neither key, text nor vector.
        calls: Made so far.
    """

    key: SecretStr
    base_url: str
    facts: dict[str, Any]
    calls: int = 0
    pause_s: float = 0.0
    limited: list[dict[str, Any]] = field(default_factory=list)

    def ask(
        self, texts: Sequence[str], key: str | None = None, **fields: Any
    ) -> tuple[Outcome, ProviderError | None]:
        """One call; what it means where it failed."""
        if self.calls >= MOST_CALLS:
            pytest.fail(f"more than {MOST_CALLS} calls")
        time.sleep(self.pause_s if self.calls else 0)
        self.calls += 1
        sign = SecretStr(key) if key else self.key
        asked = {"model": "voyage-4-lite", "input_type": "document", "output_dimension": 256}
        outcome = exchange(
            sign,
            self.base_url,
            DEADLINE_S,
            **{**asked, "truncation": False, "encoding_format": "base64", **fields},
            input=list(texts),
        )
        slow = outcome.learned.requests_per_minute
        self.pause_s = 60 / slow + 1 if slow else 0.0
        if outcome.answered:
            return outcome, None
        model = str(fields.get("model", asked["model"]))
        error = failure(outcome, Asked(model, texts, sign, "VOYAGE_API_KEY"))
        if error.facts.get("status") == 429:
            self.limited.append(self.seen(outcome, error, texts))
        return outcome, error

    def seen(
        self, outcome: Outcome, error: ProviderError | None, texts: Sequence[str]
    ) -> dict[str, Any]:
        """What may be kept of a call."""
        reply = outcome.reply
        if reply is None:
            return {"status": None, "error": type(error).__name__}
        said = quoted(reply.words, self.key.get_secret_value(), texts, 1000)
        return {
            "status": reply.status,
            "headers": sorted(reply.headers),
            **{name: reply.headers[name] for name in SHOWN_HEADERS if name in reply.headers},
            **({"says": said, "means": type(error).__name__} if error else {}),
        }

    def vectors(self, texts: Sequence[str], **fields: Any) -> dict[str, Any]:
        """The body of a good answer; the test ends here where there is none."""
        outcome, error = self.ask(texts, **fields)
        if error is not None:
            self.facts.setdefault("failed", []).append(self.seen(outcome, error, texts))
            pytest.skip(f"no answer: {error}")
        assert isinstance(outcome.result, dict)
        return {"headers": outcome.reply.headers if outcome.reply else {}, **outcome.result}


@pytest.fixture(scope="session")
def live(request: pytest.FixtureRequest) -> Iterator[Live]:
    key = os.environ.get("VOYAGE_API_KEY", "").strip()
    if not key:
        pytest.skip("VOYAGE_API_KEY is not set; these tests ask the real API")
    base_url = os.environ.get("EMBED_ONCE_LIVE_URL") or get_default_base_url(key)
    now = datetime.now(UTC)
    found = Live(SecretStr(key), base_url, {"at": now.isoformat(timespec="seconds")})
    yield found
    name = f"voyage-facts-{now:%Y%m%d-%H%M%S}.json"
    file = Path(os.environ.get("EMBED_ONCE_LIVE_FACTS") or Path(tempfile.gettempdir()) / name)
    facts = {**found.facts, "calls": found.calls, "limited": found.limited}
    file.write_text(json.dumps(facts, indent=1, sort_keys=True) + "\n", encoding="utf-8")
    capture = request.config.pluginmanager.get_plugin("capturemanager")
    with capture.global_and_fixture_disabled() if capture else contextlib.nullcontext():
        print(f"\nFacts of this run: {file}")


def rows(answer: dict[str, Any]) -> Floats:
    """The vectors by index."""
    items = sorted(answer["data"], key=lambda item: int(item["index"]))
    return np.stack([np.frombuffer(base64.b64decode(item["embedding"]), "<f4") for item in items])


def cosines(some: Floats, others: Floats) -> list[float]:
    return [round(float(value), 4) for value in (some * others).sum(axis=1)]


def test_an_answer_has_an_index_each_a_bill_and_a_name(live: Live) -> None:
    answer = live.vectors(TEXTS)
    found = _first["float"] = rows(answer)
    norms = np.linalg.norm(found, axis=1)
    live.facts["answer"] = {
        "headers": sorted(answer["headers"]),
        "fields": sorted(key for key in answer if key != "headers"),
        "in_order": [item["index"] for item in answer["data"]] == [0, 1, 2],
        "norm_off_by": float(np.abs(norms - 1).max()),
        "warned": bool(answer["headers"].get("x-api-warning")),
    }
    assert found.shape == (3, 256)
    assert answer["model"] == "voyage-4-lite"
    assert np.abs(norms - 1).max() < 1e-3
    assert answer["headers"]["x-request-id"]
    live.facts["tokens"] = {"document": answer["usage"]["total_tokens"]}


@pytest.mark.parametrize("input_type", ["query", None])
def test_tokens_of_the_prompt_are_billed_or_not(live: Live, input_type: str | None) -> None:
    answer = live.vectors(TEXTS, input_type=input_type)
    tokens = live.facts.setdefault("tokens", {})
    tokens[str(input_type)] = answer["usage"]["total_tokens"]


def test_the_same_text_has_the_same_vector_again_or_nearly(live: Live) -> None:
    again = rows(live.vectors(TEXTS))
    if "float" not in _first:
        pytest.skip("nothing to compare with")
    live.facts["again"] = {
        "same_bits": bool(np.array_equal(again, _first["float"])),
        "cosines": cosines(again, _first["float"]),
    }
    assert min(cosines(again, _first["float"])) > 0.99


def test_bits_are_the_signs(live: Live) -> None:
    answer = live.vectors(TEXTS, output_dtype="ubinary")
    packed = [base64.b64decode(item["embedding"]) for item in answer["data"]]
    assert {len(row) for row in packed} == {256 // 8}
    if "float" in _first:
        bits = np.unpackbits(np.frombuffer(b"".join(packed), np.uint8)).reshape(3, 256)
        same = float((bits == (_first["float"] > 0)).mean())
        live.facts["ubinary"] = {"share_of_bits_that_are_signs": round(same, 4)}
        assert same > 0.95


def test_a_short_vector_begins_the_long_one(live: Live) -> None:
    long = rows(live.vectors(TEXTS, output_dimension=2048))
    assert long.shape == (3, 2048)
    if "float" in _first:
        start = long[:, :256] / np.linalg.norm(long[:, :256], axis=1)[:, None]
        live.facts["first_256_of_2048"] = {"cosines": cosines(start, _first["float"])}


@pytest.mark.parametrize("model", ["voyage-4", "voyage-code-4"])
def test_which_models_share_a_space(live: Live, model: str) -> None:
    other = rows(live.vectors(TEXTS, model=model))
    if "float" in _first:
        shared = live.facts.setdefault("cosines_to_voyage_4_lite", {})
        shared[model] = cosines(other, _first["float"])


def test_a_model_of_one_length_takes_that_length_or_not(live: Live) -> None:
    outcome, error = live.ask(TEXTS[:1], model="voyage-law-2", output_dimension=1024)
    live.facts["one_length_asked_for"] = live.seen(outcome, error, TEXTS)


STRANGE = {
    "white_space": [TEXTS[0], " \n\t"],
    "empty": [TEXTS[0], ""],
    "nul": [TEXTS[0], "reed\0heron"],
    "half_a_character": [TEXTS[0], "reed\ud800heron"],
}


@pytest.mark.parametrize("name", STRANGE)
def test_what_becomes_of_a_strange_text(live: Live, name: str) -> None:
    outcome, error = live.ask(STRANGE[name])
    live.facts[name] = live.seen(outcome, error, STRANGE[name])
    assert name != "empty" or isinstance(error, BatchRefused | ProviderThrottled), error


@pytest.mark.parametrize("kind", ["same", "other"])
def test_a_key_that_is_none_is_denied(live: Live, kind: str) -> None:
    atlas = live.key.get_secret_value().startswith("al-")
    prefix = "al-" if atlas == (kind == "same") else "pa-"
    outcome, error = live.ask(TEXTS[:1], key=f"{prefix}made-up-for-a-test")
    live.facts[f"key_of_the_{kind}_kind"] = live.seen(outcome, error, TEXTS)
    assert isinstance(error, ProviderDenied), error


def test_a_model_that_is_unknown_is_denied(live: Live) -> None:
    outcome, error = live.ask(TEXTS[:1], model="voyage-none")
    live.facts["unknown_model"] = live.seen(outcome, error, TEXTS)
    assert isinstance(error, ProviderDenied), error


def test_too_many_texts_are_split(live: Live) -> None:
    outcome, error = live.ask(SHORTS)
    live.facts["too_many_texts"] = live.seen(outcome, error, SHORTS)
    assert isinstance(error, BatchTooLarge | ProviderThrottled), error


def test_several_texts_too_long_are_named(live: Live) -> None:
    texts = [TEXTS[0], LONG, TEXTS[1], LONG]
    outcome, error = live.ask(texts)
    live.facts["too_long_at_1_and_3"] = live.seen(outcome, error, texts)
    if isinstance(error, BatchRefused):
        live.facts["too_long_at_1_and_3"]["positions"] = list(error.facts["positions"])
    assert isinstance(error, BatchRefused | ProviderThrottled), error


def test_what_one_call_to_code_4_takes(live: Live) -> None:
    """Above both numbers in the docs, so that it is refused and not billed; else five cents."""
    outcome, error = live.ask(HEAVY, model="voyage-code-4")
    live.facts["voyage_code_4_cap"] = live.seen(outcome, error, HEAVY)
    if isinstance(error, BatchTooLarge):
        found = error.facts["learned"].tokens_per_request
        live.facts["voyage_code_4_cap"] |= {"tokens_per_request": found}
    assert isinstance(error, BatchTooLarge | ProviderThrottled), error


@pytest.mark.parametrize("packed", [False, True])
def test_a_job_is_taken_found_again_and_cancelled(live: Live, tmp_path: Path, packed: bool) -> None:
    """Two lines in the Batch lane; the docs do not say whether `packed` gives base64."""
    limits = Limits(2000, None, 1000, None, 1)
    jobs = VoyageJobs(Voyage("voyage-4-lite", 256, limits, base_url=live.base_url))
    file = tmp_path / f"embed-once-live-{uuid.uuid4().hex}.jsonl"
    lines = [{"custom_id": str(at), "body": {"input": [text]}} for at, text in enumerate(TEXTS[:2])]
    file.write_text("\n".join(map(json.dumps, lines)), encoding="utf-8")
    fact = live.facts.setdefault("job_packed" if packed else "job", {})
    more = {"encoding_format": "base64"} if packed else {}
    uploaded = jobs.upload(file)
    try:
        made = jobs.create(uploaded, {"embed_once": file.stem}, **more)
    except ProviderError as error:
        fact |= {"refused": type(error).__name__, "status": error.facts.get("status")}
        if packed:
            return
        raise
    ours = [job.id for job in jobs.jobs() if job.metadata.get("embed_once") == file.stem]
    assert ours == [made.id]
    job, states, until = made, [made.status], time.monotonic() + JOB_S
    while not job.ended and time.monotonic() < until:
        time.sleep(2)
        job = jobs.job(made.id) or made
        states.append(job.status)
    if not job.ended:
        states.append(jobs.cancel(made.id).status)
    fact |= {"states": list(dict.fromkeys(states)), "lines": job.lines}
    for row in jobs.rows(job.output_file) if job.output_file else ():
        (item,) = row["response"]["body"]["data"]
        fact["embedding"] = type(item["embedding"]).__name__
    jobs.delete(uploaded)
