"""The flows through a real Prefect engine: states, artifacts, retries, what a failure keeps."""

import dataclasses
import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
import urllib.request
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import lancedb
import pandas as pd
import pytest
from prefect import flow
from prefect.settings import PREFECT_API_URL

import flows.reindex
from flows.embedding import FOLDS_AHEAD, embed_all
from flows.plan import plan
from flows.reindex import reindex, run, run_frame
from flows.smoke import smoke
from tasks.artifacts import key
from tasks.cache import Cache
from tasks.claims import Claims
from tasks.errors import (
    AnswerRejected,
    EmbedOnceError,
    IndexHeld,
    ProviderBusy,
    ProviderDenied,
    SettingsError,
)
from tasks.form import Overrides
from tasks.history import history
from tasks.index import generations, held, open_index
from tasks.journal import RunFolder, fold
from tasks.keys import hash_column, text_hash
from tasks.ledger import Ledger
from tasks.limits import Learned, Limits
from tasks.memory import sizes_for
from tasks.notes import Call
from tasks.params import Config, load_config
from tasks.plan import make_plan
from tasks.prepare import PLAIN, Preparation
from tasks.providers import Answer, Space
from tasks.providers.lexical import Lexical
from tasks.summary import figure
from tasks.survey import survey
from tests.waiting import until

pytestmark = pytest.mark.usefixtures("prefect_api")

CONFIG = """\
name: Field notes
source: {kind: files, path: ./corpus}
embedding: {provider: lexical, dimension: 64}
limits: {texts_per_request: 2, concurrency: 2}
index: {uri: ./index, table: notes}
state: {uri: ./state}
"""

TEXTS = {
    "alpha.txt": "alpha apples arrive",
    "beta.txt": "beta bears bathe",
    "gamma.txt": "gamma geese gather",
    "delta.txt": "delta deer doze",
    "copy.txt": "alpha apples arrive",
}


@pytest.fixture
def home(tmp_path: Path) -> Path:
    """A folder with a config and a corpus of five documents, two of them alike."""
    (tmp_path / "notes.yaml").write_text(CONFIG, encoding="utf-8")
    write(tmp_path, **TEXTS)
    return tmp_path


def write(home: Path, **texts: str) -> None:
    """Write documents into the corpus; dots in names are kept."""
    (home / "corpus").mkdir(exist_ok=True)
    for name, text in texts.items():
        (home / "corpus" / name).write_text(text + "\n", encoding="utf-8")


def config_of(home: Path) -> Config:
    return load_config(home / "notes.yaml")


def reindexed(home: Path, overrides: Overrides | None = None) -> Any:
    return run(str(home / "notes.yaml"), overrides or Overrides())


def texts_in_index(home: Path) -> dict[str, str]:
    table = open_index(config_of(home).index)
    assert table is not None
    return {row["document"]: row["text"] for row in table.search().to_list()}


def versions(home: Path) -> int:
    table = open_index(config_of(home).index)
    return 0 if table is None else int(table.version)


def api(path: str, **body: Any) -> Any:
    """What the server answers to a POST."""
    request = urllib.request.Request(  # noqa: S310
        f"{PREFECT_API_URL.value()}/{path}",
        data=json.dumps(body).encode(),
        headers={"content-type": "application/json"},
    )
    with urllib.request.urlopen(request, timeout=30) as answer:  # noqa: S310
        return json.load(answer)


def artifacts_of(run_id: str) -> dict[str, dict[str, Any]]:
    found = api("artifacts/filter", artifacts={"flow_run_id": {"any_": [run_id]}})
    return {artifact["key"]: artifact for artifact in found}


def test_a_run_embeds_each_text_once_however_many_chunks_hold_it(home: Path) -> None:
    report = reindexed(home)
    assert (report.chunks.added, report.texts.embedded, report.calls.ok) == (5, 4, 2)
    assert texts_in_index(home) == TEXTS


def test_a_second_run_embeds_nothing_and_makes_no_version(home: Path) -> None:
    reindexed(home)
    before = versions(home)
    again = reindexed(home)
    assert (again.texts.embedded, again.published, again.state) == (0, "none", "unchanged")
    assert versions(home) == before


def test_a_renamed_document_costs_nothing_and_is_one_generation(home: Path) -> None:
    reindexed(home)
    (home / "corpus" / "beta.txt").rename(home / "corpus" / "renamed.txt")
    report = reindexed(home)
    assert (report.chunks.moved, report.texts.embedded, report.generation) == (1, 0, 2)
    assert "renamed.txt" in texts_in_index(home)


def test_a_lost_state_folder_costs_nothing_as_long_as_the_index_is_there(home: Path) -> None:
    reindexed(home)
    (home / "state").rename(home / "lost")
    (home / "corpus" / "beta.txt").rename(home / "corpus" / "renamed.txt")
    assert reindexed(home).texts.embedded == 0


def test_a_lost_index_is_built_again_from_the_cache(home: Path) -> None:
    reindexed(home)
    (home / "index").rename(home / "lost")
    report = reindexed(home)
    assert (report.texts.from_cache, report.texts.embedded) == (4, 0)
    assert texts_in_index(home) == TEXTS


def test_the_artifacts_of_a_run_show_its_numbers(home: Path) -> None:
    report = reindexed(home)
    artifacts = artifacts_of(report.run_id)
    assert set(artifacts) == {
        "report-field-notes",
        "batches-field-notes",
        "progress-field-notes",
    }
    shown = artifacts["report-field-notes"]["data"]
    assert "| texts embedded | 4 of 4 |" in shown
    assert f"| tokens | {report.tokens.billed:,} billed" in shown
    batches = json.loads(artifacts["batches-field-notes"]["data"])
    assert [row["status"] for row in batches] == ["ok"] * report.calls.ok
    assert sum(row["tokens billed"] for row in batches) == report.tokens.billed
    assert artifacts["progress-field-notes"]["data"] == 100.0
    read_s = report.seconds.read + report.seconds.fingerprint
    assert report.throughput.documents_per_second * read_s == pytest.approx(len(TEXTS))
    text_bytes = sum(map(len, TEXTS.values()))
    assert report.throughput.kilobytes_per_second * read_s == pytest.approx(text_bytes / 1000)
    assert f"| reading | {figure(report.throughput.documents_per_second)} documents/s, " in shown


def test_a_run_is_a_row_of_the_ledger_and_its_calls_too(home: Path) -> None:
    report = reindexed(home)
    reindexed(home)
    frame = history(config_of(home))
    assert list(frame["state"]) == ["completed", "unchanged"]
    assert frame["tokens.billed"].sum() == report.tokens.billed > 0
    calls = Ledger(config_of(home).state.uri).calls()
    assert calls["tokens_billed"].sum() == report.tokens.billed
    assert list(frame["version"].isna()) == [False, True]


def test_each_stage_is_a_task_of_the_flow_run(home: Path) -> None:
    report = reindexed(home)
    wanted = {
        "read and fingerprint",
        "compare",
        "lookup",
        "pack",
        "embed batch 1",
        "embed batch 2",
        "publish",
    }

    def names() -> set[str]:
        found = api("task_runs/filter", flow_runs={"id": {"any_": [report.run_id]}})
        return {task["name"].rsplit("-", 1)[0] for task in found}

    # The server writes task runs down with some delay.
    until(lambda: names() >= wanted, every=0.2)


@pytest.mark.slow
def test_a_run_emits_one_event_with_its_counts(home: Path) -> None:
    report = reindexed(home)
    name = {"event": {"name": ["embedding.batch_generated"]}}
    resource = {"resource": {"id": [f"embed-once.run.{report.run_id}"]}}
    (event,) = until(lambda: api("events/filter", filter={**name, **resource})["events"], every=0.2)
    assert event["payload"]["total_count"] == 4
    assert event["payload"]["api_calls"] == 2
    assert event["payload"]["cache_hits"] == 0
    assert event["payload"]["processing_time_ms"] > 0
    assert event["payload"]["avg_latency_ms"] > 0


def test_a_wrong_config_touches_nothing(home: Path) -> None:
    with pytest.raises(SettingsError, match="Did you mean 'dimension'"):
        reindexed(home, Overrides(settings=["embedding.dimensoin=3"]))
    assert not (home / "index").exists()
    assert not (home / "state").exists()


def test_an_emptied_corpus_does_not_empty_the_index(home: Path) -> None:
    reindexed(home)
    for document in (home / "corpus").iterdir():
        document.unlink()
    with pytest.raises(SettingsError, match=r"index\.max_deleted_fraction=1"):
        reindexed(home)
    assert texts_in_index(home) == TEXTS
    assert history(config_of(home))["state"].iloc[-1] == "failed"


def test_an_emptied_corpus_empties_the_index_when_told_to(home: Path) -> None:
    reindexed(home)
    for document in (home / "corpus").iterdir():
        document.unlink()
    report = reindexed(home, Overrides(settings=["index.max_deleted_fraction=1"]))
    assert (report.chunks.deleted, texts_in_index(home)) == (5, {})
    assert reindexed(home).published == "none"


def test_an_unreadable_document_keeps_its_rows_and_the_run_says_so(home: Path) -> None:
    reindexed(home)
    document = home / "corpus" / "beta.txt"
    document.unlink()
    document.symlink_to(document)  # a link to itself cannot be read, by root neither
    state: Any = reindex(str(home / "notes.yaml"), return_state=True)
    assert state.name == "Incomplete"
    assert texts_in_index(home)["beta.txt"] == TEXTS["beta.txt"]


def test_a_narrowed_run_leaves_all_other_documents_alone(home: Path) -> None:
    reindexed(home)
    (home / "corpus" / "gamma.txt").unlink()
    write(home, **{"beta.txt": "beta boats blow"})
    report = reindexed(home, Overrides(narrow="beta.txt"))
    assert (report.chunks.changed, report.chunks.deleted) == (1, 0)
    assert texts_in_index(home) == {**TEXTS, "beta.txt": "beta boats blow"}


def test_another_run_on_the_same_index_is_refused_by_name(home: Path) -> None:
    with (
        held(config_of(home).index, "the-other-run"),
        pytest.raises(IndexHeld, match="the-other-run"),
    ):
        reindexed(home)


@pytest.mark.slow
def test_another_splitter_version_needs_a_word(home: Path) -> None:
    reindexed(home)
    table = open_index(config_of(home).index)
    assert table is not None
    rows = table.to_arrow()
    metadata = {**rows.schema.metadata, b"embed_once.splitter": b"0/older"}
    lancedb.connect(home / "index").create_table(
        "notes", data=rows.replace_schema_metadata(metadata), mode="overwrite"
    )
    with pytest.raises(SettingsError, match="--accept-splitter"):
        reindexed(home)
    assert reindexed(home, Overrides(accept_splitter=True)).texts.embedded == 0
    assert reindexed(home).published == "none"


def test_a_plan_agrees_with_the_run_that_follows_and_leaves_no_trace(home: Path) -> None:
    planned = plan(str(home / "notes.yaml"))
    assert not (home / "index").exists()
    assert not (home / "state").exists()
    report = reindexed(home)
    assert (planned.calls, planned.tokens) == (report.calls.ok, report.tokens.billed)
    assert planned.chunks == report.chunks
    assert planned.texts == report.texts


@pytest.mark.slow
def test_the_smoke_flow_passes(tmp_path: Path) -> None:
    assert len(smoke()) == 6


def test_a_frame_can_be_indexed_from_python(tmp_path: Path) -> None:
    (tmp_path / "frame.yaml").write_text(
        CONFIG.replace("{kind: files, path: ./corpus}", "{kind: table, path: none, id: key}"),
        encoding="utf-8",
    )
    frame = pd.DataFrame({"key": [1, 2], "text": ["one wolf", "two foxes"], "lang": ["en", "de"]})
    report = run_frame(str(tmp_path / "frame.yaml"), frame)
    assert report.chunks.added == 2
    again = run_frame(str(tmp_path / "frame.yaml"), frame.assign(lang=["en", "fr"]))
    assert (again.chunks.moved, again.texts.embedded) == (1, 0)


TWO_TEXTS = Limits(None, None, 2, None, 2)


@dataclasses.dataclass(frozen=True)
class Scripted:
    """Answers like `lexical`, but first raises what it was given, one error a call.

    The errors wait in files, so that the provider stays a value that pickles.
    """

    folder: Path
    limits: Limits = TWO_TEXTS
    preparation: Preparation = PLAIN
    dimension: int = 64
    unit_vectors: bool = True
    least: Learned = Learned()  # noqa: RUF009

    @property
    def space(self) -> Space:
        return Lexical(64, self.limits).space

    @property
    def estimate(self) -> Lexical:
        return Lexical(64, self.limits)

    def require(self) -> None:
        """Nothing can be missing."""

    def for_queries(self) -> "Scripted":
        return self

    def prepare(self) -> None:
        """Nothing to load."""

    def give_up(self) -> None:
        """Nothing to wait for."""

    def embed(self, texts: Sequence[str]) -> Answer:
        with (self.folder / "asked").open("a") as file:
            file.write("|".join(texts) + "\n")
        for waiting in sorted(self.folder.glob("error-*")):
            try:
                waiting.unlink()
            except FileNotFoundError:
                continue
            raise ERRORS[waiting.name.split("-")[2]]("as scripted")
        return Lexical(64, self.limits).embed(texts)

    @property
    def asked(self) -> list[str]:
        return (self.folder / "asked").read_text().splitlines()


ERRORS = {error.__name__: error for error in (ProviderBusy, AnswerRejected, ProviderDenied)}


def scripted(folder: Path, *errors: type[Exception]) -> Scripted:
    folder.mkdir()
    for number, error in enumerate(errors):
        (folder / f"error-{number}-{error.__name__}").touch()
    return Scripted(folder)


def embedded_with(home: Path, provider: Scripted, folder: RunFolder) -> None:
    """Run the embedding part of the flow, its retries without a delay."""
    config = config_of(home)

    @flow
    def only_embed() -> None:
        with folder.alive():
            found = survey(config, Overrides(), folder.staging)
            found = dataclasses.replace(found, provider=provider)
            embed_all(found, folder)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("tasks.sender.RETRY_S", 0.0)
        only_embed()


def test_a_busy_provider_is_asked_again_and_every_call_is_noted(home: Path) -> None:
    provider = scripted(home / "script", ProviderBusy, AnswerRejected)
    folder = RunFolder(str(home / "state"), "run-1")
    embedded_with(home, provider, folder)
    statuses = sorted(call.status for call in folder.calls())
    assert statuses == ["AnswerRejected", "ProviderBusy", "ok", "ok"]
    assert len(provider.asked) == 4


def test_a_provider_that_denies_is_asked_once_and_never_again(home: Path) -> None:
    provider = scripted(home / "script", ProviderDenied)
    folder = RunFolder(str(home / "state"), "run-1")
    with pytest.raises(EmbedOnceError, match=r"as scripted.*0 texts of 4 are paid for"):
        embedded_with(home, provider, folder)
    assert len(provider.asked) == 1


@dataclasses.dataclass(frozen=True)
class DiskFails(Scripted):
    """While it answers, the disk below the state goes."""

    def embed(self, texts: Sequence[str]) -> Answer:
        state = self.folder.parent / "state"
        if state.exists():
            state.rename(state.with_name("gone"))
        return super().embed(texts)


@pytest.mark.slow
def test_a_disk_that_fails_ends_the_run_and_what_was_in_flight_is_kept(
    home: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    write(home, **{f"n{number}.txt": f"wolf{number} fox{number}" for number in range(20)})
    texts = make_plan(config_of(home), Overrides()).texts.embedded
    (home / "script").mkdir()
    folder = RunFolder(str(home / "state"), "run-1")
    said = rf"{home}/state.*its disk is gone.*kept in {tmp_path}.* 2 texts of {texts} are paid for"
    with pytest.raises(EmbedOnceError, match=said):
        embedded_with(home, DiskFails(home / "script"), folder)
    shutil.rmtree(home / "state", ignore_errors=True)
    (home / "gone").rename(home / "state")
    report = reindexed(home)
    assert (report.recovered_vectors, report.texts.embedded) == (2, texts - 2)


@pytest.mark.slow
def test_a_killed_run_costs_nothing_but_what_was_in_flight(home: Path) -> None:
    texts = {f"n{n}.txt": f"wolf{n} fox{n} bear{n}" for n in range(400)}
    write(home, **texts)
    command = [
        sys.executable, "-m", "flows.cli", "reindex", str(home / "notes.yaml"),
        "--set", "limits.texts_per_request=1",
    ]  # fmt: skip
    process = subprocess.Popen(
        command,
        env=environment(),
        stdout=subprocess.DEVNULL,
        start_new_session=True,
    )
    answers = home / "state" / "runs"
    until(lambda: len(list(answers.glob("*/answers/*.arrow"))) >= 20, 200)
    process.send_signal(signal.SIGKILL)
    process.wait()
    paid = len(list(answers.glob("*/answers/*.arrow")))
    assert 20 <= paid < 404
    report = reindexed(home)
    assert report.recovered_vectors == paid
    assert report.texts.embedded == 404 - paid
    assert texts_in_index(home) == {**TEXTS, **texts}
    calls = Ledger(config_of(home).state.uri).calls()
    assert calls[calls["status"] == "ok"]["texts"].sum() == 404
    runs = history(config_of(home))
    assert list(runs["state"]) == ["died", "completed"]
    assert runs["tokens.billed"].sum() == calls["tokens_billed"].sum()
    assert not list(answers.glob("*"))


def environment() -> dict[str, str]:
    return {**os.environ, "PREFECT_API_URL": str(PREFECT_API_URL.value())}


def test_generations_count_published_states_only(home: Path) -> None:
    reindexed(home)
    reindexed(home)
    write(home, **{"epsilon.txt": "epsilon eels eat"})
    reindexed(home)
    table = open_index(config_of(home).index)
    assert table is not None
    assert [generation.number for generation in generations(table)] == [1, 2]


def test_artifact_keys_are_lower_case_words_and_dashes() -> None:
    assert key("report", "Field notes: 2026/Q1") == "report-field-notes-2026-q1"


def test_folding_twice_is_folding_once(home: Path) -> None:
    reindexed(home)
    cache = Cache(str(home / "state"), Lexical(64, TWO_TEXTS).space)
    folder = RunFolder(str(home / "state"), "none")
    assert (fold(folder, cache), len(cache)) == (0, 4)


@pytest.mark.slow
def test_what_comes_in_while_answers_are_folded_is_folded_together(
    home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    count, vector_bytes, limit = 6000, 4 * 1024, 640
    settings = (
        "embedding.dimension=1024",
        "limits.concurrency=32",
        "limits.texts_per_request=1000",  # as many as there is room for
        f"limits.memory_mb={limit}",
        "source={kind: table, path: frame.arrow}",
    )
    frame = pd.DataFrame(
        {"id": map(str, range(count)), "text": [f"{n} ants" for n in range(count)]}
    )
    folds, remember = list[int](), Cache.remember

    def slowly(cache: Cache, answers: Any) -> int:
        tables = list(answers)
        if tables:
            folds.append(sum(table.num_rows for table in tables))
            time.sleep(4)
        return remember(cache, tables)

    monkeypatch.setattr(Cache, "remember", slowly)
    done = run_frame(str(home / "notes.yaml"), frame, Overrides(settings=list(settings)))
    a_fold, a_call = sizes_for(limit, count).folded / vector_bytes, count / done.calls.ok
    print("folds", folds, "of", a_fold, "calls of", a_call)
    assert sum(folds) == done.texts.embedded == count
    assert len(folds) < 0.7 * count / a_fold
    assert max(folds) <= FOLDS_AHEAD * a_fold + a_call


def test_what_another_living_run_has_paid_for_is_not_paid_for_again(home: Path) -> None:
    provider = Lexical(64, TWO_TEXTS)
    other = RunFolder(str(home / "state"), "other")
    with other.alive():
        texts = ["alpha apples arrive"]
        call = Call("other", 1, 1, 1, "first", "ok", "2026-01-01", 0.0, 0.1, 1, 5, 5, 0.0, "")
        hashes = hash_column([text_hash(text) for text in texts])
        other.write_answer(hashes, provider.embed(texts).vectors, provider.space, call)
        report = reindexed(home)
    assert (report.texts.from_cache, report.texts.embedded) == (1, 3)
    assert texts_in_index(home) == TEXTS


def test_what_another_run_pays_for_meanwhile_counts_as_from_the_cache(home: Path) -> None:
    provider, state = Lexical(64, TWO_TEXTS), str(home / "state")
    texts = ["delta deer doze", "gamma geese gather"]  # of the second batch
    hashes = hash_column([text_hash(text) for text in texts])
    call = Call("other", 1, 1, 1, "first", "ok", "2026-01-01", 0.0, 0.1, 2, 5, 5, 0.0, "")
    other = RunFolder(state, "other")

    def pay() -> None:
        """Once the run has embedded the first."""
        while not list((home / "state" / "runs").glob("*/answers/*.arrow")):
            time.sleep(0.01)
        other.write_answer(hashes, provider.embed(texts).vectors, provider.space, call)
        claims.release(1)

    with other.alive():
        claims = Claims(other, Cache(state, provider.space))
        claims.claim(1, hashes)
        paying = threading.Thread(target=pay)
        paying.start()
        report = reindexed(home)
        paying.join()
    assert (report.texts.from_cache, report.texts.embedded) == (2, 2)
    assert (report.calls.ok, report.tokens.billed > 0) == (1, True)
    assert texts_in_index(home) == TEXTS


@dataclasses.dataclass(frozen=True)
class Crowded(Scripted):
    """Counts how many calls it has in flight."""

    def embed(self, texts: Sequence[str]) -> Answer:
        mark = self.folder / f"in-flight-{threading.get_ident()}"
        mark.touch()
        with (self.folder / "most").open("a") as file:
            file.write(f"{len(list(self.folder.glob('in-flight-*')))}\n")
        time.sleep(0.05)
        mark.unlink()
        return Lexical(64, self.limits).embed(texts)


def test_no_more_calls_are_in_flight_than_the_limit_says(home: Path) -> None:
    write(home, **{f"n{n}.txt": f"wolf{n} fox{n} bear{n}" for n in range(20)})
    provider = Crowded(home / "script")
    provider.folder.mkdir()
    embedded_with(home, provider, RunFolder(str(home / "state"), "run-1"))
    seen = [int(line) for line in (provider.folder / "most").read_text().splitlines()]
    assert (len(seen), max(seen)) == (12, 2)


@pytest.mark.slow
def test_a_link_that_breaks_does_not_turn_into_a_deletion(home: Path) -> None:
    (home / "elsewhere").mkdir()
    (home / "elsewhere" / "eel.txt").write_text("eels evade everyone\n")
    (home / "corpus" / "eel.txt").symlink_to(home / "elsewhere" / "eel.txt")
    reindexed(home)
    (home / "elsewhere").rename(home / "away")
    report = reindexed(home)
    assert (report.state, report.held, report.chunks.deleted) == ("incomplete", 1, 0)
    assert "eel.txt" in texts_in_index(home)


def test_a_folder_of_files_may_not_become_a_table_unnoticed(home: Path) -> None:
    reindexed(home)
    pd.DataFrame({"id": ["1"], "text": ["one"]}).to_parquet(home / "t.parquet")
    settings = ["source={kind: table, path: t.parquet}", "index.max_deleted_fraction=1"]
    with pytest.raises(SettingsError, match="this config cuts by none"):
        reindexed(home, Overrides(settings=settings))


def test_a_run_is_in_the_ledger_before_it_tidies(home: Path, monkeypatch: Any) -> None:
    class Killed(BaseException):
        """What the system does to a process: nothing after it runs."""

    def killed(*_: object) -> None:
        raise Killed

    monkeypatch.setattr(flows.reindex, "tidy_published", killed)
    with pytest.raises(Killed):
        reindexed(home)
    (told,) = history(config_of(home)).to_dict("records")
    assert (told["state"], told["generation"]) == ("completed", 1)
