"""The calibrate job: importances as the paper measures them, and how stable they are."""

from __future__ import annotations

import json
from itertools import combinations
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from kvlab.methods.budget.squeeze_attention.budget import shares_of
from kvlab.methods.budget.squeeze_attention.grouping import three_means
from kvlab.methods.build import build
from kvlab.methods.cache.ephemeral import one_pass
from kvlab.methods.decoder.config import DecoderConfig
from kvlab.methods.registry import resolve
from kvlab.methods.store import load
from kvlab.platform.data import corpus
from kvlab.platform.jobs.calibrate.observing import observe
from kvlab.platform.jobs.calibrate.stability import agreed, moved, stability
from kvlab.platform.jobs.context import JobError, Stopped
from kvlab.platform.jobs.evaluate.windows import cut
from kvlab.platform.jobs.local import run_cell

GOLDEN = Path(__file__).parents[2] / "golden" / "squeeze" / "squeeze_streaming_llama_a.safetensors"
SIZES = {"width": 32, "layers": 6, "heads": 2, "kv_heads": 1, "head_dim": 16, "ffn_width": 64}
SPEC = {
    "samples": 12, "sequence_length": 32, "part": "train", "sections": 2,
    "importance": ["cosine", "mass"], "p": 0.35, "batch_size": 5, "dtype": "auto", "seed": 0,
}  # fmt: skip
KINDS = {
    "full": {},
    "shared": {"cross_layer": {"layers": "0_1_2_2_4_4"}},
    "upward": {"cross_layer": {"layers": "0_1_3_3_4_5"}},
    "by row": {"cross_layer": {"layers": "0_1_3_3_4_5", "sequential": True}},
    "block": {"block_transformer": {"block_length": 4}},
}


def model_of(kind: str) -> Any:
    layers = 12 if kind == "block" else 6
    config = DecoderConfig(vocab_size=257, tie_embeddings=True, **{**SIZES, "layers": layers})
    torch.manual_seed(3)
    model = build(config, resolve(KINDS[kind])).eval()
    for name, weight in model.named_parameters():
        if weight.dim() == 2:
            # Layers that differ: attention of the lower ones moves the stream more.
            place = next((int(p) for p in name.split(".") if p.isdigit()), 0)
            nn.init.normal_(weight, std=0.3 / (1 + place % 6))
    return model


@pytest.fixture(scope="module")
def folders(data: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A saved model of each kind."""
    found = {}
    for kind in KINDS:
        found[kind] = tmp_path_factory.mktemp(kind.replace(" ", "_"))
        model_of(kind).save(found[kind])
    return found


def calibrate(data: Path, model: Path, folder: Path, **changes: Any) -> dict[str, Any]:
    inputs = {"data": data, "of": model}
    return run_cell("calibrate", {**SPEC, **changes}, inputs, folder)


def golden_model(tensors: dict[str, Tensor]) -> Any:
    config = DecoderConfig(
        vocab_size=96, width=48, layers=8, heads=4, kv_heads=2, head_dim=12, ffn_width=64,
        norm_eps=1e-5, rope_theta=10000.0, max_positions=512,
    )  # fmt: skip
    weights = {
        "embedding.weight": tensors["w.model.embed_tokens.weight"],
        "norm.weight": tensors["w.model.norm.weight"],
        "output.weight": tensors["w.lm_head.weight"],
    }
    for i in range(config.layers):
        ours, theirs = f"layers.{i}", f"w.model.layers.{i}"
        parts = [tensors[f"{theirs}.self_attn.{part}_proj.weight"] for part in "qkv"]
        weights[f"{ours}.attention.qkv.weight"] = torch.cat(parts)
        for name, other in (
            ("attention.out", "self_attn.o_proj"),
            ("attention_norm", "input_layernorm"),
            ("mlp_norm", "post_attention_layernorm"),
            ("mlp.gate", "mlp.gate_proj"),
            ("mlp.up", "mlp.up_proj"),
            ("mlp.down", "mlp.down_proj"),
        ):
            weights[f"{ours}.{name}.weight"] = tensors[f"{theirs}.{other}.weight"]
    model = build(config, resolve({}))
    model.load_state_dict({f"decoder.{name}": weight for name, weight in weights.items()})
    return model.eval()


def test_cosines_and_groups_are_those_of_the_papers_code() -> None:
    tensors = load_file(GOLDEN)
    model = golden_model(tensors)
    seen = observe(model, tensors["in.prompt_ids"], mass=False)
    assert seen.spread is None
    torch.testing.assert_close(seen.cosine[0], tensors["out.cos_per_token"], atol=1e-5, rtol=0)
    means = seen.cosine[0].double().mean(1)
    torch.testing.assert_close(means, tensors["out.cos_mean"], atol=1e-5, rtol=0)
    assert [group + 1 for group in three_means(means.tolist())] == tensors["out.group"].tolist()


class Spy:
    """The residual stream and the attention of every layer, from hooks beside the cache."""

    def __init__(self, decoder: Any) -> None:
        self.cosine: list[Tensor] = []
        for layer in decoder.layers:
            layer.attention.register_forward_hook(self._attended)
            layer.attention_norm.register_forward_pre_hook(self._entered)

    def _entered(self, _module: nn.Module, args: tuple[Tensor]) -> None:
        self.before = args[0]

    def _attended(self, _module: nn.Module, _args: Any, out: tuple[Tensor, Any]) -> None:
        after = self.before.double() + out[0].double()
        self.cosine.append(F.cosine_similarity(self.before.double(), after, dim=-1, eps=1e-8))


@pytest.mark.parametrize("kind", ["full", "shared", "block"])
def test_what_is_observed_is_what_the_layers_did(kind: str) -> None:
    model = model_of(kind)
    decoder = model.block_decoder if kind == "block" else model.decoder
    spy = Spy(decoder)
    ids = torch.randint(1, 257, (3, 32), generator=torch.Generator().manual_seed(0))
    seen = observe(model, ids, mass=True)
    assert seen.cosine.shape == (3, 6, 8 if kind == "block" else 32)
    torch.testing.assert_close(
        seen.cosine.double(), torch.stack(spy.cosine, dim=1), atol=1e-6, rtol=0
    )
    assert seen.spread is not None
    assert ((seen.spread > 0) & (seen.spread <= 1 + 1e-6)).all()


def test_spread_is_the_entropy_of_the_attention_that_keys_got() -> None:
    model = model_of("full")
    ids = torch.randint(1, 257, (2, 16), generator=torch.Generator().manual_seed(0))
    seen = observe(model, ids, mass=True)
    assert seen.spread is not None
    # Layer 0 by hand: its queries and keys are those of the embeddings.
    layer = model.decoder.layers[0]
    with torch.no_grad():
        step = model.decoder._pass(model.decoder.embed(ids), None, one_pass(model.acting))
        x = layer.attention_norm(model.decoder.embed(ids))
        q, (k, _) = layer.attention.queries(x, step), layer.attention.keys_values(x, step)
    for sample in range(2):
        entropies = []
        for head in range(2):
            scores = (q[sample, head].double() @ k[sample, 0].double().T) / 4
            scores = scores.masked_fill(torch.ones(16, 16).triu(1).bool(), -torch.inf)
            got = scores.softmax(-1).sum(0) / 16
            entropies.append(float(-(got * got.log()).sum() / torch.tensor(16.0).log()))
        expected = sum(entropies) / 2
        assert float(seen.spread[sample, 0]) == pytest.approx(expected, abs=1e-5)


def test_row_by_row_shows_what_enough_passes_show() -> None:
    ids = torch.randint(1, 257, (2, 12), generator=torch.Generator().manual_seed(0))
    slow = model_of("by row")
    many = build(
        slow.config,
        resolve({"cross_layer": {"layers": "0_1_3_3_4_5", "forward_passes": 12}}),
    ).eval()
    many.load_state_dict(slow.state_dict())
    one, other = observe(slow, ids, mass=True), observe(many, ids, mass=True)
    torch.testing.assert_close(one.cosine, other.cosine, atol=1e-5, rtol=0)
    assert one.spread is not None
    assert other.spread is not None
    torch.testing.assert_close(one.spread, other.spread, atol=1e-5, rtol=0)


@pytest.mark.parametrize("kind", list(KINDS))
def test_the_job(kind: str, folders: dict[str, Path], data: Path, tmp_path: Path) -> None:
    result = calibrate(data, folders[kind], tmp_path)
    assert json.dumps(result, allow_nan=False)
    model = load(folders[kind])
    prompts = cut(corpus.load(data, "train"), 32, 12 * 32, 0)
    cosine = observe(model, prompts.ids, mass=False).cosine.double().mean(2)
    found = result["importances"]["cosine"]
    assert found["layers"]["mean"] == pytest.approx(cosine.mean(0).tolist(), abs=1e-6)
    assert found["layers"]["std"] == pytest.approx(cosine.std(0).tolist(), abs=1e-6)
    middle = cosine.sort(0).values[5:7].mean(0).tolist()
    assert found["layers"]["quantiles"]["0.5"] == pytest.approx(middle, abs=1e-6)
    assert result["samples"] == 12
    assert result["rows"] == (8 if kind == "block" else 32)
    assert result["documents"] == len(prompts.documents.unique())

    readers = {
        "shared": [[0], [1], [2, 3], [4, 5]],
        "upward": [[0], [1], [2, 3], [4], [5]],
        "by row": [[0], [1], [2, 3], [4], [5]],
    }.get(kind, [[layer] for layer in range(6)])
    assert result["readers"] == readers
    lowest = [cosine[:, layers].amin(1).mean().item() for layers in readers]
    assert found["kv_layers"]["mean"] == pytest.approx(lowest, abs=1e-6)
    budgets = result["budgets"]
    assert budgets["groups"] == three_means(found["kv_layers"]["mean"])
    assert budgets["shares"] == pytest.approx(shares_of(lowest, 0.35).tolist(), abs=1e-9)
    assert sum(budgets["shares"]) == pytest.approx(len(readers))
    assert len(budgets["kv_layers"]) == len(readers)

    assert json.loads((tmp_path / "calibration.json").read_text())["budgets"] == budgets
    samples = load_file(tmp_path / "importances.safetensors")
    torch.testing.assert_close(samples["cosine"].double(), cosine, atol=1e-6, rtol=0)
    assert samples["mass"].shape == (12, 6)


def test_a_batch_of_samples_is_each_sample_alone(
    folders: dict[str, Path], data: Path, tmp_path: Path
) -> None:
    for kind in ("full", "block"):
        one = calibrate(data, folders[kind], tmp_path, batch_size=1)
        all_ = calibrate(data, folders[kind], tmp_path, batch_size=64)
        for name in ("cosine", "mass"):
            for part in ("mean", "std"):
                expected = all_["importances"][name]["layers"][part]
                got = one["importances"][name]["layers"][part]
                assert got == pytest.approx(expected, abs=1e-6)


def test_a_shorter_prompt_is_the_beginning_of_a_longer(
    folders: dict[str, Path], data: Path, tmp_path: Path
) -> None:
    for kind, span in (("full", 1), ("upward", 1), ("block", 4)):
        model = load(folders[kind])
        prompts = cut(corpus.load(data, "train"), 32, 12 * 32, 0)
        lengths = calibrate(data, folders[kind], tmp_path)["lengths"]
        assert [each["tokens"] for each in lengths] == [4, 8, 16, 32]
        for each in lengths:
            assert each["tokens"] == each["rows"] * span
            short = observe(model, prompts.ids[:, : each["tokens"]], mass=False).cosine
            per_layer = short.double().mean(2)
            if kind == "upward":
                per_layer = torch.stack(
                    [per_layer[:, r].amin(1) for r in ([0], [1], [2, 3], [4], [5])], dim=1
                )
            assert each["mean"] == pytest.approx(per_layer.mean(0).tolist(), abs=1e-5)
        assert lengths[-1]["agreement"] == 1
        assert lengths[-1]["moved"] == 0


def test_mass_can_decide(folders: dict[str, Path], data: Path, tmp_path: Path) -> None:
    result = calibrate(data, folders["shared"], tmp_path, importance=["mass"], p=None)
    assert list(result["importances"]) == ["mass"]
    spread = torch.tensor(result["importances"]["mass"]["kv_layers"]["mean"]).double()
    assert result["budgets"]["groups"] == three_means((1 - spread).tolist())
    layers = load_file(tmp_path / "importances.safetensors")["mass"]
    widest = [layers[:, r].amax(1).mean().item() for r in ([0], [1], [2, 3], [4, 5])]
    assert spread.tolist() == pytest.approx(widest, abs=1e-6)


def slow_rank_correlation(one: list[float], other: list[float]) -> float:
    def ranks(values: list[float]) -> Tensor:
        return torch.tensor(
            [sum(b < a for b in values) + (values.count(a) - 1) / 2 for a in values],
            dtype=torch.float64,
        )

    return float(torch.corrcoef(torch.stack((ranks(one), ranks(other))))[0, 1])


def test_stability_by_hand() -> None:
    torch.manual_seed(1)
    centre = torch.tensor([0.1, 0.5, 0.55, 0.9, 0.92, 0.7], dtype=torch.float64)
    values = centre + 0.08 * torch.randn(20, 6, dtype=torch.float64)
    values[0, 1] = values[0, 2]
    sections = torch.arange(20) * 3 // 20
    found = stability(values, 0.4, sections)
    groups = [three_means(row) for row in values.tolist()]
    cut_sets = [tuple(g == 2 for g in row) for row in groups]
    assert len(set(cut_sets)) > 1
    pairs = list(combinations(range(20), 2))
    agreement = sum(agreed(groups[a], groups[b]) for a, b in pairs) / len(pairs)
    assert found["agreement"] == pytest.approx(agreement)
    alike = [sum(x == y for x, y in zip(groups[a], groups[b], strict=True)) / 6 for a, b in pairs]
    assert found["agreement_of_groups"] == pytest.approx(sum(alike) / len(pairs))
    assert found["as_majority"] == max(cut_sets.count(s) for s in cut_sets) / 20
    mean = three_means(values.mean(0).tolist())
    assert found["as_mean"] == sum(s == tuple(g == 2 for g in mean) for s in cut_sets) / 20
    ranked = [slow_rank_correlation(values[a].tolist(), values[b].tolist()) for a, b in pairs]
    assert found["rank_correlation"] == pytest.approx(sum(ranked) / len(pairs))
    with_mean = [slow_rank_correlation(v, values.mean(0).tolist()) for v in values.tolist()]
    assert found["least_rank_correlation"] == pytest.approx(min(with_mean))
    fixed = shares_of(values.mean(0).tolist(), 0.4)
    away = [float((shares_of(v, 0.4) - fixed).clamp_min(0).sum() / 6) for v in values.tolist()]
    assert found["moved"] == pytest.approx(sum(away) / 20)
    assert found["moved_most"] == pytest.approx(max(away))
    assert [part["samples"] for part in found["sections"]] == [7, 7, 6]
    assert found["sections"][1]["groups"] == three_means(values[7:14].mean(0).tolist())


def test_samples_that_are_alike_are_stable_and_opposite_ones_are_not() -> None:
    row = torch.tensor([0.1, 0.12, 0.5, 0.52, 0.9, 0.95], dtype=torch.float64)
    same = stability(row.expand(8, 6), 0.35, torch.arange(8) // 4)
    for key in ("as_mean", "as_majority", "agreement", "agreement_of_groups", "section_agreement"):
        assert same[key] == 1
    assert same["rank_correlation"] == pytest.approx(1)
    assert same["moved"] == same["sections_moved"] == 0
    both = torch.cat((row.expand(4, 6), row.flip(0).expand(4, 6)))
    apart = stability(both, 0.35, torch.arange(8) // 4)
    assert apart["as_majority"] == 0.5
    assert apart["section_agreement"] == pytest.approx(2 / 6)
    # Two of six layers keep 0.35 instead of 1.325, and two the reverse.
    assert apart["sections_moved"] == pytest.approx(2 * (1.325 - 0.35) / 6)
    assert apart["agreement"] < 0.7


def test_equal_layers_have_equal_budgets() -> None:
    found = stability(torch.full((4, 5), 0.5, dtype=torch.float64), 0.35, torch.arange(4) // 2)
    assert found["groups"] == [0] * 5
    assert found["moved"] == 0
    assert found["rank_correlation"] == 0
    assert float(moved(torch.tensor([2.0, 0.0]), torch.tensor([1.0, 1.0]))) == 0.5


def test_too_little_text_is_one_line(folders: dict[str, Path], data: Path, tmp_path: Path) -> None:
    with pytest.raises(JobError, match=r"train part .* holds \d+ prompts of 32 tokens, samples"):
        calibrate(data, folders["full"], tmp_path, samples=100_000)
    held = calibrate(data, folders["full"], tmp_path, part="heldout", samples=4)
    assert held["samples"] == 4


def test_broken_weights_are_one_line(folders: dict[str, Path], data: Path, tmp_path: Path) -> None:
    broken = tmp_path / "broken"
    broken.mkdir()
    for file in folders["full"].iterdir():
        (broken / file.name).write_bytes(file.read_bytes())
    weights = load_file(broken / "model.safetensors")
    name = next(n for n in weights if n.endswith("layers.2.mlp.up.weight"))
    weights[name][0, 0] = float("nan")
    save_file(weights, broken / "model.safetensors")
    with pytest.raises(JobError, match="not finite"):
        calibrate(data, broken, tmp_path)


def test_it_stops_when_asked(folders: dict[str, Path], data: Path, tmp_path: Path) -> None:
    inputs = {"data": data, "of": folders["full"]}
    with pytest.raises(Stopped):
        run_cell("calibrate", SPEC, inputs, tmp_path, stop_after=1)
