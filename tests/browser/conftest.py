"""Pages in a real browser: a headless Chromium, the system's or Playwright's own."""

from __future__ import annotations

import shutil
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest


ARGUMENTS = [
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
]


@dataclass
class Visit:
    """An open page, and what it did since it was opened.

    Attributes:
        page: Playwright's page.
        errors: errors in the console, uncaught exceptions and requests that failed.
        requests: the addresses it asked for, its own first.
    """

    page: Any
    errors: list[str] = field(default_factory=list)
    requests: list[str] = field(default_factory=list)

    def overflow(self) -> int:
        """Pixels by which the page is wider than the window."""
        return self.page.evaluate("document.documentElement.scrollWidth - window.innerWidth")


@pytest.fixture(scope="module")  # while Playwright runs, no other test of the process can run an event loop
def browser():
    """The browser; without one, the test is skipped."""
    reason = "no Playwright: `pip install playwright`"
    sync_api = pytest.importorskip("playwright.sync_api", reason=reason)
    with sync_api.sync_playwright() as playwright:
        names = ("chromium", "chromium-browser", "google-chrome", playwright.chromium.executable_path)
        found = next(filter(None, map(shutil.which, names)), None)
        if found is None:
            pytest.skip("no Chromium: `apt-get install chromium`, or `playwright install chromium`")
        running = playwright.chromium.launch(executable_path=found, args=ARGUMENTS)
        yield running
        running.close()


@pytest.fixture
def visit(browser):
    """Open an address or a file in a new window: `visit(address, width=1280, dark=False)`."""
    contexts = []

    def visit(address: str | Path, width: int = 1280, dark: bool = False) -> Visit:
        context = browser.new_context(
            viewport={"width": width, "height": 900}, color_scheme="dark" if dark else "light"
        )
        contexts.append(context)
        opened = Visit(context.new_page())
        opened.page.on("request", lambda request: opened.requests.append(request.url))
        opened.page.on("requestfailed", lambda request: opened.errors.append(f"{request.url}: {request.failure}"))
        opened.page.on("pageerror", lambda error: opened.errors.append(str(error)))
        opened.page.on(
            "console", lambda message: opened.errors.append(message.text) if message.type == "error" else None
        )
        opened.page.goto(address.resolve().as_uri() if isinstance(address, Path) else address)
        return opened

    yield visit
    for context in contexts:
        context.close()
