"""From a matplotlib figure to SVG that can stand inside a page: themed by CSS variables, without ids, dates or fonts.

Figures are drawn in marker colours. Here each becomes `var(--name)`, so one drawing serves light, dark and print.
"""

from __future__ import annotations

import io
import re
import warnings
import xml.etree.ElementTree as ET
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from matplotlib.figure import Figure as Canvas

INK, MUTED, LINE = "#0a0001", "#0a0002", "#0a0003"
SERIES = ("#0a0010", "#0a0011", "#0a0012", "#0a0013", "#0a0014")
LAW, YARDSTICK, TARGET = "#0a0020", "#0a0021", "#0a0022"
HEAT = tuple(f"#0b00{k:02x}" for k in range(9))
COLD = ("#0c0001", "#0c0002")

VARIABLES = {
    INK: "--ink",
    MUTED: "--muted",
    LINE: "--line",
    **{colour: f"--series-{k}" for k, colour in enumerate(SERIES)},
    LAW: "--law",
    YARDSTICK: "--yardstick",
    TARGET: "--target",
    **{colour: f"--heat-{k}" for k, colour in enumerate(HEAT)},
    **{colour: f"--cold-{k}" for k, colour in enumerate(COLD, start=1)},
}
_SVG = "http://www.w3.org/2000/svg"
_HREF = "{http://www.w3.org/1999/xlink}href"
_DECIMALS = re.compile(r"(\.\d\d)\d+")


@contextmanager
def drawing() -> Iterator[None]:
    """Draw with the page's defaults, whatever the user's matplotlibrc says."""
    from matplotlib import style

    look = {
        "svg.fonttype": "none",
        "svg.hashsalt": "vrscope",
        "text.parse_math": False,  # a "$" in a name is a dollar sign
        "font.family": "DejaVu Sans",
        "font.size": 11,
        "text.color": INK,
        "axes.edgecolor": LINE,
        "axes.labelcolor": MUTED,
        "axes.labelsize": 11,
        "axes.spines.top": False,
        "axes.spines.right": False,
        "axes.linewidth": 1,
        "axes.axisbelow": True,
        "axes.unicode_minus": True,
        "axes.grid": True,
        "grid.color": LINE,
        "grid.linewidth": 0.6,
        "xtick.color": LINE,
        "ytick.color": LINE,
        "xtick.labelcolor": MUTED,
        "ytick.labelcolor": MUTED,
        "xtick.labelsize": 11,
        "ytick.labelsize": 11,
        "xtick.minor.visible": False,
        "ytick.minor.visible": False,
        "lines.solid_capstyle": "round",
    }
    with style.context(["default", look]), warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=r"Glyph .* missing from")
        yield


def canvas(width: float, height: float) -> Canvas:
    """Return an empty transparent figure of `width` by `height` CSS pixels."""
    from matplotlib.figure import Figure as Canvas

    figure = Canvas(figsize=(width / 72, height / 72), dpi=72)
    figure.patch.set_visible(False)
    return figure


def to_svg(figure: Canvas, label: str, name: str) -> str:
    """Return the figure as one `<svg>` element.

    Parameters
    ----------
    label
        What the figure says, for those who cannot see it; becomes `aria-label`.
    name
        Prefix of the few ids that must stay, unique on the page.
    """
    for axes in figure.axes:
        axes.patch.set_visible(False)
    buffer = io.StringIO()
    figure.savefig(buffer, format="svg", metadata={"Date": None, "Creator": None, "Type": None, "Format": None})
    root = ET.fromstring(buffer.getvalue())
    _drop(root, {f"{{{_SVG}}}style", f"{{{_SVG}}}metadata", "{http://www.w3.org/2000/svg}title"})
    ids = {used: f"{name}-{k}" for k, used in enumerate(_references(root))}
    for element in root.iter():
        _clean(element, ids)
    width, height = root.attrib["viewBox"].split()[2:]
    for key in ("width", "height", "version"):
        root.attrib.pop(key, None)
    root.attrib.update({"role": "img", "aria-label": label, "style": f"--w:{width};--h:{height}"})
    ET.register_namespace("", _SVG)
    return ET.tostring(root, encoding="unicode").replace("\n", "")


def _drop(root: ET.Element, tags: set[str]) -> None:
    for parent in list(root.iter()):
        for child in list(parent):
            if child.tag in tags:
                parent.remove(child)


def _references(root: ET.Element) -> list[str]:
    """List the ids that something in the drawing points to, in order of use."""
    found: dict[str, None] = {}
    for element in root.iter():
        for value in element.attrib.values():
            for used in re.findall(r"url\(#([^)]+)\)|^#([\w-]+)$", value):
                found[used[0] or used[1]] = None
    return list(found)


def _clean(element: ET.Element, ids: dict[str, str]) -> None:
    """Rename or drop the id, shorten coordinates, and turn colours into variables; text is left alone."""
    attributes = element.attrib
    own = attributes.pop("id", None)
    if own in ids:
        attributes["id"] = ids[own]
    if _HREF in attributes:
        attributes["href"] = "#" + ids[attributes.pop(_HREF).removeprefix("#")]
    if "clip-path" in attributes:
        attributes["clip-path"] = re.sub(r"#([^)]+)", lambda m: "#" + ids[m[1]], attributes["clip-path"])
    for key in {"d", "x", "y", "style", "transform"} & attributes.keys():
        value = attributes[key]
        if key in {"d", "x", "y"} or (key == "transform" and "scale" not in value):
            value = _DECIMALS.sub(r"\1", value)
        if key == "d":
            value = re.sub(r"\s+", " ", value).strip()
        if key == "style":
            value = re.sub(r"font-family:[^;]*;?", "", value)
            value = re.sub(r"#[0-9a-f]{6}", lambda m: f"var({VARIABLES[m[0]]})" if m[0] in VARIABLES else m[0], value)
        attributes[key] = value
