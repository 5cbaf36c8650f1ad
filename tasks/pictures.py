"""Pictures: small SVG drawings, for a page of any colour.

Each has a ground of its own, so that it reads on a light and on a dark page. A page that holds
one as part of itself, not as an image, may set the colours named in PALETTE.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from html import escape

import numpy as np
import numpy.typing as npt

WIDTH = 720
LEFT, RIGHT, TOP, BOTTOM = 64, 20, 54, 44
PLOT = 140
"""Height of what is drawn between the axes."""
BAR, LABELS, WIDEST = 26, 130, 380
"""Height of a row of bars, width of their labels, and of the longest bar."""
MOST_TICKS_X, MOST_TICKS_Y = 8, 4

PALETTE = {
    "ground": "#f6f8fa",
    "ink": "#1f2328",
    "dim": "#57606a",
    "line": "#d0d7de",
    "main": "#2563eb",
    "good": "#1a7f37",
    "warn": "#bc4c00",
    "bad": "#cf222e",
}
"""Colours by role; dark on a light ground."""

UNITS = ((86_400.0, "days"), (3_600.0, "hours"), (60.0, "minutes"), (1.0, "seconds"))
MILLISECONDS = (1e-3, "milliseconds")

STYLE = (
    ".type{fill:currentColor;font:12px system-ui,sans-serif}.head{font-weight:600;font-size:14px}"
    ".draw{fill:none;stroke:currentColor;stroke-width:1.5}.line.draw{stroke-width:1}"
    ".dash{stroke-dasharray:6 4}.pale{opacity:.45}.fill{fill:currentColor;opacity:.2}"
    ".dot{fill:none;stroke:currentColor;stroke-width:4;stroke-linecap:round}"
    ".block{fill:currentColor}"
) + "".join(f".{role}{{color:var(--{role},{colour})}}" for role, colour in PALETTE.items())

Numbers = npt.NDArray[np.float64]


@dataclass(frozen=True)
class Picture:
    """A drawing.

    Attributes:
        alt: What it shows, in words.
        svg: The drawing.
    """

    alt: str
    svg: str


@dataclass(frozen=True)
class Bar:
    """A bar.

    Attributes:
        label: What it is.
        value: How long it is, beside the others.
        text: The value in words.
        colour: A role in PALETTE.
    """

    label: str
    value: float
    text: str
    colour: str = "main"


@dataclass(frozen=True)
class Level:
    """A line across an area: what it is, and how high."""

    name: str
    value: float


def area(
    title: str,
    seconds: float,
    values: Numbers,
    *,
    level: Level | None = None,
    marks: Numbers | None = None,
    marked: str = "",
) -> str:
    """Steps over time, filled.

    Args:
        title: What is drawn, with its unit.
        seconds: How long it took in all.
        values: One for each of equal parts of that time; not all 0.
        level: Drawn as a line across.
        marks: Seconds at which something happened.
        marked: What that was.
    """
    frame = _Frame(title, seconds, max(float(values.max()), level.value if level else 0.0))
    edges = frame.x(np.linspace(0.0, seconds, len(values) + 1))
    tops = zip(frame.y(values), edges[1:], strict=True)
    path = f"M{LEFT} {frame.base}" + "".join(f"V{top:.1f}H{edge:.1f}" for top, edge in tops)
    filled = f"{path}V{frame.base}Z"
    parts = [f'<path class="main fill" d="{filled}"/>', f'<path class="main draw" d="{path}"/>']
    legend = list[tuple[str, str]]()
    if level is not None:
        y = float(frame.y(np.array([level.value]))[0])
        parts.append(f'<path class="warn draw dash" d="M{LEFT} {y:.1f}H{WIDTH - RIGHT}"/>')
        legend.append(("warn", level.name))
    if marks is not None and len(marks):
        lines = "".join(f"M{x:.1f} {TOP}V{frame.base}" for x in frame.x(marks))
        parts.append(f'<path class="bad draw" d="{lines}"/>')
        legend.append(("bad", marked))
    return frame.svg(parts, legend)


def ranges(
    title: str, seconds: float, at: Numbers, *, least: Numbers, middle: Numbers, most: Numbers
) -> str:
    """A dot and a line from least to most, at each of several moments.

    Args:
        title: What is drawn, with its unit.
        seconds: How long it took in all.
        at: The moments, in seconds.
        least: Where the lines begin, one for each moment.
        middle: Where the dots are.
        most: Where the lines end; not all 0.
    """
    frame = _Frame(title, seconds, float(most.max()))
    xs = frame.x(at)
    ends = zip(xs, frame.y(least), frame.y(most), strict=True)
    lines = "".join(f"M{x:.1f} {low:.1f}V{high:.1f}" for x, low, high in ends)
    dots = "".join(f"M{x:.1f} {y:.1f}h0" for x, y in zip(xs, frame.y(middle), strict=True))
    parts = [f'<path class="main draw pale" d="{lines}"/>', f'<path class="main dot" d="{dots}"/>']
    return frame.svg(parts, [("main", "dot: median; line: from the shortest to the longest call")])


def bars(title: str, rows: Sequence[Bar]) -> str:
    """Bars below each other, each with its label and its value in words; not all are 0."""
    longest, top = max(row.value for row in rows), TOP - 14
    parts = []
    for number, row in enumerate(rows):
        y = top + BAR * number
        width = max(1.5, WIDEST * row.value / longest)  # what is there is seen
        size = f'width="{width:.1f}" height="{BAR - 8}"'
        parts += [
            _text(LABELS, y + 16, row.label, "ink", "end"),
            f'<rect class="{row.colour} block" x="{LABELS + 10}" y="{y + 3}" {size} rx="2"/>',
            _text(LABELS + 18 + width, y + 16, row.text, "dim"),
        ]
    return _svg(title, top + BAR * len(rows) + 14, parts)


def ticks(most: float, count: int) -> list[float]:
    """Round numbers from 0, at most `count` steps of 1, 2 or 5, the last one at most `most`."""
    exact = most / count
    power = 10.0 ** math.floor(math.log10(exact))
    step = next(each * power for each in (1, 2, 5, 10) if each * power >= exact * (1 - 1e-9))
    return [step * number for number in range(math.floor(most / step * (1 + 1e-9)) + 1)]


def short(value: float) -> str:
    """A round number in few characters: 0.2, 500, 20k, 1.5M."""
    for size, name in ((1e9, "G"), (1e6, "M"), (1e3, "k")):
        if value >= size:
            return f"{value / size:.6g}{name}"
    return f"{value:.6g}"


class _Frame:
    """Axes of time and of a value from 0, with round ticks."""

    def __init__(self, title: str, seconds: float, most: float) -> None:
        self.base = TOP + PLOT
        self._title = title
        self._seconds = seconds
        self._ticks = ticks(most, MOST_TICKS_Y)
        if self._ticks[-1] < most * (1 - 1e-9):
            self._ticks.append(len(self._ticks) * self._ticks[1])
        units = [unit for unit in UNITS if seconds >= 2 * unit[0]]
        self._unit, self._name = units[0] if units else MILLISECONDS

    def x(self, seconds: Numbers) -> Numbers:
        """Where moments are drawn."""
        return LEFT + (WIDTH - LEFT - RIGHT) * seconds / self._seconds

    def y(self, values: Numbers) -> Numbers:
        """Where values are drawn."""
        return self.base - PLOT * values / self._ticks[-1]

    def svg(self, parts: Sequence[str], legend: Sequence[tuple[str, str]]) -> str:
        """The drawing, with axes; `legend` is the roles of colours and what they mean."""
        heights = self.y(np.array(self._ticks))
        grid = "".join(f"M{LEFT} {y:.1f}H{WIDTH - RIGHT}" for y in heights)
        axes = [f'<path class="line draw" d="{grid}"/>']
        for value, y in zip(self._ticks, heights, strict=True):
            axes.append(_text(LEFT - 8, y + 4, short(value), "dim", "end"))
        moments = ticks(self._seconds / self._unit, MOST_TICKS_X)
        for value, x in zip(moments, self.x(np.array(moments) * self._unit), strict=True):
            axes.append(_text(x, self.base + 17, short(value), "dim", "middle"))
        since = f"{self._name} since the first call"
        axes.append(_text((LEFT + WIDTH - RIGHT) / 2, self.base + 36, since, "dim", "middle"))
        x = float(LEFT)
        for colour, name in legend:
            axes.append(f'<rect class="{colour} block" x="{x:.0f}" y="33" width="10" height="10"/>')
            axes.append(_text(x + 15, 42, name, "dim"))
            x += 40 + 6.6 * len(name)
        return _svg(self._title, self.base + BOTTOM, [*axes, *parts])


def _text(x: float, y: float, text: str, colour: str, anchor: str = "start") -> str:
    at = f'x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}"'
    return f'<text class="{colour} type" {at}>{escape(text)}</text>'


def _svg(title: str, height: int, parts: Sequence[str]) -> str:
    size = f'viewBox="0 0 {WIDTH} {height}" width="{WIDTH}" height="{height}"'
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" {size} role="img"><title>{escape(title)}</title>'
        f'<style>{STYLE}</style><rect class="ground block" width="{WIDTH}" height="{height}" '
        f'rx="6"/><text class="ink type head" x="16" y="24">{escape(title)}</text>'
        f"{''.join(parts)}</svg>"
    )
