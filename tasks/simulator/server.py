"""The HTTP server on 127.0.0.1, one thread a connection."""

import contextlib
import socket
import socketserver
import threading
from collections.abc import Callable, Iterable
from http.server import BaseHTTPRequestHandler
from typing import Any, Self
from urllib.parse import urlsplit

from pydantic import JsonValue

from tasks.errors import SettingsError
from tasks.simulator import admin, lane, wire
from tasks.simulator.api import Api, Call
from tasks.simulator.ledger import Ledger
from tasks.simulator.rules import Rule
from tasks.simulator.settings import Settings
from tasks.simulator.wire import Reply

HOST = "127.0.0.1"
_EMBEDDINGS = "/v1/embeddings"
_POLL_S = 0.05
_LARGEST_BODY = 256 * 1024 * 1024


class Simulator:
    """A simulated Voyage AI API, from `with` until its end.

    Example:
        with Simulator(Settings(tier="free")) as simulator:
            simulator.add(Rule(requests={1}, status=503))
            client = voyageai.Client("any key", base_url=simulator.base_url)
    """

    def __init__(self, settings: Settings | None = None, rules: Iterable[Rule] = ()) -> None:
        self._api = Api(settings or Settings())
        self._api.add(rules)
        self._server: _Server | None = None
        self._thread: threading.Thread | None = None

    def __enter__(self) -> Self:
        self.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.stop()

    @property
    def settings(self) -> Settings:
        """How it behaves now."""
        return self._api.settings

    @property
    def ledger(self) -> Ledger:
        """What was asked, answered and billed by now."""
        self._api.settle()
        return self._api.ledger

    @property
    def port(self) -> int:
        """Where it listens."""
        if self._server is None:
            raise RuntimeError("The simulator is not running: use it in a with block.")
        return int(self._server.server_address[1])

    @property
    def base_url(self) -> str:
        """What a client is given as its base URL."""
        return f"http://{HOST}:{self.port}/v1"

    def start(self) -> None:
        """Listen.

        Raises:
            SettingsError: The port is not free.
        """
        port = self.settings.port
        try:
            self._server = _Server(port, self._api)
        except OSError as error:
            raise SettingsError(
                f"port: {port} on {HOST} cannot be used: {error.strerror}. 0 is any free one."
            ) from None
        self._api.stopped.clear()
        self._thread = threading.Thread(
            target=self._server.serve_forever, args=(_POLL_S,), name="simulator", daemon=True
        )
        self._thread.start()

    def stop(self) -> None:
        """Close all connections, answered or not."""
        if self._server is None or self._thread is None:
            return
        self._api.stopped.set()
        self._server.shutdown()
        self._thread.join()
        self._server.close_all()
        self._server = self._thread = None

    def add(self, *rules: Rule) -> None:
        """Append to the fault script: the first rule that fits a request has it."""
        self._api.add(rules)

    def reset(self) -> None:
        """Drop rules, ledger, windows, files and jobs. Settings and time stay."""
        self._api.reset()

    def change(self, **settings: Any) -> None:
        """Go on with other settings.

        Raises:
            SettingsError: One is wrong, or fixed from the start.
        """
        changes: dict[str, JsonValue] = settings
        self._api.change(self.settings.changed(changes))

    def advance(self, seconds: float) -> None:
        """Let simulated seconds pass at once."""
        self._api.clock.advance(seconds)


def serve(
    settings: Settings,
    rules: Iterable[Rule] = (),
    on_ready: Callable[[Simulator], None] = lambda _: None,
) -> None:
    """Run a simulator until an interrupt (Ctrl-C).

    Args:
        settings: How it behaves.
        rules: Its fault script.
        on_ready: Called once it listens, with its address in `base_url`.

    Raises:
        SettingsError: The port is not free.
    """
    with Simulator(settings, rules) as simulator, contextlib.suppress(KeyboardInterrupt):
        on_ready(simulator)
        threading.Event().wait()


class _Server(socketserver.TCPServer):
    """Accepts; each connection has a thread that ends with it."""

    allow_reuse_address = True
    request_queue_size = 256

    def __init__(self, port: int, api: Api) -> None:
        self.api = api
        self._lock = threading.Lock()
        self._open: dict[socket.socket, threading.Thread] = {}
        super().__init__((HOST, port), _Handler)

    def process_request(self, request: Any, client_address: Any) -> None:
        thread = threading.Thread(target=self._talk, args=(request, client_address), daemon=True)
        with self._lock:
            self._open[request] = thread
        thread.start()

    def close_all(self) -> None:
        """End all connections and their threads, and no longer listen."""
        with self._lock:
            talking = list(self._open.items())
        for connection, _ in talking:
            with contextlib.suppress(OSError):  # it has just ended by itself
                connection.shutdown(socket.SHUT_RDWR)
        for _, thread in talking:
            thread.join()
        self.server_close()

    def _talk(self, connection: socket.socket, client_address: Any) -> None:
        # Only what the client does can raise here: it went away, or sent what is not HTTP.
        try:
            with connection, contextlib.suppress(OSError):
                _Handler(connection, client_address, self)
        finally:
            with self._lock:
                del self._open[connection]
            self.api.ledger.disconnected()


class _Handler(BaseHTTPRequestHandler):
    """One connection."""

    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True
    server: _Server

    def setup(self) -> None:
        super().setup()
        self._number = self.server.api.ledger.connected()

    def do_POST(self) -> None:
        """Embeddings, files and jobs, or a change to the simulator."""
        path, body = urlsplit(self.path), self._body()
        if body is None:
            return
        if path.path == _EMBEDDINGS:
            self._embed(body, redirected=path.query == "redirected")
        else:
            self._administer(body)

    def do_GET(self) -> None:
        """Files and jobs, or what the simulator knows of itself."""
        body = self._body()
        if body is not None:
            self._administer(body)

    def do_DELETE(self) -> None:
        """Drop a file, or the fault script."""
        body = self._body()
        if body is not None:
            self._administer(body)

    def log_message(self, format: str, *args: Any) -> None:  # noqa: A002 - the name is given
        """Say nothing: the ledger knows."""

    def _embed(self, body: bytes, *, redirected: bool) -> None:
        api, left = self.server.api, False

        def leave() -> None:
            # Before the client can know that it is answered, lest its next request finds
            # this one still in flight.
            nonlocal left
            if not left:
                api.ledger.left()
            left = True

        authorization = self.headers.get("authorization", "")
        try:
            reply = api.answer(Call(authorization, body, self._number, redirected))
            self._send(reply, leave)
        finally:
            leave()

    def _administer(self, body: bytes) -> None:
        path = urlsplit(self.path)
        if path.path.startswith(lane.PATHS):
            reply = self.server.api.answer_lane(
                lane.Request(
                    self.command,
                    path.path,
                    path.query,
                    self.headers.get("authorization", ""),
                    self.headers.get("content-type", ""),
                    body,
                )
            )
        elif path.path == _EMBEDDINGS:
            reply = Reply(405, wire.error("Method Not Allowed"), (("allow", "POST"),))
        else:
            reply = admin.answer(self.server.api, self.command, path.path, path.query, body)
        self._send(reply, lambda: None)

    def _send(self, reply: Reply, before_last_byte: Callable[[], None]) -> None:
        api = self.server.api
        accepts_gzip = "gzip" in self.headers.get("accept-encoding", "")
        goes_on = wire.deliver(
            self.connection,
            reply,
            accepts_gzip=accepts_gzip and api.settings.gzip,
            stopped=api.stopped,
            before_last_byte=before_last_byte,
        )
        self.close_connection |= not goes_on

    def _body(self) -> bytes | None:
        """The body of the request; None where it cannot be read, and that is answered."""
        length = self.headers.get("content-length", "0")
        if not length.isdecimal() or "transfer-encoding" in self.headers:
            self._send(Reply(411, wire.error("Length Required")), lambda: None)
        elif int(length) > _LARGEST_BODY:
            self._send(Reply(413, wire.error("Request Entity Too Large")), lambda: None)
        else:
            body = self.rfile.read(int(length))
            if len(body) == int(length):
                return body
        self.close_connection = True
        return None
