"""Where commands print: as wide as the terminal, and as wide as it takes where there is none."""

from __future__ import annotations

import sys

from rich.console import Console

WIDE = 1000
"""Characters of a line where output is no terminal: rows stay whole for whoever reads them."""


def console(*, stderr: bool = False) -> Console:
    """Return the console of standard output, or of standard error."""
    stream = sys.stderr if stderr else sys.stdout
    return Console(stderr=stderr, width=None if stream.isatty() else WIDE)
