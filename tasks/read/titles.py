"""Titles: the place of a chunk in words, by the headings of its document.

Only headings of Markdown that begin with `#` are known; all else has no title.
"""

import re
from bisect import bisect_right
from dataclasses import dataclass

ALGORITHM = 1
"""Counts up whenever this module names the same place in another way."""

BETWEEN = " > "
LONGEST = 200
"""Most characters of one heading: it stands in front of each chunk below it."""

_HEADING = re.compile(r" {0,3}(#{1,6})(?:[ \t]+(.*))?")
_CLOSING = re.compile(r"(?:^|[ \t]+)#+[ \t]*$")
_FENCE = re.compile(r" {0,3}(?P<marks>`{3,}|~{3,})(?P<info>.*)")


@dataclass(frozen=True)
class Outline:
    """The headings of one document.

    Attributes:
        lines: Of each heading, from 1, ascending.
        titles: The headings in force from there on, outermost first: "Guide > Install".
    """

    lines: tuple[int, ...]
    titles: tuple[str, ...]

    def title(self, line: int) -> str | None:
        """The headings that `line` stands under, its own included; None where there is none."""
        at = bisect_right(self.lines, line) - 1
        return self.titles[at] or None if at >= 0 else None


def outline(kind: str, text: str) -> Outline:
    """The headings of a document that is cut as `kind`; only "markdown" has any."""
    lines: list[int] = []
    titles: list[str] = []
    above: list[tuple[int, str]] = []
    fence = ""
    for number, line in enumerate(text.split("\n") if kind == "markdown" else (), start=1):
        mark = _FENCE.fullmatch(line.rstrip())
        if fence:
            # Closed by at least as many marks of its kind, and nothing else.
            if mark and not mark["info"] and mark["marks"].startswith(fence):
                fence = ""
        elif mark and not (mark["marks"][0] == "`" and "`" in mark["info"]):
            fence = mark["marks"]
        elif found := _HEADING.fullmatch(line.rstrip()):
            level = len(found[1])
            heading = " ".join(_CLOSING.sub("", found[2] or "").split())[:LONGEST].rstrip()
            above = [*(one for one in above if one[0] < level), (level, heading)]
            lines.append(number)
            titles.append(BETWEEN.join(name for _, name in above if name))
    return Outline(tuple(lines), tuple(titles))
