"""The pictures show what was stored, cell by cell."""

import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from eigenwatch.history import open_history
from eigenwatch.history.figures import layer_step_heatmaps
from eigenwatch.history.figures.heatmaps import LOWEST_UTILIZATION, step_edges

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
