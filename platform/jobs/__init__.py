"""The kinds of job. Each is a folder: settings.py says what a user writes, run.py does it.

`KINDS` maps a YAML key to its kind. Ours are imported when first asked for; kinds from outside the
repository register through the entry-point group `kvlab.kinds`.
"""

from __future__ import annotations

import importlib
from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING

from kvlab import KvlabError

if TYPE_CHECKING:
    from kvlab.platform.jobs.kind import Kind

ENTRY_POINTS = "kvlab.kinds"

OURS = {
    "data": "kvlab.platform.jobs.data.settings:Data",
    "train": "kvlab.platform.jobs.train.settings:Train",
    "uptrain": "kvlab.platform.jobs.uptrain.settings:Uptrain",
    "calibrate": "kvlab.platform.jobs.calibrate.settings:Calibrate",
    "label": "kvlab.platform.jobs.label.settings:Label",
    "controller": "kvlab.platform.jobs.controller.settings:Controller",
    "evaluate": "kvlab.platform.jobs.evaluate.settings:Evaluate",
    "benchmark": "kvlab.platform.jobs.benchmark.settings:Benchmark",
    "serve_benchmark": "kvlab.platform.jobs.serve_benchmark.settings:ServeBenchmark",
    "search": "kvlab.platform.jobs.search.settings:Search",
    "noop": "kvlab.platform.jobs.noop.settings:Noop",
}

IMPLICIT = "data"
"""The kind of the one cell that every workflow with `data:` has; it is not written as a job."""


class Kinds(Mapping[str, "Kind"]):
    """Name -> the kind's one shared instance."""

    def __init__(self) -> None:
        self._instances: dict[str, Kind] = {}
        self._targets: dict[str, str] | None = None

    def __getitem__(self, name: str) -> Kind:
        if name not in self._instances:
            module, _, attribute = self._where()[name].partition(":")
            self._instances[name] = getattr(importlib.import_module(module), attribute)()
        return self._instances[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._where())

    def __len__(self) -> int:
        return len(self._where())

    def _where(self) -> dict[str, str]:
        if self._targets is None:
            from importlib.metadata import entry_points

            targets = dict(OURS)
            for point in entry_points(group=ENTRY_POINTS):
                if point.name in targets:
                    raise KvlabError(f"job kind '{point.name}' of '{point.value}' is taken")
                targets[point.name] = point.value
            self._targets = targets
        return self._targets


KINDS = Kinds()
