"""The page: result tables in, one self-contained HTML file out.

The page loads nothing: style, script, figures and data are inside it, and its content security policy forbids the rest.
It is a function of the report alone, so the same report gives the same bytes.
"""

from __future__ import annotations

import base64
import functools
import hashlib
import json
import math
from pathlib import Path
from typing import TYPE_CHECKING, Any

from vrscope.report import activations, damage, depth, fragility, gains, limits, record, rounding, tails, tensors
from vrscope.report.headline import headline
from vrscope.tables import Report, write_text

if TYPE_CHECKING:
    import jinja2

    from vrscope.report.blocks import Section

_BUILDERS = (
    damage.damage,
    gains.gains,
    limits.limits,
    fragility.recipe,
    fragility.sensitivity,
    fragility.correlation,
    depth.depth,
    tails.tails,
    tails.histograms,
    activations.activations,
    tensors.tensors,
    record.spaces,
    record.approximate,
    record.proof,
    rounding.weight_error,
    record.provenance,
)


def render(report: Report) -> str:
    """Return the report as one HTML page without any outside reference.

    Parameters
    ----------
    report
        What a command found. A section appears only if its table has rows; missing columns and values are left blank.
    """
    from markupsafe import Markup

    sections = [section for section in (build(report) for build in _BUILDERS) if section is not None]
    environment = _environment()
    script, style = _source(environment, "page.js"), _source(environment, "style.css")
    return environment.get_template("page.html.j2").render(
        top=headline(report),
        sections=sections,
        style=Markup(style),
        script=Markup(script),
        script_hash=base64.b64encode(hashlib.sha256(script.encode()).digest()).decode(),
        payload=Markup(_embed(_payload(sections))),
        ruler=_ruler(),
    )


def write(report: Report, path: Path) -> None:
    """Write the page to `path`, whole or not at all.

    Raises
    ------
    OutputError
        If the folder cannot be written.
    """
    write_text(path, render(report))


@functools.cache
def _environment() -> jinja2.Environment:
    import jinja2
    from markupsafe import Markup

    environment = jinja2.Environment(
        loader=jinja2.PackageLoader("vrscope.report", "templates"),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters["svg"] = Markup  # only what figures.py drew, which escaped its text
    environment.filters["breakable"] = lambda name: Markup(".<wbr>").join(str(name).split("."))
    return environment


def _payload(sections: list[Section]) -> dict[str, Any]:
    """Merge what the sections leave for the script: the tensor table under its name, the maps under "maps"."""
    merged: dict[str, Any] = {"maps": {}}
    for section in sections:
        for key, value in section.payload.items():
            if section.id in {"tails", "gains"}:
                merged["maps"][key] = value
            else:
                merged[key] = value
    return merged


def _embed(value: Any) -> str:
    """Return JSON that cannot end a script element or start a comment in it, in pure ASCII."""
    text = json.dumps(value, allow_nan=False, separators=(",", ":"))
    return text.replace("&", "\\u0026").replace("<", "\\u003c").replace(">", "\\u003e")


def _source(environment: jinja2.Environment, name: str) -> str:
    assert environment.loader is not None
    return environment.loader.get_source(environment, name)[0].replace("\r\n", "\n")


def _ruler() -> list[tuple[float, int]]:
    """Return the ticks of the slide rule under the title: place in percent of its width, and height of each."""
    ticks = []
    for octave in range(8):
        for eighth in range(8):
            place = (octave + math.log2(1 + eighth / 8)) / 8
            ticks.append((round(100 * place, 2), 14 if eighth == 0 else 9 if eighth == 4 else 5))
    return ticks
