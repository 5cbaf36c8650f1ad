"""A run that costs more than it may unasked: who is asked, and what an answer allows."""

import json
import os
import pty
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from flows.reindex import reindex, run
from tasks.approval import ceiling_usd
from tasks.errors import NotApproved
from tasks.form import Overrides
from tasks.history import history
from tasks.index import is_held
from tasks.params import load_config
from tasks.plan import Plan, make_plan, plan_rows
from tasks.simulator import Simulator

CONFIG = """\
name: birds
source: {{kind: table, path: birds.jsonl}}
embedding: {{provider: voyage, model: voyage-4, dimension: 256, base_url: {url}}}
budget: {{approve_above_usd: 0.00001}}
index: {{uri: ./index, table: birds}}
state: {{uri: ./state}}
"""
TEXTS = 40
Typed = Callable[[Sequence[str]], tuple[int, str]]


@pytest.fixture
def simulator(monkeypatch: pytest.MonkeyPatch) -> Iterator[Simulator]:
    monkeypatch.setenv("VOYAGE_API_KEY", "pa-any")
    with Simulator() as started:
        yield started


@pytest.fixture
def config(tmp_path: Path, simulator: Simulator) -> Path:
    rows = [{"id": str(at), "text": f"bird {at} sings " * 5} for at in range(TEXTS)]
    (tmp_path / "birds.jsonl").write_text("\n".join(map(json.dumps, rows)), encoding="utf-8")
    (tmp_path / "birds.yaml").write_text(CONFIG.format(url=simulator.base_url), encoding="utf-8")
    return tmp_path / "birds.yaml"


def planned(config: Path, *settings: str) -> Plan:
    return make_plan(load_config(config, settings), Overrides())


@pytest.mark.parametrize(
    ("settings", "needed"),
    [
        ([], True),
        (["budget.approve_above_usd=null"], False),
        (["budget.approve_above_usd=0"], True),
        (["budget.approve_above_usd=1"], False),
        (["budget.max_usd=0.000001"], False),  # it would stop before
        (["embedding={provider: lexical}", "budget.approve_above_usd=0"], False),
    ],
)
def test_approval_is_needed_for_what_a_run_may_cost(
    config: Path, settings: list[str], needed: bool
) -> None:
    found = planned(config, *settings)
    assert found.needs_approval == needed
    said = dict(plan_rows(found)).get("approval", "not needed")
    assert said.startswith("needed" if needed else "not needed")


@given(usd=st.floats(1e-9, 1e6), most=st.none() | st.floats(1e-9, 1e6))
def test_what_is_approved_covers_the_plan_and_hardly_more(usd: float, most: float | None) -> None:
    allowed = ceiling_usd(usd, most)
    if most is not None and allowed == most:
        assert most <= usd * 1.22
    else:
        assert usd * 1.1 * (1 - 1e-9) <= allowed <= usd * 1.1 * 1.1 * (1 + 1e-9)
        assert float(f"{allowed:.1e}") == allowed
        assert most is None or allowed <= most


@pytest.mark.usefixtures("prefect_api")
def test_a_flow_that_nobody_watches_ends_unapproved_and_spends_nothing(
    config: Path, simulator: Simulator
) -> None:
    state: Any = reindex(str(config), Overrides(), return_state=True)
    assert (state.name, state.type.value) == ("NotApproved", "CANCELLED")
    assert "budget.approve_above_usd allows unasked" in state.message
    loaded = load_config(config)
    assert simulator.ledger.totals()["calls"] == 0
    assert not is_held(loaded.index)
    assert not list((config.parent / "state" / "runs").glob("*"))
    assert history(loaded)["state"].tolist() == ["not approved"]
    with pytest.raises(NotApproved, match="Nothing was spent") as caught:
        run(str(config))
    assert caught.value.facts["plan"].texts.embedded == TEXTS
    done = run(str(config), Overrides(settings=["budget.approve_above_usd=null"]))
    assert done.texts.embedded == TEXTS
    # What is known already costs nothing and needs nobody.
    assert run(str(config)).published == "none"


def embed_once(*arguments: str, cwd: Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "flows.cli", *arguments],
        cwd=cwd, check=False, capture_output=True, text=True, timeout=150,
        stdin=subprocess.DEVNULL,
    )  # fmt: skip


def test_a_command_without_a_terminal_prints_the_plan_and_spends_nothing(
    config: Path, simulator: Simulator
) -> None:
    done = embed_once("reindex", "birds.yaml", cwd=config.parent)
    assert done.returncode == 4
    assert done.stdout.startswith("Plan for birds\n")
    assert "40 texts" in done.stdout
    assert done.stderr.startswith("embed-once: This run would cost about $0.0000")
    assert "Run with --yes to approve it. Nothing was spent." in done.stderr
    assert simulator.ledger.totals()["calls"] == 0
    assert not (config.parent / "state").exists()


@pytest.fixture
def with_server(prefect_api: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Commands use a server that runs."""
    monkeypatch.setenv("PREFECT_API_URL", prefect_api)


@pytest.mark.slow
@pytest.mark.usefixtures("with_server")
def test_yes_approves_on_the_command_line(config: Path, simulator: Simulator) -> None:
    done = embed_once("reindex", "birds.yaml", "--yes", cwd=config.parent)
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("birds: generation 1 published")
    assert simulator.ledger.totals()["distinct_texts"] == TEXTS


@pytest.mark.slow
@pytest.mark.usefixtures("with_server")
def test_a_run_that_ends_early_reports_what_it_spent(config: Path) -> None:
    (config.parent / "run.json").write_text('{"state": "completed"}')
    little = ["--yes", "--set", "budget.max_usd=0.000005", "--set", "limits.texts_per_request=5"]
    done = embed_once("reindex", "birds.yaml", *little, "--report", "run.json", cwd=config.parent)
    assert done.returncode == 4, done.stderr
    told = json.loads((config.parent / "run.json").read_text())
    assert told["state"] == "over budget"
    assert 0 < told["cost"]["usd"] <= 0.000005


@pytest.fixture
def typed(python: list[str], config: Path) -> Typed:
    """What the command ends with and shows on a terminal where such answers are typed."""
    return lambda answers: _typed(python, answers, config.parent)


def _typed(python: list[str], answers: Sequence[str], cwd: Path) -> tuple[int, str]:
    process, terminal = pty.fork()
    if not process:
        os.chdir(cwd)
        command = [*python, "-m", "flows.cli", "reindex", "birds.yaml"]
        os.execv(command[0], command)  # noqa: S606 - there is none to quote for
    shown, left = b"", list(answers)
    while True:
        try:
            shown += os.read(terminal, 4096)
        except OSError:  # it has ended
            break
        if shown.endswith(b"US dollars] ") and left:
            os.write(terminal, left.pop(0).encode())
            shown += b"\n"
    _, status = os.waitpid(process, 0)
    return os.waitstatus_to_exitcode(status), shown.decode(errors="replace")


@pytest.mark.parametrize(
    ("answers", "code", "said"),
    [
        pytest.param(["\n"], 4, "It was not approved.", marks=pytest.mark.slow),
        pytest.param(["\x04"], 4, "It was not approved.", marks=pytest.mark.slow),
        (["perhaps\n", "-1\n", "no\n"], 4, "'-1' is neither y, n nor a price."),
        pytest.param(["\x03"], 130, "cancelled", marks=pytest.mark.slow),
    ],
)
def test_on_a_terminal_a_person_is_asked(
    simulator: Simulator, typed: Typed, answers: list[str], code: int, said: str
) -> None:
    ended, shown = typed(answers)
    assert ended == code, shown
    assert "Plan for birds" in shown
    assert said in shown
    assert simulator.ledger.totals()["calls"] == 0


@pytest.mark.slow
@pytest.mark.parametrize(
    ("answers", "code"), [(["-1\n", "y\n"], 0), (["0.000005\n"], 4), (["$1\n"], 0)]
)
@pytest.mark.usefixtures("with_server")
def test_what_a_person_approves_is_the_most_it_costs(
    simulator: Simulator, typed: Typed, answers: list[str], code: int
) -> None:
    ended, shown = typed(answers)
    assert ended == code, shown
    totals = simulator.ledger.totals()
    assert totals["calls"] > 0
    assert code == 0 or totals["usd"] <= 0.000005
