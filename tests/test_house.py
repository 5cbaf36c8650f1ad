"""The house keeps its rules: rooms, forms, and no file in the way of another."""

import importlib.util
import subprocess
import sys
from importlib.metadata import packages_distributions
from pathlib import Path

import pytest
from prefect import Flow
from prefect.utilities.callables import parameter_schema

from flows.maintain import maintain
from flows.plan import plan
from flows.reindex import reindex
from flows.smoke import smoke
from flows.verify import verify

PROJECT = Path(__file__).parents[1]
TOP = {
    "CHANGELOG.md",
    "LICENSE",
    "README.md",
    "configs",
    "flows",
    "prefect.yaml",
    "pyproject.toml",
    "tasks",
    "tests",
}
LONGEST = 400


def committed() -> list[Path]:
    listed = subprocess.run(
        ["git", "ls-files"], cwd=PROJECT, check=True, capture_output=True, text=True
    )
    return [Path(line) for line in listed.stdout.splitlines()]


def test_the_top_level_holds_what_it_should_and_nothing_else() -> None:
    top = {path.parts[0] for path in committed()}
    assert {name for name in top if not name.startswith(".")} == TOP


def test_no_module_is_longer_than_one_thing_needs() -> None:
    modules = [path for path in committed() if path.parts[0] in {"flows", "tasks"}]
    lines = {
        str(path): len((PROJECT / path).read_text(encoding="utf-8").splitlines())
        for path in modules
        if path.suffix == ".py"
    }
    assert {path: count for path, count in lines.items() if count > LONGEST} == {}


def test_no_file_in_flows_hides_an_importable_module() -> None:
    """Prefect puts flows/ first on the path when it loads a flow from its file."""
    importable = set(packages_distributions()) | set(sys.stdlib_module_names)
    names = {path.stem for path in (PROJECT / "flows").glob("*.py")} - {"__init__"}
    assert names & importable == set()


@pytest.mark.parametrize("flow", [reindex, plan, verify, maintain], ids=lambda flow: str(flow.name))
def test_every_field_of_a_form_is_described(flow: Flow[..., object]) -> None:
    schema = parameter_schema(flow)
    fields = dict(schema.properties)
    for definition in schema.definitions.values():
        fields |= definition["properties"]
    assert "config" in fields
    assert [name for name, field in fields.items() if not field.get("description")] == []


def test_a_flow_is_named_like_its_file() -> None:
    for flow in (reindex, plan, smoke, verify, maintain):
        assert flow.fn.__module__ == f"flows.{flow.name}"


@pytest.mark.slow
def test_planning_does_not_import_prefect() -> None:
    code = "import sys, tasks.plan, tasks.repair, tasks.search, tasks.history; "
    code += "sys.exit('prefect' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_tasks_is_a_package_of_ours() -> None:
    spec = importlib.util.find_spec("tasks")
    assert spec is not None
    assert spec.origin == str(PROJECT / "tasks" / "__init__.py")
