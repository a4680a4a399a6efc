"""How text and JSON are written so that both databases take them."""

from __future__ import annotations

import json
from typing import Any


def clean(text: str) -> str:
    """Replace what PostgreSQL (NUL) or UTF-8 (lone surrogates) cannot hold."""
    return text.replace("\0", "\N{REPLACEMENT CHARACTER}").encode("utf-8", "replace").decode()


def dump(value: Any) -> str:
    """JSON in ASCII, so that any string survives; NaN and Infinity are written as Python does."""
    return json.dumps(value)
