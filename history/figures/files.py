"""Every picture of some runs as files for a paper: PNG at 200 dots per inch, and SVG."""

from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from ..measured import has_site, observed_site, read_grid, spectrum_steps
from ..session import History
from .comparison import comparison
from .heatmaps import layer_step_heatmaps
from .pre_post import pre_post
from .quality import data_quality
from .spectra import cumulative_variance, spectra
from .widths import rank_against_width

if TYPE_CHECKING:
    from matplotlib.figure import Figure

_OF_A_SITE: dict[str, Callable[..., "Figure"]] = {
    "heatmaps": layer_step_heatmaps,
    "data-quality": data_quality,
    "spectra": spectra,
    "cumulative-variance": cumulative_variance,
}


def write_figures(history: History, run_ids: Sequence[str], folder: Path) -> list[Path]:
    """Writes what the runs have the data for; the same data gives the same SVG.

    Raises:
        ValueError: a run has no records.
        ImportError: matplotlib is not installed.
        OSError: the folder cannot be written.
    """
    from matplotlib import rc_context

    folder.mkdir(parents=True, exist_ok=True)
    written = []
    for name, figure in _drawn(history, run_ids):
        for suffix, metadata in (("png", {}), ("svg", {"Date": None})):
            path = folder / f"{name}.{suffix}"
            with rc_context({"svg.hashsalt": "eigenwatch", "svg.fonttype": "none"}):
                figure.savefig(path, dpi=200, metadata=metadata)
            figure.set_layout_engine("none")  # as it lies after the first; finding it takes as long as drawing
            written.append(path)
    return written


def _drawn(history: History, run_ids: Sequence[str]) -> Iterator[tuple[str, "Figure"]]:
    widths: set[int] = set()
    sites: set[str] = set()
    for run_id in run_ids:
        site = observed_site(history, run_id)
        widths.update(read_grid(history, run_id, site).widths.tolist())
        has_spectra = len(spectrum_steps(history, run_id, site)) > 0
        for name, figure in _OF_A_SITE.items():
            if has_spectra or figure not in (spectra, cumulative_variance):
                yield f"{name}-{run_id}", figure(history, run_id, site=site)
        if site == "post" and has_site(history, run_id, "pre"):
            yield f"pre-post-{run_id}", pre_post(history, run_id)
        sites.add(site)
    if len(sites) == 1 and len(run_ids) > 1:
        yield "comparison", comparison(history, run_ids, site=site)
    if len(sites) == 1 and len(widths) > 1:
        yield "rank-against-width", rank_against_width(history, run_ids, site=site)
