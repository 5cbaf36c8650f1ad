"""LanceDB's REST client is imported by who uses it, and then it is whole."""

import gc
import subprocess
import sys

import pytest

from tasks.quick import nothing_collected

START = """
import sys
import tasks
import lancedb
loaded = lambda: any(name.startswith("lance_namespace_urllib3_client.api") for name in sys.modules)
assert not loaded()
"""
END = """
import lance_namespace_urllib3_client as client
assert client.DataApi.__module__ == "lance_namespace_urllib3_client.api.data_api"
assert client.rest.__name__ == "lance_namespace_urllib3_client.rest" and client.ApiClient
assert loaded() and client.__version__ and not hasattr(client, "no_such_name")
"""


@pytest.mark.slow
@pytest.mark.parametrize(
    "first",
    [
        "",
        "from lance_namespace_urllib3_client import __version__",
        "from lance_namespace_urllib3_client.api.table_api import TableApi",
        "import lance_namespace_urllib3_client.api_client",
    ],
)
def test_the_rest_client_of_lancedb_is_imported_when_it_is_used(first: str) -> None:
    done = subprocess.run(
        [sys.executable, "-c", f"{START}\n{first}\n{END}"],
        check=False,
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 0, done.stderr


def test_garbage_is_looked_for_again_once_all_is_imported() -> None:
    before = gc.get_freeze_count()
    try:
        with nothing_collected():
            assert not gc.isenabled()
        assert gc.isenabled()
        assert gc.get_freeze_count() > before
    finally:
        gc.unfreeze()
