"""Recover: what runs that died had paid for is taken up by the next run."""

from collections.abc import Callable
from dataclasses import dataclass

from tasks.cache import Cache
from tasks.journal import RunFolder, fold, read_answer, run_ids
from tasks.notes import Call
from tasks.storage import Taken, storage_at


@dataclass(frozen=True)
class Recovered:
    """What dead runs left behind.

    Attributes:
        vectors: Vectors they had paid for, now in the cache.
        set_aside: Files that could not be read, now in `state.uri`/set-aside.
    """

    vectors: int = 0
    set_aside: tuple[str, ...] = ()


Record = Callable[[RunFolder, list[Call]], None]


def recover(state_uri: str, record: Record, besides: str = "") -> Recovered:
    """Fold what runs that died have left; leave living runs alone.

    Args:
        state_uri: Where the runs' folders are.
        record: Takes a dead run, its calls and its refused texts where they belong.
        besides: The caller's own run.

    Raises:
        EmbedOnceError: The state cannot be read or written; what was left stays.
    """
    recovered = Recovered()
    for run_id in run_ids(state_uri):
        if run_id == besides:
            continue
        folder = RunFolder(state_uri, run_id)
        try:
            with storage_at(state_uri).held(folder.lock, run_id):
                found = _recover_one(folder, record)
        except Taken:
            continue
        recovered = Recovered(
            recovered.vectors + found.vectors, recovered.set_aside + found.set_aside
        )
    return recovered


def _recover_one(folder: RunFolder, record: Record) -> Recovered:
    set_aside = tuple(_set_aside(folder, name) for name in folder.unreadable())
    calls = folder.calls()
    answers = (read_answer(folder, name) for name in folder.answers)
    spaces = {answer.space for answer in answers if answer is not None}
    vectors = sum(fold(folder, Cache(folder.state_uri, space)) for space in spaces)
    record(folder, calls)
    folder.remove()
    return Recovered(vectors, set_aside)


def _set_aside(folder: RunFolder, name: str) -> str:
    """Move a file to where nobody trusts it or trips over it; says where it is now."""
    target = f"set-aside/{name.removeprefix('runs/').replace('/', '-')}"
    storage_at(folder.state_uri).write(target, folder.files.read(name) or b"")
    folder.files.delete([name])
    return f"{folder.state_uri}/{target}"
