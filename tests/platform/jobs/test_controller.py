"""Labels, the controller that learns them, and jobs that release and rebuild by it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from kvlab.methods.build import build
from kvlab.methods.cache.opening import open_cache
from kvlab.methods.decoder.config import DecoderConfig, llama
from kvlab.methods.eviction.adore.controller import load as load_controller
from kvlab.methods.eviction.adore.labels import attention, most_attended, under
from kvlab.methods.registry import resolve
from kvlab.methods.store import load
from kvlab.platform.jobs.context import JobError, Stopped
from kvlab.platform.jobs.label.recall import Recalls, kept_for
from kvlab.platform.jobs.local import run_cell

LABEL = {
    "top": 4, "aggregate": "mean", "samples": 40, "held_out": 6, "sequence_length": 32,
    "batch_size": 5, "dtype": "auto", "seed": 0, "per": "model",
}  # fmt: skip
TRAIN = {
    "state": "gru", "hidden": 16, "position": "relative", "match": 8, "epochs": 6, "batch_size": 4,
    "queries": 16, "learning_rate": 5e-3, "seed": 0,
}  # fmt: skip


@pytest.fixture(scope="module")
def labels(data: Path, base: Path, tmp_path_factory: pytest.TempPathFactory) -> Any:
    """The folder of a label job, and its result."""
    folder = tmp_path_factory.mktemp("labels")
    return folder, run_cell("label", LABEL, {"data": data, "of": base}, folder)


@pytest.fixture(scope="module")
def controller(base: Path, labels: Any, tmp_path_factory: pytest.TempPathFactory) -> Any:
    """The folder of a controller job, and its result."""
    folder = tmp_path_factory.mktemp("controller")
    return folder, run_cell("controller", TRAIN, {"of": base, "labels": labels[0]}, folder)


class TestAttention:
    """What one pass shows is what a cache sees, step by step."""

    @pytest.mark.parametrize("per", ["model", "layer"])
    @pytest.mark.parametrize("aggregate", ["mean", "max"])
    def test_step_by_step(self, aggregate: Any, per: Any) -> None:
        torch.manual_seed(0)
        model = build(DecoderConfig(53, **llama(32, 3, 4, 2, 48)), resolve({})).double().eval()
        ids = torch.randint(0, 53, (2, 9))
        found = attention(model, ids, aggregate=aggregate, per=per)
        assert found.shape == (2, 3 if per == "layer" else 1, 9, 9)
        for t in range(9):
            wanted = last_row(model, ids[:, : t + 1], aggregate, per)
            assert torch.allclose(found[:, :, t, : t + 1], wanted)
            assert not found[:, :, t, t + 1 :].any()

    def test_the_most_attended(self) -> None:
        attended = torch.tensor([[[1.0, 0, 0], [0.4, 0.6, 0], [0.5, 0.2, 0.3]]])
        assert most_attended(attended, 2).tolist() == [
            [[True, False, False], [True, True, False], [True, False, True]]
        ]

    def test_a_mask_hides_what_is_not_marked(self) -> None:
        """In one layer nothing else carries a token on."""
        torch.manual_seed(0)
        model = build(DecoderConfig(53, **llama(32, 1, 4, 2, 48)), resolve({})).double().eval()
        ids = torch.randint(0, 53, (1, 9))
        marks = torch.ones(1, 9, 9, dtype=torch.bool)
        full = model(ids).nll
        assert torch.equal(model(ids, apply=under(marks)).nll, full)
        marks[:, 5:, 2] = False
        other = ids.clone()
        other[:, 2] = (ids[:, 2] + 1) % 53
        one, two = (model(text, apply=under(marks)).nll for text in (ids, other))
        assert torch.equal(one[:, 6:], two[:, 6:])  # row t tells token t + 1
        assert not torch.allclose(one[:, 4:6], two[:, 4:6])
        assert not torch.allclose(model(other).nll[:, 6:], full[:, 6:])


def last_row(model: Any, ids: Tensor, aggregate: str, per: str) -> Tensor:
    """How much the last token attends to each [B, L, T], from the key mass of one decode step."""
    seen = []
    method = resolve({"h2o": {}, "uniform": {"tokens": 64}})
    sizes = {"tokens": 16, "device": ids.device, "dtype": torch.float64}
    cache = open_cache(model.decoder.config, method, batch=len(ids), **sizes)
    observe = cache.observe

    def watched(layer: int, before: Tensor, after: Tensor, mass: Tensor | None) -> None:
        assert mass is not None
        seen.append(mass)
        observe(layer, before, after, mass)

    with torch.no_grad():
        rows = ids.shape[1] - 1
        places = torch.arange(rows + 1).expand(len(ids), -1)
        if rows:
            model.decoder.body(model.decoder.embed(ids[:, :rows]), places[:, :rows], cache)
        cache.observe = watched
        model.decoder.body(model.decoder.embed(ids[:, rows:]), places[:, rows:], cache)
    every = torch.stack(seen, dim=1)
    every = every.mean(2) if aggregate == "mean" else every.amax(2)
    if per == "layer":
        return every
    return every.mean(1, keepdim=True) if aggregate == "mean" else every.amax(1, keepdim=True)


class TestLabel:
    def test_labels_are_what_the_model_attends_to(self, base: Path, labels: Any) -> None:
        tensors = load_file(labels[0] / "labels.safetensors")
        assert tensors["train.ids"].shape == (40, 32)
        assert tensors["heldout.labels"].shape == (6, 1, 32, 4)
        model = load(base).eval()
        ids = tensors["train.ids"].long()
        attended = attention(model, ids)
        for text in (0, 17, 39):
            for t in (0, 2, 9, 31):
                places = [p for p in tensors["train.labels"][text, 0, t].tolist() if p >= 0]
                wanted = attended[text, 0, t].topk(min(4, t + 1)).indices.tolist()
                assert set(places) == set(wanted)
                assert places == sorted(places)

    def test_rivals_and_cover(self, labels: Any) -> None:
        result = labels[1]
        assert 0 < result["covered"] <= 1
        assert set(result["rivals"]) == {"h2o", "recency"}
        assert result["rivals"] == json.loads((labels[0] / "rivals.json").read_text())
        for rival in result["rivals"].values():
            assert list(rival["recall"]) == ["4", "8", "16"]
            shares = list(rival["recall"].values())
            assert 0 < shares[0] <= shares[1] <= shares[2] <= 1

    def test_too_little_text(self, data: Path, base: Path, tmp_path: Path) -> None:
        spec = {**LABEL, "held_out": 100_000}
        with pytest.raises(JobError, match="texts of 32 tokens, held_out asks for 100000"):
            run_cell("label", spec, {"data": data, "of": base}, tmp_path)

    def test_it_stops_when_asked(self, data: Path, base: Path, tmp_path: Path) -> None:
        with pytest.raises(Stopped):
            run_cell("label", LABEL, {"data": data, "of": base}, tmp_path, stop_after=0)


class TestRecalls:
    def test_against_plain_python(self) -> None:
        draw = torch.Generator().manual_seed(0)
        scores = torch.rand(2, 12, 12, generator=draw)
        marks = torch.rand(2, 12, 12, generator=draw).tril().topk(3).indices
        wanted = torch.zeros(2, 12, 12, dtype=torch.bool).scatter_(-1, marks, True).tril()
        found = Recalls((3, 6))
        found.see("it", scores[:1], wanted[:1])
        found.see("it", scores[1:], wanted[1:])
        result: Any = found.result()["it"]
        for m in (3, 6):
            shares = []
            for b in range(2):
                for t in range(m, 12):
                    order = sorted(range(t + 1), key=lambda s: -float(scores[b, t, s]))
                    true = {s for s in range(t + 1) if wanted[b, t, s]}
                    shares.append(len(true & set(order[:m])) / max(1, len(true)))
            assert result["recall"][str(m)] == pytest.approx(sum(shares) / len(shares))

    def test_kept(self) -> None:
        assert kept_for(16, 256) == (16, 32, 64)
        assert kept_for(16, 40) == (16, 32)


class TestController:
    def test_it_learns(self, controller: Any, labels: Any) -> None:
        """Better than the newest tokens, and than one that has hardly been trained."""
        result = controller[1]
        assert result["rivals"] == labels[1]["rivals"]
        assert result["top"] == 4
        assert result["recall"]["4"] > result["rivals"]["recency"]["recall"]["4"] + 0.05
        assert load_controller(controller[0], torch.device("cpu")).config.width == 32
        assert result["parameters"] * 4 == result["bytes"]

    def test_the_same_again(self, base: Path, labels: Any, controller: Any, tmp_path: Path) -> None:
        run_cell("controller", TRAIN, {"of": base, "labels": labels[0]}, tmp_path)
        one = load_file(tmp_path / "controller.safetensors")
        for name, tensor in load_file(controller[0] / "controller.safetensors").items():
            assert torch.equal(one[name], tensor)

    def test_an_evaluate_job_uses_it(
        self, data: Path, base: Path, controller: Any, tmp_path: Path
    ) -> None:
        assert_rebuilding_helps({"data": data, "of": base, "controller": controller[0]}, tmp_path)

    def test_of_each_layer(self, data: Path, base: Path, tmp_path: Path) -> None:
        """Labels, scores and what is kept are each KV layer's own."""
        labels, controller = tmp_path / "labels", tmp_path / "controller"
        labels.mkdir()
        controller.mkdir()
        run_cell("label", {**LABEL, "per": "layer"}, {"data": data, "of": base}, labels)
        layers = len(load(base).config.kv_layers)
        places = load_file(labels / "labels.safetensors")["train.labels"]
        assert places.shape == (40, layers, 32, 4)
        assert not torch.equal(places[:, 0], places[:, 1])
        result = run_cell("controller", TRAIN, {"of": base, "labels": labels}, controller)
        assert load_controller(controller, torch.device("cpu")).config.layers == layers
        assert result["recall"]["4"] > result["rivals"]["recency"]["recall"]["4"] + 0.05
        inputs = {"data": data, "of": base, "controller": controller}
        assert_rebuilding_helps(inputs, tmp_path, per="layer")

    def test_a_benchmark_counts_its_state(
        self, base: Path, controller: Any, tmp_path: Path
    ) -> None:
        spec = {
            "prompt": 24, "generate": 8, "batch": [2], "repeats": 1, "warmup": 0,
            "apply": resolve({"adore": {}, "uniform": {"tokens": 8}}).to_dict(),
            "kv_budget": None, "dtype": "auto", "seed": 0, "controller": True,
        }  # fmt: skip
        inputs = {"of": base, "controller": controller[0]}
        row = run_cell("benchmark", spec, inputs, tmp_path)["rows"][0]
        assert row["kv_bytes_per_token"] > 0


def assert_rebuilding_helps(inputs: dict[str, Path], tmp_path: Path, **settings: Any) -> None:
    spec = {
        "metrics": ["divergence"], "sequence_length": 32, "tokens": 640, "batch_size": 8,
        "first_target": 1, "dtype": "auto", "seed": 0,
        "divergence": {"prompt": 20, "generate": 8},
    }  # fmt: skip
    found = []
    for rebuild in (0, 4, 32):
        adore = {"rebuild": rebuild, **settings}
        method = resolve({"adore": adore, "uniform": {"tokens": 6}})
        asked = {**spec, "apply": method.to_dict(), "controller": True}
        found.append(run_cell("evaluate", asked, inputs, tmp_path)["divergence"]["kl"])
    assert found[0] > found[2]
    assert found[2] == pytest.approx(0, abs=1e-6)  # all that was released is rebuilt


def test_training_on_under_a_sparse_mask(
    data: Path, base: Path, train_spec: Any, tmp_path: Path
) -> None:
    """Under the mask the model that was trained so predicts better than its parent does."""
    spec = train_spec(tokens=4096, learning_rate=3e-3)
    del spec["model"]
    spec |= {"stage": 1, "lora": None, "distill": None, "sparse": {"top": 2, "aggregate": "mean"}}
    run_cell("uptrain", spec, {"data": data, "from": base}, tmp_path)
    parent, child = load(base).eval(), load(tmp_path).eval()
    ids = load_file_ids(data)
    mask = under(most_attended(attention(parent, ids), 2)[:, 0])
    with torch.no_grad():
        before, after = (float(m(ids, apply=mask).nll.mean()) for m in (parent, child))
    assert after < before


def load_file_ids(data: Path) -> Tensor:
    from kvlab.platform.data import corpus

    return corpus.load(data, "heldout").tokens[: 20 * 32].long().view(20, 32)
