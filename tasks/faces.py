"""Faces: a report as Markdown for Prefect's artifacts, and as a page of HTML."""

import base64
from collections.abc import Sequence
from html import escape

from tasks.pictures import Picture
from tasks.report import RunReport
from tasks.sections import LONGEST_NAME, LONGEST_REASON, Section
from tasks.summary import Row, cut, headline, literal, table_lines

DARK = {
    "ground": "#161b22",
    "ink": "#e6edf3",
    "dim": "#9198a1",
    "line": "#3d444d",
    "main": "#4493f8",
    "good": "#3fb950",
    "warn": "#f0883e",
    "bad": "#f85149",
}
"""The colours of pictures on a dark page; light ones are their own."""

LONGEST_LINE = 100
"""Prefect's first UI does not wrap the lines of a table."""

POLICY = "default-src 'none'; style-src 'unsafe-inline'"
"""A page that may load nothing runs nothing either."""

STYLE = """\
:root{color-scheme:light dark;--page:#fff;--text:#1f2328;--soft:#57606a;--edge:#d0d7de}
@media screen and (prefers-color-scheme:dark){:root{--page:#0d1117;--text:#e6edf3;--soft:#9198a1;\
--edge:#3d444d;DARK}}
body{margin:0;background:var(--page);color:var(--text);font:15px/1.5 system-ui,sans-serif}
article{max-width:720px;margin:0 auto;padding:24px 16px}
h1{margin:0 0 4px;font-size:26px}h2{margin:32px 0 8px;font-size:18px}
p{margin:0;font-size:17px}footer{margin-top:32px;color:var(--soft);font-size:13px}
table{border-collapse:collapse;width:100%}tr{border-top:1px solid var(--edge)}
th,td{padding:5px 0;text-align:left;vertical-align:top;overflow-wrap:anywhere}
th{width:200px;padding-right:16px;font-weight:400;color:var(--soft)}
figure{margin:12px 0 0}svg{display:block;max-width:100%;height:auto}
@media print{section,figure,tr{break-inside:avoid}body{print-color-adjust:exact;\
-webkit-print-color-adjust:exact}}
""".replace("DARK", "".join(f"--{role}:{colour};" for role, colour in DARK.items()))


def markdown(report: RunReport, found: Sequence[Section]) -> str:
    """The report as Markdown, pictures as `data:` URIs.

    Args:
        report: What the run did.
        found: The same in sections.
    """
    lines = [f"## {literal(_name(report))}", "", literal(_sentence(report))]
    for section in found:
        lines += ["", f"### {section.title}", "", *_lines(section.rows)]
        for picture in section.pictures:
            lines += ["", f"![{literal(picture.alt)}]({_uri(picture)})"]
    return "\n".join(lines) + "\n"


def html(report: RunReport, found: Sequence[Section]) -> str:
    """The report as one page of HTML that needs nothing else, light or dark as its reader has it.

    Args:
        report: What the run did.
        found: The same in sections.
    """
    parts = [
        f"<section><h2>{escape(section.title)}</h2>\n<table>{_rows(section.rows)}</table>\n"
        + "".join(f"<figure>{picture.svg}</figure>\n" for picture in section.pictures)
        + "</section>"
        for section in found
    ]
    name, run = escape(_name(report)), f"Run {report.run_id}, started {report.started_at}"
    return "\n".join(
        [
            '<!doctype html>\n<html lang="en"><head><meta charset="utf-8">',
            f'<meta http-equiv="Content-Security-Policy" content="{POLICY}">',
            '<meta name="viewport" content="width=device-width, initial-scale=1">',
            f"<title>{name}</title>\n<style>{STYLE}</style></head><body><article>",
            f"<h1>{name}</h1>\n<p>{escape(_sentence(report))}</p>",
            *parts,
            f"<footer>{escape(cut(run, LONGEST_REASON))}</footer></article></body></html>",
        ]
    )


def _lines(rows: Sequence[Row]) -> list[str]:
    """Rows as a table; as a list where one is so long that a table would hide its end."""
    if all(len(label) + len(value) <= LONGEST_LINE for label, value in rows):
        return table_lines(rows)
    return [f"- **{literal(label)}**: {literal(value)}" for label, value in rows]


def _name(report: RunReport) -> str:
    return cut(report.name, LONGEST_NAME)


def _sentence(report: RunReport) -> str:
    return cut(headline(report), LONGEST_REASON)


def _rows(rows: Sequence[Row]) -> str:
    return "\n".join(
        f'<tr><th scope="row">{escape(label)}</th><td>{escape(value)}</td></tr>'
        for label, value in rows
    )


def _uri(picture: Picture) -> str:
    encoded = base64.b64encode(picture.svg.encode()).decode()
    return f"data:image/svg+xml;base64,{encoded}"
