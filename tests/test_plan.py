"""The plan: what it tells of time and money."""

import json
from pathlib import Path

import pytest

from tasks.budget import usd_text
from tasks.params import Overrides, load_config
from tasks.plan import Plan, make_plan, plan_rows
from tasks.summary import span_text

CONFIG = """\
name: birds
source: {kind: table, path: birds.jsonl}
embedding: {provider: voyage, model: voyage-4, dimension: 256}
index: {uri: ./index, table: birds}
state: {uri: ./state}
"""


@pytest.fixture
def config(tmp_path: Path) -> Path:
    rows = [{"id": str(at), "text": f"bird {at} " + "sings a song " * 20} for at in range(2000)]
    (tmp_path / "birds.jsonl").write_text("\n".join(map(json.dumps, rows)), encoding="utf-8")
    (tmp_path / "birds.yaml").write_text(CONFIG, encoding="utf-8")
    return tmp_path / "birds.yaml"


def planned(config: Path, *settings: str) -> Plan:
    return make_plan(load_config(config, settings), Overrides())


def test_it_says_what_binds_and_what_the_next_tier_would_take(config: Path) -> None:
    free = planned(config, "limits.tier=free")
    assert (free.bound_by, free.next_tier) == ("tokens per minute", 1)
    assert free.seconds_at_limits == pytest.approx(60 * free.tokens / 10_000)
    assert free.seconds_at_next_tier < free.seconds_at_limits / 100
    said = dict(plan_rows(free))["time at limits"]
    assert said.endswith(
        f"min, bound by tokens per minute; tier 1 would take {span_text(free.seconds_at_next_tier)}"
    )
    first = planned(config)
    assert first.next_tier == 2
    assert first.seconds_at_next_tier == pytest.approx(first.seconds_at_limits / 2)


@pytest.mark.parametrize(
    "settings",
    [
        ["limits.tier=3"],
        ["limits.tokens_per_minute=5000", "limits.requests_per_minute=10"],
        ["embedding={provider: lexical, dimension: 256}"],
    ],
)
def test_no_tier_is_named_that_would_be_no_faster(config: Path, settings: list[str]) -> None:
    found = planned(config, *settings)
    assert found.next_tier == 0
    assert "tier" not in dict(plan_rows(found)).get("time at limits", "")


def test_it_says_whether_the_budget_is_enough(config: Path) -> None:
    assert "budget" not in dict(plan_rows(planned(config)))
    usd = planned(config).cost.usd
    for most, said in ((usd * 1.01, "enough"), (usd * 0.99, "a run would stop at it")):
        rows = dict(plan_rows(planned(config, f"budget.max_usd={most:.9f}")))
        assert rows["budget"] == f"{usd_text(most)}: {said}"


@pytest.mark.parametrize(
    ("seconds", "said"),
    [
        (0.0004, "under 1 ms"), (0.04, "40 ms"), (0.1, "0.1 s"), (89.9, "89.9 s"),
        (90, "2 min"), (2580, "43 min"), (5369, "89 min"),
        (5400, "1 h 30 min"), (7500, "2 h 5 min"),
    ],
)  # fmt: skip
def test_a_span_of_time_is_said_as_people_do(seconds: float, said: str) -> None:
    assert span_text(seconds) == said
