"""A run against the real API: it needs a key, counts its calls and keeps what it learned."""

import json
import os
import tempfile
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pytest
from pydantic import SecretStr
from voyageai.util import get_default_base_url

from tasks.errors import ProviderError
from tasks.providers.voyage_errors import Asked, failure
from tasks.providers.voyage_reply import quoted
from tasks.providers.voyage_transport import Outcome, exchange

MOST_CALLS = 20
DEADLINE_S = 60.0
SHOWN_HEADERS = ("server", "retry-after", "date")
_facts = pytest.StashKey[Path]()


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
    request.config.stash[_facts] = file


def pytest_terminal_summary(terminalreporter: Any, config: pytest.Config) -> None:
    """Say where the facts are."""
    if _facts in config.stash:
        terminalreporter.write_line(f"Facts of this run: {config.stash[_facts]}")
