"""The reference table of the README is complete, and what it names exists."""

import re
from pathlib import Path

import pytest

PROJECT = Path(__file__).parents[1]
README = (PROJECT / "README.md").read_text(encoding="utf-8")
LAST = {"U": 7, "S0": 15, "S1": 15, "S2": 9, "S3": 16, "S4": 17}
"""How many capabilities each group has."""

ROW = re.compile(
    r"^\| (?P<id>\w+-\d+) \| (?P<what>[^|]+) \| (?P<where>[^|]+) \| (?P<shown>[^|]+) \|$",
    re.MULTILINE,
)
ROWS = {row["id"]: row for row in ROW.finditer(README)}


def test_every_capability_has_its_row() -> None:
    wanted = [f"{group}-{number}" for group in LAST for number in range(1, LAST[group] + 1)]
    assert list(ROWS) == wanted
    assert all(len(row["what"]) > 3 for row in ROWS.values())


@pytest.mark.parametrize("id_", ROWS)
def test_what_shows_a_capability_exists(id_: str) -> None:
    named = re.findall(r"`([^`]+)`", ROWS[id_]["shown"])
    assert named
    for each in named:
        file, _, test = each.partition("::")
        path = PROJECT / (file if "/" in file else f"tests/{file}")
        assert path.is_file(), each
        if test:
            assert f"\ndef {test}(" in path.read_text(encoding="utf-8"), each


@pytest.mark.parametrize("id_", ROWS)
def test_where_a_capability_lives_exists(id_: str) -> None:
    where = ROWS[id_]["where"]
    for file, name in re.findall(r"`([\w/.]+/[\w.]*)`(?:: `(\w+)`)?", where):
        path = PROJECT / file
        assert path.exists(), file
        if name:
            assert re.search(rf"(def|class) {name}\b", path.read_text(encoding="utf-8")), name
