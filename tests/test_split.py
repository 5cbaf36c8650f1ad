"""Splitting: chunks stand in the document word for word, know their lines, and keep the limit."""

import string
import time
from collections.abc import Sequence
from itertools import pairwise

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tasks.params import Split
from tasks.read.split import SECTION, Piece, Splitter, kind_of

PYTHON = '''"""A module."""

import os


class Worker:
    """Works."""

    limit = 3

    def start(self) -> None:
        """Start to work."""
        for number in range(self.limit):
            print(os.getpid(), number)

    def stop(self) -> None:
        """Stop to work."""
        print("stopped", os.getpid())
'''

MARKDOWN = """# Guide

A first paragraph about guides. It has two sentences.

## Install

- one step
- another step

```python
def install() -> None:
    print("installed")
```
"""

PATHS = st.sampled_from(["a.py", "a.md", "a.txt", "a.js", "a.rs", "a.html", "a.go", "README"])
SPLITS = st.integers(16, 80).flatmap(
    lambda most: st.builds(
        Split, max_tokens=st.just(most), overlap_tokens=st.integers(0, most // 2)
    )
)
SNIPPETS = st.sampled_from(
    [
        *("def f(x):\n", "    return x\n", "class A:\n", "# Title\n\n", "- item\n", "}\n", "{"),
        *(
            "\r\n",
            "A sentence. ",
            "漢字かな交じり文。",
            "🙂",
            "\t",
            "\n\n\n",
            "\u3000",
            "\x0b",
            "'''",
        ),
        *("é", "x" * 90),
    ]
)
DOCUMENTS = st.one_of(
    st.text(max_size=400),
    st.lists(SNIPPETS | st.text(string.printable, max_size=12), max_size=60).map("".join),
    st.sampled_from([PYTHON, MARKDOWN, PYTHON.replace("\n", "\r\n"), PYTHON[:250], PYTHON[30:]]),
)


def pieces(path: str, text: str, max_tokens: int = 16, overlap_tokens: int = 0) -> list[Piece]:
    split = Split(max_tokens=max_tokens, overlap_tokens=overlap_tokens)
    return list(Splitter(split).pieces(path, text))


def lines(text: str, piece: Piece) -> str:
    return "\n".join(text.split("\n")[piece.start_line - 1 : piece.end_line])


def first_uncovered(text: str, found: Sequence[Piece]) -> int | None:
    """Where the first character stands that no chunk holds, each chunk tried at its lines only."""
    starts = [0]
    for line in text.split("\n"):
        starts.append(starts[-1] + len(line) + 1)
    covered = [character.isspace() for character in text]
    for piece in found:
        at = text.find(piece.text, starts[piece.start_line - 1])
        while at != -1 and at < starts[piece.start_line]:
            covered[at : at + len(piece.text)] = [True] * len(piece.text)
            at = text.find(piece.text, at + 1)
    return covered.index(False) if False in covered else None


@pytest.mark.slow
@settings(deadline=None, max_examples=300)
@given(PATHS, DOCUMENTS, SPLITS)
def test_every_character_is_in_a_chunk_at_its_place(path: str, text: str, split: Split) -> None:
    assert first_uncovered(text, list(Splitter(split).pieces(path, text))) is None


@settings(deadline=None, max_examples=300)
@given(PATHS, DOCUMENTS, SPLITS)
def test_a_chunk_is_its_lines_and_keeps_the_limit(path: str, text: str, split: Split) -> None:
    for piece in Splitter(split).pieces(path, text):
        assert piece.text in lines(text, piece)
        assert piece.text.count("\n") == piece.end_line - piece.start_line
        assert len(piece.text.encode()) <= split.max_tokens * 4


@settings(deadline=None, max_examples=100)
@given(PATHS, DOCUMENTS, SPLITS)
def test_the_same_text_is_cut_the_same_way(path: str, text: str, split: Split) -> None:
    assert list(Splitter(split).pieces(path, text)) == list(Splitter(split).pieces(path, text))


@settings(deadline=None, max_examples=100)
@given(PATHS, DOCUMENTS)
def test_chunks_are_not_blank_nor_padded(path: str, text: str) -> None:
    for piece in pieces(path, text):
        assert piece.text.strip()
        assert piece.text == piece.text.rstrip()
        assert piece.text.split("\n")[0].strip()
        assert not piece.text[0].isspace() or lines(text, piece).startswith(piece.text)


@settings(deadline=None, max_examples=100)
@given(PATHS, DOCUMENTS)
def test_without_overlap_no_text_is_doubled(path: str, text: str) -> None:
    found = "".join(piece.text for piece in pieces(path, text))
    assert "".join(found.split()) == "".join(text.split())


@settings(deadline=None, max_examples=300)
@given(PATHS, DOCUMENTS)
def test_no_fragment_is_left_that_fits_its_neighbour(path: str, text: str) -> None:
    spans: list[tuple[int, int]] = []
    for piece in pieces(path, text):
        start = text.index(piece.text, spans[-1][1] if spans else 0)
        spans.append((start, start + len(piece.text)))
    for before, after in pairwise(spans):
        if any(len(text[slice(*span)].strip().encode()) < 8 for span in (before, after)):
            assert len(text[before[0] : after[1]].strip().encode()) > 64


def test_code_is_cut_between_methods() -> None:
    head, start, stop = pieces("worker.py", PYTHON, max_tokens=60)
    assert head.text.endswith("class Worker:")
    assert start.text.endswith("print(os.getpid(), number)")
    assert stop.text.startswith("    def stop(self) -> None:")
    assert (start.start_line, start.end_line) == (7, 14)
    assert (stop.start_line, stop.end_line) == (16, 18)


def test_markdown_is_cut_at_headings() -> None:
    found = pieces("guide.md", MARKDOWN, max_tokens=32)
    assert [piece.text.split("\n")[0] for piece in found] == ["# Guide", "## Install"]


def test_prose_is_cut_between_sentences() -> None:
    text = "One sentence stands here for all to see. Another one follows it at once. A third."
    found = pieces("a.txt", text)
    assert [piece.text[-1] for piece in found] == [".", "."]


def test_a_chunk_repeats_what_the_overlap_allows() -> None:
    text = "".join(f"Sentence number {number}. " for number in range(10, 40))
    plain = pieces("a.txt", text, max_tokens=30)
    over = pieces("a.txt", text, max_tokens=30, overlap_tokens=10)
    assert all(piece.text[-10:] not in after.text for piece, after in pairwise(plain))
    assert all(piece.text[-10:] in after.text for piece, after in pairwise(over))


def test_the_head_of_a_class_stays_with_its_body() -> None:
    body = "".join(f"    def method_{n}(self) -> None:\n        print({n})\n\n" for n in range(40))
    found = pieces("a.py", f"class Worker:\n{body}", max_tokens=64)
    assert found[0].text.startswith("class Worker:\n    def method_0")
    assert min(len(piece.text) for piece in found) >= 32


def test_a_closing_bracket_stays_with_what_it_closes() -> None:
    body = "".join(f"  function f{n}() {{\n    return {n} + {n};\n  }}\n" for n in range(40))
    found = pieces("a.js", f"class A {{\n{body}}}\n", max_tokens=64)
    assert found[-1].text.endswith("  }\n}")
    assert len(found[-1].text) > 8


def test_lines_of_a_windows_file_are_those_of_its_unix_twin() -> None:
    unix = pieces("a.py", PYTHON, max_tokens=100)
    windows = pieces("a.py", PYTHON.replace("\n", "\r\n"), max_tokens=120)
    assert windows[0].start_line == 1
    assert windows[-1].end_line == unix[-1].end_line == 18


@pytest.mark.parametrize("broken", ["def f(:\n  ((", "}}}}", '"""', "class\n\tdef\n  x =", "\0\1"])
def test_a_broken_source_file_is_cut_all_the_same(broken: str) -> None:
    text = broken * 40
    assert first_uncovered(text, pieces("a.py", text)) is None


@pytest.mark.parametrize("text", ["", " \n\t\r\n", "\u3000\n"])
def test_a_blank_document_has_no_chunks(text: str) -> None:
    assert pieces("a.txt", text) == []


@pytest.mark.slow
@pytest.mark.parametrize(
    ("path", "text"),
    [
        ("min.js", "function f(a,b){return a+b*7};var x={k:[1,2,3]};" * 21_000),
        ("one.txt", "a" * 1_000_000),
        ("one.md", "漢字かな" * 83_000),
        ("deep.py", "x = " + "(" * 60_000),
        ("foreign.c", "if x:\n" * 16_000),
        ("chain.java", 'x = "a"' + ' + "b"' * 20_000),
    ],
)
def test_no_text_takes_minutes(path: str, text: str) -> None:
    begun = time.monotonic()
    found = pieces(path, text, max_tokens=400)
    assert time.monotonic() - begun < 20
    assert "".join("".join(piece.text for piece in found).split()) == "".join(text.split())


def test_a_long_document_is_parsed_in_sections_that_end_between_functions() -> None:
    function = "def function_{}(x: int) -> int:\n    y = x + {}\n\n    return y\n\n\n"
    text = "".join(function.format(n, n) for n in range(SECTION // 30))
    found = pieces("a.py", text, max_tokens=400)
    assert len(text) > 2 * SECTION
    assert all(piece.text.startswith("def ") for piece in found)
    assert all(piece.text.endswith("return y") for piece in found)


@pytest.mark.parametrize(
    ("path", "kind"),
    [
        ("src/a.PY", "python"),
        ("a.tsx", "tsx"),
        ("a.d.ts", "typescript"),
        ("docs/README", "markdown"),
        ("a.md", "markdown"),
        ("Rakefile", "ruby"),
        ("a.rst", "text"),
        ("py", "text"),
        (".py", "text"),
    ],
)
def test_a_name_tells_how_a_document_is_cut(path: str, kind: str) -> None:
    assert kind_of(path) == kind


def test_every_kind_can_be_cut() -> None:
    text = "function one() { return 1; }\n" * 20
    endings = "sh c cs cpp css go html java js kt lua php py rb rs scala sql tsx ts md txt"
    for ending in endings.split():
        assert kind_of(f"a.{ending}") != "text" or ending == "txt"
        assert first_uncovered(text, pieces(f"a.{ending}", text)) is None


def test_the_version_names_library_and_grammars() -> None:
    version = Splitter(Split()).version
    assert version.startswith("1/semantic-text-splitter-0.")
    assert len(version.split("/")[2]) == 8
    assert version == Splitter(Split(max_tokens=50)).version


def test_sections_of_markdown_do_not_share_a_chunk() -> None:
    one, two = "word " * 60, "other " * 60
    text = f"# One\n\n{one}\n\n```sh\n# no heading {one}\n```\n\n## Two\n\n{two}\n"
    found = [(piece.text[:5], piece.start_line) for piece in pieces("a.md", text, max_tokens=400)]
    assert found == [("# One", 1), ("## Tw", 9)]
