"""The automation of configs/automation.yaml tells of runs that need a look, and of no others."""

import json
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path
from typing import Any

import pytest

from tasks.simulator import Latency, Rule

pytestmark = [pytest.mark.slow, pytest.mark.timeout(600)]

NOBODY = "00000000-0000-0000-0000-000000000000"
BLOCK = """
import sys
from prefect.blocks.notifications import CustomWebhookNotificationBlock
said = {"subject": "{{subject}}", "body": "{{body}}"}
block = CustomWebhookNotificationBlock(name="somebody", url=sys.argv[1], json_data=said)
print(block.save("somebody"))
"""


@pytest.fixture
def told() -> Iterator[tuple[str, list[dict[str, str]]]]:
    """The address of somebody who is told, and what they were told."""
    said = list[dict[str, str]]()

    class Somebody(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            said.append(json.loads(self.rfile.read(int(self.headers["content-length"]))))
            self.send_response(204)
            self.end_headers()

        def log_message(self, *_: Any) -> None:
            return

    with HTTPServer(("127.0.0.1", 0), Somebody) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{server.server_port}", said
        server.shutdown()


def test_somebody_is_told_of_runs_that_need_a_look_and_of_no_others(
    served: Any, birds: Any, told: tuple[str, list[dict[str, str]]], tmp_path: Path
) -> None:
    address, said = told
    text = (served.project / "configs" / "automation.yaml").read_text(encoding="utf-8")
    assert text.count(NOBODY) == 1
    ours = tmp_path / "automation.yaml"
    block = subprocess.run(
        [sys.executable, "-c", BLOCK, address],
        env=served.environment, check=True, capture_output=True, text=True,
    ).stdout.strip()  # fmt: skip
    ours.write_text(text.replace(NOBODY, block), encoding="utf-8")
    served.prefect("automation", "create", "--from-file", str(ours))
    time.sleep(5)  # the server takes note of a new automation aside

    birds.simulator.change(latency=Latency())
    birds.write(6)
    clean = served.ended("reindex/ad-hoc", config=str(birds.config))
    assert clean["state_name"] == "Completed"
    birds.simulator.add(Rule(status=400, marker="number 7"))
    birds.write(12)
    quarantined = served.ended("reindex/ad-hoc", config=str(birds.config))
    assert quarantined["state_name"] == "Quarantined", quarantined["state"]
    failed = served.ended("reindex/ad-hoc", config=str(tmp_path / "none.yaml"))
    assert failed["state_name"] == "Failed"

    served.wait_for(lambda: len(said) >= 2)
    time.sleep(5)  # nobody is told of the clean one, however late
    assert sorted(each["subject"] for each in said) == sorted(
        [
            f"embed-once: {quarantined['name']}: Quarantined",
            f"embed-once: {failed['name']}: Failed",
        ]
    )
    bodies = "\n".join(each["body"] for each in said)
    assert failed["state"]["message"] in bodies
    assert f"/runs/flow-run/{quarantined['id']}" in bodies
