"""Run-time choices on a command line, written as under a workflow's `apply:`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

from kvlab import KvlabError


def canonical_of(text: str, controller: Path | None = None) -> dict[str, Any]:
    """Read an --apply: a name, or a YAML mapping of names to parameters.

    Args: controller: the folder of one that it needs.

    Raises:
        KvlabError: no YAML, no such method, or parameters that it cannot have.
    """
    import yaml
    from pydantic import TypeAdapter, ValidationError

    from kvlab.methods.axis import Method
    from kvlab.platform.jobs.controller.supply import supplied
    from kvlab.platform.jobs.method import MethodField, canonical

    try:
        written = yaml.safe_load(text)
        method = TypeAdapter(Annotated[Method, MethodField("run")]).validate_python(written)
    except yaml.YAMLError as error:
        raise KvlabError(f"--apply: no YAML: {str(error).splitlines()[0]}") from None
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(map(str, first["loc"]))
        raise KvlabError(f"--apply: {where + ': ' if where else ''}{first['msg']}") from None
    if controller is not None:
        if method.lacks() != "controller":
            raise KvlabError(f"--controller: '{method.label}' needs none: leave it out")
        method = supplied(method, controller)
    return canonical(method)
