"""A quick start for commands that must answer at once.

`import lancedb` takes about 2.7 s, and two thirds of it are things that a search of a local
table never touches: pandas, which `pyarrow.dataset` imports to see whether it is there, and
the REST client of LanceDB's remote catalogs. Here they are left out for this process.
"""

import gc
import importlib
import sys
import types
from collections.abc import Sequence
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec

REST_CLIENT = "lance_namespace_urllib3_client.api"


def import_lancedb() -> None:
    """Import lancedb without pandas and REST client; only for a process that needs neither.

    In such a process pyarrow and LanceDB cannot convert to pandas.
    """
    if "lancedb" in sys.modules:
        return
    gc.disable()  # a collection during imports frees nothing and costs 0.3 s
    leave_out = _LeaveOut()
    sys.meta_path.insert(0, leave_out)
    try:
        leave_out.pandas = True
        importlib.import_module("pyarrow.dataset")

        leave_out.pandas = False
        importlib.import_module("lancedb")
    finally:
        sys.meta_path.remove(leave_out)
        gc.enable()


class _LeaveOut(MetaPathFinder):
    """An import hook: pandas is not there, and the REST client is empty."""

    pandas = False

    def find_spec(
        self, name: str, _path: Sequence[str] | None, _target: types.ModuleType | None = None
    ) -> ModuleSpec | None:
        if name == "pandas" and self.pandas:
            raise ModuleNotFoundError("left out of a quick start", name="pandas")
        if name == REST_CLIENT or name.startswith(REST_CLIENT + "."):
            return ModuleSpec(name, _EmptyLoader(), is_package=True)
        return None


class _EmptyLoader(Loader):
    def create_module(self, spec: ModuleSpec) -> types.ModuleType:
        return _EmptyModule(spec.name)

    def exec_module(self, module: types.ModuleType) -> None:
        """Nothing to run."""


class _EmptyModule(types.ModuleType):
    """Has any name that is asked of it, each an empty class."""

    def __getattr__(self, name: str) -> type:
        if name.startswith("__"):
            raise AttributeError(name)
        return type(name, (), {})
