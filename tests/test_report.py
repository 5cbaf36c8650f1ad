"""The report: one order on all its faces, nothing empty, nothing unbounded, nothing untrue."""

import base64
import html as entities
import itertools
import re
import xml.etree.ElementTree as ET
from collections.abc import Callable, Iterator
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from typing import Any

import numpy as np
import pytest

from tasks.faces import html, markdown
from tasks.notes import About, Call
from tasks.pictures import Picture, short, ticks
from tasks.report import (
    Calls,
    Chunks,
    Concurrency,
    Cost,
    Latency,
    LeftOut,
    Memory,
    RunReport,
    Saved,
    Seconds,
    Texts,
    Throughput,
    Tokens,
)
from tasks.run import ended_report
from tasks.sections import Section, sections
from tasks.summary import as_text, cut, figure, headline, literal, percent_text
from tasks.timeline import PARTS, Timeline

START = datetime(2026, 1, 1, tzinfo=UTC)
NASTY = "we|ird `id` <script>alert(1)</script>\n__init__ *bold* [x](y) \x1b[31m\udcff"
MOST_BYTES = 256_000


def report(**changes: Any) -> RunReport:
    """A run that embedded 800 of 1,000 texts."""
    values: dict[str, Any] = {
        "run_id": "run-1",
        "name": "docs",
        "index": "/srv/index/docs",
        "generation": 2,
        "published": "merge",
        "state": "completed",
        "started_at": START.isoformat(),
        "chunks": Chunks(
            total=1100, unchanged=200, added=890, changed=10, moved=0, deleted=3, duplicate=100
        ),
        "texts": Texts(unique=1000, from_cache=50, embedded=800),
        "known_texts": 200,
        "model": "voyage/voyage-4",
        "calls": Calls(ok=40, throttled=2),
        "tokens": Tokens(estimated=41_000, billed=40_000),
        "cost": Cost(
            usd=0.0024,
            usd_without_reuse=0.0100,
            saved_usd=Saved(unchanged=0.005, duplicates=0.0016, cache=0.001),
        ),
        "seconds": Seconds(
            read=0.5, fingerprint=0.2, compare=0.1, lookup=0.1, embed=9.0, publish=0.3, total=10.5
        ),
        "throughput": Throughput(
            chunks_per_second=88.9,
            tokens_per_second=4444.4,
            documents_per_second=0.4,
            kilobytes_per_second=2000.0,
            limit_used_fraction=0.5,
            tokens_per_minute=100_000,
            requests_per_minute=2000,
        ),
        "latency_ms": Latency(p50=300, p95=500, p99=0.4),
        "concurrency": Concurrency(limit=8, reached=8, busy_fraction=0.9),
        "memory": Memory(peak_bytes=10**9),
    }
    return RunReport(**values | changes)


@pytest.fixture
def many(call_of: Callable[..., Call]) -> Callable[..., list[Call]]:
    """Calls, one each so many seconds; every tenth one is throttled."""

    def make(count: int, apart_s: float = 0.25) -> list[Call]:
        one = call_of()
        return [
            replace(
                one,
                batch=at,
                status="ProviderThrottled" if at % 10 == 9 else "ok",
                started_at=(START + timedelta(seconds=apart_s * at)).isoformat(),
                seconds=0.1 + 0.01 * (at % 7),
                tokens_estimated=1000,
                tokens_billed=0 if at % 10 == 9 else 900 + at % 5,
            )
            for at in range(count)
        ]

    return make


def pictures_of(found: list[Section]) -> dict[str, Picture]:
    """The pictures of sections, by their titles."""
    drawn = [picture for section in found for picture in section.pictures]
    return {re.findall("<title>(.*?)</title>", each.svg)[0]: each for each in drawn}


def cells(text: str) -> Iterator[tuple[str, str]]:
    """Label and value of each row of the tables and lists in Markdown, as they read."""
    for line in text.splitlines():
        row = re.fullmatch(r"\| (.+?[^\\]) \| (.+) \||- \*\*(.+?)\*\*: (.+)", line)
        if row is not None:
            yield tuple(  # type: ignore[misc]
                entities.unescape(re.sub(r"\\([!-/:-@\[-`{-~])", r"\1", cell))
                for cell in row.groups()
                if cell is not None
            )


def test_all_faces_show_the_same_rows_in_the_same_order(many: Callable[..., list[Call]]) -> None:
    run = report(
        chunks=report().chunks.model_copy(update={"quarantined": 1}),
        refused=(LeftOut(chunk="a.md:1-2", reason="No."),),
        skipped={"binary file": 3},
        examples={"binary file": ["x.png"]},
        waited_seconds={"tokens per minute": 12.0},
    )
    found = sections(run, many(40))
    titles = [section.title for section in found]
    assert titles == [
        *("What changed", "Money", "Calls", "Limits", "Failed or left out", "Time", "Targets"),
    ]
    rows = [row for section in found for row in section.rows]
    shown, page = markdown(run, found), html(run, found)
    assert shown.startswith(f"## docs\n\n{headline(run)}\n")
    assert re.findall("^### (.*)$", shown, re.MULTILINE) == titles
    assert list(cells(shown)) == rows
    assert re.findall("<h2>(.*?)</h2>", page) == titles
    read = re.findall(r'<tr><th scope="row">(.*?)</th><td>(.*?)</td></tr>', page)
    assert [tuple(map(entities.unescape, row)) for row in read] == rows
    lines = [line for line in as_text(*(each.rows for each in found)).splitlines() if line]
    assert [tuple(re.split("  +", line.strip(), maxsplit=1)) for line in lines] == rows
    assert [picture.svg for picture in pictures_of(found).values()] == re.findall(
        "<figure>(.*?)</figure>", page
    )


def test_a_picture_in_markdown_is_the_same_drawing(many: Callable[..., list[Call]]) -> None:
    found = sections(report(), many(40))
    encoded = re.findall(
        r"!\[[^\]]+\]\(data:image/svg\+xml;base64,(.*?)\)", markdown(report(), found)
    )
    drawn = [base64.b64decode(each).decode() for each in encoded]
    assert drawn == [picture.svg for picture in pictures_of(found).values()]
    assert len(drawn) == 5
    for each in drawn:
        assert ET.fromstring(each).tag == "{http://www.w3.org/2000/svg}svg"  # noqa: S314


def test_nothing_that_users_name_means_anything_to_a_page() -> None:
    run = report(
        name=NASTY,
        index=NASTY,
        state="quarantined",
        refused=(LeftOut(chunk=NASTY, reason=NASTY),),
        skipped={NASTY: 2},
        examples={NASTY: [NASTY]},
        error=NASTY,
    )
    found = sections(run)
    shown, page = markdown(run, found), html(run, found)
    for text in (shown, page, as_text(*(section.rows for section in found))):
        text.encode()  # half a character would raise
        assert "\x1b" not in text
    assert "<script" not in shown + page
    ours = re.compile(r"^!\[.*\)$|^- \*\*|\*\*: ", re.MULTILINE)
    assert not re.search(r"(?<!\\)[`*_\[]", ours.sub("", shown))
    assert list(cells(shown)) == [row for section in found for row in section.rows]
    assert "default-src 'none'" in page
    assert not re.search("src=|href=|url\\(|@import", page)


def test_a_report_of_a_huge_run_is_bounded(many: Callable[..., list[Call]]) -> None:
    long = "x|" * 5_000
    run = report(
        name=long,
        index=long,
        error=long,
        chunks=report().chunks.model_copy(update={"quarantined": 70_000}),
        refused=tuple(LeftOut(chunk=f"{at}{long}", reason=long) for at in range(1000)),
        skipped={f"{at}{long}": at for at in range(500)},
        examples={f"{at}{long}": [long] * 50 for at in range(500)},
    )
    found = sections(run, many(100_000))
    assert len(pictures_of(found)) == 5
    for text in (markdown(run, found), html(run, found)):
        assert len(text.encode()) < MOST_BYTES
    rows = dict(next(section for section in found if section.title == "Failed or left out").rows)
    assert rows["left out"] == "69,980 more"
    named = sum(count for count in range(480, 500))
    assert rows["skipped"] == f"{sum(range(500)) - named:,} more, for other reasons"


def test_what_is_drawn_agrees_with_the_calls(many: Callable[..., list[Call]]) -> None:
    calls = many(500, apart_s=0.5)
    over_time = Timeline.of(calls[::-1])
    good = [call for call in calls if call.status == "ok"]
    widths = np.diff(over_time.edges)
    assert len(over_time.tokens_per_second()) == PARTS
    total = float(np.sum(over_time.tokens_per_second() * widths))
    assert total == pytest.approx(sum(call.tokens_billed for call in good))
    took, ms = over_time.latencies(), [1000 * call.seconds for call in good]
    assert (took.least.min(), took.most.max()) == pytest.approx((min(ms), max(ms)))
    assert np.all((took.least <= took.median) & (took.median <= took.most))
    # By hand, the slow way: the most that any minute that ends with a call holds.
    starts = [datetime.fromisoformat(call.started_at).timestamp() for call in calls]
    held = [
        sum(
            call.tokens_billed
            for at, call in zip(starts, calls, strict=True)
            if end - 60 + 1e-6 < at <= end
        )
        for end in starts
    ]
    assert over_time.last_minute("tokens").max() == pytest.approx(max(held))
    assert over_time.last_minute("requests").max() == 120
    assert len(over_time.throttled_at()) == 50


def test_an_answer_without_a_count_is_drawn_by_our_own(call_of: Callable[..., Call]) -> None:
    calls = [replace(call_of(batch=at), tokens_billed=0, tokens_estimated=7) for at in range(3)]
    assert Timeline.of(calls).tokens.tolist() == [7, 7, 7]


def test_the_limit_that_is_used_most_is_drawn_with_what_was_throttled(
    many: Callable[..., list[Call]],
) -> None:
    tokens = pictures_of(sections(report(), many(40)))["Tokens in the last 60 seconds"]
    assert "limit: 100,000 tokens a minute" in tokens.svg
    assert "throttled: 2 calls" in tokens.svg
    narrow = report().throughput.model_copy(update={"requests_per_minute": 50})
    requests = pictures_of(sections(report(throughput=narrow), many(40)))
    assert "limit: 50 requests a minute" in requests["Requests in the last 60 seconds"].svg
    free = sections(report(throughput=Throughput(chunks_per_second=1.0)), many(40))
    assert [each for each in pictures_of(free) if "last 60" in each] == []


def test_few_calls_are_no_picture(many: Callable[..., list[Call]]) -> None:
    two = sections(report(), many(2))
    assert set(pictures_of(two)) == {"US dollars spent and saved, at list price", "Time by stage"}
    assert len(pictures_of(sections(report(), many(3)))) == 5


@pytest.mark.parametrize("most", [0.003, 0.7, 1, 3, 9.99, 10, 47, 100, 12_345, 7e6])
def test_ticks_are_round_and_reach_almost_to_the_end(most: float) -> None:
    found = ticks(most, 4)
    assert found[0] == 0
    assert most / 2 < found[-1] <= most * (1 + 1e-9)
    assert 2 <= len(found) <= 5
    assert all(len(short(value).strip("kMG0.")) <= 2 for value in found)


@pytest.mark.parametrize("seconds", [0.002, 0.4, 3, 75, 500, 9_000, 90_000, 900_000])
def test_no_labels_of_time_overlap(many: Callable[..., list[Call]], seconds: float) -> None:
    calls = many(40, apart_s=seconds / 40)
    calls = [replace(call, seconds=seconds / 100) for call in calls]
    drawn = pictures_of(sections(report(), calls))["Tokens per second"].svg
    labels = re.findall(r'x="([\d.]+)" y="211.0" text-anchor="middle">([^<]+)<', drawn)
    assert 3 <= len(labels) <= 9
    ends = [(float(x) - 4 * len(text), float(x) + 4 * len(text)) for x, text in labels]
    assert all(left < right for (_, left), (right, _) in itertools.pairwise(ends))


def about() -> About:
    return About("run-1", "docs", "/srv/index/docs", START.isoformat(), 8)


@pytest.mark.parametrize(
    ("state", "paid"),
    [("failed", 5), ("cancelled", 5), ("cancelled", 0), ("over budget", 5), ("not approved", 0)],
)
def test_a_run_that_ended_early_says_what_it_did_and_no_more(
    many: Callable[..., list[Call]], state: str, paid: int
) -> None:
    calls = many(paid)
    run = ended_report(about(), calls, state, "What went wrong.", seconds=0.4)
    found = sections(run, calls)
    rows = {label: value for section in found for label, value in section.rows}
    assert rows["error"] == "What went wrong."
    assert rows["time"] == "0.4 s"
    assert not {"chunks", "generation", "hits over 70% on repeats", "embed"} & set(rows)
    assert ("calls" in rows) == bool(paid)
    assert rows.get("texts embedded") == (
        str(paid) if paid else None if state == "not approved" else "none"
    )
    assert all(section.rows for section in found)
    for text in (headline(run), markdown(run, found)):
        assert "the index is as it was" in text


def test_a_run_with_nothing_new_shows_no_zeros() -> None:
    run = report(
        published="none",
        state="unchanged",
        chunks=Chunks(
            total=1100, unchanged=1100, added=0, changed=0, moved=0, deleted=0, duplicate=0
        ),
        texts=Texts(unique=1000, from_cache=0, embedded=0),
        known_texts=1000,
        calls=Calls(),
        tokens=Tokens(),
        cost=Cost(usd_without_reuse=0.01, saved_usd=Saved(unchanged=0.01)),
        throughput=Throughput(),
        latency_ms=Latency(),
        concurrency=Concurrency(limit=8),
    )
    found = sections(run)
    assert [section.title for section in found] == ["What changed", "Money", "Time", "Targets"]
    rows = dict(found[0].rows + found[1].rows)
    assert set(rows) == {
        *("index", "generation", "chunks", "unchanged"),
        *("texts embedded", "spent", "saved", "without reuse"),
    }
    assert (rows["spent"], rows["texts embedded"]) == ("nothing", "none of 1,000")
    assert set(pictures_of(found)) == {"Time by stage"}


def test_a_rollback_tells_of_rows_only() -> None:
    run = ended_report(about(), [], "completed", "", 0.2).model_copy(
        update={
            "generation": 4,
            "published": "rollback",
            "restored": 2,
            "chunks": Chunks(
                total=9, unchanged=7, added=2, changed=0, moved=0, deleted=1, duplicate=0
            ),
        }
    )
    assert [section.title for section in sections(run)] == ["What changed", "Time"]


def targets_of(run: RunReport) -> list[str]:
    """The verdicts on hit rate, cached texts, workers and errors."""
    (last,) = (section for section in sections(run) if section.title == "Targets")
    return [value for _, value in last.rows]


def test_targets_are_met_or_missed_by_their_number() -> None:
    good = report(
        texts=Texts(unique=1000, from_cache=50, embedded=290),
        known_texts=701,
        refused_texts=9,
        calls=Calls(ok=32),
    )
    assert targets_of(good) == [
        "met: 70.1%, 701 of 1,000 texts",
        "met: 2 ms, lookup by 50 texts from the cache",
        "met: 90.0% of open slots' time",
        "met: 0.9%, 9 of 1,000 texts without a vector after retries",
    ]
    bad = report(
        texts=Texts(unique=100_000, from_cache=2, embedded=30_000),
        known_texts=69_996,
        refused_texts=1000,
        calls=Calls(ok=32),
        concurrency=Concurrency(limit=8, reached=8, busy_fraction=0.79999),
    )
    assert targets_of(bad) == [
        "missed: 69.996%, 69,996 of 100,000 texts",
        "missed: 50 ms, lookup by 2 texts from the cache",
        "missed: 79.999% of open slots' time",
        "missed: 1.0%, 1,000 of 100,000 texts without a vector after retries",
    ]


def test_a_target_says_where_it_does_not_apply() -> None:
    first = report(
        generation=1, texts=Texts(unique=10, from_cache=0, embedded=10), calls=Calls(ok=3)
    )
    assert targets_of(first)[:3] == [
        "not applicable: the index was not there before",
        "not applicable: no text came from the cache",
        "not applicable: 3 calls are too few for 8 slots (busy 90.0%)",
    ]
    assert targets_of(first)[3].startswith("met: none of 10 texts")
    bound = report(
        throughput=report().throughput.model_copy(update={"limit_used_fraction": 0.97}),
        concurrency=Concurrency(limit=8, reached=4, busy_fraction=0.4),
    )
    said = "not applicable: 97% of the account's limit was used (busy 40.0%)"
    assert targets_of(bound)[2] == said


@pytest.mark.parametrize(
    ("share", "said"),
    [
        *((0.0, "0%"), (0.0001, "under 1%"), (0.0049, "under 1%"), (0.014, "1%")),
        *((0.5, "50%"), (0.9951, "over 99%"), (0.99999, "over 99%"), (1.0, "100%")),
    ],
)
def test_a_share_is_not_rounded_to_none_or_all(share: float, said: str) -> None:
    assert percent_text(share) == said


def test_a_small_share_beside_a_target_is_not_rounded_to_none() -> None:
    assert percent_text(0.00002, beside=0.01) == "0.002%"
    assert percent_text(0.01, beside=0.01) == "1.0%"
    assert percent_text(1.0, beside=0.7) == "100.0%"


@pytest.mark.parametrize(
    ("value", "said"),
    [(0, "0"), (0.4, "0.4"), (0.0123, "0.012"), (9.94, "9.9"), (9.96, "10"), (12345.6, "12,346")],
)
def test_a_figure_is_not_rounded_to_nothing(value: float, said: str) -> None:
    assert figure(value) == said


def test_a_name_is_cut_in_its_middle() -> None:
    assert cut("abcdefghijklm", 10) == "abcdef…klm"
    assert cut("a\nb\x1b c", 10) == "a b c"
    assert literal("a|b_c <d> & `e`") == r"a\|b\_c &lt;d\> &amp; \`e\`"
