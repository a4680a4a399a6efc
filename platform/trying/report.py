"""report.html of a try: the table by budget, plots and the workflow, as one file."""

from __future__ import annotations

from pathlib import Path

import kvlab
from kvlab.platform import compare
from kvlab.platform.compare.place import MARK
from kvlab.platform.compare.report import DRAW, embedded, script_hash
from kvlab.platform.trying import words
from kvlab.platform.trying.plots import charts, colours
from kvlab.platform.trying.sheet import Sheet
from kvlab.platform.trying.table import COLUMNS, MARKS, NONE


def render(sheet: Sheet, name: str, text: str, workflow: int) -> str:
    """Return the report as HTML text.

    What users wrote is escaped wherever it stands, and the page's policy allows its two scripts by
    their hashes alone and no network at all.

    Args:
        name: of the workflow. text: its YAML. workflow: its number.
    """
    from jinja2 import Environment, FileSystemLoader, StrictUndefined
    from markupsafe import Markup
    from plotly.offline import get_plotlyjs

    styles = Path(compare.__file__).parent
    environment = Environment(
        loader=FileSystemLoader([Path(__file__).parent, styles]),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    drawn = charts(sheet)
    figures = embedded({chart.id: {"data": chart.data, "layout": chart.layout} for chart in drawn})
    library, script = (get_plotlyjs(), DRAW) if drawn else ("", "")
    subject, asked = sheet.subject, sheet.asked
    return environment.get_template("try.html.j2").render(
        name=name,
        mark=Markup(MARK).format(name),  # noqa: S704
        title=subject.name,
        about=[words.about(subject, asked, sheet.weights), words.prompts(subject, asked)],
        version=kvlab.__version__,
        workflow=workflow,
        verdicts=list(words.verdicts(sheet)),
        notes=list(words.footnotes(sheet)),
        groups=sheet.groups,
        columns=[one for one in COLUMNS if any(one[1](row) != NONE for row in sheet.rows)],
        marks=MARKS,
        shades=colours(sheet),
        charts=drawn,
        text=text,
        # Safe: our own library and script, and JSON in which no tag can end.
        figures=Markup(figures),  # noqa: S704
        library=Markup(library),  # noqa: S704
        script=Markup(script),  # noqa: S704
        hashes=" ".join(f"'sha256-{script_hash(one)}'" for one in (library, script) if one),
    )
