"""Models of sentence-transformers in this process: loaded once, and what they run on.

Torch takes seconds to import and a model takes more to load, so this module imports neither
before a model is asked for.
"""

import functools
import importlib.util
import threading
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from tasks.errors import SettingsError
from tasks.providers.parts import Budget

if TYPE_CHECKING:
    from sentence_transformers import SentenceTransformer

CPU_BUDGET = 2048
"""Padded tokens encoded at once on a processor. It is busy with one text already: more at once
only adds padding and leaves the cache, so that 32 texts at once are slower than 8."""

GPU_BUDGET = 65_536
"""The same on a GPU, which idles over small batches and is short of nothing but memory; what
does not fit is halved."""

_EXTRA = "sentence-transformers"

_BACKENDS = {"onnx": ("optimum", "onnxruntime"), "openvino": ("optimum", "openvino")}
"""What a backend needs that the library does not bring along."""

_HINTS = {"float32": "f32", "float16": "f16", "bfloat16": "bf16"}
"""How OpenVINO calls a precision."""


@dataclass(frozen=True)
class Setup:
    """Which model runs how. A value: it names a loaded model in this process.

    Attributes:
        source: Its folder, or its name on the hub.
        revision: Its commit on the hub; None of a folder.
        digest: Of a folder's files; None of a model on the hub.
        device: As in the config.
        backend: As in the config.
        precision: As in the config.
    """

    source: str
    revision: str | None
    digest: str | None
    device: str | None
    backend: str
    precision: str | None


class Running:
    """A loaded model.

    Attributes:
        model: The library's own object.
        dimension: Length of its vectors.
        budget: How much it encodes at once.
        turn: Held by who encodes: torch takes all cores by itself.
    """

    def __init__(self, model: "SentenceTransformer", dimension: int) -> None:
        self.model = model
        self.dimension = dimension
        self.budget = Budget(CPU_BUDGET if model.device.type == "cpu" else GPU_BUDGET)
        self.turn = threading.Lock()


_lock = threading.Lock()
_running: dict[Setup, Running] = {}


def running_model(setup: Setup) -> Running:
    """The model of `setup`, loaded by who asks first; for many threads at once.

    Raises:
        SettingsError: It cannot be loaded, or there is no such device.
    """
    with _lock:
        if setup not in _running:
            _running[setup] = _loaded(setup)
        return _running[setup]


def require_installed(setup: Setup) -> None:
    """Fail early where the library, or what the backend needs, is not installed.

    Raises:
        SettingsError: What is missing and how to install it; or the backend does not go with
            device or precision.
    """
    backend = setup.backend
    if importlib.util.find_spec("sentence_transformers") is None:
        raise SettingsError(
            "embedding.provider: 'sentence-transformers' is not installed. Install it with "
            f"`pip install 'embed-once[{_EXTRA}]'`, or in a clone with `uv sync --extra {_EXTRA}`; "
            "on a machine without a GPU install a CPU build of torch first."
        )
    missing = [name for name in _BACKENDS.get(backend, ()) if not importlib.util.find_spec(name)]
    if missing:
        raise SettingsError(
            f"embedding.backend: {backend!r} needs {' and '.join(missing)}. Install the library's "
            f"own extra: `pip install 'sentence-transformers[{backend}]'`."
        )
    if backend != "torch" and setup.device not in {None, "cpu"}:
        raise SettingsError(
            f"embedding.device: {backend!r} runs on the processor here, not on {setup.device!r}. "
            "Leave device out, or set embedding.backend to torch."
        )
    if backend == "onnx" and setup.precision not in {None, "float32"}:
        raise SettingsError(
            "embedding.precision: 'onnx' computes in the precision its file was exported in. "
            "Leave it out, or set embedding.backend to openvino or torch."
        )


def _loaded(setup: Setup) -> Running:
    require_installed(setup)
    try:
        from sentence_transformers import SentenceTransformer  # noqa: PLC0415 - takes seconds
        from transformers.utils import logging  # noqa: PLC0415
    except Exception as error:  # packages that do not fit each other fail in many ways
        raise SettingsError(
            "embedding.provider: 'sentence-transformers' is installed but cannot be imported. "
            f"Python says: {_first_line(error)}"
        ) from error
    _require_device(setup.device)
    logging.disable_progress_bar()
    load = functools.partial(
        SentenceTransformer,
        setup.source,
        device=setup.device or (None if setup.backend == "torch" else "cpu"),
        revision=setup.revision,
        backend=setup.backend,
        model_kwargs=_options(setup),
    )
    try:
        try:
            model = load(local_files_only=True)
        except Exception:
            if setup.revision is None:
                raise
            model = load()  # its weights are not in the hub's cache yet
        size = model.encode(["a"], prompt="", show_progress_bar=False).shape[1]
    except Exception as error:  # models and backends promise no class of errors
        raise SettingsError(
            f"embedding.model: {setup.source} cannot be loaded for {setup.backend} on "
            f"{setup.device or 'the best device'}. The library says: {_first_line(error)}"
        ) from error
    return Running(model, size)


def _options(setup: Setup) -> dict[str, Any]:
    """What the model is loaded with, by its backend."""
    import torch  # noqa: PLC0415 - loaded by now

    if setup.backend == "torch":
        return {"dtype": getattr(torch, setup.precision) if setup.precision else "auto"}
    if setup.backend == "onnx":
        return {"provider": "CPUExecutionProvider"}
    # Without a hint the processor decides, and another machine makes other vectors.
    return {"ov_config": {"INFERENCE_PRECISION_HINT": _HINTS[setup.precision or "float32"]}}


def _require_device(device: str | None) -> None:
    import torch  # noqa: PLC0415 - loaded by now

    if device is None or device == "cpu":
        return
    kind, _, number = device.partition(":")
    if kind == "mps":
        here = torch.backends.mps.is_available()
    else:
        here = torch.cuda.is_available() and int(number or 0) < torch.cuda.device_count()
    if not here:
        raise SettingsError(
            f"embedding.device: torch {torch.__version__} finds no {device!r} on this machine. "
            "Leave it out for the best device there is."
        )


def _first_line(error: Exception) -> str:
    lines = str(error).strip().splitlines() or [type(error).__name__]
    return lines[0][:300]
