"""Targets: what a run is held against, each with its number and where it does not apply."""

from tasks.report import RunReport
from tasks.summary import ENDED, Row, figure, percent_text

HIT_RATE = 0.7
CACHED_MS = 50.0
BUSY = 0.8
ERRORS = 0.01
CALLS_A_SLOT = 4
"""Slots open one by one; with fewer calls for each of them they cannot all be busy."""
ALL_USED = 0.8
"""Where so much of the account's limit is used, slots are empty because of the limit."""


def targets(report: RunReport) -> tuple[Row, ...]:
    """Label and verdict of each target; none for runs that ended before the corpus was known."""
    if report.state in ENDED or not report.texts.unique:
        return ()
    return (
        ("hits over 70% on repeats", _hits(report)),
        ("cached text under 50 ms", _cached(report)),
        ("workers busy over 80%", _busy(report)),
        ("errors under 1%", _errors(report)),
    )


def _verdict(*, met: bool) -> str:
    return "met" if met else "missed"


def _hits(report: RunReport) -> str:
    known, unique = report.known_texts, report.texts.unique
    if report.generation <= (report.published != "none"):
        return "not applicable: the index was not there before"
    rate = known / unique
    share = percent_text(rate, beside=HIT_RATE)
    return f"{_verdict(met=rate > HIT_RATE)}: {share}, {known:,} of {unique:,} texts"


def _cached(report: RunReport) -> str:
    count = report.texts.from_cache
    if not count:
        return "not applicable: no text came from the cache"
    each = 1000 * report.seconds.lookup / count
    met = _verdict(met=each < CACHED_MS)
    near = each != CACHED_MS and figure(each) == figure(CACHED_MS)
    shown = f"{each:.3f}" if near else figure(each)
    return f"{met}: {shown} ms, lookup by {count:,} texts from the cache"


def _busy(report: RunReport) -> str:
    calls, slots, used = report.calls, report.concurrency, report.throughput.limit_used_fraction
    made = calls.ok + calls.failed + calls.throttled + calls.split
    share = percent_text(slots.busy_fraction, beside=BUSY)
    if not made:
        return "not applicable: nothing was sent"
    if made < CALLS_A_SLOT * slots.limit:
        few = (
            f"{made:,} {'call is' if made == 1 else 'calls are'} too few for {slots.limit:,} slots"
        )
        return f"not applicable: {few} (busy {share})"
    if slots.busy_fraction <= BUSY and used is not None and used > ALL_USED:
        why = f"{percent_text(used)} of the account's limit was used"
        return f"not applicable: {why} (busy {share})"
    return f"{_verdict(met=slots.busy_fraction > BUSY)}: {share} of open slots' time"


def _errors(report: RunReport) -> str:
    refused, unique = report.refused_texts, report.texts.unique
    rate = refused / unique
    share = percent_text(rate, beside=ERRORS)
    without = f"{share}, {refused:,}" if refused else "none"
    left = f"{without} of {unique:,} texts without a vector"
    return f"{_verdict(met=rate < ERRORS)}: {left} after retries"
