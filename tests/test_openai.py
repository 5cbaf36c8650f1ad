"""openai: one call through the real SDK, to a server with the habits of those it is made for."""

import base64
import gzip
import json
import os
import pickle
import socket
import subprocess
import sys
import threading
import time
import traceback
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from random import Random
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from flows.reindex import run
from tasks.catalog import dimension_of, facts_for, limits_for
from tasks.errors import (
    AnswerRejected,
    BatchRefused,
    BatchTooLarge,
    ProviderBusy,
    ProviderDenied,
    ProviderError,
    ProviderThrottled,
    ProviderUnreachable,
    SettingsError,
)
from tasks.form import Overrides
from tasks.ledger import Ledger
from tasks.limits import Learned, Limits
from tasks.params import Config, Embedding, LimitSettings, load_config
from tasks.plan import make_plan
from tasks.providers import Provider, checked_vectors
from tasks.providers.lexical import Lexical
from tasks.providers.openai import OpenAI
from tasks.providers.openai_reply import Reply
from tasks.providers.opening import open_embedder, open_provider
from tasks.providers.reply import LONGEST_QUOTE
from tasks.quarantine import quarantined
from tasks.search import search

KEY = "sk-proj-Jx27vQ0mWc94TzRk81LsYd63"
LIMITS = Limits(None, None, 2048, None, 8)
WORDS = Lexical(256, LIMITS)


def sentences(count: int, seed: int = 0) -> list[str]:
    """Made at run time, so that no line of this file can show one in a traceback."""
    draw = Random(seed)
    return [" ".join(f"w{draw.getrandbits(40):x}" for _ in range(6)) for _ in range(count)]


@dataclass
class Asked:
    """One request as it came."""

    path: str
    headers: dict[str, str]
    body: dict[str, Any]


@dataclass
class Server:
    """A server for embeddings on 127.0.0.1; its vectors are those of `lexical`.

    Attributes:
        asked: What came, oldest first.
        texts: Most texts in one call; more are refused as text-embeddings-inference does.
        failures: Status, body and headers of the next replies, instead of answers.
        turn: What becomes of an answer before it is sent.
        send: Sends the bytes of a reply; None in the ordinary way.
        packed: Whether replies are sent as gzip.
        bad: A text that holds this is refused.
        floats: Whether vectors are lists, whatever was asked for.
        scale: Length of every vector.
    """

    port: int = 0
    dimension: int = 256
    asked: list[Asked] = field(default_factory=list)
    texts: int = 2048
    failures: list[tuple[int, Any, dict[str, str]]] = field(default_factory=list)
    headers: dict[str, str] = field(default_factory=dict)
    turn: Callable[[dict[str, Any]], Any] = lambda answer: answer
    send: Callable[[BaseHTTPRequestHandler, bytes], None] | None = None
    packed: bool = False
    bad: str = ""
    floats: bool = False
    scale: float = 1.0

    @property
    def base_url(self) -> str:
        return f"http://127.0.0.1:{self.port}/v1"

    def fail(self, status: int, body: Any, **headers: str) -> None:
        named = {name.replace("_", "-"): value for name, value in headers.items()}
        self.failures.append((status, body, named))

    def reply(self, asked: Asked) -> tuple[int, bytes, dict[str, str]]:
        self.asked.append(asked)
        if self.failures:
            status, body, headers = self.failures.pop(0)
            sent = body if isinstance(body, bytes) else json.dumps(body).encode()
            return status, sent, headers
        if asked.path != "/v1/embeddings":
            return 404, b'{"detail":"Not Found"}', {}
        texts = asked.body["input"]
        if len(texts) > self.texts:
            words = f"batch size {len(texts)} > maximum allowed batch size {self.texts}"
            return 422, json.dumps({"error": words, "error_type": "Validation"}).encode(), {}
        if self.bad and any(self.bad in text for text in texts):
            return 400, json.dumps(said("Input is not fit.")).encode(), {}
        return 200, json.dumps(self.turn(self.answer(asked.body))).encode(), self.headers

    def answer(self, body: dict[str, Any]) -> dict[str, Any]:
        dimension = body.get("dimensions", self.dimension)
        vectors = Lexical(dimension, LIMITS).embed(body["input"]).vectors * self.scale
        as_lists = self.floats or body["encoding_format"] != "base64"
        return {
            "object": "list",
            "model": "named otherwise",
            "data": [
                {
                    "object": "embedding",
                    "index": at,
                    "embedding": row.tolist()
                    if as_lists
                    else base64.b64encode(row.astype("<f4").tobytes()).decode(),
                }
                for at, row in enumerate(vectors)
            ],
            "usage": {"prompt_tokens": len(body["input"]), "total_tokens": 7 * len(body["input"])},
        }


@pytest.fixture
def server() -> Iterator[Server]:
    state = Server()

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def do_POST(self) -> None:
            read = self.rfile.read(int(self.headers["content-length"]))
            headers = {name.lower(): value for name, value in self.headers.items()}
            status, body, more = state.reply(Asked(self.path, headers, json.loads(read)))
            if state.packed:
                body, more = gzip.compress(body), {**more, "content-encoding": "gzip"}
            head = [f"HTTP/1.1 {status} Said", f"content-length: {len(body)}"]
            head += [f"{name}: {value}" for name, value in more.items()]
            whole = "\r\n".join([*head, "", ""]).encode() + body
            if state.send is None:
                self.wfile.write(whole)
            else:
                self.close_connection = True
                state.send(self, whole)

        def log_message(self, *_: Any) -> None:
            """Say nothing."""

    class Quiet(ThreadingHTTPServer):
        def handle_error(self, *_: Any) -> None:
            """Clients that go away are the point of some tests."""

    with Quiet(("127.0.0.1", 0), Handler) as http:
        state.port = http.server_address[1]
        thread = threading.Thread(target=http.serve_forever, args=(0.02,), daemon=True)
        thread.start()
        yield state
        http.shutdown()
        thread.join()


@pytest.fixture(autouse=True)
def _environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OPENAI_API_KEY", KEY)
    for name in ("http_proxy", "https_proxy", "all_proxy"):
        monkeypatch.delenv(name, raising=False)
        monkeypatch.delenv(name.upper(), raising=False)


def provider(at: Server | str, model: str = "any/model", dimension: int = 256, **o: Any) -> OpenAI:
    base_url = at if isinstance(at, str) else at.base_url
    return OpenAI(model, dimension, LIMITS, base_url=base_url, **o)


def failed(asked: OpenAI, texts: Sequence[str]) -> ProviderError:
    """What a call or the check of its answer ends with; nothing secret is in it."""
    with pytest.raises(ProviderError) as caught:
        checked_vectors(asked.embed(texts), len(texts), asked)
    keeps_secrets(caught.value, texts)
    return caught.value


def keeps_secrets(error: BaseException, texts: Sequence[str]) -> None:
    again = pickle.loads(pickle.dumps(error))  # noqa: S301 - our own bytes
    assert str(again) == str(error)
    assert again.facts == error.facts  # type: ignore[attr-defined]
    shown = [
        str(error),
        repr(error.__dict__),
        repr(pickle.dumps(error)),
        "".join(traceback.format_exception(error)),
    ]
    for seen in shown:
        assert KEY not in seen
        assert not any(text in seen for text in texts if len(text) > 12)
    assert error.__cause__ is None
    assert error.__context__ is None
    assert len(str(error)) < LONGEST_QUOTE + 400


def test_vectors_come_as_they_were_sent_and_in_the_order_of_the_texts(server: Server) -> None:
    texts, asked = sentences(20), provider(server)
    expected = WORDS.embed(texts).vectors
    for floats in (False, True):
        server.floats = floats
        answer = asked.embed(texts)
        assert answer.vectors.dtype == np.float32
        assert np.array_equal(answer.vectors, expected)
        assert answer.billed_tokens == 140
        assert np.allclose(checked_vectors(answer, 20, asked), expected, atol=1e-7)
    server.turn = lambda answer: {**answer, "data": answer["data"][::-1]}
    turned = asked.embed(texts)
    assert list(turned.order) == list(range(19, -1, -1))
    assert np.allclose(checked_vectors(turned, 20, asked), expected, atol=1e-7)


def test_vectors_of_any_length_are_made_to_have_length_one(server: Server) -> None:
    texts, asked = sentences(5), provider(server)
    server.scale = 12.5
    stored = checked_vectors(asked.embed(texts), 5, asked)
    assert np.allclose(np.linalg.norm(stored, axis=1), 1, atol=1e-6)
    assert np.allclose(stored, WORDS.embed(texts).vectors, atol=1e-6)
    assert not asked.unit_vectors
    assert asked.space.preparation != Lexical(256, LIMITS).space.preparation


def test_one_request_is_sent_and_asks_for_what_the_server_must_know(server: Server) -> None:
    texts = sentences(3)
    provider(server).embed(texts)
    small = "text-embedding-3-small"
    server.dimension = 1536
    provider(server, small, 1536).embed(texts)
    provider(server, small, 512).embed(texts)
    first, own, other = server.asked
    assert first.body == {"input": texts, "model": "any/model", "encoding_format": "base64"}
    assert "dimensions" not in own.body
    assert other.body["dimensions"] == 512
    assert first.headers["authorization"] == f"Bearer {KEY}"


def test_what_openai_alone_may_know_goes_to_no_other_server(
    server: Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("OPENAI_ORG_ID", "OPENAI_PROJECT_ID"):
        monkeypatch.setenv(name, "org-of-ours")
    monkeypatch.setenv("OPENAI_BASE_URL", "http://127.0.0.1:9/v1")
    provider(server).embed(sentences(1))
    assert "org-of-ours" not in str(server.asked[0].headers)


def test_the_model_may_be_named_otherwise_and_tokens_may_be_unsaid(server: Server) -> None:
    asked = provider(server)
    for usage, billed in (
        ({}, 0),
        (None, 0),
        ({"prompt_tokens": 5}, 5),
        ({"total_tokens": "many"}, 0),
        ({"total_tokens": 9, "prompt_tokens": 8}, 9),
    ):
        server.turn = lambda answer, usage=usage: {**answer, "usage": usage}  # type: ignore[misc]
        assert asked.embed(sentences(1)).billed_tokens == billed
    server.turn = lambda answer: {"data": answer["data"]}
    assert asked.embed(sentences(1)).billed_tokens == 0


def test_an_answer_says_who_gave_it_and_what_the_account_may_do(server: Server) -> None:
    server.headers = {
        "x-request-id": "req-1",
        "x-ratelimit-limit-requests": "3000",
        "x-ratelimit-limit-tokens": "1000000",
    }
    answer = provider(server).embed(sentences(1))
    assert answer.request_id == "req-1"
    assert answer.learned == Learned(3000, 1_000_000)
    server.headers = {"x-ratelimit-limit-requests": "plenty", "x-ratelimit-limit-tokens": "-1"}
    assert provider(server).embed(sentences(1)).learned == Learned()


def said(message: str, **more: Any) -> dict[str, Any]:
    """As OpenAI, vLLM and Ollama fail."""
    return {"error": {"message": message, "type": "invalid_request_error", "param": None, **more}}


TEI = {"error": "batch size 3 > maximum allowed batch size 2", "error_type": "Validation"}
TEI_LONG = {"message": "`inputs` must have less than 512 tokens. Given: 1000", "code": 413}
LLAMA = said("input (992 tokens) is too large to process. increase the physical batch size")
PYDANTIC = {"detail": [{"loc": ["body", "input"], "msg": "List should have at most 2 items"}]}
LATER = [408, 409, 424, 425, 499, 500, 501, 502, 503, 504, 520, 529]
MEANINGS: list[tuple[int, Any, type[ProviderError], dict[str, Any]]] = [
    *((code, said("later"), ProviderBusy, {"retry_after": None}) for code in LATER),
    (500, b"Internal Server Error", ProviderBusy, {}),
    (502, b"<html><h1>Bad Gateway</h1></html>", ProviderBusy, {}),
    (401, said("Incorrect API key provided"), ProviderDenied, {"status": 401}),
    (402, said("pay"), ProviderDenied, {}),
    (403, said("no access"), ProviderDenied, {}),
    (403, said("no access to model", code="model_not_found"), ProviderDenied, {}),
    (404, {"detail": "Not Found"}, ProviderDenied, {}),
    (404, said("The model `m` does not exist."), ProviderDenied, {}),
    (404, said('model "m" not found, try pulling it first'), ProviderDenied, {}),
    (400, said("Invalid model name passed in model=m"), ProviderDenied, {}),
    (405, b"", ProviderDenied, {}),
    (407, b"", ProviderDenied, {}),
    (410, b"", ProviderDenied, {}),
    (418, b"", ProviderDenied, {}),
    (307, b"", ProviderDenied, {}),
    (429, said("You exceeded", code="insufficient_quota"), ProviderDenied, {}),
    (429, said("You exceeded", type="insufficient_quota"), ProviderDenied, {}),
    (429, b"", ProviderThrottled, {"streams": False, "learned": Learned()}),
    (429, {"error": "Model is overloaded"}, ProviderThrottled, {"streams": True}),
    (
        429,
        said("Rate limit reached for m on tokens per min (TPM): Limit 40000, Used 39000."),
        ProviderThrottled,
        {"learned": Learned(tokens_per_minute=40_000)},
    ),
    (
        429,
        said("Rate limit reached on requests per min (RPM): Limit 100. Please try again in 6ms."),
        ProviderThrottled,
        {"learned": Learned(requests_per_minute=100), "retry_after": 0.006},
    ),
    (
        400,
        said("Requested 453357 tokens, max 300000 tokens per request", code="max_tokens"),
        BatchTooLarge,
        {"learned": Learned(tokens_per_request=300_000), "tokens": 453_357},
    ),
    (
        400,
        said("Invalid 'input': maximum request size is 300000 tokens per request."),
        BatchTooLarge,
        {"learned": Learned(tokens_per_request=300_000), "tokens": None},
    ),
    (400, said("no", type="max_tokens_per_request"), BatchTooLarge, {"learned": Learned()}),
    (
        400,
        said("array too long. Expected an array with maximum length 2, but got 3 instead."),
        BatchTooLarge,
        {"learned": Learned(texts_per_request=2)},
    ),
    (422, TEI, BatchTooLarge, {"learned": Learned(texts_per_request=2)}),
    (413, TEI, BatchTooLarge, {"learned": Learned(texts_per_request=2)}),
    (422, PYDANTIC, BatchTooLarge, {"learned": Learned(texts_per_request=2)}),
    (
        400,
        said("batch size is invalid, it should not be larger than 10.: input.contents"),
        BatchTooLarge,
        {"learned": Learned(texts_per_request=10)},
    ),
    (413, b"Payload Too Large", BatchTooLarge, {"learned": Learned(), "tokens": None}),
    (413, TEI_LONG, BatchTooLarge, {"learned": Learned(), "tokens": None}),
    (500, LLAMA, BatchTooLarge, {"learned": Learned(), "tokens": None}),
    (
        400,
        said("This model's maximum context length is 8192 tokens, however you requested 9000"),
        BatchTooLarge,
        {"tokens": None},
    ),
    (400, said("the input length exceeds the context length"), BatchTooLarge, {}),
    (
        400,
        said("Invalid 'input[1]': maximum context length is 8192 tokens."),
        BatchRefused,
        {"positions": (1,)},
    ),
    (400, said("Invalid 'input[2]': string is bad"), BatchRefused, {"positions": (2,)}),
    (400, said("Something new."), BatchRefused, {"positions": ()}),
    (422, {"detail": [{"loc": ["body", "input", 1]}]}, BatchRefused, {"positions": (1,)}),
    (400, b"", BatchRefused, {}),
    (400, said("Model m does not support matryoshka representation"), ProviderDenied, {}),
    (400, said("This model does not support specifying dimensions."), ProviderDenied, {}),
    (422, said("encoding_format: only float"), ProviderDenied, {}),
]


@pytest.mark.parametrize("case", range(len(MEANINGS)))
def test_what_the_server_says_has_one_meaning(server: Server, case: int) -> None:
    status, body, meaning, facts = MEANINGS[case]
    server.fail(status, body, x_request_id="req-7")
    error = failed(provider(server), sentences(3))
    assert type(error) is meaning, str(error)
    assert {name: error.facts[name] for name in facts} == facts
    assert error.facts["request_id"] == "req-7"
    assert f"127.0.0.1:{server.port}" in str(error)
    assert len(server.asked) == 1


@pytest.mark.parametrize(
    ("status", "body", "tokens"),
    [
        (413, TEI_LONG, 1000),
        (500, LLAMA, 992),
        (
            400,
            said("maximum context length is 8192 tokens, however you requested 9,000 tokens"),
            9000,
        ),
        (400, said("the input length exceeds the context length"), None),
        (400, said("Invalid 'input[0]': maximum context length is 8192 tokens."), None),
    ],
)
def test_a_single_text_that_is_too_long_is_to_blame_itself(
    server: Server, status: int, body: Any, tokens: int | None
) -> None:
    server.fail(status, body)
    error = failed(provider(server), sentences(1))
    if tokens is None:
        assert type(error) is BatchRefused
        assert error.facts["positions"] == (0,)
    else:
        assert type(error) is BatchTooLarge
        assert error.facts["tokens"] == tokens


def test_a_way_out_is_named(server: Server, monkeypatch: pytest.MonkeyPatch) -> None:
    asked, texts = provider(server), sentences(1)
    server.fail(404, said("The model `m` does not exist."))
    assert "embedding.model" in str(failed(asked, texts))
    server.fail(404, {"detail": "Not Found"})
    assert "base_url" in str(failed(asked, texts))
    server.fail(429, said("You exceeded your quota", code="insufficient_quota"))
    assert "billing page" in str(failed(asked, texts))
    server.fail(307, b"", location="http://elsewhere.example/v1")
    assert "elsewhere.example" in str(failed(asked, texts))
    server.fail(401, said("who?"))
    assert "the key in OPENAI_API_KEY" in str(failed(asked, texts))
    monkeypatch.delenv("OPENAI_API_KEY")
    server.fail(401, said("who?"))
    assert "wants a key, and there is none" in str(failed(asked, texts))


@pytest.mark.parametrize(
    ("headers", "words", "seconds"),
    [
        ({"retry-after": "7"}, "", 7),
        ({"retry-after-ms": "250", "retry-after": "1"}, "", 0.25),
        ({"retry-after": "900"}, "", 300),
        ({"retry-after": "soon"}, "", None),
        ({}, "Please try again in 1m2.5s.", 62.5),
        ({}, "Please try again in 240ms.", 0.24),
        ({}, "Please try again in 6h0m0s.", 300),
        ({}, "Please try again later.", None),
    ],
)
@pytest.mark.parametrize("status", [429, 503])
def test_the_wait_that_the_server_asks_for_is_passed_on(
    server: Server, status: int, headers: dict[str, str], words: str, seconds: float | None
) -> None:
    server.failures.append((status, said(words), headers))
    assert failed(provider(server), sentences(1)).facts["retry_after"] == seconds


def test_limits_in_the_headers_of_a_refusal_are_learned(server: Server) -> None:
    words = "Rate limit reached on tokens per min (TPM): Limit 30000, Used 1."
    limits = {"x_ratelimit_limit_requests": "60", "x_ratelimit_limit_tokens": "40000"}
    server.fail(429, said(words), **limits)
    assert failed(provider(server), sentences(1)).facts["learned"] == Learned(60, 30_000)


@given(st.text(max_size=60), st.binary(max_size=80))
def test_no_reply_breaks_the_reading_of_it(value: str, body: bytes) -> None:
    names = ("retry-after", "retry-after-ms", "x-ratelimit-limit-requests", "x-request-id")
    headers = dict.fromkeys(names, value)
    for status in (200, 400, 429):
        for sent in (body, json.dumps(said(value, code=value)).encode()):
            reply = Reply(status, headers, sent)
            waits = reply.retry_after
            assert waits is None or 0 <= waits <= 300
            assert isinstance(reply.words, str)
            assert all(isinstance(code, str) for code in reply.codes)
            limit = reply.learned.requests_per_minute
            assert limit is None or limit > 0


def data(**changes: Any) -> Callable[[dict[str, Any]], dict[str, Any]]:
    """Change the first vector of an answer."""

    def turn(answer: dict[str, Any]) -> dict[str, Any]:
        return {**answer, "data": [{**answer["data"][0], **changes}, *answer["data"][1:]]}

    return turn


def in_base64(*numbers: float) -> str:
    return base64.b64encode(np.array(numbers, "<f4").tobytes()).decode()


WRONG: dict[str, tuple[Callable[[dict[str, Any]], Any], tuple[int, ...]]] = {
    "no json": (lambda _: None, ()),
    "a word": (lambda _: "fine", ()),
    "no data": (lambda answer: {"usage": answer["usage"]}, ()),
    "data of words": (lambda answer: {**answer, "data": ["a", "b", "c"]}, ()),
    "fewer": (lambda answer: {**answer, "data": answer["data"][:2]}, ()),
    "more": (lambda answer: {**answer, "data": [*answer["data"], answer["data"][0]]}, ()),
    "none": (lambda answer: {**answer, "data": []}, ()),
    "twice": (data(index=1), ()),
    "index gap": (data(index=9), ()),
    "no index": (data(index=None), ()),
    "index true": (data(index=True), ()),
    "nan": (data(embedding=[float("nan"), *[0.1] * 255]), (0,)),
    "nan in base64": (data(embedding=in_base64(*[float("nan")] * 256)), (0,)),
    "beyond float32": (data(embedding=[1e300] * 256), (0,)),
    "zeros": (data(embedding=[0.0] * 256), (0,)),
    "null": (data(embedding=None), (0,)),
    "null inside": (data(embedding=[None, *[0.1] * 255]), (0,)),
    "words inside": (data(embedding=["0.1"] * 256), (0,)),
    "lists inside": (data(embedding=[[0.1] * 256]), (0,)),
    "ragged": (data(embedding=[[0.1], [0.1, 0.2]]), (0,)),
    "bad base64": (data(embedding="%%%"), (0,)),
    "odd base64": (data(embedding=base64.b64encode(b"abcde").decode()), (0,)),
    "one of another length": (data(embedding=[0.1] * 255), (0,)),
}


@pytest.mark.parametrize("name", WRONG)
def test_an_answer_that_is_not_what_was_asked_for_is_not_stored(server: Server, name: str) -> None:
    server.turn, positions = WRONG[name]
    error = failed(provider(server), sentences(3))
    assert type(error) is AnswerRejected
    assert tuple(error.facts.get("positions", ())) == positions


def test_another_length_of_all_vectors_names_the_key_to_set(server: Server) -> None:
    for floats in (False, True):
        server.floats = floats
        error = failed(provider(server, dimension=384), sentences(3))
        assert type(error) is ProviderDenied
        assert "vectors of 256 numbers" in str(error)
        assert "Set embedding.dimension to 256" in str(error)
        assert error.facts["billed_tokens"] == 21


def test_a_text_that_has_no_bytes_is_refused_before_it_is_sent(server: Server) -> None:
    error = failed(provider(server), [*sentences(2), "half a character \ud800 in it"])
    assert type(error) is BatchRefused
    assert error.facts["positions"] == (2,)
    assert server.asked == []
    for text in ("nul \x00", "Ёлка 🌲", "\u2028"):
        provider(server).embed([text])
    assert [asked.body["input"][0] for asked in server.asked] == ["nul \x00", "Ёлка 🌲", "\u2028"]


def reset(handler: BaseHTTPRequestHandler, _: bytes) -> None:
    handler.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, b"\1\0\0\0\0\0\0\0")
    handler.connection.close()


def half(handler: BaseHTTPRequestHandler, whole: bytes) -> None:
    handler.wfile.write(whole[: len(whole) // 2])


def damaged(handler: BaseHTTPRequestHandler, whole: bytes) -> None:
    handler.wfile.write(whole.replace(b"\x1f\x8b", b"zz"))


def hang(_: BaseHTTPRequestHandler, __: bytes) -> None:
    time.sleep(1.5)


def trickle(handler: BaseHTTPRequestHandler, whole: bytes) -> None:
    for at in range(len(whole)):
        handler.wfile.write(whole[at : at + 1])
        time.sleep(0.05)


@pytest.mark.parametrize("send", [reset, half, hang, trickle])
def test_a_wire_that_breaks_or_hangs_ends_at_the_deadline(
    server: Server, send: Callable[[BaseHTTPRequestHandler, bytes], None]
) -> None:
    provider(server).embed(sentences(1))  # the SDK is loaded
    server.send, started = send, time.monotonic()
    error = failed(provider(server, deadline_s=0.5), sentences(1))
    assert type(error) is ProviderBusy
    assert time.monotonic() - started < 10
    ends = time.monotonic() + 30
    while any(thread.name == "openai-call" for thread in threading.enumerate()):
        assert time.monotonic() < ends
        time.sleep(0.02)


def test_calls_in_flight_can_be_given_up(server: Server) -> None:
    asked, errors = provider(server, deadline_s=20), list[ProviderError]()
    asked.embed(sentences(1))
    server.send = hang
    call = threading.Thread(target=lambda: errors.append(failed(asked, sentences(1))))
    call.start()
    while len(server.asked) < 2:
        time.sleep(0.01)
    asked.give_up()
    call.join(10)
    assert [type(error) for error in errors] == [ProviderBusy]


def test_packed_replies_are_read(server: Server) -> None:
    server.packed, texts = True, sentences(30)
    assert np.array_equal(provider(server).embed(texts).vectors, WORDS.embed(texts).vectors)
    server.fail(422, TEI)
    assert type(failed(provider(server), texts)) is BatchTooLarge
    server.send = damaged
    assert type(failed(provider(server), texts)) is AnswerRejected


def test_an_endless_answer_is_cut_off(server: Server, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tasks.providers.openai_transport.LONGEST_BODY", 1000)
    assert type(failed(provider(server), sentences(9))) is AnswerRejected


def free_port() -> int:
    with socket.socket() as opened:
        opened.bind(("127.0.0.1", 0))
        return int(opened.getsockname()[1])


def test_an_address_that_is_wrong_is_named(
    server: Server, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    closed, host = f"127.0.0.1:{free_port()}", f"127.0.0.1:{server.port}"
    expected: dict[str, tuple[type[ProviderError], str]] = {
        f"http://{closed}/v1": (ProviderUnreachable, closed),
        "http://nobody.invalid/v1": (ProviderUnreachable, "nobody.invalid"),
        f"https://{host}/v1": (ProviderDenied, "TLS"),
        f"http://{host}": (ProviderDenied, "/v1"),
        "ftp://files/v1": (ProviderDenied, "base_url"),
        "no-address": (ProviderDenied, "base_url"),
        f"http://some:body@{closed}/v1": (ProviderUnreachable, closed),
    }
    for base_url, (meaning, words) in expected.items():
        error = failed(provider(base_url, deadline_s=5), sentences(1))
        assert type(error) is meaning, f"{base_url}: {error}"
        assert words in str(error), base_url
    monkeypatch.setenv("SSL_CERT_FILE", str(tmp_path / "none.pem"))
    error = failed(provider(f"https://{host}/v1"), sentences(1))
    assert type(error) is ProviderDenied
    assert "SSL_CERT_FILE" in str(error)


def test_a_proxy_that_opens_no_way_is_named(
    server: Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HTTPS_PROXY", f"http://127.0.0.1:{server.port}")
    error = failed(provider("https://openai.invalid/v1"), sentences(1))
    assert "HTTPS_PROXY" in str(error)


def test_threads_share_connections_and_each_has_its_own_answer(server: Server) -> None:
    asked = provider(server)
    asked.embed(sentences(1))

    def calls(seed: int) -> bool:
        texts = [sentences(3, seed * 100 + at) for at in range(10)]
        return all(
            np.array_equal(asked.embed(batch).vectors, WORDS.embed(batch).vectors)
            for batch in texts
        )

    with ThreadPoolExecutor(8) as pool:
        assert all(pool.map(calls, range(8)))
    assert len(server.asked) == 81


@pytest.mark.parametrize("status", [400, 401, 403, 422, 429, 500, 503])
def test_what_the_server_echoes_is_not_passed_on(
    server: Server, status: int, caplog: pytest.LogCaptureFixture
) -> None:
    texts = [*sentences(2), "Ёлка стоит в углу, и снег 🌲 идёт весь день"]
    echo = f"bad: {KEY} {' '.join(texts)} {json.dumps(texts)} Bearer {KEY}"
    for body in (said(echo), {"detail": echo}, echo.encode(), f"<p>{echo}</p>".encode()):
        server.fail(status, body, x_request_id=f"for-{KEY}", x_other=KEY)
        with caplog.at_level("DEBUG"):
            error = failed(provider(server), texts)
        pieces = [known[at : at + 14] for known in texts for at in range(len(known) - 14)]
        assert not any(piece in str(error) for piece in pieces)
        assert KEY[3:15] not in str(error)
        assert KEY not in caplog.text


def test_it_is_a_value_that_holds_no_key(server: Server) -> None:
    asked: Provider = provider(server)
    asked.embed(sentences(1))
    pickled = pickle.dumps(asked)
    assert pickle.loads(pickled) == asked  # noqa: S301 - our own bytes
    assert KEY.encode() not in pickled
    assert KEY not in repr(asked)
    assert asked.for_queries() == asked


def test_the_address_is_no_part_of_the_space() -> None:
    here, there = provider("http://127.0.0.1:1/v1"), provider("http://127.0.0.1:2/v1")
    assert here.space == there.space
    assert here.space != replace(here, model="another").space
    assert here.space.input_type is None


def test_a_server_of_ones_own_needs_no_key(server: Server, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("OPENAI_API_KEY")
    asked = provider(server)
    asked.require()
    assert len(asked.embed(sentences(2)).vectors) == 2
    assert KEY not in str(server.asked)


@pytest.mark.parametrize(
    "base_url", [None, "https://api.openai.com/v1", "https://eu.api.openai.com/v1"]
)
def test_openai_needs_a_key(base_url: str | None, monkeypatch: pytest.MonkeyPatch) -> None:
    asked = OpenAI("text-embedding-3-small", 1536, LIMITS, base_url=base_url)
    asked.require()
    for value in ("", " \n", "two words", "sk-\u2013"):
        monkeypatch.setenv("OPENAI_API_KEY", value)
        with pytest.raises(SettingsError, match="OPENAI_API_KEY"):
            asked.require()
        with pytest.raises(ProviderDenied, match="OPENAI_API_KEY"):
            asked.embed(sentences(1))
    monkeypatch.delenv("OPENAI_API_KEY")
    with pytest.raises(SettingsError, match=r"OPENAI_API_KEY is not set.*base_url"):
        asked.require()


def test_a_key_comes_from_a_secret_block(
    server: Server, prefect_api: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    from prefect.blocks.system import Secret  # noqa: PLC0415 - most tests need no Prefect

    monkeypatch.delenv("OPENAI_API_KEY")
    block: Any = Secret(value=KEY)
    block.save("openai-key")
    asked = provider(server, api_key_block="openai-key")
    asked.require()
    asked.embed(sentences(1))
    assert server.asked[0].headers["authorization"] == f"Bearer {KEY}"
    with pytest.raises(SettingsError, match="not-there"):
        provider(server, api_key_block="not-there").require()
    server.fail(401, said("who?"))
    assert "block 'openai-key'" in str(failed(asked, sentences(1)))


def embedding(**values: Any) -> Embedding:
    return Embedding.model_validate({"provider": "openai", **values})


def test_a_model_of_the_catalog_has_its_facts_and_any_other_what_the_config_says() -> None:
    assert dimension_of(embedding(model="text-embedding-3-large")) == 3072
    assert dimension_of(embedding(model="text-embedding-3-large", dimension=256)) == 256
    facts = facts_for(embedding(model="text-embedding-3-small"))
    assert limits_for(LimitSettings(), facts) == Limits(3000, 1_000_000, 2048, 300_000, 8)
    free = limits_for(LimitSettings(tier="free"), facts)
    assert (free.requests_per_minute, free.tokens_per_minute) == (100, 40_000)
    own = facts_for(embedding(model="BAAI/bge-m3", dimension=1024))
    assert own.usd_per_million_tokens == 0
    assert dimension_of(embedding(model="BAAI/bge-m3", dimension=1024)) == 1024
    # Of such a model nobody knows what one request takes, so the config does.
    wide = limits_for(LimitSettings(texts_per_request=4096, tokens_per_request=10**6), own)
    assert (wide.texts_per_request, wide.tokens_per_request) == (4096, 10**6)
    # A model of another provider may be served under its name too.
    assert dimension_of(embedding(model="voyage-4", dimension=1024)) == 1024


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({}, "embedding.model: missing"),
        ({"model": "bge-m3"}, "embedding.dimension: missing"),
        ({"model": "text-embedding-ada-002", "dimension": 512}, "has no vectors of length 512"),
        ({"model": "text-embedding-3-small", "dimension": 1537}, "from 1 to 1536"),
        ({"model": "bge-m3", "dimension": 8, "input_type": "query"}, "embedding.input_type"),
        ({"model": "bge-m3", "dimension": 8, "output_dtype": "ubinary"}, "embedding.output_dtype"),
    ],
)
def test_a_config_that_does_not_fit_is_refused(values: dict[str, Any], message: str) -> None:
    with pytest.raises(SettingsError, match=message):
        facts_for(embedding(**values))


@pytest.fixture
def config(server: Server, tmp_path: Path) -> Callable[..., Config]:
    """An index in a folder, of a table with the texts it is given, by a model of `server`."""

    def make(texts: Sequence[str] = (), limits: dict[str, Any] | None = None, **o: Any) -> Config:
        rows = [{"id": str(at), "text": text} for at, text in enumerate(texts)]
        corpus = tmp_path / "corpus.jsonl"
        corpus.write_text("".join(f"{json.dumps(row)}\n" for row in rows), encoding="utf-8")
        asked = {"provider": "openai", "model": "any/model", "dimension": 256, **o}
        return Config.model_validate(
            {
                "name": "birds",
                "source": {"kind": "table", "path": str(corpus)},
                "embedding": {"base_url": server.base_url, **asked},
                "limits": limits or {},
                "index": {"uri": str(tmp_path / "index"), "table": "birds"},
                "state": {"uri": str(tmp_path / "state")},
            }
        )

    return make


def test_the_config_opens_it(config: Callable[..., Config], server: Server) -> None:
    opened = open_embedder(config(limits={"requests_per_minute": 50}))
    assert isinstance(opened, OpenAI)
    assert opened.base_url == server.base_url
    assert opened.limits == Limits(50, None, 256, 32_000, 8)
    for input_type in ("document", None):
        assert open_provider(config(input_type=input_type)).space == opened.space


def test_a_corpus_is_embedded_searched_and_costs_nothing_again(
    config: Callable[..., Config], server: Server, reindex: Callable[..., Any], tmp_path: Path
) -> None:
    texts = sentences(40)
    server.texts, server.scale = 8, 3.0
    ran = reindex(config(texts))
    assert sorted(ran.sent) == sorted(texts)
    assert ran.published.generation == 1
    sizes = [len(asked.body["input"]) for asked in server.asked]
    assert sizes[0] == 40
    assert max(sizes[1:]) <= 8  # it has learned what one call takes
    assert sum(sizes[1:]) == 40
    [hit, *_] = search(config(texts), texts[7], k=3)
    assert (hit.text, round(hit.distance, 5)) == (texts[7], 0)
    calls = len(server.asked)
    assert reindex(config(texts)).sent == []
    assert len(server.asked) == calls
    everything = b"".join(path.read_bytes() for path in tmp_path.rglob("*") if path.is_file())
    assert KEY.encode() not in everything


def test_bad_and_too_long_texts_are_quarantined_and_all_others_indexed(
    config: Callable[..., Config],
    server: Server,
    prefect_api: str,
    tmp_path: Path,
) -> None:
    good, bad, long = sentences(30), "a text with poison in it", "long " * 900
    server.bad, answer = "poison", server.reply

    def reply(asked: Asked) -> tuple[int, bytes, dict[str, str]]:
        if long in asked.body["input"]:
            server.fail(400, said("the input length exceeds the context length"))
        return answer(asked)

    server.reply = reply  # type: ignore[method-assign]
    file = tmp_path / "config.json"
    file.write_text(config([*good, bad, long]).model_dump_json())
    report = run(str(file))
    assert (report.state, report.chunks.quarantined, report.texts.embedded) == (
        "quarantined",
        2,
        30,
    )
    found = search(load_config(file), good[0], k=100)
    assert sorted(hit.text for hit in found) == sorted(good)
    frame = quarantined(str(tmp_path / "state"))
    assert sum("context length" in reason for reason in frame["reason"]) == 1
    calls = Ledger(str(tmp_path / "state")).calls()
    assert calls["tokens_billed"].sum() == 7 * sum(
        calls.loc[calls["status"] == "ok", "texts"].tolist()
    )
    before = len(server.asked)
    assert run(str(file)).chunks.quarantined == 2
    assert len(server.asked) == before  # they are not sent again
    everything = b"".join(path.read_bytes() for path in tmp_path.rglob("*") if path.is_file())
    assert KEY.encode() not in everything
    assert bad.encode() not in b"".join(
        path.read_bytes() for path in (tmp_path / "state").rglob("*") if path.is_file()
    )


@pytest.mark.slow
def test_a_plan_needs_no_key_no_server_and_no_sdk(
    config: Callable[..., Config], tmp_path: Path
) -> None:
    planned = make_plan(config(sentences(3)), Overrides())
    assert (planned.texts.embedded, planned.calls, planned.cost.usd) == (3, 1, 0)
    file = tmp_path / "config.json"
    file.write_text(
        config(
            sentences(3), base_url=None, model="text-embedding-3-small", dimension=None
        ).model_dump_json()
    )
    code = (
        "import sys; from tasks.params import load_config; from tasks.form import Overrides; "
        "from tasks.plan import make_plan; "
        "plan = make_plan(load_config(sys.argv[1]), Overrides()); "
        "assert plan.cost.usd > 0 and plan.usd_batch_lane == plan.cost.usd / 2; "
        "assert not {'openai', 'httpx2'} & set(sys.modules)"
    )
    environment = {name: value for name, value in os.environ.items() if name != "OPENAI_API_KEY"}
    subprocess.run([sys.executable, "-c", code, str(file)], check=True, env=environment)


@pytest.mark.slow
def test_without_the_sdk_it_says_what_to_install(config: Callable[..., Config]) -> None:
    code = (
        "import sys\n"
        "class Without:\n"
        "    def __init__(self, finder): self.finder = finder\n"
        "    def find_spec(self, name, *more):\n"
        "        return None if name == 'openai' else self.finder.find_spec(name, *more)\n"
        "    def __getattr__(self, name): return getattr(self.finder, name)\n"
        "sys.meta_path[:] = [Without(finder) for finder in sys.meta_path]\n"
        "from tasks.params import Config\n"
        "from tasks.providers.opening import open_embedder, open_provider\n"
        "config = Config.model_validate_json(sys.argv[1])\n"
        "open_provider(config)\n"
        "open_embedder(config)\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, config().model_dump_json()],
        check=False,
        capture_output=True,
        text=True,
    )
    assert "SettingsError: embedding.provider: 'openai' needs the package openai" in done.stderr
    assert "embed-once[openai]" in done.stderr
