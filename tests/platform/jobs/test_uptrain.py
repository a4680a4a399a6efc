"""Uptraining: conversion, distillation, LoRA merged into a plain model."""

from itertools import combinations

import pytest
import torch

from kvlab.methods.build import build, convert
from kvlab.methods.decoder.config import DecoderConfig
from kvlab.methods.registry import from_dict, resolve
from kvlab.methods.store import load
from kvlab.platform.jobs.context import JobError, Stopped
from kvlab.platform.jobs.local import LocalContext, run_cell
from kvlab.platform.jobs.training.loop import rows_of
from kvlab.platform.jobs.training.objective import Objective, divergence
from kvlab.platform.jobs.uptrain import lora


@pytest.fixture
def uptrain(data, train_spec, base, tmp_path):
    def run(name="out", inputs=(), context=(), **changes):
        spec = {
            **train_spec(learning_rate=1e-3),
            "stage": 1,
            "lora": None,
            "distill": None,
            **changes,
        }
        given = {"data": data, "from": base, **dict(inputs)}
        return run_cell("uptrain", spec, given, tmp_path / name, **dict(context))

    return run


def test_a_converted_model_learns(uptrain, block, tmp_path):
    result = uptrain(method=block(4), tokens=6144)
    short = uptrain("short", method=block(4), tokens=128)
    assert result["loss"] < short["loss"]
    model = load(tmp_path / "out")
    assert model.method["granularity"].params.block_length == 4
    assert (tmp_path / "out" / "tokenizer.json").is_file()


def test_distillation_pulls_towards_the_teacher(uptrain, base, block, tmp_path, train_spec, data):
    changes = {"method": block(2), "tokens": 6144}
    uptrain("plain", **changes)
    uptrain("taught", **changes, distill={"weight": 1.0, "temperature": 1.0})
    run_cell("train", train_spec(seed=5), {"data": data}, tmp_path / "other")
    other = {"teacher": tmp_path / "other"}
    uptrain("elsewhere", inputs=other, **changes, distill={"weight": 1.0, "temperature": 1.0})
    ids = torch.randint(1, 257, (4, 32), generator=torch.Generator().manual_seed(0))
    away = {}
    with torch.no_grad():
        wanted, _ = load(base).predictions(ids)
        for name in ("plain", "taught", "elsewhere"):
            logits, scored = load(tmp_path / name).predictions(ids)
            away[name] = float(divergence(logits[scored], wanted[scored], 1.0))
    assert away["taught"] < away["plain"]
    assert away["taught"] < away["elsewhere"]


def test_a_teacher_of_other_tokens_is_refused(uptrain, train_spec, data, tmp_path):
    spec = train_spec(tokens=128)
    spec["model"] = {"config": {**spec["model"]["config"], "vocab_size": 300}}
    run_cell("train", spec, {"data": data}, tmp_path / "other")
    with pytest.raises(JobError, match=r"vocabulary \(300\) must equal the model's \(257\)"):
        uptrain(
            inputs={"teacher": tmp_path / "other"},
            method={},
            distill={"weight": 0.5, "temperature": 1.0},
        )


def test_the_distilled_loss_is_what_it_says(base, block):
    teacher = load(base)
    student = convert(teacher, from_dict(block(2)))
    ids = torch.randint(1, 257, (3, 16), generator=torch.Generator().manual_seed(0))
    counts = torch.rand(ids.shape, generator=torch.Generator().manual_seed(1)) > 0.3
    with torch.no_grad():
        found = Objective(student, teacher, weight=0.25, temperature=2.0)(ids, None, counts)
        same = Objective(teacher, teacher, weight=1.0)(ids, None, counts)
        logits, scored = student.predictions(ids)
        taught, _ = teacher.predictions(ids)
    nll = kl = 0.0
    for row, place in (scored & counts).nonzero().tolist():
        shares = logits[row, place].double().log_softmax(0)
        nll -= float(shares[ids[row, place]])
        own = (logits[row, place].double() / 2).log_softmax(0)
        wanted = (taught[row, place].double() / 2).log_softmax(0)
        kl += 4 * float((wanted.exp() * (wanted - own)).sum())
    assert int(found.targets) == int((scored & counts).sum())
    assert float(found.nll) == pytest.approx(nll, rel=1e-5)
    assert float(found.objective) == pytest.approx(0.75 * nll + 0.25 * kl, rel=1e-5)
    assert float(same.objective) == pytest.approx(0.0, abs=1e-5)


def test_masked_tokens_have_no_gradient(base):
    model = load(base)
    ids = torch.randint(1, 257, (2, 12), generator=torch.Generator().manual_seed(0))
    counts = torch.zeros(ids.shape, dtype=torch.bool)
    counts[0, 5] = True
    found = Objective(model)(ids, None, counts)
    assert int(found.targets) == 1
    assert float(found.nll) == pytest.approx(float(model(ids).nll[0, 5].detach()), rel=1e-6)
    found.objective.backward()
    masked = [p.grad.clone() for p in model.parameters()]
    model.zero_grad()
    Objective(model)(ids[:1, :6], None, counts[:1, :6]).objective.backward()
    for one, parameter in zip(masked, model.parameters(), strict=True):
        assert torch.allclose(one, parameter.grad, atol=1e-6)


FRESH = {
    "none": set(),
    "plain": {"block_decoder.norm", "token_decoder.expansion", "embedder.projection"},
    "lookup": {"block_decoder.norm", "token_decoder.expansion", "embedder"},
    "encoder": {"block_decoder.norm", "token_decoder.expansion", "embedder"},
}
"""What a conversion starts itself: all below these names, and nothing else."""
EMBEDDERS = {
    "plain": {},
    "lookup": {"embedder": "lookup", "uptrain_embedder": "random"},
    "encoder": {"embedder": "encoder", "uptrain_embedder": "random"},
}


@pytest.mark.parametrize("arm", FRESH)
def test_lora_freezes_what_came_from_the_parent(uptrain, base, block, tmp_path, arm):
    method = {} if arm == "none" else block(2, **EMBEDDERS[arm])
    torch.manual_seed(0)
    before = convert(load(base), from_dict(method))
    old = {name: tensor.clone() for name, tensor in before.state_dict().items()}
    assert {n for n in old if any(n.startswith(f"{part}.") for part in FRESH[arm])} == before.fresh
    parent = load(base).state_dict()
    uptrain(
        "lora", method=method, lora={"rank": 2, "alpha": 4.0, "targets": None, "quantize": None}
    )
    for name, weight in load(tmp_path / "lora").state_dict().items():
        moved = weight - old[name]
        if name in before.fresh:
            assert moved.any(), name
        elif lora.in_layer(name) and weight.dim() == 2:
            assert int(torch.linalg.matrix_rank(moved, atol=1e-5)) == 2
        else:
            assert not moved.any(), name
            assert any(weight.equal(theirs) for theirs in parent.values()), name


def test_no_shape_makes_a_projection_a_table():
    config = DecoderConfig(
        vocab_size=64, width=32, layers=2, heads=2, kv_heads=2, head_dim=16, ffn_width=64
    )
    method = resolve({"block_transformer": {"block_length": 2}})
    model = convert(build(config, resolve({})), method)
    shapes = {name: list(p.shape) for name, p in model.named_parameters()}
    assert [32, 64] in [shapes[name] for name in model.fresh]
    lora.attach(model, {"rank": 2, "alpha": 4.0, "targets": None, "quantize": None})
    trained = {name for name, p in model.named_parameters() if p.requires_grad}
    assert {name for name in trained if "lora_" not in name} == model.fresh


@pytest.mark.parametrize("quantize", [None, "nf4", "fp4"])
def test_merging_changes_no_prediction(base, quantize):
    model = load(base)
    wrapper = lora.attach(model, {"rank": 2, "alpha": 4.0, "targets": None, "quantize": quantize})
    draw = torch.Generator().manual_seed(0)
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            parameter.data = torch.randn(parameter.shape, generator=draw) * 0.1
    ids = torch.randint(1, 257, (2, 16), generator=draw)
    with torch.no_grad():
        expected = model(ids).nll
        merged = lora.merge(wrapper)
        assert torch.allclose(merged(ids).nll, expected, atol=1e-5)
    assert not torch.allclose(load(base)(ids).nll, expected, atol=1e-3)


def test_in_four_bits_it_learns_and_publishes_plain_weights(uptrain, tmp_path):
    """Each map is what 4 bits held of the parent's and two more ranks."""
    low_rank = {"rank": 2, "alpha": 4.0, "targets": None, "quantize": "nf4"}
    uptrain("start", method={}, lora=low_rank, tokens=0)
    result = uptrain("trained", method={}, lora=low_rank, tokens=4096)
    again = uptrain("again", method={}, lora=low_rank, tokens=128)
    assert result["loss"] < again["loss"]
    start, trained = (load(tmp_path / name).state_dict() for name in ("start", "trained"))
    for name, weight in trained.items():
        if lora.in_layer(name) and weight.dim() == 2:
            assert start[name].unique().numel() < start[name].numel() / 2  # 16 values a group
            assert int(torch.linalg.matrix_rank(weight - start[name], atol=1e-5)) == 2


def test_a_killed_lora_run_ends_in_the_same_bits(uptrain, block, tmp_path):
    changes = {
        "method": block(2),
        "lora": {"rank": 2, "alpha": 4.0, "targets": None, "quantize": None},
    }
    uptrain("whole", **changes)
    kept = {"checkpoints": tmp_path / "kept"}
    with pytest.raises(Stopped):
        uptrain("parts", context={**kept, "stop_after": 5}, **changes)
    uptrain("parts", context=kept, **changes)
    whole, parts = (load(tmp_path / name).state_dict() for name in ("whole", "parts"))
    assert all(whole[name].equal(parts[name]) for name in whole)


def test_uptraining_reads_in_another_order_than_its_parent(data, train_spec, base, tmp_path):
    model = load(base)
    context = LocalContext(folder=tmp_path, inputs={"data": data})
    spec = train_spec()
    read = [rows_of(model, {**spec, "stage": stage}, context).take(64).ids for stage in range(3)]
    assert rows_of(model, spec, context).take(64).ids.equal(read[0])
    assert not any(one.equal(two) for one, two in combinations(read, 2))


def test_a_teacher_and_low_rank_additions_count(uptrain, block):
    changes = {"method": block(4), "tokens": 128}
    plain = uptrain("plain", **changes)["flops"]
    lora_ = uptrain(
        "lora", **changes, lora={"rank": 2, "alpha": 4.0, "targets": None, "quantize": None}
    )["flops"]
    taught = uptrain("taught", **changes, distill={"weight": 0.5, "temperature": 1.0})["flops"]
    parent = uptrain("parent", method={}, tokens=128)["flops"]
    assert lora_ == pytest.approx(plain * 2 / 3)
    assert taught == pytest.approx(plain + parent / 3)


def test_unknown_lora_targets_are_named(uptrain):
    with pytest.raises(JobError, match=r"no layer has 'nowhere'; it has "):
        uptrain(method={}, lora={"rank": 2, "alpha": 4.0, "targets": ["nowhere"], "quantize": None})


def test_what_was_averaged_trains_in_full(uptrain, tmp_path):
    """Layer 0 has the mean of two layers' keys and values; layer 1 has its own queries alone."""
    low_rank = {"rank": 2, "alpha": 4.0, "targets": ["qkv"], "quantize": None}
    spec = {"method": resolve("cla").to_dict(), "lora": low_rank}
    uptrain("start", **spec, tokens=0)
    uptrain("trained", **spec, tokens=512)
    start, trained = (load(tmp_path / name).state_dict() for name in ("start", "trained"))
    changes = {
        name.removeprefix("decoder.layers."): torch.linalg.matrix_rank(trained[name] - tensor)
        for name, tensor in start.items()
        if not torch.equal(trained[name], tensor)
    }
    assert set(changes) == {"0.attention.qkv.weight", "1.attention.qkv.weight"}
    assert changes["0.attention.qkv.weight"] > low_rank["rank"]
    assert changes["1.attention.qkv.weight"] <= low_rank["rank"]


def test_targets_that_all_train_in_full():
    sizes = DecoderConfig(257, 32, 2, 2, 2, 16, 64)
    model = convert(build(sizes, resolve({})), resolve("gqa"))
    with pytest.raises(JobError, match="qkv train in full"):
        lora.attach(model, {"rank": 2, "alpha": 4.0, "targets": ["qkv"], "quantize": None})
    lora.attach(model, {"rank": 2, "alpha": 4.0, "targets": ["qkv", "out"], "quantize": None})


def test_what_shares_already_is_converted_to_another_sharing(uptrain, base, tmp_path):
    shared = resolve({"cross_layer": {"layout": "pizza_top", "kv_layers": 1}})
    uptrain("first", method=shared.to_dict(), tokens=128)
    other = resolve({"cross_layer": {"layout": "pizza_bottom", "kv_layers": 1, "kv_heads": 1}})
    taught = {"weight": 0.5, "temperature": 1.0}
    given = {"from": tmp_path / "first", "teacher": base}
    result = uptrain("second", given, method=other.to_dict(), tokens=128, distill=taught)
    model = load(tmp_path / "second")
    assert model.method.to_dict() == other.to_dict()
    assert model.decoder.config.kv_layers == (0,)
    assert result["body_parameters"] == model.body_parameters()
