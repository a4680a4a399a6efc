"""Arms whose measurements do not belong together."""

from __future__ import annotations

import json
from typing import Any

import pytest

from kvlab.db.rows import JobRow
from kvlab.platform.compare.arms import gather


@pytest.mark.parametrize(
    ("scored", "reason"),
    [
        (["float32"], "it was timed in bfloat16 but scored in float32"),
        (["bfloat16"], None),
        (["float32", "bfloat16"], None),
        ([None], None),
    ],
)
def test_speed_in_a_dtype_that_was_not_scored_is_void(
    lab: Any, scored: list[str | None], reason: str | None
) -> None:
    base = lab.train("base", 0)
    for index, dtype in enumerate(scored):
        name = lab.evaluate(base, 3.5, job=f"quality{index}")
        lab.outcomes[name]["environment"] = {"dtype": dtype}
    lab.benchmark(base, 100, environment={"device": "cuda:0", "dtype": "bfloat16"})
    (draft,) = gather(rows(lab))
    found = {key.metric: samples["0"].void for key, samples in draft.samples.items()}
    assert found["perplexity"] is None
    assert found["tokens_per_second"] == found["kv_bytes_per_token"] == reason
    assert found["train_flops"] is None
    assert json.dumps(found)


def rows(lab: Any) -> tuple[JobRow, ...]:
    return tuple(lab.load(lab.save()).jobs)
