"""One deadline for a whole call, whatever hangs: name lookup, upload, headers or body.

The timeouts of HTTP libraries start anew with each piece that arrives. So each call runs in
a thread of its own, and the thread that asked waits until the deadline and no longer.
"""

import threading
from collections.abc import Callable
from urllib.parse import urlsplit

_in_flight = set[threading.Event]()
_in_flight_lock = threading.Lock()


class TooLate(Exception):
    """The deadline of a call came before the end of its answer."""


class TooLong(Exception):
    """An answer is longer than any that was asked for."""


def finished(call: Callable[[], None], deadline_s: float, name: str) -> bool:
    """Whether `call`, run in a thread called `name`, came to its end within `deadline_s` seconds.

    A call given up goes on: it should end by itself soon after.
    """
    over, done = threading.Event(), threading.Event()

    def run() -> None:
        try:
            call()
            done.set()
        finally:
            over.set()

    with _in_flight_lock:
        _in_flight.add(over)
    threading.Thread(target=run, name=name, daemon=True).start()
    over.wait(deadline_s)
    with _in_flight_lock:
        _in_flight.remove(over)
    return done.is_set()


def give_up() -> None:
    """Let all calls of this process that are in flight end as if their deadline had come."""
    with _in_flight_lock:
        for over in _in_flight:
            over.set()


def host_of(url: str) -> str:
    """Host and port of `url`, without what may stand before an @."""
    try:
        parts = urlsplit(url)
        port = f":{parts.port}" if parts.port else ""
    except ValueError:
        return "base_url"
    return f"{parts.hostname}{port}" if parts.hostname else "base_url"
