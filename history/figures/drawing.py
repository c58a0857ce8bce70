"""What all pictures share: the blank figure, and the colours of lines.

matplotlib is the extra `report`, so it is imported when the first picture is drawn. Figures are made
directly, never through pyplot: nothing global is touched, any thread may draw.
"""

from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

OKABE_ITO = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")
"""Safe for the colour-blind (Okabe & Ito 2008); the yellow of their palette is too pale for lines."""
DASHES = ("-", "--", ":", "-.")
"""Beyond seven lines the colours come again with another dash."""
EMPTY_COLOUR = "0.88"


def new_figure(height_inches: float) -> "Figure":
    """A blank figure, 1000 pixels wide.

    Raises:
        ImportError: matplotlib is not installed.
    """
    try:
        from matplotlib.figure import Figure
        from matplotlib.layout_engine import ConstrainedLayoutEngine
    except ImportError:
        raise ImportError("pictures need matplotlib: pip install 'eigenwatch[report]'") from None
    return Figure(figsize=(10, height_inches), dpi=100, layout=ConstrainedLayoutEngine(wspace=0.05))


def line_styles() -> Iterator[tuple[str, str]]:
    """(colour, dash) of one line after another."""
    while True:
        for dash in DASHES:
            for colour in OKABE_ITO:
                yield colour, dash


def dress(axis: "Axes", title: str, x: str, y: str) -> None:
    """Labels in the size of all pictures, and a faint grid."""
    axis.set_title(title, fontsize=10)
    axis.set_xlabel(x, fontsize=9)
    axis.set_ylabel(y, fontsize=9)
    axis.tick_params(labelsize=8)
    axis.grid(True, which="major", linewidth=0.4, alpha=0.5)


def plain_log(axis: "Axes") -> None:
    """A logarithmic y axis with plain numbers."""
    from matplotlib.ticker import FuncFormatter, LogLocator

    axis.set_yscale("log")
    low, high = axis.get_ylim()
    digits = (1.0, 2.0, 3.0, 5.0, 7.0) if high < 10 * low else (1.0, 2.0, 5.0) if high < 1000 * low else (1.0,)
    axis.yaxis.set_major_locator(LogLocator(subs=digits))
    axis.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    axis.minorticks_off()


def plain_log_ticks(axis: "Axes", values: Sequence[float]) -> None:
    """Marks exactly these values on a logarithmic x axis, as plain numbers."""
    axis.set_xscale("log")
    axis.set_xticks(sorted(set(values)), labels=[f"{value:g}" for value in sorted(set(values))])
    axis.minorticks_off()
    low, high = min(values), max(values)
    margin = (high / low) ** 0.08 if high > low else 1.5
    axis.set_xlim(low / margin, high * margin)
