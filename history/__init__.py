"""Reading what was stored: SQL over every run, the paper's pictures of one, and the laws of several."""

from .advice import Advice, advise
from .fits import Fit, StepFit, fit, fit_by_step
from .laws import Law, width_law
from .points import Selection
from .session import History, open_history

__all__ = [
    "Advice",
    "Fit",
    "History",
    "Law",
    "Selection",
    "StepFit",
    "advise",
    "fit",
    "fit_by_step",
    "open_history",
    "width_law",
]
