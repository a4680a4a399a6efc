"""Whole models on an emulated device say what they say on the CPU, and decode without waiting.

Kernels are interpreted. What CUDA would refuse `tests/device.py` does.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from kvlab.methods.build import build
from kvlab.methods.decoder.config import DecoderConfig, gpt_neox, llama
from kvlab.methods.decoder.generation import generate
from kvlab.methods.eviction.adore.controller import Controller
from kvlab.methods.eviction.adore.sizes import ControllerConfig
from kvlab.methods.model import LanguageModel
from kvlab.methods.registry import resolve

VOCABULARY, PROMPT, STEPS, TURN = 53, 10, 3, 3
CUDA = torch.device("cuda")
CUT = {"uniform": {"tokens": 6}}
LLAMA = llama(32, 2, 4, 2, 48)
CASES: dict[str, tuple[dict[str, Any], dict[str, Any], dict[str, Any]]] = {
    "full": (LLAMA, {}, {}),
    "neox": (gpt_neox(32, 2, 4), {}, {"sliding_window": {"window": 5}}),
    "qwen3": (LLAMA | {"qk_norm": True, "qkv_bias": True}, {}, {"snapkv": {"window": 3}, **CUT}),
    "windows": (LLAMA | {"windows": (5, None)}, {}, {"h2o": {"generated": "keep"}, **CUT}),
    "unrotated": (LLAMA, {}, {"streaming_llm": {}, "fp8": {"scale": "none"}, **CUT}),
    "by turn": (LLAMA, {}, {"streaming_llm": {"turns": True}, "uniform": {"tokens": 14}}),
    "heads": (LLAMA, {}, {"snapkv": {"window": 3, "heads": "query"}, "pyramidkv": {"tokens": 6}}),
    "squeeze": (LLAMA, {}, {"h2o": {"positions": "cache"}, "squeeze_attention": {"tokens": 8}}),
    "topk": (LLAMA, {}, {"snapkv": {"window": 3}, "global_topk": {"tokens": 7}}),
    "rule": (LLAMA, {}, {"adore": {"scores": "rule", "recent": 2, "context": 1}, **CUT}),
    "readmit": (LLAMA, {}, {"adore": {"readmit": True, "recent": 2, "rebuild": 3}, **CUT}),
    "offload": (LLAMA, {}, {"adore": {"source": "offload", "recent": 2, "rebuild": 3}, **CUT}),
    "int8": (LLAMA, {"yoco": {"window": 5}}, {"int8": {}, "h2o": {}, **CUT}),
    "kivi": (LLAMA, {"cla": {}}, {"kivi": {"group": 8, "residual": 8}}),
    "upward": (llama(32, 4, 4, 2, 48), {"lckv": {}}, {}),
}
BLOCKS = {
    "prefix": {"block_length": 2, "embedder": "projection", "token_decoder": "prefix"},
    "cross": {"block_length": 2, "embedder": "cls", "token_decoder": "cross_attention"},
    "summation": {"block_length": 2, "embedder": "lookup", "token_decoder": "summation"},
}


def made(sizes: dict[str, Any], method: dict[str, Any]) -> LanguageModel:
    torch.manual_seed(0)
    model = build(DecoderConfig(VOCABULARY, **sizes), resolve(method)).eval()
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, mean=1.0 if parameter.dim() == 1 else 0.0, std=0.25)
    return model


def blocks(name: str) -> dict[str, Any]:
    return {"block_transformer": {"encoder_width": 32, **BLOCKS[name]}}


def texts(rows: int, seed: int) -> Tensor:
    return torch.randint(1, VOCABULARY, (2, rows), generator=torch.Generator().manual_seed(seed))


def said(
    model: LanguageModel, apply: dict[str, Any], device: torch.device, waits: list[str]
) -> tuple[Tensor, int, list[str]]:
    """What a session says to steps, a turn and steps again; its bytes; the waits of its steps."""
    ids, turn, steps = (texts(rows, rows).to(device) for rows in (PROMPT, TURN, 2 * STEPS))
    valid = (torch.arange(PROMPT) >= torch.tensor([[0], [4]])).to(device)
    session = model.to(device).start(
        ids, valid, new_tokens=2 * STEPS + TURN, apply=resolve(apply) if apply else None
    )
    logits, waited = [session.logits], []
    for number, tokens in enumerate(steps.unbind(1)):
        if number == STEPS:
            logits.append(session.extend(turn, new_tokens=STEPS))
            session.freeze()
        begun = len(waits)
        logits.append(session.step(tokens))
        waited += waits[begun:]
    return torch.stack(logits).cpu(), session.kv_bytes(), waited


def test_what_is_refused_and_what_waits(there: Any) -> None:
    from kvlab.kernels.gpu.select import best

    x = torch.ones(2, 3, device=CUDA)
    row = x[0]
    row += torch.tensor(1.0)  # a scalar of the host, on a view
    x[:, 1] = 5.0
    with pytest.raises(RuntimeError, match="cuda:0 and the CPU"):
        x + torch.ones(2, 3)
    with pytest.raises(ValueError, match="a tensor of the host"):
        best(torch.ones(2, 3), 1)
    assert not there.waits
    assert x.is_cuda
    assert x.tolist() == [[2.0, 5.0, 2.0], [1.0, 5.0, 1.0]]
    assert x[x > 2.0].shape == (2,)
    assert int(x.sum()) == 16
    assert x.cpu().device.type == "cpu"
    torch.tensor([1, 2], device=CUDA)
    asked = [wait.split(maxsplit=1)[1] for wait in there.waits]
    assert asked == ["tolist", "index by a mask", "_local_scalar_dense", "to the host",
                     "from the host"]  # fmt: skip


@pytest.mark.parametrize("case", CASES)
def test_sessions(there: Any, case: str, tmp_path: Path) -> None:
    sizes, method, apply = CASES[case]
    if case in ("readmit", "offload"):
        apply = {**apply, "adore": {**apply["adore"], "controller": str(controller(tmp_path))}}
    expected = said(made(sizes, method), apply, torch.device("cpu"), there.waits)
    found = said(made(sizes, method), apply, CUDA, there.waits)
    torch.testing.assert_close(found[0], expected[0], rtol=1e-3, atol=1e-4)
    assert found[1] == expected[1]
    each = 4 if case == "offload" else 0  # what two layers put, places of their rows and of others
    assert len(found[2]) == 2 * STEPS * each, found[2]


@pytest.mark.parametrize("name", BLOCKS)
def test_sessions_of_blocks(there: Any, name: str) -> None:
    model, apply = (llama(32, 4, 4, 2, 48), blocks(name)), {"h2o": {}, "uniform": {"tokens": 3}}
    expected = said(made(*model), apply, torch.device("cpu"), there.waits)
    found = said(made(*model), apply, CUDA, there.waits)
    torch.testing.assert_close(found[0], expected[0], rtol=1e-3, atol=1e-4)
    assert found[1:] == expected[1:]


@pytest.mark.parametrize("name", ["tokens", *BLOCKS])
def test_scores_and_a_step_of_training(there: Any, name: str) -> None:
    sizes = llama(32, 4, 4, 2, 48)
    method: dict[str, Any] = {"cla": {}} if name == "tokens" else blocks(name)
    found = []
    for device in (torch.device("cpu"), CUDA):
        model, ids = made(sizes, method).to(device), texts(PROMPT, 1).to(device)
        model.checkpoint_gradients(True)
        valid = (torch.arange(PROMPT) >= torch.tensor([[0], [4]])).to(device)
        optimizer = torch.optim.AdamW(model.train().parameters(), eps=1e-4)
        with torch.inference_mode():
            scored = model(ids, valid).nll  # a first pass brings the rotation's frequencies over
        begun = len(there.waits)
        score = model(ids, valid)
        torch.autograd.backward((score.nll * score.scored).sum() / score.scored.sum())
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        assert len(there.waits) == begun
        optimizer.step()
        found.append([scored.cpu(), *(p.detach().cpu() for p in model.parameters())])
    torch.testing.assert_close(found[1], found[0], rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("name", ["h2o", "streaming_llm", "adore"])
def test_a_servers_requests(there: Any, name: str, beside: Any) -> None:
    server = beside("methods/cache/test_pool.py")
    apply = server.METHODS.get(name) or {"adore": {"scores": "rule"}, "uniform": {"tokens": 6}}
    alone, served = made(LLAMA, {}), made(LLAMA, {}).to(CUDA)
    server.played(alone, apply, served=served, close=1e-3, steps=7)


@pytest.mark.parametrize("method", [{}, blocks("prefix")], ids=["tokens", "blocks"])
def test_generation_by_replays(there: Any, method: dict[str, Any], emulated: Any) -> None:
    """Recorded and replayed, kernels too: a frozen period asks the device nothing."""
    model = llama(32, 2, 4, 2, 48), method
    prompts, captured = [[3, 1, 4, 1, 5], [9, 2, 6]], []

    def capture(action: Any) -> Any:
        captured.append(emulated(action))
        return captured[-1]

    apply = resolve({"h2o": {}, "uniform": {"tokens": 4}})
    expected = generate(made(*model), prompts, 22, apply=apply)
    found = generate(
        made(*model).to(CUDA), prompts, 22, apply=apply, capture=lambda device: capture
    )
    assert found == expected
    assert captured


def controller(folder: Path) -> Path:
    """ADORE's, with weights far apart."""
    torch.manual_seed(1)
    made = Controller(ControllerConfig(VOCABULARY, 32, hidden=16, match=8, layers=1))
    for parameter in made.parameters():
        torch.nn.init.normal_(parameter, std=0.5)
    made.save(folder)
    return folder
