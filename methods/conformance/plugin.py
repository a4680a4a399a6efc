"""A pytest plug-in: holds the methods that the command line names to what every method must do.

    pytest --pyargs kvlab.methods.conformance --kvlab-method h2o
    pytest --pyargs kvlab.methods.conformance --kvlab-method '{"mine": {}, "kivi": {"bits": 4}}'

Installed with kvlab, of which it imports nothing unless a method is named.
"""

from __future__ import annotations

from typing import Any

import pytest

OPTION = "--kvlab-method"
METHODS = pytest.StashKey[list[Any]]()


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.getgroup("kvlab").addoption(
        OPTION,
        action="append",
        default=[],
        metavar="METHOD",
        help="a run-time method to hold to kvlab's conformance suite: a name, or JSON of names and "
        "parameters; may be given several times",
    )


def pytest_configure(config: pytest.Config) -> None:
    """Read the methods, so that a mistake is one line before anything is collected."""
    config.stash[METHODS] = []
    if written := config.getoption(OPTION):
        from kvlab import KvlabError
        from kvlab.methods.conformance.cases import read_method

        try:
            config.stash[METHODS] = [read_method(text) for text in written]
        except KvlabError as error:
            raise pytest.UsageError(f"{OPTION}: {error}") from None


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """Give every test that asks for `kvlab_case` each named method on each tiny decoder."""
    if "kvlab_case" not in metafunc.fixturenames:
        return
    from kvlab.methods.conformance.cases import cases

    found = [case for method in metafunc.config.stash[METHODS] for case in cases(method)]
    metafunc.parametrize("kvlab_case", found, ids=[case.name for case in found])


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Refuse to run the suite on nothing."""
    asked = any("kvlab_case" in getattr(item, "fixturenames", ()) for item in items)
    if asked and not config.stash[METHODS]:
        raise pytest.UsageError(f"name the methods to test: {OPTION} h2o")
