"""The label job: texts, and for each of their tokens those that full attention attends to most."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any, Literal

import torch
from safetensors.torch import save_file
from torch import Tensor

from kvlab.methods.eviction.adore.labels import attention, most_attended
from kvlab.methods.store import load
from kvlab.platform.data import corpus
from kvlab.platform.jobs import environment
from kvlab.platform.jobs.context import Context, JobError, Stopped
from kvlab.platform.jobs.dtype import torch_dtype
from kvlab.platform.jobs.evaluate.windows import cut
from kvlab.platform.jobs.label.recall import Recalls, kept_for

FILE, RIVALS = "labels.safetensors", "rivals.json"
Part = Literal["train", "heldout"]
NONE = -1
"""Stands where a token has fewer before it than are labelled."""


def run(spec: Mapping[str, Any], context: Context) -> dict[str, Any]:
    """Label texts of both parts of parent "data" with the model of parent "of".

    Args:
        spec: top (labels of a token), aggregate (over heads and layers), per (model, or layer: each
            KV layer has labels of its own), samples (texts of the training part), held_out (of the
            other), sequence_length (of each), batch_size, dtype.

    Publishes rivals.json (as in the result) and labels.safetensors: train.ids, heldout.ids [N, T]
    int32; train.labels, heldout.labels [N, L, T, top] int16, places in the text, -1 where there are
    fewer; L is 1, or the KV layers.

    Returns:
        samples, held_out, sequence_length, top, aggregate, per; covered (the attention that goes to
        labelled tokens, a share of all, held-out texts); rivals (recall at m of rules that need no
        training, see `kvlab.platform.jobs.label.recall`); environment.

    Raises:
        JobError: another tokenizer's data, or too little text.
    """
    device = environment.prepare(context, spec["seed"])
    dtype = torch_dtype(spec["dtype"], device)
    model = load(context.inputs["of"], device=str(device), dtype=dtype).eval()
    total = spec["samples"] + spec["held_out"]
    top, length = spec["top"], spec["sequence_length"]
    rivals = Recalls(kept_for(top, length))
    published: dict[str, Tensor] = {}
    covered, done = [], 0
    parts: dict[Part, int] = {"train": spec["samples"], "heldout": spec["held_out"]}
    for part, count in parts.items():
        ids = _texts(context, part, count, length, model.config.vocab_size)
        found = []
        for batch in torch.split(ids, spec["batch_size"]):
            batch = batch.to(device)
            attended = attention(model, batch, aggregate=spec["aggregate"], per=spec["per"])
            marks = most_attended(attended, top)
            found.append(_places(marks, top).cpu())
            if part == "heldout":
                shares = attended / attended.sum(-1, keepdim=True)
                covered.append((shares * marks).sum(-1).mean((1, 2)).cpu())
                rivals.see("h2o", _before(attended), marks)
                rivals.see("recency", _recency(attended), marks)
            done += len(batch)
            context.progress(done, total, "texts")
            if context.stopping():
                raise Stopped
        published[f"{part}.ids"] = ids.to(torch.int32)
        published[f"{part}.labels"] = torch.cat(found)
    save_file(published, context.folder / FILE)
    (context.folder / RIVALS).write_text(json.dumps(rivals.result()) + "\n")
    return {
        "samples": spec["samples"],
        "held_out": spec["held_out"],
        "sequence_length": length,
        "top": top,
        "aggregate": spec["aggregate"],
        "per": spec["per"],
        "covered": float(torch.cat(covered).double().mean()),
        "rivals": rivals.result(),
        "environment": environment.capture(context, dtype=str(dtype).removeprefix("torch.")),
    }


def _texts(context: Context, part: Part, count: int, length: int, known: int) -> Tensor:
    text = corpus.load(context.inputs["data"], part)
    if text.vocab_size > known:
        raise JobError(
            f"the data's tokenizer has {text.vocab_size} tokens, the model's vocabulary "
            f"{known}: use the model's own tokenizer"
        )
    there = (text.tokens.numel() + len(text.ends)) // length
    if there < count:
        name = "samples" if part == "train" else "held_out"
        raise JobError(
            f"the {part} part of the data holds {there} texts of {length} tokens, {name} asks for "
            f"{count}: give more text, fewer {name} or a shorter sequence_length"
        )
    return cut(text, length, count * length, 0).ids


def _places(marks: Tensor, top: int) -> Tensor:
    """Turn marks [..., T, T] into the places of the marked [..., T, top] int16, then NONE."""
    rows = marks.shape[-1]
    order = marks.to(torch.uint8).argsort(dim=-1, descending=True, stable=True)[..., :top]
    real = torch.arange(min(top, rows), device=marks.device) < marks.sum(-1, keepdim=True)
    return order.masked_fill(~real, NONE).to(torch.int16)


def _before(attended: Tensor) -> Tensor:
    """H2O's score [..., T, T]: what each key got from all queries before this one."""
    return attended.cumsum(-2) - attended


def _recency(attended: Tensor) -> Tensor:
    """The newest first [T, T]."""
    rows = attended.shape[-1]
    return torch.arange(rows, device=attended.device, dtype=torch.float32).expand(rows, rows)
