"""Answers as bytes, and the ways in which bytes do not arrive."""

import gzip
import json
import socket
import struct
import threading
import time
import uuid
from collections.abc import Callable
from dataclasses import dataclass
from email.utils import formatdate
from http import HTTPStatus

from pydantic import JsonValue

from tasks.simulator.rules import Rule

JSON = "application/json"
_HTTP_DATE_AHEAD_S = 2
# A reset at once could overtake the bytes before it, and the client would not see them.
_ARRIVE_S = 0.05
_LARGE = 64 * 1024

_DETAILS: dict[int, str | list[JsonValue]] = {
    400: "Request to the model failed. The batch holds input that cannot be processed.",
    401: "Provided API key is invalid.",
    404: "Not Found",
    422: [{"loc": ["body", "input"], "msg": "field required", "type": "value_error.missing"}],
    429: "Rate limit exceeded",
}


@dataclass(frozen=True)
class Reply:
    """What a request is answered with.

    Attributes:
        status: None where the connection ends without an answer.
        body: In full, whatever `rule` lets through.
        headers: Beside those that any answer has.
        content_type: None is no such header.
        rule: A fault of the delivery, if any.
        request_id: The header x-request-id.
    """

    status: int | None
    body: bytes = b""
    headers: tuple[tuple[str, str], ...] = ()
    content_type: str | None = JSON
    rule: Rule | None = None
    request_id: str = ""


def new_request_id() -> str:
    """A value for x-request-id."""
    return str(uuid.uuid4())


def in_json(value: object) -> bytes:
    """`value` as JSON without spaces."""
    return json.dumps(value, separators=(",", ":")).encode()


def error(detail: object, code: str | None = None) -> bytes:
    """The body of an answer that is not 200."""
    return in_json({"detail": detail, **({"error_code": code} if code else {})})


def scripted(rule: Rule) -> Reply:
    """The answer of a rule that comes before any check."""
    match rule.action:
        case "status":
            return _scripted_status(rule)
        case "204":
            return Reply(204, content_type=None)
        case "redirect_307":
            return Reply(307, headers=(("location", "/v1/embeddings?redirected"),))
        case _:
            return Reply(None, rule=rule)


def answered(body: bytes, rule: Rule | None) -> Reply:
    """A good answer, but for the fault in it or on its way."""
    ok, action = HTTPStatus.OK, "" if rule is None else rule.action
    match action:
        case "process_then_reset":
            reply = Reply(None, rule=rule)
        case "reset_mid" | "short_body" | "chunk_trunc" | "trickle":
            reply = Reply(ok, body, rule=rule)
        case "text_plain_200":
            reply = Reply(ok, b"OK", content_type="text/plain")
        case "empty_200":
            reply = Reply(ok)
        case "bad_json":
            reply = Reply(ok, body[: len(body) // 2])
        case "bad_utf8":
            reply = Reply(ok, b'{"object":"\xff\xfe",' + body[1:])
        case _:
            reply = Reply(ok, body)
    return reply


def deliver(
    connection: socket.socket,
    reply: Reply,
    *,
    accepts_gzip: bool,
    stopped: threading.Event,
    before_last_byte: Callable[[], None],
) -> bool:
    """Send `reply`, as far as its fault lets it.

    Returns:
        Whether the connection can serve another request.
    """
    body, headers = reply.body, list(reply.headers)
    if accepts_gzip and body:
        body = gzip.compress(body, compresslevel=1)
        headers.append(("content-encoding", "gzip"))
    rule, action = reply.rule, "" if reply.rule is None else reply.rule.action
    if rule is not None and action == "hang":
        stopped.wait(rule.seconds)
    if action == "chunk_trunc":
        head = _head(reply, [*headers, ("transfer-encoding", "chunked")], None)
    else:
        head = _head(reply, headers, len(body))
    pieces = _whole(head, body) if rule is None else _pieces(head, body, rule)
    for number, piece in enumerate(pieces, 1):
        if number == len(pieces):
            before_last_byte()
        connection.sendall(piece)
        if rule is not None and action == "trickle" and number < len(pieces):
            stopped.wait(rule.seconds)
    if action == "reset_mid":
        stopped.wait(_ARRIVE_S)
    before_last_byte()
    if action in {"reset_before", "reset_mid", "process_then_reset"}:
        _reset_on_close(connection)
    return action in {"", "trickle"}


def _whole(head: bytes, body: bytes) -> list[bytes]:
    """Small answers in one write; to copy a large one would take longer than another write."""
    return [head + body] if len(body) < _LARGE else [head, body]


def _pieces(head: bytes, body: bytes, rule: Rule) -> list[bytes]:
    """What is sent, in order."""
    kept = body[: int(len(body) * rule.fraction)]
    match rule.action:
        case "reset_mid" | "short_body":
            return [head + kept]
        case "chunk_trunc":  # announces the whole body as one chunk
            return [head + b"%x\r\n" % len(body) + kept]
        case "trickle":
            whole = head + body
            starts = range(0, len(whole), rule.piece_bytes)
            return [whole[start : start + rule.piece_bytes] for start in starts]
        case _:
            return []


def _head(reply: Reply, headers: list[tuple[str, str]], length: int | None) -> bytes:
    if reply.status is None:
        return b""
    phrase = HTTPStatus(reply.status).phrase if reply.status in _KNOWN else "Unknown"
    lines = [
        f"HTTP/1.1 {reply.status} {phrase}",
        f"date: {formatdate(usegmt=True)}",
        "server: uvicorn",
        f"x-request-id: {reply.request_id}",
    ]
    if reply.content_type is not None:
        lines.append(f"content-type: {reply.content_type}")
    if length is not None and reply.status != HTTPStatus.NO_CONTENT:
        lines.append(f"content-length: {length}")
    lines += [f"{name}: {value}" for name, value in headers]
    return ("\r\n".join(lines) + "\r\n\r\n").encode("ascii")


_KNOWN = {int(status) for status in HTTPStatus}


def _scripted_status(rule: Rule) -> Reply:
    status = rule.status or 500
    detail = rule.detail
    if detail is None:
        detail = _DETAILS.get(status, f"Simulated fault: {status}.")
    page = f"<html><body><h1>{status}</h1></body></html>".encode()
    content_type, body = {
        "json": (JSON, error(detail, rule.error_code)),
        "json_no_detail": (JSON, in_json({"error": f"Simulated fault: {status}."})),
        "html": ("text/html", page),
        "text": ("text/plain", detail.encode() if isinstance(detail, str) else in_json(detail)),
        "empty": (None, b""),
    }[rule.kind]
    headers = list(rule.headers.items())
    if rule.retry_after is not None:
        headers.append(("retry-after", _retry_after(rule.retry_after)))
    return Reply(status, body, tuple(headers), content_type)


def _retry_after(value: float | str) -> str:
    match value:
        case "http-date":
            return http_date(_HTTP_DATE_AHEAD_S)
        case "garbage":
            return "soon"
        case number:
            return str(number)


def http_date(seconds_ahead: float) -> str:
    """A moment in the future, as headers write it."""
    return formatdate(time.time() + seconds_ahead, usegmt=True)


def _reset_on_close(connection: socket.socket) -> None:
    """Let the close be a reset and not an orderly end."""
    connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
