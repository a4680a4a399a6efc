"""report.html: complete, self-contained, and deaf to what users write."""

from __future__ import annotations

import json
import math
import re
from base64 import b64encode
from hashlib import sha256
from html.parser import HTMLParser
from typing import Any

import pytest

from kvlab.db.states import WorkflowState
from kvlab.db.store import Store
from kvlab.platform.compare import report_of
from kvlab.platform.compare.build import compare
from kvlab.platform.compare.curves import MOST, read_curves
from kvlab.platform.compare.plots.positions import FOLD, fold
from kvlab.platform.compare.report import render

ATTACK = '</script><script>alert(1)</script><img src="https://evil/x" onerror=alert(2)>\'"&{{7*7}}'


class Page(HTMLParser):
    """What a browser would find in the page."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.scripts: list[str] = []
        self.words: list[str] = []
        self._in_script = False
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        self._in_script = tag == "script"

    def handle_endtag(self, tag: str) -> None:
        self._in_script = False

    def handle_data(self, data: str) -> None:
        (self.scripts if self._in_script else self.words).append(data)

    def all(self, tag: str) -> list[dict[str, str | None]]:
        return [attributes for name, attributes in self.tags if name == tag]


def policy(text: str) -> str:
    """The page's content security policy, as a browser reads it."""
    found = next(a["content"] for a in Page(text).all("meta") if "http-equiv" in a)
    assert found is not None
    return found


def rendered(lab: Any, name: str = "study") -> str:
    wid = lab.save(name=name)
    with Store.open(f"sqlite:///{lab.home / 'kvlab.db'}", read_only=True) as store:
        text = report_of(store, wid)
    assert text is not None
    return text


@pytest.fixture(scope="module")
def quick_page(tmp_path_factory: pytest.TempPathFactory, request: Any) -> str:
    lab = request.getfixturevalue("make_quickstart")(tmp_path_factory.mktemp("home"))
    return rendered(lab)


def test_the_page_has_every_part(quick_page: str) -> None:
    page = Page(quick_page)
    words = " ".join(page.words)
    for part in ("In short", "Comparison", "Plots", "Workflow", "Do it again", "Environment"):
        assert part in words
    assert "block[block_length=2] against base: perplexity 6.2" in words
    assert "version: 1\nname: study" in words
    assert "kvlab run workflow.yaml" in words
    figures = json.loads(page.scripts[0])
    drawn = {attributes.get("id") for attributes in page.all("div")} & figures.keys()
    assert drawn == figures.keys()
    assert {name.partition("-")[0] for name in figures} == {
        "pareto", "throughput", "position", "fold", "training",
    }  # fmt: skip
    assert len(figures["training"]["data"]) == 9


def test_the_page_needs_no_network(quick_page: str) -> None:
    page = Page(quick_page)
    for _, attributes in page.tags:
        assert not attributes.keys() & {"src", "href", "srcset", "action", "data"}
    assert policy(quick_page).startswith("default-src 'none'; script-src 'sha256-")
    assert "http" not in policy(quick_page)


def test_the_policy_names_the_very_scripts_of_the_page(quick_page: str) -> None:
    scripts = re.findall(r"<script>(.*?)</script>", quick_page, re.DOTALL)
    assert len(scripts) == 2
    for script in scripts:
        digest = b64encode(sha256(script.encode()).digest()).decode()
        assert f"'sha256-{digest}'" in policy(quick_page)


def test_what_users_write_stays_text(lab: Any) -> None:
    for seed in (0, 1):
        base = lab.train("base", seed)
        lab.evaluate(base, 3.5, by_position=True)
        lab.benchmark(base, 100, environment={"device": "cpu", "device_name": ATTACK})
        bad = lab.train("bad", seed, axes={"x": ATTACK})
        lab.evaluate(bad, 3.6, by_position=True)
        lab.benchmark(bad, 100, environment={"device": "cpu", "device_name": ATTACK})
    text = rendered(lab, name=ATTACK)
    page = Page(text)
    assert not page.all("img")
    assert len(page.all("script")) == 3
    assert not any(name.startswith("on") for _, attributes in page.tags for name in attributes)
    assert ATTACK in " ".join(page.words)
    figures = json.loads(page.scripts[0])
    names = [trace["name"] for trace in figures["pareto-0"]["data"]]
    assert all("<" not in name for name in names)
    assert "alert(1)" in names[1]


def test_a_page_without_numbers_has_no_script(lab: Any) -> None:
    wid = lab.save()
    text = render(compare(lab.load(wid)), {})
    assert "<script" not in text
    assert "nothing to compare" in text
    assert "script-src 'none'" in policy(text)


def test_a_workflow_without_models_has_no_report(lab: Any) -> None:
    wid = lab.save()
    with Store.open(f"sqlite:///{lab.home / 'kvlab.db'}", read_only=True) as store:
        assert report_of(store, wid) is None


def test_the_state_may_be_the_one_about_to_be_stored(lab: Any) -> None:
    lab.evaluate(lab.train("base", 0), 3.5)
    wid = lab.save()
    with Store.open(f"sqlite:///{lab.home / 'kvlab.db'}", read_only=True) as store:
        text = report_of(store, wid, WorkflowState.FAILED)
    assert text is not None
    assert "workflow 1 · failed" in text


def test_curves_are_means_over_the_steps_all_seeds_reached(lab: Any) -> None:
    for seed in (0, 1):
        base = lab.train("base", seed)
        lab.evaluate(base, 3.5)
        lab.points[base] = [
            ("loss", step, float(step + seed), step) for step in range(2000 + 100 * seed)
        ]
    wid = lab.save()
    with Store.open(f"sqlite:///{lab.home / 'kvlab.db'}", read_only=True) as store:
        curves = read_curves(store, compare(store.load(wid)))
    curve = curves["base"]
    assert len(curve.steps) <= MOST + 1
    assert (curve.steps[0], curve.steps[-1]) == (0, 1999)
    assert (curve.mean[-1], curve.low[-1], curve.high[-1]) == (1999.5, 1999.0, 2000.0)


def test_folding_shows_a_period_and_leaves_out_the_rest() -> None:
    text = [3.0 + math.sin(t * t) for t in range(256)]
    curve = [None] * 4 + [text[t] + 0.1 * math.cos(math.pi * t / 2) for t in range(4, 256)]
    folded = fold(curve, text)
    assert folded is not None
    assert len(folded) == FOLD
    assert folded[0] == pytest.approx(0.1)
    assert folded[2] == pytest.approx(-0.1)
    assert fold([1.0] * 70, [1.0] * 70) is None
