"""Smoke: the whole path on a small built-in corpus, for CI. No key, no network."""

import tempfile
from pathlib import Path

from prefect import flow

from flows.reindex import run
from tasks.errors import EmbedOnceError
from tasks.index import open_index
from tasks.params import load_config
from tasks.smoke import CONFIG, DOCUMENTS, expected_rows, write_corpus


@flow(name="smoke", persist_result=False)
def smoke() -> list[str]:
    """Prove that add, change, move and delete come out right, and that a rerun is free.

    Returns:
        What was proven, a sentence each.

    Raises:
        EmbedOnceError: Something came out otherwise; the message says what.
    """
    proven = []
    with tempfile.TemporaryDirectory(prefix="embed-once-smoke-") as folder:
        home = Path(folder)
        (home / "smoke.yaml").write_text(CONFIG, encoding="utf-8")
        for step in DOCUMENTS:
            write_corpus(home / "corpus", step.documents)
            report = run(str(home / "smoke.yaml"))
            _require(step.name, "counts", step.counts(report), step.expected)
            _require(step.name, "index", _rows(home / "smoke.yaml"), expected_rows(step.documents))
            proven.append(step.name)
    return proven


def _rows(config: Path) -> set[tuple[str, str]]:
    """Document and text of each row that a reader of the index sees."""
    table = open_index(load_config(config).index)
    if table is None:
        return set()
    rows = table.search().select(["document", "text"]).to_list()
    return {(row["document"], row["text"]) for row in rows}


def _require(step: str, what: str, found: object, expected: object) -> None:
    if found != expected:
        raise EmbedOnceError(f"smoke: {step}: {what} came out as {found}, expected {expected}.")
