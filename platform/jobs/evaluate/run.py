"""The evaluate job: what a model predicts and recalls, and what a cut cache takes of it."""

from __future__ import annotations

import contextlib
from collections.abc import Mapping
from typing import Any

from kvlab.methods.axis import Method
from kvlab.methods.store import load
from kvlab.platform.data import corpus
from kvlab.platform.jobs import environment
from kvlab.platform.jobs.context import Context, JobError
from kvlab.platform.jobs.dtype import torch_dtype
from kvlab.platform.jobs.evaluate import divergence, perplexity, recall
from kvlab.platform.jobs.evaluate.windows import Windows, cut
from kvlab.platform.jobs.prepared import applied

SAID = 32
"""Tokens of an answer at most."""
OF_WINDOWS = frozenset({"perplexity", "loss_by_position"})
"""Metrics that one scoring of the windows gives."""


def run(spec: Mapping[str, Any], context: Context) -> dict[str, Any]:
    """Measure the model of parent "of", on the held-out part of parent "data" and on our prompts.

    Args:
        spec: engine ("vllm": its engine answers, where it is not left out: recall alone),
            sequence_length and tokens (of the windows), first_target (the first position that
            every arm of this job predicts), batch_size (sequences), apply (run-time axes), metrics,
            dtype (of the model; losses are summed in float64), and where their metrics are asked
            for divergence (prompt, generate) and recall (see `recall.measure`).

    Returns:
        By metric: of perplexity and loss_by_position loss (nats per target), perplexity,
        bits_per_byte, perplexity_per_byte, targets (hash, count, bytes, first_target),
        targets_in_mixed_blocks (their share in blocks of this model that hold the end of one
        document and the beginning of another), loss_by_position, window_losses, window_targets,
        window_documents (which each begins in); `divergence`, `recall` and `multi_turn` under
        their names. And environment.

    Raises:
        JobError: another tokenizer's data, nothing to score, or prompts that cannot be made.
    """
    device = environment.prepare(context, spec["seed"])
    dtype = torch_dtype(spec["dtype"], device)
    model = load(context.inputs["of"], device=str(device), dtype=dtype).eval()
    metrics, span = set(spec["metrics"]), model.method.span()
    result: dict[str, Any] = {}
    if metrics & {*OF_WINDOWS, "divergence"}:
        windows = _windows(spec, context, model.config.vocab_size)
        if metrics & OF_WINDOWS:
            method = applied(spec, context, spec["sequence_length"] // span)
            result |= perplexity.measure(model, windows, method, spec, device, context)
        if "divergence" in metrics:
            asked, size = spec["divergence"], spec["batch_size"]
            method = applied(spec, context, -(-asked["prompt"] // span))
            found = divergence.measure(model, windows, method, asked, size, device, context)
            result["divergence"] = found
    if metrics & recall.WAYS.keys():
        data, asked = context.inputs["data"], spec["recall"]
        size = spec["batch_size"]

        def cut_for(tokens: int) -> Method:
            return applied(spec, context, -(-tokens // span))

        served = spec.get("engine") == "vllm"
        apply = cut_for if spec["apply"] or served else None
        with contextlib.ExitStack() as stack:
            answer = None
            if served:
                from kvlab.platform.jobs.evaluate.served import answering

                longest = min(max(asked["lengths"]) + SAID, model.config.max_positions)
                method = applied(spec, context, -(-max(asked["lengths"]) // span))
                answer = stack.enter_context(
                    answering(context.inputs["of"], method, dtype, longest, size, spec["seed"])
                )
            result |= recall.measure(
                model, data, apply, asked, spec["metrics"], size, device, context, answer
            )
    measured = environment.capture(context, dtype=str(dtype).removeprefix("torch."))
    return {**result, "environment": measured}


def _windows(spec: Mapping[str, Any], context: Context, known: int) -> Windows:
    held = corpus.load(context.inputs["data"], "heldout")
    if held.vocab_size > known:
        raise JobError(
            f"the data's tokenizer has {held.vocab_size} tokens, the model's vocabulary "
            f"{known}: use the model's own tokenizer"
        )
    windows = cut(held, spec["sequence_length"], spec["tokens"], spec["first_target"])
    if not bool(windows.targets.any()):
        raise JobError(
            f"nothing to score: {held.tokens.numel()} held-out tokens give no target at position "
            f"{spec['first_target']} or later; raise data.holdout or give more text"
        )
    return windows
