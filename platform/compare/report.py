"""report.html: the comparison as one file that needs no network and runs no script but its own."""

from __future__ import annotations

import json
from base64 import b64encode
from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from hashlib import sha256
from pathlib import Path
from typing import Any

import kvlab
from kvlab.platform.compare.calibration_sheet import calibration_sheets
from kvlab.platform.compare.controller_sheet import controller_sheets
from kvlab.platform.compare.curves import Curve
from kvlab.platform.compare.model import Comparison
from kvlab.platform.compare.place import MARK
from kvlab.platform.compare.plots import charts, colours
from kvlab.platform.compare.sheets import further_sheets, main_sheet
from kvlab.platform.compare.study_sheet import study_sheets
from kvlab.platform.compare.summary import summarise_in_words

DRAW = """
const figures = JSON.parse(document.getElementById("figures").textContent);
const options = {responsive: true, displaylogo: false, displayModeBar: "hover",
                 modeBarButtonsToRemove: ["select2d", "lasso2d", "autoScale2d"]};
for (const [id, figure] of Object.entries(figures)) {
  Plotly.newPlot(id, figure.data, figure.layout, options);
}
"""


def render(comparison: Comparison, curves: Mapping[str, Curve]) -> str:
    """Return the report as HTML text.

    What users wrote (names, YAML, messages) is escaped wherever it stands, and the page's policy
    allows its two scripts by their hashes alone and no network at all.
    """
    from jinja2 import Environment, FileSystemLoader, StrictUndefined
    from markupsafe import Markup
    from plotly.offline import get_plotlyjs

    environment = Environment(
        loader=FileSystemLoader(Path(__file__).parent),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    drawn = charts(comparison, curves)
    figures = embedded({chart.id: {"data": chart.data, "layout": chart.layout} for chart in drawn})
    library = get_plotlyjs() if drawn else ""
    script = DRAW if drawn else ""
    sheets = [main_sheet(comparison), *further_sheets(comparison)] if comparison.arms else []
    sheets += [
        *calibration_sheets(comparison),
        *controller_sheets(comparison),
        *study_sheets(comparison, every=True),
    ]
    shade = colours(comparison)
    return environment.get_template("report.html.j2").render(
        comparison=comparison,
        mark=Markup(MARK).format(comparison.name),  # noqa: S704
        version=kvlab.__version__,
        created=datetime.fromtimestamp(comparison.created_at, UTC).strftime("%Y-%m-%d %H:%M UTC"),
        sentences=summarise_in_words(comparison),
        sheets=sheets,
        shades=[shade[arm.id] for arm in comparison.arms],
        shade_of=shade,
        charts=drawn,
        facts=_facts(comparison.environments),
        # Safe: our own library and script, and JSON in which no tag can end.
        figures=Markup(figures),  # noqa: S704
        library=Markup(library),  # noqa: S704
        script=Markup(script),  # noqa: S704
        hashes=" ".join(f"'sha256-{script_hash(text)}'" for text in (library, script) if text),
    )


def embedded(value: Any) -> str:
    """JSON in which no tag of a page can begin or end."""
    text = json.dumps(value, allow_nan=False)
    return text.replace("<", "\\u003c").replace(">", "\\u003e").replace("&", "\\u0026")


def script_hash(text: str) -> str:
    """What a page's policy knows a script by."""
    return b64encode(sha256(text.encode()).digest()).decode()


def _facts(environments: Sequence[Mapping[str, Any]]) -> list[tuple[str, str]]:
    """Each fact once, with every value it has in some job."""
    found: dict[str, dict[str, None]] = {}
    for environment in environments:
        for key, value in environment.items():
            if value is not None:
                text = value if isinstance(value, str) else json.dumps(value)
                found.setdefault(key, {})[text] = None
    return [(key, ", ".join(values)) for key, values in found.items()]
