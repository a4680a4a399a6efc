"""`kvlab schema`: the JSON Schema of a workflow YAML, for editors and other tools."""

from __future__ import annotations

import json

from kvlab.platform.spec.schema import schema


def command() -> None:
    """Print the JSON Schema (draft 2020-12) of a workflow YAML."""
    print(json.dumps(schema(), indent=2))
