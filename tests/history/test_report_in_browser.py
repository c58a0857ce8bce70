"""The report in a headless Chromium: it is quiet, it can be seen, and its controls work by keyboard."""

import io
import json
from collections.abc import Iterator
from pathlib import Path

import pytest
from eigenwatch.history import open_history
from eigenwatch.history.report import read_run, report_html
from PIL import Image
from selenium.webdriver.common.by import By
from selenium.webdriver.common.keys import Keys
from selenium.webdriver.support.ui import WebDriverWait

from tests.history.browser import Browser, chromium, show
from tests.history.reported import HOSTILE, alarm, collapsing, train

FIGURES = ("hard", "soft", "concentration", "spectrum", "cumulative", "comparison", "widths", "divergence", "sites",
           "complete", "tokens", "corrected")  # fmt: skip


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    with chromium() as browser:
        yield browser


@pytest.fixture(scope="module")
def page(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two runs of two widths, one of them with both sites and one hostile."""
    folder = tmp_path_factory.mktemp("report")
    train(folder / "store", "good", width=128, pre=True)
    train(folder / "store", "bad", collapsing, tags={HOSTILE: HOSTILE})
    alarm(folder / "store", "bad", HOSTILE, kind=HOSTILE)
    with open_history(folder / "store") as history:
        html = report_html([read_run(history, run_id, runs=2) for run_id in ("good", "bad")])
    (folder / "report.html").write_text(html, encoding="utf-8")
    return folder / "report.html"


@pytest.fixture
def shown(browser: Browser, page: Path) -> Browser:
    show(browser, page)
    return browser


def caption(browser: Browser, figure: str) -> str:
    return browser.find_element(By.CSS_SELECTOR, f"#{figure} figcaption").text


def colours(browser: Browser, figure: str) -> int:
    plot = browser.find_element(By.CSS_SELECTOR, f"#{figure} .plot")
    picture = Image.open(io.BytesIO(plot.screenshot_as_png)).convert("RGB")
    assert picture.width > 250
    assert picture.height > 250
    return len(picture.getcolors(1 << 24) or [])


def press(browser: Browser, element_id: str, *keys: str) -> None:
    """As someone who has only a keyboard: the element must take the focus."""
    element = browser.find_element(By.ID, element_id)
    browser.execute_script("arguments[0].focus()", element)
    assert browser.switch_to.active_element == element
    browser.switch_to.active_element.send_keys(*keys)


def until(browser: Browser, met: object) -> None:
    WebDriverWait(browser, 30, poll_frequency=0.05).until(met)


def test_the_console_stays_empty_and_the_network_unused(browser: Browser, page: Path) -> None:
    browser.get_log("browser")
    browser.get_log("performance")
    for scheme in ("light", "dark"):
        show(browser, page, scheme=scheme)
    assert browser.get_log("browser") == []
    events = [json.loads(entry["message"])["message"] for entry in browser.get_log("performance")]
    asked = {event["params"]["request"]["url"] for event in events if event["method"] == "Network.requestWillBeSent"}
    assert page.as_uri() in asked
    assert not [url for url in asked - {page.as_uri()} if not url.startswith("data:")]


def test_nothing_from_the_store_runs_or_becomes_an_element(shown: Browser) -> None:
    assert shown.execute_script("return window.pwned") is None
    assert shown.find_elements(By.TAG_NAME, "img") == []
    assert "onerror" in shown.find_element(By.CSS_SELECTOR, ".reason").text


def test_every_figure_is_seen_and_said_in_numbers(shown: Browser) -> None:
    for figure in FIGURES:
        assert colours(shown, figure) > 20, figure
        said = caption(shown, figure)
        assert any(letter.isdigit() for letter in said) or "three widths" in said, figure
        rows = shown.execute_script("return document.querySelectorAll(`#${arguments[0]} tbody tr`).length", figure)
        assert rows > 1, figure


def test_the_keyboard_picks_a_layer_and_scrubs_the_steps(shown: Browser) -> None:
    assert shown.find_element(By.ID, "step-shown").text == "50"
    before = caption(shown, "spectrum")
    press(shown, "step", Keys.ARROW_LEFT, Keys.ARROW_LEFT)
    assert shown.find_element(By.ID, "step-shown").text == "30"
    until(shown, lambda one: caption(one, "spectrum") != before)
    before = caption(shown, "tokens")
    layers = [option.text for option in shown.find_elements(By.CSS_SELECTOR, "#layer option")]
    opened_with = shown.execute_script("return document.getElementById('layer').value")
    press(shown, "layer", *(Keys.ARROW_DOWN if opened_with == layers[0] else Keys.ARROW_UP))
    assert caption(shown, "tokens") != before
    title = shown.find_element(By.CSS_SELECTOR, "#spectrum .gtitle").text
    assert title == f"Layer {shown.execute_script('return document.getElementById(`layer`).value')}, step 30"


def test_tab_reaches_every_control_in_the_order_of_the_page(shown: Browser) -> None:
    shown.find_element(By.ID, "theme").send_keys("")
    shown.execute_script("document.getElementById('theme').focus()")
    reached = []
    for _ in range(40):
        shown.switch_to.active_element.send_keys(Keys.TAB)
        reached.append(shown.switch_to.active_element.get_attribute("id"))
        if reached[-1] == "compared-layer":
            break
    assert [one for one in reached if one] == ["run", "layer", "step", "measure", "compared-layer"]


def test_another_run_and_another_measure_can_be_chosen(shown: Browser) -> None:
    before = caption(shown, "hard")
    press(shown, "run", Keys.ARROW_DOWN)
    assert caption(shown, "hard") != before
    press(shown, "measure", "spectral")
    assert "spectral concentration of the median layer" in caption(shown, "comparison")
    press(shown, "compared-layer", Keys.ARROW_DOWN)
    assert "of the layer 0 ends at: good" in caption(shown, "comparison")


def test_a_click_on_a_cell_chooses_its_layer_and_step(shown: Browser) -> None:
    plot = shown.find_element(By.CSS_SELECTOR, "#hard .plot .nsewdrag")
    shown.execute_script("arguments[0].scrollIntoView({block: 'center'})", plot)
    from selenium.webdriver.common.action_chains import ActionChains

    size = plot.size
    corner = (5 - size["width"] // 2, 5 - size["height"] // 2)
    ActionChains(shown).move_to_element_with_offset(plot, *corner).pause(0.1).click().perform()
    until(shown, lambda one: one.find_element(By.ID, "step-shown").text == "0")
    assert shown.execute_script("return document.getElementById('layer').value") == "3"


def test_dark_and_light_follow_the_reader_and_the_button(browser: Browser, page: Path) -> None:
    def brightness() -> int:
        picture = Image.open(io.BytesIO(browser.get_screenshot_as_png())).convert("L")
        return picture.resize((1, 1)).getpixel((0, 0))

    show(browser, page, scheme="dark")
    assert browser.find_element(By.ID, "theme").get_attribute("aria-pressed") == "true"
    assert brightness() < 80
    press(browser, "theme", Keys.SPACE)
    assert browser.find_element(By.ID, "theme").get_attribute("aria-pressed") == "false"
    assert brightness() > 200


@pytest.mark.parametrize("width", [390, 1280])
def test_nothing_sticks_out_of_the_window(browser: Browser, page: Path, width: int) -> None:
    show(browser, page, width=width)
    assert browser.execute_script("return document.documentElement.scrollWidth") <= width
