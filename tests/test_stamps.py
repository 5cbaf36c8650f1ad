"""A file that was not touched is not read again, and the index is the same as if it were."""

import os
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Self
from unittest.mock import patch

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import tasks.read.stamp
from tasks.form import Overrides
from tasks.index import open_index
from tasks.params import Config
from tasks.plan import make_plan
from tasks.read.stamp import COARSE_NS, FINE_NS, stamp_of
from tasks.rollback import rollback
from tasks.verify import verify

Reindex = Callable[..., Any]
SETTLED_S = 1.5 * FINE_NS / 1e9
NOTES = "# Birds\n\n" + "The heron stands still in the reeds. " * 20


@dataclass
class Home:
    """A folder of files, and an index of it."""

    folder: Path
    run: Reindex
    settings: dict[str, Any] = field(default_factory=dict)

    @property
    def corpus(self) -> Path:
        return self.folder / "corpus"

    def config(self, **source: Any) -> Config:
        values = {
            "kind": "files", "path": str(self.corpus),
            "split": {"max_tokens": 16, "overlap_tokens": 0}, **source,
        }  # fmt: skip
        return Config.model_validate(
            {
                "name": "home",
                "source": values,
                "embedding": {"provider": "lexical", "dimension": 256, **self.settings},
                "index": {
                    "uri": str(self.folder / "index"), "table": "t", "max_deleted_fraction": 1.0
                },
                "state": {"uri": str(self.folder / "state")},
            }
        )  # fmt: skip

    def write(self, files: Mapping[str, str | bytes]) -> None:
        for name, content in files.items():
            path = self.corpus / name
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(content.encode() if isinstance(content, str) else content)

    def reindex(self, overrides: Overrides | None = None, **source: Any) -> tuple[Any, list[str]]:
        """One run, and the documents that its first pass read."""
        with reads(self.corpus) as read:
            ran = self.run(self.config(**source), overrides, before_second_pass=read.stop)
        return ran, read.documents

    def rows(self) -> dict[str, tuple[Any, ...]]:
        """The rows that readers see, but for the run."""
        table = open_index(self.config().index)
        assert table is not None
        return {row["id"]: _plain(row) for row in table.search().to_list()}


def _plain(row: dict[str, Any]) -> tuple[Any, ...]:
    names = ("document", "text", "text_hash", "start_line", "end_line", "vector")
    return tuple(row[name] if name != "vector" else tuple(row[name]) for name in names)


@dataclass
class reads:  # noqa: N801 - a context manager
    """The documents below a folder that are read."""

    corpus: Path
    documents: list[str] = field(default_factory=list)
    stopped: bool = False

    def stop(self) -> None:
        self.stopped = True

    def __enter__(self) -> Self:
        opened = os.open

        def noted(path: str | Path, flags: int, *arguments: Any, **named: Any) -> int:
            path = Path(path)
            if self.corpus in path.parents and not self.stopped and path.name != ".gitignore":
                self.documents.append(path.relative_to(self.corpus).as_posix())
            return opened(path, flags, *arguments, **named)

        self._patch = patch("os.open", noted)
        self._patch.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._patch.stop()


@pytest.fixture
def home(tmp_path: Path, reindex: Reindex) -> Home:
    made = Home(tmp_path, reindex)
    made.write(
        {"a.md": NOTES, "b/c.txt": "A robin sings. " * 30, "d.py": "def f():\n    return 1\n"}
    )
    time.sleep(SETTLED_S)
    return made


def test_a_file_that_was_not_touched_is_not_read_again(home: Home) -> None:
    first, read = home.reindex()
    assert read == ["a.md", "b/c.txt", "d.py"]
    rows = home.rows()
    again, read = home.reindex()
    assert read == []
    assert again.published.way == "none"
    notes = again.survey.keyed.notes
    assert (notes.documents, notes.untouched) == (3, 3)
    assert again.survey.compared.unchanged == first.survey.keyed.table.rows == len(rows)


def test_only_what_was_touched_is_read(home: Home) -> None:
    home.reindex()
    home.write({"b/c.txt": "A wren sings. " * 30, "e.txt": "An owl, at night."})
    (home.corpus / "d.py").unlink()
    _, read = home.reindex()
    assert read == ["b/c.txt", "e.txt"]
    assert {row[0] for row in home.rows().values()} == {"a.md", "b/c.txt", "e.txt"}
    time.sleep(SETTLED_S)
    home.reindex()  # they may have been too young when they were read
    assert home.reindex()[1] == []
    assert verify(home.config()).findings == ()


def test_what_has_no_text_is_not_read_again_but_counted(home: Home) -> None:
    home.write({"e.bin": b"\0\1", "f.txt": "", "g.txt": " \n", "h.txt": b"a\x81\xfe\0"})
    time.sleep(SETTLED_S)
    first, _ = home.reindex()
    again, read = home.reindex()
    assert read == []
    ours, theirs = again.survey.keyed.notes, first.survey.keyed.notes
    assert ours.skipped == theirs.skipped == {"binary file": 2, "empty file": 1, "blank text": 1}
    assert ours.examples == theirs.examples
    assert (ours.documents, ours.untouched) == (3, 3)
    home.write({"f.txt": "Now there is text."})
    assert home.reindex()[1] == ["f.txt"]


def test_what_cannot_be_read_is_tried_again(home: Home) -> None:
    home.write({"e.txt": bytes(range(0x80, 0x100)) * 3})
    time.sleep(SETTLED_S)
    first, _ = home.reindex()
    assert first.survey.keyed.notes.skipped == {"unknown encoding": 1}
    again, read = home.reindex()
    assert read == ["e.txt"]
    assert again.survey.keyed.notes.unread == ["e.txt"]
    assert again.survey.keyed.notes.failed == 1


def test_every_file_is_read_where_times_are_not_trusted(home: Home) -> None:
    home.reindex()
    assert len(home.reindex(trust_mtime=False)[1]) == 3
    assert home.reindex()[1] == []


def same_size_edit(path: Path) -> None:
    """Another text of the same length, and the time of modification set back."""
    before = path.stat()
    data = path.read_bytes()
    with path.open("r+b") as file:
        file.write(data.swapcase())
    os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))
    after = path.stat()
    assert (after.st_size, after.st_mtime_ns, after.st_ino) == (
        before.st_size, before.st_mtime_ns, before.st_ino,
    )  # fmt: skip


def test_a_time_that_was_set_back_deceives_nobody(home: Home) -> None:
    home.reindex()
    same_size_edit(home.corpus / "a.md")
    assert home.reindex()[1] == ["a.md"]
    assert any("HERON" in row[1] for row in home.rows().values())


@pytest.mark.parametrize("coarse", [False, True])
def test_a_file_touched_just_now_has_no_stamp_yet(tmp_path: Path, coarse: bool) -> None:
    """A change within the same tick of the clock would leave size and times as they are."""
    path = tmp_path / "a.txt"
    path.write_text("one")
    found = path.stat()
    seconds = int(found.st_ctime_ns // 10**9)
    times = {"st_mtime_ns": seconds * 10**9, "st_ctime_ns": seconds * 10**9 + (not coarse)}
    told = os.stat_result(found, {**_times(found), **times})
    grain = COARSE_NS if coarse else FINE_NS
    for past, trusted in ((grain // 2, False), (grain - 1000, False), (grain + 1000, True)):
        with (
            patch("os.stat", return_value=told),
            patch("time.time_ns", return_value=max(times.values()) + past),
        ):
            assert (stamp_of(str(path)) is not None) == trusted


def _times(found: os.stat_result) -> dict[str, Any]:
    return {name: getattr(found, name) for name in dir(found) if name.startswith("st_")}


def test_a_stamp_tells_a_file_put_in_the_place_of_another(tmp_path: Path) -> None:
    for name in ("a.txt", "b.txt"):
        (tmp_path / name).write_text("same")
    (tmp_path / "link.txt").symlink_to(tmp_path / "a.txt")

    def stamps() -> list[bytes | None]:
        return [stamp_of(str(tmp_path / name)) for name in ("a.txt", "b.txt", "link.txt")]

    assert stamps() == [None] * 3
    time.sleep(SETTLED_S)
    one, other, link = stamps()
    assert None not in (one, other)
    assert one == link != other
    assert stamp_of(str(tmp_path / "gone.txt")) is None
    (tmp_path / "link.txt").unlink()
    (tmp_path / "link.txt").symlink_to(tmp_path / "b.txt")
    assert stamps() == [one, other, other]


def test_stamps_belong_to_the_published_generation(home: Home) -> None:
    home.reindex()
    before = home.rows()
    home.write({"a.md": NOTES.upper()})
    home.reindex()
    after = home.rows()
    time.sleep(SETTLED_S)
    rollback(home.config())
    assert home.rows() == before
    ran, read = home.reindex()
    assert read == ["a.md", "b/c.txt", "d.py"]
    assert (home.rows(), ran.sent) == (after, [])
    assert home.reindex()[1] == []


def test_an_index_that_is_gone_is_built_from_files_that_are_read(home: Home) -> None:
    home.reindex()
    rows = home.rows()
    (home.folder / "index").rename(home.folder / "away")
    ran, read = home.reindex()
    assert (len(read), ran.published.way) == (3, "create")
    assert home.rows() == rows


@pytest.mark.parametrize(
    "source", [{"split": {"max_tokens": 32, "overlap_tokens": 0}}, {"include": ["*.md"]}]
)
def test_another_way_to_cut_reads_anew_another_choice_does_not(
    home: Home, source: dict[str, Any]
) -> None:
    home.reindex()
    _, read = home.reindex(**source)
    assert len(read) == (3 if "split" in source else 0)


def test_another_text_in_front_reads_anew(home: Home) -> None:
    home.reindex()
    home.settings = {"prepend": ["document", "title"]}
    (home.folder / "index").rename(home.folder / "away")
    assert len(home.reindex()[1]) == 3
    assert home.reindex()[1] == []


def kept(home: Home) -> list[Path]:
    return [path for path in (home.folder / "state" / "stamps").rglob("*") if path.is_file()]


@pytest.mark.parametrize("damage", [b"", b"nonsense", None])
def test_stamps_that_cannot_be_read_cost_a_reading(
    home: Home, damage: bytes | None, caplog: pytest.LogCaptureFixture
) -> None:
    home.reindex()
    [file] = kept(home)
    file.write_bytes(file.read_bytes()[:-200] if damage is None else damage)
    ran, read = home.reindex()
    assert len(read) == 3
    assert ran.published.way == "none"
    assert ("All files are read" in caplog.text) == (damage != b"")
    assert home.reindex()[1] == []


def test_stamps_that_cannot_be_kept_harm_no_run(
    home: Home, caplog: pytest.LogCaptureFixture
) -> None:
    (home.folder / "state").mkdir()
    (home.folder / "state" / "stamps").write_text("in the way")
    ran, _ = home.reindex()
    assert ran.published.way == "create"
    assert "The next run reads all files" in caplog.text
    assert len(home.reindex()[1]) == 3


def test_of_old_generations_nothing_is_kept(home: Home) -> None:
    home.reindex()
    home.write({"a.md": "Another text."})
    home.reindex()
    assert len(kept(home)) == 1


def test_a_plan_uses_stamps_and_keeps_none(home: Home) -> None:
    home.reindex()
    [file] = kept(home)
    before = file.read_bytes()
    home.write({"a.md": NOTES.upper()})
    with reads(home.corpus) as read:
        plan = make_plan(home.config(), Overrides())
    assert read.documents == ["a.md"]
    assert plan.chunks.changed > 0
    assert [path.read_bytes() for path in kept(home)] == [before]


def test_verify_reads_every_file(home: Home) -> None:
    home.reindex()
    with reads(home.corpus) as read:
        verify(home.config())
    assert read.documents[:3] == ["a.md", "b/c.txt", "d.py"]


def test_a_narrowed_run_keeps_what_it_does_not_look_at(home: Home) -> None:
    home.reindex()
    home.write({"b/c.txt": "A wren sings. " * 30})
    time.sleep(SETTLED_S)
    ran, read = home.reindex(Overrides(narrow="b"))
    assert (ran.published.generation, read) == (2, ["b/c.txt"])
    assert home.reindex()[1] == []
    (home.corpus / "a.md").unlink()
    home.reindex()
    assert {row[0] for row in home.rows().values()} == {"b/c.txt", "d.py"}


def test_a_file_that_changes_between_the_passes_is_read_again(home: Home) -> None:
    path = home.corpus / "a.md"
    ran = home.run(home.config(), before_second_pass=lambda: path.write_text("Else."))
    assert {row[0] for row in home.rows().values()} == {"b/c.txt", "d.py"}
    assert ran.survey.keyed.notes.untouched == 0
    time.sleep(SETTLED_S)
    assert home.reindex()[1] == ["a.md", "b/c.txt", "d.py"]
    assert any(row[1] == "Else." for row in home.rows().values())


# Whatever happens to the files

NAMES = st.sampled_from(["a.txt", "b.md", "c/d.txt", "c/e.py", "f.txt"])
TEXTS = st.sampled_from(
    ["", " ", "one two", "two one", "\0\1", "# A\n\nword " * 9, "# B\n\nward " * 9, "x = 1\n" * 40]
)
STEPS = st.lists(
    st.one_of(
        st.tuples(st.just("write"), NAMES, TEXTS),
        st.tuples(st.just("same size"), NAMES),
        st.tuples(st.just("touch"), NAMES),
        st.tuples(st.just("rename"), NAMES, NAMES),
        st.tuples(st.just("delete"), NAMES),
        st.tuples(st.just("back in time"), NAMES, TEXTS),
        st.tuples(st.just("wait")),
        st.tuples(st.just("run")),
        st.tuples(st.just("roll back")),
    ),
    min_size=4,
    max_size=14,
)


def take(step: tuple[str, ...], home: Home) -> None:  # noqa: C901 - a step a branch
    kind, *names = step
    path = home.corpus / names[0] if names else home.corpus
    if kind == "write":
        home.write({names[0]: names[1]})
    elif kind == "wait":
        time.sleep(0.03)
    elif kind == "run":
        home.run(home.config())
    elif kind == "roll back":
        table = open_index(home.config().index)
        if table is not None and len(table.tags.list()) > 1:
            rollback(home.config())
    elif kind == "back in time":
        home.write({names[0]: names[1]})
        os.utime(path, (1e9, 1e9))
    elif not path.exists():
        return
    elif kind == "same size":
        same_size_edit(path)
    elif kind == "touch":
        os.utime(path)
    elif kind == "rename":
        (home.corpus / names[1]).parent.mkdir(exist_ok=True)
        path.replace(home.corpus / names[1])
    else:
        path.unlink()


@pytest.mark.slow
@given(steps=STEPS)
@settings(max_examples=20, deadline=None)
def test_the_index_is_what_it_would_be_if_all_were_read(
    steps: list[tuple[str, ...]], fresh: Callable[[], Path], reindex: Reindex
) -> None:
    home = Home(fresh(), reindex)
    home.write({"a.txt": "one two", "always.txt": "There is always a text."})
    with patch.object(tasks.read.stamp, "FINE_NS", 20_000_000):
        for step in [*steps, ("run",)]:
            take(step, home)
            if step[0] in {"write", "same size", "back in time", "roll back"}:
                assert_plans_agree(home)
    assert verify(home.config()).findings == ()


def assert_plans_agree(home: Home) -> None:
    trusting, all_read = (
        make_plan(home.config(trust_mtime=trust), Overrides()) for trust in (True, False)
    )
    assert trusting == all_read


@pytest.mark.slow
def test_order_and_counts_are_the_same_whatever_is_known(home: Home) -> None:
    """Many documents, of which every third is touched, some without a text."""
    texts = {f"{at:03}.txt": f"Chapter {at}. " * (at % 40) for at in range(300)}
    home.write(texts)
    with patch.object(tasks.read.files, "ROWS", 20), patch.object(tasks.stamps, "STEP", 7):
        home.reindex()
        for at in range(0, 300, 3):
            home.write({f"{at:03}.txt": f"Verse {at}. " * ((at + 20) % 40)})
        assert_plans_agree(home)
        home.reindex()
    assert verify(home.config()).findings == ()
