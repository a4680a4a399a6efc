"""The reference implementation's own numbers (tests/golden/cross_layer/README.json)."""

from __future__ import annotations

import json
import os
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from kvlab.methods.build import build
from kvlab.methods.cache.interface import Step
from kvlab.methods.cache.opening import open_cache
from kvlab.methods.decoder.config import DecoderConfig, Sharing, llama
from kvlab.methods.decoder.generation import generate
from kvlab.methods.decoder.language_model import TokenModel
from kvlab.methods.model import LanguageModel
from kvlab.methods.registry import resolve

FOLDERS = [Path(__file__).parents[2] / "golden/cross_layer"]
if "KVLAB_GOLDEN" in os.environ:
    FOLDERS.append(Path(os.environ["KVLAB_GOLDEN"]) / "cross_layer")
CASES = {
    path.stem: path
    for folder in FOLDERS
    for path in sorted(folder.glob("*.safetensors"))
    if not path.stem.startswith("convert_")
}
CLOSE = {"atol": 5e-5, "rtol": 0.0}
GRADIENTS = {"atol": 2e-5, "rtol": 0.0}


class Case:
    """One golden file: its tensors, and the model that its weights make."""

    def __init__(self, path: Path) -> None:
        self.tensors = load_file(path)
        about = json.loads((path.parent / "README.json").read_text())["cases"][path.stem]
        self.about = about["config"]
        self.config = config_of(self.about)
        self.ids = self.tensors["input_ids"]

    def __getitem__(self, name: str) -> Tensor:
        return self.tensors[name]

    def named(self, prefix: str) -> dict[str, Tensor]:
        """The tensors below a prefix under our names."""
        return {
            ours: torch.cat([self.tensors[f"{prefix}.{name}"] for name in theirs])
            for ours, theirs in names(self.config)
        }

    def model(self, **sharing: Any) -> TokenModel:
        """The model, with changes of how it shares."""
        assert self.config.sharing is not None
        config = self.config.with_(sharing=replaced(self.config.sharing, **sharing))
        return self.filled(TokenModel(config, resolve({})))

    def filled(self, model: LanguageModel) -> TokenModel:
        """A model of this shape, with the file's weights."""
        assert isinstance(model, TokenModel)
        model.load_state_dict({f"decoder.{n}": w for n, w in self.named("weights").items()})
        return model.eval()


def replaced(sharing: Sharing, **changes: Any) -> Sharing:
    return Sharing(**{name: getattr(sharing, name) for name in sharing.__slots__} | changes)


def config_of(theirs: dict[str, Any]) -> DecoderConfig:
    """Our config: an `s` behind a layer's number in `layer_types` stands for a window."""
    kinds = re.findall(r"(\d+)(s?)", theirs["layer_types"])
    window = theirs["sliding_window"]
    windows = tuple(window if windowed else None for _, windowed in kinds)
    sizes = llama(
        theirs["hidden_size"], len(kinds), theirs["num_attention_heads"],
        theirs["num_key_value_heads"], theirs["intermediate_size"],
    )  # fmt: skip
    return DecoderConfig(
        **sizes,
        vocab_size=theirs["vocab_size"],
        norm_eps=theirs["rms_norm_eps"],
        rope_theta=theirs["rope_theta"],
        windows=windows if any(windows) else None,
        sharing=Sharing(
            tuple(int(layer) for layer, _ in kinds),
            theirs["force_nodiag"],
            theirs["forward_passes"],
            theirs["backward_passes"],
        ),
    )


def names(config: DecoderConfig) -> list[tuple[str, list[str]]]:
    """Each of our tensors and theirs that it is stacked from."""
    found = [
        ("embedding.weight", ["model.embed_tokens.weight"]),
        ("norm.weight", ["model.norm.weight"]),
        ("output.weight", ["lm_head.weight"]),
    ]
    for i in range(config.layers):
        ours, theirs = f"layers.{i}", f"model.layers.{i}"
        parts = "qkv" if i in config.kv_layers else "q"
        found += [
            (f"{ours}.attention_norm.weight", [f"{theirs}.input_layernorm.weight"]),
            (f"{ours}.mlp_norm.weight", [f"{theirs}.post_attention_layernorm.weight"]),
            (f"{ours}.attention.out.weight", [f"{theirs}.self_attn.o_proj.weight"]),
            (
                f"{ours}.attention.qkv.weight",
                [f"{theirs}.self_attn.{part}_proj.weight" for part in parts],
            ),
        ]
        for part in ("gate", "up", "down"):
            found.append((f"{ours}.mlp.{part}.weight", [f"{theirs}.mlp.{part}_proj.weight"]))
    return found


@pytest.fixture(params=list(CASES.values()), ids=list(CASES))
def case(request: pytest.FixtureRequest) -> Case:
    return Case(request.param)


def passes(case: Case) -> tuple[int, int]:
    assert case.config.sharing is not None
    return case.config.sharing.forward_passes, case.config.sharing.backward_passes


def test_the_slow_twin_is_the_reference(case: Case, twin: Any) -> None:
    """What the other tests of this folder compare with: logits, gradients, rows and greedy ids."""
    slow = twin(case.config, case.named("weights"))
    losses = []
    for sample, ids in enumerate(case.ids):
        with torch.no_grad():
            converged = slow.exact(ids)
        torch.testing.assert_close(converged.float(), case["logits_converged"][sample], **CLOSE)
        logits, rows = slow.passes(ids, *passes(case))
        torch.testing.assert_close(logits.float(), case["logits"][sample], **CLOSE)
        losses.append(torch.nn.functional.cross_entropy(logits[:-1], ids[1:]))
        for layer, kept in rows.items():
            for part, some in zip("kv", zip(*kept, strict=True), strict=True):
                found = torch.stack(some, 1).float()
                golden = case[f"prefill.{part}.{layer}"][sample]
                torch.testing.assert_close(found, golden, **CLOSE)
        with torch.no_grad():
            token = logits[-1].argmax()
            for golden in case["gen_ids"][sample]:
                assert token == golden
                token = slow.exact(token[None], rows)[-1].argmax()
    torch.stack(losses).mean().backward()
    for name, golden in case.named("grad").items():
        torch.testing.assert_close(slow.weights[name].grad.float(), golden, **GRADIENTS)


def test_logits_loss_and_gradients(case: Case) -> None:
    model = case.model()
    logits, scored = model.predictions(case.ids)
    torch.testing.assert_close(logits[:, 1:], case["logits"][:, :-1], **CLOSE)
    decoder = model.decoder
    with torch.no_grad():
        whole = decoder.head(decoder.body(decoder.embed(case.ids), ids=case.ids))
    torch.testing.assert_close(whole, case["logits"], **CLOSE)
    loss = model(case.ids).nll[scored].mean()
    torch.testing.assert_close(loss, case["loss"][0], atol=1e-5, rtol=0)
    loss.backward()
    golden = case.named("grad")
    found = {n.removeprefix("decoder."): p.grad for n, p in model.named_parameters()}
    assert set(found) == set(golden)
    for name, grad in found.items():
        torch.testing.assert_close(
            grad, golden[name], **GRADIENTS, msg=lambda m, n=name: f"{n}: {m}"
        )


def test_the_map_as_a_method(case: Case) -> None:
    """Their `layer_types` in a workflow's YAML, on a config that shares nothing."""
    about = case.about
    written = {
        "layers": about["layer_types"],
        "strict": about["force_nodiag"],
        "forward_passes": about["forward_passes"],
        "backward_passes": about["backward_passes"],
        **({"window": about["sliding_window"]} if "s" in about["layer_types"] else {}),
    }
    plain = case.config.with_(sharing=None, windows=None)
    model = case.filled(build(plain, resolve({"cross_layer": written})))
    assert model.acting == case.config
    with torch.no_grad():
        logits, _ = model.predictions(case.ids)
    torch.testing.assert_close(logits[:, 1:], case["logits"][:, :-1], **CLOSE)


@pytest.mark.parametrize("how", ["sequential", "as_many_passes_as_tokens"])
def test_converged_logits(case: Case, how: str) -> None:
    sequential = how == "sequential"
    tokens = case.ids.shape[1]
    model = case.model(**({"sequential": True} if sequential else {"forward_passes": tokens}))
    logits, _ = model.predictions(case.ids)
    torch.testing.assert_close(logits[:, 1:], case["logits_converged"][:, :-1], **CLOSE)


def test_prefill(case: Case) -> None:
    """What the cache holds after the prompt, read as the next token's queries would read it."""
    model, ids = case.model(), case.ids
    batch, tokens = ids.shape
    cache = open_cache(
        model.decoder.config, None, batch=batch, tokens=tokens + 1, device=ids.device,
        dtype=torch.float32,
    )  # fmt: skip
    with torch.inference_mode():
        embedded = model.decoder.embed(ids)
        model.decoder.body(embedded, torch.arange(tokens).expand(batch, tokens), cache, ids)
        cache.plan(Step(1, ids[:, :1], torch.full((batch, 1), tokens)))
    for layer in case.config.kv_layers:
        keys = cache.read(layer)
        assert keys.positions is not None
        readers = [i for i, kv in enumerate(case.config.kv_of) if kv == layer]
        windows = [case.config.windows[i] if case.config.windows else None for i in readers]
        reach = max(tokens + 1 if window is None else window for window in windows)
        expected = list(range(tokens + 1 - reach, tokens))
        for sample, places in enumerate(keys.positions.tolist()):
            row_of = {place: row for row, place in enumerate(places)}
            rows = [row_of[place] for place in expected]
            for part, found in (("k", keys.k), ("v", keys.v)):
                golden = case[f"prefill.{part}.{layer}"][sample][:, expected]
                torch.testing.assert_close(found[sample][:, rows], golden, **CLOSE)


def test_greedy_ids_and_step_logits(case: Case) -> None:
    model, golden = case.model(), case["gen_ids"]
    session = model.start(case.ids, new_tokens=golden.shape[1])
    for step in range(golden.shape[1]):
        torch.testing.assert_close(session.logits, case["gen_logits"][:, step], **CLOSE)
        assert torch.equal(session.logits.argmax(-1), golden[:, step])
        session.step(golden[:, step])
    assert generate(model, case.ids.tolist(), golden.shape[1]) == golden.tolist()


def test_greedy_ids_of_a_short_prompt(case: Case) -> None:
    """Six tokens take six passes at most, as many as make them exact."""
    if "gen_short_ids" not in case.tensors:
        assert case.config.sharing is not None
        assert case.config.sharing.strict
        return
    golden = case["gen_short_ids"]
    assert generate(case.model(), case.ids[:, :6].tolist(), golden.shape[1]) == golden.tolist()
