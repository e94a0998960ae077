"""How drawings look, and their way into a page. No pyplot and fixed settings: the same figures give the same bytes."""

import io
import re
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import matplotlib as mpl
from matplotlib.figure import Figure

INK, GRID, PAPER = "#20242b", "#dfe2e6", "#ffffff"
COLOURS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9")
"""Okabe and Ito's, which colour-blind readers can tell apart; further runs repeat them with another dash."""
DASHES = ("-", "--", ":", "-.")

_SETTINGS: dict[Any, Any] = {
    "svg.hashsalt": "forethought",
    "svg.fonttype": "none",
    "text.parse_math": False,
    "text.color": INK,
    "axes.labelcolor": INK,
    "xtick.color": INK,
    "ytick.color": INK,
    "axes.edgecolor": GRID,
    "grid.color": GRID,
    "figure.facecolor": PAPER,
    "axes.facecolor": "none",
    "font.size": 11.5,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "xtick.major.size": 0,
    "ytick.major.size": 0,
}


@contextmanager
def styled() -> Iterator[Callable[[Figure], str]]:
    """Draw inside; what it gives makes a figure a standalone SVG document on white paper."""
    with warnings.catch_warnings(), mpl.rc_context():
        # A name may hold characters that only the reader's browser has a font for.
        warnings.filterwarnings("ignore", message="Glyph .* missing from font")
        mpl.rcdefaults()
        mpl.rcParams.update(_SETTINGS)
        yield _save


def _save(figure: Figure) -> str:
    buffer = io.StringIO()
    figure.savefig(buffer, format="svg", metadata={"Date": None})
    return re.sub(r"<metadata>.*?</metadata>", "", buffer.getvalue(), flags=re.DOTALL)


def inline(svg: str, name: str, label: str) -> str:
    """The drawing for an HTML page: ids of its own, colours from the page's custom properties, no fixed size.

    `label` is read out in place of the picture and must be escaped already.
    """
    svg = svg[svg.index("<svg") :]
    svg = re.sub(r"<style.*?</style>", "", svg, flags=re.DOTALL)
    opening, _, drawing = svg.partition(">")
    box = re.search(r'viewBox="[^"]*"', opening)
    assert box is not None
    svg = f'<svg {box.group()} role="img" aria-label="{label}">{drawing}'
    svg = re.sub(r'(\bid="|url\(#|href="#)', rf"\g<1>{name}-", svg)
    return re.sub(r'style="[^"]*"', lambda match: _themed(match.group()), svg)


def _themed(style: str) -> str:
    style = style.replace(PAPER, "none").replace(INK, "currentColor").replace(GRID, "var(--grid)")
    for index, colour in enumerate(COLOURS):
        style = style.replace(colour, f"var(--series-{index})")
    return re.sub(r"font-family: [^;\"]*;?|font: ([\d.]+px) [^;\"]*;?", _plain_font, style)


def _plain_font(match: re.Match[str]) -> str:
    return f"font-size: {match.group(1)};" if match.group(1) else ""
