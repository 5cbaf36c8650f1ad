"""Patterns: which documents of a folder the config, git and a narrower run take.

The same on a disk and in a bucket. Names are relative to the source, a folder's ends in "/".
"""

import contextlib
import re
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import PurePosixPath
from typing import Self, TypeVar

from pathspec import PathSpec
from pathspec.patterns.gitignore.basic import GitIgnoreBasicPattern
from pathspec.patterns.gitignore.spec import GitIgnoreSpecPattern

from tasks.errors import SettingsError

_Pattern = TypeVar("_Pattern", GitIgnoreBasicPattern, GitIgnoreSpecPattern)

_VERSION_CONTROL = frozenset({".git", ".hg", ".svn"})


@dataclass(frozen=True)
class Rules:
    """The patterns of one ignore file.

    Attributes:
        patterns: Those of one file, a later one overruling an earlier one.
        above: Where the source lies below the file's folder, say "src/docs/".
        below: Length of the file's folder's name where it lies below the source.
    """

    patterns: Sequence[GitIgnoreSpecPattern]
    above: str = ""
    below: int = 0

    @classmethod
    def read(cls, data: bytes, above: str = "", below: int = 0) -> "Rules":
        """The patterns in an ignore file of these bytes; git passes over bad lines."""
        patterns = []
        for line in data.decode(errors="surrogateescape").removeprefix("\ufeff").split("\n"):
            with contextlib.suppress(ValueError):
                patterns.append(_pattern(GitIgnoreSpecPattern, line))
        return cls(patterns, above, below)

    def decide(self, name: str) -> bool | None:
        """Whether `name` (a folder's ends in "/") is ignored; None where no pattern speaks.

        A folder's verdict is not its children's: who walks never enters an ignored one.
        """
        path = self.above + name[self.below :]
        for pattern in reversed(self.patterns):
            if pattern.regex is not None and _matches(pattern.regex, path):
                return pattern.include
        return None


def _matches(regex: re.Pattern[str], path: str) -> bool:
    """Whether `regex` means `path` itself, not just a folder above it.

    pathspec marks the slash after a matched folder with the only group of its expressions.
    """
    own = regex.search(path.removesuffix("/"))
    if own is not None and own.lastgroup is None:
        return True
    return path.endswith("/") and any(
        found.lastgroup is not None and found.end(found.lastgroup) == len(path)
        for found in regex.finditer(path)
    )


@dataclass(frozen=True)
class Sieve:
    """What of a folder is part of the corpus.

    Attributes:
        include: Patterns as in .gitignore for what is listed, a later one overruling.
        exclude: Patterns as in .gitignore for what is not.
        respect_gitignore: Whether the ignore files of git count too.
        narrow: Only this document, or what lies below this folder.
    """

    include: Sequence[str]
    exclude: Sequence[str]
    respect_gitignore: bool
    narrow: str | None = None

    def narrowed(self, path: object, is_there: Callable[[str], bool]) -> Self:
        """The same with `narrow` as documents are named, None where it takes nothing away.

        Args:
            path: The source, for messages.
            is_there: Whether there is a document or folder of that name.

        Raises:
            SettingsError: `narrow` is no path below the source, or there is nothing.
        """
        if self.narrow is None:
            return self
        asked = PurePosixPath(self.narrow)
        if asked.is_absolute() or ".." in asked.parts:
            raise SettingsError(
                f"narrow: {self.narrow!r} must be a path below source.path ({path})."
            )
        if asked == PurePosixPath():
            return replace(self, narrow=None)
        if not is_there(asked.as_posix()):
            raise SettingsError(f"narrow: there is no {self.narrow!r} below source.path ({path}).")
        return replace(self, narrow=asked.as_posix())

    def require_patterns(self) -> None:
        """Refuse patterns that are none.

        Raises:
            SettingsError: Naming the pattern.
        """
        _ = self._included, self._excluded

    def leaves_out(self, name: str, ignored: Sequence[Rules]) -> bool:
        """Whether the document or folder `name` is not part of the corpus.

        Args:
            name: Its folders are part of it.
            ignored: Of the ignore files that count here, the ones that count least first.
        """
        if not name:
            return False
        if name.removesuffix("/").rpartition("/")[2] in _VERSION_CONTROL:
            return True
        if not self._is_near(name) or self._excluded.decide(name):
            return True
        verdicts = (rules.decide(name) for rules in reversed(ignored))
        if next((verdict for verdict in verdicts if verdict is not None), False):
            return True
        return not name.endswith("/") and not self._included.match_file(name)

    def _is_near(self, name: str) -> bool:
        """Whether `name` is, leads to, or lies below what the run is narrowed to."""
        if self.narrow is None:
            return True
        bare = name.removesuffix("/")
        return f"{bare}/".startswith(f"{self.narrow}/") or (
            name.endswith("/") and f"{self.narrow}/".startswith(name)
        )

    @cached_property
    def _included(self) -> PathSpec[GitIgnoreBasicPattern]:
        return PathSpec(_compiled(GitIgnoreBasicPattern, self.include, "source.include"))

    @cached_property
    def _excluded(self) -> Rules:
        return Rules(_compiled(GitIgnoreSpecPattern, self.exclude, "source.exclude"))


def _compiled(kind: Callable[..., _Pattern], patterns: Iterable[str], key: str) -> list[_Pattern]:
    compiled = []
    for pattern in patterns:
        try:
            compiled.append(_pattern(kind, pattern))
        except ValueError:
            raise SettingsError(f"{key}: {pattern!r} is no pattern as in .gitignore.") from None
    return compiled


def _pattern(kind: Callable[..., _Pattern], line: str) -> _Pattern:
    """The pattern in `line`, for names that may hold line feeds: pathspec's stops at them."""
    pattern = kind(line)
    if pattern.regex is None:
        return pattern
    whole = re.sub(r"\$(\)?)$", r"\\Z\1", pattern.regex.pattern)
    return kind(re.compile(whole, re.DOTALL), pattern.include)
