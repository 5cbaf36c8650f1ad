"""The plan: what it tells of time and money."""

import json
from pathlib import Path

import pytest

from tasks.budget import usd_text
from tasks.form import Overrides
from tasks.params import load_config
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
    assert free.seconds_at_limits == 61 * (free.calls - 1)
    assert free.seconds_at_next_tier == 0
    said = dict(plan_rows(free))["time at limits"]
    assert said.endswith("min, bound by tokens per minute; tier 1 would wait for nothing")
    slow = planned(config, "limits.requests_per_minute=10", "limits.texts_per_request=1")
    assert (slow.bound_by, slow.next_tier) == ("requests per minute", 0)


@pytest.mark.slow
def test_a_tier_with_twice_the_quota_takes_half_the_time(tmp_path: Path, config: Path) -> None:
    rows = [{"id": str(at), "text": f"{at} " + "sings " * 4000} for at in range(6000)]
    (tmp_path / "birds.jsonl").write_text("\n".join(map(json.dumps, rows)), encoding="utf-8")
    first = planned(config)
    assert (first.bound_by, first.next_tier) == ("tokens per minute", 2)
    assert first.seconds_at_next_tier == pytest.approx(first.seconds_at_limits / 2, rel=0.1)
    assert dict(plan_rows(first))["time at limits"].endswith(
        f"bound by tokens per minute; tier 2 would take {span_text(first.seconds_at_next_tier)}"
    )


def test_a_run_within_a_minutes_quota_waits_for_nothing(config: Path) -> None:
    said = dict(plan_rows(planned(config)))["time at limits"]
    assert said == "none to wait: it is within a minute's quota"


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
        assert rows["budget"] == f"{usd_text(most, usd)}: {said}"
        assert rows["budget"].split(":")[0] != usd_text(usd, most)


@pytest.mark.parametrize(
    ("seconds", "said"),
    [
        (0.0004, "under 1 ms"), (0.04, "40 ms"), (0.1, "0.1 s"), (89.9, "89.9 s"),
        (90, "1 min 30 s"), (239.8, "4 min"), (599.6, "10 min"), (2580, "43 min"), (5369, "89 min"),
        (5400, "1 h 30 min"), (7500, "2 h 5 min"), (86_400, "24 h"),
    ],
)  # fmt: skip
def test_a_span_of_time_is_said_as_people_do(seconds: float, said: str) -> None:
    assert span_text(seconds) == said
