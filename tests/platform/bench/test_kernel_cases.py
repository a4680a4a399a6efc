"""Cases of the kernels' bench: what they count as moved, and gates that see wrong answers."""

from __future__ import annotations

import re
from typing import Any

import pytest
import torch
from torch import Tensor

from kvlab.kernels import choice
from kvlab.kernels.attention import attend
from kvlab.platform.bench.kernels import (
    controller,
    decode,
    eviction,
    prefill,
    query,
    select,
    stored,
)
from kvlab.platform.bench.kernels.case import Bench, Case, apart, poisoned


def test_bytes_count_every_number_that_is_read_or_written() -> None:
    bench, heads = Bench("cpu"), decode.Heads(4, 2, 16)
    plain = decode.dense(bench, heads, 3, 10, torch.bfloat16)
    assert plain.bytes == 2 * (2 * 3 * 4 * 16 + 2 * 3 * 2 * 10 * 16)
    weighed = decode.weighed(bench, heads, 3, 10, torch.bfloat16)
    assert weighed.bytes == plain.bytes + 2 * 3 * 2 * 10 * 16 + 4 * 3 * 4 * 10
    coded = stored.coded(bench, heads, 3, 10, torch.bfloat16, code=torch.int8)
    assert coded.bytes == 2 * 2 * 3 * 4 * 16 + 2 * 3 * 2 * 10 * (16 + 2)
    few = stored.grouped(bench, heads, 3, 10, torch.bfloat16, bits=2)
    keys, values, recent = (32 // 4 + 4) * 16, 10 * (16 // 4 + 4), 2 * 5 * 2 * 16
    assert few.bytes == 2 * 2 * 3 * 4 * 16 + 3 * 2 * (keys + values + recent)
    paged = stored.paged(bench, heads, 3, 10, torch.bfloat16)
    assert paged.bytes == plain.bytes + 3 * 10 * 8
    queries = query.layer(bench, 3, 32, 4, 16, torch.bfloat16)
    assert queries.bytes == 2 * (3 * 32 + 64 * 32 + 2 * 3 * 16 + 3 * 64)
    assert select.choice(bench, 3, 50, 7).bytes == 4 * 3 * 50 + 8 * 3 * 7
    sizes = (bench, 3, 2, 50, torch.bfloat16)
    scored = controller.scoring(*sizes)
    assert scored.bytes == (
        4 * (2 * 64 + 2 + 64 * 64 + 3 * 2 * 32) + 8 * 63 + 2 * 3 * 50 * 96 + 4 * 2 * 3 * 50
    )
    maps = 3 * 64 + 64 + 32 + 2 * 32
    came_state_query = 3 * (3 * 64 + 2 * 64 + 2 * 32)
    assert controller.taking(*sizes).bytes == 4 * (maps * 65 + came_state_query) + 2 * 3 * 96


def test_flops_of_a_prompt_count_what_its_queries_may_read() -> None:
    case = prefill.prompt(Bench("cpu"), decode.Heads(4, 2, 16), 2, 24, 24, torch.float32)
    scores_and_values = 2 * (2 * 2 * 4 * 16 * 24 * 24 / 2)
    assert case.flops == scores_and_values + scores_and_values / 2


def broken(q: Tensor, k: Tensor, v: Tensor, *rest: Any, **more: Any) -> Any:
    """Attention that leaves out the last key."""
    return attend(q, k[:, :, :-1], v[:, :, :-1], *rest, **more)


def test_a_wrong_kernel_has_no_number(monkeypatch: pytest.MonkeyPatch) -> None:
    made = decode.partial

    def wrong(function: Any, *given: Any, **more: Any) -> Any:
        return made(broken if function is attend else function, *given, **more)

    monkeypatch.setattr(decode, "partial", wrong)
    case = decode.dense(Bench("cpu"), decode.Heads(4, 2, 16), 2, 24, torch.float32)
    (line,) = Bench("cpu").measure(case)
    assert re.match(r"output is 0\.\d+ of its norm from the twin's", line.void)
    assert line.ours == 0
    assert line.ratio is None
    assert line.met is False
    assert "microseconds" not in (line.detail or {})


def test_what_raises_has_no_number_and_ends_nothing() -> None:
    def fails() -> str:
        raise RuntimeError("CUDA error: misaligned address\nmore of it")

    bench = Bench("cpu")
    good = decode.dense(bench, decode.Heads(4, 2, 16), 2, 24, torch.float32)
    bad = Case("kernel", {"batch": 1}, lambda: None, 1, fails)
    void, *rest = bench.run(iter([(0, lambda: bad), (0, lambda: good)]))
    assert void.void == "raised RuntimeError: CUDA error: misaligned address"
    assert void.met is False
    assert [line.void for line in rest] == ["", ""]


def test_rivals_that_refuse_a_shape_are_left_out() -> None:
    def refuses() -> None:
        raise RuntimeError("No available kernel")

    bench = Bench("cpu")
    case = Case("kernel", {"batch": 1}, lambda: None, 1, lambda: "", rivals={"flash": refuses})
    (line,) = bench.measure(case)
    assert line.detail is not None
    assert set(line.detail["microseconds"]) == {"kvlab", "twin"}


def test_gates_see_nan_other_integers_and_unwritten_memory() -> None:
    x = torch.ones(2, 3)
    assert apart(x, x) == ""
    assert "norm from the twin's" in apart(x * float("nan"), x)
    assert "norm from the twin's" in apart(x * 1.02, x)
    assert apart(torch.tensor([1]), torch.tensor([2])) == "output differs from the twin's"
    assert "where the twin has" in apart(x, x[:1])
    with poisoned():
        assert bool(torch.empty(4).isnan().all())
    assert not torch.are_deterministic_algorithms_enabled()


def test_an_eviction_of_another_slot_is_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    state = eviction.State(Bench("cpu"), decode.Heads(4, 2, 16), 2, 24, torch.float32, True)
    assert eviction.correct(state) == ""
    right, calls = state.step, iter(range(9))
    monkeypatch.setattr(state, "step", lambda: right() + (next(calls) == 2))
    assert eviction.correct(state) == "slots differs from the twin's"  # in the second step


def forgetful(found: Tensor, *given: Any) -> Tensor:
    """Clear another token's memory."""
    given[3][:, 1] = 0
    return found


@pytest.mark.parametrize(
    ("bench", "name", "spoilt", "what"),
    [
        (query, "project", lambda found, *given: found.flip(-1), "queries is 1."),
        (select, "best", lambda found, *given: found + 1, "numbers differs"),
        (controller, "advance", lambda found, *given: found * 1.02, "queries is 0.02 "),
        (controller, "advance", forgetful, "memory of other tokens is "),
        (controller, "score", lambda found, *given: found * 1.02, "scores is 0.02 "),
    ],
)
def test_gates_hold_a_kernel_to_its_twin(
    monkeypatch: pytest.MonkeyPatch, bench: Any, name: str, spoilt: Any, what: str
) -> None:
    right = getattr(bench, name)

    def wrong(*given: Any, **more: Any) -> Any:
        found = right(*given, **more)
        return found if choice._twins_alone else spoilt(found, *given)

    monkeypatch.setattr(bench, name, wrong)
    assert any(line.void.startswith(what) for line in bench.run())
