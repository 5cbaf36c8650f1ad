"""`/_sim/`: the simulator's own pages, for who runs it from another process."""

import json
from collections.abc import Callable
from typing import Any
from urllib.parse import parse_qs

from pydantic import JsonValue, TypeAdapter, ValidationError

from tasks.errors import SettingsError
from tasks.simulator import wire
from tasks.simulator.api import Api
from tasks.simulator.rules import Rule
from tasks.simulator.settings import problems
from tasks.simulator.wire import Reply

_RULES = TypeAdapter(list[Rule])
_OBJECT: TypeAdapter[dict[str, JsonValue]] = TypeAdapter(dict[str, JsonValue])
_SECONDS = TypeAdapter(dict[str, float])


def answer(api: Api, method: str, path: str, query: str, body: bytes) -> Reply:
    """What a request for one of these pages is answered with; 404 for all others."""
    pages = _PAGES.get(path)
    if pages is None:
        return _reply(404, {"detail": "Not Found"})
    if method not in pages:
        return _reply(405, {"detail": "Method Not Allowed"})
    try:
        return _reply(200, pages[method](api, query, body))
    except ValidationError as error:
        return _reply(400, {"detail": problems(error)})
    except (SettingsError, ValueError) as error:
        return _reply(400, {"detail": str(error)})


def _reply(status: int, value: object) -> Reply:
    return Reply(status, wire.in_json(value), request_id=wire.new_request_id())


def _health(api: Api, query: str, body: bytes) -> object:
    return {"status": "ok", "now": api.clock.now()}


def _ledger(api: Api, query: str, body: bytes) -> object:
    api.settle()
    found: dict[str, Any] = {"totals": api.ledger.totals()}
    if parse_qs(query).get("requests") != ["0"]:
        found["requests"] = [record.as_json() for record in api.ledger.requests]
    return found


def _add_rules(api: Api, query: str, body: bytes) -> object:
    given = _read(body)
    rules = _RULES.validate_python(given if isinstance(given, list) else [given])
    return {"rules": api.add(rules)}


def _clear_rules(api: Api, query: str, body: bytes) -> object:
    api.clear_rules()
    return {"rules": 0}


def _reset(api: Api, query: str, body: bytes) -> object:
    api.reset()
    return {"status": "ok"}


def _settings(api: Api, query: str, body: bytes) -> object:
    api.change(api.settings.changed(_OBJECT.validate_python(_read(body))))
    return api.settings.model_dump(mode="json", exclude={"keys"})


def _show_settings(api: Api, query: str, body: bytes) -> object:
    return api.settings.model_dump(mode="json", exclude={"keys"})


def _advance(api: Api, query: str, body: bytes) -> object:
    given = _SECONDS.validate_python(_read(body))
    if set(given) != {"seconds"}:
        raise ValueError('body: must be {"seconds": <number>}.')
    api.clock.advance(given["seconds"])
    return {"now": api.clock.now()}


def _read(body: bytes) -> object:
    try:
        return json.loads(body)
    except ValueError as error:
        raise ValueError(f"body: not valid JSON: {error}.") from None


_Page = Callable[[Api, str, bytes], object]

_PAGES: dict[str, dict[str, _Page]] = {
    "/_sim/health": {"GET": _health},
    "/_sim/ledger": {"GET": _ledger},
    "/_sim/rules": {"POST": _add_rules, "DELETE": _clear_rules},
    "/_sim/reset": {"POST": _reset},
    "/_sim/settings": {"GET": _show_settings, "POST": _settings},
    "/_sim/advance": {"POST": _advance},
}
