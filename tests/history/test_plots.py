"""The pictures show what was stored, cell by cell."""

import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from eigenwatch.history import History, figures, open_history
from eigenwatch.history.figures import layer_step_heatmaps
from eigenwatch.history.figures.files import write_figures
from eigenwatch.history.figures.heatmaps import LOWEST_UTILIZATION, step_edges
from matplotlib.lines import Line2D

from tests.history.reported import collapsing, train
from tests.history.stored import NOT_FINITE, record, write

STEPS = (0, 10, 20, 100)


def drawn(store: Path, run_id: str = "r", **options):
    with open_history(store) as history:
        figure = layer_step_heatmaps(history, run_id, **options)
    figure.canvas.draw()
    return figure


def panels(figure):
    """The three heatmaps by title, without the colour bars."""
    return {axes.get_title(): axes for axes in figure.axes if axes.get_title()}


def cells(axes) -> np.ma.MaskedArray:
    return axes.collections[0].get_array()


def training(layers: int = 3, steps=STEPS):
    return [
        record(
            step,
            layer,
            hard_utilization=0.001 * (1 + layer),
            soft_utilization=0.1 * (1 + layer),
            spectral_concentration=step / 100,
        )
        for step in steps
        for layer in range(layers)
    ]


def test_three_heatmaps_show_the_records(tmp_path: Path) -> None:
    write(tmp_path, "r", "records", *training())
    axes = panels(drawn(tmp_path))
    assert list(axes) == ["Hard utilization", "Soft utilization", "Spectral concentration"]
    layers_LS = np.repeat([[1], [2], [3]], len(STEPS), axis=1)
    np.testing.assert_allclose(cells(axes["Hard utilization"]), 0.001 * layers_LS)
    np.testing.assert_allclose(cells(axes["Soft utilization"]), 0.1 * layers_LS)
    np.testing.assert_allclose(cells(axes["Spectral concentration"]), np.tile(np.array(STEPS) / 100, (3, 1)))


def test_utilizations_have_logarithmic_colours_and_concentration_linear_from_0_to_1(tmp_path: Path) -> None:
    write(tmp_path, "r", "records", *training())
    norms = {title: axes.collections[0].norm for title, axes in panels(drawn(tmp_path)).items()}
    for title in ("Hard utilization", "Soft utilization"):
        tenth, half, one = norms[title]([norms[title].vmax / 10, norms[title].vmax / 10**0.5, norms[title].vmax])
        assert one == 1
        assert one - half == pytest.approx(half - tenth)
    assert norms["Spectral concentration"](0.5) == pytest.approx(0.5)
    assert (norms["Spectral concentration"].vmin, norms["Spectral concentration"].vmax) == (0, 1)


def test_layer_0_is_at_the_bottom_and_steps_are_at_their_place(tmp_path: Path) -> None:
    write(tmp_path, "r", "records", *training())
    axes = panels(drawn(tmp_path))["Hard utilization"]
    assert [label.get_text() for label in axes.get_yticklabels()] == ["0", "1", "2"]
    low, high = axes.get_ylim()
    assert low < high
    corners = axes.collections[0].get_coordinates()  # (L+1, S+1, 2)
    np.testing.assert_allclose(corners[0, :, 0], [-5, 5, 15, 60, 140])


@pytest.mark.parametrize(
    ("steps", "edges"), [([40], [39.5, 40.5]), ([0, 10], [-5, 5, 15]), ([1, 2, 10], [0.5, 1.5, 6, 14])]
)
def test_a_cell_reaches_halfway_to_its_neighbours(steps: list[int], edges: list[float]) -> None:
    np.testing.assert_allclose(step_edges(np.array(steps)), edges)


@pytest.mark.parametrize(("layers", "steps"), [(1, STEPS), (3, (40,)), (1, (0,)), (100, (0, 1))])
def test_small_and_large_runs_can_be_drawn(tmp_path: Path, layers: int, steps: tuple[int, ...]) -> None:
    write(tmp_path, "r", "records", *training(layers, steps))
    figure = drawn(tmp_path)
    assert cells(panels(figure)["Hard utilization"]).shape == (layers, len(steps))
    width, height = figure.canvas.get_width_height()
    assert width == 1000
    assert 200 < height <= 700


def test_cells_that_were_not_finite_are_hatched_and_missing_ones_empty(tmp_path: Path) -> None:
    write(tmp_path, "r", "records", *training(2, (0, 10)), record(20, 0, **NOT_FINITE), record(30, 1))
    figure = drawn(tmp_path)
    axes = panels(figure)["Hard utilization"]
    assert cells(axes).mask.tolist() == [[False, False, True, True], [False, False, True, False]]
    (hatched,) = axes.collections[1].get_paths()
    np.testing.assert_allclose(hatched.get_extents().bounds, [15, -0.5, 10, 1])
    assert axes.collections[1].get_hatch()
    assert [text.get_text() for text in figure.legends[0].get_texts()] == [
        "activations not finite",
        "no record",
    ]


def test_a_run_without_gaps_needs_no_legend(tmp_path: Path) -> None:
    write(tmp_path, "r", "records", *training())
    assert drawn(tmp_path).legends == []


def test_a_run_that_was_never_finite_can_be_drawn(tmp_path: Path) -> None:
    write(tmp_path, "r", "records", record(0, **NOT_FINITE), record(10, **NOT_FINITE))
    assert cells(panels(drawn(tmp_path))["Soft utilization"]).mask.all()


def test_a_collapsed_layer_of_utilization_0_has_the_lowest_colour(tmp_path: Path) -> None:
    write(tmp_path, "r", "records", record(0, 0, hard_utilization=0.0), record(0, 1, hard_utilization=0.5))
    axes = panels(drawn(tmp_path))["Hard utilization"]
    assert cells(axes).tolist() == [[LOWEST_UTILIZATION], [0.5]]
    assert axes.collections[0].norm(cells(axes))[0, 0] == 0


def test_experts_are_drawn_as_their_median_and_sites_apart(tmp_path: Path) -> None:
    experts = [record(0, expert=expert, soft_utilization=u) for expert, u in enumerate((0.1, 0.2, 0.9))]
    write(tmp_path, "r", "records", *experts, record(0, site="pre", soft_utilization=0.4))
    figure = drawn(tmp_path)
    np.testing.assert_allclose(cells(panels(figure)["Soft utilization"]), [[0.2]])
    assert "median over experts" in figure.get_suptitle()
    np.testing.assert_allclose(cells(panels(drawn(tmp_path, site="pre"))["Soft utilization"]), [[0.4]])


def test_an_unknown_run_is_an_error_that_names_the_known_ones(tmp_path: Path) -> None:
    write(tmp_path, "llama", "records", record(0))
    with pytest.raises(ValueError, match="no records of run 'lama' at site 'post'; the store has llama"):
        drawn(tmp_path, "lama")


def test_drawing_leaves_pyplot_alone(tmp_path: Path) -> None:
    write(tmp_path, "r", "records", record(0))
    script = f"""
import sys
from eigenwatch.history import open_history
from eigenwatch.history.figures import layer_step_heatmaps
assert "matplotlib" not in sys.modules
layer_step_heatmaps(open_history({str(tmp_path)!r}), "r").savefig({str(tmp_path / "r.png")!r})
assert "matplotlib.pyplot" not in sys.modules
"""
    subprocess.run([sys.executable, "-c", script], check=True)
    assert (tmp_path / "r.png").read_bytes().startswith(b"\x89PNG")


def test_without_matplotlib_the_error_says_what_to_install(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write(tmp_path, "r", "records", record(0))
    for module in [name for name in sys.modules if name.split(".")[0] == "matplotlib"]:
        monkeypatch.setitem(sys.modules, module, None)
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    with pytest.raises(ImportError, match=r"pip install 'eigenwatch\[report\]'"):
        drawn(tmp_path)


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Iterator[History]:
    """Power-law spectra: `narrow` collapses, `wide` is twice as wide and has both sites."""
    store = tmp_path_factory.mktemp("store")
    train(store, "narrow", collapsing)
    train(store, "wide", width=128, pre=True)
    with open_history(store) as history:
        yield history


def lines(axes) -> dict[str, Line2D]:
    return {line.get_label(): line for line in axes.lines if not line.get_label().startswith("_")}


def test_spectra_are_drawn_on_log_axes_with_the_power_law_of_the_last_step(runs: History) -> None:
    figure = figures.spectra(runs, "narrow", layers=[1, 3], steps=[0, 50])
    first, second = figure.axes
    assert (first.get_title(), second.get_title()) == ("layer 1", "layer 3")
    assert (first.get_xscale(), first.get_yscale()) == ("log", "log")
    assert list(lines(first)) == ["step 0", "step 50", "fit, α = 1.10"]
    x, y = lines(second)["step 0"].get_data()
    np.testing.assert_allclose(y / y[0], x**-0.8, rtol=1e-5)
    x, y = lines(second)["fit, α = 0.90"].get_data()
    np.testing.assert_allclose(y, lines(second)["step 50"].get_ydata(), rtol=1e-3)


def test_spectra_that_are_not_stored_are_an_error_that_says_so(runs: History, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"no spectra of run 'narrow', site 'post', layers \[9\], steps \[0\]"):
        figures.spectra(runs, "narrow", layers=[9], steps=[0])
    write(tmp_path, "r", "records", record(0))
    with open_history(tmp_path) as history, pytest.raises(ValueError, match="no spectra of run 'r' at site 'post'"):
        figures.cumulative_variance(history, "r")


def test_cumulative_variance_lies_among_the_templates(runs: History) -> None:
    (axes,) = figures.cumulative_variance(runs, "narrow", layers=[0, 1]).axes
    drawn = lines(axes)
    assert list(drawn) == ["template α = 0.8", "template α = 1.2", "template α = 1.5", "layer 0", "layer 1"]

    def upper(name: str) -> float:
        return float(np.interp(0.1, *drawn[name].get_data()))

    assert upper("template α = 0.8") < upper("layer 1") < upper("template α = 1.2") < upper("layer 0")
    assert drawn["layer 1"].get_ydata()[-1] == pytest.approx(1)


def test_rank_against_width_has_a_point_a_run(runs: History) -> None:
    (axes,) = figures.rank_against_width(runs, ["narrow", "wide"]).axes
    names = [text.get_text() for text in axes.get_legend().get_texts()]
    assert [name.split(":")[0] for name in names] == ["soft rank", "effective dimension", "hard rank"]
    assert not any("β" in name for name in names), "two widths make no law"
    assert [label.get_text() for label in axes.get_xticklabels()] == ["64", "128"]
    assert len(axes.containers) == 3


def test_one_width_has_points_and_no_slope(runs: History) -> None:
    (axes,) = figures.rank_against_width(runs, ["narrow"]).axes
    names = [text.get_text() for text in axes.get_legend().get_texts()]
    assert names == [
        "soft rank",
        "effective dimension",
        "hard rank",
    ]


def test_both_sites_of_the_nonlinearity_are_drawn(runs: History) -> None:
    heat, ranks, _ = figures.pre_post(runs, "wide").axes
    np.testing.assert_allclose(cells(heat)[:, 0], [0.02, 0.04, 0.06, 0.08])
    drawn = lines(ranks)
    assert list(drawn) == ["soft rank, pre", "soft rank, post", "hard rank, pre", "hard rank, post"]
    assert (drawn["soft rank, pre"].get_ydata() > drawn["soft rank, post"].get_ydata()).all()


def test_a_run_of_one_site_has_no_comparison_of_sites(runs: History) -> None:
    with pytest.raises(ValueError, match="no records of run 'narrow' at site 'pre'"):
        figures.pre_post(runs, "narrow")


def test_data_quality_shows_what_is_incomplete_and_the_corrected_ranks(runs: History, tmp_path: Path) -> None:
    complete, tokens, ranks = figures.data_quality(runs, "wide").axes
    assert [text.get_text() for text in complete.get_legend().get_texts()] == ["complete"]
    assert lines(tokens)["median of the layers"].get_ydata().tolist() == [4.0] * 6
    drawn = lines(ranks)
    np.testing.assert_allclose(
        drawn["hard rank, corrected"].get_ydata(), 1.1 * drawn["hard rank, raw"].get_ydata(), rtol=1e-6
    )
    write(tmp_path, "r", "records", record(0), record(10, complete=False), record(20, **NOT_FINITE))
    with open_history(tmp_path) as history:
        figure = figures.data_quality(history, "r")
    names = [text.get_text() for text in figure.axes[0].get_legend().get_texts()]
    assert names == ["complete", "incomplete", "not finite"]
    assert "3 records, 1 incomplete, 1 not finite; 4 tokens per width" in figure.get_suptitle()


def test_runs_are_compared_by_step_over_their_layers_or_for_one(runs: History) -> None:
    figure = figures.comparison(runs, ["narrow", "wide"])
    assert [axes.get_title() for axes in figure.axes] == [
        "Hard utilization",
        "Soft utilization",
        "Spectral concentration",
    ]
    assert list(lines(figure.axes[0])) == ["narrow", "wide"]
    of_layer = lines(figures.comparison(runs, ["narrow", "wide"], layer=0).axes[2])
    assert of_layer["narrow"].get_ydata()[-1] > 0.95 > of_layer["wide"].get_ydata()[-1]
    with pytest.raises(ValueError, match=r"run 'wide' has no layer 7, its layers are \[0, 1, 2, 3\]"):
        figures.comparison(runs, ["wide"], layer=7)


def test_what_a_run_has_the_data_for_is_written_as_png_and_svg_and_alike_each_time(tmp_path: Path) -> None:
    write(tmp_path / "store", "r", "records", *training())
    with open_history(tmp_path / "store") as history:
        written = write_figures(history, ["r"], tmp_path / "a")
        again = write_figures(history, ["r"], tmp_path / "b")
    names = ["heatmaps-r.png", "heatmaps-r.svg", "data-quality-r.png", "data-quality-r.svg"]
    assert [path.name for path in written] == names
    for first, second in zip(written, again, strict=True):
        assert first.read_bytes().startswith(b"\x89PNG" if first.suffix == ".png" else b"<?xml")
        assert first.read_bytes() == second.read_bytes()
