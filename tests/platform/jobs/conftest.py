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


SHARP = 60.0


def recaller(vocabulary):
    """Return a model, written by hand, that answers a token with what followed it before.

    The stream has three parts of `vocabulary`: the token, the token and the one before it, and the
    answer. Layer 0 reads two rows alike and fills the second; layer 1 looks for the row whose
    previous token is the one at hand, and fills the third, which the head shows.
    """
    import torch

    from kvlab.methods.build import build
    from kvlab.methods.decoder.config import DecoderConfig
    from kvlab.methods.registry import resolve

    n = vocabulary
    config = DecoderConfig(
        vocab_size=n, width=3 * n, layers=2, heads=1, kv_heads=1, head_dim=n, ffn_width=8,
        rotary_fraction=0.0, windows=(2, None),
    )  # fmt: skip
    model = build(config, resolve({}))
    token, pair, answer = torch.eye(3 * n).split(n)
    nothing = torch.zeros(n, 3 * n)
    with torch.no_grad():
        state = {name: torch.zeros_like(tensor) for name, tensor in model.state_dict().items()}
        state |= {name: torch.ones_like(t) for name, t in state.items() if "norm" in name}
        layers = "decoder.layers"
        state["decoder.embedding.weight"] = token.clone()
        state[f"{layers}.0.attention.qkv.weight"] = torch.cat((nothing, nothing, token))
        state[f"{layers}.0.attention.out.weight"] = pair.T.clone() / (3 * n) ** 0.5
        # The pair less half of the token itself leaves half of the token before.
        state[f"{layers}.1.attention.qkv.weight"] = torch.cat(
            (SHARP * token, pair - token / 2, token)
        )
        state[f"{layers}.1.attention.out.weight"] = answer.T.clone()
        state["decoder.output.weight"] = SHARP * answer
        model.load_state_dict(state)
    return model.eval()


@pytest.fixture(scope="session", name="recaller")
def recaller_fixture():
    return recaller
