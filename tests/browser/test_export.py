"""From a finished job to a certified folder, in a real browser against the real app and a real (tiny) job."""

from __future__ import annotations

import dataclasses
import http.client
import json
import re
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest
import yaml
from playwright.sync_api import BrowserContext, Locator, Page, expect

import studio
from studio.base import EMBEDDED_DIR
from studio.certificate import CERTIFICATE, read_certificate, write_certificate
from tests.browser.conftest import App

TICKETS = Path(__file__).parents[2] / "recipes" / "data"
SECONDS = 90
EVIL = "<img src=x onerror=\"document.title='run'\"><script>document.title='run'</script>"


@pytest.fixture(scope="module")
def job(app: App) -> studio.Job:
    recipe = {
        "data": {"train": str(TICKETS / "tickets-train.jsonl"), "eval": str(TICKETS / "tickets-eval.jsonl")},
        "adapter": {"attention_rank": 4, "routed_experts_rank": 4},
        "training": {"max_steps": 8, "batch_size": 4, "learning_rate": 5e-3},
        "evaluation": {"examples": 2, "generations": 0, "max_new_tokens": 4},
        "output": {"dir": str(app.jobs_root / "pumps")},
    }
    file = app.folder / "recipe.yaml"
    file.write_text(yaml.safe_dump(recipe))
    subprocess.run([sys.executable, "-m", "studio.cli", "run", str(file), "--json"], check=True, capture_output=True)
    return studio.open_job(app.jobs_root / "pumps")


@pytest.fixture
def page(app: App, job: studio.Job, context: BrowserContext) -> Page:
    page = context.new_page()
    page.goto(f"{app.url}/jobs")
    page.get_by_role("navigation", name="Jobs").get_by_role("link", name=job.name).click()
    expect(page).to_have_url(f"{app.url}/jobs?job={job.name}")
    page.get_by_role("region", name="Adapter").get_by_role("link", name="Export").click()
    expect(page.get_by_role("heading", name="What will be written")).to_be_visible()
    return page


def field(page: Page, title: str) -> Locator:
    return page.get_by_label(re.compile(rf"^\s*{title}")).first


def planned(page: Page, title: str) -> Locator:
    return page.get_by_role("group").filter(has_text=title)


def test_from_a_job_to_a_certified_folder(app: App, page: Page, requested: list[str]) -> None:
    choose_what_it_is_for(page)
    say_another_name(page)
    stop_it(app, page)
    export_it(app, page)
    see_the_certificate(app, page)
    download_it(app, page)
    stray = [url for url in requested if not url.startswith((app.url, "data:", "blob:"))]
    assert not stray


def choose_what_it_is_for(page: Page) -> None:
    """Each program has its formats and options; the plan follows at once."""
    expect(field(page, "Job")).to_have_value("pumps")
    expect(field(page, "Name")).to_have_value("pumps-transformers")
    expect(planned(page, "Verified in")).to_contain_text("stock transformers")
    page.get_by_label("Ollama").check()
    expect(field(page, "Name")).to_have_value("pumps-ollama")
    expect(page.get_by_text("Modelfile: template, stop strings, context", exact=True)).to_be_visible()
    page.get_by_label("Measure what matters on the training data").check()
    expect(page.get_by_text("ollama create pumps-ollama -f Modelfile")).to_be_visible()
    field(page, "Type").click()
    page.get_by_role("option", name="F32", exact=True).click()
    expect(planned(page, "Size")).to_contain_text("about 21.3 MB")
    expect(planned(page, "Verified in")).to_contain_text("llama.cpp")
    page.get_by_label("PEFT (adapter)").check()
    expect(field(page, "Merged into the base in")).to_have_count(0)
    page.get_by_label("transformers", exact=True).check()
    expect(field(page, "Type")).to_have_count(0)
    field(page, "Merged into the base in").click()
    expect(page.get_by_role("option", name=re.compile("as training held them"))).to_be_visible()
    page.get_by_role("option", name="its own weights", exact=True).click()
    expect(page.get_by_text("pumps-transformers/run.py")).to_be_visible()


def say_another_name(page: Page) -> None:
    field(page, "Name").fill("../escape")
    expect(page.get_by_role("alert")).to_contain_text("allowed: a name without /")
    expect(page.get_by_role("button", name="Export", exact=True)).to_be_disabled()
    field(page, "Name").fill("my-pumps")
    expect(page.get_by_text("my-pumps/run.py")).to_be_visible()
    page.get_by_label("vLLM", exact=True).check()
    expect(page.get_by_text("--served-model-name my-pumps")).to_be_visible()  # a name that was typed stays
    page.get_by_label("transformers", exact=True).check()
    expect(page.get_by_text("my-pumps/run.py")).to_be_visible()


def stop_it(app: App, page: Page) -> None:
    page.get_by_role("button", name="Export", exact=True).click()
    expect(page.get_by_text(re.compile(r"(Writing|Verifying in fresh processes) · "))).to_be_visible(
        timeout=1000 * SECONDS
    )
    page.get_by_role("button", name="Cancel this export").click()
    expect(page.get_by_text("my-pumps was cancelled")).to_be_visible(timeout=1000 * SECONDS)
    assert not list((app.folder / "exports").iterdir())


def export_it(app: App, page: Page) -> None:
    """A page that is closed loses nothing: whoever opens it again sees the export that runs."""
    page.get_by_role("button", name="Export", exact=True).click()
    expect(page.get_by_role("list", name="Stages")).to_be_visible()
    page.goto(f"{app.url}/export")
    expect(page.get_by_role("heading", name="my-pumps", level=1)).to_be_visible()
    expect(page.get_by_role("button", name="Cancel this export")).to_be_visible()
    expect(page.get_by_role("heading", name="Certificate")).to_be_visible(timeout=1000 * SECONDS)


def see_the_certificate(app: App, page: Page) -> None:
    certificate = read_certificate(app.folder / "exports" / "my-pumps")
    link = page.get_by_role("link", name=re.compile("^my-pumps"))
    expect(link).to_contain_text("verified")
    link.click()
    expect(link).to_have_attribute("aria-current", "page")
    shown = page.get_by_role("region", name="Certificate")
    for check in certificate.checks:
        expect(shown.get_by_role("row", name=re.compile("^" + re.escape(check.name)))).to_contain_text(check.status)
    files = page.get_by_role("region", name="Files")
    for name, file in certificate.files.items():
        expect(files.get_by_role("row", name=re.compile("^" + re.escape(name)))).to_contain_text(file["sha256"])
    expect(page.get_by_text("the first 8 held-out examples of the job's tickets-eval.jsonl")).to_be_visible()


def download_it(app: App, page: Page) -> None:
    with page.expect_download() as download:
        page.get_by_role("link", name="Download").click()
    folder = app.folder / "exports" / "my-pumps"
    with zipfile.ZipFile(download.value.path()) as archive:
        assert archive.testzip() is None
        files = {str(path.relative_to(folder.parent)) for path in folder.rglob("*") if path.is_file()}
        assert set(archive.namelist()) == files
        assert archive.read("my-pumps/model.safetensors") == (folder / "model.safetensors").read_bytes()


def test_a_name_that_is_taken_and_a_base_that_changed_are_said_before_anything_is_written(app: App, page: Page) -> None:
    (app.folder / "exports" / "taken").mkdir(parents=True)
    field(page, "Name").fill("taken")
    expect(page.get_by_role("alert")).to_contain_text("taken exists already")
    sidecar = app.jobs_root / "pumps" / "adapter" / "studio_adapter.json"
    text = sidecar.read_text()
    said = json.loads(text)
    try:
        sidecar.write_text(json.dumps({**said, "base": {**said["base"], "weights": "0" * 64}}))
        field(page, "Name").fill("other")
        expect(page.get_by_role("alert")).to_contain_text("differs from it in its weights")
    finally:
        sidecar.write_text(text)


def test_text_of_certificates_is_shown_and_never_run(app: App, context: BrowserContext) -> None:
    from adapters.export import Source
    from adapters.verify import Check

    folder = app.folder / "exports" / "evil"
    folder.mkdir(parents=True)
    made = write_certificate(
        folder,
        source=Source(EMBEDDED_DIR, None, EVIL),
        base_name=EVIL,
        format="safetensors",
        consumer="vllm",
        checks=[Check(EVIL, "failed", EVIL)],
        prompts_from=EVIL,
    )
    text = json.loads((folder / CERTIFICATE).read_text())
    (folder / CERTIFICATE).write_text(
        json.dumps({**text, "verdict": EVIL, "files": {EVIL: {"bytes": 1, "sha256": EVIL}}})
    )
    assert dataclasses.asdict(made)["name"] == EVIL
    page = context.new_page()
    page.goto(f"{app.url}/export?export=evil")
    expect(page.get_by_role("region", name="Certificate")).to_contain_text(EVIL)
    expect(page.get_by_role("region", name="Files")).to_contain_text(EVIL)
    expect(page).to_have_title("MoE Studio")
    page.goto(f"{app.url}/export?export=..%2F{EVIL}&job={EVIL}")
    expect(page.get_by_role("heading", name="This export cannot be shown")).to_be_visible()
    expect(page).to_have_title("MoE Studio")


def test_other_folders_are_out_of_reach(app: App) -> None:
    (app.folder / "exports").mkdir(exist_ok=True)
    (app.folder / "exports" / "link").symlink_to(app.folder)
    for name in ("..%2Fruns", "%2e%2e", "nothing", "%2Fetc", "link", "..%5Cruns"):
        connection = http.client.HTTPConnection("127.0.0.1", app.port, timeout=20)
        connection.request("GET", f"/export/{name}.zip")
        assert connection.getresponse().status == 404, name
