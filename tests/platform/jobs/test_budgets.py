"""Budgets that a calibrate job fixed, in the jobs that take them: whole workflows, without Ray."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from kvlab import KvlabError
from kvlab.methods.registry import from_dict, resolve
from kvlab.methods.store import load
from kvlab.platform.graph import Cell
from kvlab.platform.jobs import KINDS
from kvlab.platform.jobs.calibrate import fixed
from kvlab.platform.jobs.calibrate.fixed import calibrated
from kvlab.platform.jobs.kind import Parent
from kvlab.platform.jobs.local import run_cell
from kvlab.platform.planning.plan import Known, make
from kvlab.platform.planning.render import as_json
from kvlab.platform.spec.problems import WorkflowError
from kvlab.platform.spec.read import load_graph

WORKFLOW = """
version: 1
name: whole
seeds: [0]
model: {width: 32, layers: 6, heads: 2, kv_heads: 1, tie_embeddings: true}
data: {source: {folder: text, pattern: "*.txt"}, tokenizer: {bytes: true}, sequence_length: 32}
jobs:
  base: {train: {method: full_attention, tokens: 1k, batch_size: 4}}
  shared:
    uptrain: {from: base, method: {cross_layer: {layers: 0_1_2_2_4_4}}, tokens: 512}
  block:
    uptrain:
      from: base
      method: {block_transformer: {block_length: 2, block_layers: 4}}
      tokens: 512
  groups:
    calibrate: {of: [base, shared], samples: 6, p: 0.3}
  of_blocks:
    calibrate: {of: block, samples: 6, sequence_length: 16}
  scored:
    evaluate: {of: [base, shared], apply: {h2o: {}, uniform: {share: 0.3}}, budgets: groups}
  blocks:
    evaluate: {of: block, apply: {h2o: {}, uniform: {tokens: 5}}, budgets: of_blocks}
  timed:
    benchmark:
      of: [base, shared]
      apply: {streaming_llm: {sinks: 1}, uniform: {share: 0.4}}
      budgets: groups
      prompt: 20
      generate: 6
      batch: [2]
      repeats: 1
"""


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("budgets")
    (folder / "text").mkdir()
    for i in range(60):
        (folder / "text" / f"{i:02}.txt").write_text(f"Document {i} says {i * i}.\n" * 9)
    return folder


@pytest.fixture(scope="module")
def ran(text: Path) -> dict[str, tuple[Path, dict[str, Any], Cell]]:
    """Every cell's folder, result and cell."""
    path = text / "workflow.yaml"
    path.write_text(WORKFLOW)
    results: dict[str, tuple[Path, dict[str, Any], Cell]] = {}
    for number, cell in enumerate(load_graph(path).cells):
        inputs = {role: results[parent][0] for role, parent in cell.parents.items()}
        folder = text / f"{number}"
        results[cell.name] = folder, run_cell(cell.kind, cell.spec, inputs, folder), cell
        assert json.dumps(results[cell.name][1], allow_nan=False)
    return results


def of(ran: dict[str, Any], job: str) -> list[Any]:
    return [found for found in ran.values() if found[2].job == job]


def test_calibrations_join_with_what_takes_them(ran: dict[str, Any]) -> None:
    for job, source in (("scored", "groups"), ("timed", "groups"), ("blocks", "of_blocks")):
        assert len(of(ran, job)) == (1 if job == "blocks" else 2)
        for _, _, cell in of(ran, job):
            calibration = ran[cell.parents["budgets"]][2]
            assert calibration.job == source
            assert calibration.parents["of"] == cell.parents["of"]
            assert cell.spec["budgets"] is True


def test_scores_are_those_of_the_budgets_written_by_hand(ran: dict[str, Any]) -> None:
    for job in ("scored", "blocks"):
        for folder, result, cell in of(ran, job):
            inputs = {role: ran[parent][0] for role, parent in cell.parents.items()}
            shares = ran[cell.parents["budgets"]][1]["budgets"]["shares"]
            # 0.3 of a window of 32 rows; 5 of 16 blocks.
            each = 9 if job == "scored" else 5
            divided = list(rows(from_dict(cell.spec["apply"]), inputs, 32))
            assert sum(divided) == each * len(shares)
            assert divided == pytest.approx([each * share for share in shares], abs=2)
            written = resolve({"h2o": {}, "per_layer": {"tokens": divided}}).to_dict()
            spec = {**cell.spec, "apply": written}
            del spec["budgets"], inputs["budgets"]
            by_hand = run_cell("evaluate", spec, inputs, folder)
            assert by_hand["loss"] == pytest.approx(result["loss"], abs=1e-9)
            uniform = run_cell("evaluate", {**spec, "apply": cell.spec["apply"]}, inputs, folder)
            assert uniform["targets"] == result["targets"]
            assert uniform["loss"] != result["loss"]


def rows(method: Any, inputs: dict[str, Path], prompt: int) -> tuple[int, ...]:
    return tuple(calibrated(method, inputs["budgets"], prompt)["budget"].params.tokens)


def test_a_divergence_keeps_as_many_rows_as_the_uniform_budget(
    ran: dict[str, Any], tmp_path: Path
) -> None:
    """Also where the share of a layer that is cut is less than its eviction needs."""
    _, _, cell = of(ran, "scored")[0]
    inputs = {role: ran[parent][0] for role, parent in cell.parents.items()}
    apply = resolve({"streaming_llm": {"sinks": 3}, "uniform": {"share": 0.3}}).to_dict()
    asked = {"prompt": 20, "generate": 2}
    spec = {**cell.spec, "metrics": ["divergence"], "divergence": asked, "apply": apply}
    found = run_cell("evaluate", spec, inputs, tmp_path)["divergence"]
    divided = list(rows(from_dict(apply), inputs, 20))
    assert sum(divided) == 6 * len(divided)
    assert min(divided) == 4
    written = resolve({"streaming_llm": {"sinks": 3}, "per_layer": {"tokens": divided}}).to_dict()
    del inputs["budgets"]
    plain = {**{k: v for k, v in spec.items() if k != "budgets"}, "apply": written}
    assert run_cell("evaluate", plain, inputs, tmp_path)["divergence"] == found


def test_questions_keep_as_many_rows_as_the_uniform_budget(
    ran: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Those asked in the prompt are part of it, those asked after the cut are not."""
    divided: dict[int, tuple[int, ...]] = {}

    def seen(apply: Any, folder: Path, prompt: int) -> Any:
        method = calibrated(apply, folder, prompt)
        divided[prompt] = method["budget"].params.tokens
        return method

    monkeypatch.setattr(fixed, "calibrated", seen)
    _, _, cell = of(ran, "scored")[0]
    inputs = {role: ran[parent][0] for role, parent in cell.parents.items()}
    recall = {"tasks": ["passkey"], "lengths": [130, 201], "depths": [0.5], "pairs": 2,
              "answer": 2, "samples": 1, "seed": 0}  # fmt: skip
    for metric in ("recall", "multi_turn"):
        spec = {**cell.spec, "metrics": [metric], "recall": recall}
        run_cell("evaluate", spec, inputs, tmp_path / metric)
    assert len(divided) == 4
    assert {130, 201} < set(divided)
    for prompt, tokens in divided.items():
        assert sum(tokens) == 6 * int(0.3 * prompt)


def test_a_benchmark_holds_as_many_bytes_as_the_uniform_budget(ran: dict[str, Any]) -> None:
    for folder, result, cell in of(ran, "timed"):
        inputs = {role: ran[parent][0] for role, parent in cell.parents.items()}
        plain = {key: value for key, value in cell.spec.items() if key != "budgets"}
        uniform = run_cell("benchmark", plain, {"of": inputs["of"]}, folder)
        model = load(inputs["of"])
        kv_layers = len(model.acting.kv_layers)
        tokens = calibrated(from_dict(cell.spec["apply"]), inputs["budgets"], 20)
        each = tokens["budget"].params.tokens
        assert sum(each) == 8 * kv_layers
        assert len(set(each)) > 1
        row, other = result["rows"][0], uniform["rows"][0]
        assert row["kv_bytes"] == pytest.approx(other["kv_bytes"], rel=0.05)
        predicted = row["kv_bytes_per_token_predicted"]
        assert predicted == pytest.approx(other["kv_bytes_per_token_predicted"], rel=1e-3)
        assert result["gates"]["tokens_as_asked"]


def test_costs_are_predicted_as_uniform(ran: dict[str, Any]) -> None:
    for job in ("scored", "timed", "groups", "of_blocks"):
        for _, _, cell in of(ran, job):
            parents = {role: parent_of(ran, name) for role, name in cell.parents.items()}
            predicted = KINDS[cell.kind].predict(cell.spec, parents)
            assert predicted.flops is not None
            assert predicted.flops > 0
            plain = {key: value for key, value in cell.spec.items() if key != "budgets"}
            assert KINDS[cell.kind].predict(plain, parents) == predicted


def parent_of(ran: dict[str, Any], name: str) -> Parent:
    cell = ran[name][2]
    above = {role: parent_of(ran, parent) for role, parent in cell.parents.items()}
    return Parent(cell.name, cell.kind, cell.spec, above)


def test_flops_grow_with_samples_and_see_every_layer(text: Path) -> None:
    def flops(**changes: Any) -> float:
        spec = {"samples": 6, "sequence_length": 32, **changes}
        config = {"vocab_size": 257, "width": 32, "layers": 6, "heads": 2, "kv_heads": 1,
                  "head_dim": 16, "ffn_width": 64}  # fmt: skip
        model = Parent("m", "train", {"model": {"config": config}, "method": {}}, {})
        found = KINDS["calibrate"].predict(spec, {"of": model}).flops
        assert found is not None
        return found

    assert flops(samples=12) == 2 * flops()
    # 2 FLOPs for each weight of the layers and row: attention and the head's one row come on top.
    weights = 6 * (32 * (2 * 32 + 3 * 64) + 2 * 32 * 16)
    assert 2 * weights * 32 * 6 < flops() < 2.5 * weights * 32 * 6


def test_plan_says_what_calibrations_cost(text: Path) -> None:
    path = text / "planned.yaml"
    path.write_text(WORKFLOW)
    planned = make(load_graph(path), Known()).cells
    cells = {cell["name"]: cell for cell in as_json(make(load_graph(path), Known()))["jobs"]}
    of = [each for each in planned if each.cell.kind == "calibrate"]
    assert len(of) == 3
    for each in of:
        assert cells[each.cell.name]["flops"] == each.prediction.flops
        assert each.duration is not None


@pytest.fixture
def found(tmp_path: Path) -> Callable[[list[float]], Path]:
    """Return a folder as a calibrate job publishes it."""

    def write(shares: list[float]) -> Path:
        raw = {"budgets": {"shares": shares}}
        (tmp_path / "calibration.json").write_text(json.dumps(raw))
        return tmp_path

    return write


SHARES = [1.65, 1.65, 0.35, 0.35]


def test_tokens_and_known_prompts_conserve_the_total_exactly(found: Any) -> None:
    folder = found(SHARES)
    for tokens in (4, 7, 64, 1001):
        apply = resolve({"h2o": {}, "uniform": {"tokens": tokens}})
        params = calibrated(apply, folder, 101)["budget"].params
        assert sum(params.tokens) == 4 * tokens
        assert not params.shares
        assert min(params.tokens) >= 2
    apply = resolve({"h2o": {}, "uniform": {"share": 0.25}})
    known = calibrated(apply, folder, 101)["budget"].params
    assert sum(known.tokens) == 4 * 25
    assert known.tokens == pytest.approx([25 * share for share in SHARES], abs=1)


def test_what_one_layer_cannot_hold_the_others_get(found: Any) -> None:
    folder = found(SHARES)
    apply = resolve({"h2o": {}, "uniform": {"share": 0.8}})
    assert calibrated(apply, folder, 100)["budget"].params.tokens == (100, 100, 60, 60)
    whole = resolve({"h2o": {}, "uniform": {"share": 1.0}})
    assert calibrated(whole, folder, 100)["budget"].params.tokens == (100,) * 4


def test_no_layer_falls_below_what_its_eviction_needs(found: Any) -> None:
    apply = resolve({"streaming_llm": {"sinks": 4}, "uniform": {"tokens": 6}})
    params = calibrated(apply, found(SHARES), 100)["budget"].params
    assert params.tokens == (7, 7, 5, 5)
    torch.testing.assert_close(sum(params.tokens), 24)


def test_another_folder_is_one_line(tmp_path: Path) -> None:
    with pytest.raises(KvlabError, match=r"calibration\.json: holds no budgets"):
        calibrated(resolve({"h2o": {}}), tmp_path, 100)


SAYS = {
    "metrics: [divergence], apply: {h2o: {}, squeeze_attention: {}}, budgets: groups": (
        "jobs.x.evaluate.budgets: apply chooses the budget 'squeeze_attention' already"
    ),
    "budgets: groups": "'full_attention' as applied reads no budget",
    "apply: {sliding_window: {window: 8}}, budgets: groups": (
        "'sliding_window' as applied reads no budget"
    ),
    "apply: {h2o: {}}, budgets: base": (
        "jobs.x.evaluate.budgets: 'base' is of kind train and has no budgets; jobs of kind "
        "calibrate, which do: groups"
    ),
    "apply: {h2o: {}}, budgets: nothing": "unknown job 'nothing'",
}


@pytest.mark.parametrize("written", SAYS)
def test_budgets_that_cannot_be_taken_are_one_line(jobs: Any, written: str) -> None:
    text = jobs(
        "  base: {train: {method: full_attention, tokens: 1k}}\n"
        "  groups: {calibrate: {of: base}}\n"
        f"  x: {{evaluate: {{of: base, {written}}}}}\n"
    )
    with pytest.raises(WorkflowError) as error:
        load_graph(text)
    [problem] = error.value.problems
    assert SAYS[written] in str(problem)


@pytest.fixture
def jobs() -> Callable[[str], str]:
    head = (
        "version: 1\nname: small\nmodel: {preset: nano}\n"
        "data: {source: python, tokenizer: {bpe: 512}, sequence_length: 64}\njobs:\n"
    )
    return lambda text: head + text


SETTINGS = {
    "{of: two}": "'two[seed=0]' has 2 layers with keys and values of their own: three groups",
    "{of: base, sequence_length: 65536}": "must be at most the model's max_positions (2048)",
    "{of: block, sequence_length: 62}": "must be whole blocks of 'block[seed=0]'",
    "{of: base, samples: 1}": "samples: must be",
    "{of: base, samples: 8, sections: 5}": "must be at most half of samples (8), found 5",
    "{of: base, importance: [cosine, cosine]}": "must not name an importance twice",
    "{of: base, importance: [size]}": "importance",
    "{of: base, p: 0}": "p: must be",
    "{of: base, p: 1.5}": "p: must be",
    "{of: base, part: test}": "part",
    "{of: groups}": "publishes no model",
}


@pytest.mark.parametrize("written", SETTINGS)
def test_settings_that_cannot_be_are_one_line(jobs: Any, written: str) -> None:
    text = jobs(
        "  base: {train: {method: full_attention, tokens: 1k}}\n"
        "  two: {uptrain: {from: base, method: {cla: {}}, tokens: 1k}}\n"
        "  block: {uptrain: {from: base, tokens: 1k, method: "
        "{block_transformer: {block_length: 4, block_layers: 3}}}}\n"
        "  groups: {calibrate: {of: base}}\n"
        f"  x: {{calibrate: {written}}}\n"
    )
    with pytest.raises(WorkflowError) as error:
        load_graph(text)
    [problem] = error.value.problems
    assert SETTINGS[written] in str(problem)


def test_without_data_it_says_so() -> None:
    text = "version: 1\nname: small\nmodel: {preset: nano}\njobs:\n  x: {calibrate: {of: y}}\n"
    with pytest.raises(WorkflowError, match=r"calibrate needs text: write `data:`"):
        load_graph(text)


def test_budgets_of_a_model_of_other_layers_are_refused(jobs: Any) -> None:
    text = jobs(
        "  base: {train: {method: full_attention, tokens: 1k}}\n"
        "  two: {uptrain: {from: base, method: {cla: {}}, tokens: 1k}}\n"
        "  groups: {calibrate: {of: base}}\n"
        "  x: {benchmark: {of: two, apply: h2o, budgets: groups}}\n"
    )
    with pytest.raises(WorkflowError, match=r"has budgets for 4 layers .* has 2"):
        load_graph(text)


@pytest.mark.parametrize("metric", ["recall", "multi_turn", "divergence", "perplexity"])
def test_a_share_is_of_the_texts_that_are_read(jobs: Any, metric: str) -> None:
    """4 rows of a window are too few for the sinks, 32 of a question's context are not."""
    asks = metric in ("recall", "multi_turn")
    text = jobs(
        "  base: {train: {method: full_attention, tokens: 1k}}\n"
        f"  x: {{evaluate: {{of: base, metrics: [{metric}], "
        f"{'recall: {lengths: [512]}, ' if asks else ''}"
        "apply: {streaming_llm: {}, uniform: {share: 0.0625}}}}\n"
    )
    if asks:
        assert len(load_graph(text).cells) == 3
    else:
        with pytest.raises(WorkflowError, match="streaming_llm keeps at least 5"):
            load_graph(text)
