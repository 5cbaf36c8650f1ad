"""A quick start: what `import lancedb` brings along and hardly anybody uses is imported later.

`import lancedb` takes about 2.7 s, and two thirds of it are things that a local table never
touches: the REST client of LanceDB's remote catalogs, and pandas, which `pyarrow.dataset`
imports to see whether it is there.
"""

import gc
import importlib
import importlib.util
import sys
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from importlib.abc import MetaPathFinder
from importlib.machinery import ModuleSpec
from types import ModuleType

REST_CLIENT = "lance_namespace_urllib3_client"
TOLD = {"__version__", "__all__"}
RUNNING = threading.RLock()


def rest_client_when_asked() -> None:
    """Have LanceDB's REST client imported when it is first used; takes 1.8 s off each start.

    Its models, which LanceDB needs, are imported as ever. Does nothing where it is imported
    already or not installed.
    """
    if REST_CLIENT in sys.modules:
        return
    spec = importlib.util.find_spec(REST_CLIENT)
    if spec is not None:
        module = importlib.util.module_from_spec(spec)
        module.__class__ = _WhenAsked
        sys.modules[REST_CLIENT] = module


class _WhenAsked(ModuleType):
    """A package that runs when a name is asked of it that it does not have yet."""

    def __getattr__(self, name: str) -> object:
        spec = self.__spec__
        if spec is None or spec.loader is None or (name.startswith("__") and name not in TOLD):
            raise AttributeError(name)
        if importlib.util.find_spec(f"{self.__name__}.{name}") is not None:
            return importlib.import_module(f"{self.__name__}.{name}")
        with RUNNING:  # other threads wait here, and find the names afterwards
            if name not in vars(self):
                spec.loader.exec_module(self)
                self.__class__ = ModuleType  # type: ignore[assignment]  # from now on as any other
        if name not in vars(self):
            raise AttributeError(f"module {self.__name__!r} has no attribute {name!r}")
        return vars(self)[name]


def import_lancedb() -> None:
    """Import lancedb without pandas; only for a process that does not need it.

    In such a process pyarrow and LanceDB cannot convert to pandas.
    """
    if "lancedb" in sys.modules:
        return
    without = _WithoutPandas()
    with nothing_collected():
        sys.meta_path.insert(0, without)
        try:
            importlib.import_module("pyarrow.dataset")
        finally:
            sys.meta_path.remove(without)
        importlib.import_module("lancedb")


@contextmanager
def nothing_collected() -> Iterator[None]:
    """Look for no garbage during imports, which make little, nor later among what they made.

    With Prefect and LanceDB the looking takes a seventh of the 4 s of their imports.
    """
    looked = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        gc.freeze()
        if looked:
            gc.enable()


class _WithoutPandas(MetaPathFinder):
    """An import hook: pandas is not there."""

    def find_spec(
        self, name: str, _path: Sequence[str] | None, _target: ModuleType | None = None
    ) -> ModuleSpec | None:
        if name == "pandas":
            raise ModuleNotFoundError("left out of a quick start", name="pandas")
        return None
