"""What a report shows: figures and sections, and the colours that all of them share.

A figure is drawn by matplotlib for papers, and for the page too where it has no interactive form. The interactive form
is plotly's: plain dicts, which the page draws. Both take their colours by name from :data:`PALETTE`, so that a page can
be light or dark. Matplotlib is imported only inside functions, because that takes a second.
"""

from __future__ import annotations

import io
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from html import escape
from typing import TYPE_CHECKING, Any, NamedTuple

if TYPE_CHECKING:
    from matplotlib.figure import Figure


class Colour(NamedTuple):
    light: str
    dark: str


_BLUE, _VERMILION, _GREEN = Colour("#0072b2", "#58aef0"), Colour("#d55e00", "#ff8f4a"), Colour("#009e73", "#35c99b")

PALETTE: Mapping[str, Colour] = {
    "--ink": Colour("#1a1d21", "#e4e6e9"),
    "--quiet": Colour("#646b75", "#98a0ab"),
    "--line": Colour("#dfe2e7", "#30353d"),
    "--paper": Colour("#ffffff", "#14171b"),
    "--panel": Colour("#f5f6f8", "#1c2026"),
    "--accent": Colour("#0b5cad", "#7cbcff"),
    "--bad": Colour("#b3261e", "#ff8a80"),
    "--dense": _BLUE,
    "--sparse": _VERMILION,
    "--redense": _GREEN,
    "--series-1": _BLUE,
    "--series-2": _VERMILION,
    "--series-3": _GREEN,
    "--series-4": Colour("#b25690", "#e59ac8"),
    "--series-5": Colour("#b98300", "#f0bf4c"),
    "--series-6": Colour("#3f9fd4", "#93d5ff"),
    "--series-7": Colour("#7a5c43", "#c9a98c"),
    "--series-8": Colour("#6f7782", "#a9b1bc"),
}
"""By the name of a variable in the page's style. The series can be told apart by colour-blind people, too (Okabe and
Ito 2008, darkened where that is needed on white)."""

WIDTH = 7.2
"""Inches: a figure over both columns of a paper. The page shows it as wide as itself."""

_STYLE: dict[Any, Any] = {
    "font.family": "sans-serif",
    "font.size": 8.0,
    "axes.edgecolor": PALETTE["--quiet"].light,
    "axes.facecolor": "none",
    "axes.labelcolor": PALETTE["--ink"].light,
    "axes.linewidth": 0.6,
    "axes.spines.right": False,
    "axes.spines.top": False,
    "axes.titlesize": 8.0,
    "figure.constrained_layout.use": True,
    "figure.dpi": 200,
    "figure.facecolor": "none",
    "grid.color": PALETTE["--line"].light,
    "grid.linewidth": 0.5,
    "legend.frameon": False,
    "lines.linewidth": 1.3,
    "svg.fonttype": "none",
    "svg.hashsalt": "temper",
    "text.color": PALETTE["--ink"].light,
    "text.hinting": "none",  # which at 200 dpi is not seen, and would take a third of the time
    "text.parse_math": False,  # a dollar in a name is a dollar
    "xtick.color": PALETTE["--quiet"].light,
    "ytick.color": PALETTE["--quiet"].light,
}


@dataclass(frozen=True)
class ReportFigure:
    """A figure of a report.

    `name` is that of its PNG, without suffix, and unlike every other in a page. `draw` gives the static form and is
    called in temper's style: `figure.subplots()` on a `matplotlib.figure.Figure` of `WIDTH` inches, no pyplot. `plotly`
    is the interactive form, `{"data": [...], "layout": {...}}`, without a template and without sizes, but for
    `layout.height`; a colour in it is the name of one in PALETTE, e.g. `"--series-1"`, which the page puts in.
    """

    name: str
    title: str
    caption: str
    draw: Callable[[], Figure]
    plotly: Mapping[str, Any] | None = None


@dataclass(frozen=True)
class Section:
    """A part of a page under a heading: `html`, which is in order already, then its figures, then `details`."""

    title: str
    html: str = ""
    figures: tuple[ReportFigure, ...] = ()
    details: str = ""


def colour(name: str) -> str:
    """A colour of PALETTE for matplotlib: that on white."""
    return PALETTE[name].light


def plain(text: str) -> str:
    """A text as plotly shows it literally: plotly takes a few tags of HTML for markup."""
    return escape(text, quote=False)


def figure_svg(figure: ReportFigure) -> str:
    """The static form as the text of an SVG element whose colours are those of the page it is put into. The same figure
    gives the same text."""
    stream = io.StringIO()
    _save(figure, stream, format="svg", metadata=dict.fromkeys(("Creator", "Date", "Format", "Type")))
    text = stream.getvalue()
    return _COLOUR.sub(lambda match: _VARIABLES.get(match[0], match[0]), text[text.index("<svg") :])


def figure_png(figure: ReportFigure) -> bytes:
    """The static form as a PNG, on white."""
    stream = io.BytesIO()
    _save(figure, stream, format="png", facecolor="white", metadata={"Software": None})
    return stream.getvalue()


def _save(figure: ReportFigure, to: io.StringIO | io.BytesIO, **options: Any) -> None:
    import matplotlib

    with matplotlib.rc_context(_STYLE):
        drawn = figure.draw()
        engine = drawn.get_layout_engine()
        if engine is not None:
            # Else matplotlib draws everything a first time only to find out the layout.
            engine.execute(drawn)
            drawn.set_layout_engine("none")
        drawn.savefig(to, **options)


_COLOUR = re.compile(r"#[0-9a-f]{6}\b")
_VARIABLES = {value.light: f"var({name})" for name, value in reversed(tuple(PALETTE.items()))}
