"""ComfyUI's real page in a real Chromium, without a window, driven by Playwright."""

import contextlib
import shutil

from playwright.sync_api import sync_playwright

NAMES = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable", "chrome")
REMEDY = (
    "apt install chromium (Debian), brew install --cask chromium (macOS),"
    " winget install Hibbiki.Chromium (Windows)"
)
FLAGS = [
    "--no-sandbox",
    "--disable-gpu",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-quic",
    "--disable-sync",
    "--no-first-run",
]
SETTINGS = {"Comfy.TutorialCompleted": True}  # else the page opens its tour over the graph


def find():
    """Path of the machine's Chromium or Chrome, or None."""
    return next(filter(None, map(shutil.which, NAMES)), None)


@contextlib.contextmanager
def window(host, profile):
    """A browser on a fresh profile, big enough to judge a screenshot: a Playwright context.

    Raises: FileNotFoundError if the machine has no browser.
    """
    executable = find()
    if executable is None:
        raise FileNotFoundError(f"No Chromium or Chrome found. Install one: {REMEDY}")
    host.post("/settings", SETTINGS)
    with sync_playwright() as playwright:
        context = playwright.chromium.launch_persistent_context(
            profile,
            executable_path=executable,
            args=FLAGS,
            viewport={"width": 1600, "height": 1000},
        )
        context.set_default_timeout(300_000)  # ms; the page is large, and the machine may be busy
        context.add_init_script(
            "localStorage.clear()"
        )  # else each tab reopens the last ones' graphs
        with context:
            yield context


def open_page(context, host, query=""):
    """ComfyUI's page in a new tab, its graph ready."""
    page = context.new_page()
    page.goto(host.url + query)
    page.wait_for_function("window.app?.vueAppReady && window.app.isGraphReady")
    return page
