"""The JSON Schema (draft 2020-12) of a workflow YAML, written from the settings themselves."""

from __future__ import annotations

from typing import Any

from kvlab.platform.jobs import KINDS
from kvlab.platform.spec.settings import MOST_MATRIX_KEYS, NAME, JobSettings, WorkflowSettings
from kvlab.platform.spec.workflow import written_kinds

DIALECT = "https://json-schema.org/draft/2020-12/schema"

_MATRIX = {
    "type": "object",
    "description": "Dotted paths below the job to lists of values; every combination is a cell.",
    "minProperties": 1,
    "maxProperties": MOST_MATRIX_KEYS,
    "propertyNames": {"pattern": r"^[^.]+(\.[^.]+)+$"},
    "additionalProperties": {"type": "array", "minItems": 1, "uniqueItems": True},
}


def schema() -> dict[str, Any]:
    """Return the schema of a whole workflow.

    A job's required settings are not demanded here where its matrix may supply them; everything
    that needs more than one place of the file (references, sizes) is `kvlab validate`'s.
    """
    whole = WorkflowSettings.model_json_schema(by_alias=True)
    definitions: dict[str, Any] = whole.pop("$defs", {})
    common = _lifted(JobSettings.model_json_schema(by_alias=True), definitions)
    common["properties"]["matrix"] = _MATRIX
    kinds = {}
    for name in written_kinds():
        settings = _lifted(KINDS[name].settings.model_json_schema(by_alias=True), definitions)
        definitions[f"kind_{name}"] = settings
        kinds[name] = {"$ref": f"#/$defs/kind_{name}"}
    definitions["job"] = {
        "type": "object",
        "properties": {**common["properties"], **kinds},
        "additionalProperties": False,
        "oneOf": [{"required": [name]} for name in kinds],
        "if": {"required": ["matrix"]},
        "else": {"properties": {name: _required(name) for name in kinds}},
    }
    for name in kinds:
        definitions[f"kind_{name}"].pop("required", None)
    whole["properties"]["jobs"] = {
        "type": "object",
        "minProperties": 1,
        "propertyNames": {"pattern": f"^{NAME.pattern}$"},
        "additionalProperties": {"$ref": "#/$defs/job"},
    }
    return {"$schema": DIALECT, **whole, "title": "kvlab workflow", "$defs": definitions}


def _required(kind: str) -> dict[str, Any]:
    settings = KINDS[kind].settings.model_json_schema(by_alias=True)
    required = settings.get("required", [])
    if "from" in required:  # a search's winner brings its method
        required = [name for name in required if name != "method"]
    return {"required": required}


def _lifted(own: dict[str, Any], definitions: dict[str, Any]) -> dict[str, Any]:
    """Move a model's definitions to the whole's."""
    definitions.update(own.pop("$defs", {}))
    return own
