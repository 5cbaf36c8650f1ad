"""LanceDB's REST client is imported by who uses it, and then it is whole."""

import subprocess
import sys

USED = """
import sys
import tasks
import lancedb
loaded = lambda: any(name.startswith("lance_namespace_urllib3_client.api") for name in sys.modules)
assert not loaded()
import lance_namespace_urllib3_client as client
assert client.DataApi.__module__ == "lance_namespace_urllib3_client.api.data_api"
assert loaded() and client.__version__ and not hasattr(client, "no_such_name")
"""


def test_the_rest_client_of_lancedb_is_imported_when_it_is_used() -> None:
    done = subprocess.run(
        [sys.executable, "-c", USED], check=False, capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 0, done.stderr
