"""The paper's pictures as matplotlib figures, for a file or a notebook; `figure.savefig("run.svg")` writes one."""

from .comparison import comparison
from .heatmaps import layer_step_heatmaps
from .pre_post import pre_post
from .quality import data_quality
from .spectra import cumulative_variance, spectra
from .widths import rank_against_width

__all__ = [
    "comparison",
    "cumulative_variance",
    "data_quality",
    "layer_step_heatmaps",
    "pre_post",
    "rank_against_width",
    "spectra",
]
