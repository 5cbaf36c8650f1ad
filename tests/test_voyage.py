"""voyage: one call through the real SDK, and whatever comes of it has one meaning."""

import binascii
import json
import pickle
import socket
import ssl
import threading
import time
import traceback
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from email.utils import format_datetime
from pathlib import Path
from random import Random
from typing import Any

import numpy as np
import pytest
import requests
import voyageai
from hypothesis import given
from hypothesis import strategies as st
from pydantic import SecretStr
from urllib3 import HTTPSConnectionPool
from urllib3.exceptions import DecodeError, MaxRetryError
from urllib3.exceptions import SSLError as TLSError
from voyageai import error as sdk
from voyageai.client import Client

from tasks.catalog import catalog
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
from tasks.limits import Learned, Limits
from tasks.providers import Provider, Vectors, checked_vectors
from tasks.providers.lexical import Lexical
from tasks.providers.voyage import Voyage
from tasks.providers.voyage_reply import LONGEST_QUOTE, Reply, learned_from, quoted
from tasks.providers.voyage_transport import exchange
from tasks.simulator import Rule, Settings, Simulator

KEY = "pa-Jx27vQ0mWc94TzRk81LsYd63"
LIMITS = Limits(None, None, 1000, None, 8)
ARGUMENTS = (
    "The request body is not valid JSON, or some arguments were not specified properly. "
    "In particular, "
)


def sentences(count: int, seed: int = 0) -> list[str]:
    """Made at run time, so that no line of this file can show one in a traceback."""
    draw = Random(seed)
    return [" ".join(f"w{draw.getrandbits(40):x}" for _ in range(6)) for _ in range(count)]


@pytest.fixture(scope="module")
def running() -> Iterator[Simulator]:
    with Simulator(Settings()) as simulator:
        yield simulator


@pytest.fixture
def simulator(running: Simulator) -> Simulator:
    running.reset()
    return running


@pytest.fixture(autouse=True)
def _environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("VOYAGE_API_KEY", KEY)
    for name in ("http_proxy", "https_proxy", "all_proxy"):
        monkeypatch.delenv(name, raising=False)
        monkeypatch.delenv(name.upper(), raising=False)


def voyage(
    at: Simulator | str, model: str = "voyage-4", dimension: int = 256, **other: Any
) -> Voyage:
    base_url = at if isinstance(at, str) else at.base_url
    return Voyage(model, dimension, LIMITS, base_url=base_url, **other)


def failed(provider: Voyage, texts: Sequence[str]) -> ProviderError:
    """What a call or the check of its answer ends with; nothing secret is in it."""
    with pytest.raises(ProviderError) as caught:
        checked_vectors(provider.embed(texts), len(texts), provider)
    keeps_secrets(caught.value, texts)
    return caught.value


def keeps_secrets(error: BaseException, texts: Sequence[str]) -> None:
    again = pickle.loads(pickle.dumps(error))  # noqa: S301 - our own bytes
    assert str(again) == str(error)
    assert again.facts == error.facts  # type: ignore[attr-defined]
    frames = [frame.f_locals for frame, _ in traceback.walk_tb(error.__traceback__)]
    own = [values for values in frames if "self" in values and "outcome" in values]
    shown = [
        str(error),
        repr(error),
        repr(error.__dict__),
        repr(pickle.dumps(error)),
        "".join(traceback.format_exception(error)),
    ]
    assert error.__cause__ is None
    assert error.__context__ is None
    for seen in [*shown, *(repr(values) for values in own)]:
        assert KEY not in seen
    for seen in shown:
        assert not any(text in seen for text in texts)
    assert len(str(error)) < LONGEST_QUOTE + 400


def sdk_ends_in(at: Simulator, texts: Sequence[str], timeout: float) -> str:
    """Class of what the SDK raises by itself, without us; "ok" where it returns."""
    client = Client(KEY, base_url=at.base_url, timeout=timeout)
    try:
        client.embed(list(texts), model="voyage-4", output_dimension=256, truncation=False)
    except Exception as error:  # noqa: BLE001 - any class is the point
        return type(error).__name__
    return "ok"


def status(code: int, **more: Any) -> Rule:
    return Rule(status=code, **more)


MEANINGS: dict[str, tuple[Rule, str, type[ProviderError]]] = {
    "400": (status(400), "InvalidRequestError", BatchRefused),
    "400 html": (status(400, kind="html"), "APIError", BatchRefused),
    "400 no detail": (status(400, kind="json_no_detail"), "APIError", BatchRefused),
    "401": (status(401), "AuthenticationError", ProviderDenied),
    "402": (status(402), "APIError", ProviderDenied),
    "403": (status(403), "APIError", ProviderDenied),
    "404": (status(404), "APIError", ProviderDenied),
    "407": (status(407), "APIError", ProviderDenied),
    "408": (status(408), "APIError", ProviderBusy),
    "409": (status(409), "APIError", ProviderBusy),
    "410": (status(410), "APIError", ProviderDenied),
    "413 text": (status(413, kind="text"), "APIError", BatchTooLarge),
    "422 list": (status(422), "MalformedRequestError", ProviderDenied),
    "425": (status(425), "APIError", ProviderBusy),
    "429": (status(429), "RateLimitError", ProviderThrottled),
    "429 html": (status(429, kind="html"), "APIError", ProviderThrottled),
    "429 text": (status(429, kind="text"), "APIError", ProviderThrottled),
    "429 empty": (status(429, kind="empty"), "APIError", ProviderThrottled),
    "500": (status(500), "ServerError", ProviderBusy),
    "500 html": (status(500, kind="html"), "ServerError", ProviderBusy),
    "501": (status(501), "AttributeError", ProviderBusy),
    "502 html": (status(502, kind="html"), "ServiceUnavailableError", ProviderBusy),
    "503": (status(503), "ServiceUnavailableError", ProviderBusy),
    "504 empty": (status(504, kind="empty"), "ServiceUnavailableError", ProviderBusy),
    "520 html": (status(520, kind="html"), "APIError", ProviderBusy),
    "529": (status(529), "AttributeError", ProviderBusy),
    "reset before": (Rule(action="reset_before"), "APIConnectionError", ProviderBusy),
    "paid, then reset": (Rule(action="process_then_reset"), "APIConnectionError", ProviderBusy),
    "reset amid": (Rule(action="reset_mid"), "APIConnectionError", ProviderBusy),
    "short body": (Rule(action="short_body"), "APIConnectionError", ProviderBusy),
    "cut chunk": (Rule(action="chunk_trunc"), "APIConnectionError", ProviderBusy),
    "hang": (Rule(action="hang", seconds=60), "Timeout", ProviderBusy),
    "trickle": (Rule(action="trickle", piece_bytes=99, seconds=0.03), "ok", ProviderBusy),
    "bad json": (Rule(action="bad_json"), "APIError", AnswerRejected),
    "empty": (Rule(action="empty_200"), "APIError", AnswerRejected),
    "bad utf-8": (Rule(action="bad_utf8"), "UnicodeDecodeError", AnswerRejected),
    "plain text": (Rule(action="text_plain_200"), "AttributeError", AnswerRejected),
    "204": (Rule(action="204"), "AttributeError", AnswerRejected),
    "no data": (Rule(action="no_data"), "AttributeError", AnswerRejected),
    "bad base64": (Rule(action="bad_b64"), "Error", AnswerRejected),
    "odd base64": (Rule(action="odd_b64"), "ValueError", AnswerRejected),
    "fewer": (Rule(action="fewer"), "ok", AnswerRejected),
    "more": (Rule(action="more"), "ok", AnswerRejected),
    "twice": (Rule(action="dup"), "ok", AnswerRejected),
    "no index": (Rule(action="no_index"), "ok", AnswerRejected),
    "index gap": (Rule(action="index_gap"), "ok", AnswerRejected),
    "nan": (Rule(action="nan"), "ok", AnswerRejected),
    "inf": (Rule(action="inf"), "ok", AnswerRejected),
    "zero": (Rule(action="zero"), "ok", AnswerRejected),
    "not of length 1": (Rule(action="unnormalised"), "ok", AnswerRejected),
    "dimension": (Rule(action="wrong_dim"), "ok", AnswerRejected),
    "empty base64": (Rule(action="empty_b64"), "ok", AnswerRejected),
    "null": (Rule(action="null_embedding"), "ok", AnswerRejected),
    "other model": (Rule(action="wrong_model_name"), "ok", AnswerRejected),
    "lists": (Rule(action="float_list_instead"), "ok", AnswerRejected),
    "redirect": (Rule(action="redirect_307", times=1), "ok", ProviderDenied),
}


@pytest.mark.parametrize("name", MEANINGS)
def test_what_the_server_does_has_one_meaning_whatever_the_sdk_makes_of_it(
    simulator: Simulator, name: str
) -> None:
    rule, raised, meaning = MEANINGS[name]
    texts, seconds = sentences(3), 0.3 if rule.action in {"hang", "trickle"} else 5.0
    simulator.add(rule)
    assert sdk_ends_in(simulator, texts, seconds) == raised
    simulator.reset()
    simulator.add(rule)
    provider = voyage(simulator, deadline_s=seconds)
    started = time.monotonic()
    error = failed(provider, texts)
    assert type(error) is meaning
    assert time.monotonic() - started < seconds + 10
    assert simulator.ledger.totals()["calls"] <= 1
    host = (
        provider.base_url.removeprefix("http://").removesuffix("/v1") if provider.base_url else ""
    )
    assert host in str(error) or "voyage/voyage-4" in str(error)


def test_an_answer_that_says_nothing_of_tokens_is_good_all_the_same(simulator: Simulator) -> None:
    simulator.add(Rule(action="no_usage"))
    assert sdk_ends_in(simulator, ["a"], 5) == "AttributeError"
    answer = voyage(simulator).embed(sentences(3))
    assert (answer.billed_tokens, len(answer.vectors)) == (0, 3)


def test_a_list_of_a_validator_cannot_even_be_shown_by_the_sdk(simulator: Simulator) -> None:
    simulator.add(status(422))
    with pytest.raises(sdk.MalformedRequestError) as caught:
        Client(KEY, base_url=simulator.base_url).embed(["a"], model="voyage-4")
    with pytest.raises(TypeError):
        str(caught.value)


def test_the_sdk_still_sees_too_many_answers_as_one_attempt(simulator: Simulator) -> None:
    simulator.add(status(503))
    assert sdk_ends_in(simulator, ["a"], 5) == "ServiceUnavailableError"
    assert type(failed(voyage(simulator), sentences(1))) is ProviderBusy
    assert simulator.ledger.totals()["calls"] == 2


OFFERS = [
    (facts.name, dimension, dtype)
    for facts in catalog().values()
    if facts.provider == "voyage"
    for dimension in facts.dimensions or ()
    for dtype in ("float", "ubinary")
    if dtype in facts.output_dtypes
]


@pytest.mark.parametrize(("model", "dimension", "dtype"), OFFERS)
def test_vectors_are_those_of_the_sdk_to_the_last_bit(
    simulator: Simulator, model: str, dimension: int, dtype: str
) -> None:
    texts = sentences(4)
    provider = voyage(simulator, model, dimension, dtype=dtype)
    answer = provider.embed(texts)
    client = Client(KEY, base_url=simulator.base_url)
    fixed = len(catalog()[model].dimensions or ()) == 1
    result = client.embed(
        texts,
        model=model,
        input_type="document",
        truncation=False,
        output_dtype=dtype,
        output_dimension=None if fixed else dimension,
    )
    expected = np.array(result.embeddings, np.float32 if dtype == "float" else np.uint8)
    assert answer.vectors.dtype == expected.dtype
    assert np.array_equal(answer.vectors, expected)
    assert answer.billed_tokens == result.total_tokens
    assert np.array_equal(checked_vectors(answer, 4, provider), expected)


def test_no_string_is_made_of_the_vectors_of_an_answer(simulator: Simulator) -> None:
    request = {"input": sentences(3), "model": "voyage-4", "encoding_format": "base64"}
    outcome: Any = exchange(SecretStr(KEY), simulator.base_url, 10.0, **request)
    assert all(isinstance(each["embedding"], memoryview) for each in outcome.result["data"])


def test_vectors_are_joined_to_their_texts_by_index(simulator: Simulator) -> None:
    texts, provider = sentences(20), voyage(simulator)
    straight = checked_vectors(provider.embed(texts), 20, provider)
    simulator.add(Rule(action="shuffle"))
    shuffled = provider.embed(texts)
    assert list(shuffled.order) != list(range(20))
    assert not np.array_equal(shuffled.vectors, straight)
    assert np.array_equal(checked_vectors(shuffled, 20, provider), straight)


def test_a_bad_vector_is_named_by_its_text(simulator: Simulator) -> None:
    simulator.add(Rule(action="null_embedding"))
    assert failed(voyage(simulator), sentences(3)).facts["positions"] == (0,)


def test_an_answer_says_who_gave_it_and_what_the_account_may_do(simulator: Simulator) -> None:
    answer = voyage(simulator).embed(sentences(2))
    [record] = simulator.ledger.requests
    assert answer.request_id == record.request_id
    assert answer.billed_tokens == record.billed_tokens
    assert answer.learned == Learned()
    with Simulator(Settings(tier="free")) as free:
        provider = voyage(free)
        assert provider.embed(sentences(1)).learned == Learned(3, 10_000)
        for _ in range(2):
            provider.embed(sentences(1))
        error = failed(provider, sentences(1))
    assert type(error) is ProviderThrottled
    assert error.facts["learned"] == Learned(3, 10_000)
    assert "payment method" in str(error)
    assert "limits.tokens_per_minute to 10000" in str(error)


def test_a_query_is_sent_as_one_and_nothing_is_cut(simulator: Simulator) -> None:
    document, texts = voyage(simulator), sentences(1)
    query, bare = document.for_queries(), replace(document, input_type=None)
    for provider in (document, query, bare, query.for_queries(), bare.for_queries()):
        provider.embed(texts)
    sent = [record.input_type for record in simulator.ledger.requests]
    assert sent == ["document", "query", None, "query", None]
    assert (document.space.input_type, query.space.input_type) == ("document", "query")
    assert not document.space.truncation
    long = [*sentences(2), "word " * 40_000]
    error = failed(document, long)
    assert type(error) is BatchRefused
    assert error.facts["positions"] == (2,)
    assert "200000 characters" in str(error)


def test_a_batch_too_large_says_how_large_and_what_is_not(simulator: Simulator) -> None:
    error = failed(voyage(simulator, "voyage-4-large"), ["word " * 20_000] * 6)
    assert type(error) is BatchTooLarge
    assert error.facts["learned"] == Learned(tokens_per_request=120_000)
    assert error.facts["tokens"] == simulator.ledger.requests[0].tokens or error.facts["tokens"]
    many = failed(voyage(simulator), [f"text {at}" for at in range(1001)])
    assert type(many) is BatchTooLarge
    assert many.facts["learned"] == Learned(texts_per_request=1000)


def test_a_batch_is_too_large_by_code_too(simulator: Simulator) -> None:
    simulator.add(status(400, detail="No.", error_code="TOO_MANY_TOKENS_IN_BATCH"))
    error = failed(voyage(simulator), sentences(2))
    assert type(error) is BatchTooLarge
    assert (error.facts["learned"], error.facts["tokens"]) == (Learned(), None)


@pytest.mark.parametrize(
    ("texts", "settings", "positions"),
    [
        (["a", "", "b", ""], Settings(), (1, 3)),
        (["a", " \n"], Settings(whitespace_is_empty=True), (1,)),
    ],
)
def test_empty_texts_are_found_though_the_server_does_not_name_them(
    texts: list[str], settings: Settings, positions: tuple[int, ...]
) -> None:
    with Simulator(settings) as simulator, pytest.raises(BatchRefused) as caught:
        voyage(simulator).embed(texts)
    assert caught.value.facts["positions"] == positions


WORDS: list[tuple[int, Any, type[ProviderError], dict[str, Any]]] = [
    (400, f"{ARGUMENTS}Argument 'zzz' is not supported by our API", ProviderDenied, {}),
    (400, f"{ARGUMENTS}Value '7' supplied for output_dimension is not allowed", ProviderDenied, {}),
    (
        400,
        f"{ARGUMENTS}Error for argument '0': JSON decode error",
        BatchRefused,
        {"positions": (1,)},
    ),
    (400, f"{ARGUMENTS}Error for argument 'input': no", BatchRefused, {"positions": ()}),
    (400, "The examples at indices [0, 2] in your batch", BatchRefused, {"positions": (0, 2)}),
    (400, "The example at index 7 in your batch", BatchRefused, {"positions": ()}),
    (400, "Something new.", BatchRefused, {"positions": ()}),
    (422, [{"loc": ["body", "input", 1], "msg": "bad"}], BatchRefused, {"positions": (1,)}),
    (429, "too many concurrent streams", ProviderThrottled, {"streams": True}),
    (503, "Too many concurrent streams", ProviderThrottled, {"streams": True}),
    (429, "no", ProviderThrottled, {"streams": False, "learned": Learned()}),
    (
        429,
        "exceeded the Tokens Per Minute (TPM) rate limit of 3,000,000 tokens per minute",
        ProviderThrottled,
        {"learned": Learned(tokens_per_minute=3_000_000)},
    ),
    (
        429,
        "exceeded the Requests Per Minute (RPM) rate limit of 2,000 requests per minute",
        ProviderThrottled,
        {"learned": Learned(requests_per_minute=2000)},
    ),
]


@pytest.mark.parametrize(("code", "detail", "meaning", "facts"), WORDS)
def test_words_of_the_server_say_what_happens_next(
    simulator: Simulator,
    code: int,
    detail: Any,
    meaning: type[ProviderError],
    facts: dict[str, Any],
) -> None:
    simulator.add(status(code, detail=detail))
    error = failed(voyage(simulator), [f"{sentences(1)[0]} 1", "a\ud800 lone half", *sentences(1)])
    assert type(error) is meaning
    assert {name: error.facts[name] for name in facts} == facts


@pytest.mark.parametrize(
    ("form", "seconds"), [(7, 7), (0.25, 0.25), (0, 0), (900, 300), (-1, None), ("garbage", None)]
)
@pytest.mark.parametrize("code", [429, 503])
def test_the_wait_that_the_server_asks_for_is_passed_on(
    simulator: Simulator, code: int, form: Any, seconds: float | None
) -> None:
    simulator.add(status(code, retry_after=form))
    assert failed(voyage(simulator), sentences(1)).facts["retry_after"] == seconds


def test_a_date_to_wait_for_goes_by_the_servers_own_clock() -> None:
    wrong = datetime(2020, 1, 1, tzinfo=UTC)
    until = {"retry-after": format_datetime(wrong + timedelta(seconds=42), usegmt=True)}
    assert Reply(429, {**until, "date": format_datetime(wrong, usegmt=True)}).retry_after == 42
    assert Reply(429, until).retry_after is None  # long past by ours
    assert Reply(429, {"retry-after": "inf"}).retry_after is None


@given(st.text(max_size=40))
def test_no_header_breaks_the_reading_of_a_wait(value: str) -> None:
    waits = Reply(429, {"retry-after": value, "date": value}).retry_after
    assert waits is None or 0 <= waits <= 300


@given(
    st.binary(max_size=200)
    | st.recursive(st.text() | st.none(), st.lists).map(
        lambda said: json.dumps({"detail": said}).encode()
    )
)
def test_no_body_breaks_the_reading_of_a_reply(body: bytes) -> None:
    reply = Reply(400, {}, body)
    assert isinstance(reply.words, str)
    assert len(quoted(reply.words, KEY, ["a text"])) <= LONGEST_QUOTE
    assert reply.blamed == []
    learned_from(reply.words)


ECHOES: list[Callable[[str], str]] = [
    str,
    json.dumps,
    lambda text: f"<pre>{text}</pre>",
    lambda text: text[3:-2],
    lambda text: f"{text} and once more {text}" * 9,
    lambda text: json.dumps({"input": text}),
]


@pytest.mark.parametrize("kind", ["json", "text", "html"])
@pytest.mark.parametrize("code", [400, 401, 403, 418, 422, 429, 500, 503, 529])
@pytest.mark.parametrize("echo", range(len(ECHOES)))
def test_what_the_server_echoes_is_not_passed_on(
    simulator: Simulator, kind: Any, code: int, echo: int
) -> None:
    texts = [*sentences(2), "Ёлка стоит в углу, и снег 🌲 идёт весь день"]
    said = " ".join(map(ECHOES[echo], [KEY, *texts]))
    headers = {"x-request-id": KEY, "x-api-warning": f"key {KEY}"}
    simulator.add(status(code, kind=kind, detail=f"bad: {said}", headers=headers))
    error = failed(voyage(simulator), texts)
    pieces = [known[at : at + 14] for known in texts for at in range(len(known) - 14)]
    spelt = [json.dumps(piece)[1:-1] for piece in pieces]
    assert not any(piece in str(error) for piece in [*pieces, *spelt])
    assert KEY[3:15] not in str(error)


def test_the_sdks_log_does_not_show_an_echoed_key(
    simulator: Simulator, caplog: pytest.LogCaptureFixture
) -> None:
    simulator.add(status(400, detail=f"bad key {KEY}", headers={"x-request-id": f"for {KEY}"}))
    with caplog.at_level("DEBUG"):
        failed(voyage(simulator), sentences(1))
    assert "error_message" in caplog.text
    assert KEY not in caplog.text


def test_a_key_of_the_wrong_host_is_told_where_it_belongs(monkeypatch: pytest.MonkeyPatch) -> None:
    with Simulator(Settings(wrong_host="al-", keys=frozenset({KEY}))) as simulator:
        monkeypatch.setenv("VOYAGE_API_KEY", "al-of-the-other-host")
        denied = failed(voyage(simulator), sentences(1))
        assert type(denied) is ProviderDenied
        assert denied.facts["status"] == 403
        monkeypatch.setenv("VOYAGE_API_KEY", "pa-unknown")
        unknown = failed(voyage(simulator), sentences(1))
        assert type(unknown) is ProviderDenied
        assert "key in VOYAGE_API_KEY" in str(unknown)


def test_models_that_are_unknown_or_gone_stop_the_run() -> None:
    with Simulator(Settings(retired={"voyage-3-large": "voyage-4-large"})) as simulator:
        unknown = failed(voyage(simulator, "voyage-9"), sentences(1))
        gone = failed(voyage(simulator, "voyage-3-large"), sentences(1))
        length = failed(voyage(simulator, dimension=300), sentences(1))
        bits = failed(voyage(simulator, "voyage-law-2", 1024, dtype="ubinary"), sentences(1))
    assert [type(error) for error in (unknown, gone, length, bits)] == [ProviderDenied] * 4
    assert "'voyage-9'" in str(unknown)
    assert "voyage-4-lite" in str(unknown)
    assert "use voyage-4-large" in str(gone)
    assert "output_dimension" in str(length)


def test_a_model_of_one_length_is_not_asked_for_it() -> None:
    names = ("default_dimension", "min_dimension", "max_dimension")
    short: dict[str, Any] = {"dimensions": [512], **dict.fromkeys(names, 512)}
    with Simulator(Settings(models={"voyage-law-2": short})) as simulator:
        # To ask for 1024 would be refused; not to ask brings what the model has.
        error = failed(voyage(simulator, "voyage-law-2", 1024), sentences(1))
    assert type(error) is AnswerRejected


def test_without_a_key_nothing_is_sent(
    simulator: Simulator, monkeypatch: pytest.MonkeyPatch
) -> None:
    provider = voyage(simulator)
    provider.require()
    for value in (None, "", " \n", "two words", "pa-\u2013", "pa-\x00"):
        if value is None:
            monkeypatch.delenv("VOYAGE_API_KEY")
        elif "\x00" not in value:
            monkeypatch.setenv("VOYAGE_API_KEY", value)
        with pytest.raises(SettingsError, match="VOYAGE_API_KEY"):
            provider.require()
        with pytest.raises(ProviderDenied, match="VOYAGE_API_KEY"):
            provider.embed(sentences(1))
    assert simulator.ledger.totals()["calls"] == 0
    Lexical(64, LIMITS).require()


def test_white_space_around_a_key_does_not_count(
    simulator: Simulator, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("VOYAGE_API_KEY", f" {KEY}\n")
    voyage(simulator).embed(sentences(1))
    plain = simulator.ledger.requests[0].key
    monkeypatch.setenv("VOYAGE_API_KEY", KEY)
    voyage(simulator).embed(sentences(1))
    assert simulator.ledger.requests[1].key == plain


def test_a_key_comes_from_a_secret_block(
    simulator: Simulator, prefect_api: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    from prefect.blocks.system import Secret  # noqa: PLC0415 - most tests need no Prefect

    monkeypatch.delenv("VOYAGE_API_KEY")
    for name, value in (("voyage-key", KEY), ("no-key", " ")):
        block: Any = Secret(value=value)
        block.save(name)
    provider = voyage(simulator, api_key_block="voyage-key")
    provider.require()
    provider.embed(sentences(1))
    for name in ("not-there", "no-key"):
        with pytest.raises(SettingsError, match=name):
            replace(provider, api_key_block=name).require()
    simulator.add(status(401))
    assert "block 'voyage-key'" in str(failed(provider, sentences(1)))


def test_a_prefect_that_is_away_is_no_reason_to_give_up(
    simulator: Simulator, monkeypatch: pytest.MonkeyPatch
) -> None:
    from prefect.blocks.system import Secret  # noqa: PLC0415 - most tests need no Prefect

    def away(*_: object, **__: object) -> None:
        raise ConnectionError(KEY)

    monkeypatch.setattr(Secret, "load", away)
    provider = voyage(simulator, api_key_block="elsewhere")
    assert type(failed(provider, sentences(1))) is ProviderBusy
    with pytest.raises(SettingsError, match="ConnectionError"):
        provider.require()


def free_port() -> int:
    with socket.socket() as opened:
        opened.bind(("127.0.0.1", 0))
        return int(opened.getsockname()[1])


def test_an_address_that_is_wrong_is_named(
    simulator: Simulator, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    closed = f"127.0.0.1:{free_port()}"
    host = simulator.base_url.split("/")[2]
    expected: dict[str, tuple[type[ProviderError], str]] = {
        f"http://{closed}/v1": (ProviderBusy, closed),
        "http://voyage.invalid/v1": (ProviderBusy, "voyage.invalid"),
        f"https://{host}/v1": (ProviderDenied, "TLS"),
        f"http://{host}": (ProviderDenied, "/v1"),
        f"http://{host}/v1/": (ProviderError, ""),
        "ftp://files/v1": (ProviderDenied, "base_url"),
        "no-address": (ProviderDenied, "base_url"),
        "http://:0:/": (ProviderDenied, "base_url"),
        f"http://some:body@{closed}/v1": (ProviderBusy, closed),
    }
    simulator.add(status(503))
    for base_url, (meaning, words) in expected.items():
        error = failed(voyage(base_url, deadline_s=3), sentences(1))
        assert isinstance(error, meaning), base_url
        assert words in str(error), base_url
    monkeypatch.setenv("REQUESTS_CA_BUNDLE", str(tmp_path / "none.pem"))
    error = failed(voyage(f"https://{host}/v1"), sentences(1))
    assert type(error) is ProviderDenied
    assert "REQUESTS_CA_BUNDLE" in str(error)


def test_a_proxy_that_wants_a_password_is_named(
    simulator: Simulator, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HTTPS_PROXY", simulator.base_url.removesuffix("/v1"))
    error = failed(voyage("https://voyage.invalid/v1"), sentences(1))
    assert "HTTPS_PROXY" in str(error)


def test_a_netrc_does_not_replace_the_key(
    simulator: Simulator, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    netrc = tmp_path / "netrc"
    netrc.write_text("machine 127.0.0.1 login somebody password else\n")
    netrc.chmod(0o600)
    monkeypatch.setenv("NETRC", str(netrc))
    voyage(simulator).embed(sentences(1))


def test_threads_share_few_connections(simulator: Simulator) -> None:
    voyage(simulator).embed(sentences(1))
    simulator.reset()
    provider = voyage(simulator)

    def twenty_calls(seed: int) -> list[Vectors]:
        found = []
        for at in range(20):
            texts = sentences(2, seed * 100 + at)
            found.append(checked_vectors(provider.embed(texts), 2, provider))
        return found

    with ThreadPoolExecutor(20) as pool:
        found = list(pool.map(twenty_calls, range(20)))
    totals = simulator.ledger.totals()
    assert (totals["ok"], len(found)) == (400, 20)
    assert totals["connections"] <= 60  # a loaded machine lets some idle too long; alone 21 at most
    alone = provider.embed(sentences(2, 1907)).vectors
    assert np.array_equal(found[19][7], alone)


def test_sessions_of_others_stay_theirs(
    simulator: Simulator, monkeypatch: pytest.MonkeyPatch
) -> None:
    made: list[requests.Session] = []

    def users_factory() -> requests.Session:
        made.append(requests.Session())
        return made[-1]

    def in_new_thread(call: Callable[[], object]) -> None:
        thread = threading.Thread(target=call)
        thread.start()
        thread.join()

    client = Client(KEY, base_url=simulator.base_url)
    users = requests.Session()
    used: list[str] = []
    users.hooks["response"].append(lambda *_, **__: used.append("users"))
    for theirs in (users_factory, users):
        monkeypatch.setattr(voyageai, "requestssession", theirs)
        answer = voyage(simulator).embed(sentences(1))
        assert answer.request_id
        assert (made, used) == ([], []) if theirs is users_factory else (len(made), used) == (1, [])
        in_new_thread(lambda: client.embed(["a"], model="voyage-4"))
    assert (len(made), used) == (1, ["users"])
    for session in [*made, users]:
        session.close()


def test_a_call_given_up_leaves_no_thread_behind(simulator: Simulator) -> None:
    simulator.add(Rule(action="trickle", piece_bytes=100, seconds=0.05))
    assert type(failed(voyage(simulator, deadline_s=0.3), sentences(9))) is ProviderBusy
    ends = time.monotonic() + 30
    while any(thread.name == "voyage-call" for thread in threading.enumerate()):
        assert time.monotonic() < ends
        time.sleep(0.02)


def test_headers_that_never_end_meet_the_deadline_too() -> None:
    started = time.monotonic()
    with Simulator(Settings(), [Rule(action="trickle", piece_bytes=1, seconds=0.1)]) as simulator:
        error = failed(voyage(simulator, deadline_s=0.3), sentences(1))
        assert time.monotonic() - started < 8
    assert type(error) is ProviderBusy
    assert "deadline" in str(error)


def test_a_whole_answer_may_come_slowly_before_the_deadline(simulator: Simulator) -> None:
    simulator.add(Rule(action="slow", seconds=0.3))
    assert len(voyage(simulator, deadline_s=5).embed(sentences(2)).vectors) == 2


def test_packed_answers_are_read(simulator: Simulator) -> None:
    plain = voyage(simulator).embed(sentences(30)).vectors
    with Simulator(Settings(gzip=True)) as packed:
        assert np.array_equal(voyage(packed).embed(sentences(30)).vectors, plain)


def test_an_endless_answer_is_cut_off(
    simulator: Simulator, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("tasks.providers.voyage_transport.LONGEST_BODY", 1000)
    assert type(failed(voyage(simulator), sentences(9))) is AnswerRejected


def wrapped(reason: Exception) -> Exception:
    """As requests hands on what urllib3 gave up on."""
    pool = HTTPSConnectionPool("api.voyageai.com")
    return requests.ConnectionError(MaxRetryError(pool, "/v1/embeddings", reason))


BROKEN: list[tuple[Exception, type[ProviderError], str]] = [
    (wrapped(TLSError(ssl.SSLCertVerificationError("self-signed"))), ProviderDenied, "CA_BUNDLE"),
    (wrapped(TLSError(ssl.SSLEOFError("ended"))), ProviderBusy, "broke"),
    (wrapped(OSError("Tunnel connection failed: 407 Login")), ProviderDenied, "HTTPS_PROXY"),
    (wrapped(OSError("Tunnel connection failed: 502 Bad")), ProviderBusy, "HTTPS_PROXY"),
    (wrapped(socket.gaierror(-2, "unknown")), ProviderUnreachable, "no address"),
    (wrapped(ConnectionRefusedError(111, "refused")), ProviderUnreachable, "takes no connection"),
    (requests.exceptions.ChunkedEncodingError("cut"), ProviderBusy, "broke"),
    (requests.exceptions.ConnectTimeout("slow"), ProviderBusy, "deadline"),
    (requests.exceptions.InvalidHeader("no"), ProviderDenied, "key"),
    (DecodeError("no gzip"), AnswerRejected, "unpacked"),
]


@pytest.mark.parametrize(("error", "kind", "words"), BROKEN)
def test_a_broken_wire_is_understood_however_it_is_wrapped(
    error: Exception, kind: type[ProviderError], words: str
) -> None:
    from tasks.providers.voyage_broken import meaning  # noqa: PLC0415

    found, what = meaning(error)
    assert found is kind
    assert words in what


def test_an_error_that_only_the_sdk_has_seen_is_understood() -> None:
    from pydantic import SecretStr  # noqa: PLC0415

    from tasks.providers.voyage_errors import Asked, failure  # noqa: PLC0415
    from tasks.providers.voyage_transport import Outcome  # noqa: PLC0415

    asked = Asked("voyage-4", ["a text"], SecretStr(KEY), "VOYAGE_API_KEY")
    limited = sdk.RateLimitError("no", "no", 429, headers={"Retry-After": "7"})  # type: ignore[no-untyped-call]
    error = failure(Outcome("api.voyageai.com", error=limited), asked)
    assert (type(error), error.facts["retry_after"]) == (ProviderThrottled, 7)
    unsent = failure(Outcome("api.voyageai.com", error=TypeError(KEY)), asked)
    assert type(unsent) is ProviderDenied
    atlas = replace(asked, key=SecretStr("al-other"))
    wrong = failure(Outcome("api.voyageai.com", Reply(403, {})), atlas)
    assert "ai.mongodb.com" in str(wrong)
    slipped = failure(Outcome("api.voyageai.com", Reply(410, {})), replace(asked, model=KEY))
    assert KEY not in str(slipped)
    wrong = failure(Outcome("ai.mongodb.com", Reply(403, {})), asked)
    assert "api.voyageai.com" in str(wrong)


def test_it_is_a_value_that_holds_no_key(simulator: Simulator) -> None:
    provider: Provider = voyage(simulator)
    provider.embed(sentences(1))
    pickled = pickle.dumps(provider)
    assert pickle.loads(pickled) == provider  # noqa: S301 - our own bytes
    assert KEY.encode() not in pickled
    assert KEY not in repr(provider)
    assert binascii.hexlify(KEY.encode()) not in pickled
