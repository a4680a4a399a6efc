"""What a measuring job was given by others beside its model, in words."""

from __future__ import annotations

from collections.abc import Iterator, Mapping

from kvlab.db.rows import JobRow
from kvlab.platform.compare.labels import axes_text

ROLES = {"budgets": "budgets of", "controller": "controller"}
"""Role in which a job names another that decides its result -> how that is said."""


def given_text(row: JobRow, by_name: Mapping[str, JobRow]) -> str:
    """`budgets of groups[p=0.2]`, `controller learned`, or both; nothing where nothing was given.

    What was made for another job's model says whose it is: `budgets of groups[of=base]`.
    """
    return " and ".join(_given(row, by_name))


def _given(row: JobRow, by_name: Mapping[str, JobRow]) -> Iterator[str]:
    for role, said in ROLES.items():
        source = by_name.get(row.parents.get(role, ""))
        if source is None:
            continue
        inside = axes_text(source.axes)
        own, other = (by_name.get(each.parents.get("of", "")) for each in (row, source))
        if own is not None and other is not None and own.job != other.job:
            inside = ", ".join(filter(None, (f"of={other.job}", inside)))
        yield f"{said} {source.job}[{inside}]" if inside else f"{said} {source.job}"
