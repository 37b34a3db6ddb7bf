"""Matplotlib figures as inline SVG: real text, no metadata, no outside references, the page's colours.

The same as PNG, for places that take no SVG. Colours leave as CSS variables with their light value as
fall-back, so that a page can restyle them for a dark screen and a lone SVG stays legible. Knows nothing of
what is plotted.
"""

from __future__ import annotations

import io
import re
import warnings
from typing import Any
from xml.etree import ElementTree

import matplotlib
from matplotlib.axes import Axes
from matplotlib.backends.backend_svg import FigureCanvasSVG
from matplotlib.figure import Figure

INK = "#1f2a37"
MUTED = "#5b6675"
LINE = "#c3cad3"
EXECUTED = "#0072b2"  # Okabe and Ito's blue and vermilion: told apart by all eyes, and in grey
SAVED = "#c5d9e8"
FULL_DEPTH = "#8a94a1"
MARK = "#d55e00"
CSS_VARIABLES = {
    INK: "ink",
    MUTED: "muted",
    LINE: "line",
    EXECUTED: "executed",
    SAVED: "saved",
    FULL_DEPTH: "full-depth",
    MARK: "mark",
}

SVG_NAMESPACE = "http://www.w3.org/2000/svg"
FULL_WIDTH_INCHES = 10.3
HALF_WIDTH_INCHES = 4.9
THIRD_WIDTH_INCHES = 3.1
TEXT_POINTS = 9.0
SMALL_TEXT_POINTS = 8.0

_COLOUR = re.compile("|".join(CSS_VARIABLES))
_SETTINGS: dict[Any, Any] = {
    "svg.fonttype": "none",
    "font.family": "sans-serif",
    "font.sans-serif": ["DejaVu Sans"],
}


def new_axes(width_inches: float, height_inches: float) -> tuple[Figure, Axes]:
    """A figure with one bare pair of axes; no state is shared with other figures."""
    figure = Figure(figsize=(width_inches, height_inches), layout="constrained")
    FigureCanvasSVG(figure)
    axes = figure.add_subplot()
    strip(axes)
    return figure, axes


def strip(axes: Axes) -> None:
    """Leaves the base line: numbers stand at the marks themselves."""
    for side in ("top", "right", "left"):
        axes.spines[side].set_visible(False)
    axes.spines["bottom"].set_color(LINE)
    axes.tick_params(length=0, labelsize=TEXT_POINTS, labelcolor=INK)
    axes.patch.set_visible(False)
    axes.xaxis.label.set(color=MUTED, size=TEXT_POINTS)
    axes.yaxis.label.set(color=MUTED, size=TEXT_POINTS)


def to_svg(figure: Figure, *, name: str, title: str) -> str:
    """The figure as an SVG element to stand inside a page.

    Args:
        figure: What to draw.
        name: Unique in the page: prefixes the element ids.
        title: What a screen reader says.
    """
    figure.patch.set_visible(False)
    buffer = io.StringIO()
    # Text stays text (searchable, in the page's font) only by this setting; it is restored at once.
    with matplotlib.rc_context({**_SETTINGS, "svg.hashsalt": name}), warnings.catch_warnings():
        # The reader's browser draws the text: letters missing from the measuring font do not matter.
        warnings.filterwarnings("ignore", message="Glyph .* missing from")
        figure.savefig(buffer, format="svg", metadata={"Date": None})
    return _inline(buffer.getvalue(), name, title)


def to_png(figure: Figure, *, dots_per_inch: int = 160) -> bytes:
    """The figure as a PNG file on white."""
    buffer = io.BytesIO()
    figure.patch.set(visible=True, facecolor="white")
    figure.savefig(buffer, format="png", dpi=dots_per_inch, metadata={"Software": None})
    return buffer.getvalue()


def _inline(document: str, name: str, title: str) -> str:
    root = ElementTree.fromstring(document)  # ours: written by matplotlib a moment ago
    for metadata in root.findall(f"{{{SVG_NAMESPACE}}}metadata"):
        root.remove(metadata)
    for element in root.iter():
        element.tag = _local(element.tag)
        element.attrib = {_local(key): _restyled(key, value, name) for key, value in element.attrib.items()}
    # It takes the width of its place, up to its natural size.
    width = root.attrib.pop("width")
    del root.attrib["height"]
    root.attrib |= {"xmlns": SVG_NAMESPACE, "role": "img", "style": f"max-width: {width}"}
    root.insert(0, _titled(title))
    return ElementTree.tostring(root, encoding="unicode")


def _local(name: str) -> str:
    """Without namespace: inside a page, SVG needs none."""
    return name.rpartition("}")[2]


def _restyled(key: str, value: str, name: str) -> str:
    """Ids and references get the figure's prefix, known colours become variables."""
    if key == "id":
        return f"{name}-{value}"
    value = re.sub(r"^#|(?<=url\(#)", lambda found: f"{found.group()}{name}-", value)
    return _COLOUR.sub(lambda found: f"var(--{CSS_VARIABLES[found.group()]}, {found.group()})", value)


def _titled(title: str) -> ElementTree.Element:
    element = ElementTree.Element("title")
    element.text = title
    return element
