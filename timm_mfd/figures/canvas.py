"""What all pictures share: colours, the canvas, the look of axes, and the file they end in."""

import warnings
from collections.abc import Iterable
from pathlib import Path

from matplotlib import rc_context
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.text import Text
from matplotlib.ticker import LogFormatter

# Okabe and Ito's colours: told apart by colour-blind people and in grey print.
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")


def ink_on(colour: str) -> str:
    """Return black or white, whichever is easier to read on a colour such as `#E69F00`."""
    red, green, blue = (int(colour[place : place + 2], 16) / 255 for place in (1, 3, 5))
    return "black" if 0.299 * red + 0.587 * green + 0.114 * blue > 0.5 else "white"


def legend_label(name: str) -> str:
    """Return a name that a legend shows: matplotlib leaves out those that begin with an underscore."""
    return f" {name}" if name.startswith("_") else name


class _LogNumbers(LogFormatter):
    """Labels of a logarithmic axis as plain numbers, where matplotlib would have formulas."""

    def __call__(self, x: float, pos: int | None = None) -> str:
        return f"{x:g}" if super().__call__(x, pos) else ""


def new_figure(width: float, height: float, title: str) -> Figure:
    """Return an empty figure of a size in inches, without a window."""
    figure = Figure(figsize=(width, height), layout="constrained")
    FigureCanvasAgg(figure)
    figure.suptitle(title, fontsize=12)
    return figure


def plain(axes: Iterable[Axes], grid: str = "both") -> None:
    """Give axes a faint grid and no box."""
    for one in axes:
        one.grid(axis=grid, alpha=0.3)  # type: ignore[arg-type]
        one.spines[["top", "right"]].set_visible(False)


def save(figure: Figure, path: str | Path) -> Path:
    """Write a figure; the ending chooses the format (png, svg, pdf)."""
    for axis in (axis for axes in figure.axes for axis in (axes.xaxis, axes.yaxis) if axis.get_scale() == "log"):
        axis.set_major_formatter(_LogNumbers())
        axis.set_minor_formatter(_LogNumbers(minor_thresholds=(2, 0.5)))
    for text in figure.findobj(Text):
        text.set_parse_math(False)  # names of models and images are no formulas
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Glyph .* missing")  # a box in its place says so
        # The same bytes for the same numbers: without the date and random names that SVG would have.
        is_svg = Path(path).suffix == ".svg"
        with rc_context({"svg.hashsalt": "timm_mfd"}):
            figure.savefig(path, dpi=150, metadata={"Date": None} if is_svg else None)
    return Path(path)
