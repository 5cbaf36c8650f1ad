"""Work aside: a signal ends the wait of the main thread, and harms nobody else."""

import itertools
import random
import signal
import sys
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor, wait
from contextlib import suppress
from contextvars import ContextVar

import pytest

from flows.cancelling import Whole
from tasks.aside import Aside, meanwhile, one_ahead, out_of_reach

pytestmark = pytest.mark.usefixtures("heeded")


def press(after_s: float) -> threading.Thread:
    """Ctrl-C after so many seconds."""
    main = threading.main_thread().ident
    assert main is not None
    timer = threading.Timer(after_s, signal.pthread_kill, [main, signal.SIGINT])
    timer.start()
    return timer


def futures_at_work(seconds: float) -> int:
    """So many futures that were waited for; all that time this thread takes and frees locks."""
    ended, count = time.monotonic() + seconds, 0
    with ThreadPoolExecutor(4) as pool:
        while not count or time.monotonic() < ended:
            count += len(wait([pool.submit(int) for _ in range(8)]).done)
    return count


def test_what_the_work_returns_or_raises_comes_back() -> None:
    assert Aside(lambda: 7).result() == 7

    def fails() -> int:
        raise LookupError("not there")

    aside = Aside(fails)
    for _ in range(2):
        with pytest.raises(LookupError, match="not there"):
            aside.result()


def test_it_is_done_once_in_another_thread_and_in_the_context_of_who_asks() -> None:
    name = ContextVar("name", default="nobody")
    name.set("wolf")
    seen = list[tuple[str, bool]]()
    aside = Aside(lambda: seen.append((name.get(), on_main())))
    assert not aside.ended
    aside.wait()
    aside.wait()
    assert (seen, aside.ended) == ([("wolf", False)], True)


def on_main() -> bool:
    return threading.current_thread() is threading.main_thread()


def test_a_wait_may_be_a_short_one() -> None:
    gate = threading.Event()
    aside = Aside(gate.wait)
    waiting = threading.Thread(target=aside.wait)
    waiting.start()
    aside.wait_at_most(0.05)
    assert not aside.ended
    gate.set()
    aside.wait_at_most(20)
    assert aside.ended
    waiting.join()


def test_only_the_main_thread_goes_aside() -> None:
    assert not out_of_reach(on_main)
    here = list[bool]()
    thread = threading.Thread(
        target=lambda: here.append(out_of_reach(threading.get_ident) == threading.get_ident())
    )
    thread.start()
    thread.join()
    assert here == [True]


def test_what_has_not_begun_never_will() -> None:
    done = list[int]()
    aside = Aside(lambda: done.append(1))
    assert aside.prevent()
    assert aside.prevent()
    waiting = threading.Thread(target=aside.wait, daemon=True)
    waiting.start()
    waiting.join(0.1)
    assert not done
    aside = Aside(lambda: done.append(1))
    aside.wait()
    assert not aside.prevent()


def test_ctrl_c_at_any_moment_leaves_no_lock_behind() -> None:
    moments, interrupted = random.Random(7), 0
    switching = sys.getswitchinterval()
    sys.setswitchinterval(1e-5)  # the main thread loses its turn anywhere
    try:
        for _ in range(100):
            aside = Aside(lambda: futures_at_work(0.02))
            try:
                pressed = press(moments.uniform(0.001, 0.02))
                aside.result()
                pressed.join()
                time.sleep(0.001)
            except KeyboardInterrupt:
                interrupted += 1
            if not aside.prevent():
                finished = time.monotonic() + 20
                while not aside.ended:
                    assert time.monotonic() < finished, "a thread waits for a lock for good"
                    time.sleep(0.001)
                assert aside.result() > 0
    finally:
        sys.setswitchinterval(switching)
    assert interrupted > 50


def test_work_that_must_be_whole_is_whole_whenever_a_cancel_comes() -> None:
    moments, cancelled, begun = random.Random(8), 0, itertools.count()
    for _ in range(50):
        whole = Whole()
        try:
            pressed = press(moments.uniform(0.001, 0.01))
            assert whole.run(lambda: next(begun) + futures_at_work(0.01)) > 0
            pressed.join()
            time.sleep(0.001)
            whole.end()
        except KeyboardInterrupt:
            cancelled += 1
    assert cancelled == 50


def test_one_is_fetched_while_the_one_before_is_worked_on() -> None:
    fetched: list[int] = []
    second = threading.Event()

    def items() -> Iterator[int]:
        for number in range(5):
            fetched.append(number)
            if number == 1:
                second.set()
            yield number

    ahead = one_ahead(items())
    assert next(ahead) == 0
    assert second.wait(10)  # with nobody asking for it
    assert fetched == [0, 1]
    assert list(ahead) == [1, 2, 3, 4]
    assert list(one_ahead(iter([]))) == []


def test_what_ends_the_items_comes_after_those_before_it() -> None:
    def items() -> Iterator[int]:
        yield 1
        raise OSError("the disk is gone")

    ahead, seen = one_ahead(items()), list[int]()
    with pytest.raises(OSError, match="the disk is gone"):
        seen.extend(ahead)
    assert seen == [1]


def test_nothing_is_fetched_once_nobody_wants_more() -> None:
    fetched: list[int] = []

    def items() -> Iterator[int]:
        for number in range(5):
            time.sleep(0.01)
            fetched.append(number)
            yield number

    ahead = one_ahead(items())
    next(ahead)
    ahead.close()  # type: ignore[attr-defined]
    assert fetched == [0, 1]
    time.sleep(0.05)
    assert fetched == [0, 1]


@pytest.mark.parametrize("error", [None, LookupError, KeyboardInterrupt])
def test_what_goes_on_meanwhile_ends_with_the_block_however_that_ends(
    error: type[BaseException] | None,
) -> None:
    times = list[float]()
    with suppress(LookupError, KeyboardInterrupt), meanwhile(lambda: times.append(0), 0.001):
        while len(times) < 3:
            time.sleep(0.001)
        if error is not None:
            raise error
    after = len(times)
    time.sleep(0.05)
    assert len(times) == after


def test_what_failed_meanwhile_is_told_at_the_end_unless_the_block_failed_too() -> None:
    def fails() -> None:
        raise OSError("no disk")

    def block(error: BaseException | None = None) -> None:
        with meanwhile(fails, 0.001):
            time.sleep(0.05)
            if error is not None:
                raise error

    with pytest.raises(OSError, match="no disk"):
        block()
    with pytest.raises(LookupError, match="its own"):
        block(LookupError("its own"))
