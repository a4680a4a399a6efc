"""What SqueezeAttention's calibration adds to a prefill: cosines of every layer, and the division.

Both sides read the same prompt and cut it to the same total under the same eviction; one divides it
alike over the layers, the other measures them first.
"""

from __future__ import annotations

import torch

from kvlab.methods.axis import Method
from kvlab.methods.build import build
from kvlab.methods.decoder.config import DecoderConfig, llama
from kvlab.methods.registry import resolve
from kvlab.platform.bench.line import Line, interleaved, middle
from kvlab.platform.bench.sharing import settle
from kvlab.platform.jobs.benchmark.median import summarise

VOCABULARY = 2048
SHARE = 0.2
SIZES = ((256, 8, 256), (512, 8, 512), (1024, 4, 1024), (1024, 4, 2048))
"""Width, layers and prompt; few layers of the large, to keep it short: the share is the same."""
BATCH = 1
WARMUP, REPEATS = 2, 20
LARGE = 1024
"""Width and prompt from which on the target holds."""
TARGET_PERCENT = 2.0


def run(device: str = "cpu", dtype: torch.dtype = torch.float32) -> list[Line]:
    """Time both prefills in turn, on untrained models: speed does not depend on the weights."""
    ways = tuple(
        resolve({"streaming_llm": {}, budget: {"share": SHARE}})
        for budget in ("squeeze_attention", "uniform")
    )
    return [calibration(*size, ways, device, dtype) for size in SIZES]


def calibration(
    width: int,
    layers: int,
    prompt: int,
    ways: tuple[Method, ...],
    device: str,
    dtype: torch.dtype,
) -> Line:
    """Compare prefills with calibration and without: how many per cent it adds."""
    heads = width // 64
    sizes = llama(width, layers, heads, heads, 2 * width + width // 4 * 3)
    torch.manual_seed(0)
    config = DecoderConfig(vocab_size=VOCABULARY, **sizes)
    model = build(config, resolve({})).to(device, dtype).eval()
    prompts = torch.randint(VOCABULARY, (BATCH, prompt), device=device)

    def prefill(way: Method) -> None:
        model.start(prompts, new_tokens=1, apply=way)
        settle(prompts)

    mine, other = interleaved(
        lambda: prefill(ways[0]), lambda: prefill(ways[1]), warmup=WARMUP, repeats=REPEATS
    )
    found = summarise([(a / b - 1) * 100 for a, b in zip(mine, other, strict=True)])
    return Line(
        f"SqueezeAttention's calibration, {width} wide, {layers} layers, prompt {prompt}",
        "% of prefill",
        found["median"],
        better="less",
        limit=TARGET_PERCENT if min(width, prompt) >= LARGE else None,
        detail={
            "seconds": middle(mine),
            "seconds_without": middle(other),
            "percent": found,
            "dtype": str(dtype),
        },
    )
