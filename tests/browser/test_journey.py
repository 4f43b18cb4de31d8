"""From a recipe to a downloaded adapter, in a real browser against the real app and a real (tiny) training job."""

from __future__ import annotations

import http.client
import json
import re
import zipfile
from pathlib import Path

from playwright.sync_api import BrowserContext, Locator, Page, expect

import studio
from studio.jobs import Job, create_job
from tests.browser.conftest import App

RECIPES = Path(__file__).parents[2] / "recipes"
JOB_SECONDS = 70
EVIL = (
    "<img src=x onerror=\"document.title='run'\"><script>document.title='run'</script>${document.title='run'}{{title}}`"
)


def field(page: Page, title: str) -> Locator:
    return page.get_by_label(re.compile(rf"^\s*{title}")).first


def editor(page: Page) -> Locator:
    return page.get_by_role("textbox").filter(has_text="quantization:")


def test_from_a_recipe_to_a_downloaded_adapter(app: App, context: BrowserContext, requested: list[str]) -> None:
    page = context.new_page()
    page.goto(app.url)
    pick_a_recipe(page)
    edit_in_the_form(page)
    break_the_yaml_and_mend_it(page)
    make_it_tiny(page)
    choose_experts_by_the_data(page)
    profile_the_data(page)
    see_the_plan_and_start(page)
    address = page.url
    see_the_loss(page)
    page.close()

    app.end()
    job = studio.open_job(app.jobs_root / "embedded-sft-experts")
    assert not job.state().ended, "the job ended before the app did: it proves nothing about the restart"
    app.start()

    page = context.new_page()
    page.goto(address)
    see_the_result(page, job)
    download_the_adapter(page, job)
    open_its_recipe_again(page)
    be_asked_before_it_is_replaced(page)
    stray = [url for url in requested if not url.startswith((app.url, "data:", "blob:"))]
    assert not stray


def pick_a_recipe(page: Page) -> None:
    expect(page.get_by_text("This recipe is valid")).to_be_visible()
    expect(editor(page)).to_contain_text("dir: runs/quickstart")
    page.get_by_label("Open a recipe").click()
    page.get_by_role("option", name="embedded-sft-experts").click()
    expect(editor(page)).to_contain_text("experts: [0, 3, 7, 12]")
    expect(field(page, "Expert ids")).to_have_value("[0, 3, 7, 12]")


def edit_in_the_form(page: Page) -> None:
    field(page, "Learning rate").fill("1.5e-3")
    expect(editor(page)).to_contain_text("learning_rate: 1.5e-3")
    field(page, "Batch size").press("End")
    field(page, "Batch size").press("Backspace")
    expect(editor(page)).to_contain_text(re.compile(r"batch_size: 1\s+gradient"))
    field(page, "Attention rank").fill("many")
    wanted = 'received the text "many"; allowed: a whole number, at least 0, at most 1024'
    expect(page.get_by_role("alert")).to_contain_text(wanted)
    expect(field(page, "Attention rank")).to_have_accessible_name(re.compile("Received the text .many."))
    expect(page.get_by_role("button", name="See the plan")).to_be_disabled()
    field(page, "Attention rank").fill("4")
    expect(page.get_by_text("This recipe is valid")).to_be_visible()


def break_the_yaml_and_mend_it(page: Page) -> None:
    before = editor(page).inner_text()
    editor(page).click()
    page.keyboard.press("Control+Home")
    page.keyboard.type("oops\n")
    expect(page.get_by_role("alert")).to_contain_text("not valid YAML")
    expect(page.get_by_role("alert")).to_contain_text(re.compile(r"line \d"))
    expect(field(page, "Batch size")).to_be_disabled()
    assert editor(page).inner_text() == "oops\n" + before
    page.keyboard.press("Backspace")
    for _ in "oops":
        page.keyboard.press("Backspace")
    expect(page.get_by_text("This recipe is valid")).to_be_visible()
    expect(field(page, "Batch size")).to_be_enabled()
    page.keyboard.press("Control+End")
    page.keyboard.type("\ncolour: red")
    line = editor(page).inner_text().rstrip().count("\n") + 1
    expect(page.get_by_role("alert").filter(has_text="unknown key")).to_have_count(2)  # at the section and in the list
    expect(page.get_by_text(f"line {line}", exact=True)).to_be_visible()
    page.keyboard.press("Shift+Home")
    page.keyboard.press("Backspace")
    expect(page.get_by_text("This recipe is valid")).to_be_visible()


def make_it_tiny(page: Page) -> None:
    page.get_by_role("button", name="More training settings").click()
    page.get_by_role("button", name="More evaluation settings").click()
    tiny = {
        "Epochs": "",
        "Steps, instead of epochs": "32",
        "Steps between loss points": "1",
        "Batch size": "4",
        "Examples to compare on": "6",
        "Answers to show": "2",
        "Longest answer": "24",
    }
    for title, value in tiny.items():
        field(page, title).fill(value)
    expect(editor(page)).to_contain_text("max_steps: 32")
    expect(editor(page)).to_contain_text("max_new_tokens: 24")
    expect(page.get_by_text("This recipe is valid")).to_be_visible()


def choose_experts_by_the_data(page: Page) -> None:
    """Another rule: its own fields come, and what only the old one read goes, from the form and from the YAML."""
    expect(field(page, "Fraction of experts")).to_have_count(0)
    field(page, "Which routed experts").click()
    page.get_by_role("option", name="top_fraction", exact=True).click()
    field(page, "Fraction of experts").fill("0.5")
    expect(editor(page)).to_contain_text("fraction: 0.5")
    expect(editor(page)).to_contain_text("experts: null")
    expect(field(page, "Expert ids")).to_have_count(0)
    page.get_by_role("button", name="More placement settings").click()
    field(page, "Tokens to profile").fill("3000")
    expect(editor(page)).to_contain_text("profile_tokens: 3000")
    expect(page.get_by_text("This recipe is valid")).to_be_visible()


def profile_the_data(page: Page) -> None:
    """The rule needs a profile: the plan says so, the button makes one, and the plan comes with its pictures."""
    page.get_by_role("button", name="See the plan").click()
    expect(page.get_by_text("This rule has to know where your data goes")).to_be_visible()
    expect(page.get_by_role("button", name="Start training")).to_have_count(0)
    page.get_by_role("button", name="Profile the data").click()
    expect(page.get_by_text(re.compile(r"Loading the|Routing a sample"))).to_be_visible()
    expect(page.get_by_role("group").filter(has_text="Adapted experts")).to_contain_text(
        "32 of 64", timeout=1000 * JOB_SECONDS
    )
    expect(page.get_by_role("button", name="Profile the data")).to_have_count(0)
    expect(page.get_by_role("region", name="Coverage").get_by_role("row", name=re.compile("tickets"))).to_contain_text(
        re.compile(r"\d of 16.*%")
    )
    expect(page.get_by_text("LoRA rank of each expert")).to_be_visible()
    expect(page.get_by_text(re.compile("^Use by the training tokens"))).to_be_visible()
    point_at_an_expert(page)


def point_at_an_expert(page: Page) -> None:
    picture = page.get_by_test_id("plotly").first
    picture.scroll_into_view_if_needed()
    picture.hover()
    expect(picture.locator(".hovertext")).to_have_text(
        re.compile(r"layer \d, expert \d+.*% of the layer's tokens(rank 16|no adapter)")
    )


def see_the_plan_and_start(page: Page) -> None:
    row = page.get_by_role("row", name=re.compile("^Routed experts"))
    expect(row.get_by_role("cell", name="nf4")).to_be_visible()
    expect(page.get_by_role("img", name=re.compile("^Predicted peak memory: Libraries"))).to_be_visible()
    expect(page.get_by_role("group").filter(has_text="Steps")).to_contain_text("32")
    field(page, "Batch size").fill("5")
    expect(page.get_by_text("The recipe has changed since this plan")).to_be_visible()
    page.get_by_role("button", name="See the new plan").click()
    page.get_by_role("button", name="Start training").click()
    expect(page.get_by_role("heading", name="embedded-sft-experts", level=1)).to_be_visible()
    assert page.url.endswith("/jobs?job=embedded-sft-experts")


def see_the_loss(page: Page) -> None:
    expect(page.get_by_text(re.compile(r"Train · \d+ / 32 steps"))).to_be_visible(timeout=1000 * JOB_SECONDS)
    expect(page.get_by_text(re.compile(r"^at step \d+$"))).to_be_visible(timeout=1000 * JOB_SECONDS)
    expect(page.get_by_label("Vega visualization")).to_be_visible()
    expect(page.get_by_role("heading", name="The router while training")).to_be_visible()
    expect(page.get_by_text(re.compile("^Drift from the base"))).to_be_visible()


def see_the_result(page: Page, job: Job) -> None:
    link = page.get_by_role("link", name=re.compile("^embedded-sft-experts"))
    expect(link).to_have_attribute("aria-current", "page")
    expect(page.get_by_role("heading", name="Base and tuned, side by side")).to_be_visible(timeout=1000 * JOB_SECONDS)
    expect(link).to_contain_text("succeeded")
    result = job.result()
    assert result and job.state().status == "succeeded"
    answers = page.get_by_role("article")
    expect(answers).to_have_count(2)
    for i, entry in enumerate(result["generations"]):
        for text in ("Base", "Tuned", "Reference", entry["prompt"].strip(), entry["reference"].strip()):
            expect(answers.nth(i)).to_contain_text(text)
    loss = page.get_by_role("group").filter(has_text="Held-out loss")
    expect(loss).to_contain_text(f"{result['before']['loss']:.3f} → {result['after']['loss']:.3f}")
    expect(page.get_by_role("group").filter(has_text="Peak memory")).to_contain_text("predicted")
    for title in ("Use by the training tokens", "Use after training minus before", "Size of the update"):
        expect(page.get_by_text(re.compile(f"^{title}"))).to_be_visible()
    assert {path.stem for path in (job.path / "pictures").iterdir()} >= {"use", "rank", "change", "delta", "router"}


def download_the_adapter(page: Page, job: Job) -> None:
    with page.expect_download() as download:
        page.get_by_role("link", name="Download the adapter").click()
    with zipfile.ZipFile(download.value.path()) as archive:
        assert archive.testzip() is None
        assert {"adapter_config.json", "adapter_model.safetensors"} <= set(archive.namelist())
        weights = (job.path / "adapter" / "adapter_model.safetensors").read_bytes()
        assert archive.read("adapter_model.safetensors") == weights


def open_its_recipe_again(page: Page) -> None:
    """The job's recipe in the editor, under a name that is free."""
    page.get_by_role("link", name="Use this recipe again").click()
    expect(editor(page)).to_contain_text("dir: runs/embedded-sft-experts-2")
    expect(field(page, "Batch size")).to_have_value("5")


def be_asked_before_it_is_replaced(page: Page) -> None:
    field(page, "Job directory").fill("runs/embedded-sft-experts")
    expect(editor(page)).to_contain_text(re.compile(r"dir: runs/embedded-sft-experts$"))
    page.get_by_role("button", name="See the plan").click()
    page.get_by_role("button", name="Start training").click()
    expect(page.get_by_text("A job named embedded-sft-experts exists already")).to_be_visible()
    expect(page.get_by_role("button", name="Start as embedded-sft-experts-2")).to_be_visible()
    page.get_by_role("button", name="Back", exact=True).click()
    expect(page.get_by_role("button", name="Start training")).to_be_visible()


def test_text_of_models_and_files_is_shown_and_never_run(app: App, context: BrowserContext) -> None:
    recipe = studio.load_recipe(RECIPES / "quickstart.yaml")
    output = recipe.output.model_copy(update={"dir": app.jobs_root / "evil"})
    job, _lock = create_job(recipe.model_copy(update={"output": output}), studio.make_plan(recipe), {})
    answers = [{"prompt": EVIL, "reference": EVIL, "base": EVIL + "!", "tuned": EVIL}]
    job.write_result({"generations": answers, "files": {EVIL: EVIL}})
    job.log_metrics({"kind": "train", "step": 1, "loss": None, "tokens_per_second": 0})
    (job.path / "log.txt").write_text(EVIL)
    job.update(status="succeeded", phase="done")

    page = context.new_page()
    page.goto(f"{app.url}/jobs?job=evil")
    expect(page.get_by_role("article").filter(has_text=EVIL)).to_be_visible()
    page.get_by_role("button", name="Log").click()
    expect(page.get_by_role("log")).to_contain_text(EVIL)
    expect(page).to_have_title("MoE Studio")
    page.goto(f"{app.url}/jobs?job=..%2F<img src=x onerror=\"document.title='run'\">")
    expect(page.get_by_role("heading", name="This job cannot be shown")).to_be_visible()
    expect(page).to_have_title("MoE Studio")


def test_other_sites_and_other_folders_are_out_of_reach(app: App) -> None:
    def status(path: str, headers: dict[str, str], body: str | None = None) -> int:
        connection = http.client.HTTPConnection("127.0.0.1", app.port, timeout=20)
        connection.request("POST" if body else "GET", path, body=body, headers=headers)
        return connection.getresponse().status

    event = json.dumps({"data": [], "fn_index": 0, "session_hash": "x"})
    assert status("/", {}) == 200
    assert status("/", {"Host": "evil.example"}) == 400
    assert status("/gradio_api/queue/join", {"Host": f"evil.example:{app.port}"}, event) == 400
    assert status("/gradio_api/queue/join", {"Origin": "http://evil.example"}, event) == 403
    for name in ("..%2Fruns", "%2e%2e", "nothing", "%2Fetc", "..%5Cruns"):
        assert status(f"/adapter/{name}", {}) == 404
