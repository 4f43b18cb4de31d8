"""The real app in a process of its own, and a real Chromium that looks at it."""

from __future__ import annotations

import os
import shutil
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from pathlib import Path

import pytest
from playwright.sync_api import Browser, BrowserContext, expect, sync_playwright

START_SECONDS = 60.0
FLAGS = ["--no-sandbox", "--disable-gpu", "--disable-background-networking"]
NO_CHROMIUM = (
    "no Chromium: install Debian's package 'chromium', or name one in STUDIO_CHROMIUM, to run the browser tests"
)


class App:
    """`studio ui` on one port, which can be ended and started again."""

    def __init__(self, folder: Path):
        self.folder, self.jobs_root = folder, folder / "runs"
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            self.port: int = free.getsockname()[1]
        self.url = f"http://127.0.0.1:{self.port}"
        self.process: subprocess.Popen[bytes] | None = None

    def start(self) -> None:
        options = ["ui", "--port", str(self.port), "--jobs-root", str(self.jobs_root)]
        with (self.folder / "ui.log").open("ab") as log:
            self.process = subprocess.Popen(
                [sys.executable, "-m", "studio.cli", *options],
                cwd=self.folder,
                env={**os.environ, "OMP_NUM_THREADS": "1", "XDG_CACHE_HOME": str(self.folder / "cache")},
                stdout=log,
                stderr=log,
            )
        self._wait_until_it_answers(self.process)

    def _wait_until_it_answers(self, process: subprocess.Popen[bytes]) -> None:
        deadline = time.monotonic() + START_SECONDS
        while True:
            try:
                urllib.request.urlopen(self.url, timeout=5).close()
                return
            except (urllib.error.URLError, OSError):
                if process.poll() is not None or time.monotonic() > deadline:
                    pytest.fail(f"the app did not start:\n{(self.folder / 'ui.log').read_text()}")
                time.sleep(0.1)

    def end(self) -> None:
        if self.process is not None:
            self.process.terminate()
            self.process.wait(timeout=20)
            self.process = None


@pytest.fixture(scope="module")
def app(browser: Browser, tmp_path_factory: pytest.TempPathFactory) -> Iterator[App]:
    app = App(tmp_path_factory.mktemp("studio"))
    app.start()
    yield app
    app.end()


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    path = os.environ.get("STUDIO_CHROMIUM") or shutil.which("chromium")
    if path is None or not Path(path).exists():
        pytest.skip(NO_CHROMIUM)
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=path, args=FLAGS)
        yield browser
        browser.close()


@pytest.fixture
def context(browser: Browser) -> Iterator[BrowserContext]:
    context = browser.new_context(viewport={"width": 1280, "height": 900}, accept_downloads=True)
    context.set_default_timeout(20_000)
    expect.set_options(timeout=20_000)
    yield context
    context.close()


@pytest.fixture
def requested(context: BrowserContext) -> list[str]:
    """The address of every request that any page makes."""
    addresses: list[str] = []
    context.on("request", lambda request: addresses.append(request.url))
    return addresses
