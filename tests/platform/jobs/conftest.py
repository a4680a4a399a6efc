"""Tiny real data and models for the jobs."""

import random

import pytest

from kvlab.platform.jobs.local import run_cell

WORDS = "the cache keeps what a model has seen and every token reads all of it again"


@pytest.fixture(scope="session")
def data(tmp_path_factory):
    """A data job's folder: a few thousand bytes as tokens, vocabulary 257."""
    folder = tmp_path_factory.mktemp("data")
    (folder / "in").mkdir()
    draw = random.Random(0)
    for i in range(80):
        words = [draw.choice(WORDS.split()) for _ in range(draw.randint(5, 40))]
        (folder / "in" / f"{i:02}.txt").write_text(" ".join(words))
    spec = {
        "source": {"kind": "folder", "path": str(folder / "in"), "pattern": "*.txt"},
        "format": "text", "tokenizer": {"bytes": True}, "holdout": 0.2, "max_tokens": None,
    }  # fmt: skip
    run_cell("data", spec, {}, folder / "out")
    return folder / "out"


@pytest.fixture(scope="session")
def train_spec():
    """Return the spec of a train job of a tiny model, with changes."""
    from kvlab.methods.decoder.config import DecoderConfig

    sizes = {"width": 32, "layers": 2, "heads": 2, "kv_heads": 1, "head_dim": 16, "ffn_width": 64}
    config = DecoderConfig(vocab_size=257, tie_embeddings=True, **sizes).to_dict()
    spec = {
        "model": {"config": config}, "method": {}, "sequence_length": 32, "tokens": 1536,
        "batch_size": 4, "accumulate": 1, "learning_rate": 3e-3, "warmup": 0.2,
        "final_learning_rate": 0.1, "weight_decay": 0.1, "betas": [0.9, 0.95], "clip": 1.0,
        "precision": "auto", "checkpoint_every": None, "log_every": 4, "parallel": "ddp",
        "seed": 0,
    }  # fmt: skip

    def with_changes(**changes):
        return {**spec, **changes}

    return with_changes


@pytest.fixture(scope="session")
def base(data, train_spec, tmp_path_factory):
    """The folder of a tiny trained model."""
    folder = tmp_path_factory.mktemp("base")
    run_cell("train", train_spec(tokens=6144), {"data": data}, folder)
    return folder


def block(length, **params):
    """The canonical form of a Block Transformer method."""
    from kvlab.methods.registry import resolve

    return resolve({"block_transformer": {"block_length": length, **params}}).to_dict()


@pytest.fixture(scope="session", name="block")
def block_fixture():
    return block
