"""The wheel stands alone: installed elsewhere, it plans with the prices it carries."""

import json
import os
import subprocess
from pathlib import Path

import pytest

pytestmark = [pytest.mark.slow, pytest.mark.timeout(600)]

PROJECT = Path(__file__).parents[1]
CONFIG = """\
name: away
source: {kind: files, path: ./texts}
embedding: {provider: voyage, model: voyage-code-4}
index: {uri: ./index, table: away}
state: {uri: ./state}
"""


def test_an_installed_wheel_plans_a_price(tmp_path: Path) -> None:
    env = {name: value for name, value in os.environ.items() if name != "VIRTUAL_ENV"}
    away = tmp_path / "away"

    def do(*command: str | Path) -> None:
        subprocess.run(command, cwd=tmp_path, check=True, env=env)

    do("uv", "build", "--quiet", "--wheel", "--out-dir", tmp_path / "dist", PROJECT)
    (wheel,) = (tmp_path / "dist").glob("*.whl")
    do("uv", "venv", "--quiet", "--python", "3", away)
    pins = tmp_path / "pins.txt"
    exported = subprocess.run(
        ["uv", "export", "--quiet", "--no-hashes", "--no-emit-project", "--no-dev"],
        cwd=PROJECT, check=True, capture_output=True, text=True, env=env,
    ).stdout  # fmt: skip
    pins.write_text(exported, encoding="utf-8")
    do("uv", "pip", "install", "--quiet", "--python", away / "bin" / "python", "-c", pins, wheel)

    (tmp_path / "texts").mkdir()
    (tmp_path / "texts" / "one.md").write_text("# One\n\nOne text to be priced.\n")
    (tmp_path / "away.yaml").write_text(CONFIG, encoding="utf-8")
    do(away / "bin" / "embed-once", "plan", "away.yaml", "--json", "plan.json")
    plan = json.loads((tmp_path / "plan.json").read_text(encoding="utf-8"))
    assert plan["chunks"]["added"] == 1
    assert plan["cost"]["usd"] == pytest.approx(plan["tokens"] * 0.12 / 1e6)
