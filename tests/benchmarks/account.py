"""How much of an account's limits a run uses, and what faults and bad texts cost.

The simulated Voyage API runs in its own process. Run it as
`python tests/benchmarks/account.py limits|shared|faults|poisoned`.

- limits: quotas that the client knows, or must find out, in sliding and in fixed minutes.
- shared: two runs in two processes that share one quota through a Prefect server.
- faults: 5 % each of 500, 503, reset connections and slow calls, through the whole flow.
- poisoned: 100 texts of 10,000 that the API refuses, through the whole flow, and once more.
"""

import argparse
import contextlib
import itertools
import json
import math
import os
import subprocess
import sys
import tempfile
import threading
import time
import urllib.request
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

import pandas as pd
import pyarrow as pa

import tasks.limiter
from flows.embedding import WAVE
from tasks.embed import embed_batch
from tasks.errors import ProviderBusy, RunStopped
from tasks.journal import RunFolder
from tasks.keys import text_hash
from tasks.limits import Packer
from tasks.params import Config
from tasks.providers.opening import open_embedder
from tasks.schemas import BATCH, Batch, TableRef
from tasks.sender import Sender, Terms, forget_sender, sender_of

WORD = "lantern harbour violet engine "
KEY = "pa-benchmark"


class Case(NamedTuple):
    """One account.

    Attributes:
        name: For people.
        requests: Its requests a minute.
        tokens: Its tokens a minute.
        told: What the client is told of it: settings under `limits`.
        announce: What a 429 says.
        model: Name.
        text_tokens: Length of each text.
        minutes: How long to run, simulated.
        warm_up: Minutes that do not count.
        scale: Simulated seconds in a real one.
    """

    name: str
    requests: int
    tokens: int
    told: dict[str, Any]
    announce: str
    model: str
    text_tokens: int
    minutes: int
    warm_up: int
    scale: float


CASES = [
    Case("free trial, told", 3, 10_000, {"tier": "free"}, "free-trial", "voyage-4", 200, 24, 4, 10),
    Case("free trial, hidden", 3, 10_000, {"tier": 1}, "hidden", "voyage-4", 200, 40, 16, 10),
    Case("free trial, announced", 3, 10_000, {"tier": 1}, "free-trial", "voyage-4", 200, 24, 4, 10),
    Case("3M hidden", 2000, 3_000_000, {"tier": 1}, "hidden", "voyage-4", 400, 12, 6, 4),
    Case("3M announced", 2000, 3_000_000, {"tier": 1}, "numbers", "voyage-4", 400, 8, 3, 4),
    Case("8M known", 2000, 8_000_000, {"tier": 1}, "hidden", "voyage-4", 1200, 7, 2, 2),
    Case("2000 small requests known", 2000, 8_000_000, {"tier": 1, "texts_per_request": 1},
         "hidden", "voyage-4", 100, 5, 2, 1),
]  # fmt: skip


@contextlib.contextmanager
def simulator(rules: Sequence[dict[str, Any]] = (), **settings: Any) -> Iterator[str]:
    """The simulated API in a process of its own; yields its address."""
    command = [sys.executable, "-m", "flows.cli", "simulate", "--port", "0"]
    for name, value in settings.items():
        command += ["--set", f"{name}={json.dumps(value)}"]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    try:
        assert process.stdout is not None
        address = process.stdout.readline().split()[8]
        if rules:
            admin(address, "rules", list(rules))
        yield address
    finally:
        process.terminate()
        process.wait()


def admin(address: str, path: str, body: Any = None) -> Any:
    """What the simulator's admin says."""
    request = urllib.request.Request(  # noqa: S310
        f"{address.removesuffix('/v1')}/_sim/{path}",
        data=None if body is None else json.dumps(body).encode(),
        headers={"content-type": "application/json"},
    )
    with urllib.request.urlopen(request, timeout=60) as answer:  # noqa: S310
        return json.load(answer)


def config_of(
    folder: Path, address: str, model: str, limits: dict[str, Any], **more: Any
) -> Config:
    """A config that embeds a table with the simulated API."""
    return Config.model_validate(
        {
            "name": "benchmark",
            "source": {"kind": "table", "path": str(folder / "chunks.parquet")},
            "embedding": {
                "provider": "voyage",
                "model": model,
                "dimension": 256,
                "base_url": address,
            },
            "limits": limits,
            "index": {"uri": str(folder / "index"), "table": "chunks"},
            "state": {"uri": str(folder / "state")},
            **more,
        }
    )


class Steady(NamedTuple):
    """What the account saw after the warm-up."""

    tokens: float
    requests: float
    throttled: float
    calls: int

    def __str__(self) -> str:
        return (
            f"tokens {self.tokens:6.1%}  requests {self.requests:6.1%}  "
            f"throttled {self.throttled:5.2%} of {self.calls}"
        )


def steady(seen: Sequence[dict[str, Any]], case: Case) -> Steady:
    """Shares of the quota used between the warm-up and the last whole minute."""
    start, end = case.warm_up * 60.0, case.minutes * 60.0
    inside = [call for call in seen if start <= call["t"] < end]
    minutes = case.minutes - case.warm_up
    ok = [call for call in inside if call["status"] == 200]
    throttled = sum(call["status"] == 429 for call in inside)
    return Steady(
        tokens=sum(call["tokens"] for call in ok) / (case.tokens * minutes),
        requests=len(ok) / (case.requests * minutes),
        throttled=throttled / max(1, len(inside)),
        calls=len(inside),
    )


def send_for(
    config: Config, text_tokens: int, seconds: float, *, seed: int = 0, shared: bool = False
) -> None:
    """Embed fresh texts as fast as the limits allow, as the flow's tasks do, for so long."""
    folder = RunFolder(config.state.uri, f"benchmark-{os.getpid()}-{seed}")
    folder.staging.mkdir(parents=True)
    terms = Terms(
        open_embedder(config), folder, 0.0, shared=shared, max_wait_s=config.limits.max_wait
    )
    sender = sender_of(terms)
    ends = time.monotonic() + seconds
    room, numbers = threading.Condition(), itertools.count()
    repeated = WORD * math.ceil(text_tokens * 4.2 / len(WORD))

    most, flying = WAVE * config.limits.concurrency, 0

    def work() -> None:
        nonlocal flying
        while time.monotonic() < ends:
            with room:
                # As in the flow: one batch first, then as many ahead as a minute takes.
                while flying >= (2 * sender.ahead(most) if sender.answers else 1):
                    room.wait(0.1)
                    if time.monotonic() >= ends:
                        return
                flying += 1
                one = _next_batch(sender, numbers, f"{os.getpid()} {seed} {{}} {repeated}", folder)
            with contextlib.suppress(RunStopped):
                _embedded(one, terms)
            Path(one.table.path).unlink()
            with room:
                flying -= 1
                room.notify()

    with ThreadPoolExecutor(2 * most) as pool:
        done = [pool.submit(work) for _ in range(2 * most)]
        time.sleep(max(0.0, ends - time.monotonic()))
        sender.stop(RunStopped("The time is over."))
        for each in done:
            each.result()
    forget_sender(folder)


def _next_batch(sender: Sender, numbers: Iterator[int], pattern: str, folder: RunFolder) -> Batch:
    """As many new texts as one call takes by now."""
    packer, texts = Packer(sender.request_limits()), []
    while True:
        text = pattern.format(next(numbers))
        if packer.place(int(sender.counts(pa.array([text], pa.utf8()))[0])) > 1:
            break
        texts.append(text)
    number = next(numbers)
    rows = {
        "text_hash": [text_hash(text) for text in texts],
        "text": texts,
        "tokens": [1] * len(texts),
    }
    path = folder.staging / f"batch-{number:08d}.arrow"
    return Batch(number, TableRef.write(path, BATCH, [pa.table(rows, schema=BATCH)]), 0)


def _embedded(batch: Batch, terms: Terms) -> None:
    """Embed `batch`, with the flow's retries but without their delays."""
    for attempt in itertools.count(1):
        try:
            embed_batch(batch, terms, attempt)
        except ProviderBusy:
            time.sleep(0.1)
        else:
            return


def limits(names: Sequence[str]) -> None:
    """Quota used and calls throttled, for each case and kind of minute."""
    for case in CASES:
        if names and case.name not in names:
            continue
        for window in ("sliding", "fixed_minute"):
            tasks.limiter.MINUTE_S = 60 / case.scale
            with (
                tempfile.TemporaryDirectory() as folder,
                simulator(
                    requests_per_minute=case.requests,
                    tokens_per_minute=case.tokens,
                    announce=case.announce,
                    window=window,
                    time_scale=case.scale,
                    vectors="fast",
                    latency={"base_s": 0.2, "per_1k_tokens_s": 0.001, "jitter_s": 0.1},
                    keep_requests=100_000,
                ) as address,
            ):
                config = config_of(Path(folder), address, case.model, case.told)
                send_for(config, case.text_tokens, case.minutes * 60 / case.scale)
                seen = admin(address, "ledger")["requests"]
            print(f"{case.name:<26} {window:<13} {steady(seen, case)}", flush=True)


def shared() -> None:
    """Two processes, one quota, one Prefect server."""
    case = Case(
        "two runs share 3M", 2000, 3_000_000,
        {"tier": 1, "requests_per_minute": 2000, "tokens_per_minute": 3_000_000, "shared": True},
        "hidden", "voyage-4", 400, 5, 2, 1,
    )  # fmt: skip
    from prefect.testing.utilities import prefect_test_harness  # noqa: PLC0415

    with (
        tempfile.TemporaryDirectory() as folder,
        simulator(
            requests_per_minute=case.requests,
            tokens_per_minute=case.tokens,
            announce=case.announce,
            vectors="fast",
            keep_requests=100_000,
        ) as address,
        prefect_test_harness(server_startup_timeout=120),
    ):
        from prefect.settings import PREFECT_API_URL  # noqa: PLC0415

        environment = {**os.environ, "PREFECT_API_URL": str(PREFECT_API_URL.value())}
        command = [sys.executable, __file__, "send", address, str(case.minutes * 60)]
        runs = [
            subprocess.Popen([*command, str(Path(folder) / name)], env=environment)
            for name in ("one", "two")
        ]
        codes = [run.wait() for run in runs]
        seen = admin(address, "ledger")["requests"]
    print(f"{case.name:<26} {'sliding':<13} {steady(seen, case)}  exit codes {codes}")


def faults() -> None:
    """Everything goes wrong now and then; nothing is lost and nothing billed twice."""
    rules: list[dict[str, Any]] = [
        {"status": 500, "probability": 0.05, "seed": 1},
        {"status": 503, "probability": 0.05, "seed": 2},
        {"action": "reset_before", "probability": 0.05, "seed": 3},
        {"action": "slow", "seconds": 2, "probability": 0.05, "seed": 4},
    ]
    texts = [f"{number} {WORD * 5}" for number in range(10_000)]
    _whole_flow("faults", texts, rules, texts_per_request=25)


def poisoned() -> None:
    """A hundred bad texts; a second run sends nothing."""
    rules = [{"marker": "POISON", "status": 400, "detail": "The request cannot be processed."}]
    texts = [f"{'POISON ' if n % 100 == 37 else ''}{n} {WORD * 5}" for n in range(10_000)]
    _whole_flow("poisoned", texts, rules, again=True)


def _whole_flow(
    name: str,
    texts: Sequence[str],
    rules: Sequence[dict[str, Any]],
    *,
    again: bool = False,
    **limits: Any,
) -> None:
    import yaml  # noqa: PLC0415
    from prefect.testing.utilities import prefect_test_harness  # noqa: PLC0415

    from flows.reindex import run  # noqa: PLC0415

    latency = {"base_s": 0.1, "jitter_s": 0.1}
    with (
        tempfile.TemporaryDirectory() as name_of_folder,
        simulator(rules, vectors="fast", latency=latency) as address,
        prefect_test_harness(server_startup_timeout=120),
    ):
        folder = Path(name_of_folder)
        frame = pd.DataFrame({"id": [str(n) for n in range(len(texts))], "text": texts})
        frame.to_parquet(folder / "chunks.parquet")
        config = config_of(folder, address, "voyage-4", limits)
        values = config.model_dump(mode="json", exclude_none=True)
        (folder / "benchmark.yaml").write_text(yaml.safe_dump(values), encoding="utf-8")
        for number in (1, 2) if again else (1,):
            before = admin(address, "ledger?requests=0")["totals"]["calls"]
            report = run(str(folder / "benchmark.yaml"))
            totals = admin(address, "ledger?requests=0")["totals"]
            lost = len(texts) - report.chunks.total + (report.chunks.total - _rows(config))
            print(
                f"{name}, run {number}: {report.state}; {totals['calls'] - before} calls "
                f"({report.calls}); not in the index {lost}, quarantined "
                f"{report.chunks.quarantined}; tokens billed {totals['billed_tokens']:,}, "
                f"ledger {report.tokens.billed:,}; texts billed again "
                f"{totals['texts_billed_again']}; {report.seconds.total:.0f} s, "
                f"busy {report.concurrency.busy_fraction:.0%}",
                flush=True,
            )
        bad = sum("POISON" in text for text in texts)
        if bad:
            print(f"bound: {bad} bad texts in batches of 1,000: {21 * bad:,} calls")


def _rows(config: Config) -> int:
    import lancedb  # noqa: PLC0415

    return int(lancedb.connect(config.index.uri).open_table(config.index.table).count_rows())


def main() -> None:
    """Run one benchmark."""
    os.environ.setdefault("VOYAGE_API_KEY", KEY)
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("what", choices=["limits", "shared", "faults", "poisoned", "send"])
    parser.add_argument("more", nargs="*")
    chosen = parser.parse_args()
    if chosen.what == "limits":
        limits(chosen.more)
    elif chosen.what == "shared":
        shared()
    elif chosen.what == "faults":
        faults()
    elif chosen.what == "poisoned":
        poisoned()
    else:  # one of the two runs of `shared`
        address, seconds, folder = chosen.more
        told = {
            "tier": 1,
            "requests_per_minute": 2000,
            "tokens_per_minute": 3_000_000,
            "shared": True,
        }
        config = config_of(Path(folder), address, "voyage-4", told)
        send_for(config, 400, float(seconds), shared=True)


if __name__ == "__main__":
    main()
