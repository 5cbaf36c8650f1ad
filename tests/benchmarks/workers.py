"""What workers of Dask bring and cost: one corpus and one simulated API, with and without them.

A provider with latency is waited for, by threads as by processes: there workers must cost little.
Run it as `python tests/benchmarks/workers.py [--calls 100] [--latency 0.5] [--processes 2]`.
"""

import argparse
import json
import os
import resource
import tempfile
from pathlib import Path

from account import simulator

from flows.prefect_server import have_server
from tasks.ledger import Ledger
from tasks.simulator import Latency
from tasks.timeline import Timeline

TEXTS_PER_REQUEST = 200
CONCURRENCY = 8
CONFIG = """\
name: workers
source: {{kind: table, path: chunks.jsonl}}
embedding: {{provider: voyage, model: voyage-4, dimension: 1024, base_url: {url}}}
limits: {{texts_per_request: {texts}, concurrency: {concurrency}}}
index: {{uri: ./{name}/index, table: t}}
state: {{uri: ./{name}/state}}
runner: {runner}
"""


def main() -> None:
    """Print a line for each way."""
    arguments = argparse.ArgumentParser(description=__doc__)
    arguments.add_argument("--calls", type=int, default=100)
    arguments.add_argument("--latency", type=float, default=0.5, help="seconds a call")
    arguments.add_argument("--processes", type=int, default=2)
    given = arguments.parse_args()
    os.environ.setdefault("VOYAGE_API_KEY", "pa-any")
    have_server("flows.reindex")
    from flows.reindex import run  # noqa: PLC0415 - with the server there

    ways = {
        "warm-up": "{kind: threads}",  # which imports, and is left out
        "threads": "{kind: threads}",
        "dask": f"{{kind: dask, processes: {given.processes}}}",
    }
    bound = given.latency * given.calls / CONCURRENCY
    print(
        f"{given.calls} calls of {TEXTS_PER_REQUEST} texts, {given.latency} s each: {bound:.1f} s"
    )
    threads = 0.0
    latency = Latency(base_s=given.latency).model_dump()
    with tempfile.TemporaryDirectory() as folder, simulator(latency=latency) as address:
        texts = (f"chunk {number} " * 50 for number in range(given.calls * TEXTS_PER_REQUEST))
        rows = ({"id": str(number), "text": text} for number, text in enumerate(texts))
        (Path(folder) / "chunks.jsonl").write_text("\n".join(map(json.dumps, rows)))
        for name, runner in ways.items():
            file = Path(folder) / f"{name}.yaml"
            values = {"url": address, "name": name, "runner": runner}
            values |= {"texts": str(TEXTS_PER_REQUEST), "concurrency": str(CONCURRENCY)}
            file.write_text(CONFIG.format(**values), encoding="utf-8")
            before = resource.getrusage(resource.RUSAGE_SELF)
            report = run(str(file))
            if name == "warm-up":
                continue
            after = resource.getrusage(resource.RUSAGE_SELF)
            spent = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
            # From the first call on: workers take seconds to start, once a run.
            ledger = Ledger(str(Path(folder) / name / "state"))
            calling = Timeline.of(ledger.calls_of(report.run_id)).seconds
            speed = report.tokens.billed / calling
            threads = threads or speed
            print(
                f"{name:8} embed {report.seconds.embed:5.1f} s, of that calls {calling:5.1f} s: "
                f"tokens/s {speed:9,.0f}, {speed / threads:.2f} of threads, "
                f"p50 {report.latency_ms.p50 or 0:5.0f} ms, CPU of this process {spent:5.1f} s",
                flush=True,
            )


if __name__ == "__main__":
    main()
