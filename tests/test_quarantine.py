"""A refused text is kept from being sent, space by space, until it changes or is released."""

from collections.abc import Callable
from pathlib import Path

from hypothesis import given, settings
from hypothesis import strategies as st

from tasks.journal import RunFolder
from tasks.keys import text_hash
from tasks.ledger import Ledger
from tasks.notes import About, Call, Refused
from tasks.providers import Space
from tasks.quarantine import Quarantine, quarantined
from tasks.recover import recover
from tasks.run import record_death

HERE, THERE = Space("voyage", "voyage-4", 256), Space("voyage", "voyage-4", 512)


def refused(text: str, reason: str = "bad", *, lasting: bool = True) -> Refused:
    return Refused(text_hash(text), reason, lasting)


def test_a_text_keeps_the_time_it_was_first_refused(tmp_path: Path) -> None:
    Quarantine(str(tmp_path), HERE.id).add([refused("a"), refused("b", "odd")], "one", "2026-01-01")
    later = Quarantine(str(tmp_path), HERE.id)
    assert later.reasons == {text_hash("a"): "bad", text_hash("b"): "odd"}
    later.add([refused("a", "worse")], "two", "2026-01-02")
    later.saw([text_hash("b"), text_hash("never refused")], "three", "2026-01-03")
    rows = {row["text_hash"]: row for row in quarantined(str(tmp_path)).to_dict("records")}
    assert len(rows) == 2
    a, b = rows[text_hash("a")], rows[text_hash("b")]
    assert (a["reason"], a["first_seen"], a["last_seen"], a["run_id"]) == (
        "worse", "2026-01-01", "2026-01-02", "two",
    )  # fmt: skip
    assert (b["reason"], b["first_seen"], b["last_seen"], b["run_id"]) == (
        "odd", "2026-01-01", "2026-01-03", "three",
    )  # fmt: skip


def test_each_space_has_its_own(tmp_path: Path) -> None:
    Quarantine(str(tmp_path), HERE.id).add([refused("a")], "run", "2026-01-01")
    there = Quarantine(str(tmp_path), THERE.id)
    assert there.reasons == {}
    there.add([refused("a", "too")], "run", "2026-01-01")
    Quarantine(str(tmp_path), THERE.id).release([text_hash("a")])
    assert Quarantine(str(tmp_path), HERE.id).reasons == {text_hash("a"): "bad"}
    assert list(quarantined(str(tmp_path))["space"]) == [HERE.id]


def test_what_does_not_last_is_not_kept(tmp_path: Path) -> None:
    Quarantine(str(tmp_path), HERE.id).add([refused("a", lasting=False)], "run", "2026-01-01")
    assert len(quarantined(str(tmp_path))) == 0
    assert list(tmp_path.iterdir()) == []


steps = st.lists(
    st.tuples(st.sampled_from(["add", "saw", "release"]), st.sets(st.sampled_from("abcd"))),
    max_size=6,
)


@given(steps)
@settings(max_examples=15, deadline=None)
def test_it_holds_what_was_added_and_not_released(
    fresh: Callable[[], Path], steps: list[tuple[str, set[str]]]
) -> None:
    state, expected = str(fresh()), set[str]()
    for number, (step, texts) in enumerate(steps):
        one, now = Quarantine(state, HERE.id), f"2026-01-{number + 1:02}"
        hashes = [text_hash(text) for text in sorted(texts)]
        if step == "add":
            one.add([refused(text) for text in sorted(texts)], "run", now)
            expected |= texts
        elif step == "saw":
            one.saw(hashes, "run", now)
        else:
            one.release(hashes)
            expected -= texts
        assert set(one.reasons) == set(one.hashes.to_pylist()) == set(map(text_hash, expected))
    assert set(Quarantine(state, HERE.id).reasons) == set(map(text_hash, expected))


def test_what_a_killed_run_found_out_is_not_found_out_again(
    tmp_path: Path, call_of: Callable[..., Call]
) -> None:
    dead = RunFolder(str(tmp_path), "dead")
    about = About("dead", "docs", "here/docs", "2026-01-01T00:00:00+00:00", 8)
    with dead.alive(about):  # it ends with its notes untold
        dead.note(call_of("dead", status="BatchRefused"))
        dead.refuse(HERE, refused("a"))
        dead.refuse(THERE, refused("b", lasting=False))
    torn = tmp_path / "runs/dead/refused/torn.json"
    torn.write_text('[{"space": "x", "text_ha', encoding="utf-8")
    assert len(recover(str(tmp_path), record_death).set_aside) == 1
    assert Quarantine(str(tmp_path), HERE.id).reasons == {text_hash("a"): "bad"}
    assert Quarantine(str(tmp_path), THERE.id).reasons == {}
    assert list(Ledger(str(tmp_path)).calls()["status"]) == ["BatchRefused"]
    assert list(Ledger(str(tmp_path)).runs()["state"]) == ["died"]
    assert not dead.names()
    assert not (tmp_path / "runs/dead").exists()
