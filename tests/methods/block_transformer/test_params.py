"""What a YAML may ask for, and what is refused before torch is imported."""

import subprocess
import sys

import pytest

from kvlab.methods.axis import MethodError, Value
from kvlab.methods.block_transformer.params import BlockTransformerParams, check, uptrained
from kvlab.methods.block_transformer.sizes import origins, sizes
from kvlab.methods.decoder.config import DecoderConfig, llama
from kvlab.methods.registry import REGISTRY, resolve

CONFIG = DecoderConfig(vocab_size=61, **llama(48, 6, 6, 2, 96))


def test_the_defaults_are_the_papers() -> None:
    entry = REGISTRY.find("block_transformer")
    assert isinstance(entry, Value)
    params = resolve("block_transformer")["granularity"].params
    assert (params.block_length, params.prefix_length, params.ratio) == (4, 2, 1.0)
    found = sizes(CONFIG, params)
    assert (found.block.layers, found.token.layers) == (3, 3)
    assert (found.embedder, found.embedding_width, found.vectors, found.rows) == (
        "lookup",
        12,
        2,
        5,
    )
    assert not list(check(params, CONFIG))


@pytest.mark.parametrize(
    ("ratio", "layers"),
    [(1.0, (3, 3)), (5.0, (5, 1)), (2.0, (4, 2)), (0.5, (2, 4)), (20.0, (5, 1))],
)
def test_ratios(ratio: float, layers: tuple[int, int]) -> None:
    found = sizes(CONFIG, BlockTransformerParams(ratio=ratio))
    assert (found.block.layers, found.token.layers) == layers


def test_windows_of_the_decoder_are_counted_in_blocks() -> None:
    config = CONFIG.with_(windows=(32, None, 30, 3, 32, 32))
    found = sizes(config, BlockTransformerParams(block_length=4))
    assert found.block.windows == (8, None, 8)
    assert found.token.windows is None


@pytest.mark.parametrize("layers", ["split", "skip", "duplicate"])
def test_windows_follow_the_layers_taken(layers: str) -> None:
    windows = (4, 8, 12, None, 20, 24)
    params = BlockTransformerParams(block_length=4, layers=layers)
    taken, _ = origins(6, params)
    expected = tuple((windows[i] or 0) // 4 or None for i in taken)
    assert sizes(CONFIG.with_(windows=windows), params).block.windows == expected


def test_a_narrow_token_decoder() -> None:
    kept = sizes(CONFIG, BlockTransformerParams(token_width=24)).token
    assert (kept.width, kept.heads, kept.kv_heads, kept.head_dim, kept.ffn_width) == (
        24,
        3,
        1,
        8,
        48,
    )
    other = sizes(CONFIG, BlockTransformerParams(token_width=24, token_heads=6)).token
    assert (other.heads, other.kv_heads, other.head_dim) == (6, 2, 4)


@pytest.mark.parametrize(
    ("params", "problem"),
    [
        ({"embedder": "lookup", "block_length": 5}, "does not divide the width 48"),
        ({"token_width": 20}, "multiple of 24"),
        ({"token_width": 24, "expansion": "repeat"}, "use 'linear'"),
        ({"block_layers": 6}, "each decoder needs one"),
        ({"layers": "skip", "block_layers": 2}, "leave them out"),
        ({"token_heads": 2}, "only beside token_width"),
    ],
)
def test_impossible_sizes_are_problems(params: dict[str, object], problem: str) -> None:
    assert any(problem in found for found in check(BlockTransformerParams(**params), CONFIG))


def test_one_layer_cannot_be_split() -> None:
    problems = list(check(BlockTransformerParams(), CONFIG.with_(layers=1)))
    assert "each decoder needs one" in problems[0]
    assert not list(check(BlockTransformerParams(layers="duplicate"), CONFIG.with_(layers=1)))


def test_uptraining_projects() -> None:
    assert uptrained(BlockTransformerParams()).embedder == "projection"
    assert uptrained(BlockTransformerParams(embedder="cls")).embedder == "cls"
    assert origins(4, BlockTransformerParams(ratio=3.0)) == ([0, 1, 2], [3])
    with pytest.raises(MethodError):
        origins(4, BlockTransformerParams(block_layers=1, token_layers=1))


def test_params_and_cost_need_no_torch() -> None:
    program = (
        "import sys; sys.modules['torch'] = None\n"
        "import kvlab.methods.block_transformer.cost\n"
        "from kvlab.methods.registry import resolve\n"
        "resolve('block_transformer')\n"
    )
    subprocess.run([sys.executable, "-c", program], check=True)
