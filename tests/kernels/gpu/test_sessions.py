"""Whole sessions whose every answer a kernel gives, against the same on the twins."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from kvlab.kernels import choice
from kvlab.kernels.stored import Stored
from kvlab.methods.block_transformer.model import BlockTransformer
from kvlab.methods.block_transformer.rows import RequestRows
from kvlab.methods.build import build
from kvlab.methods.decoder.config import DecoderConfig, llama
from kvlab.methods.decoder.graph import Greedy, capture_on
from kvlab.methods.eviction.adore.controller import Controller
from kvlab.methods.eviction.adore.sizes import ControllerConfig
from kvlab.methods.model import LanguageModel
from kvlab.methods.registry import resolve

VOCABULARY, PROMPT, STEPS = 53, 12, 5
KIVI = {"kivi": {"group": 8, "residual": 8}}
BLOCKS = {"block_transformer": {"block_length": 3, "encoder_width": 32}}
CASES: dict[str, tuple[dict[str, Any], dict[str, Any], set[str]]] = {
    "full": ({}, {}, {"forward"}),
    "h2o": ({}, {"h2o": {}, "uniform": {"tokens": 6}}, {"forward", "evict"}),
    "streaming_llm": ({}, {"streaming_llm": {}, "uniform": {"tokens": 8}}, {"forward", "evict"}),
    "sliding_window": ({}, {"sliding_window": {}, "uniform": {"share": 0.5}}, {"evict"}),
    "snapkv": ({}, {"snapkv": {"window": 3}, "uniform": {"tokens": 7}}, {"forward"}),
    "squeeze": ({}, {"h2o": {}, "squeeze_attention": {"tokens": 8}}, {"evict", "cosine"}),
    "adore": (
        {},
        {"adore": {"scores": "rule", "recent": 2, "rebuild": 3}, "uniform": {"tokens": 6}},
        {"forward", "evict"},
    ),
    "block_transformer": (BLOCKS, {}, {"forward", "tokens"}),
    "int8": ({}, {"int8": {}}, {"forward"}),
    "fp8": ({}, {"fp8": {}, "h2o": {}, "uniform": {"tokens": 6}}, {"forward", "mass"}),
    "unrotated int8": (
        {},
        {"int8": {}, "streaming_llm": {}, "uniform": {"tokens": 8}},
        {"forward", "evict"},
    ),
    "kivi": ({}, KIVI, {"forward"}),
    "kivi h2o": ({}, {**KIVI, "h2o": {}, "uniform": {"tokens": 7}}, {"forward", "mass"}),
    "unrotated kivi": (
        {},
        {**KIVI, "streaming_llm": {}, "uniform": {"tokens": 7}},
        {"forward", "evict"},
    ),
}

FROZEN = [case for case in CASES if "adore" not in case and "kivi" not in case]


@pytest.fixture(scope="module")
def model() -> Callable[[dict[str, Any]], LanguageModel]:
    """A function from a method to a tiny model, with logits far apart."""
    made: dict[str, LanguageModel] = {}

    def get(method: dict[str, Any]) -> LanguageModel:
        name = str(method)
        if name not in made:
            torch.manual_seed(0)
            config = DecoderConfig(VOCABULARY, **llama(32, 2, 4, 2, 48))
            made[name] = build(config, resolve(method)).eval()
            for parameter in made[name].parameters():
                mean = 1.0 if parameter.dim() == 1 else 0.0
                torch.nn.init.normal_(parameter, mean=mean, std=0.25)
        return made[name]

    return get


@contextmanager
def by_kernels(device: torch.device) -> Iterator[None]:
    """Let kernels answer, interpreted ones where there is no GPU."""
    if device.type == "cuda":
        yield
        return
    asked = choice.fused
    with pytest.MonkeyPatch.context() as patch:
        for name, module in list(sys.modules.items()):
            if name.startswith("kvlab.") and vars(module).get("fused") is asked:
                patch.setattr(module, "fused", lambda x: True)
        yield


def run(
    model: LanguageModel, apply: dict[str, Any], device: torch.device, *, freeze: bool = False
) -> tuple[Tensor, Tensor]:
    """The tokens [STEPS, B] that a greedy session chooses, and their logits.

    Args: freeze: as soon as it can be; which must come.
    """
    draw = torch.Generator().manual_seed(3)
    ids = torch.randint(1, VOCABULARY, (2, PROMPT), generator=draw).to(device)
    valid = torch.arange(PROMPT, device=device) >= torch.tensor([[0], [5]], device=device)
    session = model.to(device).start(
        ids, valid, new_tokens=STEPS, apply=resolve(apply) if apply else None
    )
    tokens, logits, frozen = [], [], False
    for _ in range(STEPS):
        logits.append(session.logits.cpu())
        tokens.append(session.logits.argmax(-1))
        frozen |= freeze and session.freeze()
        session.step(tokens[-1])
    assert frozen == freeze
    return torch.stack(tokens).cpu(), torch.stack(logits)


@pytest.mark.parametrize("case", CASES)
def test_a_session_on_kernels_is_one_on_twins(
    device: torch.device,
    case: str,
    model: Callable[[dict[str, Any]], LanguageModel],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    method, apply, wanted = CASES[case]
    with choice.torch_only():
        tokens, logits = run(model(method), apply, device)
    asked: set[str] = set()
    monkeypatch.setattr(Stored, "rows", None)  # kernels read rows as they lie
    with by_kernels(device), watching(asked):
        found, close = run(model(method), apply, device)
    assert wanted <= asked
    torch.testing.assert_close(close, logits, rtol=1e-4, atol=1e-4)
    assert torch.equal(found, tokens)


@pytest.mark.parametrize("case", FROZEN)
def test_frozen_steps_on_kernels_are_those_on_twins(
    device: torch.device, case: str, model: Callable[[dict[str, Any]], LanguageModel]
) -> None:
    method, apply, wanted = CASES[case]
    with choice.torch_only():
        tokens, logits = run(model(method), apply, device)
    asked: set[str] = set()
    with by_kernels(device), watching(asked):
        found, close = run(model(method), apply, device, freeze=True)
    assert wanted <= asked
    torch.testing.assert_close(close, logits, rtol=1e-4, atol=1e-4)
    assert torch.equal(found, tokens)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="captures a CUDA graph")
@pytest.mark.parametrize("case", FROZEN)
def test_a_captured_session_is_an_eager_one(
    case: str, model: Callable[[dict[str, Any]], LanguageModel]
) -> None:
    method, apply, _ = CASES[case]
    device = torch.device("cuda")
    ids = torch.arange(1, 2 * PROMPT + 1, device=device).view(2, -1)
    found = []
    for capture in (capture_on(device), None):
        session = model(method).to(device).start(ids, new_tokens=60, apply=resolve(apply))
        greedy, tokens = Greedy(session, capture), []
        while len(tokens) < 60:
            tokens.extend(greedy.more(60 - len(tokens)))
        found.append((torch.stack(tokens), session.step(tokens[-1])))
        assert (greedy.replayed >= 45) == (capture is not None)
    (ours, logits), (theirs, others) = found
    assert torch.equal(ours, theirs)
    torch.testing.assert_close(logits, others, rtol=1e-4, atol=1e-4)


@contextmanager
def watching(asked: set[str]) -> Iterator[None]:
    """Note whose kernels are launched."""
    from triton.runtime import KernelInterface

    launch = KernelInterface.__getitem__

    def noted(self: Any, grid: Any) -> Any:
        asked.add(self.fn.__module__.rpartition(".")[2])
        return launch(self, grid)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(KernelInterface, "__getitem__", noted)
        yield


@pytest.mark.parametrize("per", ["model", "layer"])
def test_adore_by_its_controller(
    device: torch.device,
    per: str,
    tmp_path: Path,
    model: Callable[[dict[str, Any]], LanguageModel],
) -> None:
    torch.manual_seed(1)
    config = ControllerConfig(VOCABULARY, 32, hidden=16, match=8, layers=1 if per == "model" else 2)
    controller = Controller(config)
    for parameter in controller.parameters():
        torch.nn.init.normal_(parameter, std=0.5)
    controller.save(tmp_path)
    settings = {"controller": str(tmp_path), "per": per, "recent": 2, "rebuild": 3, "refresh": 2}
    apply = {"adore": settings, "uniform": {"tokens": 6}}
    with choice.torch_only():
        tokens, logits = run(model({}), apply, device)
    asked: set[str] = set()
    with by_kernels(device), watching(asked):
        found, close = run(model({}), apply, device)
    assert {"adore", "evict", "forward"} <= asked
    torch.testing.assert_close(close, logits, rtol=1e-4, atol=1e-4)
    assert torch.equal(found, tokens)


def test_a_servers_blocks_on_kernels_are_those_on_twins(
    device: torch.device, model: Callable[[dict[str, Any]], LanguageModel]
) -> None:
    """Requests at different places in their blocks; what stands behind a place may be anything."""
    transformer = model(BLOCKS).to(device)
    assert isinstance(transformer, BlockTransformer)
    decoder = transformer.token_decoder
    layers = decoder.open(3).stored()
    kv = torch.randn(layers.shape, generator=torch.Generator().manual_seed(4)).to(device)
    tokens, places = torch.tensor([[5, 9, 2], [0, 1, 1]], device=device)
    with torch.inference_mode(), choice.torch_only():
        expected = decoder.append_at(tokens, places, RequestRows(kv.clone()))
    asked: set[str] = set()
    with torch.inference_mode(), by_kernels(device), watching(asked):
        found = decoder.append_at(tokens, places, RequestRows(kv.clone()))
    assert asked == {"tokens"}
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)
