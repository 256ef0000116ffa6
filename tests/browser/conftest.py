"""The real frontend of the running ComfyUI in a real Chromium, without a window.

Playwright drives whatever Chromium or Chrome the machine has; where there is none the tier is not
run and the summary says so, except in CI, where that is an error.
"""

import os
import shutil

import pytest
from playwright.sync_api import sync_playwright

BROWSERS = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable", "chrome")
FLAGS = [
    "--no-sandbox",
    "--disable-gpu",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-quic",
    "--disable-sync",
    "--no-first-run",
]
SETTINGS = {"Comfy.TutorialCompleted": True, "Comfy.Graph.CanvasMenu": False}


@pytest.fixture(scope="session")
def context(server, tmp_path_factory):
    """A browser window with a profile of its own, big enough to judge a screenshot."""
    executable = next(path for name in BROWSERS if (path := shutil.which(name)))
    server.post("/settings", SETTINGS)
    with sync_playwright() as playwright:
        context = playwright.chromium.launch_persistent_context(
            tmp_path_factory.mktemp("profile"),
            executable_path=executable,
            args=FLAGS,
            viewport={"width": 1600, "height": 1000},
        )
        yield context
        context.close()


@pytest.fixture
def page(context, server):
    """ComfyUI's page, loaded; an error that its scripts let through fails the test."""
    page = context.new_page()
    errors = []
    page.on("pageerror", lambda error: errors.append(str(error)))
    page.goto(server.url)
    page.wait_for_function("window.app?.graph && window.app.vueAppReady")
    yield page
    page.close()
    assert errors == []
