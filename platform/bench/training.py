"""A training step beside transformers' Llama: the same shape, weights, batches and optimizer."""

from __future__ import annotations

import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from kvlab.methods.decoder.config import PRESETS, DecoderConfig
from kvlab.methods.store import load
from kvlab.platform.bench.line import Line, interleaved, middle
from kvlab.platform.jobs.training.optimizer import adamw

VOCABULARY = 2048
SHAPES = {"cpu": ("micro", 8, 256), "cuda": ("mini", 32, 1024)}
"""Per device: model preset, sequences of a batch, tokens of a sequence."""
WARMUP = 3
REPEATS = 15
CLOSE = 1e-3
"""How far the two losses may be apart after all steps: both started from the same weights."""

SPEC = {"learning_rate": 1e-3, "betas": [0.9, 0.95], "weight_decay": 0.1}


def run(device: str = "cpu", dtype: torch.dtype = torch.float32) -> list[Line]:
    """Time forward, loss, backward, clipping and AdamW, in turn with the other side's."""
    torch.manual_seed(0)
    preset, rows, length = SHAPES[torch.device(device).type]
    config = DecoderConfig(vocab_size=VOCABULARY, **PRESETS[preset])
    theirs = llama(config)
    with tempfile.TemporaryDirectory() as folder:
        theirs.save_pretrained(folder)
        ours = load(Path(folder))
    ours, theirs = ours.to(device), theirs.to(device)
    batches = torch.randint(VOCABULARY, (WARMUP + REPEATS, rows, length), device=device)

    def our_loss(ids: Tensor) -> Tensor:
        score = ours(ids)
        return score.nll.sum() / score.scored.sum()  # type: ignore[no-any-return]

    def their_loss(ids: Tensor) -> Tensor:
        return theirs(input_ids=ids, labels=ids).loss  # type: ignore[no-any-return]

    our_step, our_losses = stepper(ours, our_loss, batches, dtype)
    their_step, their_losses = stepper(theirs, their_loss, batches, dtype)
    mine, other = interleaved(our_step, their_step, warmup=WARMUP, repeats=REPEATS)
    apart = max(abs(a - b) for a, b in zip(our_losses, their_losses, strict=True))
    # bfloat16 rounds the two orders of operations apart: 1e-3 is a float32 bound.
    bound = CLOSE if dtype == torch.float32 else 30 * CLOSE
    tokens = rows * length
    return [
        Line(
            f"training step, {config.width} wide, {config.layers} layers, {rows} x {length}",
            "tokens/s",
            tokens / middle(mine),
            tokens / middle(other),
            beside="transformers' Llama",
            least_ratio=1.0,
            void="" if apart <= bound else f"the losses are up to {apart:.2g} apart",
            detail={
                "seconds": mine,
                "their_seconds": other,
                "largest_loss_difference": apart,
                "threads": torch.get_num_threads(),
                "dtype": str(dtype),
            },
        )
    ]


def llama(config: DecoderConfig) -> Any:
    """transformers' Llama of the same sizes, with its fused attention."""
    from transformers import LlamaConfig, LlamaForCausalLM

    sizes: dict[str, Any] = {
        "vocab_size": config.vocab_size,
        "hidden_size": config.width,
        "intermediate_size": config.ffn_width,
        "num_hidden_layers": config.layers,
        "num_attention_heads": config.heads,
        "num_key_value_heads": config.kv_heads,
        "head_dim": config.head_dim,
        "rms_norm_eps": config.norm_eps,
        "rope_parameters": {"rope_type": "default", "rope_theta": config.rope_theta},
        "max_position_embeddings": config.max_positions,
        "tie_word_embeddings": config.tie_embeddings,
        "attn_implementation": "sdpa",
    }
    return LlamaForCausalLM(LlamaConfig(**sizes))  # type: ignore[no-untyped-call]


def stepper(
    model: nn.Module, loss_of: Callable[[Tensor], Tensor], batches: Tensor, dtype: torch.dtype
) -> tuple[Callable[[], None], list[float]]:
    """Return a function that takes the next training step, and the list its losses go to."""
    optimizer = adamw(model, SPEC)
    losses: list[float] = []
    mixed = dtype != torch.float32

    def step() -> None:
        ids = batches[len(losses)]
        with torch.autocast(ids.device.type, dtype, enabled=mixed):
            loss = loss_of(ids)
        loss.backward()  # type: ignore[no-untyped-call]
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        # Reading the loss waits for the device, as a loop that logs every step does.
        losses.append(float(loss.detach()))

    model.train()
    return step, losses
