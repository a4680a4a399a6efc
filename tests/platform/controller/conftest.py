"""One real Ray for the tests of a module, a fresh home for each, and workflows of no-op jobs."""

from __future__ import annotations

import time
from pathlib import Path

import pytest
import ray

from kvlab.db.store import Store
from kvlab.platform.controller.controller import Controller
from kvlab.platform.controller.jobs import new_job
from kvlab.platform.controller.local import local_ray
from kvlab.platform.controller.pool import Pool
from kvlab.platform.graph import Cell, Resources
from kvlab.platform.home import Home
from kvlab.platform.spec.read import load_graph


@pytest.fixture(scope="module")
def cluster():
    """The address of a Ray that says it has four CPUs: jobs here mostly sleep.

    A process has one Ray at a time, and other tests need theirs: it ends with the module.
    """
    with local_ray(cpus=4):
        yield ray.get_runtime_context().gcs_address


@pytest.fixture
def home(tmp_path):
    found = Home.find(tmp_path / "home", f"sqlite:///{tmp_path}/home/kvlab.db")
    found.create()
    return found


@pytest.fixture
def store(home):
    with Store.open(home.url) as opened:
        yield opened


@pytest.fixture
def cell():
    """Make a no-op cell; its identity is its name, so equal names are equal jobs."""

    def make(name, *needs, kind="noop", resources=None, retries=None, timeout=None, **spec):
        return Cell(
            name=name,
            job=name,
            kind=kind,
            spec={"sleep": 0.0, "points": 0, "fail": None, "seed": 0, **spec},
            axes={},
            parents={},
            needs=needs,
            identity=f"identity-of-{name}",
            parts={},
            resources=resources or Resources(),
            retries=retries or {},
            timeout=timeout,
        )

    return make


@pytest.fixture
def submit(store):
    """Store a workflow of cells; return its number."""

    def make(*cells):
        jobs = [new_job(one) for one in cells]
        return store.create_workflow("test", "", {}, jobs, time.time())

    return make


@pytest.fixture
def pool(cluster, home):
    made = Pool(home)
    yield made
    made.close()


@pytest.fixture
def run(store, home, pool, submit):
    """Run cells, or a stored workflow, to the end; return (outcome, jobs by name)."""

    def go(*what):
        number = what[0] if isinstance(what[0], int) else submit(*what)
        outcome = Controller(home, store, number, pool=pool).run()
        return outcome, {job.name: job for job in store.load(number).jobs}

    return go


@pytest.fixture
def run_text(store, home, pool):
    """Run a workflow's text, or go on with one; return its outcome and what is stored of it."""

    def submitted(text: str) -> int:
        graph = load_graph(text, home=home.root)
        jobs = [new_job(cell) for cell in graph.cells]
        return store.create_workflow(graph.name, text, dict(graph.report), jobs, time.time())

    def go(what: str | int):
        number = what if isinstance(what, int) else submitted(what)
        outcome = Controller(home, store, number, pool=pool).run()
        return outcome, store.load(number)

    return go


@pytest.fixture
def documents(tmp_path: Path) -> Path:
    folder = tmp_path / "text"
    folder.mkdir()
    for i in range(60):
        (folder / f"{i:02}.txt").write_text(f"Document {i} says {i * i}.\n" * 9)
    return folder
