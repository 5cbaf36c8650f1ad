"""Listing: the documents of a folder, less what git, the config and we ourselves leave out."""

import contextlib
import os
import re
import stat
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

from pathspec import PathSpec
from pathspec.patterns.gitignore.basic import GitIgnoreBasicPattern
from pathspec.patterns.gitignore.spec import GitIgnoreSpecPattern

from tasks.errors import SettingsError
from tasks.read import ReadNotes

_Pattern = TypeVar("_Pattern", GitIgnoreBasicPattern, GitIgnoreSpecPattern)

_VERSION_CONTROL = frozenset({".git", ".hg", ".svn"})

CHANGED = "changed while it was read"
"""What was listed, but was gone or something else by the time it was opened; the next run sees."""


@dataclass(frozen=True)
class _Rules:
    """The patterns of one ignore file.

    Attributes:
        patterns: Those of one file, a later one overruling an earlier one.
        above: Where the source lies below the file's folder, say "src/docs/".
        below: Length of the file's folder's name where it lies below the source.
    """

    patterns: Sequence[GitIgnoreSpecPattern]
    above: str = ""
    below: int = 0

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
class _Entry:
    """What a folder holds; the name is relative to the source, a folder's ends in "/"."""

    name: str
    rules: tuple[_Rules, ...]
    trouble: str | None = None


@dataclass(frozen=True)
class Tree:
    """The documents below a folder.

    Attributes:
        root: The folder, absolute and without links.
        include: Patterns as in .gitignore for what is listed, a later one overruling.
        exclude: Patterns as in .gitignore for what is not.
        respect_gitignore: Whether the ignore files of git count too.
        skip_paths: Files and folders that are never listed.
        narrow: List only this document, or what lies below this folder.
    """

    root: Path
    include: Sequence[str]
    exclude: Sequence[str]
    respect_gitignore: bool
    skip_paths: frozenset[Path] = frozenset()
    narrow: str | None = None

    def documents(self, notes: ReadNotes) -> Iterator[str]:
        """Names of the documents, POSIX paths below the root, sorted.

        Raises:
            SettingsError: The root cannot be listed, or a pattern is none.
        """
        include = PathSpec(_compiled(GitIgnoreBasicPattern, self.include, "source.include"))
        exclude = _Rules(_compiled(GitIgnoreSpecPattern, self.exclude, "source.exclude"))
        waiting = [_Entry("", self._rules_above())]
        while waiting:
            entry = waiting.pop()
            if self._is_left_out(entry, include, exclude):
                continue
            trouble = _name_trouble(entry.name) or entry.trouble
            if trouble is not None:
                _note(notes, trouble, entry.name)
            elif entry.name and not entry.name.endswith("/"):
                yield entry.name
            else:
                waiting += reversed(self._children(entry, notes))

    def _is_left_out(
        self, entry: _Entry, include: PathSpec[GitIgnoreBasicPattern], exclude: _Rules
    ) -> bool:
        """Whether `entry` is not part of the corpus, which is nothing to tell of."""
        name = entry.name
        if not name:
            return False
        if not self._is_near(name) or exclude.decide(name):
            return True
        verdicts = (rules.decide(name) for rules in reversed(entry.rules))
        if next((verdict for verdict in verdicts if verdict is not None), False):
            return True
        return not name.endswith("/") and not include.match_file(name)

    def _is_near(self, name: str) -> bool:
        """Whether `name` is, leads to, or lies below what the run is narrowed to."""
        if self.narrow is None:
            return True
        bare = name.removesuffix("/")
        return f"{bare}/".startswith(f"{self.narrow}/") or (
            name.endswith("/") and f"{self.narrow}/".startswith(name)
        )

    def _children(self, folder: _Entry, notes: ReadNotes) -> list[_Entry]:
        """What `folder` holds, in the order in which their documents' names sort."""
        try:
            rules = folder.rules + self._own_rules(folder.name)
            here = self.root / folder.name
            ours = {path.name for path in self.skip_paths if path.parent == here}
            with os.scandir(here) as entries:
                found = [
                    self._entry(entry, folder.name, rules)
                    for entry in entries
                    if entry.name not in _VERSION_CONTROL and entry.name not in ours
                ]
        except OSError as error:
            if not folder.name:
                raise SettingsError(
                    f"source.path: {self.root} cannot be listed: {error.strerror}."
                ) from None
            gone = isinstance(error, FileNotFoundError | NotADirectoryError)
            _note(notes, CHANGED if gone else "unreadable", folder.name)
            return []
        return sorted((entry for entry in found if entry), key=lambda entry: entry.name)

    def _entry(
        self, found: os.DirEntry[str], folder: str, rules: tuple[_Rules, ...]
    ) -> _Entry | None:
        """The entry; None where it is gone, or leads to what is ours."""
        name = folder + found.name
        if found.is_dir(follow_symlinks=False):
            return _Entry(name + "/", rules)
        if found.is_file(follow_symlinks=False):
            return _Entry(name, rules)
        return self._odd_entry(found, name, rules)

    def _odd_entry(
        self, found: os.DirEntry[str], name: str, rules: tuple[_Rules, ...]
    ) -> _Entry | None:
        """What is neither a folder nor a file: a link, a pipe, a device."""
        try:
            mode = found.stat().st_mode
            target = Path(found.path).resolve()
        except FileNotFoundError:
            return _Entry(name, rules, "broken link") if found.is_symlink() else None
        except (OSError, RuntimeError):  # `resolve` calls a loop of links a RuntimeError
            return _Entry(name, rules, "unreadable")
        if not self.skip_paths.isdisjoint((target, *target.parents)):
            return None
        if stat.S_ISDIR(mode):
            return _Entry(name + "/", rules, "link to a folder")
        return _Entry(name, rules, None if stat.S_ISREG(mode) else "special file")

    def _own_rules(self, folder: str) -> tuple[_Rules, ...]:
        if not self.respect_gitignore:
            return ()
        patterns = _ignore_file(self.root / folder / ".gitignore")
        return (_Rules(patterns, below=len(folder)),) if patterns else ()

    def _rules_above(self) -> tuple[_Rules, ...]:
        """Rules of the repository around the root, the ones that count least first."""
        above = (self.root, *self.root.parents)
        top = next((folder for folder in above if (folder / ".git").exists()), None)
        if top is None or not self.respect_gitignore:
            return ()
        parents = [folder for folder in reversed(above) if top in (folder, *folder.parents)]
        files = [(top, top / ".git/info/exclude")]
        files += [(folder, folder / ".gitignore") for folder in parents if folder != self.root]
        rules = []
        for folder, file in files:
            way = self.root.relative_to(folder).as_posix()
            try:
                patterns = _ignore_file(file)
            except OSError as error:
                raise SettingsError(
                    f"{file} cannot be read: {error.strerror}. Make it readable, or set "
                    "source.respect_gitignore to false."
                ) from None
            rules.append(_Rules(patterns, above="" if way == "." else f"{way}/"))
        return tuple(rules)


def contents(path: Path) -> bytes | None:
    """The bytes of the file at `path`; None where there is no file any more.

    A pipe or device that took its place is not waited for.

    Raises:
        OSError: It cannot be read.
    """
    try:
        file = os.open(path, os.O_RDONLY | os.O_NONBLOCK)
    except (FileNotFoundError, NotADirectoryError):
        return None
    if not stat.S_ISREG(os.fstat(file).st_mode):
        os.close(file)
        return None
    with os.fdopen(file, "rb") as opened:
        return opened.read()


def _note(notes: ReadNotes, trouble: str, name: str) -> None:
    if trouble in {CHANGED, "unreadable"}:
        notes.fail(trouble, name)
        return
    notes.skip(trouble, os.fsencode(name).decode(errors="replace"))
    if trouble == "broken link":  # what it led to may come back; until then its rows stay
        notes.unread.append(name)


def _name_trouble(name: str) -> str | None:
    try:
        name.encode()
    except UnicodeEncodeError:
        return "name is not UTF-8"
    return None


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


def _ignore_file(path: Path) -> list[GitIgnoreSpecPattern]:
    """The patterns in the ignore file at `path`, if there is one; git passes over bad lines.

    Raises:
        OSError: There is one, but it cannot be read.
    """
    data = contents(path) or b""
    patterns = []
    for line in data.decode(errors="surrogateescape").removeprefix("\ufeff").split("\n"):
        with contextlib.suppress(ValueError):
            patterns.append(_pattern(GitIgnoreSpecPattern, line))
    return patterns
