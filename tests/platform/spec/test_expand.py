"""Matrix, seeds and references become the cells that a reader of the YAML expects."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from kvlab.db.states import Cause
from kvlab.platform.graph import Cell, Resources
from kvlab.platform.spec.problems import WorkflowError
from kvlab.platform.spec.read import check

Jobs = Callable[[str], str]
BASE = "  base: {train: {method: full_attention, tokens: 1k}}\n"


def cells(text: str) -> dict[str, Cell]:
    return {cell.name: cell for cell in check(text).cells}


def test_quickstart_pairs_seeds_and_inherits_axes(good: str) -> None:
    found = cells(good)
    assert len(found) == 28
    quality = found["quality[block_length=4,of=block,seed=1]"]
    assert quality.parents == {"of": "block[block_length=4,seed=1]", "data": "data"}
    assert quality.axes == {"block_length": 4, "seed": 1}
    block = found["block[block_length=4,seed=1]"]
    assert block.parents == {"from": "base[seed=1]", "data": "data"}
    assert block.spec["method"]["granularity"]["block_transformer"]["block_length"] == 4
    assert block.spec["seed"] == 1
    speed = found["speed[of=base,seed=2]"]
    assert speed.parents == {"of": "base[seed=2]"}
    assert speed.resources == Resources(exclusive=True)


def test_every_arm_of_an_evaluation_is_scored_from_the_same_target_on(good: str) -> None:
    found = cells(good)
    quality = [cell for cell in found.values() if cell.job == "quality"]
    assert {cell.spec["first_target"] for cell in quality} == {4}


def test_quantities_and_defaults_are_resolved(good: str) -> None:
    base = cells(good)["base[seed=0]"]
    assert base.spec["tokens"] == 400_000
    assert base.spec["sequence_length"] == 256
    assert base.spec["precision"] == "float32"
    assert base.spec["model"]["config"]["vocab_size"] == 2048
    assert base.spec["method"] == {}


def test_matrix_puts_values_anywhere_below_the_job(jobs: Jobs) -> None:
    found = cells(
        jobs(
            BASE + "  q:\n"
            "    matrix:\n"
            "      evaluate.apply: [full_attention, {sliding_window: {window: 16}}]\n"
            "      evaluate.batch_size: [1, 2]\n"
            "      resources.cpus: [3]\n"
            "    evaluate: {of: base}\n"
        )
    )
    cell = found["q[apply=sliding_window:window:16,batch_size=2,cpus=3,seed=0]"]
    assert cell.spec["apply"] == {"eviction": {"sliding_window": {"window": 16}}}
    assert cell.spec["batch_size"] == 2
    assert cell.resources.cpus == 3
    assert sum(cell.job == "q" for cell in found.values()) == 4


def test_a_matrix_may_supply_what_is_required_and_name_parents(jobs: Jobs) -> None:
    found = cells(
        jobs(
            BASE + "  other: {train: {method: full_attention, tokens: 2k}}\n"
            "  up:\n"
            "    matrix: {uptrain.from: [base, other], uptrain.tokens: [1k]}\n"
            "    uptrain: {method: full_attention}\n"
        )
    )
    assert found["up[from=other,tokens=1k,seed=0]"].parents["from"] == "other[seed=0]"


def test_short_names_grow_where_they_would_clash(jobs: Jobs) -> None:
    found = cells(
        jobs(
            "  base:\n    matrix: {train.tokens: [1k, 2k]}\n    train: {method: full_attention}\n"
            "  up:\n    matrix: {uptrain.tokens: [1k]}\n"
            "    uptrain: {from: base, method: full_attention}\n"
        )
    )
    assert "up[train.tokens=2k,uptrain.tokens=1k,seed=0]" in found


def test_names_that_never_meet_in_a_cell_stay_short(jobs: Jobs) -> None:
    found = cells(
        jobs(
            BASE + "  one:\n    matrix: {train.tokens: [1k]}\n    train: {method: full_attention}\n"
            "  up:\n    matrix: {uptrain.tokens: [2k]}\n"
            "    uptrain: {from: base, method: full_attention}\n"
            "  score: {evaluate: {of: [one, up]}}\n"
        )
    )
    assert "up[tokens=2k,seed=0]" in found
    assert {"score[tokens=1k,of=one,seed=0]", "score[tokens=2k,of=up,seed=0]"} <= set(found)


def test_equal_axes_pair_and_others_cross(jobs: Jobs) -> None:
    """Teacher and parent share the axis they inherit; the child's own axis crosses."""
    found = cells(
        jobs(
            "  base:\n    matrix: {train.tokens: [1k, 2k]}\n    train: {method: full_attention}\n"
            "  up:\n    matrix: {uptrain.batch_size: [1, 2, 3]}\n"
            "    uptrain: {from: base, method: full_attention, tokens: 1k, distill: {from: base}}\n"
        )
    )
    ups = [cell for cell in found.values() if cell.job == "up"]
    assert len(ups) == 6
    assert all(cell.parents["from"] == cell.parents["teacher"] for cell in ups)


def test_a_pinned_axis_no_longer_joins(jobs: Jobs) -> None:
    found = cells(
        "seeds: [0, 1, 2]\n"
        + jobs(
            BASE + "  up: {uptrain: {from: {job: base, where: {seed: 1}}, "
            "method: full_attention, tokens: 1k}}\n"
        )
    )
    ups = [cell for cell in found.values() if cell.job == "up"]
    assert [cell.axes["seed"] for cell in ups] == [0, 1, 2]
    assert {cell.parents["from"] for cell in ups} == {"base[seed=1]"}


def test_seeds_are_inherited_unless_a_job_says_its_own(jobs: Jobs) -> None:
    text = (
        "seeds: [0, 1, 2]\n"
        + jobs("")
        + "  base: {seeds: [0, 1], train: {method: full_attention, tokens: 1k}}\n"
        + "  all: {evaluate: {of: base}}\n"
        + "  one: {seeds: [1], evaluate: {of: base}}\n"
    )
    seeds: dict[str, list[int]] = {}
    for cell in check(text).cells[1:]:
        seeds.setdefault(cell.job, []).append(cell.axes["seed"])
    assert seeds == {"base": [0, 1], "all": [0, 1], "one": [1]}


def test_needs_join_on_shared_axes(jobs: Jobs) -> None:
    found = cells(
        "seeds: [0, 1]\n"
        + jobs("  a: {noop: {}}\n  b: {needs: [a], noop: {}}\n  c: {seeds: [7], noop: {}}\n")
        + "  d: {needs: [c], seeds: [7], noop: {}}\n"
    )
    assert found["b[seed=1]"].needs == ("a[seed=1]",)
    assert found["d[seed=7]"].needs == ("c[seed=7]",)


def test_what_needs_no_text_needs_no_data() -> None:
    found = cells("version: 1\nname: n\njobs:\n  a: {noop: {}}\n")
    assert list(found) == ["a[seed=0]"]


def test_job_options_reach_the_cell() -> None:
    (cell,) = cells(
        "version: 1\nname: n\njobs:\n  a:\n    retries: {node_lost: 7}\n    timeout: 1h30m\n"
        "    resources: {cpus: 2, memory: 512MiB, gpus: 1}\n    noop: {}\n"
    ).values()
    assert cell.retries[Cause.NODE_LOST] == 7
    assert cell.retries[Cause.INFRASTRUCTURE] == 2
    assert cell.timeout == 5400
    assert cell.resources == Resources(cpus=2, gpus=1, memory=512 * 2**20)


def test_arms_of_a_benchmark_alternate_within_a_seed(jobs: Jobs) -> None:
    text = jobs(
        "  base: {train: {method: full_attention, tokens: 1k}}\n"
        "  other: {train: {method: full_attention, tokens: 2k}}\n"
        "  quality: {evaluate: {of: [base, other]}}\n"
        "  speed: {benchmark: {of: [base, other], prompt: 8, generate: 8}}\n"
    ).replace("jobs:\n", "seeds: [1, 0]\njobs:\n", 1)
    found = [cell for cell in cells(text).values() if cell.job == "speed"]
    said = [(cell.axes["seed"], cell.parents["of"].split("[")[0]) for cell in found]
    assert said == [(1, "base"), (1, "other"), (0, "base"), (0, "other")]
    scored = [cell.axes["seed"] for cell in cells(text).values() if cell.job == "quality"]
    assert scored == [1, 0, 1, 0]


def test_a_mistake_in_one_job_does_not_hide_one_in_another(jobs: Jobs) -> None:
    with pytest.raises(WorkflowError) as error:
        check(
            jobs(
                "  typo: {train: {method: full_attention, token: 1k}}\n"
                "  odd: {train: {method: {block_transformer: {block_length: 3}}, tokens: 1k}}\n"
                "  lost: {evaluate: {of: oddd}}\n"
                "  child: {evaluate: {of: typo}}\n"
            )
        )
    assert [problem.line for problem in error.value.problems] == [6, 7, 8]


def test_values_that_look_alike_in_a_name_stay_apart() -> None:
    found = cells(
        "version: 1\nname: n\ndata: {source: python, tokenizer: {bpe: 512}, sequence_length: 64}\n"
        "model: {preset: nano}\njobs:\n  base:\n    matrix:\n"
        "      train.method: [full_attention, {full_attention: {}}]\n"
        "    train: {tokens: 1k}\n"
    )
    assert list(found) == ["data", "base[method=full_attention,seed=0]",
                           "base[method=full_attention,seed=0,again=2]"]  # fmt: skip


def test_too_many_cells_are_refused_before_they_are_made() -> None:
    ranges = ", ".join(f"noop.k{n}: [{', '.join(map(str, range(100)))}]" for n in range(8))
    with pytest.raises(WorkflowError, match="would have 10000000000000000 cells"):
        check(f"version: 1\nname: n\njobs:\n  a:\n    matrix: {{{ranges}}}\n    noop: {{}}\n")


def test_thousands_of_mistakes_end_early() -> None:
    lines = "".join(f"  a{n}: {{noop: {{slep: 1}}, needs: [b{n}]}}\n" for n in range(5_000))
    with pytest.raises(WorkflowError, match="has more than 1000 mistakes") as error:
        check("version: 1\nname: n\njobs:\n" + lines)
    assert len(error.value.problems) == 1001


def test_crossing_is_bounded_before_it_is_done(jobs: Jobs) -> None:
    many = ", ".join(map(str, range(1, 1001)))
    text = jobs(
        f"  a:\n    matrix: {{train.batch_size: [{many}]}}\n"
        "    train: {method: full_attention, tokens: 1}\n"
        f"  b:\n    matrix: {{uptrain.batch_size: [{many}]}}\n"
        "    uptrain: {from: a, method: full_attention, tokens: 1}\n"
    )
    with pytest.raises(
        WorkflowError, match=r"jobs\.b: brings the workflow to more than 100000 cells"
    ):
        check(text)


def test_a_path_without_end_is_refused(jobs: Jobs) -> None:
    deep = "train" + ".a" * 5_000
    with pytest.raises(WorkflowError, match="must be a dotted path that starts with train"):
        check(jobs(f"  a: {{matrix: {{? {deep} : [1]}}, train: {{}}}}\n"))
