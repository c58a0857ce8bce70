"""A headless Chromium for tests that look at a page; Debian's packages `chromium` and `chromium-driver`."""

import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from selenium import webdriver
from selenium.webdriver.chrome.options import Options
from selenium.webdriver.chrome.service import Service
from selenium.webdriver.support.ui import WebDriverWait

Browser = webdriver.Chrome
_SWITCHES = (
    "--headless=new",
    "--no-sandbox",  # Chromium has none for root, who runs the tests in a container
    "--disable-dev-shm-usage",
    "--disable-gpu",
    "--disable-background-networking",
    "--hide-scrollbars",
    "--window-size=1280,900",
)


@contextmanager
def chromium() -> Iterator[Browser]:
    """A browser that keeps what the console said and what the page asked the network for."""
    options = Options()
    options.binary_location = program("chromium")
    for switch in _SWITCHES:
        options.add_argument(switch)
    options.set_capability("goog:loggingPrefs", {"browser": "ALL", "performance": "ALL"})
    browser = webdriver.Chrome(options=options, service=Service(program("chromedriver")))
    try:
        yield browser
    finally:
        browser.quit()


def program(name: str) -> str:
    """Where it is; without it the test is skipped, on CI it fails."""
    found = shutil.which(name)
    if found is None:
        say = pytest.fail if "CI" in os.environ else pytest.skip
        say(f"{name} is not installed: Debian's packages chromium and chromium-driver have it")
    return found


def show(browser: Browser, page: Path, *, width: int = 1280, scheme: str = "light") -> None:
    """Opens a report in a window of this width, for a reader of this colour scheme, and waits until it is drawn."""
    browser.execute_cdp_cmd(
        "Emulation.setEmulatedMedia", {"features": [{"name": "prefers-color-scheme", "value": scheme}]}
    )
    browser.execute_cdp_cmd(
        "Emulation.setDeviceMetricsOverride", {"width": width, "height": 900, "deviceScaleFactor": 1, "mobile": False}
    )
    browser.get(page.as_uri())
    WebDriverWait(browser, 60).until(
        lambda one: one.execute_script("return document.documentElement.dataset.ready") == "yes"
    )
