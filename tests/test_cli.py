"""The command, as a user meets it: a process with stdout, stderr and an exit code."""

import gc
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
import urllib.request
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from flows.cli import main
from tasks.history import history
from tasks.index import held
from tasks.params import load_config
from tasks.simulator import Latency, Settings, Simulator

CONFIG = """\
name: birds
source: {kind: files, path: ./corpus}
embedding: {provider: lexical, dimension: 128}
index: {uri: ./index, table: birds}
state: {uri: ./state}
"""

BIRDS = {
    "owl.md": "# Owls\n\nOwls hunt mice at night and turn their heads.\n",
    "duck.md": "# Ducks\n\nDucks swim on ponds and dive for weeds.\n",
    "code.py": "def migrate(storks):\n    return [stork.fly('south') for stork in storks]\n",
}


@pytest.fixture(scope="module")
def home(
    tmp_path_factory: pytest.TempPathFactory, prefect_api: str, patched: pytest.MonkeyPatch
) -> Path:
    """A corpus that was indexed once by the command, with its report."""
    patched.setenv("PREFECT_API_URL", prefect_api)
    folder = tmp_path_factory.mktemp("birds")
    (folder / "corpus").mkdir()
    for name, text in BIRDS.items():
        (folder / "corpus" / name).write_text(text, encoding="utf-8")
    (folder / "birds.yaml").write_text(CONFIG, encoding="utf-8")
    first = embed_once("reindex", "birds.yaml", "--report", "first.json", cwd=folder)
    assert first.returncode == 0, first.stderr
    (folder / "first.txt").write_text(first.stdout, encoding="utf-8")
    (folder / "first.err").write_text(first.stderr, encoding="utf-8")
    return folder


@pytest.fixture(scope="module")
def patched() -> Iterator[pytest.MonkeyPatch]:
    """Changes to the environment that last as long as this file's tests."""
    with pytest.MonkeyPatch.context() as patch:
        yield patch


VOYAGE = [
    "--set", "embedding={provider: voyage, model: voyage-4, dimension: 256}",
    "--set", "index.table=voyage",
]  # fmt: skip


def embed_once(*arguments: str, cwd: Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "flows.cli", *arguments],
        cwd=cwd,
        check=False,
        capture_output=True,
        text=True,
        env={**os.environ, "COLUMNS": "100"},
        timeout=150,
    )


def test_a_run_prints_a_summary_and_is_otherwise_quiet_in_a_pipe(home: Path) -> None:
    printed = (home / "first.txt").read_text(encoding="utf-8")
    assert printed.startswith("birds: generation 1 published, 3 chunks written")
    assert re.search(r"texts embedded +3 of 3", printed)
    assert (home / "first.err").read_text(encoding="utf-8") == ""


@pytest.mark.slow
def test_a_run_does_not_load_what_it_never_uses(home: Path) -> None:
    code = "import sys; from flows.cli import app\n"
    code += "app(['reindex', 'birds.yaml'], standalone_mode=False)\n"
    code += "sys.exit('pandas' in sys.modules)"
    done = subprocess.run(
        [sys.executable, "-c", code], check=False, cwd=home, capture_output=True, text=True
    )
    assert (done.returncode, done.stderr) == (0, "")


@pytest.mark.slow
@pytest.mark.parametrize("ours", [True, False])
def test_only_runs_on_a_server_that_lasts_tell_it_that_they_live(ours: bool) -> None:
    code = "from flows.prefect_server import have_server; have_server('prefect')\n"
    code += "from prefect.settings import get_current_settings as settings\n"
    code += "print(settings().flows.heartbeat_frequency)"
    environment = {name: value for name, value in os.environ.items() if name != "PREFECT_API_URL"}
    if not ours:
        environment["PREFECT_API_URL"] = "http://127.0.0.1:4200/api"
    done = subprocess.run(
        [sys.executable, "-c", code], check=True, env=environment, capture_output=True, text=True
    )
    assert (done.stdout == "None\n") is ours


@pytest.mark.slow
@pytest.mark.parametrize("users", [None, "7"])
def test_a_server_of_ours_records_states_of_tasks_in_groups(users: str | None) -> None:
    setting = "PREFECT_SERVER_SERVICES_TASK_RUN_RECORDER_BATCH_SIZE"
    code = "import json, os, urllib.request as net\n"
    code += "from flows.prefect_server import have_server; have_server('prefect')\n"
    code += "with net.urlopen(os.environ['PREFECT_API_URL'] + '/admin/settings') as answer:\n"
    code += "    of = json.load(answer)['server']['services']['task_run_recorder']\n"
    code += "print(of['batch_size'], of['flush_interval'])"
    taken = {"PREFECT_API_URL", setting}
    environment = {name: value for name, value in os.environ.items() if name not in taken}
    if users:
        environment[setting] = users
    done = subprocess.run(
        [sys.executable, "-c", code], check=True, env=environment, capture_output=True, text=True
    )
    assert done.stdout.split() == [users or "50", "1.0"]


def test_what_prefect_logs_goes_to_a_file(home: Path) -> None:
    logs = list((home / "state" / "logs").glob("*-reindex-*.log"))
    assert "Finished in state Completed()" in logs[0].read_text(encoding="utf-8")


@pytest.mark.slow
def test_a_report_named_like_a_page_is_one(home: Path) -> None:
    another = ["--set", "index.table=page", "--set", "limits.texts_per_request=1"]
    another += ["--set", "state.uri=./page"]  # where nothing is known yet
    done = embed_once("reindex", "birds.yaml", *another, "--report", "run.HTML", cwd=home)
    assert done.returncode == 0, done.stderr
    page = (home / "run.HTML").read_text(encoding="utf-8")
    assert page.startswith("<!doctype html>")
    assert re.findall("<title>(.*?)</title>", page) == [
        "birds",
        "Tokens per second",
        "Milliseconds a call took, by when it was sent",
        "Time by stage",
    ]
    assert f"<p>{done.stdout.splitlines()[0]}</p>" in page


def test_the_report_file_holds_what_the_contract_names(home: Path) -> None:
    report = json.loads((home / "first.json").read_text(encoding="utf-8"))
    assert report["chunks"] == {
        "total": 3,
        "unchanged": 0,
        "added": 3,
        "changed": 0,
        "moved": 0,
        "deleted": 0,
        "duplicate": 0,
        "quarantined": 0,
    }
    assert report["texts"] == {"unique": 3, "from_cache": 0, "embedded": 3}
    assert set(report["calls"]) == {"ok", "failed", "throttled", "split", "retried"}
    assert set(report["cost"]["saved_usd"]) == {"unchanged", "duplicates", "cache", "batch_lane"}
    assert set(report["seconds"]) == {
        "read",
        "fingerprint",
        "compare",
        "lookup",
        "embed",
        "publish",
        "total",
    }
    assert report["generation"] == 1
    assert report["memory"]["peak_bytes"] > 10_000_000


def test_search_names_document_lines_and_distance_from_any_folder(
    home: Path, tmp_path: Path
) -> None:
    found = embed_once(
        "search", str(home / "birds.yaml"), "which bird hunts mice at night?", cwd=tmp_path
    )
    assert found.returncode == 0, found.stderr
    assert re.match(r"1\. owl\.md:1-3  \(distance 0\.\d+\)\n +# Owls", found.stdout)
    assert found.stderr == ""


def test_search_prints_json_for_machines(home: Path) -> None:
    found = embed_once("search", "birds.yaml", "storks migrate", "-k", "1", "--json", cwd=home)
    (hit,) = json.loads(found.stdout)
    assert (hit["document"], hit["start_line"], hit["end_line"]) == ("code.py", 1, 2)


def test_history_lists_the_run(home: Path) -> None:
    listed = embed_once("history", "birds.yaml", cwd=home)
    assert listed.returncode == 0, listed.stderr
    assert re.search(r"^ +1  now +20\S+ +completed +3 +3 ", listed.stdout, re.MULTILINE)
    _, sums = listed.stdout.split("\n\n")
    assert sums.startswith("Totals of this state")
    total = rf"^20\d\d-\d\d  lexical/lexical +3 +1 .* {re.escape(str(home))}/\S+$"
    assert re.search(total, sums, re.MULTILINE), sums
    assert embed_once("history", "birds.yaml", "--all", cwd=home).stdout == listed.stdout


def test_plan_shows_absolute_paths_and_leaves_no_trace(home: Path) -> None:
    before = sorted(path for path in home.rglob("*") if "plan.json" not in path.name)
    planned = embed_once("plan", "birds.yaml", "--json", "plan.json", cwd=home)
    assert planned.returncode == 0, planned.stderr
    assert str(home / "corpus") in planned.stdout
    assert json.loads((home / "plan.json").read_text(encoding="utf-8"))["chunks"]["unchanged"] == 3
    assert sorted(path for path in home.rglob("*") if "plan.json" not in path.name) == before


def test_plan_prices_a_voyage_model_without_a_key(home: Path) -> None:
    planned = embed_once(
        "plan", "birds.yaml", "--set", "embedding.provider=voyage",
        "--set", "embedding.model=voyage-4", "--set", "embedding.dimension=1024",
        "--set", "index.table=other", "--json", "voyage.json", cwd=home,
    )  # fmt: skip
    assert planned.returncode == 0, planned.stderr
    plan = json.loads((home / "voyage.json").read_text(encoding="utf-8"))
    assert plan["cost"]["usd"] == pytest.approx(plan["tokens"] * 0.06 / 1e6)
    assert plan["usd_batch_lane"] == pytest.approx(plan["cost"]["usd"] * 0.67)
    assert (plan["bound_by"], plan["limited"]) == ("", True)  # it is within a minute's quota


@pytest.mark.parametrize(
    ("arguments", "code", "message"),
    [
        (["reindex", "nowhere.yaml"], 2, "There is no config file at"),
        (["reindex", "birds.yaml", "--set", "sauce.kind=files"], 2, "Did you mean 'source'?"),
        (["reindex", "birds.yaml", "--set", "source.path=./no"], 2, "source.path"),
        (["reindex", "birds.yaml", "--set", "embedding.provider=acme"], 2, "embedding.provider"),
        (["plan", "birds.yaml", "--set", "embedding.dimension=7"], 2, "embedding.dimension"),
        (["plan", "birds.yaml", "--set", "embedding.dimension=256"], 2, "of another space|holds"),
        (["reindex", "birds.yaml", "--set", "embedding.provider=voyage"], 2, "embedding.model"),
        (["reindex", "birds.yaml", "--set", "state.uri=birds.yaml/x"], 2, "state.uri"),
        (["reindex", "birds.yaml", "--set", "state.uri=~nobody-here/x"], 2, "state.uri"),
        (["reindex", "birds.yaml", "--set", "limits.tokens_per_minute=9"], 2, "no limit a minute"),
        (["reindex", "birds.yaml", "--report", "corpus"], 2, "corpus cannot be written"),
        (["search", "birds.yaml", "x", "--set", "index.table=empty"], 2, "no index 'empty'"),
        (["reindex", "birds.yaml", "--set", "limits.shared=true"], 2, "no account to share"),
        (["reindex", "birds.yaml", "--set", "embedding.tokenizer=t.json"], 2, "no use for it"),
        (["reindex", "birds.yaml", *VOYAGE], 2, "VOYAGE_API_KEY is not set"),
        (["reindex", "birds.yaml", *VOYAGE, "--set", "embedding.output_dtype=int8"], 2, "ubinary"),
        (["reindex", "birds.yaml", *VOYAGE, "--set", "index.metric=hamming"], 2, "hamming belongs"),
        (["reindex", "birds.yaml", *VOYAGE, "--set", "embedding.base_url=voyage"], 2, "base_url"),
        (["simulate", "--set", "tier=7"], 2, "tier: Input should be 'free', 1, 2, 3"),
        (["simulate", "--set", "tier"], 2, "'tier' is no setting"),
        (["simulate", "--rules", "birds.yaml"], 2, "birds.yaml is no list of rules"),
        (["simulate", "--rules", "none.yaml"], 2, "none.yaml cannot be read"),
        (["search", "birds.yaml", "  "], 2, "blank"),
        (["rollback", "birds.yaml"], 2, "keeps no generation before the newest one"),
        (["rollback", "birds.yaml", "7"], 2, "Generation 7 .* is not kept; choose one of 1"),
        (["rollback", "birds.yaml", "1"], 2, "Generation 1 .* is the newest one already"),
        (["rollback", "birds.yaml", "--set", "index.table=empty"], 2, "no index 'empty'"),
        (["maintain", "birds.yaml", "--set", "index.table=empty"], 2, "no index 'empty'"),
        (["maintain", "birds.yaml", "--set", "index.keep_generations=0"], 2, "keep_generations"),
        (["reindex"], 2, "Missing argument"),
        (["reindex", "birds.yaml", "--budget", "3"], 2, "No such option"),
    ],
)
def test_a_users_mistake_is_said_in_words_and_touches_nothing(  # noqa: PLR0917
    home: Path,
    arguments: list[str],
    code: int,
    message: str,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(home)
    monkeypatch.delenv("VOYAGE_API_KEY", raising=False)
    monkeypatch.setattr(sys, "argv", ["embed-once", *arguments])
    with pytest.raises(SystemExit) as ended:  # in this process, as its imports take seconds
        main()
    gc.unfreeze()
    said = capfd.readouterr()
    assert ended.value.code == code, said.err
    assert re.search(message, said.err)
    assert "Traceback" not in said.err
    assert said.out == ""


@pytest.mark.slow
def test_a_mistake_that_only_the_run_sees_is_said_in_words_too(home: Path) -> None:
    done = embed_once("reindex", "birds.yaml", "--narrow", "nothing", cwd=home)
    assert (done.returncode, done.stdout) == (2, "")
    assert "there is no 'nothing'" in done.stderr
    assert "Traceback" not in done.stderr


@pytest.fixture
def simulator(home: Path, python: list[str]) -> Iterator[tuple["subprocess.Popen[str]", str]]:
    """`embed-once simulate` with a bad text, and its address."""
    (home / "rules.yaml").write_text("- {marker: Ducks, status: 400, detail: No ducks.}\n")
    command = [*python, "-m", "flows.cli", "simulate", "--port", "0", "--rules"]
    process = subprocess.Popen(
        [*command, str(home / "rules.yaml")], stdout=subprocess.PIPE, text=True
    )
    assert process.stdout is not None
    address = re.search(r"http://127\.0\.0\.1:\d+/v1", process.stdout.readline())
    assert address is not None
    yield process, address[0]
    process.kill()
    process.communicate()


@pytest.mark.slow
def test_a_refused_text_is_exit_code_3_until_it_is_taken(
    home: Path, simulator: tuple["subprocess.Popen[str]", str], patched: pytest.MonkeyPatch
) -> None:
    process, address = simulator
    patched.setenv("VOYAGE_API_KEY", "pa-secret-of-birds")
    to_it = [*VOYAGE, "--set", f"embedding.base_url={address}"]
    done = embed_once("reindex", "birds.yaml", *to_it, cwd=home)
    assert done.returncode == 3, done.stderr
    assert done.stderr == "Some texts are refused by the provider; see `left out` above.\n"
    assert re.search(r"quarantined +1 \(their text is refused\)", done.stdout)
    assert re.search(r"left out: duck\.md:1-3 +.*No ducks", done.stdout)
    requested = urllib.request.Request(  # noqa: S310
        f"{address.removesuffix('v1')}_sim/rules", method="DELETE"
    )
    urllib.request.urlopen(requested, timeout=10).close()  # noqa: S310
    done = embed_once("reindex", "birds.yaml", *to_it, "--retry-quarantined", cwd=home)
    assert done.returncode == 0, done.stderr
    found = embed_once("search", "birds.yaml", "ducks", *to_it, cwd=home)
    assert found.returncode == 0, found.stderr
    logs = [path.read_text() for path in (home / "state" / "logs").iterdir()]
    assert not any("pa-secret-of-birds" in log for log in logs)
    process.send_signal(signal.SIGINT)
    said = process.communicate(timeout=20)[0]
    assert re.search(
        r"^7 calls \(4 ok\), [\d,]+ tokens, \$0\.0000\d+ at list price\.$", said, re.MULTILINE
    )
    patched.delenv("VOYAGE_API_KEY")


@pytest.mark.slow
def test_ctrl_c_sends_nothing_more_and_keeps_what_comes(
    home: Path,
    tmp_path: Path,
    patched: pytest.MonkeyPatch,
    python: list[str],
    slowed: Callable[[Simulator], int],
) -> None:
    rows = [{"id": str(number), "text": f"bird number {number}"} for number in range(200)]
    (tmp_path / "birds.jsonl").write_text("\n".join(map(json.dumps, rows)), encoding="utf-8")
    shutil.copy(home / "birds.yaml", tmp_path)
    with Simulator(Settings(latency=Latency(base_s=1))) as simulator:
        patched.setenv("VOYAGE_API_KEY", "pa-any")
        process = subprocess.Popen(
            [
                *python, "-m", "flows.cli", "reindex", "birds.yaml", *VOYAGE,
                "--set", "source={kind: table, path: birds.jsonl}",
                "--set", f"embedding.base_url={simulator.base_url}",
                "--set", "limits.texts_per_request=1",
            ],
            cwd=tmp_path, stderr=subprocess.PIPE, text=True,
        )  # fmt: skip
        while simulator.ledger.totals()["calls"] < 12 and process.poll() is None:
            time.sleep(0.05)
        sent = slowed(simulator)
        process.send_signal(signal.SIGINT)
        said = process.communicate(timeout=120)[1]
        paid = simulator.ledger.totals()
    patched.delenv("VOYAGE_API_KEY")
    assert process.returncode == 130, said
    assert said == "embed-once: cancelled; what was paid for is kept, run again.\n"
    assert paid["calls"] == paid["ok"] == sent
    config = load_config(tmp_path / "birds.yaml", VOYAGE[1::2])
    (run,) = history(config).to_dict("records")
    assert (run["state"], run["texts.embedded"]) == ("cancelled", paid["distinct_texts"])
    assert run["tokens.billed"] == paid["billed_tokens"]
    assert not list((tmp_path / "state" / "runs").iterdir())  # all of it is in the cache
    assert states_of(run["run_id"])[-1] == "Cancelled"


def states_of(run_id: str) -> list[str]:
    """The states that a flow run went through, as Prefect tells them."""
    asked = f"{os.environ['PREFECT_API_URL']}/flow_run_states/?flow_run_id={run_id}"
    with urllib.request.urlopen(asked, timeout=30) as answer:  # noqa: S310
        return [str(state["name"]) for state in json.load(answer)]


@pytest.mark.slow
def test_an_index_held_by_another_run_is_exit_code_6(home: Path) -> None:
    with held(load_config(home / "birds.yaml").index, "the-other-run"):
        done = embed_once("reindex", "birds.yaml", cwd=home)
    assert done.returncode == 6
    assert "the-other-run" in done.stderr


@pytest.mark.slow
def test_a_document_that_cannot_be_read_is_exit_code_3(home: Path, tmp_path: Path) -> None:
    shutil.copytree(home, tmp_path / "birds")
    document = tmp_path / "birds" / "corpus" / "owl.md"
    document.unlink()
    document.symlink_to(document)  # a link to itself cannot be read, by root neither
    done = embed_once("reindex", "birds.yaml", cwd=tmp_path / "birds")
    assert done.returncode == 3, done.stderr
    assert re.search(r"skipped: unreadable +1 \('owl.md'\)", done.stdout)
    found = embed_once("search", "birds.yaml", "owls hunt mice", cwd=tmp_path / "birds")
    assert found.stdout.startswith("1. owl.md:1-3")


@pytest.mark.slow
def test_a_server_that_is_not_there_is_told_with_what_to_do(
    home: Path, patched: pytest.MonkeyPatch
) -> None:
    patched.setenv("PREFECT_API_URL", "http://127.0.0.1:9/api")
    done = embed_once("reindex", "birds.yaml", cwd=home)
    assert done.returncode == 1
    assert "No Prefect server answers (Failed to reach API at http://127.0.0.1:9/api" in done.stderr
    assert "unset" in done.stderr


@pytest.mark.slow
def test_without_a_server_one_is_started_and_nothing_of_it_is_heard(
    home: Path, tmp_path: Path, patched: pytest.MonkeyPatch
) -> None:
    patched.delenv("PREFECT_API_URL")
    patched.setenv("PREFECT_HOME", str(tmp_path))
    done = embed_once("reindex", "birds.yaml", cwd=home)
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("birds: nothing changed, nothing embedded, no new version.")
    assert done.stderr == ""


def test_a_plan_that_a_reindex_would_refuse_is_exit_code_2(home: Path, tmp_path: Path) -> None:
    shutil.copytree(home, tmp_path / "birds")
    for document in (tmp_path / "birds" / "corpus").iterdir():
        document.unlink()
    planned = embed_once("plan", "birds.yaml", cwd=tmp_path / "birds")
    assert planned.returncode == 2
    assert "index.max_deleted_fraction=1" in planned.stderr
    assert re.search(r"deleted +3", planned.stdout)


@pytest.mark.slow
def test_what_nobody_foresaw_is_said_in_a_line_with_the_rest_in_a_file(
    home: Path, tmp_path: Path
) -> None:
    code = "import lancedb, sys; lancedb.connect = lambda *_, **__: 1 / 0\n"
    code += "from flows.cli import main; sys.exit(main())"
    done = subprocess.run(
        [sys.executable, "-c", code, "search", "birds.yaml", "owls"],
        cwd=home, env={**os.environ, "TMPDIR": str(tmp_path)}, check=False, capture_output=True,
        text=True, timeout=150,
    )  # fmt: skip
    assert done.returncode == 1
    assert done.stderr.startswith("embed-once: Something unforeseen happened (")
    log = Path(done.stderr.split("Details: ")[1].strip())
    assert "Traceback" in log.read_text(encoding="utf-8")
    log.unlink()
