"""The versions pinned in pyproject.toml are those that are installed, all of them."""

import re
import tomllib
from importlib.metadata import distributions
from pathlib import Path

from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

PROJECT = Path(__file__).parents[1]
UNPINNED = re.compile(r"torch|triton|nvidia-.+|cuda-.+")
"""Builds of torch, and what they need: .ci/pins leaves them to the machine."""
TOOLS = {"embed-once", "pip", "setuptools", "wheel", "uv"}
REMEDY = "run `python .ci/pins` and commit pyproject.toml"


def pinned() -> dict[str, str]:
    """Version by name, for this Python and platform."""
    settings = tomllib.loads((PROJECT / "pyproject.toml").read_text(encoding="utf-8"))
    requirements = map(Requirement, settings["tool"]["uv"]["constraint-dependencies"])
    return {
        canonicalize_name(requirement.name): str(requirement.specifier).removeprefix("==")
        for requirement in requirements
        if requirement.marker is None or requirement.marker.evaluate()
    }


def installed() -> dict[str, str]:
    found = {canonicalize_name(item.metadata["Name"]): item.version for item in distributions()}
    return {
        name: version
        for name, version in found.items()
        if name not in TOOLS and not UNPINNED.fullmatch(name)
    }


def test_what_is_installed_is_pinned() -> None:
    pins = pinned()
    differing = {
        name: (version, pins.get(name))
        for name, version in installed().items()
        if pins.get(name) != version
    }
    assert differing == {}, f"installed and pinned versions differ: {REMEDY}"


def test_nothing_committed_names_a_package_registry() -> None:
    host = re.compile(r"https?://[^\s\"']*(pypi|pythonhosted|registry\.npmjs)[^\s\"']*")
    named = [
        file.name
        for file in [*PROJECT.glob("*.toml"), *PROJECT.glob("*.yaml"), PROJECT / ".ci" / "run"]
        if host.search(file.read_text(encoding="utf-8"))
    ]
    assert named == []
