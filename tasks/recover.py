"""Recover: what runs that died had paid for is taken up by the next run."""

import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from filelock import FileLock, Timeout

from tasks.cache import Cache
from tasks.journal import Call, RunFolder, fold, read_answer


@dataclass(frozen=True)
class Recovered:
    """What dead runs left behind.

    Attributes:
        vectors: Vectors they had paid for, now in the cache.
        set_aside: Files that could not be read, moved to `state.uri`/set-aside.
    """

    vectors: int = 0
    set_aside: tuple[Path, ...] = ()


Record = Callable[[RunFolder, list[Call]], None]


def recover(state_uri: str, record: Record) -> Recovered:
    """Fold what runs that died have left; leave living runs alone.

    Args:
        state_uri: Where the runs' folders are.
        record: Takes a dead run, its calls and its refused texts where they belong.
    """
    recovered = Recovered()
    for path in sorted((Path(state_uri) / "runs").glob("*/")):
        folder = RunFolder(state_uri, path.name)
        try:
            with FileLock(folder.lock, timeout=0):
                found = _recover_one(folder, record)
        except Timeout:
            continue
        recovered = Recovered(
            recovered.vectors + found.vectors, recovered.set_aside + found.set_aside
        )
    return recovered


def _recover_one(folder: RunFolder, record: Record) -> Recovered:
    calls = folder.calls()
    spaces, set_aside = set(), []
    for file in folder.answers:
        answer = read_answer(file)
        if answer is None:
            set_aside.append(_set_aside(folder, file))
        else:
            spaces.add(answer.space)
    vectors = sum(fold(folder, Cache(folder.state_uri, space)) for space in spaces)
    record(folder, calls)
    shutil.rmtree(folder.path, ignore_errors=True)
    folder.lock.unlink(missing_ok=True)
    return Recovered(vectors, tuple(set_aside))


def _set_aside(folder: RunFolder, file: Path) -> Path:
    target = Path(folder.state_uri) / "set-aside" / f"{folder.run_id}-{file.name}"
    target.parent.mkdir(exist_ok=True)
    return file.rename(target)
