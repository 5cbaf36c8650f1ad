"""Addresses: the paths, object stores and APIs that a config names, written one way only."""

from pathlib import Path
from typing import Annotated
from urllib.parse import urlsplit

from pydantic import AfterValidator, Field, ValidationInfo

from tasks.storage import SCHEMES


def _at_home(path: str, info: ValidationInfo) -> str:
    """`path` made absolute from the project folder."""
    if "://" in path and not path.startswith("file://"):
        raise ValueError(
            "only source.path, index.uri and state.uri may be in object storage; name a local path"
        )
    base = (info.context or {}).get("base", Path.cwd())
    try:
        return str((Path(base) / Path(path.removeprefix("file://")).expanduser()).resolve())
    except RuntimeError as error:  # of a user who does not exist
        raise ValueError(str(error)) from None


def _at_home_or_stored(uri: str, info: ValidationInfo) -> str:
    """The address of an object store, written one way only, or a path as in `_at_home`."""
    scheme, separator, rest = uri.partition("://")
    if not separator or scheme == "file":
        return _at_home(uri, info)
    if scheme not in SCHEMES:
        known = ", ".join(f"{each}://" for each in SCHEMES)
        raise ValueError(f"name a local folder or an address that begins with {known}")
    parts = [part for part in rest.split("/") if part]
    if not parts or rest.startswith("/") or {".", ".."} & set(parts) or set("@?#") & set(rest):
        raise ValueError(
            f"write {scheme}://bucket/prefix; keys and endpoint come from the environment"
        )
    return f"{scheme}://{'/'.join(parts)}"


LocalPath = Annotated[str, Field(min_length=1), AfterValidator(_at_home)]
"""A path on this machine, absolute once it is validated."""

StoragePath = Annotated[str, Field(min_length=1), AfterValidator(_at_home_or_stored)]
"""The same, or the address of a place in an object store, such as `s3://bucket/prefix`."""


def folder_or_name(model: str, info: ValidationInfo) -> str:
    """The absolute path of a folder, or `model` as it stands: a name on a hub of models.

    What is written like a path, or is a folder, is a path; `owner/name` may be either.
    """
    path = _at_home(model, info)
    written_as_path = model.startswith(("/", "./", "../", "~", "file://")) or model in {".", ".."}
    return path if written_as_path or Path(path).is_dir() else model


def _address(url: str) -> str:
    """`url`, if it can be the address of an API and holds no secret."""
    parts = urlsplit(url)
    if parts.scheme not in {"http", "https"} or not parts.hostname:
        raise ValueError("write an address such as https://api.voyageai.com/v1")
    if parts.username or parts.password or parts.query:
        raise ValueError("an address holds no user, password or key")
    return url.rstrip("/")


HttpAddress = Annotated[str, AfterValidator(_address)]
"""Address of an API, without a slash at its end."""
