"""The page of the running ComfyUI, a fresh tab for each test."""

import pytest
from fewstep.tests import chromium


@pytest.fixture(scope="session")
def window(server, tmp_path_factory):
    with chromium.window(server, tmp_path_factory.mktemp("profile")) as context:
        yield context


@pytest.fixture
def page(window, server):
    """ComfyUI's page; an error that its scripts let through fails the test."""
    page, errors = chromium.open_page(window, server), []
    page.on("pageerror", lambda error: errors.append(str(error)))
    yield page
    page.close()
    assert errors == []
