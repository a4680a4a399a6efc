"""`kvlab methods`: the axes, their values, presets, and every parameter with its range."""

from __future__ import annotations

import json
from dataclasses import asdict
from typing import Annotated, Any

import typer

from kvlab.methods.axis import AXES, TRAIN_TIME, Preset, Value
from kvlab.methods.registry import REGISTRY
from kvlab.platform.jobs.method import params_model


def command(
    name: Annotated[
        str | None, typer.Argument(help="One value or preset.", show_default=False)
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """List the axes and values a method is made of, with parameters, ranges and defaults."""
    entries: list[Value | Preset] = [*REGISTRY.values(), *REGISTRY.presets()]
    if name is not None:
        entries = [REGISTRY.find(name)]
    described = [describe(entry) for entry in entries]
    if as_json:
        print(json.dumps(described if name is None else described[0], indent=2))
        return
    from rich.console import Console

    console = Console()
    if name is None:
        _overview(described, console)
    else:
        _details(described[0], console)


def describe(entry: Value | Preset) -> dict[str, Any]:
    """Return all that is known about a value or preset, as JSON values."""
    about: dict[str, Any] = {"name": entry.name, "summary": entry.summary, "paper": entry.paper}
    if isinstance(entry, Preset):
        values = {name: dict(params) for name, params in entry.values.items()}
        return {**about, "preset": True, "values": values}
    properties = params_model(entry.params).model_json_schema()["properties"]
    defaults = asdict(entry.params())
    return {
        **about,
        "preset": False,
        "axis": entry.axis,
        "when": "train" if entry.axis in TRAIN_TIME else "run",
        "default": entry.default,
        "params": {name: _param(schema, defaults[name]) for name, schema in properties.items()},
    }


def _param(schema: dict[str, Any], default: Any) -> dict[str, Any]:
    """One parameter: default, and type with range or choices."""
    options = schema.get("anyOf", [schema])
    types = [option["type"] for option in options if option.get("type", "null") != "null"]
    stated = next((option for option in options if option.get("type") != "null"), schema)
    kinds = " or ".join(types).replace("array", "list")
    about: dict[str, Any] = {"default": default, "type": kinds}
    if "minimum" in stated:
        about["range"] = [stated["minimum"], stated["maximum"]]
    if "enum" in stated:
        about["choices"] = stated["enum"]
    if len(options) > 1:
        about["optional"] = True
    return about


def _overview(described: list[dict[str, Any]], console: Any) -> None:
    from rich.table import Table

    table = Table(box=None, pad_edge=False, header_style="bold")
    for column in ("axis", "name", "summary", "paper"):
        table.add_column(column, no_wrap=column != "summary")
    for axis in AXES:
        for entry in described:
            if entry.get("axis") == axis:
                default = " (default)" if entry["default"] else ""
                table.add_row(axis, entry["name"] + default, entry["summary"], entry["paper"] or "")
    for entry in described:
        if entry["preset"]:
            table.add_row("preset", entry["name"], entry["summary"], entry["paper"] or "")
    console.print(table)
    console.print("Parameters: kvlab methods NAME", style="dim")


def _details(entry: dict[str, Any], console: Any) -> None:
    from rich.table import Table

    paper = f" (arXiv {entry['paper']})" if entry["paper"] else ""
    console.print(f"{entry['name']}: {entry['summary']}{paper}", highlight=False)
    if entry["preset"]:
        console.print(json.dumps(entry["values"]), highlight=False)
        return
    where = (
        "method: of train and uptrain" if entry["when"] == "train" else "apply: where it is used"
    )
    console.print(f"axis {entry['axis']}; {where}", highlight=False)
    if not entry["params"]:
        console.print("no parameters")
        return
    table = Table(box=None, pad_edge=False, header_style="bold")
    for column in ("parameter", "default", "allowed"):
        table.add_column(column, no_wrap=column != "allowed")
    for name, param in entry["params"].items():
        table.add_row(name, json.dumps(param["default"]), _allowed(param))
    console.print(table, highlight=False)


def _allowed(param: dict[str, Any]) -> str:
    if "choices" in param:
        text = ", ".join(map(str, param["choices"]))
    elif "range" in param:
        text = f"{param['type']} from {param['range'][0]} to {param['range'][1]}"
    else:
        text = "true or false" if param["type"] == "boolean" else str(param["type"])
    return f"{text}, or null" if param.get("optional") else text
