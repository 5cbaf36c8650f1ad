"""What a model of sentence-transformers says of itself, read from its files without loading it.

A plan needs the length of its vectors, its longest text, its prompts and its tokenizer. All of
that stands in small JSON files, so that neither torch nor the weights are touched.
"""

import functools
import hashlib
import json
import os
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tasks.errors import SettingsError

EXAMPLE = "sentence-transformers/all-MiniLM-L6-v2"

_SMALL_FILES = ["*.json", "*/*.json"]
"""What a plan may download of a model on the hub."""

_OWNER = "sentence-transformers"
"""Whose models the library finds without an owner's name."""

_MODEL_FILES = {
    *{".json", ".txt", ".model", ".py"},
    *{".safetensors", ".bin", ".pt", ".onnx", ".onnx_data", ".xml"},
}
"""Endings of the files that decide about vectors; documents and pictures do not."""

_FOLDERS = {"onnx", "openvino"}
"""Where a model keeps its files for a backend, named like it."""

_BLOCK, _BLOCKS = 4096, 4096
"""Of a larger file so many blocks, evenly spread, so many bytes each, make its digest."""

_SIZES = ("hidden_size", "d_model", "dim", "n_embd")
"""How configs of transformers call the length of their vectors."""

_ENDLESS = 1_000_000
"""A longest text from here on is none: tokenizers without one say 10^30."""


@dataclass(frozen=True)
class ModelFolder:
    """A model and what is known of it. A value: it pickles.

    Attributes:
        source: The folder, or the model's name on the hub: what the library loads.
        name: For people: the folder's name, or the name on the hub.
        revision: Of a folder a digest of its files, of a model on the hub its commit.
        on_hub: Whether `source` is a name on the hub.
        dimension: Length of its vectors; None where its files do not say.
        longest: Tokens of its longest text, of which more is cut off; None where any length goes.
        tokenizer: Its tokenizer.json; None where there is none.
        document_prompt: What stands before a text that is found.
        query_prompt: What stands before a text that is searched with.
    """

    source: str
    name: str
    revision: str
    on_hub: bool
    dimension: int | None
    longest: int | None
    tokenizer: str | None
    document_prompt: str = ""
    query_prompt: str = ""


def read_model(model: str, backend: str = "torch") -> ModelFolder:
    """The model that `embedding.model` names.

    Args:
        model: An absolute path of a folder; or a name on the hub, with "@revision" or without.
            The hub's cache on this machine is looked at first, so that a model stays the one
            it was; only what is not there is asked for.
        backend: What will run it: files that only another backend reads are not looked at.

    Raises:
        SettingsError: There is no such model, or no files of one in the folder.
    """
    if Path(model).is_absolute():
        folder, name, revision = Path(model), Path(model).name, ""
        if not folder.is_dir():
            raise SettingsError(
                f"embedding.model: there is no folder {model}. Name a folder with a model of "
                f"sentence-transformers, or one on the Hugging Face hub, say {EXAMPLE}."
            )
    else:
        folder, name = _on_hub(model)
        revision = folder.name
    modules = _modules(folder)
    longest = _longest(folder, modules)
    settings = _read(folder / "config_sentence_transformers.json")
    document, query = _prompts(settings)
    cut = settings.get("truncate_dim")
    found = _dimension(folder, modules)
    return ModelFolder(
        source=name if revision else str(folder),
        name=name,
        revision=revision or _digest(folder, backend),
        on_hub=bool(revision),
        dimension=min(found, cut) if found and cut else found,
        longest=longest,
        tokenizer=_tokenizer(folder, modules),
        document_prompt=document,
        query_prompt=query,
    )


def _on_hub(model: str) -> tuple[Path, str]:
    """The folder of a hub's model in the cache on this machine, and its whole name."""
    # Loaded late: a folder needs no hub.
    from huggingface_hub import snapshot_download  # noqa: PLC0415
    from huggingface_hub.errors import LocalEntryNotFoundError  # noqa: PLC0415

    name, _, revision = model.partition("@")
    name = name if "/" in name else f"{_OWNER}/{name}"
    if not re.fullmatch(r"[\w.-]+/[\w.-]+", name):
        raise SettingsError(
            f"embedding.model: {model!r} is no folder, and no name that a model on the Hugging "
            f"Face hub can have. Write a name such as {EXAMPLE}, or the path of a folder."
        )
    find = functools.partial(
        snapshot_download,
        name,
        revision=revision or None,
        cache_dir=os.environ.get("SENTENCE_TRANSFORMERS_HOME"),
        allow_patterns=_SMALL_FILES,
    )
    try:
        folder = Path(find(local_files_only=True))
        if any((folder / file).is_file() for file in ("modules.json", "config.json")):
            return folder, name
    except LocalEntryNotFoundError:
        pass  # then it is asked for
    try:
        return Path(find()), name
    except Exception as error:  # the hub's client promises no class of errors
        raise SettingsError(
            f"embedding.model: {model!r} is no folder here and not in the hub's cache on this "
            f"machine, and the Hugging Face hub does not give it ({type(error).__name__}). See "
            "that the name is right, that this machine reaches the hub, and that HF_TOKEN is set "
            "where the model asks for one; or name a folder."
        ) from error


def _modules(folder: Path) -> Sequence[tuple[str, Path]]:
    """Kind and folder of each part of a model, in the order a text passes through them."""
    file = folder / "modules.json"
    if file.is_file():
        try:
            return [
                (str(module["type"]).rpartition(".")[2], folder / module.get("path", ""))
                for module in _read_json(file)
            ]
        except (TypeError, KeyError, AttributeError):
            raise SettingsError(f"{file} does not list a model's parts as it should.") from None
    if (folder / "config.json").is_file():  # of a plain transformer: the library adds a mean
        return [("Transformer", folder)]
    raise SettingsError(
        f"embedding.model: {folder} holds no model of sentence-transformers: neither modules.json "
        "nor config.json is there. Save one with `SentenceTransformer(…).save_pretrained(folder)`."
    )


def _dimension(folder: Path, modules: Sequence[tuple[str, Path]]) -> int | None:
    """Length of the vectors: what the last part says that says anything."""
    for kind, place in reversed(modules):
        settings = _read(place / "config.json")
        found: object = None
        if kind == "Dense":
            found = settings.get("out_features")
        elif kind == "Pooling":
            size = settings.get("embedding_dimension", settings.get("word_embedding_dimension"))
            found = size * _poolings(settings) if isinstance(size, int) else None
        elif kind == "Transformer":
            text = settings.get("text_config", settings)
            found = next((text[size] for size in _SIZES if size in text), None)
        elif kind not in {"Normalize", "Dropout"}:
            return None
        if isinstance(found, int):
            return found
    return None


def _poolings(settings: dict[str, Any]) -> int:
    """How many vectors of a pooling stand side by side."""
    mode = settings.get("pooling_mode")
    if mode is not None:
        return 1 if isinstance(mode, str) else len(mode)
    return max(1, sum(settings[key] is True for key in settings if key.startswith("pooling_mode_")))


def _longest(folder: Path, modules: Sequence[tuple[str, Path]]) -> int | None:
    """Tokens after which the library cuts a text off, marks of begin and end included."""
    place = modules[0][1] if modules else folder
    for file in sorted(place.glob("sentence_*_config.json")):
        if longest := _read(file).get("max_seq_length"):
            return int(longest)
    said = (
        _read(place / "tokenizer_config.json").get("model_max_length"),
        _read(place / "config.json").get("max_position_embeddings"),
    )
    known = [int(one) for one in said if isinstance(one, int | float) and 0 < one < _ENDLESS]
    return min(known, default=None)


def _tokenizer(folder: Path, modules: Sequence[tuple[str, Path]]) -> str | None:
    places = [place for _, place in modules[:1]] + [folder]
    files = (place / "tokenizer.json" for place in places)
    return next((str(file) for file in files if file.is_file()), None)


def _prompts(settings: dict[str, Any]) -> tuple[str, str]:
    """What the model's makers put before a document and before a query, "" for nothing."""
    prompts = settings.get("prompts") or {}
    default = settings.get("default_prompt_name")

    def first(*names: str | None) -> str:
        return next((str(prompts[name]) for name in names if prompts.get(name) is not None), "")

    return first("document", "passage", "corpus", default), first("query", default)


def _read(file: Path) -> dict[str, Any]:
    """The JSON object in `file`, empty where there is no such file."""
    found = _read_json(file) if file.is_file() else {}
    if not isinstance(found, dict):
        raise SettingsError(f"embedding.model: {file} should hold keys and values.")
    return found


def _read_json(file: Path) -> Any:
    try:
        return json.loads(file.read_text(encoding="utf-8"))
    except OSError as error:
        raise SettingsError(f"embedding.model: {file} cannot be read: {error.strerror}.") from None
    except ValueError:
        raise SettingsError(f"embedding.model: {file} is not valid JSON.") from None


def _digest(folder: Path, backend: str) -> str:
    """A digest of the files that decide about vectors, the same wherever the folder lies.

    Another training of the same model has files of the same names and lengths. It differs in
    all its weights, so that a part of a large file tells it from this one.
    """
    files = []
    for parent, folders, names in os.walk(folder):
        others = _FOLDERS - {backend}
        folders[:] = sorted(each for each in folders if each not in others and each[0] != ".")
        files += [Path(parent, name) for name in sorted(names) if Path(name).suffix in _MODEL_FILES]
    try:
        stats = [file.stat() for file in files]
        signature = tuple(
            (str(file.relative_to(folder)), each.st_size, each.st_mtime_ns)
            for file, each in zip(files, stats, strict=True)
        )
        return _digest_of(folder, signature)
    except OSError as error:
        raise SettingsError(
            f"embedding.model: {error.filename} cannot be read: {error.strerror}."
        ) from None


@functools.lru_cache(maxsize=32)
def _digest_of(folder: Path, signature: tuple[tuple[str, int, int], ...]) -> str:
    digest = hashlib.blake2b(digest_size=6)
    for name, size, _ in signature:
        digest.update(f"{name}\0{size}\0".encode())
        with (folder / name).open("rb", buffering=0) as file:
            if size <= _BLOCK * _BLOCKS:
                digest.update(file.readall())
                continue
            for block in range(_BLOCKS):
                file.seek(block * (size - _BLOCK) // (_BLOCKS - 1))
                digest.update(file.read(_BLOCK))
    return digest.hexdigest()
