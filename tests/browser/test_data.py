"""A data file in the browser: what is wrong with it, its columns named, what of it is learned."""

from __future__ import annotations

import json
import re

from playwright.sync_api import BrowserContext, Locator, Page, expect

from tests.browser.conftest import App

EVIL = "<img src=x onerror=\"document.title='run'\"><b>no</b>"


def field(page: Page, title: str) -> Locator:
    return page.get_by_label(re.compile(rf"^\s*{title}")).first


def test_columns_are_named_and_the_learned_tokens_are_marked(
    app: App, context: BrowserContext, requested: list[str]
) -> None:
    file = app.folder / "asked.jsonl"
    file.write_text(
        "".join(json.dumps({"ask": f"{n} plus 1? {EVIL}", "reply": f"It is {n + 1}."}) + "\n" for n in (1, 2))
    )
    page = context.new_page()
    page.goto(f"{app.url}/data")
    expect(field(page, "File")).to_have_value(re.compile("tickets-train.jsonl$"))
    field(page, "File").fill(str(file))
    page.get_by_role("button", name="Inspect").click()
    expect(page.get_by_role("alert")).to_contain_text("2 rows cannot be trained on")
    expect(page.get_by_role("alert")).to_contain_text("lines 1, 2: needs messages")
    field(page, "Columns").fill("prompt=ask, completion=reply")
    page.get_by_role("button", name="Inspect").click()
    expect(page.get_by_role("heading", name="As the model reads them")).to_be_visible()
    expect(page.locator("figure mark").first).to_have_text(re.compile(r"It is \d\."))
    expect(page.locator("figure pre").first).to_contain_text(EVIL)
    expect(page.get_by_text("prompt: ask")).to_be_visible()
    expect(page.get_by_role("alert")).to_have_count(0)
    expect(page).to_have_title("MoE Studio")
    field(page, "Columns").fill("prompt")
    page.get_by_role("button", name="Inspect").click()
    expect(page.get_by_role("alert")).to_contain_text("allowed: ours=theirs")
    field(page, "Columns").fill("")
    field(page, "File").fill(str(app.folder / "none.jsonl"))
    page.get_by_role("button", name="Inspect").click()
    expect(page.get_by_role("alert")).to_contain_text("no such file")
    assert not [url for url in requested if not url.startswith((app.url, "data:", "blob:"))]
