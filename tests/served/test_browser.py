"""The pages of Prefect's UI, in a real browser: a run is started, approved and read there."""

import re
from typing import Any

import pytest

from tasks.simulator import Latency

pytestmark = [pytest.mark.slow, pytest.mark.timeout(600)]


def address(served: Any, ui: str, path: str) -> str:
    return f"{served.url}{ui}/{path}"


@pytest.mark.parametrize("ui", ["", "/v2"])
def test_a_newcomer_fills_the_form_and_starts_a_run(
    served: Any, birds: Any, page: Any, ui: str
) -> None:
    birds.simulator.change(latency=Latency())
    deployment = served("deployments/name/reindex/ad-hoc", "GET")["id"]
    page.goto(address(served, ui, f"deployments/deployment/{deployment}/run"))
    for told in (
        "Path of the YAML file that describes the corpus and its index.",
        "Look only at this file or folder below source.path",
        "Most US dollars that this run may cost at list price",
        "quarantine: leave them out and do not send them again.",
    ):
        page.get_by_text(told).wait_for()
    labels = page.inner_text("body")
    order = ["Narrower source path", "Maximum price", "Approval threshold", "Further settings"]
    assert sorted(order, key=labels.index) == order
    served.fill(page, 0, str(birds.config))
    served.submit(page)
    # What is published stands there a moment before the run is in the ledger.
    (told,) = served.wait_for(lambda: [run for run in birds.runs() if run["state"] != "no record"])
    assert (told["state"], told["texts.embedded"]) == ("completed", birds.texts)


@pytest.mark.parametrize(("ui", "decision"), [("", "approve"), ("/v2", "reject")])
def test_a_paused_run_is_answered_in_a_form(
    served: Any, birds: Any, page: Any, ui: str, decision: str
) -> None:
    birds.simulator.change(latency=Latency())
    run_id = served.paused(birds.config)
    page.goto(address(served, ui, f"runs/flow-run/{run_id}"))
    if ui:
        page.get_by_role("button", name="Open menu").first.click()
        page.get_by_role("menuitem", name="Resume").click()
    else:
        page.get_by_role("button", name="Resume").first.click()
    form = page.get_by_role("dialog")
    for told in ("This run would cost about $0.0000", "Decision", "Maximum price"):
        form.get_by_text(told).first.wait_for()
    form.get_by_text("approve: the plan is made anew").wait_for()
    said = form.inner_text()
    assert f"{birds.texts} texts to embed" in said
    assert said.index("Decision") < said.index("Maximum price")
    choose(page, form, ui, decision)
    form.get_by_text(decision, exact=True).first.wait_for()
    send(page, form.get_by_role("button", name="Resume" if ui else "Submit"))
    ended = served.end_of(run_id)
    if decision == "approve":
        assert (ended["state_name"], birds.totals("distinct_texts")) == ("Completed", birds.texts)
    else:
        assert (ended["state_name"], birds.arrived) == ("NotApproved", 0)


def send(page: Any, button: Any) -> None:
    """Send the answer; once more where SQLite was locked."""
    for _ in range(5):
        with page.expect_response(lambda heard: heard.url.endswith("/resume")) as answer:
            button.click()
        if answer.value.ok:
            return
    raise AssertionError(f"{answer.value.status}: {page.inner_text('body')}")


def choose(page: Any, form: Any, ui: str, decision: str) -> None:
    """Take one of the decisions that the form's drop-down offers."""
    if ui:
        form.get_by_text("Select", exact=True).click()
        page.get_by_role("option", name=decision).click()
        return
    form.locator(".p-select-button__control").focus()
    page.keyboard.press("ArrowDown")
    page.locator(".p-select-option").filter(has_text=decision).click()


@pytest.mark.parametrize("ui", ["", "/v2"])
def test_the_report_is_read_in_the_browser(served: Any, birds: Any, page: Any, ui: str) -> None:
    birds.simulator.change(latency=Latency(base_s=0.05))
    overrides = {"settings": ["limits.tokens_per_minute=100000"]}
    served.ended("reindex/ad-hoc", config=str(birds.config), overrides=overrides)
    page.goto(address(served, ui, "artifacts/key/report-birds"))
    page.get_by_text("What the run did and what it cost.").first.wait_for()
    page.get_by_role("link", name=re.compile(r"^[0-9a-f]{8}$")).first.click()  # the newest
    page.get_by_text(f"generation 1 published, {birds.texts} chunks written").first.wait_for()
    pictures = page.locator("img[src^='data:image/svg']")
    pictures.first.wait_for()
    for scheme in ("light", "dark"):
        page.emulate_media(color_scheme=scheme)
        widths = pictures.evaluate_all("all => all.map(each => each.naturalWidth)")
        assert len(widths) >= 2
        assert min(widths) > 100
