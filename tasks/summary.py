"""Summary: plan and report in the words and the order in which people read them."""

import re
from collections.abc import Mapping, Sequence

from tasks.budget import usd_text
from tasks.report import Calls, Chunks, Cost, RunReport

Row = tuple[str, str]

WAIT_SHOWN_S = 1.0
"""Waits from here on are worth a word."""

LONGEST_LABEL = 36
"""Longer ones, such as names, do not widen the column of labels."""

_MEANING = re.compile(r"[\\`*_{}\[\]>|~#!]")
"""Characters that may mean something to Markdown."""


def chunk_rows(chunks: Chunks) -> list[Row]:
    """What became of the chunks, as label and value."""
    rows = [
        ("chunks", f"{chunks.total:,}"),
        ("unchanged", f"{chunks.unchanged:,}"),
        ("added", f"{chunks.added:,}"),
        ("changed", f"{chunks.changed:,}"),
        ("moved", f"{chunks.moved:,}"),
        ("deleted", f"{chunks.deleted:,}"),
    ]
    if chunks.quarantined:
        rows.append(("quarantined", f"{chunks.quarantined:,} (their text is refused)"))
    return rows


def prepend_rows(names: Sequence[str]) -> list[Row]:
    """What stands in front of texts: why one counts as another that reads as before."""
    if not names:
        return []
    what = "a rename" if "document" in names else "another value"
    return [("in front of texts", f"{', '.join(names)} ({what} makes a new text)")]


def skipped_rows(skipped: Mapping[str, int], examples: Mapping[str, Sequence[str]]) -> list[Row]:
    """What was left out, as label and value."""
    rows = []
    for reason, count in sorted(skipped.items()):
        names = examples.get(reason, [])
        more = ", …" if count > len(names) else ""
        shown = f" ({', '.join(map(repr, names))}{more})" if names else ""
        rows.append((f"skipped: {reason}", f"{count:,}{shown}"))
    return rows


def as_text(*groups: Sequence[Row]) -> str:
    """Rows as aligned lines, an empty line between groups; a label too long stands out."""
    lengths = [len(label) for rows in groups for label, _ in rows]
    width = max((length for length in lengths if length <= LONGEST_LABEL), default=0)
    return "\n\n".join(
        "\n".join(f"  {label:<{width}}  {value}" for label, value in rows) for rows in groups
    )


def as_markdown(title: str, sentence: str, rows: Sequence[Row]) -> str:
    """Rows as a Markdown table under a title and a sentence."""
    return "\n".join([f"## {literal(title)}", "", literal(sentence), "", *table_lines(rows)])


def table_lines(rows: Sequence[Row]) -> list[str]:
    """Rows as the lines of a Markdown table."""
    lines = [f"| {literal(label)} | {literal(value)} |" for label, value in rows]
    return ["| | |", "|---|---|", *lines]


def literal(text: str) -> str:
    """The text in one line of Markdown, where none of its characters means anything."""
    line = one_line(text).replace("&", "&amp;").replace("<", "&lt;")
    return _MEANING.sub(r"\\\g<0>", line)


def one_line(text: str) -> str:
    """The text in one line that every terminal and page can show."""
    if not text.isprintable():
        text = "".join(each if each.isprintable() else " " for each in text)
    return " ".join(text.split())


def cut(text: str, most: int) -> str:
    """The text in one line, and at most so many characters of it: its beginning and its end."""
    line, end = one_line(text), most // 3
    return line if len(line) <= most else f"{line[: most - end - 1]}…{line[-end:]}"


def figure(value: float) -> str:
    """A number as exact as it is worth: 1,234, 56, 7.8, 0.012."""
    if value >= 9.95 or not value:  # noqa: PLR2004 - from here on it is rounded to two digits
        return f"{value:,.0f}"
    return f"{value:.2g}" if value >= 1e-4 else f"{value:.1e}"  # noqa: PLR2004


def percent_text(share: float, *, beside: float | None = None) -> str:
    """A share of 1 in per cent; a little is not 0%, and not all is not 100%.

    Args:
        share: 0 to 1.
        beside: It is compared with this one, and must read as above or below it where it is.
    """
    if beside is not None:
        for decimals in range(1, 8):
            text = f"{share:.{decimals}%}"
            reads = float(text[:-1])
            if all(reads != edge or 100 * share == edge for edge in (0, 100 * beside, 100)):
                return text
    for edge, text in ((0.0, "under 1%"), (1.0, "over 99%")):
        if 0 < abs(share - edge) < 0.005:  # noqa: PLR2004 - half a per cent
            return text
    return f"{share:.0%}"


ENDED = {
    "failed": "failed; the index is as it was.",
    "over budget": ("stopped at its budget; the index is as it was, what was paid for is kept."),
    "waiting": "waits for the Batch lane; the index is as it was, run again when it has come.",
    "not approved": "not approved; the index is as it was, nothing was spent.",
    "cancelled": "cancelled; the index is as it was, what was paid for is kept.",
    "died": "ended without a word; what was paid for is kept.",
}
"""What is said of runs that ended early, by their state."""


def headline(report: RunReport) -> str:
    """The run in one sentence."""
    if report.state in ENDED:
        return f"{report.name}: {ENDED[report.state]}"
    if report.published == "rollback":
        return (
            f"{report.name}: generation {report.generation} published, the same as generation "
            f"{report.restored}. A reindex brings the index forward again at no cost."
        )
    left_out = ""
    if report.chunks.quarantined:
        left_out += f" {report.chunks.quarantined:,} chunks are left out: their text is refused."
    if report.incomplete:
        left_out += " Something could not be read; its rows stay as they were."
    if report.published == "none":
        embedded = f"{report.texts.embedded:,} texts" if report.texts.embedded else "nothing"
        sentence = f"{report.name}: nothing changed, {embedded} embedded, no new version."
        return sentence + left_out
    changed = report.chunks.added + report.chunks.changed + report.chunks.moved
    sentence = (
        f"{report.name}: generation {report.generation} published, {changed:,} chunks written, "
        f"{report.chunks.deleted:,} deleted, {report.texts.embedded:,} texts embedded."
    )
    return sentence + left_out


def saved_text(usd_by_cause: Mapping[str, float]) -> str:
    """What was saved by what; "" where nothing was."""
    named = ((cause.replace("_", " "), usd) for cause, usd in usd_by_cause.items() if usd)
    return ", ".join(f"{cause} {usd_text(usd)}" for cause, usd in named)


def waits_text(seconds_by_cause: Mapping[str, float]) -> str:
    """What was waited for, the longest first; "" where nothing was for long."""
    long = [item for item in seconds_by_cause.items() if item[1] >= WAIT_SHOWN_S]
    longest = sorted(long, key=lambda item: -item[1])
    return ", ".join(f"{cause} {span_text(seconds)}" for cause, seconds in longest)


def cost_text(cost: Cost) -> str:
    """Cost and savings in one line."""
    saved = saved_text(cost.saved_usd.model_dump())
    without = (
        f"; {usd_text(cost.usd_without_reuse)} without reuse" if cost.usd_without_reuse else ""
    )
    return f"{usd_text(cost.usd)}{without}" + (f" (saved: {saved})" if saved else "")


def calls_text(calls: Calls) -> str:
    """Calls with what became of them, in one line."""
    total = calls.ok + calls.failed + calls.throttled + calls.split
    named = {
        "failed": calls.failed,
        "throttled": calls.throttled,
        "split": calls.split,
        "retried": calls.retried,
    }
    parts = [f"{count:,} {name}" for name, count in named.items() if count]
    return f"{total:,}" + (f" ({', '.join(parts)})" if parts else "")


def span_text(seconds: float) -> str:
    """A span of time as people say it: 40 ms, 3.2 s, 1 min 55 s, 43 min, 2 h 5 min."""
    if seconds < 0.1:  # noqa: PLR2004
        return f"{seconds * 1000:.0f} ms" if seconds >= 1e-3 else "under 1 ms"  # noqa: PLR2004
    if seconds < 90:  # noqa: PLR2004
        return f"{seconds:.1f} s"
    if seconds < 599.5:  # noqa: PLR2004
        minutes, rest = divmod(round(seconds), 60)
        return f"{minutes} min {rest} s" if rest else f"{minutes} min"
    minutes = round(seconds / 60)
    if minutes < 90:  # noqa: PLR2004
        return f"{minutes} min"
    hours, minutes = divmod(minutes, 60)
    return f"{hours} h {minutes} min" if minutes else f"{hours} h"
