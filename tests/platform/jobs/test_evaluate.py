"""Evaluation: the same targets for every arm, equal to a slow direct computation."""

import json
import math
from itertools import pairwise

import pytest
import torch

from kvlab.methods.build import build
from kvlab.methods.registry import from_dict
from kvlab.methods.store import load, save
from kvlab.platform.data import corpus
from kvlab.platform.data.corpus import Corpus
from kvlab.platform.jobs.context import JobError
from kvlab.platform.jobs.evaluate.scoring import first_predicted, parallel, stepwise
from kvlab.platform.jobs.evaluate.windows import cut
from kvlab.platform.jobs.local import run_cell

SPEC = {
    "metrics": ["perplexity", "loss_by_position"], "apply": {}, "sequence_length": 32,
    "tokens": 500, "batch_size": 4, "first_target": 4, "dtype": "auto", "seed": 0,
}  # fmt: skip


@pytest.fixture(scope="module")
def blocks(data, train_spec, base, block, tmp_path_factory):
    folder = tmp_path_factory.mktemp("blocks")
    spec = {**train_spec(method=block(4)), "lora": None, "distill": None}
    run_cell("uptrain", spec, {"data": data, "from": base}, folder)
    return folder


def evaluate(data, model, folder, **changes):
    return run_cell("evaluate", {**SPEC, **changes}, {"data": data, "of": model}, folder)


def stream(data):
    """The held-out text as one list of (id, bytes): documents, an end of text after each."""
    held = corpus.load(data, "heldout")
    found, start = [], 0
    for end in held.ends.tolist():
        tokens, widths = held.tokens[start:end].tolist(), held.widths[start:end].tolist()
        found += [*zip(tokens, widths, strict=True), (held.end_of_text, 0)]
        start = end
    return found


def directly(data, folder):
    """Position, loss and bytes of every target, one window and one target at a time."""
    model = load(folder)
    text = stream(data)
    # 500 tokens are 16 windows, the last of 20 tokens, as far apart as the text is long.
    apart = len(text) // 32 / 16
    assert apart > 1
    for number in range(16):
        begin = int(number * apart) * 32
        window = text[begin : begin + (32 if number < 15 else 20)]
        ids = torch.tensor([[token for token, _ in window]])
        with torch.no_grad():
            logits, scored = model.predictions(ids)
        for place in range(4, len(window)):
            assert scored[0, place]
            shares = logits[0, place].double().softmax(0)
            yield place, -math.log(shares[ids[0, place]]), window[place][1]


@pytest.mark.parametrize("arm", ["base", "blocks"])
def test_every_figure_equals_a_direct_computation(data, arm, tmp_path, request):
    folder = request.getfixturevalue(arm)
    result = evaluate(data, folder, tmp_path)
    found = list(directly(data, folder))
    nats, size = sum(loss for _, loss, _ in found), sum(width for _, _, width in found)
    assert result["targets"]["count"] == len(found) == 500 - 16 * 4
    assert result["targets"]["bytes"] == size
    assert result["loss"] == pytest.approx(nats / len(found), abs=1e-5)
    assert result["perplexity"] == pytest.approx(math.exp(nats / len(found)), rel=1e-5)
    assert result["bits_per_byte"] == pytest.approx(nats / math.log(2) / size, abs=1e-5)
    assert result["perplexity_per_byte"] == pytest.approx(math.exp(nats / size), rel=1e-5)
    positions = result["loss_by_position"]
    assert positions[:4] == [None] * 4
    for place in range(4, 32):
        own = [loss for at, loss, _ in found if at == place]
        assert positions[place] == pytest.approx(sum(own) / len(own), abs=1e-5)
    assert sum(result["window_targets"]) == len(found)
    means = zip(result["window_losses"], result["window_targets"], strict=True)
    assert sum(mean * n for mean, n in means) == pytest.approx(nats, rel=1e-6)
    assert json.dumps(result)


def test_arms_are_scored_on_the_same_targets(data, base, blocks, tmp_path):
    one = evaluate(data, base, tmp_path, batch_size=3)
    two = evaluate(data, blocks, tmp_path)
    assert one["targets"] == two["targets"]
    assert one["window_targets"] == two["window_targets"]
    assert one["loss"] != two["loss"]
    later = evaluate(data, base, tmp_path, first_target=5)
    assert later["targets"]["hash"] != one["targets"]["hash"]
    shorter = evaluate(data, base, tmp_path, tokens=400)
    assert shorter["targets"]["hash"] != one["targets"]["hash"]


def test_windows_are_spread_over_all_of_the_text():
    tokens = torch.arange(1000, dtype=torch.int32)
    ends = torch.arange(1, 101) * 10
    held = Corpus(tokens, ends, torch.ones(1000, dtype=torch.bool), torch.ones_like(tokens), 7, 8)
    text = [t for d in range(100) for t in [*range(10 * d, 10 * d + 10), 7]]
    for count in (1, 4, 11, 68):
        windows = cut(held, 16, 16 * count, 1)
        starts = [text.index(int(row[0]) if row[0] != 7 else int(row[1])) for row in windows.ids]
        assert len(windows) == count
        assert windows.valid.all()
        for row, start, document in zip(windows.ids, starts, windows.documents, strict=True):
            begin = start - int(row[0] == 7)
            assert row.tolist() == text[begin : begin + 16]
            assert begin % 16 == 0
            assert int(document) == begin // 11
        gaps = {b - a for a, b in pairwise(starts)}
        assert not gaps or max(gaps) - min(gaps) <= 17
        assert starts[-1] + 16 > len(text) * (1 - 1 / count) - 32
    whole = cut(held, 16, 10**6, 1)
    assert whole.ids[whole.valid].tolist() == text
    assert whole.ends.sum() == 100


def test_the_share_of_targets_in_blocks_of_two_documents(data, base, blocks, tmp_path):
    tokens = torch.arange(1, 9, dtype=torch.int32)
    held = Corpus(
        tokens, torch.tensor([4, 8]), torch.ones(8, dtype=torch.bool), torch.ones_like(tokens), 0, 9
    )
    # Blocks 1 2 3 4 | 0 5 6 7 | 8 0: the second and third hold an end of text inside.
    windows = cut(held, 12, 100, 4)
    assert windows.mixed(1) == 0
    assert windows.mixed(4) == 1
    assert windows.mixed(5) == 0
    assert evaluate(data, base, tmp_path)["targets_in_mixed_blocks"] == 0
    assert 0 < evaluate(data, blocks, tmp_path)["targets_in_mixed_blocks"] < 0.5


def test_an_arm_that_cannot_predict_a_target_is_refused(data, blocks, tmp_path):
    with pytest.raises(JobError, match="does not predict position 1"):
        evaluate(data, blocks, tmp_path, first_target=1)


@pytest.mark.parametrize("arm", ["base", "blocks"])
@pytest.mark.parametrize("window", [1, 3, 64])
def test_one_pass_scores_what_the_live_cache_gives(arm, window, request):
    model = load(request.getfixturevalue(arm)).eval()
    method = from_dict({"eviction": {"sliding_window": {"window": window}}})
    ids = torch.randint(1, 257, (3, 32), generator=torch.Generator().manual_seed(0))
    targets = torch.arange(32).expand(3, 32) >= 4
    at_once = parallel(model, ids, None, targets, method)
    prompt = first_predicted(model, ids)
    one_by_one = torch.stack(list(stepwise(model, ids, targets, method, prompt)), dim=1)
    assert torch.allclose(at_once[:, prompt:], one_by_one, atol=1e-5)
    full = parallel(model, ids, None, targets)
    assert torch.allclose(at_once, full, atol=1e-5) == (window == 64)


def test_an_evicted_cache_is_scored_as_it_is_used(data, base, tmp_path):
    window = {"eviction": {"sliding_window": {"window": 6}}}
    result = evaluate(data, base, tmp_path, apply=window)
    model = load(base)
    windowed = build(model.config.with_(windows=(6, 6)), from_dict({}))
    windowed.load_state_dict(model.state_dict())
    (tmp_path / "windowed").mkdir()
    save(windowed, tmp_path / "windowed")
    expected = evaluate(data, tmp_path / "windowed", tmp_path)
    assert result["targets"] == expected["targets"]
    assert result["loss"] == pytest.approx(expected["loss"], abs=1e-5)
    assert result["loss"] != pytest.approx(evaluate(data, base, tmp_path)["loss"], abs=1e-5)


@pytest.mark.parametrize("arm", ["base", "blocks"])
def test_a_window_as_long_as_the_text_changes_nothing(data, arm, tmp_path, request):
    folder = request.getfixturevalue(arm)
    whole = {"eviction": {"sliding_window": {"window": 64}}}
    windowed = evaluate(data, folder, tmp_path, apply=whole)
    assert windowed["loss"] == pytest.approx(evaluate(data, folder, tmp_path)["loss"], abs=1e-5)


def test_prompts_and_padding_are_no_targets():
    tokens = torch.tensor([5, 6, 7, 8, 9], dtype=torch.int32)
    counts = torch.tensor([False, False, True, True, False])
    held = Corpus(
        tokens, torch.tensor([3, 5]), counts, torch.ones(5, dtype=torch.int32), 1, vocab_size=10
    )
    windows = cut(held, 4, 100, 1)
    assert windows.ids.tolist() == [[5, 6, 7, 1], [8, 9, 1, 0]]
    assert windows.valid.tolist() == [[True] * 4, [True, True, True, False]]
    assert windows.targets.tolist() == [
        [False, False, True, True], [False, False, True, False],
    ]  # fmt: skip
    assert windows.widths.tolist() == [[1, 1, 1, 0], [1, 1, 0, 0]]
    assert cut(held, 4, 6, 1).valid.sum() == 6


def test_scores_are_of_the_dtype_that_is_timed(data, base, tmp_path):
    exact, half = (evaluate(data, base, tmp_path, dtype=d) for d in ("auto", "bfloat16"))
    assert exact["environment"]["dtype"] == "float32"
    assert half["environment"]["dtype"] == "bfloat16"
    assert half["targets"] == exact["targets"]
    assert half["loss"] != exact["loss"]
    assert half["loss"] == pytest.approx(exact["loss"], abs=0.02)


def test_nothing_to_score_is_one_line(data, base, tmp_path):
    with pytest.raises(JobError, match="nothing to score"):
        evaluate(data, base, tmp_path, tokens=3)
