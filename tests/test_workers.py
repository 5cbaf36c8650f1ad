"""Workers of Dask that are not there: said before anything is sent."""

import sys
from pathlib import Path
from typing import Any

import pytest

import tasks.workers
from tasks.errors import SettingsError
from tasks.form import Overrides
from tasks.limits import Limits
from tasks.params import Config
from tasks.providers.lexical import Lexical
from tasks.survey import require_runnable
from tasks.workers import on_workers, workers_of


def config_in(folder: Path, **runner: Any) -> Config:
    (folder / "c.jsonl").write_text('{"id": "1", "text": "a wolf"}')
    return Config.model_validate(
        {
            "name": "wolves",
            "source": {"kind": "table", "path": str(folder / "c.jsonl")},
            "embedding": {"provider": "lexical", "dimension": 64},
            "index": {"uri": str(folder / "index"), "table": "t"},
            "state": {"uri": str(folder / "state")},
            "runner": {"kind": "dask", **runner},
        }
    )


def test_dask_that_is_not_installed_is_missed_at_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "distributed", None)
    with pytest.raises(SettingsError, match=r"runner\.kind: dask needs .*embed-once\[dask\]"):
        require_runnable(config_in(tmp_path, processes=2), Overrides())


@pytest.mark.parametrize("address", ["tcp://127.0.0.1:1", "tcp://127.0.0.1:99999", "tls://h:1"])
def test_a_scheduler_that_does_not_answer_is_named(
    tmp_path: Path, lexical: Lexical, monkeypatch: pytest.MonkeyPatch, address: str
) -> None:
    monkeypatch.setattr(tasks.workers, "ANSWER_S", 0.5)
    config = config_in(tmp_path, address=address)
    with (
        pytest.raises(SettingsError, match=f"runner: no workers of Dask at {address}"),
        workers_of(config, lexical, needed=True),
    ):
        pass


def test_who_has_nothing_to_send_needs_no_workers(tmp_path: Path, lexical: Lexical) -> None:
    config = config_in(tmp_path, address="tcp://127.0.0.1:1")
    with workers_of(config, lexical, needed=False) as provider:
        assert provider is lexical


def test_workers_together_make_as_many_calls_at_once_as_the_config_allows(tmp_path: Path) -> None:
    config = config_in(tmp_path, processes=2)
    one_by_one = Lexical(64, Limits(None, None, 10, None, concurrency=1))
    assert on_workers(config, one_by_one).limits.concurrency == config.limits.concurrency == 8
