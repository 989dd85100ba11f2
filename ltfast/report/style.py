"""One look for all figures: Okabe-Ito colours, told apart in grey and by colour-blind eyes through markers, line styles
and hatches as well. Matplotlib's Agg canvas is used without pyplot, so nothing global changes."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

# Okabe and Ito 2008, ordered so that neighbours differ in lightness too.
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#56B4E9", "#E69F00", "#000000", "#8A8A8A")
LINES: tuple[Any, ...] = (
    "-",
    (0, (5, 1.5)),
    (0, (1, 1.2)),
    (0, (6, 1.5, 1, 1.5)),
    (0, (3, 1, 1, 1, 1, 1)),
    (0, (8, 2)),
)
MARKERS = ("o", "s", "^", "D", "v", "P", "X", "*")
HATCHES = ("", "///", "...", "xx", "\\\\\\", "oo", "++", "--")
MAP = "cividis"  # lightness rises evenly: reads the same in grey and with any colour vision
DPI = 168
PAGE_WIDTH = 10.7  # inches at 96 pixels each: the page's column
INK, FAINT = "#222222", "#DDDDDD"
FONTS = ("Noto Sans CJK JP", "Noto Sans CJK SC", "Microsoft YaHei", "Yu Gothic", "Malgun Gothic", "Arial Unicode MS")
CHARACTERS = 14  # of a legend, an inch

SETTINGS: dict[Any, Any] = {
    "font.family": "DejaVu Sans", "font.size": 9, "axes.titlesize": 10, "axes.labelsize": 9, "legend.fontsize": 8,
    "xtick.labelsize": 8, "ytick.labelsize": 8, "axes.spines.top": False, "axes.spines.right": False, "axes.grid": True,
    "axes.axisbelow": True, "grid.color": FAINT, "grid.linewidth": 0.6, "axes.edgecolor": "#666666",
    "text.color": INK, "axes.labelcolor": INK, "xtick.color": INK, "ytick.color": INK, "lines.linewidth": 1.7,
    "lines.markersize": 4.5, "legend.frameon": False, "figure.facecolor": "white", "hatch.linewidth": 0.6,
    "text.parse_math": False,  # names are text, also those with dollar signs; so logarithmic axes need `log_ticks`
}  # fmt: skip


def colour(i: int) -> str:
    """The i-th colour, round and round."""
    return COLOURS[i % len(COLOURS)]


def line(i: int) -> Any:
    """The i-th line style."""
    return LINES[i % len(LINES)]


def marker(i: int) -> str:
    """The i-th marker."""
    return MARKERS[i % len(MARKERS)]


def hatch(i: int) -> str:
    """The i-th hatch."""
    return HATCHES[i % len(HATCHES)]


@contextmanager
def look() -> Iterator[None]:
    """Matplotlib settings of the report, for the time of drawing only."""
    import matplotlib
    from matplotlib.font_manager import fontManager

    installed = {font.name for font in fontManager.ttflist}  # matplotlib warns of each name that is not
    family = [SETTINGS["font.family"], *(name for name in FONTS if name in installed)]
    with matplotlib.rc_context({**SETTINGS, "font.family": family}):
        yield


def panels(
    columns: int, rows: int = 1, *, width: float | None = None, height: float = 2.7, **options: Any
) -> tuple[Figure, list[Axes]]:
    """A figure of rows * columns axes, each `width` x `height` inches, and the axes in reading order.

    By default three panels or more fill the page's width, and fewer are as wide as reads well.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    width = {1: 7.2, 2: 4.6}.get(columns, PAGE_WIDTH / columns) if width is None else width
    figure = Figure(figsize=(width * columns, height * rows), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots(rows, columns, squeeze=False, **options)
    return figure, list(axes.flat)


def log_ticks(axis: Any, text: str = "{x:,.0f}") -> None:
    """Ticks of a logarithmic axis at 1, 2, 5, 10, ... (and 3, 30, ... where that makes fewer than four), written as numbers;
    the default suits counts.

    Call it once the data is drawn: over more than four decades only powers of ten have a tick, and where not two of those
    numbers are in view (losses from 8 to 12), ticks are those of a linear axis.
    """
    from matplotlib.ticker import AutoLocator, LogLocator, NullFormatter

    low, high = axis.get_view_interval()
    for subs in [(1,)] if high > 1e4 * low else [(1, 2, 5), (1, 2, 3, 5)]:
        locator = LogLocator(10, subs=subs)
        in_view = sum(low <= tick <= high for tick in locator.tick_values(low, high))
        if in_view >= 4:
            break
    axis.set_major_locator(locator if in_view > 1 else AutoLocator())
    axis.set_major_formatter(text)
    axis.set_minor_formatter(NullFormatter())


def every(n_points: int) -> int:
    """`markevery` so that about eight markers stand on a line."""
    return max(1, n_points // 8)


def shorten(text: str, length: int = 22) -> str:
    """At most `length` characters, the middle left out."""
    if len(text) <= length:
        return text
    keep = (length - 3) // 2
    return f"{text[: length - 3 - keep]}...{text[-keep:]}"


def wrapped(text: str, length: int) -> str:
    """On two lines of about `length` characters, broken after a space, "_", "-" or "/" where one stands late enough."""
    if len(text) <= length:
        return text
    at = max(text.rfind(mark, 0, length) for mark in " _-/") + 1
    if at <= length // 3:
        return shorten(text, length)
    return f"{text[:at].rstrip()}\n{shorten(text[at:], length)}"


def distinct(names: Sequence[str], length: int, cut: Callable[[str, int], str] = shorten) -> list[str]:
    """`cut` of each; names that would read the same have their place in `names` before them."""
    short = [cut(name, length) for name in names]
    shared = {text for text, n in Counter(short).items() if n > 1}
    return [f"{i}: {cut(names[i], length - 4)}" if text in shared else text for i, text in enumerate(short)]


def legend_below(figure: Figure, axes: Sequence[Axes], columns: int = 4) -> None:
    """One legend for all of `axes` under the whole figure, where it covers no data; each label once."""
    entries: dict[str, Any] = {}
    for ax in axes:
        for handle, label in zip(*ax.get_legend_handles_labels(), strict=True):
            entries.setdefault(label, handle)
    if entries:
        room = int(CHARACTERS * figure.get_figwidth() / (6 + max(map(len, entries))))  # 6: the handle and a gap
        columns = max(1, min(columns, len(entries), room))
        figure.legend(list(entries.values()), list(entries), loc="outside lower center", ncols=columns)


def save(figure: Figure, path: Path) -> bytes:
    """Write the PNG; returns its bytes. Characters that no font here has are drawn as boxes."""
    import io
    import warnings

    buffer = io.BytesIO()
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", r"Glyph \d+ .*missing from", UserWarning)  # one for each character
        figure.savefig(buffer, format="png", dpi=DPI)
    path.write_bytes(buffer.getvalue())
    return buffer.getvalue()
