"""What may be said of two arms, for each way of measuring."""

from __future__ import annotations

import math

import pytest

from kvlab.platform.compare.differences import change, contrast
from kvlab.platform.compare.metrics import METRICS
from kvlab.platform.compare.samples import Sample

PERPLEXITY, SPEED, KV = (
    METRICS["perplexity"],
    METRICS["tokens_per_second"],
    METRICS["kv_bytes_per_token"],
)


def scored(loss: float, windows: list[float]) -> Sample:
    values = tuple(loss + w for w in windows)
    return Sample(
        math.exp(sum(values) / len(values)), windows=values, weights=(9.0,) * len(windows)
    )


def test_counted_bytes_need_no_interval() -> None:
    found = change(KV, {"0": Sample(1024.0)}, {"0": Sample(4096.0)})
    assert found is not None
    assert (found.ratio, found.low, found.high, found.verdict) == (0.25, 0.25, 0.25, "better")
    same = change(KV, {"0": Sample(64.0)}, {"0": Sample(64.0)})
    assert same is not None
    assert same.verdict == "equal"


def test_losses_pair_over_windows_that_move_together() -> None:
    windows = [0.5, -0.5, 1.0, -1.0, 0.3, -0.3]
    found = change(PERPLEXITY, {"0": scored(3.02, windows)}, {"0": scored(3.0, windows)})
    assert found is not None
    assert found.ratio == pytest.approx(math.exp(0.02))
    assert found.verdict == "worse"
    assert found.basis == "one seed, paired bootstrap over 6 windows"


def test_losses_over_seeds_and_windows() -> None:
    windows = [0.5, -0.5, 1.0, -1.0]
    arm = {str(s): scored(3.5 + 0.01 * s, windows) for s in range(3)}
    base = {str(s): scored(3.0 + 0.02 * s, windows) for s in range(3)}
    found = change(PERPLEXITY, arm, base)
    assert found is not None
    assert found.ratio == pytest.approx(math.exp(0.49))
    assert found.basis == "paired over 3 seeds and 4 windows"


def test_a_seed_that_one_arm_lacks_takes_no_part() -> None:
    arm = {"0": Sample(110.0), "1": Sample(112.0), "2": Sample(1.0)}
    found = contrast(SPEED, arm, {"0": Sample(100.0), "1": Sample(100.0)})
    assert found is not None
    assert found.estimate == pytest.approx(math.log(1.1 * 1.12) / 2)
    assert contrast(SPEED, {"5": Sample(1.0)}, {"0": Sample(1.0)}) is None


def test_one_seed_of_a_timed_number_uses_its_repeats() -> None:
    close = change(SPEED, {"0": Sample(103, 95, 110)}, {"0": Sample(100, 95, 106)})
    apart = change(SPEED, {"0": Sample(150, 145, 155)}, {"0": Sample(100, 95, 106)})
    assert close is not None
    assert apart is not None
    assert close.verdict == "not distinguished"
    assert apart.verdict == "better"
    assert apart.basis == "intervals of the repeats"


def test_one_seed_without_repeats_says_nothing() -> None:
    found = change(METRICS["peak_memory_bytes"], {"0": Sample(5.0)}, {"0": Sample(9.0)})
    assert found is not None
    assert (found.verdict, found.low) == ("no interval", None)


def test_void_samples_take_no_part() -> None:
    arm = {"0": Sample(110.0, void="shared"), "1": Sample(112.0)}
    found = contrast(SPEED, arm, {"0": Sample(100.0), "1": Sample(100.0)})
    assert found is not None
    assert found.estimate == pytest.approx(math.log(1.12))
    assert contrast(SPEED, {"0": arm["0"]}, {"0": Sample(100.0)}) is None


def test_the_other_qualities_move_with_the_loss() -> None:
    windows = [0.5, -0.5, 0.2, -0.2]

    def sample(loss: float) -> Sample:
        values = tuple(loss + w for w in windows)
        return Sample(loss, windows=values, weights=(1.0,) * 4, slope=1 / loss)

    found = change(METRICS["loss"], {"0": sample(3.3)}, {"0": sample(3.0)})
    assert found is not None
    assert found.ratio == pytest.approx(1.1, rel=2e-3)
    assert found.verdict == "worse"
