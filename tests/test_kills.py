"""A run that is killed at any moment breaks no promise: `benchmarks/kills.py`, at a few moments."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

pytestmark = [pytest.mark.slow, pytest.mark.timeout(1200)]

SWEEP = Path(__file__).parent / "benchmarks" / "kills.py"
CONCURRENCY, TEXTS_PER_REQUEST = 4, 5


@pytest.fixture(scope="module")
def moments(tmp_path_factory: pytest.TempPathFactory, prefect_api: str) -> list[dict[str, Any]]:
    """Eight moments that aim at every phase, and what became of each."""
    file = tmp_path_factory.mktemp("kills") / "moments.json"
    swept = subprocess.run(
        [sys.executable, str(SWEEP), "--moments", "8", "--seed", "1", "--json", str(file)],
        env={**os.environ, "PREFECT_API_URL": prefect_api},
        check=False,
        capture_output=True,
        text=True,
    )
    assert file.exists(), swept.stdout + swept.stderr
    found: list[dict[str, Any]] = json.loads(file.read_text(encoding="utf-8"))
    return found


def test_a_kill_at_any_moment_breaks_no_promise(moments: list[dict[str, Any]]) -> None:
    assert len(moments) == 8
    assert {moment["scene"]: moment["broken"] for moment in moments if moment["broken"]} == {}


def test_a_kill_costs_no_more_than_what_was_in_flight(moments: list[dict[str, Any]]) -> None:
    kills = [kill for moment in moments for kill in moment["kills"]]
    for kill in kills:
        assert kill["in_flight"] <= CONCURRENCY
        assert kill["again"] <= (kill["in_flight"] + kill["unwritten"]) * TEXTS_PER_REQUEST
    hits = [kill["hit"] for kill in kills]
    assert "embed" in hits
    assert hits.count("ended") < len(hits) / 3


def test_a_reader_sees_whole_generations_alone(moments: list[dict[str, Any]]) -> None:
    assert min(moment["reads"] for moment in moments) > 10
    assert sum(moment["mixed"] for moment in moments) == 0
