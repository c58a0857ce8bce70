"""The report as a file: what it says, what it holds, and that nothing from the store can act in it."""

import base64
import hashlib
import json
import re
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest
from eigenwatch.history import open_history
from eigenwatch.history.measured import COLUMNS, Grid, thinned
from eigenwatch.history.report import Reading, read_run, report_html
from eigenwatch.history.report.payload import CELLS_MOST, as_json, payload
from eigenwatch.history.report.reading import SPECTRA_MOST
from eigenwatch.history.width_use import layer_verdicts

from tests.history.reported import HOSTILE, LAYERS, STEPS, alarm, collapsing, power_law, train
from tests.history.stored import record, run, spectrum, write


class Page(HTMLParser):
    """A page as a browser's parser sees it."""

    def __init__(self, text: str) -> None:
        super().__init__(convert_charrefs=True)
        self.elements: list[tuple[str, dict[str, str | None]]] = []
        self.scripts: list[str] = []
        self.text = ""
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, dict(attrs)))
        if tag == "script":
            self.scripts.append("")

    def handle_data(self, data: str) -> None:
        if self.elements and self.cdata_elem == "script":
            self.scripts[-1] += data
        else:
            self.text += data

    @property
    def data(self) -> dict:
        return json.loads(self.scripts[0])


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> Path:
    store = tmp_path_factory.mktemp("store")
    train(store, "good", tags={"norm": "pre"})
    train(store, "bad", collapsing, tags={"note": HOSTILE})
    alarm(store, "bad", f"variance sits in one direction {HOSTILE}")
    train(store, "wide", width=128, pre=True)
    return store


def reported(store: Path, *run_ids: str) -> str:
    with open_history(store) as history:
        return report_html([read_run(history, run_id, runs=len(run_ids)) for run_id in run_ids])


def test_it_answers_which_layers_waste_their_width_and_since_when(store: Path) -> None:
    page = Page(reported(store, "bad"))
    assert "1 of 4 layers wastes its width. Layer 0 has collapsed, since step 20" in page.text
    assert "variance sits in one direction" in page.text
    assert re.search(r"0\s+collapsed\s+20\s+1[\d.]* of 64", page.text), "the worst layer leads the table"


def test_two_runs_are_compared_at_their_last_common_step(store: Path) -> None:
    text = " ".join(Page(reported(store, "good", "bad")).text.split())
    assert re.search(r"At step 50 the median layer has this effective dimension: good [\d.]+, bad [\d.]+\.", text)
    assert "runs side by side" in text
    assert "runs side by side" not in Page(reported(store, "good")).text


def test_what_comes_from_the_store_is_text_and_nothing_else(store: Path) -> None:
    html = reported(store, "bad")
    page = Page(html)
    assert HOSTILE in page.text.replace("\n", "")
    assert not [element for element in page.elements if element[0] == "img" or "onerror" in element[1]]
    assert len(page.scripts) == 3
    assert page.data["runs"][0]["id"] == "bad"


def test_data_cannot_end_the_element_that_holds_it() -> None:
    text = as_json({HOSTILE: HOSTILE})
    assert not set("<>&\u2028") & set(text)
    assert json.loads(text) == {HOSTILE: HOSTILE}


def test_only_its_own_two_scripts_may_run_and_nothing_may_be_loaded(store: Path) -> None:
    page = Page(reported(store, "good"))
    (policy,) = [
        attributes["content"]
        for _, attributes in page.elements
        if attributes.get("http-equiv") == "Content-Security-Policy"
    ]
    rules = dict(rule.split(" ", 1) for rule in policy.split("; "))
    assert rules["default-src"] == "'none'"
    hashes = [base64.b64encode(hashlib.sha256(script.encode()).digest()).decode() for script in page.scripts[1:]]
    assert rules["script-src"] == " ".join(f"'sha256-{one}'" for one in hashes)
    addresses = [
        value for _, attributes in page.elements for name, value in attributes.items() if name in ("src", "href")
    ]
    assert addresses == ["data:,"]


def test_the_charts_have_the_records_and_spectra_that_were_stored(store: Path) -> None:
    (found,) = Page(reported(store, "wide")).data["runs"]
    assert found["layers"] == list(range(LAYERS))
    assert found["steps"] == found["spectra"]["steps"] == list(STEPS)
    assert len(found["spectra"]["items"]) == len(found["pre"]["items"]) == LAYERS * len(STEPS)
    assert found["cells"]["js_divergence"][1] == [0.04] * len(STEPS)
    width, share, cumulative, alpha, level, expert = found["spectra"]["items"]["0/0"]
    directions = found["spectra"]["directions"]["128"]
    exact = np.array(power_law(128, 1.1)) / sum(power_law(128, 1.1))
    np.testing.assert_allclose(share, exact[np.array(directions) - 1], rtol=5e-3)
    np.testing.assert_allclose(cumulative, np.cumsum(exact)[np.array(directions) - 1], rtol=5e-4)
    assert (width, expert) == (128, None)
    assert alpha == pytest.approx(1.1, rel=1e-3)
    assert np.exp(level) == pytest.approx(exact[0], rel=1e-2)


def test_a_spectrum_is_thinned_evenly_in_the_logarithm_and_one_without_variance_is_none() -> None:
    found = thinned(np.array(power_law(16_384, 1.2), dtype=np.float32), 48)
    assert found is not None
    assert found.direction[0] == 1
    assert found.direction[-1] == 16_384
    assert len(found.direction) <= 48
    assert found.cumulative[-1] == pytest.approx(1)
    assert thinned(np.zeros(8, dtype=np.float32), 48) is None
    one = thinned(np.array([1, 0, 0], dtype=np.float32), 48)
    assert one is not None
    assert np.isnan(one.alpha)


def test_of_experts_the_one_with_the_median_hard_rank_lends_its_spectrum(tmp_path: Path) -> None:
    write(
        tmp_path,
        "r",
        "records",
        *[record(0, expert=expert, hard_rank=rank) for expert, rank in enumerate((9.0, 3.0, 5.0))],
    )
    write(tmp_path, "r", "eigenvalues", *[spectrum(0, expert=expert) for expert in range(3)])
    with open_history(tmp_path) as history:
        reading = read_run(history, "r")
    assert reading.spectra[0, 0].expert == 2
    assert reading.grid.experts


def large(layers: int, steps: int) -> Reading:
    shape = (layers, steps)
    noise = np.random.default_rng(0).uniform(0.01, 1.0, shape)
    yes = np.ones(shape, dtype=bool)
    grid = Grid(
        run_id="large",
        site="post",
        layers=np.arange(layers),
        steps=10 * np.arange(steps),
        widths=np.full(layers, 16_384),
        values=dict.fromkeys(COLUMNS, noise),
        recorded=yes,
        finite=yes,
        complete=yes,
        experts=False,
    )
    one = thinned(np.array(power_law(16_384, 1.2), dtype=np.float32), 48)
    assert one is not None
    shown = [(layer, 10 * step) for layer in range(layers) for step in range(SPECTRA_MOST // layers)]
    return Reading(grid, None, layer_verdicts(grid), dict.fromkeys(shown, one), {}, {}, 0, {}, [], 0, [])


def test_96_layers_and_1000_steps_stay_under_five_megabytes() -> None:
    reading = large(96, 1000)
    (found,) = payload([reading])["runs"]
    assert found["sampled"] == 1000
    assert len(found["steps"]) * 96 <= CELLS_MOST
    assert (found["steps"][0], found["steps"][-1]) == (0, 9990)
    assert len(report_html([reading])) < 5e6


def test_many_spectra_are_thinned_by_steps_and_the_ends_are_kept(tmp_path: Path) -> None:
    steps = range(700)
    write(tmp_path, "r", "records", *[record(step, layer) for step in steps for layer in range(2)])
    write(tmp_path, "r", "eigenvalues", *[spectrum(step, layer) for step in steps for layer in range(2)])
    with open_history(tmp_path) as history:
        found = {step for _, step in read_run(history, "r", runs=4).spectra}
    assert len(found) == SPECTRA_MOST // 4 // 2
    assert {0, 699} <= found


def test_a_run_without_spectra_or_with_nothing_but_one_record_can_be_reported(tmp_path: Path) -> None:
    write(tmp_path, "one", "records", record(0, effective_dimension=3.0))
    write(
        tmp_path,
        "skipped",
        "records",
        record(
            0,
            **dict.fromkeys(
                ("hard_rank", "soft_rank", "hard_utilization", "soft_utilization", "spectral_concentration")
            ),
        ),
    )
    assert "No layer wastes its width" in Page(reported(tmp_path, "one", "skipped")).text


def test_restarts_and_losses_are_told(tmp_path: Path) -> None:
    train(tmp_path, "r")
    write(
        tmp_path,
        "r",
        "runs",
        run(0, written=60, dropped={"malformed": 3}),
        run(1, written=61, dropped={"malformed": 1, "step": 2}),
    )
    text = " ".join(Page(reported(tmp_path, "r")).text.split())
    assert "Partials lost or refused: 4 malformed, 2 step." in text
    assert "attempts2" in text
