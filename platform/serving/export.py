"""A folder that vLLM serves: config.json of our own, weights, tokenizer."""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from kvlab import KvlabError
from kvlab.methods.axis import Method
from kvlab.methods.decoder.config import DecoderConfig
from kvlab.methods.registry import from_dict
from kvlab.platform.artifacts import whole
from kvlab.platform.data.documents import DataError
from kvlab.platform.data.vocabulary import end_of_text
from kvlab.platform.jobs.checkpoint import read_config, trained_method
from kvlab.platform.jobs.controller.supply import supplied
from kvlab.platform.serving.demand import Unserved, problems, under

ARCHITECTURE, MODEL_TYPE = "KvlabForCausalLM", "kvlab"
TOKENIZER = (
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "chat_template.jinja",
    "generation_config.json",
)
PLAIN_TOKENIZER = {"tokenizer_class": "PreTrainedTokenizerFast"}
"""Or transformers takes the architecture's own class, which splits text its own way."""
WEIGHTS = "model.safetensors"


CONTROLLER = "controller"
"""Where a served folder has what ADORE learned."""


def check(source: Path, apply: Mapping[str, Any]) -> tuple[DecoderConfig, Method]:
    """Return the sizes of a model's folder, and its method under run-time choices.

    Raises:
        Unserved: the server cannot keep it. KvlabError: there is no model.
    """
    config = read_config(source)
    method = under(trained_method(source), apply)
    if wrong := problems(config, method):
        raise Unserved("; ".join(wrong))
    if lacking := method.lacks():
        raise KvlabError(f"needs a trained {lacking}: name one (--{lacking}), see docs/adore.md")
    return config, method


def write(source: Path, apply: Mapping[str, Any], folder: Path) -> None:
    """Write a model with its run-time choices into a new folder, whole or not at all.

    Args:
        source: a folder that `kvlab.methods.store.load` loads. apply: canonical.

    Raises:
        Unserved: the server cannot keep it. KvlabError: no model, or no room.
    """
    config, _ = check(source, apply)
    with whole(folder) as made:
        dtype = _weights(source, made)
        described = {
            "config": config.to_dict(),
            "method": trained_method(source),
            "apply": _carried(apply, made),
        }
        text = json.dumps(description(config, described, dtype, _ends(source)), indent=2)
        (made / "config.json").write_text(text + "\n", encoding="utf-8")
        copy_tokenizer(source, made)


def described_in(raw: Mapping[str, Any], folder: Path) -> dict[str, Any]:
    """What a served folder's config.json says of its model: "config", "method", "apply"."""
    found = dict(raw)
    apply = from_dict(found["apply"])
    if getattr(apply["eviction"].params, CONTROLLER, ""):
        found["apply"] = supplied(apply, folder / CONTROLLER).to_dict()
    return found


def _carried(apply: Mapping[str, Any], made: Path) -> dict[str, Any]:
    """Copy what run-time choices refer to into a folder; return them, referring to that."""
    method = from_dict(apply)
    trained = getattr(method["eviction"].params, CONTROLLER, "")
    if not trained:
        return dict(apply)
    shutil.copytree(trained, made / CONTROLLER)
    return supplied(method, Path(CONTROLLER)).to_dict()


def description(
    config: DecoderConfig, described: Mapping[str, Any], dtype: str, eos: int | None
) -> dict[str, Any]:
    """What config.json says: ours, and the sizes that vLLM asks every model for."""
    return {
        "architectures": [ARCHITECTURE],
        "model_type": MODEL_TYPE,
        "kvlab": dict(described),
        "dtype": dtype,
        "vocab_size": config.vocab_size,
        "hidden_size": config.width,
        "num_hidden_layers": config.layers,
        "num_attention_heads": config.heads,
        "num_key_value_heads": config.kv_heads,
        "head_dim": config.head_dim,
        "max_position_embeddings": config.max_positions,
        "tie_word_embeddings": config.tie_embeddings,
        "bos_token_id": config.bos_id,
        "pad_token_id": config.pad_id,
        "eos_token_id": eos,
    }


def copy_tokenizer(source: Path, folder: Path) -> None:
    """Copy a tokenizer's files, where there are any."""
    for name in TOKENIZER:
        if (source / name).is_file():
            shutil.copyfile(source / name, folder / name)
    if (folder / TOKENIZER[0]).exists() and not (folder / TOKENIZER[1]).exists():
        text = json.dumps(PLAIN_TOKENIZER) + "\n"
        (folder / TOKENIZER[1]).write_text(text, encoding="utf-8")


def _weights(source: Path, folder: Path) -> str:
    """Write the weights under our names; return their type's name."""
    from kvlab.methods.store import load
    from kvlab.methods.weights import write_tensors

    tensors = load(source).state_dict()
    write_tensors(tensors, folder / WEIGHTS)
    return str(next(iter(tensors.values())).dtype).removeprefix("torch.")


def _ends(source: Path) -> int | None:
    try:
        return end_of_text(source)
    except DataError:
        return None
