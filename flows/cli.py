"""The `embed-once` command: the same flows and functions, for a terminal or a pipe."""

import contextlib
import os
import sys
import tempfile
import traceback
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from flows.prefect_server import have_server, leave
from flows.terminal import CANCELLED, SIGNALS_HERE, bar_on, prefect_log
from tasks.errors import UNFORESEEN, EmbedOnceError, SettingsError

if TYPE_CHECKING:
    from tasks.report import RunReport

INCOMPLETE = 3
FOUND = 5
WAITING = 7

app = typer.Typer(
    name="embed-once",
    help="Keep a LanceDB vector index equal to a changing corpus; every text is paid for once.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)

ConfigPath = Annotated[str, typer.Argument(metavar="CONFIG", help="YAML file of the index.")]
SetOption = Annotated[
    list[str], typer.Option("--set", metavar="KEY=VALUE", help="Override a config value.")
]
NarrowOption = Annotated[
    str,
    typer.Option(
        metavar="PATH", help="Look only at this file or folder below source.path; keep the rest."
    ),
]
AcceptOption = Annotated[
    bool, typer.Option("--accept-splitter", help="Cut documents with another splitter version.")
]
RetryOption = Annotated[
    bool, typer.Option("--retry-quarantined", help="Send texts again that were refused before.")
]


@app.command()
def reindex(  # noqa: PLR0917 - an argument an option
    config: ConfigPath,
    settings: SetOption = [],  # noqa: B006
    narrow: NarrowOption = "",
    accept_splitter: AcceptOption = False,
    retry_quarantined: RetryOption = False,
    yes: Annotated[
        bool, typer.Option("--yes", help="Approve whatever it costs; see budget.approve_above_usd.")
    ] = False,
    report: Annotated[
        Path | None,
        typer.Option(
            metavar="FILE", help="Write the run report here: a page if it ends in .html, else JSON."
        ),
    ] = None,
) -> None:
    """Bring the index in step with the corpus: plan, embed, publish, report."""
    from tasks.quick import import_lancedb  # noqa: PLC0415

    import_lancedb()
    from tasks.form import UNASKED, Overrides, configured  # noqa: PLC0415
    from tasks.sections import sections  # noqa: PLC0415
    from tasks.storage import local_folder  # noqa: PLC0415
    from tasks.summary import as_text, headline  # noqa: PLC0415
    from tasks.survey import require_runnable  # noqa: PLC0415

    _require_file(report)
    overrides = Overrides(
        narrow=narrow,
        accept_splitter=accept_splitter,
        retry_quarantined=retry_quarantined,
        settings=[*settings, UNASKED] if yes else settings,
    )
    loaded = configured(config, overrides)
    require_runnable(loaded, overrides)  # a mistake is told before Prefect is started
    if loaded.budget.approve_above_usd is not None:
        from flows.asking import approved  # noqa: PLC0415

        overrides = approved(loaded, overrides)
    with prefect_log(local_folder(loaded.state.uri, "logs"), "reindex") as console, bar_on(console):
        have_server("flows.reindex")
        from flows.reindex import run  # noqa: PLC0415

        try:
            done = run(config, overrides)
        except EmbedOnceError as error:
            if "report" in error.facts:
                _write_report(report, error.facts["report"], loaded.state.uri)
            raise
    print(headline(done))
    print(as_text(*(section.rows for section in sections(done))))
    _write_report(report, done, loaded.state.uri)
    if done.incomplete:
        print("Something could not be read; see `skipped` above.", file=sys.stderr)
    if done.chunks.quarantined:
        print("Some texts are refused by the provider; see `left out` above.", file=sys.stderr)
    if done.state == "waiting":
        raise typer.Exit(WAITING)
    if done.incomplete or done.chunks.quarantined:
        raise typer.Exit(INCOMPLETE)


@app.command()
def plan(  # noqa: PLR0917 - an argument an option
    config: ConfigPath,
    settings: SetOption = [],  # noqa: B006
    narrow: NarrowOption = "",
    accept_splitter: AcceptOption = False,
    retry_quarantined: RetryOption = False,
    json: Annotated[
        Path | None, typer.Option(metavar="FILE.json", help="Write the plan here.")
    ] = None,
) -> None:
    """Say what a reindex would do and cost. Needs no key, leaves no trace."""
    from tasks.quick import import_lancedb  # noqa: PLC0415

    import_lancedb()
    from tasks.form import Overrides  # noqa: PLC0415
    from tasks.params import load_config  # noqa: PLC0415
    from tasks.plan import make_plan, plan_rows  # noqa: PLC0415
    from tasks.summary import as_text  # noqa: PLC0415

    _require_file(json)
    overrides = Overrides(
        narrow=narrow,
        accept_splitter=accept_splitter,
        retry_quarantined=retry_quarantined,
        settings=settings,
    )
    planned = make_plan(load_config(config, settings), overrides)
    print(f"Plan for {planned.name}")
    print(as_text(plan_rows(planned)))
    _write(json, planned.model_dump_json(indent=2))
    if planned.would_refuse:
        print(f"A reindex would refuse: {planned.would_refuse}", file=sys.stderr)
        raise typer.Exit(SettingsError.exit_code)


@app.command()
def search(
    config: ConfigPath,
    text: Annotated[str, typer.Argument(help="What to look for.")],
    k: Annotated[int, typer.Option("-k", min=1, max=1000, help="How many chunks.")] = 5,
    settings: SetOption = [],  # noqa: B006
    json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """Find the chunks nearest to a text: document, lines, distance."""
    from tasks.quick import import_lancedb  # noqa: PLC0415

    import_lancedb()
    from tasks.params import load_config  # noqa: PLC0415
    from tasks.search import as_lines  # noqa: PLC0415
    from tasks.search import search as find  # noqa: PLC0415

    hits = find(load_config(config, settings), text, k)
    if json:
        print("[" + ",\n".join(hit.model_dump_json() for hit in hits) + "]")
    else:
        print(as_lines(hits) if hits else "Nothing found: the index is empty.")


@app.command()
def verify(
    config: ConfigPath,
    settings: SetOption = [],  # noqa: B006
    repair: Annotated[
        bool, typer.Option("--repair", help="Mend what can be mended at no cost.")
    ] = False,
    sample: Annotated[
        int | None,
        typer.Option(
            min=0, metavar="N", help="Embed N texts again; a provider with a price is paid."
        ),
    ] = None,
    json: Annotated[
        Path | None, typer.Option(metavar="FILE.json", help="Write what was seen here.")
    ] = None,
) -> None:
    """Hold index, cache and corpus against each other."""
    from tasks.quick import import_lancedb  # noqa: PLC0415

    import_lancedb()
    from tasks.findings import headline, to_do_lines, verified_rows  # noqa: PLC0415
    from tasks.params import load_config  # noqa: PLC0415
    from tasks.repair import repair as mend  # noqa: PLC0415
    from tasks.summary import as_text  # noqa: PLC0415
    from tasks.verify import verify as look  # noqa: PLC0415

    _require_file(json)
    loaded = load_config(config, settings)
    verified = mend(loaded, sample) if repair else look(loaded, sample)
    print(headline(verified))
    print(as_text(verified_rows(verified)))
    _write(json, verified.model_dump_json(indent=2))
    if not verified.clean:
        print("\n".join(to_do_lines(verified.findings)), file=sys.stderr)
        raise typer.Exit(FOUND)


@app.command()
def history(
    config: ConfigPath,
    settings: SetOption = [],  # noqa: B006
    everything: Annotated[bool, typer.Option("--all", help="Older ones too.")] = False,
) -> None:
    """List generations and runs with their cost, and what each month came to."""
    from tasks.history import SHOWN, as_lines, totals, totals_lines  # noqa: PLC0415
    from tasks.history import history as runs_of  # noqa: PLC0415
    from tasks.params import load_config  # noqa: PLC0415

    loaded, last = load_config(config, settings), None if everything else SHOWN
    print(as_lines(runs_of(loaded), last))
    print()
    print(totals_lines(totals(loaded), last))


@app.command()
def rollback(
    config: ConfigPath,
    generation: Annotated[
        int | None,
        typer.Argument(metavar="[GENERATION]", help="Default: the one before the newest."),
    ] = None,
    settings: SetOption = [],  # noqa: B006
) -> None:
    """Publish an older generation of the index again, at no cost."""
    from tasks.params import load_config  # noqa: PLC0415
    from tasks.rollback import rollback as go_back  # noqa: PLC0415
    from tasks.summary import as_text, chunk_rows, headline  # noqa: PLC0415

    done = go_back(load_config(config, settings), generation)
    print(headline(done))
    print(as_text(chunk_rows(done.chunks)))


@app.command()
def maintain(
    config: ConfigPath,
    settings: SetOption = [],  # noqa: B006
    prune_cache: Annotated[
        int | None,
        typer.Option(
            min=1,
            metavar="DAYS",
            help="Forget vectors that no index sharing the state uses and that are older.",
        ),
    ] = None,
) -> None:
    """Compact the index, drop old generations, build what makes searches fast."""
    from tasks.maintain import maintain as keep_up  # noqa: PLC0415
    from tasks.params import load_config  # noqa: PLC0415
    from tasks.summary import as_text  # noqa: PLC0415

    done = keep_up(load_config(config, settings), prune_cache)
    print(f"{done.name}: maintained.")
    print(as_text(done.rows()))


@app.command()
def simulate(
    port: Annotated[int, typer.Option(min=0, max=65535, help="0: any free one.")] = 8765,
    settings: Annotated[
        list[str],
        typer.Option("--set", metavar="KEY=VALUE", help="A setting, say tier=free or surprise=2."),
    ] = [],  # noqa: B006
    rules: Annotated[
        Path | None, typer.Option(metavar="FILE.yaml", help="Faults: a list of rules.")
    ] = None,
) -> None:
    """Serve a copy of the Voyage API on 127.0.0.1, to rehearse limits and failures."""
    from tasks.budget import usd_text  # noqa: PLC0415
    from tasks.simulator import Simulator, read_rules, read_settings, serve  # noqa: PLC0415

    ran: list[Simulator] = []

    def ready(simulator: Simulator) -> None:
        ran.append(simulator)
        print(f"A copy of the Voyage API serves at {simulator.base_url} until Ctrl-C.")
        print("Point a config at it with embedding.base_url; any VOYAGE_API_KEY will do.")
        print(f"What was asked of it: {simulator.base_url.removesuffix('/v1')}/_sim/ledger")
        sys.stdout.flush()

    serve(read_settings(port, settings), read_rules(rules), ready)
    totals = ran[0].ledger.totals()
    print(
        f"{totals['calls']:,} calls ({totals['ok']:,} ok), {totals['billed_tokens']:,} tokens, "
        f"{usd_text(totals['usd'])} at list price."
    )


@app.command()
def up(
    port: Annotated[
        int | None,
        typer.Option(
            min=1,
            max=65535,
            help="Of the server on 127.0.0.1; default: that of PREFECT_API_URL, else 4200.",
        ),
    ] = None,
) -> None:
    """Serve Prefect's UI, the deployments of prefect.yaml and a worker, until Ctrl-C."""
    from flows.up import project, up  # noqa: PLC0415

    up(project(), port)


@app.command()
def smoke() -> None:
    """Prove add, change, move, delete and a free rerun on a small built-in corpus."""
    logs = Path(tempfile.gettempdir()) / "embed-once-logs"
    with prefect_log(logs, "smoke") as console, bar_on(console):
        have_server("flows.smoke")
        from flows.smoke import smoke as flow  # noqa: PLC0415

        checks = flow()
    for check in checks:
        print(f"  ok  {check}")
    print(f"smoke: {len(checks)} checks passed")


def main() -> None:
    """Run the command; every error ends in plain words on stderr and its exit code."""
    os.environ.setdefault("LANCE_LOG", "error")  # its Rust core warns of things users cannot change
    with SIGNALS_HERE.heeded():
        leave(_exit_code())


def _exit_code() -> int:
    """Run the command; what it ends with."""
    try:
        app()
    except SystemExit as ended:
        if ended.code == CANCELLED:
            with contextlib.suppress(OSError):  # the terminal may be gone
                print(
                    "embed-once: cancelled; what was paid for is kept, run again.", file=sys.stderr
                )
        return ended.code if isinstance(ended.code, int) else 0
    except EmbedOnceError as error:
        print(f"embed-once: {error}", file=sys.stderr)
        return error.exit_code
    except Exception as error:  # noqa: BLE001 - the last line of defence: nothing ends unexplained
        with tempfile.NamedTemporaryFile(
            "w", prefix="embed-once-", suffix=".log", delete=False
        ) as log:
            traceback.print_exc(file=log)
        problem = f"{type(error).__name__}: {error}"
        print(f"embed-once: {UNFORESEEN} ({problem}). Details: {log.name}", file=sys.stderr)
        return EmbedOnceError.exit_code
    return 0


def _require_file(path: Path | None) -> None:
    """See before anything starts that `path` can be written, and leave nothing old in it."""
    if path is None:
        return
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(b"")
    except OSError as error:
        raise SettingsError(f"{path} cannot be written: {error.strerror}.") from None


def _write_report(path: Path | None, done: "RunReport", state_uri: str) -> None:
    """The report as a page if the file is called so, else its numbers as JSON."""
    from tasks.faces import html  # noqa: PLC0415
    from tasks.ledger import Ledger  # noqa: PLC0415
    from tasks.sections import sections  # noqa: PLC0415

    if path is not None and path.suffix.lower() == ".html":
        calls = Ledger(state_uri).calls_of(done.run_id)
        _write(path, html(done, sections(done, calls)))
    else:
        _write(path, done.model_dump_json(indent=2))


def _write(path: Path | None, text: str) -> None:
    if path is not None:
        path.write_text(text + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
