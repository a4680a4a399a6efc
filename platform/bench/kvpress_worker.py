"""The other side of the kvpress bench: answers timed requests, run by the Python of kvpress.

It imports nothing of kvlab: its environment has kvpress, transformers and torch alone. A line of
JSON on stdin is a request, a line of JSON on stdout its answer:

    {"checkpoint": FOLDER, "threads": 2}        -> {"kvpress": "0.5.5", ...}, once, first
    {"press": "SnapKVPress" or null, "settings": {...}, "prompts": [[...], ...], "generate": 64,
     "way": "steps" or "generate"}              -> {"prefill", "decode" (seconds), "tokens", "rows"}

"steps" are those of kvpress's own pipeline, for a batch of any size: the prompt under the press,
then one call of the model after another. "generate" is transformers' `generate` under the press.
"""

from __future__ import annotations

import contextlib
import importlib
import json
import os
import sys
from time import perf_counter
from typing import Any

import torch
from torch import Tensor

NEEDS_EAGER = ("ObservedAttentionPress",)
"""Presses that read attention weights, which fused attention does not return."""


class Worker:
    """One model, and the presses it is asked for."""

    def __init__(self, checkpoint: str, threads: int) -> None:
        torch.set_num_threads(threads)
        self.kvpress: Any = importlib.import_module("kvpress")
        self.transformers: Any = importlib.import_module("transformers")
        self.transformers.utils.logging.disable_progress_bar()
        self.transformers.utils.logging.set_verbosity_error()
        self.model: Any = self.transformers.AutoModelForCausalLM.from_pretrained(
            checkpoint, dtype=torch.float32, attn_implementation="sdpa"
        ).eval()

    def versions(self) -> dict[str, Any]:
        from importlib.metadata import version

        names = ("kvpress", "transformers", "torch")
        return {name: version(name) for name in names} | {"threads": torch.get_num_threads()}

    @torch.inference_mode()
    def answer(self, request: dict[str, Any]) -> dict[str, Any]:
        """Generate greedily, never ending early; return seconds, tokens and rows kept."""
        name = request["press"]
        press = None if name is None else getattr(self.kvpress, name)(**request["settings"])
        wanted = "eager" if name in NEEDS_EAGER else "sdpa"
        if self.model.config._attn_implementation != wanted:
            self.model.set_attn_implementation(wanted)
        ids = torch.tensor(request["prompts"])
        way = self.steps if request["way"] == "steps" else self.generate
        cache = self.transformers.DynamicCache(config=self.model.config)
        begun = perf_counter()
        tokens, first = way(ids, request["generate"], press, cache)
        ended = perf_counter()
        layers = len(self.model.model.layers)
        return {
            "prefill": first - begun,
            "decode": ended - first,
            "tokens": tokens.tolist(),
            "rows": [int(cache.get_seq_length(layer)) for layer in range(layers)],
        }

    def steps(self, ids: Tensor, new_tokens: int, press: Any, cache: Any) -> tuple[Tensor, float]:
        """The pipeline's steps; the press is off once the prompt is read."""
        with contextlib.nullcontext() if press is None else press(self.model):
            out = self.model(input_ids=ids, past_key_values=cache, logits_to_keep=1)
        tokens = [out.logits[:, -1].argmax(-1)]
        first = perf_counter()
        positions = torch.tensor([[ids.shape[1]]])
        for _ in range(new_tokens - 1):
            out = self.model(
                input_ids=tokens[-1].unsqueeze(1), past_key_values=cache, position_ids=positions
            )
            tokens.append(out.logits[:, -1].argmax(-1))
            positions = positions + 1
        return torch.stack(tokens, dim=1), first

    def generate(
        self, ids: Tensor, new_tokens: int, press: Any, cache: Any
    ) -> tuple[Tensor, float]:
        """transformers' own loop; the first call of a logits processor ends the prefill."""
        called: list[float] = []

        def note(seen: Tensor, scores: Tensor) -> Tensor:
            called.append(perf_counter())
            return scores

        with contextlib.nullcontext() if press is None else press(self.model):
            out = self.model.generate(
                ids,
                attention_mask=torch.ones_like(ids),
                max_new_tokens=new_tokens,
                do_sample=False,
                past_key_values=cache,
                pad_token_id=0,
                eos_token_id=None,
                logits_processor=self.transformers.LogitsProcessorList([note]),
            )
        return out[:, ids.shape[1] :], called[0]


def main() -> None:
    """Answer until stdin ends; an error is an answer too."""
    # Libraries print to stdout as well: the answers get a descriptor of their own.
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    worker: Worker | None = None
    for line in sys.stdin:
        request = json.loads(line)
        try:
            if worker is None:
                worker = Worker(**request)
                answer = worker.versions()
            else:
                answer = worker.answer(request)
        except Exception as error:
            answer = {"error": f"{type(error).__name__}: {error}"}
        print(json.dumps(answer), file=answers, flush=True)


if __name__ == "__main__":
    main()
