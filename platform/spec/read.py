"""From a workflow's YAML to a graph that can run. Reading writes nothing unless told to."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from kvlab.platform.graph import Cell, Graph
from kvlab.platform.jobs import IMPLICIT, KINDS
from kvlab.platform.jobs.field import suggest
from kvlab.platform.spec.contents import Contents, Unread
from kvlab.platform.spec.document import parse, read_text
from kvlab.platform.spec.expand import Draft, Expansion
from kvlab.platform.spec.identity import Machine, code_digest, identify, identity_of
from kvlab.platform.spec.join import SEED
from kvlab.platform.spec.problems import WorkflowError
from kvlab.platform.spec.settings import ReportSettings, retries_of
from kvlab.platform.spec.surroundings import shared_data, shared_model
from kvlab.platform.spec.workflow import Workflow, read_workflow


def load_graph(
    source: Path | str,
    *,
    home: Path | None = None,
    remember: bool = False,
    cluster: str | None = None,
    cpus: int | None = None,
) -> Graph:
    """Read, check, expand, join and identify a workflow.

    Args:
        source: a file, or (a str) the YAML itself; relative paths inside it start from the file's
            folder, or from the current one.
        home: KVLAB_HOME, where digests of large files are remembered; None: everything is read.
        remember: write new digests there. Only a run does.
        cluster: address of the cluster that will measure; None: this machine will.
        cpus: CPUs that jobs may have here; None: all.

    Raises:
        WorkflowError: with every mistake, each with its line and YAML path.
    """
    contents = Contents(home, write=remember)
    graph = _graph(source, contents, identified=True, machine=(cluster, cpus))
    contents.save()
    return graph


def check(source: Path | str) -> Graph:
    """Do all that `load_graph` does but read the content of data and checkpoints.

    The cells have no identities. Writes nothing anywhere.

    Raises:
        WorkflowError: with every mistake.
    """
    return _graph(source, Unread(), identified=False)


def _graph(
    source: Path | str, contents: Contents, *, identified: bool, machine: Machine = (None, None)
) -> Graph:
    if isinstance(source, Path):
        text, folder, file = read_text(source), source.parent, str(source)
    else:
        text, folder, file = source, Path(), "workflow"
    document = parse(text, file)
    workflow = read_workflow(document)
    data = shared_data(workflow, folder.absolute(), contents)
    model = shared_model(workflow, data)
    _check_report(workflow)
    expansion = Expansion(workflow, data, model)
    drafts = expansion.run() if workflow.jobs else []
    if workflow.problems:
        raise WorkflowError(workflow.problems)
    cells = _cells(expansion, drafts, identified, machine)
    report: ReportSettings = workflow.top["report"]
    return Graph(workflow.top["name"], text, tuple(cells), report.model_dump(mode="json"))


def _check_report(workflow: Workflow) -> None:
    report = workflow.top.get("report")
    if report is None or report.baseline is None:
        return
    makers = [job.name for job in workflow.jobs.values() if KINDS[job.kind].produces_model]
    written: Any = workflow.document.value.get("jobs")
    if report.baseline not in makers and report.baseline not in workflow.broken:
        what = (
            f"'{report.baseline}' publishes no model"
            if isinstance(written, dict) and report.baseline in written
            else f"unknown job '{report.baseline}'"
        )
        workflow.blame(("report", "baseline"), f"{what}: {suggest(report.baseline, makers)}")


def _cells(
    expansion: Expansion, drafts: list[Draft], identified: bool, machine: Machine
) -> list[Cell]:
    """Return the graph's cells; without identities unless `identified`."""
    identities: dict[str, str] = {}
    cells: list[Cell] = []
    if expansion.implicit is not None:
        cells.append(_data_cell(expansion.implicit.spec, identified))
        identities[IMPLICIT] = cells[0].identity
    short = {**expansion.short, SEED: SEED}
    for draft in drafts:
        identity, parts = "", dict[str, str]()
        if identified:
            above = {role: identities[name] for role, name in draft.parents.items()}
            identity, parts = identity_of(
                draft.job.kind, draft.spec, above, draft.resources, machine
            )
        identities[draft.name] = identity
        if KINDS[draft.job.kind].inline:  # what it starts may be measured
            draft.spec["machine"] = list(machine)
            retries = retries_of(draft.job.common.retries)
            draft.spec["retries"] = {cause.value: count for cause, count in retries.items()}
            draft.spec["timeout"] = draft.job.common.timeout
        cells.append(
            Cell(
                name=draft.name,
                job=draft.job.name,
                kind=draft.job.kind,
                spec=draft.spec,
                axes={short[key]: value for key, value in draft.axes.items()},
                parents=draft.parents,
                needs=draft.needs,
                identity=identity,
                parts=parts,
                resources=draft.resources,
                retries=retries_of(draft.job.common.retries),
                timeout=draft.job.common.timeout,
            )
        )
    return cells


def _data_cell(spec: Mapping[str, Any], identified: bool) -> Cell:
    kind = KINDS[IMPLICIT]
    code = code_digest(kind.sources(spec)) if identified else ""
    identity, parts = (
        identify(IMPLICIT, spec, {}, code, libraries=kind.libraries(spec))
        if identified
        else ("", {})
    )
    return Cell(
        name=IMPLICIT,
        job=IMPLICIT,
        kind=IMPLICIT,
        spec=spec,
        axes={},
        parents={},
        needs=(),
        identity=identity,
        parts=parts,
        resources=kind.resources,
    )
