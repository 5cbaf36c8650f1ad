"""Verify as a Prefect flow: its state, its artifact, and what is published inside it."""

import json
import urllib.request
from collections.abc import Callable
from pathlib import Path
from typing import Any

import lancedb
import pytest
from prefect.settings import PREFECT_API_URL

from flows.verify import verify
from tasks.findings import Verified
from tasks.params import load_config

CONFIG = """\
name: Field notes
source: {kind: files, path: ./corpus}
embedding: {provider: lexical, dimension: 64}
index: {uri: ./index, table: notes}
state: {uri: ./state}
"""


@pytest.mark.usefixtures("prefect_api")
def test_the_flow_tells_by_its_state_and_artifact_what_it_found_and_mends_on_request(
    tmp_path: Path, reindex: Callable[..., Any]
) -> None:
    file = tmp_path / "notes.yaml"
    file.write_text(CONFIG, encoding="utf-8")
    (tmp_path / "corpus").mkdir()
    for text in ("alpha apples arrive", "beta bears bathe"):
        (tmp_path / "corpus" / f"{text[:4]}.txt").write_text(text, encoding="utf-8")
    reindex(load_config(file))
    table = lancedb.connect(str(tmp_path / "index")).open_table("notes")
    table.add(table.to_arrow().slice(0, 1))
    found: Any = verify(str(file), return_state=True)
    assert (found.name, found.is_completed()) == ("Found", True)
    assert found.message == "Field notes: not everything is as it should be, found: 1."
    assert "rows that repeat an id: 1" in newest_artifact()
    mended = verify(str(file), repair=True)
    assert isinstance(mended, Verified)
    assert mended.clean
    assert "1 rows taken out" in newest_artifact()


def newest_artifact() -> str:
    request = urllib.request.Request(  # noqa: S310
        f"{PREFECT_API_URL.value()}/artifacts/latest/filter",
        data=json.dumps({"artifacts": {"key": {"any_": ["verify-field-notes"]}}}).encode(),
        headers={"content-type": "application/json"},
    )
    with urllib.request.urlopen(request, timeout=30) as answer:  # noqa: S310
        return str(json.load(answer)[0]["data"])
