"""The calibrate job: how important each layer's attention is, over many prompts, and how surely."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from kvlab.methods.budget.squeeze_attention.budget import shares_of
from kvlab.methods.budget.squeeze_attention.grouping import three_means
from kvlab.methods.decoder.config import DecoderConfig
from kvlab.methods.model import LanguageModel
from kvlab.methods.store import load
from kvlab.platform.data import corpus
from kvlab.platform.jobs import environment
from kvlab.platform.jobs.calibrate.fixed import FILE
from kvlab.platform.jobs.calibrate.observing import Seen, observe
from kvlab.platform.jobs.calibrate.stability import agreed, moved, stability, summary
from kvlab.platform.jobs.context import Context, JobError, Stopped
from kvlab.platform.jobs.dtype import torch_dtype
from kvlab.platform.jobs.evaluate.windows import Windows, cut

SAMPLES_FILE = "importances.safetensors"
PREFIXES = (8, 4, 2, 1)
"""Prompts are also looked at cut to these parts: a causal model saw each of them on its way."""


def run(spec: Mapping[str, Any], context: Context) -> dict[str, Any]:
    """Prefill prompts of parent "data" with the model of parent "of".

    Args:
        spec: samples, sequence_length (tokens of each), part ("train" or "heldout"), sections (of
            the text, compared with one another), importance (names, the first gives the budgets),
            p, batch_size, dtype, seed.

    Publishes calibration.json (`budgets`) and importances.safetensors: cosine and mass [N, layers]
    float32, documents [N] int64.

    Returns:
        samples, sequence_length, rows (of a prompt: tokens or blocks), documents (distinct ones),
        layers, kv_layers, readers; importances (by name: summaries of `layers` and `kv_layers`),
        stability (by name, see `stability`), lengths (the cosine's groups and budgets at shorter
        prompts), budgets (importance, p, kv_layers, groups, shares: in averages, their mean is 1),
        agreement, as_majority, moved, rank_correlation (of the first importance), environment.

    Raises:
        JobError: another tokenizer's data, or too little text.
    """
    device = environment.prepare(context, spec["seed"])
    dtype = torch_dtype(spec["dtype"], device)
    model = load(context.inputs["of"], device=str(device), dtype=dtype).eval()
    prompts = _prompts(spec, context, model.config)
    seen = _observed(model, prompts.ids, spec, context, device)
    config = model.acting
    kv_layers, readers = list(config.kv_layers), _readers(config)
    sections = torch.arange(len(prompts)) * spec["sections"] // len(prompts)

    values = {"cosine": seen.cosine.double().mean(2)}
    if seen.spread is not None:
        values["mass"] = seen.spread.double()
    importances, stable = {}, {}
    for name in spec["importance"]:
        of_kv = _of_kv_layers(name, values[name], readers)
        importances[name] = {"layers": summary(values[name]), "kv_layers": summary(of_kv)}
        stable[name] = stability(_unimportance(name, of_kv), spec["p"], sections)
    first = spec["importance"][0]
    main = stable[first]
    mean = _unimportance(first, _of_kv_layers(first, values[first], readers)).mean(0).tolist()
    budgets = {
        "importance": first,
        "p": spec["p"],
        "kv_layers": kv_layers,
        "groups": three_means(mean),
        "shares": shares_of(mean, spec["p"]).tolist(),
    }
    _publish(context, budgets, values, prompts)
    return {
        "samples": len(prompts),
        "sequence_length": spec["sequence_length"],
        "rows": seen.cosine.shape[2],
        "documents": len(torch.unique(prompts.documents)),
        "layers": config.layers,
        "kv_layers": kv_layers,
        "readers": readers,
        "importances": importances,
        "stability": stable,
        "lengths": _by_length(seen.cosine, readers, spec["p"], model.method.span()),
        "budgets": budgets,
        "as_majority": main["as_majority"],
        "agreement": main["agreement"],
        "moved": main["moved"],
        "rank_correlation": main["rank_correlation"],
        "environment": environment.capture(context, dtype=str(dtype).removeprefix("torch.")),
    }


def _prompts(spec: Mapping[str, Any], context: Context, config: DecoderConfig) -> Windows:
    """Whole windows of text, evenly spaced over all of it."""
    text = corpus.load(context.inputs["data"], spec["part"])
    if text.vocab_size > config.vocab_size:
        raise JobError(
            f"the data's tokenizer has {text.vocab_size} tokens, the model's vocabulary "
            f"{config.vocab_size}: use the model's own tokenizer"
        )
    length, wanted = spec["sequence_length"], spec["samples"]
    there = (text.tokens.numel() + len(text.ends)) // length
    if there < wanted:
        raise JobError(
            f"the {spec['part']} part of the data holds {there} prompts of {length} tokens, "
            f"samples asks for {wanted}: give more text, fewer samples, a shorter "
            "sequence_length or the other part"
        )
    return cut(text, length, wanted * length, 0)


def _observed(
    model: LanguageModel,
    ids: Tensor,
    spec: Mapping[str, Any],
    context: Context,
    device: torch.device,
) -> Seen:
    """Return what all prompts [N, T] showed, on the CPU."""
    mass = "mass" in spec["importance"]
    cosine, spreads = [], []
    for start in range(0, len(ids), spec["batch_size"]):
        batch = ids[start : start + spec["batch_size"]].to(device)
        seen = observe(model, batch, mass=mass)
        if not bool(seen.cosine.isfinite().all()):
            raise JobError("the model's residual stream is not finite: its weights are broken")
        cosine.append(seen.cosine.cpu())
        if seen.spread is not None:
            spreads.append(seen.spread.cpu())
        if context.stopping():
            raise Stopped
        context.progress(start + len(batch), len(ids), "prompts")
    return Seen(torch.cat(cosine), torch.cat(spreads) if spreads else None)


def _readers(config: DecoderConfig) -> list[list[int]]:
    """The decoder layers that read each KV layer, from the bottom."""
    found: dict[int, list[int]] = {kv: [] for kv in config.kv_layers}
    for layer, kv in enumerate(config.kv_of):
        found[kv].append(layer)
    return list(found.values())


def _of_kv_layers(name: str, values: Tensor, readers: list[list[int]]) -> Tensor:
    """Values [N, layers] -> [N, K]: of the layers that read one KV layer, the most important."""
    pick = torch.amax if name == "mass" else torch.amin
    return torch.stack([pick(values[:, layers], dim=1) for layers in readers], dim=1)


def _unimportance(name: str, values: Tensor) -> Tensor:
    """A high cosine is unimportant; so is attention to few keys, for which few rows will do."""
    return 1 - values if name == "mass" else values


def _by_length(
    cosine: Tensor, readers: list[list[int]], p: float | None, span: int
) -> list[dict[str, Any]]:
    """Groups and budgets by the length of the prompt, from cosines [N, layers, T].

    What a causal model did at a row does not depend on the rows after it, so the first rows of a
    prompt are a shorter prompt.
    """
    rows = cosine.shape[2]
    lengths = sorted({rows // part for part in PREFIXES if rows // part})
    sums = cosine.double().cumsum(2)
    means = {
        n: _of_kv_layers("cosine", sums[:, :, n - 1] / n, readers).mean(0).tolist() for n in lengths
    }
    whole, shares = three_means(means[rows]), shares_of(means[rows], p)
    return [
        {
            "rows": n,
            "tokens": n * span,
            "mean": means[n],
            "groups": three_means(means[n]),
            "agreement": agreed(three_means(means[n]), whole),
            "moved": float(moved(shares_of(means[n], p), shares)),
        }
        for n in lengths
    ]


def _publish(
    context: Context, budgets: Mapping[str, Any], values: Mapping[str, Tensor], prompts: Windows
) -> None:
    from safetensors.torch import save_file

    (context.folder / FILE).write_text(json.dumps({"budgets": budgets}, indent=1))
    tensors = {name: tensor.float().contiguous() for name, tensor in values.items()}
    save_file(
        {**tensors, "documents": prompts.documents.contiguous()}, context.folder / SAMPLES_FILE
    )
