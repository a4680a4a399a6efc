"""Where a run leaves its report: never over that of another workflow, nor over anything else."""

from __future__ import annotations

from pathlib import Path

MARK = '<meta name="kvlab-workflow" content="{}">'
"""Stands near the beginning of every report."""

_LOOKED_AT = 4096


def default_place(name: str, workflow: int) -> Path | None:
    """Return report.html, or a longer name where that is not this workflow's; None: all are taken.

    A report of an earlier run of the same name is replaced.
    """
    for file in ("report.html", f"report-{name}.html", f"report-{name}-{workflow}.html"):
        if _free(Path(file), name):
            return Path(file)
    return None


def _free(file: Path, name: str) -> bool:
    try:
        with file.open("rb") as stream:
            return MARK.format(name).encode() in stream.read(_LOOKED_AT)
    except FileNotFoundError:
        return True
    except OSError:
        return False
