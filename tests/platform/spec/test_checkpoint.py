"""A checkpoint folder is checked before anything runs: sizes, architecture, files."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest

from kvlab.platform.jobs.checkpoint import read_config
from kvlab.platform.spec.problems import WorkflowError
from kvlab.platform.spec.read import check, load_graph

LLAMA = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "vocab_size": 600,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 256,
    "rms_norm_eps": 1e-6,
    "hidden_act": "silu",
}
ZEROS = {"x": {"dtype": "F32", "shape": [4], "data_offsets": [0, 16]}}


def safetensors(header: dict[str, object], size: int = 16) -> bytes:
    text = json.dumps(header).encode()
    return len(text).to_bytes(8, "little") + text + bytes(size)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A folder that looks like a Llama checkpoint (its weights are never read here)."""
    read_config.cache_clear()
    (tmp_path / "config.json").write_text(json.dumps(LLAMA))
    (tmp_path / "model.safetensors").write_bytes(safetensors(ZEROS))
    return tmp_path


@pytest.fixture
def text(folder: Path) -> str:
    return (
        f"version: 1\nname: c\nmodel: {{checkpoint: {folder}}}\n"
        "data: {source: python, tokenizer: {bpe: 512}, sequence_length: 64}\njobs:\n"
        "  given: {train: {method: full_attention, tokens: 0}}\n"
        "  block: {uptrain: {from: given, method: {block_transformer: {block_length: 2}}, "
        "tokens: 1k}}\n"
    )


@pytest.fixture
def refused(text: str) -> Callable[[], str]:
    def read() -> str:
        with pytest.raises(WorkflowError) as error:
            check(text)
        (problem,) = error.value.problems
        assert problem.line == 3
        return f"{problem.path}: {problem.message}"

    return read


def test_sizes_come_from_the_checkpoint(text: str, folder: Path) -> None:
    cells = {cell.job: cell for cell in load_graph(text).cells}
    model = cells["given"].spec["model"]
    assert model["checkpoint"] == str(folder)
    assert len(model["fingerprint"]) == 64
    assert cells["block"].spec["method"]["granularity"]["block_transformer"]["embedder"] == (
        "projection"
    )


def test_content_counts_and_not_the_place(text: str, folder: Path) -> None:
    before = [cell.identity for cell in load_graph(text).cells]
    moved = folder.rename(folder.with_name("moved"))
    after = [cell.identity for cell in load_graph(text.replace(str(folder), str(moved))).cells]
    assert after == before
    weights = safetensors(ZEROS)[:-1] + b"\1"
    (moved / "model.safetensors").write_bytes(weights)
    changed = [cell.identity for cell in load_graph(text.replace(str(folder), str(moved))).cells]
    assert [a != b for a, b in zip(before, changed, strict=True)] == [False, True, True]


def test_another_architecture(folder: Path, refused: Callable[[], str]) -> None:
    other = {**LLAMA, "architectures": ["GPT2LMHeadModel"], "model_type": "gpt2"}
    (folder / "config.json").write_text(json.dumps(other))
    said = refused()
    assert said.startswith(f"model.checkpoint: {folder}/config.json: architecture GPT2LMHeadModel")
    assert "LlamaForCausalLM" in said


def test_a_setting_that_is_not_understood(folder: Path, refused: Callable[[], str]) -> None:
    (folder / "config.json").write_text(json.dumps({**LLAMA, "logit_softcap": 30.0}))
    assert "not supported: 'logit_softcap'" in refused()


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        (safetensors(ZEROS)[:-3], "its header promises 86 bytes, found 83"),
        (safetensors(ZEROS) + b"x", "its header promises 86 bytes, found 87"),
        (b"\xff" * 64, "its header would be 18446744073709551615 bytes of 64"),
        (b"abc", "its header would be 6513249 bytes of 3"),
        ((4).to_bytes(8, "little") + b"{{{{" + bytes(8), "its header is not the JSON of one"),
        ((2).to_bytes(8, "little") + b"[]", "its header is not the JSON of one"),
    ],
    ids=["cut", "too long", "noise", "tiny", "no JSON", "no mapping"],
)
def test_a_corrupt_safetensors_file(
    content: bytes, reason: str, folder: Path, refused: Callable[[], str]
) -> None:
    path = folder / "model.safetensors"
    path.write_bytes(content)
    assert refused() == f"model.checkpoint: {path} is no whole safetensors file: {reason}"


def test_shards(folder: Path, text: str, refused: Callable[[], str]) -> None:
    (folder / "model.safetensors").rename(folder / "model-1.safetensors")
    index = {"weight_map": {"x": "model-1.safetensors", "y": "model-2.safetensors"}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    assert refused() == f"model.checkpoint: '{folder}' lacks model-2.safetensors"
    (folder / "model-2.safetensors").write_bytes(safetensors(ZEROS))
    assert len(check(text).cells) == 3
    outside = {"weight_map": {"x": "../model-1.safetensors"}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(outside))
    assert "is not a file name in this folder" in refused()


def test_a_folder_without_a_model(folder: Path, refused: Callable[[], str]) -> None:
    (folder / "model.safetensors").unlink()
    assert "holds no .safetensors file" in refused()
    (folder / "config.json").unlink()
    read_config.cache_clear()
    assert refused() == f"model.checkpoint: '{folder}' holds neither model.json nor config.json"


def test_sizes_beside_a_checkpoint(text: str) -> None:
    with pytest.raises(WorkflowError, match="a checkpoint brings its own sizes: remove layers"):
        check(text.replace("model: {", "model: {layers: 3, "))


def test_a_tokenizer_that_is_larger_than_the_checkpoints(text: str) -> None:
    with pytest.raises(WorkflowError, match="has a vocabulary of 600, the tokenizer needs 900"):
        check(text.replace("bpe: 512", "bpe: 900"))


def test_our_own_folder_keeps_its_method(text: str, folder: Path) -> None:
    config = {"vocab_size": 600, "width": 32, "layers": 2, "heads": 4, "kv_heads": 4}
    config |= {"head_dim": 8, "ffn_width": 64}
    method = {"granularity": {"block_transformer": {"block_length": 2}}}
    (folder / "model.json").write_text(json.dumps({"config": config, "method": method}))
    with pytest.raises(WorkflowError) as error:
        check(text)
    assert (
        "the checkpoint was trained with block_transformer: write that method, "
        '{"block_transformer": {"block_length": 2}}'
    ) in str(error.value)


@pytest.mark.parametrize("method", [{"granularity": {"nope": {}}}, {"granularity": "x"}, [1], "x"])
def test_our_own_folder_with_a_method_that_is_none(method: object, text: str, folder: Path) -> None:
    config = {"vocab_size": 600, "width": 32, "layers": 2, "heads": 4, "kv_heads": 4}
    config |= {"head_dim": 8, "ffn_width": 64}
    (folder / "model.json").write_text(json.dumps({"config": config, "method": method}))
    with pytest.raises(WorkflowError, match=r"model\.json: 'method': "):
        check(text)


def test_a_folder_with_shared_keys_keeps_its_method(text: str, folder: Path) -> None:
    """The error says what to write."""
    lckv = {"architectures": ["LCKVLlamaForCausalLM"], "layer_types": "1s_1", "sliding_window": 16}
    (folder / "config.json").write_text(json.dumps({**LLAMA, **lckv, "forward_passes": 5}))
    given = text.partition("  block:")[0]
    with pytest.raises(WorkflowError) as error:
        check(given)
    (problem,) = error.value.problems
    said, _, method = problem.message.partition(", ")
    assert said == "the checkpoint was trained with cross_layer: write that method"
    (cell,) = (
        c for c in load_graph(given.replace("full_attention", method)).cells if c.job != "data"
    )
    assert cell.spec["method"]["sharing"]["cross_layer"]["layers"] == "1s_1"
    for layer_types, reason in (
        ("0_2", "names layer 2; the last is 1"),
        ("0_1_2", "has 3 entries"),
    ):
        wrong = {**LLAMA, **lckv, "layer_types": layer_types}
        (folder / "config.json").write_text(json.dumps(wrong))
        read_config.cache_clear()
        with pytest.raises(WorkflowError, match=reason) as error:
            check(given)
        assert len(error.value.problems) == 1


def test_fresh_weights_need_tokens(text: str, folder: Path) -> None:
    with pytest.raises(WorkflowError, match="must be at least 1 for a model with fresh weights"):
        check(text.replace(f"checkpoint: {folder}", "preset: nano"))


def test_a_wrong_folder_is_one_mistake(text: str, folder: Path) -> None:
    own = text.replace("tokenizer: {bpe: 512}, ", "")
    (folder / "config.json").unlink()
    for workflow in (own, own.replace(str(folder), "/nowhere")):
        with pytest.raises(WorkflowError) as error:
            check(workflow)
        (problem,) = error.value.problems
        assert problem.path == "model.checkpoint"


def test_a_sound_folder_without_a_tokenizer_is_told_so(text: str) -> None:
    with pytest.raises(WorkflowError) as error:
        check(text.replace("tokenizer: {bpe: 512}, ", ""))
    (problem,) = error.value.problems
    assert problem.path == "data.tokenizer"
