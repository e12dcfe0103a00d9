"""Drawings for a page: matplotlib figures as inline SVG whose colours are the page's."""

from __future__ import annotations

import io
import re
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any
from xml.etree import ElementTree

import matplotlib
from matplotlib.figure import Figure

if TYPE_CHECKING:
    from matplotlib.typing import RcKeyType

NARROW, WIDE = 343, 720
"""Widths in CSS pixels: of a phone's page, of a page on paper or a desk."""

_ROLES = (
    *("ink", "muted", "grid", "page", "limit"),
    *("attention", "router", "experts", "source", "target"),
)
SHADES = 8
"""Steps of the sequential palette, from little to much."""
COLOUR = {name: f"#0100{n:02x}" for n, name in enumerate(_ROLES)}
"""Stand-ins that become CSS variables, so that one drawing is right in light and dark."""
SHADE = tuple(f"#0200{n:02x}" for n in range(SHADES))
_VARIABLES = {colour: f"var(--{name})" for name, colour in COLOUR.items()}
_VARIABLES |= {colour: f"var(--shade-{n})" for n, colour in enumerate(SHADE)}

_STYLE: dict[RcKeyType, Any] = {
    "svg.fonttype": "none",
    "font.size": 11,
    "axes.titlesize": 11,
    "axes.titlelocation": "left",
    "axes.titlecolor": COLOUR["ink"],
    "axes.labelsize": 11,
    "axes.labelcolor": COLOUR["muted"],
    "axes.edgecolor": COLOUR["grid"],
    "axes.facecolor": "none",
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.axisbelow": True,
    "figure.facecolor": "none",
    "grid.color": COLOUR["grid"],
    "grid.linewidth": 0.7,
    "legend.frameon": False,
    "legend.labelcolor": COLOUR["ink"],
    "legend.fontsize": 11,
    "text.color": COLOUR["ink"],
    "xtick.color": COLOUR["grid"],
    "ytick.color": COLOUR["grid"],
    "xtick.labelcolor": COLOUR["muted"],
    "ytick.labelcolor": COLOUR["muted"],
    "xtick.labelsize": 10,
    "ytick.labelsize": 10,
    "lines.solid_capstyle": "round",
}


@contextmanager
def style() -> Iterator[None]:
    """Draw in the page's style."""
    with matplotlib.rc_context(_STYLE):
        yield


def blank(width: int, height: int) -> Figure:
    """An empty drawing of a size in CSS pixels."""
    figure = Figure(figsize=(width / 72, height / 72), layout="constrained")
    figure.get_layout_engine().set(w_pad=0.02, h_pad=0.02, hspace=0.1, wspace=0.02)  # pyright: ignore
    return figure


def svg(figure: Figure, name: str) -> str:
    """The drawing as an `<svg>` element to stand in HTML, with ids of its own by `name`."""
    held = io.StringIO()
    with matplotlib.rc_context({"svg.hashsalt": name}):
        figure.savefig(held, format="svg", metadata={"Date": None, "Creator": None})
    root = ElementTree.fromstring(held.getvalue())
    for parent in [*root.iter()]:
        for child in [*parent]:
            if child.tag.endswith("}metadata"):
                parent.remove(child)
    _plain(root, name)
    root.attrib = {"viewBox": root.attrib["viewBox"], "aria-hidden": "true"}
    text = ElementTree.tostring(root, encoding="unicode", short_empty_elements=True)
    return re.sub("#0[12]00[0-9a-f]{2}", lambda found: _VARIABLES[found[0]], text)


def _plain(root: ElementTree.Element, name: str) -> None:
    """Drop namespaces and ids nobody refers to; the others get `name` before them."""
    referred = _referred(root)
    for element in root.iter():
        element.tag = _local(element.tag)
        attributes = {_local(key): text for key, text in element.attrib.items()}
        if attributes.get("id") in referred:
            attributes["id"] = f"{name}-{attributes['id']}"
        else:
            attributes.pop("id", None)
        if "d" in attributes:
            attributes["d"] = _short(attributes["d"])
        for key, text in attributes.items():
            for id_ in referred:
                text = text.replace(f"#{id_}", f"#{name}-{id_}")
            attributes[key] = text
        element.attrib = attributes


def _short(path: str) -> str:
    """The same path to a hundredth of a pixel, lines along an axis by their one coordinate."""
    parts: list[str] = []
    x = y = ""
    for command, texts in re.findall("([A-Za-z])([^A-Za-z]*)", path):
        numbers = [f"{float(text):.2f}".rstrip("0").rstrip(".") for text in texts.split()]
        if command == "L" and numbers[1] == y:
            parts.append(f"H{numbers[0]}")
        elif command == "L" and numbers[0] == x:
            parts.append(f"V{numbers[1]}")
        else:
            parts.append(command + " ".join(numbers))
        if numbers:
            x, y = numbers[-2:]
    return "".join(parts)


def _local(name: str) -> str:
    return name.rpartition("}")[2]


def _referred(root: ElementTree.Element) -> set[str]:
    texts = [text for element in root.iter() for text in element.attrib.values()]
    urls = (re.findall(r"url\(#([^)]+)\)", text) for text in texts)
    hrefs = {
        text[1:]
        for element in root.iter()
        for key, text in element.attrib.items()
        if key.endswith("href") and text.startswith("#")
    }
    return hrefs.union(*urls)
