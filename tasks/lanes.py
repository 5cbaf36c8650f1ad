"""Lanes: whether missing texts are embedded at once, or wait for the Batch API at a lower price."""

from dataclasses import dataclass
from typing import Literal
from urllib.parse import urlsplit

from tasks.budget import usd_text
from tasks.catalog import ModelFacts, facts_for
from tasks.errors import SettingsError
from tasks.params import Embedding
from tasks.summary import span_text

WINDOW_S = 12 * 3600.0
"""Within so long a job is done or has expired; the API offers no other window (docs, 2026)."""
WORTH_USD = 0.1
"""Saving less is not worth a wait of hours."""
NO_LANE_HOST = "mongodb.com"
"""MongoDB serves the same models, and its documentation knows no Batch API (2026)."""


@dataclass(frozen=True)
class Lane:
    """Which way the missing texts of a run go.

    Attributes:
        name: "realtime" or "batch".
        why: For people.
        usd_per_million_tokens: Its list price.
    """

    name: Literal["realtime", "batch"]
    why: str
    usd_per_million_tokens: float

    def usd(self, tokens: int) -> float:
        """List price of `tokens`, in US dollars."""
        return tokens * self.usd_per_million_tokens / 1e6


def require_lane(embedding: Embedding) -> None:
    """Refuse a Batch lane that cannot be had.

    Raises:
        SettingsError: `embedding.lane` is batch, and provider, model or address have none.
    """
    why = _why_not(embedding, facts_for(embedding))
    if embedding.lane == "batch" and why:
        raise SettingsError(
            f"embedding.lane: {why}. Set it to realtime, or to auto, which goes the realtime lane "
            "where there is no other."
        )


def lane_of(embedding: Embedding, tokens: int, behind_s: float | None) -> Lane:
    """Which way the missing texts of a run go.

    Args:
        embedding: What was asked for.
        tokens: Estimated, of the missing texts that the Batch lane takes.
        behind_s: Seconds for which the index has waited for that lane; None where it does not.
    """
    facts = facts_for(embedding)
    usd = facts.usd_per_million_tokens
    name, why = _chosen(embedding, facts, tokens, behind_s)
    if name == "batch":
        usd *= 1 - (facts.batch_discount or 0.0)
    return Lane(name, why, usd)


def _chosen(
    embedding: Embedding, facts: ModelFacts, tokens: int, behind_s: float | None
) -> tuple[Literal["realtime", "batch"], str]:
    if embedding.lane == "realtime" or not tokens:
        return "realtime", ""
    if why := _why_not(embedding, facts) or _why_not_now(embedding, facts, tokens, behind_s):
        return "realtime", why
    if embedding.lane == "batch":
        return "batch", "as embedding.lane says"
    saved = usd_text(facts.usd(tokens) - (facts.batch_usd(tokens) or 0.0))
    may_wait = span_text(embedding.lane_deadline)
    return "batch", f"it saves {saved}, and the index may wait for {may_wait}"


def _why_not_now(
    embedding: Embedding, facts: ModelFacts, tokens: int, behind_s: float | None
) -> str:
    """Why these texts do not go the Batch lane, though there is one; "" where they do."""
    deadline = embedding.lane_deadline
    if behind_s is not None and deadline - behind_s < WINDOW_S:
        waited = span_text(behind_s)
        return f"the index has waited for {waited} and may wait for {span_text(deadline)}"
    if embedding.lane == "batch":
        return ""
    if deadline < WINDOW_S:
        return (
            f"embedding.lane_deadline, {span_text(deadline)}, is shorter than the "
            f"{span_text(WINDOW_S)} that the Batch lane may take"
        )
    saved = facts.usd(tokens) - (facts.batch_usd(tokens) or 0.0)
    if saved < WORTH_USD:
        return (
            f"the Batch lane would save {usd_text(saved)}, and under {usd_text(WORTH_USD)} is not "
            "worth the wait"
        )
    return ""


def _why_not(embedding: Embedding, facts: ModelFacts) -> str:
    """Why there is no Batch lane; "" where there is."""
    if facts.provider != "voyage":
        return f"provider {facts.provider!r} has no Batch lane here, only 'voyage' has"
    if not facts.batch_lane:
        return f"Voyage's Batch API does not take the model {facts.name!r}"
    host = urlsplit(embedding.base_url or "").hostname or ""
    if host == NO_LANE_HOST or host.endswith(f".{NO_LANE_HOST}"):
        return f"{host} has no Batch API, only api.voyageai.com has"
    return ""
