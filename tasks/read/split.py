"""Splitting: one document's text becomes chunks that know their lines.

Code is cut by syntax, Markdown by structure, all else by sentence, each with
semantic-text-splitter. A token counts as four bytes of UTF-8 here: an upper bound that needs no
tokenizer. Everything works with offsets into the document, so text is neither doubled (beyond
the overlap) nor lost.
"""

import functools
import hashlib
import importlib
import importlib.metadata
import itertools
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import PurePosixPath
from typing import NamedTuple

from semantic_text_splitter import CodeSplitter, MarkdownSplitter, TextSplitter
from tree_sitter import Language, Parser

from tasks.params import Split

ALGORITHM = 1
"""Counts up whenever this module cuts the same text in another way."""

BYTES_PER_TOKEN = 4

SECTION = 64 * 1024
"""Longest stretch of characters handed to a parser; some need quadratic time."""

DEEPEST = 256
"""Nesting from which on syntax is no guide: the splitter's time grows with its square and more."""

_GRAMMARS = {
    "bash": ("tree_sitter_bash", "language"),
    "c": ("tree_sitter_c", "language"),
    "c-sharp": ("tree_sitter_c_sharp", "language"),
    "cpp": ("tree_sitter_cpp", "language"),
    "css": ("tree_sitter_css", "language"),
    "go": ("tree_sitter_go", "language"),
    "html": ("tree_sitter_html", "language"),
    "java": ("tree_sitter_java", "language"),
    "javascript": ("tree_sitter_javascript", "language"),
    "kotlin": ("tree_sitter_kotlin", "language"),
    "lua": ("tree_sitter_lua", "language"),
    "php": ("tree_sitter_php", "language_php"),
    "python": ("tree_sitter_python", "language"),
    "ruby": ("tree_sitter_ruby", "language"),
    "rust": ("tree_sitter_rust", "language"),
    "scala": ("tree_sitter_scala", "language"),
    "sql": ("tree_sitter_sql", "language"),
    "tsx": ("tree_sitter_typescript", "language_tsx"),
    "typescript": ("tree_sitter_typescript", "language_typescript"),
}

_ENDINGS = {
    "bash": ".sh .bash .zsh .ksh .bats",
    "c": ".c .h",
    "c-sharp": ".cs .csx",
    "cpp": ".cc .cpp .cxx .c++ .hh .hpp .hxx .h++ .ipp .cu .cuh",
    "css": ".css",
    "go": ".go",
    "html": ".html .htm .xhtml .vue .svelte",
    "java": ".java",
    "javascript": ".js .jsx .mjs .cjs",
    "kotlin": ".kt .kts",
    "lua": ".lua",
    "markdown": ".md .markdown .mdown .mkd .mdx .qmd .rmd",
    "php": ".php .phtml",
    "python": ".py .pyi .pyw",
    "ruby": ".rb .rake .gemspec .ru",
    "rust": ".rs",
    "scala": ".scala .sc .sbt",
    "sql": ".sql",
    "tsx": ".tsx",
    "typescript": ".ts .mts .cts",
}
_KIND_OF_ENDING = {ending: kind for kind, endings in _ENDINGS.items() for ending in endings.split()}
_KIND_OF_NAME = {
    "changelog": "markdown",
    "contributing": "markdown",
    "readme": "markdown",
    "gemfile": "ruby",
    "rakefile": "ruby",
}

_BORDERS = [
    re.compile(pattern) for pattern in (r"\n\r?\n(?=\S)", r"\n(?=\S)", r"\n", r"\s", r"[;,}>。、]")
]
"""Where a section may end, best first."""


_MARKS = re.compile(r"^ {0,3}(?:(?P<fence>```|~~~)|#{1,6}\s)", re.MULTILINE)
"""A heading of Markdown, or the border of a block of code, in which a # is none."""


class Piece(NamedTuple):
    """One chunk of a document.

    Attributes:
        text: Stands in the document word for word; never blank.
        start_line: First line, counted from 1. A line ends with a line feed.
        end_line: Last line, inclusive.
    """

    text: str
    start_line: int
    end_line: int


class _Cut(NamedTuple):
    """A stretch of the document; what lies before `fresh` also stands in the cut before."""

    start: int
    fresh: int
    end: int


def kind_of(path: str) -> str:
    """What the document at `path` is cut as: a language, "markdown" or "text"."""
    name = PurePosixPath(path).name.lower()
    ending = PurePosixPath(name).suffix
    return _KIND_OF_ENDING.get(ending) or _KIND_OF_NAME.get(name, "text")


def size_of(text: str) -> int:
    """Bytes of `text` in UTF-8."""
    return len(text) if text.isascii() else len(text.encode())


@dataclass(frozen=True)
class Splitter:
    """Cuts documents into chunks of at most `split.max_tokens`."""

    split: Split

    @property
    def version(self) -> str:
        """Changes with everything but `split` and the text that decides where cuts fall."""
        return _version()

    @property
    def limit(self) -> int:
        """Most bytes of a chunk."""
        return self.split.max_tokens * BYTES_PER_TOKEN

    def pieces(self, path: str, text: str) -> Iterator[Piece]:
        """Cut `text`, the document at `path`, into chunks in the order of the document.

        Yields:
            Chunks that together hold every character of `text` but white space.
        """
        line, counted = 1, 0
        for cut in self._joined(text, self._cuts(kind_of(path), text)):
            start, end = self._trimmed(text, cut)
            line += text.count("\n", counted, start)
            counted = start
            piece = text[start:end]
            yield Piece(piece, line, line + piece.count("\n"))

    def _cuts(self, kind: str, text: str) -> Iterator[_Cut]:
        """Cuts of the library; none is blank beyond its overlap."""
        # Room for a fragment and for the first line's indentation, which come in addition.
        room = self.limit - self.limit // 16
        overlap = min(self.split.overlap_tokens * BYTES_PER_TOKEN, room - 1)
        covered = 0
        sections = _headed(_sections(text)) if kind == "markdown" else _sections(text)
        for begin, section in sections:
            usable = kind if kind not in _GRAMMARS or _is_shallow(kind, section) else "text"
            for offset, chunk in _engine(usable, room, overlap).chunk_indices(section):
                start, end = begin + offset, begin + offset + len(chunk)
                fresh = max(start, covered)
                if text[fresh:end].strip():
                    yield _Cut(start, fresh, end)
                    covered = end

    def _joined(self, text: str, cuts: Iterator[_Cut]) -> list[_Cut]:
        """Join fragments, say a lone `class A:`, to the next cut, else to the one before."""
        done: list[_Cut] = []
        for cut in cuts:
            if done and self._is_fragment(text, done[-1]):
                joined = self._join(text, done[-1], cut)
                if joined:
                    done[-1] = joined
                    continue
            self._fold_back(text, done)
            done.append(cut)
        self._fold_back(text, done)
        return done

    def _fold_back(self, text: str, done: list[_Cut]) -> None:
        """Join the last cut, if it is still a fragment, to the one before."""
        if len(done) > 1 and self._is_fragment(text, done[-1]):
            joined = self._join(text, done[-2], done[-1])
            if joined:
                done[-2:] = [joined]

    def _is_fragment(self, text: str, cut: _Cut) -> bool:
        return size_of(text[cut.fresh : cut.end].strip()) < self.limit // 8

    def _join(self, text: str, first: _Cut, second: _Cut) -> _Cut | None:
        """Both as one cut, without the overlap if need be; None where that is too long."""
        for start in (first.start, first.fresh):
            if size_of(text[start : second.end].strip()) <= self.limit:
                return _Cut(start, first.fresh, second.end)
        return None

    def _trimmed(self, text: str, cut: _Cut) -> tuple[int, int]:
        """The cut without white space around it, but with its first line's indentation."""
        piece = text[cut.start : cut.end]
        first = cut.start + len(piece) - len(piece.lstrip())
        end = cut.start + len(piece.rstrip())
        head = text[max(0, first - self.limit) : first]
        start = first - (len(head) - len(head.rstrip(" \t")))
        at_line = start == 0 or text[start - 1] == "\n"
        if at_line and size_of(text[start:end]) <= self.limit:
            return start, end
        return first, end


def _sections(text: str) -> Iterator[tuple[int, str]]:
    """Stretches of `text` with their offsets, cut where it harms least."""
    start = 0
    while len(text) - start > SECTION:
        end = _border(text, start + SECTION // 2, start + SECTION)
        yield start, text[start:end]
        start = end
    yield start, text[start:]


def _headed(sections: Iterator[tuple[int, str]]) -> Iterator[tuple[int, str]]:
    """The sections of a Markdown text, each cut again before its headings.

    The library fills a chunk up with what follows, so that two short sections of different
    matters would share a vector.
    """
    for begin, section in sections:
        starts, fence = [0], ""
        for found in _MARKS.finditer(section):
            mark = found["fence"]
            if not mark and not fence:
                starts.append(found.start())
            elif mark and fence in {"", mark[0]}:
                fence = "" if fence else mark[0]
        for start, end in itertools.pairwise([*starts, len(section)]):
            if start < end:
                yield begin + start, section[start:end]


def _border(text: str, first: int, last: int) -> int:
    """The best place to cut between the offsets `first` and `last`, as late as can be."""
    for pattern in _BORDERS:
        ends = [found.end() for found in pattern.finditer(text, first, last)]
        if ends:
            return ends[-1]
    return last


def _is_shallow(kind: str, section: str) -> bool:
    """Whether the syntax of `section` nests less than DEEPEST.

    Deep trees come from text that is not of the language, or from endless chains of operators.
    """
    tree = Parser(_language(kind)).parse(section.encode())
    cursor = tree.walk()
    # Nodes are numbered depth first: what hangs below a deep node follows it, so that samples
    # meet every nest that is deeper by the distance between them.
    for node in range(0, tree.root_node.descendant_count, DEEPEST // 2):
        cursor.goto_descendant(node)
        if cursor.depth >= DEEPEST:
            return False
    return True


@functools.cache
def _language(kind: str) -> Language:
    return Language(_grammar(kind))


def _grammar(kind: str) -> object:
    module, function = _GRAMMARS[kind]
    grammar: object = getattr(importlib.import_module(module), function)()
    return grammar


@functools.cache
def _engine(kind: str, room: int, overlap: int) -> CodeSplitter | MarkdownSplitter | TextSplitter:
    if kind == "text":
        return TextSplitter.from_callback(size_of, room, overlap, trim=False)
    if kind == "markdown":
        return MarkdownSplitter.from_callback(size_of, room, overlap, trim=False)
    return CodeSplitter.from_callback(_grammar(kind), size_of, room, overlap, trim=False)


@functools.cache
def _version() -> str:
    packages = sorted({module.replace("_", "-") for module, _ in _GRAMMARS.values()})
    grammars = ",".join(f"{name} {importlib.metadata.version(name)}" for name in packages)
    digest = hashlib.blake2b(grammars.encode(), digest_size=4).hexdigest()
    library = importlib.metadata.version("semantic-text-splitter")
    return f"{ALGORITHM}/semantic-text-splitter-{library}/{digest}"
