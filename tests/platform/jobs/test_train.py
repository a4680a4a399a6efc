"""Training: exact resumption, the right gradient, divergence, and what is published."""

import errno
import json
from itertools import pairwise

import pytest
import torch
from safetensors.torch import load_file, save_file

from kvlab.db.states import Cause
from kvlab.methods.build import build
from kvlab.methods.decoder.config import DecoderConfig
from kvlab.methods.decoder.huggingface.writer import write_checkpoint
from kvlab.methods.registry import resolve
from kvlab.methods.store import load, save
from kvlab.platform.jobs.checkpoint import trained_method
from kvlab.platform.jobs.context import Diverged, JobError, Stopped
from kvlab.platform.jobs.local import LocalContext, run_cell
from kvlab.platform.jobs.train.run import run
from kvlab.platform.jobs.training import checkpoint
from kvlab.platform.jobs.training.optimizer import learning_rate
from kvlab.platform.worker.causes import classify


def weights(folder):
    return load_file(folder / "model.safetensors")


def same(one, two):
    return one.keys() == two.keys() and all(one[k].equal(two[k]) for k in one)


def close(one, two, tolerance=1e-6):
    return max(float((one[k] - two[k]).abs().max()) for k in one) < tolerance


@pytest.mark.parametrize("kills", [(1,), (5,), (3, 4)])
@pytest.mark.parametrize("length", [None, 4])
def test_a_killed_run_ends_in_the_same_bits(data, train_spec, block, tmp_path, kills, length):
    method = {} if length is None else block(length)
    spec = train_spec(accumulate=2, tokens=3072, method=method)
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    whole.mkdir(), parts.mkdir()
    once = LocalContext(folder=whole, inputs={"data": data})
    expected = run(spec, once)

    points = {}
    for kill in (*kills, None):
        context = LocalContext(
            folder=parts,
            inputs={"data": data},
            checkpoints=tmp_path / "checkpoints",
            stop_after=kill,
        )
        if kill is not None:
            with pytest.raises(Stopped):
                run(spec, context)
        else:
            found = run(spec, context)
        points |= context.points
    assert same(weights(whole), weights(parts))
    assert found["loss"] == expected["loss"]
    timeless = {key for key in once.points if key[0] != "tokens_per_second"}
    assert {key: points[key] for key in timeless} == {key: once.points[key] for key in timeless}


def test_steps_after_the_newest_checkpoint_are_done_again(data, train_spec, tmp_path):
    spec, given = train_spec(checkpoint_every=5), {"data": data}
    run_cell("train", spec, given, tmp_path / "once", checkpoints=tmp_path / "kept")
    again = LocalContext(folder=tmp_path, inputs=given, checkpoints=tmp_path / "kept")
    run(spec, again)
    assert {step for _, step in again.points} == {12}
    assert same(weights(tmp_path / "once"), weights(tmp_path))


def test_checkpoints_hold_no_pickle_and_only_the_newest_is_kept(data, train_spec, tmp_path):
    spec = train_spec(checkpoint_every=5)
    run_cell("train", spec, {"data": data}, tmp_path / "out", checkpoints=tmp_path / "kept")
    assert [p.name for p in (tmp_path / "kept").iterdir()] == ["10"]
    files = sorted(p.name for p in (tmp_path / "kept" / "10").iterdir())
    assert files == ["progress.json", "state.safetensors"]
    assert json.loads((tmp_path / "kept" / "10" / "progress.json").read_text())["step"] == 10


def test_a_checkpoint_of_another_model_is_refused(data, train_spec, block, tmp_path):
    kept = tmp_path / "kept"
    spec = train_spec(checkpoint_every=5)
    run_cell("train", spec, {"data": data}, tmp_path / "one", checkpoints=kept)
    other = train_spec(method=block(2))
    with pytest.raises(Exception, match="is of another model"):
        run_cell("train", other, {"data": data}, tmp_path / "two", checkpoints=kept)
    (kept / "10" / "state.safetensors").write_bytes(b"torn")
    with pytest.raises(OSError, match=r"checkpoint .* not readable") as failed:
        run_cell("train", spec, {"data": data}, tmp_path / "three", checkpoints=kept)
    # The next attempt does not meet it again.
    assert classify(failed.value)[0] is Cause.INFRASTRUCTURE
    assert not (kept / "10").exists()
    run_cell("train", spec, {"data": data}, tmp_path / "four", checkpoints=kept)
    assert (kept / "10" / "state.safetensors").stat().st_size > 1000


def test_a_checkpoint_that_cannot_be_read_now_is_kept(tmp_path, monkeypatch):
    """An I/O error says nothing about the content."""

    def fails(path):
        raise OSError(errno.EIO, "Input/output error", str(path))

    monkeypatch.setattr("safetensors.torch.load_file", fails)
    module = torch.nn.Linear(1, 1)
    with pytest.raises(OSError, match="Input/output") as failed:
        checkpoint.restore(tmp_path, module, torch.optim.SGD(module.parameters()))
    assert classify(failed.value)[0] is Cause.INFRASTRUCTURE
    assert tmp_path.is_dir()


def test_training_learns_and_the_result_is_whole(data, train_spec, base):
    spec = train_spec(tokens=6144)
    context = LocalContext(folder=base, inputs={"data": data})
    result = run(spec, context)
    losses = [value for (key, _), value in sorted(context.points.items()) if key == "loss"]
    assert result["loss"] < losses[0] - 0.5
    assert result["steps"] == 48
    assert result["tokens"] == 48 * 4 * 32
    model = load(base)
    assert result["parameters"] == sum(p.numel() for p in model.parameters())
    assert result["body_parameters"] == model.body_parameters()
    assert result["flops"] > 0
    assert result["environment"]["torch"] == torch.__version__
    assert json.dumps(result)
    assert (base / "tokenizer.json").is_file()
    steps = {step for _, step in context.points}
    assert steps == set(range(4, 49, 4))
    keys = {key for key, _ in context.points}
    assert keys == {"loss", "learning_rate", "tokens_per_second", "gradient_norm"}


def test_the_same_seed_gives_the_same_bits_and_another_does_not(data, train_spec, tmp_path):
    for name, seed in (("a", 0), ("b", 0), ("c", 1)):
        run_cell("train", train_spec(seed=seed), {"data": data}, tmp_path / name)
    a, b, c = (weights(tmp_path / name) for name in "abc")
    assert same(a, b)
    assert not same(a, c)


def test_accumulation_is_the_larger_batch(data, train_spec, tmp_path):
    large, small = train_spec(), train_spec(batch_size=1, accumulate=4)
    run_cell("train", large, {"data": data}, tmp_path / "large")
    run_cell("train", small, {"data": data}, tmp_path / "small")
    assert close(weights(tmp_path / "large"), weights(tmp_path / "small"))


def test_divergence_is_named(data, train_spec, tmp_path):
    spec = train_spec()
    spec["model"] = {"config": {**spec["model"]["config"], "init_std": 1e38}}
    kept = tmp_path / "kept"
    with pytest.raises(Diverged, match=r"step \d+ of 12: loss"):
        run_cell("train", spec, {"data": data}, tmp_path / "out", checkpoints=kept)
    assert not kept.exists()


def test_a_vocabulary_that_is_too_small_is_one_line(data, train_spec, tmp_path):
    spec = train_spec()
    spec["model"] = {"config": {**spec["model"]["config"], "vocab_size": 100}}
    with pytest.raises(JobError, match="257 tokens, the model's vocabulary 100"):
        run_cell("train", spec, {"data": data}, tmp_path / "out")


def test_a_checkpoint_people_have_is_taken_as_it_is_or_trained_on(data, train_spec, base, tmp_path):
    model = {"checkpoint": str(base), "fingerprint": ""}
    result = run_cell("train", train_spec(model=model, tokens=0), {"data": data}, tmp_path / "as")
    assert result["steps"] == 0
    assert result["loss"] is None
    assert same(weights(base), weights(tmp_path / "as"))
    run_cell("train", train_spec(model=model), {"data": data}, tmp_path / "on")
    assert not same(weights(base), weights(tmp_path / "on"))


def test_a_checkpoint_that_is_taken_as_it_is_keeps_its_dtype(data, train_spec, base, tmp_path):
    (tmp_path / "half").mkdir()
    save(load(base, dtype=torch.bfloat16), tmp_path / "half")
    model = {"checkpoint": str(tmp_path / "half"), "fingerprint": ""}
    run_cell("train", train_spec(model=model, tokens=0), {"data": data}, tmp_path / "as")
    assert {p.dtype for p in load(tmp_path / "as").parameters()} == {torch.bfloat16}


def test_a_folder_with_shared_keys_is_taken_as_it_is_or_trained_on(data, train_spec, tmp_path):
    method = resolve({"lckv": {"warmup_layers": 0, "forward_passes": 3}})
    torch.manual_seed(0)
    model = build(DecoderConfig.from_dict(train_spec()["model"]["config"]), method)
    for name in ("ours", "theirs"):
        (tmp_path / name).mkdir()
    save(model, tmp_path / "ours")
    write_checkpoint(model, tmp_path / "theirs")
    checkpoint = {"checkpoint": str(tmp_path / "theirs"), "fingerprint": ""}
    spec = train_spec(model=checkpoint, method=trained_method(tmp_path / "theirs"))
    for name, tokens in (("as", 0), ("on", 1536)):
        run_cell("train", {**spec, "tokens": tokens}, {"data": data}, tmp_path / name)
    assert same(weights(tmp_path / "ours"), weights(tmp_path / "as"))
    assert not same(weights(tmp_path / "ours"), weights(tmp_path / "on"))
    scoring = {
        "metrics": ["perplexity"], "apply": {}, "sequence_length": 32, "tokens": 200,
        "batch_size": 4, "first_target": 1, "dtype": "auto", "seed": 0,
    }  # fmt: skip
    scores = [
        run_cell("evaluate", scoring, {"data": data, "of": tmp_path / name}, tmp_path / f"{name}?")
        for name in ("ours", "as", "on")
    ]
    ours, unchanged, trained = (score["loss"] for score in scores)
    assert ours == unchanged > trained


def test_bfloat16_autocast_trains_float32_weights(data, train_spec, tmp_path):
    spec = train_spec(precision="bfloat16")
    result = run_cell("train", spec, {"data": data}, tmp_path / "out")
    assert all(t.dtype == torch.float32 for t in weights(tmp_path / "out").values())
    exact = run_cell("train", train_spec(), {"data": data}, tmp_path / "exact")
    assert result["loss"] != exact["loss"]
    assert abs(result["loss"] - exact["loss"]) < 0.05


def test_a_checkpoint_in_half_precision_is_trained_in_float32(data, train_spec, base, tmp_path):
    half = tmp_path / "half"
    half.mkdir()
    save(load(base, dtype=torch.bfloat16), half)
    assert {t.dtype for t in weights(half).values()} == {torch.bfloat16}
    model = {"checkpoint": str(half), "fingerprint": ""}
    spec = train_spec(model=model, learning_rate=1e-6, tokens=512)
    run_cell("train", spec, {"data": data}, tmp_path / "out")
    before, after = weights(half), weights(tmp_path / "out")
    assert {t.dtype for t in after.values()} == {torch.float32}
    # Steps this small are below bfloat16's resolution: only float32 weights keep them.
    moved = [after[k] - before[k].float() for k in after if after[k].dim() == 2]
    assert all(0 < float(m.abs().max()) < 1e-5 for m in moved)


def prompts(folder, lengths):
    """A data folder of documents of these lengths in which only the ends of text count."""
    folder.mkdir()
    (folder / "data.json").write_text(json.dumps({"end_of_text": 0, "vocab_size": 257}))
    (folder / "tokenizer.json").write_text("{}")
    ends = torch.tensor(lengths).cumsum(0)
    tokens = torch.ones(int(ends[-1]), dtype=torch.int32)
    counts = torch.zeros(tokens.shape, dtype=torch.bool)
    part = {"tokens": tokens, "ends": ends, "counts": counts, "bytes": tokens.clone()}
    save_file(part, folder / "train.safetensors")
    return folder


def test_steps_without_a_target_are_passed_over(train_spec, tmp_path):
    given = {"data": prompts(tmp_path / "data", [40] * 20)}
    # A row holds 8 of the 41 tokens of a document and its end: four of five have no target.
    spec = train_spec(batch_size=1, sequence_length=8, tokens=512, log_every=1)
    context = LocalContext(folder=tmp_path, inputs=given)
    result = run(spec, context)
    assert result["steps"] == result["targets"] == 64
    assert all(value > 0 for (key, _), value in context.points.items() if key == "loss")


def test_text_without_any_target_is_refused(train_spec, block, tmp_path):
    # Every row is one document in one block, and nothing predicts a first block.
    given = {"data": prompts(tmp_path / "data", [3] * 20)}
    method = block(8, random_padding=False)
    spec = train_spec(batch_size=1, sequence_length=8, tokens=64, method=method)
    with pytest.raises(JobError, match="no token that counts stands where"):
        run_cell("train", spec, given, tmp_path / "out")


def test_targets_are_what_the_loss_is_over(data, train_spec, block, tmp_path):
    plain = run_cell("train", train_spec(), {"data": data}, tmp_path / "plain")
    assert plain["targets"] == plain["steps"] * 4 * 31
    blocks = run_cell("train", train_spec(method=block(4)), {"data": data}, tmp_path / "blocks")
    assert blocks["tokens"] == plain["tokens"]
    # The first block of a row is never predicted, and padding is no target.
    assert blocks["targets"] < blocks["steps"] * 4 * 28


def test_the_learning_rate_warms_up_then_falls_to_its_share():
    spec = {"learning_rate": 1.0, "warmup": 0.1, "final_learning_rate": 0.2}
    rates = [learning_rate(step, 100, spec) for step in range(100)]
    assert rates[:10] == [pytest.approx((i + 1) / 10) for i in range(10)]
    assert rates[10] == pytest.approx(1.0)
    assert rates[99] == pytest.approx(0.2)
    assert all(a > b for a, b in pairwise(rates[10:]))
    assert learning_rate(0, 1, {**spec, "warmup": 0.0}) == 1.0
