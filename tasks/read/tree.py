"""Listing: the documents of a folder, less what git, the config and we ourselves leave out."""

import os
import stat
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from tasks.errors import SettingsError
from tasks.read import ReadNotes
from tasks.read.patterns import Rules, Sieve

CHANGED = "changed while it was read"
"""What was listed, but was gone or something else by the time it was opened; the next run sees."""


@dataclass(frozen=True)
class _Entry:
    """What a folder holds; the name is relative to the source, a folder's ends in "/"."""

    name: str
    rules: tuple[Rules, ...]
    trouble: str | None = None


@dataclass(frozen=True)
class Tree:
    """The documents below a folder.

    Attributes:
        root: The folder, absolute and without links.
        sieve: Which of them.
        skip_paths: Files and folders that are never listed.
    """

    root: Path
    sieve: Sieve
    skip_paths: frozenset[Path] = frozenset()

    def documents(self, notes: ReadNotes) -> Iterator[str]:
        """Names of the documents, POSIX paths below the root, sorted.

        Raises:
            SettingsError: The root cannot be listed, or a pattern is none.
        """
        self.sieve.require_patterns()
        waiting = [_Entry("", self._rules_above())]
        while waiting:
            entry = waiting.pop()
            if self.sieve.leaves_out(entry.name, entry.rules):
                continue
            trouble = _name_trouble(entry.name) or entry.trouble
            if trouble is not None:
                _note(notes, trouble, entry.name)
            elif entry.name and not entry.name.endswith("/"):
                yield entry.name
            else:
                waiting += reversed(self._children(entry, notes))

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
                    if entry.name not in ours
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
        self, found: os.DirEntry[str], folder: str, rules: tuple[Rules, ...]
    ) -> _Entry | None:
        """The entry; None where it is gone, or leads to what is ours."""
        name = folder + found.name
        if found.is_dir(follow_symlinks=False):
            return _Entry(name + "/", rules)
        if found.is_file(follow_symlinks=False):
            return _Entry(name, rules)
        return self._odd_entry(found, name, rules)

    def _odd_entry(
        self, found: os.DirEntry[str], name: str, rules: tuple[Rules, ...]
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

    def _own_rules(self, folder: str) -> tuple[Rules, ...]:
        if not self.sieve.respect_gitignore:
            return ()
        data = _ignore_file(self.root / folder / ".gitignore")
        return (Rules.read(data, below=len(folder)),) if data else ()

    def _rules_above(self) -> tuple[Rules, ...]:
        """Rules of the repository around the root, the ones that count least first."""
        above = (self.root, *self.root.parents)
        top = next((folder for folder in above if (folder / ".git").exists()), None)
        if top is None or not self.sieve.respect_gitignore:
            return ()
        parents = [folder for folder in reversed(above) if top in (folder, *folder.parents)]
        files = [(top, top / ".git/info/exclude")]
        files += [(folder, folder / ".gitignore") for folder in parents if folder != self.root]
        rules = []
        for folder, file in files:
            way = self.root.relative_to(folder).as_posix()
            try:
                data = _ignore_file(file)
            except OSError as error:
                raise SettingsError(
                    f"{file} cannot be read: {error.strerror}. Make it readable, or set "
                    "source.respect_gitignore to false."
                ) from None
            rules.append(Rules.read(data, above="" if way == "." else f"{way}/"))
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


def _ignore_file(path: Path) -> bytes:
    """What stands in the ignore file at `path`; nothing where there is none.

    Raises:
        OSError: There is one, but it cannot be read.
    """
    return contents(path) or b""
