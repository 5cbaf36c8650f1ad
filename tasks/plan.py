"""Plan: what a reindex would do and cost, known before a cent is spent."""

import tempfile
from pathlib import Path

import numpy as np
import pyarrow as pa
from pydantic import Field

from tasks.budget import usd_text
from tasks.catalog import limits_for
from tasks.compare import repeated_tokens, tally
from tasks.errors import SettingsError
from tasks.form import Overrides
from tasks.keys import KeySet
from tasks.lanes import WINDOW_S
from tasks.params import Config
from tasks.report import Chunks, Cost, Part, Saved, Texts
from tasks.schemas import CHANGES, DELETIONS, PACKED
from tasks.summary import Row, chunk_rows, cost_text, prepend_rows, skipped_rows, span_text
from tasks.survey import Survey, require_safe, survey

GUESS = 0.1
"""An estimate that may be so far off has seen no bill yet, or hardly any."""


class Plan(Part):
    """What a reindex would do. Nothing was spent or written to find out.

    Attributes:
        source: Absolute path of the corpus.
        index: Folder and table.
        space: Provider, model, dimension and dtype.
        calls: Requests it takes.
        tokens: Estimated tokens to embed.
        tokens_margin: How far the bill may lie above that, relative; 0 where they are counted.
        usd: Their list price; `free_tokens` of the account are not taken off.
        lane: Where they would go, "realtime" or "batch"; `cost` is the price there.
        lane_why: Why; "" where nobody asked.
        waiting: Texts that are in the Batch lane already, in no other count; a reindex can
            publish once they have come.
        usd_realtime: List price in the realtime lane.
        usd_batch_lane: The same in the provider's Batch lane; null where it has none.
        seconds_at_limits: Time that the calls wait for the account's limits; 0 within one
            minute's quota.
        bound_by: Which limit that is; "" where it is none.
        limited: Whether the account has limits a minute.
        next_tier: The account's next usage tier; 0 where there is none, or it is no faster.
        seconds_at_next_tier: The time there.
        cut: Texts to embed that are as long as the model reads, or longer: the rest is cut off.
        max_usd: Most that a run may cost; null: no limit.
        approve_above_usd: Most that a run may cost unasked; null: no limit.
        would_refuse: Why a reindex would refuse to start; "" if it would not.
        prepend: Columns that stand in front of each text.
    """

    name: str
    source: str
    index: str
    space: str
    chunks: Chunks
    texts: Texts
    calls: int
    tokens: int
    tokens_margin: float
    cost: Cost
    lane: str
    lane_why: str
    waiting: int
    usd_realtime: float
    usd_batch_lane: float | None
    free_tokens: int
    seconds_at_limits: float
    bound_by: str
    limited: bool
    next_tier: int
    seconds_at_next_tier: float
    cut: int
    documents: int
    skipped: dict[str, int] = Field(default={})
    examples: dict[str, list[str]] = Field(default={})
    max_usd: float | None = None
    approve_above_usd: float | None = None
    would_refuse: str = ""
    prepend: tuple[str, ...] = ()

    @property
    def needs_approval(self) -> bool:
        """Whether a run may cost more than it may unasked."""
        sends_nothing = self.waiting and self.lane == "realtime"
        if self.approve_above_usd is None or not self.cost.usd or sends_nothing:
            return False
        most = self.cost.usd if self.max_usd is None else min(self.cost.usd, self.max_usd)
        return most > self.approve_above_usd


def plan_of(survey: Survey, overrides: Overrides) -> Plan:
    """The plan that follows from a survey."""
    facts, packed, config = survey.facts, survey.packed, survey.config
    limits = survey.provider.limits
    try:
        require_safe(survey, overrides)
        refusal = ""
    except SettingsError as error:
        refusal = str(error)
    compared = survey.compared
    changes, deletions = compared.changes.load(CHANGES), compared.deletions.load(DELETIONS)
    refused = KeySet(survey.looked_up.quarantined)
    left_out = refused.holds(changes.column("text_hash"))
    wait_s, bound_by = limits.wait(packed.calls())
    tier, sooner = _next_tier(survey, wait_s)
    return Plan(
        name=config.name,
        source=config.source.path,
        index=config.index.place,
        space=str(survey.identity.space),
        chunks=chunks_of(
            survey,
            tally(changes.filter(pa.array(~left_out)), deletions),
            quarantined=int(left_out.sum()),
        ),
        texts=texts_of(survey, packed.texts),
        calls=packed.batches,
        tokens=packed.tokens,
        tokens_margin=survey.provider.estimate.margin,
        cost=cost_of(
            survey,
            packed.tokens,
            refused,
            lane_saves=facts.usd(packed.tokens) - survey.lane.usd(packed.tokens),
        ),
        lane=survey.lane.name,
        lane_why=survey.lane.why,
        waiting=survey.looked_up.waiting,
        usd_realtime=facts.usd(packed.tokens),
        usd_batch_lane=facts.batch_usd(packed.tokens),
        free_tokens=facts.free_tokens,
        seconds_at_limits=wait_s,
        bound_by=bound_by,
        limited=bool(limits.requests_per_minute or limits.tokens_per_minute),
        next_tier=tier,
        seconds_at_next_tier=sooner,
        cut=_cut(survey),
        max_usd=config.budget.max_usd,
        approve_above_usd=config.budget.approve_above_usd,
        documents=survey.keyed.notes.documents,
        skipped=dict(survey.keyed.notes.skipped),
        examples=survey.keyed.notes.examples,
        would_refuse=refusal,
        prepend=config.embedding.prepend,
    )


def _next_tier(survey: Survey, wait_s: float) -> tuple[int, float]:
    """The account's next usage tier and the seconds there; 0 where it is no faster."""
    settings = survey.config.limits
    tier = 1 if settings.tier == "free" else settings.tier + 1
    if survey.facts.tiers is None or tier not in survey.facts.tiers:
        return 0, 0.0
    limits = limits_for(settings.model_copy(update={"tier": tier}), survey.facts)
    seconds, _ = limits.wait(survey.packed.calls())
    return (tier, seconds) if seconds < wait_s else (0, 0.0)


def _cut(survey: Survey) -> int:
    longest = survey.facts.context_tokens
    if longest is None or not survey.identity.space.truncation:
        return 0
    tokens = survey.packed.table.load(PACKED).column("tokens")
    return int(np.count_nonzero(tokens.to_numpy() >= longest))


def make_plan(config: Config, overrides: Overrides) -> Plan:
    """Plan a reindex; leaves no trace."""
    with tempfile.TemporaryDirectory(prefix="embed-once-") as folder:
        return plan_of(survey(config, overrides, Path(folder)), overrides)


def plan_rows(plan: Plan) -> list[Row]:
    """The plan as label and value, in the order people read it."""
    rows = [
        ("source", plan.source),
        ("index", plan.index),
        ("space", plan.space),
        *prepend_rows(plan.prepend),
        ("documents", f"{plan.documents:,}"),
        *chunk_rows(plan.chunks),
        ("duplicate texts", f"{plan.chunks.duplicate:,}"),
        ("from the cache", f"{plan.texts.from_cache:,} texts"),
        ("to embed", f"{plan.texts.embedded:,} texts, {_tokens_text(plan)}"),
        ("calls", f"{plan.calls:,}"),
        *([("cut off", f"{plan.cut:,} texts, at what the model reads")] if plan.cut else []),
        ("price", cost_text(plan.cost)),
    ]
    if plan.max_usd is not None:
        stops = "a run would stop at it" if plan.cost.usd > plan.max_usd else "enough"
        rows.append(("budget", f"{usd_text(plan.max_usd, plan.cost.usd)}: {stops}"))
    if plan.approve_above_usd is not None:
        needed = "needed" if plan.needs_approval else "not needed"
        free = usd_text(plan.approve_above_usd, plan.cost.usd)
        rows.append(("approval", f"{needed}, up to {free} goes unasked"))
    rows += _lane_rows(plan)
    if plan.free_tokens:
        rows.append(("free tokens", f"{plan.free_tokens:,} an account; what is left is unknown"))
    if plan.bound_by:
        least = f"{span_text(plan.seconds_at_limits)}, bound by {plan.bound_by}"
        if plan.next_tier:
            sooner = plan.seconds_at_next_tier
            least += f"; tier {plan.next_tier} would {'take ' if sooner else ''}"
            least += span_text(sooner) if sooner else "wait for nothing"
        rows.append(("time at limits", least))
    elif plan.limited and plan.calls:
        rows.append(("time at limits", "none to wait: it is within a minute's quota"))
    return rows + skipped_rows(plan.skipped, plan.examples)


def _lane_rows(plan: Plan) -> list[Row]:
    """Both prices, and which of them it will be."""
    rows = list[Row]()
    if plan.lane == "batch":
        rows.append(("in the realtime lane", usd_text(plan.usd_realtime)))
        rows.append(("lane", f"batch, within {span_text(WINDOW_S)}: {plan.lane_why}"))
    elif plan.usd_batch_lane is not None and not plan.waiting:
        rows.append(("in the Batch lane", usd_text(plan.usd_batch_lane)))
    if plan.lane == "realtime" and plan.lane_why:
        rows.append(("lane", f"realtime: {plan.lane_why}"))
    if plan.waiting:
        first = "; what is to embed goes at once when they have come" if _held_back(plan) else ""
        rows.append(("in the Batch lane now", f"{plan.waiting:,} texts{first}"))
    return rows


def _held_back(plan: Plan) -> bool:
    """Whether texts of the realtime lane wait for those of the Batch lane."""
    return plan.lane == "realtime" and plan.texts.embedded > 0


def _tokens_text(plan: Plan) -> str:
    if not plan.tokens_margin:
        return f"{plan.tokens:,} tokens"
    guess = ", a first guess on the high side; bills correct it"
    return f"about {plan.tokens:,} tokens{guess if plan.tokens_margin > GUESS else ''}"


def chunks_of(survey: Survey, counts: dict[str, int], *, quarantined: int) -> Chunks:
    """Counts of chunks for plan and report; quarantined ones are in no other count but `total`."""
    return Chunks(
        total=survey.keyed.table.rows,
        unchanged=survey.compared.unchanged,
        added=counts.get("added", 0),
        changed=counts.get("changed", 0),
        moved=counts.get("moved", 0),
        deleted=counts.get("deleted", 0),
        duplicate=survey.compared.duplicate,
        quarantined=quarantined,
    )


def texts_of(survey: Survey, embedded: int, shared: int = 0) -> Texts:
    """Counts of texts for plan and report; `shared` were paid for by other runs meanwhile."""
    return Texts(
        unique=survey.compared.unique_texts,
        from_cache=survey.looked_up.from_cache + shared,
        embedded=embedded,
    )


def cost_of(
    survey: Survey,
    tokens: int,
    refused: KeySet,
    shared_tokens: int = 0,
    *,
    lane_saves: float = 0.0,
) -> Cost:
    """List price of `tokens` less what the Batch lane saves, and of what need not be embedded.

    Chunks that repeat a text of `refused` save nothing: nobody bills it.
    """
    usd, changes = survey.facts.usd, survey.compared.changes.load(CHANGES)
    unbilled = changes.filter(pa.array(refused.holds(changes.column("text_hash"))))
    saved = Saved(
        unchanged=usd(survey.compared.unchanged_tokens),
        duplicates=usd(survey.compared.duplicate_tokens - repeated_tokens(unbilled)),
        cache=usd(survey.looked_up.cache_tokens + shared_tokens),
        batch_lane=lane_saves,
    )
    without = usd(tokens) + saved.unchanged + saved.duplicates + saved.cache
    return Cost(usd=usd(tokens) - lane_saves, usd_without_reuse=without, saved_usd=saved)
