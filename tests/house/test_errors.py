"""Every error of kvlab can cross from one process to another, as Ray's actors need."""

from __future__ import annotations

import importlib
import pickle
import re
from pathlib import Path
from typing import Any

import pytest

from kvlab import KvlabError
from kvlab.db.errors import Held, LeaseLost
from kvlab.methods.registry import MisfitError
from kvlab.platform.spec.problems import Problem, WorkflowError

ROOT = Path(__file__).parents[2]
MADE_OF: dict[type, tuple[Any, ...]] = {
    Held: (3, "someone", 20.0, 10.0),
    LeaseLost: (3, 7),
    MisfitError: ("h2o", "h2o: does not go with it"),
    WorkflowError: ([Problem("file.yaml", 4, "jobs.a", "is wrong")],),
}
"""Arguments of those that are not made of one text."""


def errors() -> list[type[KvlabError]]:
    """Every subclass of KvlabError that the source defines, wherever it is."""
    for storey in ("db", "kernels", "methods", "platform"):
        for path in sorted((ROOT / storey).rglob("*.py")):
            if re.search(r"^class \w+\(\w*(Error|Unreachable|Stopped)\)", path.read_text(), re.M):
                name = path.relative_to(ROOT).with_suffix("").as_posix().replace("/", ".")
                importlib.import_module("kvlab." + name.removesuffix(".__init__"))
    found, rest = [], [KvlabError]
    while rest:
        found.append(kind := rest.pop())
        rest += kind.__subclasses__()
    return sorted(found, key=lambda kind: (kind.__module__, kind.__name__))


@pytest.mark.parametrize("kind", errors(), ids=lambda kind: f"{kind.__module__}.{kind.__name__}")
def test_it_survives_pickle(kind: type[KvlabError]) -> None:
    error = kind(*MADE_OF.get(kind, ("what, where, found, what to do",)))
    arrived = pickle.loads(pickle.dumps(error))
    assert type(arrived) is kind
    assert (str(arrived), arrived.args, vars(arrived)) == (str(error), error.args, vars(error))


def test_the_source_was_searched() -> None:
    assert {*MADE_OF} < {*errors()}
    assert len(errors()) > 20
